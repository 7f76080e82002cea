"""The exported encoder in the hands of stock timm."""

import io

import pytest
import timm
import torch
from conftest import make_identity, make_samples, teacher_like
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sami_cache
from pipelines.export import export
from pipelines.train import TrainingConfig, train
from sami_cache.checkpoints import load_newest
from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.models.students import create_encoder
from sami_cache.store.cache import choose_layout
from sami_cache.store.creation import create_cache
from sami_cache.store.fitting import fit_codec
from sami_cache.store.writing import seal_cache, write_shard

SMALL = {"decoder_depth": 1, "decoder_width": 64, "batch_size": 4, "steps": 2, "holdout": 0.2, "device": "cpu"}


def jpeg_cache(path, samples=24):
    """A sealed cache whose images can be decoded: 24 made-up channels on an 8 x 8 grid, smooth colours as pictures."""
    embeddings = teacher_like(samples)
    fitted = fit_codec("pca", embeddings)
    keys = [f"class/{index:04d}.jpg" for index in range(samples)]
    cache = create_cache(
        path,
        identity=make_identity(codec={"name": "pca", "error": fitted.error}),
        codec=fitted,
        layout=choose_layout(fitted, 8, samples, 16),
        keys=keys,
        labels=[index % 3 for index in range(samples)],
        class_names=["a", "b", "c"],
        provenance={"note": "made by the tests"},
    )
    for shard in range(cache.shards):
        numbers = cache.shard_samples(shard)
        part = embeddings[numbers.start : numbers.stop]
        jpegs = [_jpeg(embedding[:3]) for embedding in part]
        write_shard(cache, shard, part, make_samples(keys[numbers.start : numbers.stop]), jpegs)
    seal_cache(cache)
    return path


def _jpeg(colours):
    low, high = colours.min(), colours.max()
    pixels = ((colours - low) / (high - low) * 255).astype("uint8").transpose(1, 2, 0)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=95)
    return sink.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps; do not write into it."""
    folder = tmp_path_factory.mktemp("export")
    train(TrainingConfig(run=folder / "run", cache=jpeg_cache(folder / "cache.zarr"), student="vit_t", **SMALL))
    return folder / "run"


def test_it_loads_strictly_and_computes_the_same(run, tmp_path):
    result = export(run, tmp_path / "new" / "encoder.safetensors")
    assert (result.step, result.steps, result.written, result.tensors) == (2, 2, True, 152)
    assert result.bytes == result.path.stat().st_size
    model = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(result.path), strict=True)
    trained = load_newest(run / "checkpoints").model
    encoder = create_encoder("vit_t")
    encoder.load_state_dict({name[8:]: tensor for name, tensor in trained.items() if name.startswith("encoder.")})
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.eval().forward_features(image), encoder.eval().forward_features(image))
    fresh = create_encoder("vit_t").state_dict()["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(load_file(result.path)["blocks.0.mlp.fc1.weight"], fresh)
    assert [path.name for path in result.path.parent.iterdir()] == ["encoder.safetensors"]


def test_the_line_it_prints_loads_it(run, tmp_path):
    result = export(run, tmp_path)
    assert result.path == tmp_path / "vit_tiny_patch16_224.safetensors"
    model = eval(result.load_line, {"timm": timm})
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert torch.equal(model.state_dict()["pos_embed"], load_file(result.path)["pos_embed"])


def test_the_header_says_what_it_is(run, tmp_path):
    with safe_open(export(run, tmp_path).path, "pt") as file:
        found = file.metadata()
    cache_id = load_newest(run / "checkpoints").config["cache"]["cache_id"]
    expected = {"format": "pt", "timm": "vit_tiny_patch16_224", "student": "vit_t", "cache_id": cache_id, "step": "2"}
    assert found | expected == found
    assert found["sami_cache"] == sami_cache.__version__
    assert found["head"].startswith("untrained")


def test_nothing_else_is_overwritten(run, tmp_path):
    first = export(run, tmp_path)
    before = first.path.stat()
    again = export(run, tmp_path)
    assert not again.written
    assert (again.path.stat().st_mtime_ns, again.path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    with safe_open(first.path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(first.path)
    weights["norm.bias"] = weights["norm.bias"] + 1
    save_file(weights, first.path, metadata)
    with pytest.raises(SamiCacheError, match=r"not the export of step 2 of this run: nothing was overwritten.*--out FILE"):
        export(run, tmp_path)
    first.path.write_bytes(b"something of the user's")
    with pytest.raises(SamiCacheError, match="nothing was overwritten"):
        export(run, tmp_path)
    assert first.path.read_bytes() == b"something of the user's"


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(SamiCacheError, match=r"there is no run here.*sami-cache train --run"):
        export(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(SamiCacheError, match="has no checkpoint yet"):
        export(tmp_path / "empty")
    with pytest.raises(SamiCacheError, match=r"ends in \.safetensors"):
        export(run, tmp_path / "encoder.pth")
    damaged = tmp_path / "empty" / "checkpoints" / "step-00000002"
    damaged.mkdir(parents=True)
    (damaged / "state.json").write_text("{}")
    with pytest.raises(DamageError, match="no intact checkpoint"):
        export(tmp_path / "empty")


def test_a_file_that_timm_refuses_never_appears(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.export.export_encoder", lambda encoder: {"norm.bias": torch.zeros(192)})
    with pytest.raises(RuntimeError, match="Missing key"):
        export(run, tmp_path)
    assert list(tmp_path.iterdir()) == []
