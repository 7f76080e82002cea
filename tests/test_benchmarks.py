"""What benchmarks compute themselves: the codecs' theory against what is known of Gaussians, masks against their definition."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import teacher_like
from PIL import Image

from sami_cache.data.annotations import open_annotations
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig


@pytest.fixture
def benchmarks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = request.config.rootpath / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    return folder


def load(folder: Path, name: str):
    """A script of the folder, by another name: one of them is called as a module of the standard library."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_white_noise_needs_half_a_bit_a_halving_and_scalar_codes_a_quarter_of_a_bit_more(benchmarks: Path) -> None:
    theory = load(benchmarks, "rate_distortion")
    noise = np.random.default_rng(0).normal(0, 3, (40, 8, 16, 16)).astype(np.float32)
    for spectrum in theory.spectra(noise, np.zeros((8, 1, 1), np.float32)):
        assert theory.water_filling(spectrum, 0.09) == pytest.approx(0.5 * np.log2(9 / 0.09), abs=0.03)
    # At a high rate the entropy of a uniform quantiser lies 1/2 log2(2 pi e / 12) = 0.2546 bits above the bound.
    step = np.sqrt(12 * 0.009)
    codes = np.rint(noise / step).astype(np.int16)
    assert np.square(noise - codes * step).mean() == pytest.approx(0.009, rel=0.01)
    assert theory.entropy(codes) - 0.5 * np.log2(9 / 0.009) == pytest.approx(0.2546, abs=0.01)


def test_water_filling_spends_nothing_on_what_lies_under_the_water(benchmarks: Path) -> None:
    theory = load(benchmarks, "rate_distortion")
    # Level 1: the first loses 1 and costs 1/2 log2(16) bits, the second loses its 0.5 and costs nothing.
    assert theory.water_filling(np.array([16.0, 0.5]), 0.75) == pytest.approx(1.0)


def test_spectra_see_correlation_between_channels_and_between_cells(benchmarks: Path) -> None:
    theory = load(benchmarks, "rate_distortion")
    flat, spatial = theory.spectra(teacher_like(64), np.zeros((24, 1, 1), np.float32))
    assert spatial.mean() == pytest.approx(flat.mean(), rel=1e-5)
    alone = np.full(24, flat.mean())
    bits = [theory.water_filling(spectrum, flat.mean() / 100) for spectrum in (alone, flat, spatial)]
    assert bits[0] > bits[1] + 0.5 > bits[2] + 0.55


def test_a_histogram_a_class_is_never_worse_than_one_for_all(benchmarks: Path) -> None:
    theory = load(benchmarks, "rate_distortion")
    rng = np.random.default_rng(0)
    codes = np.rint(rng.normal(0, 1, (50, 4, 64)) * np.array([8, 4, 2, 1])[:, None]).astype(np.int8)
    apart = [theory.entropy(codes[:, number]) for number in range(4)]
    assert theory.class_entropy(codes) == pytest.approx(np.mean(apart))
    assert theory.class_entropy(codes) < theory.entropy(codes) - 0.2
    _, counts = np.unique(codes, return_counts=True)
    assert theory.entropy(codes) == pytest.approx(-(counts / codes.size * np.log2(counts / codes.size)).sum())


def test_the_benchmark_runs_and_its_figures_are_right(benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script = load(benchmarks, "codecs")
    embeddings = teacher_like(64, grid=16)
    # The file that an earlier run of the same settings would have left.
    np.save(tmp_path / "synthetic-None-None-16-64.npy", embeddings)
    script.main(
        ["--teacher", "synthetic", "--grid", "16", "--limit", "64", "--features", str(tmp_path), "--out", f"{tmp_path}/r.md"]
    )
    text = (tmp_path / "r.md").read_text()
    assert text in capsys.readouterr().out
    assert (tmp_path / "r.png").stat().st_size > 10_000
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    fit, held_out = embeddings[:32].astype(np.float64), embeddings[32:].astype(np.float64)
    lost = np.square(held_out - embeddings[32:].astype(np.float16).astype(np.float64)).sum()
    error = lost / np.square(held_out - fit.mean((0, 2, 3), keepdims=True)).sum()
    (row,) = [cells for names, cells in rows.items() if names[0].startswith("| float16") and names[1] == "none"]
    assert row[0] == f"| float16 (error {error:.1e})"
    assert row[3] == "(16.00)"
    ours = next(cells for names, cells in rows.items() if names == ("| pca (ours)", "as stored"))
    bound = next(cells for names, cells in rows.items() if names[0].endswith("PCA x 2-D DCT spectrum"))
    for column in range(2, 6):
        assert float(bound[column]) < float(ours[column])
    assert float(bound[3]) < float(ours[7]) < float(ours[3])
    order = [float(cells[3].strip("()")) for cells in rows.values() if cells[3].strip("()").replace(".", "").isdigit()]
    assert order == sorted(order)


@pytest.mark.parametrize("grid", [8, 14])
def test_every_transform_that_was_tried_keeps_the_energy(benchmarks: Path, grid: int) -> None:
    theory, script = load(benchmarks, "rate_distortion"), load(benchmarks, "codec_variants")
    embeddings = teacher_like(24, grid=grid)
    features = theory.Features(fit=embeddings[:12], held_out=embeddings[12:])
    names = {variant.transform for group in script.trials(script.recipe(grid), grid).values() for _, variant in group}
    assert len(names) > 10
    energy = features.energy * features.held_out.size
    for name in names:
        held_out = script.transform(name, features).held_out
        assert np.square(held_out, dtype=np.float64).sum() == pytest.approx(energy, rel=1e-4), name


def test_wide_coefficients_become_two_rows(benchmarks: Path) -> None:
    script = load(benchmarks, "codec_variants")
    codes = np.random.default_rng(0).integers(-20000, 20000, (3, 2, 5)).astype(np.float32)
    codes[:, 1] %= 100
    rows = script.as_digits(codes.copy()).astype(int)
    assert rows.shape == (3, 3, 5)
    assert (255 * rows[:, 0] + rows[:, 1] == codes[:, 0]).all()
    assert (rows[:, 2] == codes[:, 1]).all()


def test_targets_of_the_benchmark_are_those_of_the_decoder(benchmarks: Path) -> None:
    import torch

    lines = load(benchmarks, "targets").run(torch.device("cpu"), 2, 24, 1, ("vit_t",))
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["targets", "targets without DCT", "vit_t step"]
    assert float(lines[-1].split(" of the largest")[0].split()[-1]) < 1e-5


def test_gpu_benchmarks_run_once_for_each_gpu(
    benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    gpu = load(benchmarks, "gpu")
    assert all((benchmarks / script).is_file() for _, script, _ in gpu.WANTED)
    assert gpu.main() == (0 if gpu.torch.cuda.is_available() else 2)
    (tmp_path / "results").mkdir()
    (tmp_path / "fake.py").write_text("import sys; open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:-2]))")
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "NVIDIA X1 80GB (SXM)")
    monkeypatch.setattr(gpu, "WANTED", (("a", "fake.py", ("--x",)), ("b", "broken.py", ()), ("c", "fake.py", ("--y",))))
    assert gpu.main() == 1
    written = {path.name.rsplit("-", 1)[0]: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert written == {"a-nvidia-x1-80gb-sxm": "--x", "c-nvidia-x1-80gb-sxm": "--y"}
    monkeypatch.setattr(gpu, "WANTED", (gpu.WANTED[0], gpu.WANTED[2]))
    assert gpu.main() == 0
    assert capsys.readouterr().out.count("there already") == 2


def test_drawn_scenes_are_annotated_with_what_is_seen_of_each_object(benchmarks: Path, tmp_path: Path) -> None:
    scenes = load(benchmarks, "drawn_scenes")
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (50 + 20 * number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    photographs = scenes.read_photographs(tmp_path, 64)
    assert [photograph.shape for photograph in photographs] == [(64, 102, 3), (64, 73, 3), (72, 64, 3)]
    annotations = open_annotations(scenes.draw_scenes(tmp_path, 64, 6, tmp_path), tmp_path)
    for number in range(6):
        pixels, masks = scenes.draw_scene(64, np.random.default_rng((0, number)), photographs)
        np.testing.assert_array_equal(annotations.read_image(number), pixels)
        found = [one.mask() for one in annotations.objects(number)]
        np.testing.assert_array_equal(found, masks)
        assert np.sum(found, axis=0).max() == 1  # what is behind another is not seen
        assert min(mask.sum() for mask in found) >= scenes.LEAST_AREA


def test_the_ellipse_that_fills_a_box_covers_a_quarter_of_pi_of_it_and_cells_keep_what_they_can_show(benchmarks: Path) -> None:
    promptable = load(benchmarks, "promptable")
    box = np.zeros((300, 400), bool)
    box[50:250, 100:140] = True
    assert promptable.ellipse_iou(box) == pytest.approx(np.pi / 4, abs=0.01)
    rows, columns = np.ogrid[:300, :400]
    assert promptable.ellipse_iou(((rows - 149.5) / 100) ** 2 + ((columns - 200) / 50.5) ** 2 <= 1) > 0.98
    assert promptable.cells_iou(box, 1600) == 1  # a cell a pixel
    assert promptable.cells_iou(box, 100) > 0.9
    assert promptable.cells_iou(box[:, :105], 16) < 0.9


def test_intervals_over_seeds_are_students_and_over_pictures_weigh_them_by_their_objects(benchmarks: Path) -> None:
    promptable = load(benchmarks, "promptable")
    assert promptable._over_seeds([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 / sqrt(3)
    ours, theirs = [[0.5, 0.7], [], [0.9]], [[0.4, 0.6], [], [0.8]]  # a picture without objects counts as none
    assert promptable._over_pictures([(ours, theirs), (theirs, theirs)]) == "5.0 to 5.0"
    apart = [[1.0] * 9, [0.0]], [[0.0] * 9, [0.0]]
    assert promptable._over_pictures([apart]) == "0.0 to 100.0"
    assert promptable._mean(ours) == pytest.approx(70)


def test_masks_that_are_cut_to_the_box_end_where_it_does(benchmarks: Path) -> None:
    promptable = load(benchmarks, "promptable")
    model = SegmentAnything(SegmentAnythingConfig(encoder="vit_t", image_size=64, depth=1))
    whole, cut = (made(model) for made in (promptable.ModelSegmenter, promptable.CutToBox))
    boxes = np.array([[[4, 8], [30, 40]], [[0, 0], [50, 60]]])
    masks = []
    for segmenter in (whole, cut):
        segmenter.set_image(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))
        answers = segmenter.answer(boxes, np.array([[2, 3], [2, 3]]))
        masks.append([[answers.mask(query, token) for token in range(4)] for query in range(2)])
    inside = np.zeros((60, 50), bool)
    inside[8:40, 4:30] = True
    assert np.array(masks[0])[0, :, ~inside].any()  # an untrained model knows nothing of the box
    np.testing.assert_array_equal(masks[1][0], np.array(masks[0][0]) & inside)
    np.testing.assert_array_equal(masks[1][1], masks[0][1])
