"""SAM's attention without the bias in memory: its decomposed relative positions folded into queries and keys, or `flex`.

SAM adds to the scores of query (i, j) and key (k, l) the bias q . Rh[i - k] + q . Rw[j - l] (q unscaled; MViTv2, arXiv
2112.01526; `add_decomposed_rel_pos` of https://github.com/facebookresearch/segment-anything). timm hands it to
`scaled_dot_product_attention` as a mask of [B x heads, N, N], which keeps it off the flash kernels and is, for the 4096
tokens of a global block at 1024 pixels, 16 heads and bfloat16, half a gigabyte an image.

Both ways here compute only what the bias is made of, for each query its H + W terms:

- folded: they are appended to the query, and to the key the one-hot vectors of its row and its column. The dot product of
  the longer vectors is the biased score, so that attention needs no mask. Heads grow from d to d + H + W: at 1024 pixels from
  64 to 192 (vit_b, vit_l) and from 80 to 208 (vit_h) in the global blocks, from 64 to 92 and 80 to 108 in windows of 14 x 14.
- flex: `torch.nn.attention.flex_attention` adds them to the scores inside its kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import Attention, Block, VisionTransformerSAM
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from sami_cache.errors import SamiCacheError

# Flash kernels want q, k and v of one length, a multiple of 8, 256 at most.
_MULTIPLE = 8


class _RelativeAttention(Attention):
    """timm's attention with its weights, and another way from queries, keys and values to what is projected."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = self.attend(self.q_norm(q), self.k_norm(k), v, height, width)
        x = x.transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj_drop(self.proj(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """Each [B, heads, height x width, d], also what is returned."""
        raise NotImplementedError

    def terms(self, q: Tensor, height: int, width: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """factor x the bias's two parts: [B, heads, N, height], for each row a key may be in, and [B, heads, N, width]."""
        # The factor goes into the tables while they are float32: in the queries it would be a rounding more.
        rows, columns = relative_table(self.rel_pos_h, height) * factor, relative_table(self.rel_pos_w, width) * factor
        cells = q.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", cells, rows.to(q.dtype))
        by_column = torch.einsum("bnhwc,wkc->bnhwk", cells, columns.to(q.dtype))
        return by_row.flatten(2, 3), by_column.flatten(2, 3)


def relative_table(rel_pos: Tensor, size: int) -> Tensor:
    """[L, d], a vector for each distance -> [size, size, d], that for query i and key k at [i, k].

    Distances run from -(size - 1); a table made for another size is interpolated, as timm's and SAM's `get_rel_pos` do, which
    make the indices on the CPU: then every block waits for the GPU, and no CUDA graph can hold it.
    """
    if len(rel_pos) != 2 * size - 1:
        rel_pos = F.interpolate(rel_pos.T[None], 2 * size - 1, mode="linear")[0].T
    places = torch.arange(size, device=rel_pos.device)
    return rel_pos[places[:, None] - places[None] + size - 1]


class FoldedAttention(_RelativeAttention):
    """The bias as H + W more components of queries and keys; no mask.

    In bfloat16 the components have 8 bits, as have the terms of timm's bias, whose sum is rounded once more.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        length = self.head_dim + height + width
        padding = -length % _MULTIPLE
        # Scores are scaled after the product, so the terms go in divided by the scale, and the queries as they are.
        by_row, by_column = self.terms(q, height, width, 1 / self.scale)
        longer_q = F.pad(torch.cat([q, by_row.to(q.dtype), by_column.to(q.dtype)], dim=-1), (0, padding))
        where = one_hot_places(height, width, padding, k.device, k.dtype)
        longer_k = torch.cat([k, where.expand(*k.shape[:2], -1, -1)], dim=-1)
        longer_v = F.pad(v, (0, length + padding - self.head_dim))
        return F.scaled_dot_product_attention(longer_q, longer_k, longer_v, scale=self.scale)[..., : self.head_dim]


def one_hot_places(height: int, width: int, padding: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[height x width, height + width + padding]: for each cell, row by row, a 1 at its row and one at its column."""
    row = torch.eye(height, device=device, dtype=dtype)[:, None].expand(-1, width, -1)
    column = torch.eye(width, device=device, dtype=dtype)[None].expand(height, -1, -1)
    return F.pad(torch.cat([row, column], dim=-1).flatten(0, 1), (0, padding))


class FlexAttention(_RelativeAttention):
    """The bias added inside flex_attention's kernel, which CUDA gets compiled; elsewhere it is a slow reference."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        by_row, by_column = self.terms(q, height, width)

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            terms = by_row[batch, head, query, key // width] + by_column[batch, head, query, key % width]
            return score + terms

        # Inside a model that is compiled as a whole the kernel is compiled with it.
        attend = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
        return attend(q, k, v, score_mod=biased, scale=self.scale)


def allow_recompiling() -> None:
    """Let torch.compile make more than eight graphs of one function: one for each batch size that is tried, way and kind of
    block. Beyond its limit flex_attention would run unfused, with all scores in memory."""
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = max(64, dynamo.config.recompile_limit)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    allow_recompiling()
    return torch.compile(flex_attention, dynamic=False)


ATTENTIONS: dict[str, type[Attention]] = {"timm": Attention, "folded": FoldedAttention, "flex": FlexAttention}


def use_attention(encoder: nn.Module, name: str, *, windows: bool = True) -> None:
    """Have the blocks of a SAM encoder of timm's attend in the way of that name, exactly but for rounding.

    name: a key of `ATTENTIONS`; "timm" undoes the others.
    windows: also in the blocks whose attention stays in windows of 14 x 14, else these get timm's.

    Weights and their names stay. Raises SamiCacheError for an unknown name and, unless it is "timm", for encoders that are
    not SAM's and for those without relative positions.
    """
    if name not in ATTENTIONS:
        raise SamiCacheError(f"attention {name!r} is unknown; choose one of {', '.join(ATTENTIONS)}.")
    if not isinstance(encoder, VisionTransformerSAM):
        if name == "timm":
            return
        found = type(encoder).__name__
        raise SamiCacheError(f"attention {name!r} is for SAM's encoders (vit_h, vit_l, vit_b), this is a {found}.")
    for block in encoder.blocks:
        assert isinstance(block, Block)
        if name != "timm" and not (block.attn.use_rel_pos and block.attn.attn_drop.p == 0):
            raise SamiCacheError(f"attention {name!r} needs relative positions and no dropout, as SAM has them.")
        # The same module, its weights and whoever refers to it, with another forward.
        block.attn.__class__ = ATTENTIONS[name] if windows or not block.window_size else Attention
