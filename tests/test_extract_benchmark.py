"""The benchmark of extraction: FLOPs against published ones, weights that are the same for all, a race of small encoders."""

import argparse
import sys
import types
from functools import partial

import pytest
import timm
import torch
from test_benchmarks import benchmarks, load  # noqa: F401 - a fixture
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture
def scripts(benchmarks, monkeypatch):  # noqa: F811
    """The two scripts, with encoders of two blocks in place of SAM's."""
    module = load(benchmarks, "extract_contestants")
    monkeypatch.setitem(sys.modules, "extract_contestants", module)
    script = load(benchmarks, "extract")
    small = {"embed_dim": 64, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)}
    real = timm.create_model

    def create(name, **options):
        return real(name, **{"norm_layer": partial(nn.LayerNorm, eps=1e-6)} | small | options)

    def teacher(name, **options):
        from test_encoding import small_sam

        made = small_sam(options["image_size"])
        made.encoder = create("samvit_base_patch16").eval().requires_grad_(False)
        return made

    monkeypatch.setattr(module.timm, "create_model", create)
    monkeypatch.setattr(module, "load_teacher", teacher)
    from segment_anything import sam_model_registry
    from segment_anything.build_sam import _build_sam

    monkeypatch.setitem(sam_model_registry, "vit_b", partial(_build_sam, 64, 2, 2, (1,)))
    return script, module


@pytest.mark.parametrize(("name", "size", "tera"), [("vit_h", 1024, 2.97), ("vit_h", 224, 0.126)])
def test_flops_are_those_that_are_published(benchmarks, monkeypatch, name, size, tera):  # noqa: F811
    module = load(benchmarks, "extract_contestants")
    assert module.model_flops(name, size) == pytest.approx(2e12 * tera, rel=0.01)


@pytest.mark.parametrize("size", [224, 320])
def test_all_have_the_same_weights(scripts, size):
    """Whose maps are those of timm's plain float32 model; at 320 pixels windows are padded, positions interpolated at both."""
    script, module = scripts
    some = script.pictures(2, size, CPU)
    expected = module.exact("vit_b", size, CPU, some)
    made, absent = {}, []
    for contestant in module.contestants("vit_b", size, CPU, "float32", ["timm", "folded", "flex"], [None]):
        try:
            made[contestant.name] = contestant.make()(some)()
        except module.NotHereError as error:
            absent.append((contestant.name, str(error)))
    assert list(made) == ["timm", "segment-anything", "ours, timm", "ours, folded", "ours, flex"]
    for name, maps in made.items():
        assert (maps - expected).abs().max() < 1e-4 * expected.std(), name
    ((name, why),) = absent
    assert name == "segment-anything-fast"
    assert "PyPI's segment-anything-fast (0.1.2) is FastSAM, another model" in why
    # Positions count: without them the maps are others.
    teacher = module.drawn_teacher("vit_b", size)
    for key, parameter in teacher.encoder.named_parameters():
        if "rel_pos" in key:
            parameter.zero_()
    flat = teacher(teacher.normalise(some.permute(0, 3, 1, 2).contiguous()))
    assert (flat - expected).abs().max() > 1e-2 * expected.std()


def test_segment_anything_fast_is_run_where_it_is_installed(scripts, monkeypatch):
    """Played by segment-anything's own encoder beneath torch.compile, which is how that package hands it out."""
    _, module = scripts
    from segment_anything import sam_model_registry

    class Compiled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

        def forward(self, pixels):
            return self._orig_mod(pixels)

    def build():
        sam = sam_model_registry["vit_b"]()
        return types.SimpleNamespace(image_encoder=Compiled(sam.image_encoder.eval().to(torch.bfloat16)))

    package = types.ModuleType("segment_anything_fast")
    package.sam_model_fast_registry = {"vit_b": build}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "segment_anything_fast", package)
    state = module.official_state(module.drawn_teacher("vit_b", 224), 224)
    with pytest.raises(module.NotHereError, match="its kernels are for CUDA"):
        module.segment_anything_fast("vit_b", state, CPU)
    encoder = module.segment_anything_fast("vit_b", state, torch.device("cuda"))  # whatever is moved, is moved later
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found = encoder(pixels.bfloat16()).float()
        own = sam_model_registry["vit_b"]().image_encoder.eval()
        module.load_official(own, state)
        expected = own(pixels)
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_a_table_of_known_seconds(scripts):
    script, _ = scripts
    racer = script.Racer(argparse.Namespace(name="ours"), None)
    racer.batch, racer.seconds, racer.error = 4, [0.02, 0.01, 0.05], (1e-3, 2e-2)
    lines = script.table({"ours": racer}, {"theirs": "no kernel"}, flops=6e12, peak=600.0)
    assert lines[2] == "| ours | 4 | 50 (20 to 100) | 300 | 50.0% |  | 1.0e-03 | 2.0e-02 |"
    assert "not run: no kernel" in lines[3]


def test_seconds_are_of_one_call(scripts, monkeypatch):
    script, _ = scripts
    now, calls = [0.0], []

    def run():
        calls.append(now[0])
        now[0] += 0.25

    monkeypatch.setattr(script.time, "perf_counter", lambda: now[0])
    assert script.seconds_of(run, CPU, least=2.0) == pytest.approx(0.25)
    assert len(calls) == 10


def test_the_benchmark_runs(scripts, tmp_path, monkeypatch, capsys):
    """Encoders, attention, and an extraction beside its parts, on small encoders: each line is there, shares are shares."""
    script, _ = scripts
    from test_encoding import small_sam

    monkeypatch.setattr("pipelines.jobs.load_teacher", lambda *names, **settings: small_sam(settings["image_size"]))
    words = "--teachers vit_b --sizes 112 --device cpu --seconds 0.02 --samples 20 --modes none --peak-tflops 0.5 --out"
    script.main([*words.split(), str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert set(text.splitlines()) <= set(capsys.readouterr().out.splitlines())
    assert "Utilisation is of 0.5 TFLOP/s, as given." in text
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert {"timm", "segment-anything", "ours, timm", "ours, folded", "ours, flex", "segment-anything-fast"} < set(rows)
    race, _, _ = text.partition("| a global block's attention |")  # whose rows bear some of the same names
    errors = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in race.splitlines()}
    for name in ("timm", "segment-anything", "ours, timm", "ours, folded", "ours, flex"):
        assert float(errors[name]) < 1e-3, name
    (extraction,) = [cells for name, cells in rows.items() if name.startswith("timm, no,")]
    whole, share, alone = float(extraction[1]), extraction[2].strip("*%"), float(extraction[3])
    assert float(share) == pytest.approx(100 * whole / alone, abs=0.6)
    assert text.count("| folded |") >= 2
