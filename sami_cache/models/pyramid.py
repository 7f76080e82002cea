"""ViTDet's backbone: a plain ViT with window attention, and a feature pyramid made from its last map (arXiv 2203.16527)."""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sami_cache.errors import SamiCacheError

CHANNELS = 256
WINDOW = 14
"""Tokens a side: what an encoder saw in pretraining at 224 pixels."""
GLOBAL_BLOCKS = 4


class SimpleFeaturePyramid(nn.Module):
    """Maps at strides 4, 8, 16 and 32 (p2 to p5) from the last map of a ViT with patches of 16.

    In most blocks tokens attend within windows; in `global_blocks` of them, evenly spaced and the last among them, to all.
    The class token is left out, as in ViTDet. ViTDet's relative positions are not there: the encoders have none.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        channels: int = CHANNELS,
        window: int | None = WINDOW,
        global_blocks: int = GLOBAL_BLOCKS,
    ) -> None:
        """`window`: tokens a side; None: every block attends to everything. The encoder is taken as it comes."""
        super().__init__()
        depth = len(encoder.blocks)
        if encoder.pos_embed is None or encoder.patch_embed.patch_size[0] != 16:
            raise SamiCacheError("the encoder must have a position embedding and patches of 16")
        if window is not None and (window < 1 or depth % global_blocks):
            raise SamiCacheError(
                f"window {window}, {global_blocks} of {depth} blocks global: expected 1 token or more, and a divisor of {depth}"
            )
        self.encoder = encoder
        encoder.patch_embed.strict_img_size = False
        # Nothing reads them here; a parameter that gets no gradient is an error where several processes train.
        for unused in ("norm", "fc_norm", "head"):
            setattr(encoder, unused, nn.Identity())
        if encoder.cls_token is not None:
            encoder.cls_token.requires_grad_(False)
        every = depth // global_blocks if window is not None else 1
        self.windows = [None if (number + 1) % every == 0 else window for number in range(depth)]
        width = encoder.embed_dim
        up: Any = nn.ConvTranspose2d
        finest = [up(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU(), up(width // 2, width // 4, 2, 2)]
        self.p2 = nn.Sequential(*finest, *_out(width // 4, channels))
        self.p3 = nn.Sequential(up(width, width // 2, 2, 2), *_out(width // 2, channels))
        self.p4 = nn.Sequential(*_out(width, channels))
        self.p5 = nn.Sequential(nn.MaxPool2d(2), *_out(width, channels))
        self.out_channels = channels

    def forward(self, pixels: Tensor) -> OrderedDict[str, Tensor]:
        """Normalised [B, 3, H, W], sides multiples of 32 -> {"p2": [B, C, H / 4, W / 4], ... "p5": [B, C, H / 32, W / 32]}.

        Of another size than the encoder's, positions are resampled (bicubic, antialiased).
        """
        features = self.encode(pixels)
        return OrderedDict((name, getattr(self, name)(features)) for name in ("p2", "p3", "p4", "p5"))

    def encode(self, pixels: Tensor) -> Tensor:
        """The encoder's last map: [B, D, H / 16, W / 16]."""
        encoder: Any = self.encoder
        tokens = encoder.patch_embed(pixels)  # [B, N, D]
        positions = encoder.pos_embed
        if not encoder.no_embed_class:
            positions = positions[:, encoder.num_prefix_tokens :]
        rows, columns = (side // 16 for side in pixels.shape[-2:])
        if (rows, columns) != tuple(encoder.patch_embed.grid_size):
            size, old = [rows, columns], list(encoder.patch_embed.grid_size)
            positions = resample_abs_pos_embed(positions, size, old, num_prefix_tokens=0)
        tokens = encoder.norm_pre(encoder.pos_drop(tokens + positions)).unflatten(1, (rows, columns))
        for block, window in zip(encoder.blocks, self.windows, strict=True):
            tokens = _attend(block, tokens, window)
        return tokens.permute(0, 3, 1, 2)


def _attend(block: Any, tokens: Tensor, window: int | None) -> Tensor:
    """A timm block on tokens [B, H, W, D], its attention within windows; those at the edges are filled up with zeros."""
    batch, rows, columns, width = tokens.shape
    normed = block.norm1(tokens)
    if window is None:
        attended = block.attn(normed.flatten(1, 2)).unflatten(1, (rows, columns))
    else:
        below, beside = -rows % window, -columns % window
        padded = F.pad(normed, (0, 0, 0, beside, 0, below))
        high, wide = (rows + below) // window, (columns + beside) // window
        cut = padded.view(batch, high, window, wide, window, width).transpose(2, 3).reshape(-1, window * window, width)
        joined = block.attn(cut).view(batch, high, wide, window, window, width).transpose(2, 3)
        attended = joined.reshape(batch, rows + below, columns + beside, width)[:, :rows, :columns]
    tokens = tokens + block.drop_path1(block.ls1(attended))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _out(width: int, channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    ]


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Layer-wise learning rate decay (BEiT, arXiv 2106.08254): what a parameter's rate is multiplied with.

    `name`: as in a model whose ViT is called `encoder`, at any place. What is outside it: 1; the last block: `decay`; the
    embedding: decay ** (depth + 1), as in MAE.
    """
    _, found, own = f".{name}".partition(".encoder.")
    if not found:
        return 1.0
    if own.startswith(("cls_token", "pos_embed", "patch_embed")):
        return decay ** (depth + 1)
    if own.startswith("blocks."):
        return decay ** (depth - int(own.split(".")[1]))
    return 1.0
