"""Batches through the teacher: packing, normalising, padding, precision, compiling and the order in which they come back."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from photos import photo_folder
from torch import nn

from pipelines.embedding import Embedder, ViewMode
from pipelines.encoding import Encoder, Pending, cast_once, normalise_and_pad
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig, prepare_job
from sami_cache.data.sources import open_source
from sami_cache.data.views import valid_region
from sami_cache.models.fast_attention import ATTENTIONS, use_attention
from sami_cache.models.teachers import Teacher, TeacherInfo, load_teacher
from sami_cache.store.cache import Cache

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def small_sam(size: int = 112, seed: int = 0) -> Teacher:
    """SAM's ViT-B with two blocks, one of them global, and relative positions that matter."""
    torch.manual_seed(seed)
    encoder = timm.create_model(
        "samvit_base_patch16", depth=2, global_attn_indexes=(1,), norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.2)
    info = TeacherInfo(
        name="vit_b",
        layer="neck",
        weights="random:0",
        weights_sha256="0" * 64,
        image_size=size,
        stride=16,
        channels=256,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        interpolation="bilinear",
    )
    return Teacher(encoder, info, index=1, norm=True)


def pictures(size: int, seed: int = 0) -> list[np.ndarray | None]:
    """Wide, tall, square, as small as a pixel, and one that is missing."""
    shapes = [(size, 37), (53, size), (size, size), None, (1, size), (size, 1)]
    rng = np.random.default_rng(seed)
    return [None if shape is None else rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


def packed(encoder: Encoder, some: list[np.ndarray | None]):
    batch = encoder.empty(len(some))
    batch.pixels.fill_(123)  # what an earlier batch may have left there
    for place, picture in enumerate(some):
        if picture is not None:
            batch.put(place, picture)
    return batch


def one_by_one(teacher: Teacher, some: list[np.ndarray | None]) -> torch.Tensor:
    """SAM's preprocessing of each picture by itself: normalise, then pad with zeros."""
    size = teacher.info.image_size
    batch = torch.zeros(len(some), 3, size, size)
    for index, picture in enumerate(some):
        if picture is not None:
            pixels = torch.from_numpy(picture).permute(2, 0, 1)
            batch[index, :, : pixels.shape[1], : pixels.shape[2]] = teacher.normalise(pixels)
    return batch


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu() - expected.cpu()).square().mean().sqrt() / expected.std())


def test_a_batch_is_normalised_and_padded_as_picture_by_picture_bit_for_bit():
    teacher = small_sam()
    encoder = Encoder(teacher, grid=7, precision="float32", device=torch.device("cpu"))
    batch = packed(encoder, pictures(112))
    found = normalise_and_pad(teacher, batch.pixels, batch.sizes)
    expected = one_by_one(teacher, pictures(112))
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert (found[0, :, :, 37:] == 0).all()
    assert (found[3] == 0).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_embeddings_are_the_teachers_bit_for_bit(precision):
    """In bfloat16 those of torch.autocast over weights that stayed float32."""
    teacher, some = small_sam(), pictures(112)
    encoder = Encoder(small_sam(), grid=6, precision=precision, device=torch.device("cpu"))
    found = encoder.launch(packed(encoder, some)).wait()
    cells = torch.tensor([[112, 112] if picture is None else picture.shape[:2] for picture in some]) / 16
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        maps = teacher(one_by_one(teacher, some))
    expected = valid_region(maps.float(), cells, 6).numpy()
    assert found.dtype == np.float32
    assert found.shape == (6, 256, 6, 6)
    assert np.array_equal(found, expected)


def test_weights_are_cast_once_and_only_those_that_autocast_casts():
    teacher = small_sam()
    teacher.encoder.extra = type("Standardised", (nn.Linear,), {})(2, 2)
    cast_once(teacher, torch.bfloat16)
    kept = {name.split(".")[-2] for name, value in teacher.named_parameters() if value.dtype == torch.float32}
    cast = {name.split(".")[-2] for name, value in teacher.named_parameters() if value.dtype == torch.bfloat16}
    assert {"qkv", "proj", "fc1", "fc2"} < cast
    assert {"norm1", "norm2", "attn", "extra"} < kept


@pytest.mark.slow  # a compiler runs
@pytest.mark.parametrize(
    ("way", "precision", "device"),
    [
        ("timm", "float32", "cpu"),
        ("folded", "float32", "cpu"),
        ("folded", "bfloat16", "cpu"),
        *(pytest.param(way, kind, "cuda", marks=ON_GPU) for way in ATTENTIONS for kind in ("float32", "bfloat16")),
    ],
)
def test_a_compiled_teacher_gives_the_same_but_for_rounding(way, precision, device):
    """Float32: 1e-5 of the spread. Bfloat16: no further from float32 than the plain teacher in bfloat16, and a tenth."""
    some = pictures(112)
    embeddings = {}
    for name, kind, attention, mode in (
        ("exact", "float32", "timm", None),
        ("plain", precision, "timm", None),
        ("compiled", precision, way, "default"),
    ):
        teacher = small_sam()
        use_attention(teacher.encoder, attention)
        on = torch.device("cpu" if name == "exact" else device)
        encoder = Encoder(teacher, grid=7, precision=kind, device=on, compiled=mode)
        whole = [torch.from_numpy(encoder.launch(packed(encoder, pictures(112, seed))).wait()) for seed in (1, 0)][1]
        embeddings[name] = whole[[picture is not None for picture in some]]
    exact = embeddings["exact"]
    allowed = 1e-5 if precision == "float32" else 1.1 * off(embeddings["plain"], exact)
    assert off(embeddings["compiled"], exact) < allowed
    if precision == "bfloat16":
        assert off(embeddings["plain"], exact) > 1e-4


def test_a_kind_of_block_is_compiled_once_however_many_there_are(monkeypatch):
    """Without the compiler behind it, which takes long: how many graphs there are is decided before."""
    from torch._dynamo.utils import counters

    real, some = nn.Module.compile, pictures(112)
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode, **settings: real(self, backend="eager", **settings))
    expected = None
    for mode in (None, "default"):
        torch.manual_seed(0)
        teacher = small_sam()
        teacher.encoder = timm.create_model(
            "samvit_base_patch16", embed_dim=64, num_heads=2, depth=5, global_attn_indexes=(2, 4)
        ).requires_grad_(False)
        teacher.info, teacher._index = replace(teacher.info, channels=256), 4
        counters.clear()
        encoder = Encoder(teacher.eval(), grid=7, precision="float32", device=torch.device("cpu"), compiled=mode)
        for count in (1, 2, 6, 6):
            found = encoder.launch(packed(encoder, some[:count])).wait()
        assert (expected is None) or np.array_equal(found, expected)
        expected = found
    # For each of three shapes those of the first, the windowed and the global blocks: nine at most, where torch stops at eight.
    assert 6 <= counters["stats"]["unique_graphs"] <= 9


@pytest.mark.slow
@ON_GPU
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_batches_in_flight_do_not_overwrite_each_other(mode):
    """A CUDA graph writes each batch's maps into the same memory: several launched at once give what each gives alone."""
    encoder = Encoder(small_sam(), grid=7, precision="bfloat16", device=torch.device("cuda"), compiled=mode)
    batches = [packed(encoder, pictures(112, seed)) for seed in range(6)]
    alone = [encoder.launch(batch).wait().copy() for batch in batches]
    pending = [encoder.launch(batch) for batch in batches]
    for found, expected in zip(pending, alone, strict=True):
        assert np.array_equal(found.wait(), expected, equal_nan=True)
    assert not np.array_equal(alone[0], alone[1])


def embedder(folder, **changes) -> Embedder:
    settings = {
        "source": open_source(folder),
        "teacher": load_teacher("efficientnet_lite0", grid=4),
        "grid": 4,
        "mode": ViewMode(),
        "precision": "float32",
        "device": torch.device("cpu"),
        "batch_size": 4,
        "images": None,
        "workers": 2,
    }
    return Embedder(**settings | changes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoding") / "photos"
    photo_folder(folder, 20)
    (folder / "chelsea" / "torn.jpg").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("ahead", [0, 1, 2, 10])
def test_batches_are_handed_out_in_order_while_later_ones_are_computed(photos, monkeypatch, ahead):
    events = []
    real_launch, real_wait = Encoder.launch, Pending.wait

    def launch(self, batch):
        events.append("launch")
        return real_launch(self, batch)

    def wait(self):
        events.append("wait")
        return real_wait(self)

    batches = [range(0, 4), range(4, 8), range(8, 12), range(12, 16), range(16, 21)]
    whole = embedder(photos, batch_size=5)
    plain = list(whole.embed(batches))
    monkeypatch.setattr(Encoder, "launch", launch)
    monkeypatch.setattr(Pending, "wait", wait)
    monkeypatch.setattr(Encoder, "ahead", ahead)
    late = list(whole.embed(batches))
    for one, other in zip(plain, late, strict=True):
        assert [sample.key for sample in one.samples] == [sample.key for sample in other.samples]
        assert np.array_equal(one.embeddings, other.embeddings)
    keys = [sample.key for part in late for sample in part.samples]
    assert keys == list(open_source(photos).keys)
    at_first = min(ahead, 4) + 1
    assert events[: at_first + 1] == ["launch"] * at_first + ["wait"]
    assert events.count("launch") == events.count("wait") == 5


def test_what_is_missing_is_zeros_and_moves_no_other_sample(photos):
    """A batch keeps its shape, and each sample its place in it, when images cannot be read."""
    whole = embedder(photos)
    keys = list(whole.source.keys)
    (torn,) = [number for number, key in enumerate(keys) if key == "chelsea/torn.jpg"]
    first = min(max(0, torn - 2), len(keys) - 4)
    batch = list(range(first, first + 4))
    (part,) = whole.embed([batch])
    place = batch.index(torn)
    assert part.samples[place].status != "ok"
    assert (part.embeddings[place] == 0).all()
    for number, sample, found in zip(batch, part.samples, part.embeddings, strict=True):
        assert sample.key == keys[number]
        if number != torn:
            (alone,) = embedder(photos, batch_size=1).embed([[number]])
            np.testing.assert_allclose(found, alone.embeddings[0], atol=1e-4 * np.abs(found).max())


@ON_GPU
def test_a_gpu_gives_what_the_cpu_gives(photos):
    batches = [range(start, min(start + 4, 21)) for start in range(0, 21, 4)]
    on_cpu = list(embedder(photos).embed(batches))
    on_gpu = list(embedder(photos, device=torch.device("cuda")).embed(batches))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert off(torch.from_numpy(other.embeddings), torch.from_numpy(one.embeddings)) < 1e-3


@pytest.mark.slow  # a compiler runs
def test_compiled_extraction_is_recorded_taken_up_again_and_no_part_of_the_identity(photos, tmp_path):
    common = ExtractConfig(
        data=photos, cache=tmp_path / "plain.zarr", teacher="efficientnet_lite0", grid=2, device="cpu", codec="float16"
    )
    plain = Cache(extract(common).cache)
    compiled = Cache(extract(replace(common, cache=tmp_path / "compiled.zarr", compile=True)).cache)
    assert (plain.attributes["provenance"]["compiled"], compiled.attributes["provenance"]["compiled"]) == (None, "default")
    assert plain.identity == compiled.identity
    assert (extract(replace(common, cache=compiled.path)).samples_done, compiled.samples) == (0, 21)
    assert prepare_job(replace(common, cache=compiled.path)).embedder.compiled == "default"
    assert prepare_job(replace(common, cache=compiled.path, compile=False)).embedder.compiled is None
    for number in range(21):
        expected = plain.read_embedding(number)
        assert np.abs(compiled.read_embedding(number) - expected).max() <= 2e-3 * np.abs(expected).max()
