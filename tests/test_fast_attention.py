"""SAM's attention computed in other ways, against timm's plain one and Meta's own encoder, in float32 and bfloat16."""

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn

from sami_cache.errors import SamiCacheError
from sami_cache.models.fast_attention import ATTENTIONS, FoldedAttention, use_attention

WAYS = [name for name in ATTENTIONS if name != "timm"]


def encoder(depth: int = 3, size: int = 224, global_block: int = 1) -> nn.Module:
    """A shallow SAM ViT-B with one block of global attention, its relative positions drawn: timm's start as zeros."""
    torch.manual_seed(0)
    model = timm.create_model(
        "samvit_base_patch16",
        img_size=size,
        depth=depth,
        global_attn_indexes=(global_block,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def answer(model: nn.Module, pixels: torch.Tensor, way: str, **settings) -> torch.Tensor:
    model = copy.deepcopy(model)
    use_attention(model, way, **settings)
    return model.forward_features(pixels)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the squared error, relative to the spread."""
    return float((found.float() - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(224, 224), (320, 160)])
def test_other_ways_give_what_timm_gives(way, shape):
    """At 224 the windows are whole; at 320 x 160 they are padded, the picture is not square, and tables are interpolated."""
    model = encoder()
    pixels = torch.randn(2, 3, *shape)
    if shape != (224, 224):
        model = encoder(size=320)
    with torch.no_grad():
        expected = answer(model, pixels, "timm")
        found = answer(model, pixels, way)
        assert off(found, expected) < 1e-5
        assert off(answer(model, pixels, way, windows=False), expected) < 1e-5
    # The relative positions do matter here, or this would prove nothing.
    flat = copy.deepcopy(model)
    for name, parameter in flat.named_parameters():
        if "rel_pos" in name:
            parameter.zero_()
    with torch.no_grad():
        assert off(flat.forward_features(pixels), expected) > 1e-2


def test_folded_attention_is_metas():
    from segment_anything.modeling.image_encoder import Attention

    torch.manual_seed(1)
    theirs = Attention(96, num_heads=3, use_rel_pos=True, input_size=(6, 9)).eval()
    for parameter in (theirs.rel_pos_h, theirs.rel_pos_w):
        nn.init.normal_(parameter, std=0.3)
    from timm.models.vision_transformer_sam import Attention as Timm

    ours = Timm(96, num_heads=3, qkv_bias=True, use_rel_pos=True, input_size=(6, 9)).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.__class__ = FoldedAttention
    cells = torch.randn(2, 6, 9, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(cells), theirs(cells), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_bfloat16_is_as_far_from_float32_as_timms(way, device):
    model, pixels = encoder(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = answer(model, pixels, "timm")
        model, pixels = model.to(device), pixels.to(device)
        with torch.autocast(device, torch.bfloat16):
            plain, found = (answer(model, pixels, name).cpu() for name in ("timm", way))
    assert off(plain, expected) > 1e-4
    assert off(found, expected) < 1.3 * off(plain, expected)


def test_ways_can_be_changed_and_undone():
    model, pixels = encoder(depth=2), torch.randn(1, 3, 224, 224)
    names = list(model.state_dict())
    with torch.no_grad():
        before = model.forward_features(pixels)
        use_attention(model, "folded")
        assert list(model.state_dict()) == names
        use_attention(model, "timm")
        assert torch.equal(model.forward_features(pixels), before)
    with pytest.raises(SamiCacheError, match="attention 'fast' is unknown; choose one of timm, folded, flex"):
        use_attention(model, "fast")
    with pytest.raises(SamiCacheError, match="is for SAM's encoders"):
        use_attention(timm.create_model("resnet10t"), "folded")
