"""The benchmark of the training step: its FLOPs against a formula, its arithmetic, and a race of a few images."""

import math
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch

from sami_cache.models.students import SAMI, create_encoder


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    folder = request.config.rootpath / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = spec_from_file_location("benchmark_train", folder / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_train", module)
    spec.loader.exec_module(module)
    return module


def block_flops(width: int, queries: int, keys: int) -> int:
    """Of a transformer block, forward: query, key, value and output projections, attention, an MLP four times as wide."""
    projections = 2 * queries * width**2 + 2 * keys * width**2
    return 2 * (projections + 2 * queries * keys * width + 8 * queries * width**2)


def test_flops_equal_a_formula(script):
    width, depth, wide, blocks, channels = 48, 2, 64, 3, 12
    encoder = create_encoder("vit_t", depth=depth, embed_dim=width, num_heads=3)
    patches = 2 * 196 * 768 * width
    encoding = depth * block_flops(width, 50, 50) + 2 * 50 * width * wide
    head = 2 * 196 * wide * channels
    for keys_values, keys in (("visible+mask", 197), ("visible", 50)):
        sami = SAMI(
            encoder,
            target_channels=channels,
            decoder_width=wide,
            decoder_depth=blocks,
            decoder_heads=4,
            keys_values=keys_values,
        )
        decoding = blocks * block_flops(wide, 147, keys) + head
        # Backward takes twice as much as forward, but for the first layer, whose input needs no gradient.
        assert script.model_flops(sami) == 3 * (patches + encoding + decoding) - patches
    mae = script.MAE(encoder, width=wide, depth=blocks, heads=4)
    decoding = blocks * block_flops(wide, 197, 197) + 2 * 197 * wide * 768
    assert script.model_flops(mae) == 3 * (patches + encoding + decoding) - patches


def test_mae_attends_from_every_token_to_every_token_and_predicts_in_image_order(script):
    torch.manual_seed(0)
    mae = script.MAE(create_encoder("vit_t", depth=1, embed_dim=48, num_heads=3), width=32, depth=1, heads=4).eval()
    pixels, ids = torch.randn(1, 3, 224, 224), torch.randperm(196)[None]
    with torch.no_grad():
        before = mae(pixels, ids, 0.75)
        shown, hidden = ids[0, 0].item(), ids[0, -1].item()
        for token, changes in ((shown, True), (hidden, False)):
            row, column = divmod(token, 14)
            other = pixels.clone()
            other[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 3
            moved = (mae(other, ids, 0.75)[0] - before.prediction).abs().sum(-1)[0]
            assert bool((moved > 0).all()) is changes
            assert not changes or moved.argmax() == shown
    assert before.prediction.shape == (1, 196, 768)
    assert set(before.mask[0].nonzero().flatten().tolist()) == set(ids[0, 49:].tolist())


def test_a_device_is_filled_by_doubling(script):
    def rate_at(size: int) -> float:
        if size > 512:
            raise torch.OutOfMemoryError
        return size

    assert script.fill(lambda size: min(size, 200), 64, 4096) == (256, 200)
    assert script.fill(lambda size: size, 64, 300) == (256, 256)
    assert script.fill(rate_at, 64, 4096) == (512, 512)


def test_the_epoch_after_which_a_cache_is_paid_for(script):
    assert script.paid_after(10, 3, 5) == "6 epochs"  # after five they are level
    assert script.paid_after(10, 3, 14) == "1 epoch"
    assert script.paid_after(10, 3, 3) == "never"
    assert script.paid_after(math.nan, 3, 5) == ""
    text = "\n".join(script.online_lines({"vit_s": [0.5, 1.0]}, {1024: (99.5, 1), 224: (2.5, 1)}))
    assert "| vit_s | 1024 | 0.01 | **100** | 2 epochs |" in text
    assert "| vit_s | 224 | 0.3333 | **3** | 50 epochs |" in text


def test_a_race_runs_from_a_cache_of_generated_pictures(script, tmp_path):
    cache = script.open_or_make_cache(tmp_path, None, 40)
    assert script.open_or_make_cache(tmp_path, None, 40).cache_id == cache.cache_id
    sizes = [len(jpeg) for jpeg in script.generated_jpegs(8)]
    assert 20_000 < sum(sizes) / len(sizes) < 40_000
    lines, synthetic, cached = script.race("vit_t", cache, torch.device("cpu"), 1, 1, 1, False)
    assert [line.split("|")[1].strip() for line in lines[4:7]] == ["synthetic", "cache", "MAE"]
    assert f"cache / synthetic: **{synthetic / cached:.3f} (" in "\n".join(lines)
