"""What is chosen by measuring, with costs that are known: batch size and way of computing attention; and going on."""

from dataclasses import replace

import pytest
import torch
from photos import photo_folder
from test_encoding import small_sam

from pipelines.encoding import Encoder
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig, prepare_job
from pipelines.tuning import choose_batch, compile_mode, fastest, images_per_second, tune
from sami_cache.errors import SamiCacheError
from sami_cache.models.fast_attention import ATTENTIONS, FlexAttention, FoldedAttention, use_attention
from sami_cache.store.cache import Cache

ON_CPU = {"grid": 7, "precision": "float32", "device": torch.device("cpu"), "limit": 64}


class Cost:
    """A device on which a batch takes `overhead` + `each` x its size seconds and `bytes` an image, which breaks at `full`."""

    def __init__(self, overhead: float, each: float = 1.0, size: float = 1.0, full: float = 1e9) -> None:
        self.overhead, self.each, self.size, self.full = overhead, each, size, full
        self.tried: list[int] = []

    def __call__(self, batch: int) -> tuple[float, float]:
        self.tried.append(batch)
        if batch * self.size > self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch / (self.overhead + self.each * batch), batch * self.size


@pytest.mark.parametrize(
    ("cost", "limits", "chosen"),
    [
        (Cost(overhead=0), {"room": 1e9}, 1),  # a batch of one fills the device: more would only take room
        (Cost(overhead=1), {"room": 1e9}, 32),  # 32 / 33 is within 3 % of 256 / 257, 16 / 17 is not
        (Cost(overhead=1), {"room": 1e9, "limit": 8}, 8),
        (Cost(overhead=1), {"room": 10}, 8),
        (Cost(overhead=1, full=5), {"room": 1e9}, 4),
        (Cost(overhead=100, size=3), {"room": 100}, 32),
        (Cost(overhead=1, size=50), {"room": 10}, 1),  # the smallest there is, whether it fits the share or not
        (Cost(overhead=1), {"room": 1e9, "limit": 48}, 32),  # a power of two
    ],
)
def test_the_batch_is_the_smallest_that_is_as_fast_as_any_that_fits(cost, limits, chosen):
    assert choose_batch(cost, **limits) == chosen
    assert cost.tried == sorted(set(cost.tried))
    assert all(batch * cost.size <= limits["room"] or batch == 1 for batch in cost.tried)


def test_a_batch_that_is_slower_by_chance_does_not_end_the_search():
    rates = {1: 10.0, 2: 19.0, 4: 18.0, 8: 30.0, 16: 30.5}
    assert choose_batch(lambda size: (rates[size], size), room=1e9, limit=16) == 8


def test_a_batch_that_turns_out_to_need_more_than_its_share_is_not_taken():
    assert choose_batch(lambda size: (float(size), size**2), room=20, limit=64) == 4


def test_a_device_too_small_for_one_image_says_so():
    with pytest.raises(torch.OutOfMemoryError):
        choose_batch(Cost(overhead=1, full=0.5), room=1e9)


def test_the_fastest_way_that_works_is_taken():
    def rate_of(way):
        if way == "broken":
            raise RuntimeError("no kernel image is available for execution on the device")
        return {"slow": 1.0, "fast": 3.0, "middling": 2.0}[way]

    assert fastest(["slow", "broken", "fast", "middling"], rate_of) == "fast"
    with pytest.raises(RuntimeError, match="no kernel image"):
        fastest(["broken"], rate_of)


def test_rates_are_those_of_whole_batches(monkeypatch):
    """By a clock that only the batches move: half a second each."""
    import pipelines.tuning

    encoder, now = Encoder(small_sam(), **{name: ON_CPU[name] for name in ("grid", "precision", "device")}), [0.0]

    def encode(pixels, sizes):
        assert (tuple(pixels.shape), pixels.dtype, sizes.tolist()) == ((3, 112, 112, 3), torch.uint8, [[112, 112]] * 3)
        now[0] += 0.5

    monkeypatch.setattr(encoder, "encode", encode)
    monkeypatch.setattr(pipelines.tuning.time, "perf_counter", lambda: now[0])
    assert images_per_second(encoder, 3, least_seconds=2) == pytest.approx(6)
    assert now[0] == 3.0  # a first batch that is not counted, and then until it is more than two seconds


def test_the_cpu_measures_nothing(monkeypatch):
    monkeypatch.setattr("pipelines.tuning.images_per_second", None)
    teacher = small_sam()
    assert tune(teacher, attention=None, batch_size=None, **ON_CPU) == ("timm", 8)
    assert tune(teacher, attention="folded", batch_size=3, **ON_CPU) == ("folded", 3)
    assert all(isinstance(block.attn, FoldedAttention) for block in teacher.encoder.blocks)
    with pytest.raises(SamiCacheError, match="choose one of timm, folded, flex"):
        tune(teacher, attention="quick", batch_size=3, **ON_CPU)


def test_a_gpu_gets_the_way_and_the_batch_that_are_fastest_there(monkeypatch):
    """The measuring and the device are played; that the teacher is left with what was chosen is not."""
    teacher, measured = small_sam(), []

    def rate(encoder, batch_size):
        ways = [way for way, kind in ATTENTIONS.items() if type(teacher.encoder.blocks[0].attn) is kind]
        measured.append((*ways, batch_size))
        if ways == ["folded"]:
            raise RuntimeError("no kernel")
        return {"timm": 1.0, "flex": 2.0}[ways[0]]

    monkeypatch.setattr("pipelines.tuning.images_per_second", rate)
    monkeypatch.setattr("pipelines.tuning.Encoder", lambda teacher, **settings: None)
    monkeypatch.setattr("pipelines.tuning.batch_for_gpu", lambda encoder, limit: limit)
    on_gpu = ON_CPU | {"device": torch.device("cuda")}
    assert tune(teacher, attention=None, batch_size=None, **on_gpu) == ("flex", 64)
    assert measured == [("timm", 4), ("folded", 4), ("flex", 4)]
    assert all(isinstance(block.attn, FlexAttention) for block in teacher.encoder.blocks)
    measured.clear()
    assert tune(teacher, attention="timm", batch_size=None, **on_gpu) == ("timm", 64)
    assert tune(teacher, attention="folded", batch_size=5, **on_gpu) == ("folded", 5)
    assert measured == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_tuned_by_measuring():
    teacher = small_sam()
    way, batch = tune(teacher, attention=None, batch_size=None, **ON_CPU | {"device": torch.device("cuda")})
    assert way in ATTENTIONS
    assert 1 <= batch <= 64
    assert batch & (batch - 1) == 0
    use_attention(teacher.encoder, "timm")


def test_graphs_where_launching_takes_long_autotuning_where_products_are_large():
    assert compile_mode(torch.device("cpu"), 1024) == "default"
    assert compile_mode(torch.device("cuda"), 224) == "reduce-overhead"
    assert compile_mode(torch.device("cuda:1"), 1024) == "max-autotune-no-cudagraphs"


def test_going_on_means_the_recorded_batch_size_and_attention_again_but_not_on_other_hardware(tmp_path, monkeypatch):
    photo_folder(tmp_path / "photos", 12)
    monkeypatch.setattr("pipelines.jobs.load_teacher", lambda *names, **settings: small_sam(64))
    new = ExtractConfig(
        data=tmp_path / "photos",
        cache=tmp_path / "cache.zarr",
        teacher="vit_b",
        weights="random",
        image_size=64,
        grid=2,
        device="cpu",
        batch_size=5,
        attention="folded",
    )
    cache = Cache(extract(new).cache)
    provenance = cache.attributes["provenance"]
    assert (provenance["batch_size"], provenance["attention"], provenance["compiled"]) == (5, "folded", None)
    left_out = replace(new, batch_size=None, attention=None)
    job = prepare_job(left_out)
    assert (job.embedder.batch_size, job.attention) == (5, "folded")
    assert isinstance(job.embedder.teacher.encoder.blocks[0].attn, FoldedAttention)
    assert extract(left_out).samples_done == 0
    with pytest.raises(SamiCacheError, match="cannot compile --attention flex for the CPU"):
        prepare_job(replace(new, attention="flex", compile=True))
    monkeypatch.setattr("pipelines.jobs._hardware", lambda device: "another machine's GPU")
    job = prepare_job(left_out)
    assert (job.embedder.batch_size, job.attention) == (8, "timm")


def test_a_gpu_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SamiCacheError, match=r"--device cuda: torch .* sees no GPU here\. Use --device cpu"):
        prepare_job(ExtractConfig(data=tmp_path, cache=tmp_path / "cache.zarr", teacher="vit_b", device="cuda"))
