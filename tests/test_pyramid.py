"""ViTDet's backbone against the one in transformers, which we did not write."""

import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from sami_cache.errors import SamiCacheError
from sami_cache.models.pyramid import SimpleFeaturePyramid, layer_scale

WIDTH, DEPTH = 32, 4


def encoder(size=96, **options):
    shape = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "img_size": size, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **shape | options)


def reference(mine, size, window, local):
    """transformers' VitDet with the same weights."""
    from transformers import VitDetConfig, VitDetModel

    config = VitDetConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=size,
        pretrain_image_size=size,
        window_size=window or 0,
        window_block_indices=local,
        use_relative_position_embeddings=False,
    )
    model = VitDetModel(config).eval()
    names = {
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.projection": "patch_embed.proj",
        "encoder.layer": "blocks",
        "attention.proj": "attn.proj",
        "attention.qkv": "attn.qkv",
    }
    state = {}
    for name in model.state_dict():
        own = name
        for theirs, ours in names.items():
            own = own.replace(theirs, ours)
        state[name] = mine.state_dict()[own]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("size", "window"), [(96, 2), (96, 4), (96, None), (128, 3)])
def test_the_last_map_is_that_of_transformers(size, window):
    torch.manual_seed(0)
    mine = encoder(size)
    with torch.no_grad():
        mine.pos_embed.normal_()
    theirs = reference(mine, size, window, [0, 2] if window else [])
    pyramid = SimpleFeaturePyramid(mine, channels=16, window=window, global_blocks=2).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state
        torch.testing.assert_close(pyramid.encode(pixels), expected, rtol=1e-4, atol=1e-5)
        maps = pyramid(pixels)
    assert {name: tuple(found.shape) for name, found in maps.items()} == {
        f"p{number}": (2, 16, size >> number, size >> number) for number in (2, 3, 4, 5)
    }


def test_pictures_of_another_size_get_resampled_positions():
    torch.manual_seed(0)
    square = encoder(96)
    wide = encoder((64, 160))
    state = square.state_dict()
    grid = resample_abs_pos_embed(state["pos_embed"], [4, 10], [6, 6], num_prefix_tokens=1)
    wide.load_state_dict({**state, "pos_embed": grid})
    pixels = torch.randn(2, 3, 64, 160)
    mine, theirs = (SimpleFeaturePyramid(one, window=None).encode(pixels) for one in (square, wide))
    torch.testing.assert_close(mine, theirs)
    assert mine.shape == (2, WIDTH, 4, 10)


def test_every_parameter_that_is_trained_gets_a_gradient():
    pyramid = SimpleFeaturePyramid(encoder(class_token=True), channels=16, window=2, global_blocks=2)
    sum(found.square().mean() for found in pyramid(torch.randn(1, 3, 96, 96)).values()).backward()
    assert [name for name, one in pyramid.named_parameters() if one.requires_grad and one.grad is None] == []


def test_what_does_not_fit_is_refused():
    with pytest.raises(SamiCacheError, match="3 of 4 blocks global: expected"):
        SimpleFeaturePyramid(encoder(), global_blocks=3)
    with pytest.raises(SamiCacheError, match="patches of 16"):
        SimpleFeaturePyramid(encoder(patch_size=8))


def test_layer_decay_is_that_of_timm():
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", depth=5, num_classes=7)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in param_groups_layer_decay(model, layer_decay=0.6):
        for parameter in group["params"]:
            name = names[id(parameter)]
            own = name if name.startswith("head") else f"backbone.encoder.{name}"
            # timm counts the final norm to the last block, MAE's own code and we to the head.
            expected = 1 if name.startswith("norm") else group["lr_scale"]
            assert layer_scale(own, 5, 0.6) == pytest.approx(expected), name
