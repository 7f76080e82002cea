"""The student: a plain ViT, and SAMI's masked autoencoder around it (EfficientSAM, arXiv 2312.00863, section 3.2).

Mask polarity: True = masked, that is, removed from the encoder's input. Tokens are in image order, row major.
"""

from typing import Literal, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from sami_cache.errors import SamiCacheError

STUDENTS = {"vit_t": "vit_tiny_patch16_224", "vit_s": "vit_small_patch16_224", "vit_b": "vit_base_patch16_224"}
KeysValues = Literal["visible+mask", "visible"]


class Output(NamedTuple):
    """What `SAMI.forward` returns."""

    prediction: Tensor  # [B, P, target_channels], the predicted tokens in image order
    mask: Tensor  # [B, P] bool, True = masked
    ids: Tensor  # [B, P] int64, which tokens these are, ascending: 0..N-1 where all are predicted


class SAMI(nn.Module):
    """Masked image pretraining that reconstructs a teacher's features.

    Only the visible tokens enter the encoder. The decoder's queries are the masked tokens alone; what the encoder made
    of the visible tokens bypasses it. `keys_values` says what the queries attend to: "visible+mask", as published, or
    "visible", as in CrossMAE (arXiv 2401.14391), which is cheaper because no masked token ever sees another.

    Parameters are initialised as in MAE (arXiv 2111.06377), from torch's global generator; `encoder` is taken as it comes.
    Raises `SamiCacheError` where the decoder's shape cannot be built or the encoder is of another kind.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        target_channels: int,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        keys_values: KeysValues = "visible+mask",
    ):
        super().__init__()
        if decoder_width % decoder_heads or decoder_width % 4:
            raise SamiCacheError(
                f"decoder_width is {decoder_width}: expected a multiple of 4 and of decoder_heads ({decoder_heads})"
            )
        if keys_values not in ("visible+mask", "visible"):
            raise SamiCacheError(f"keys_values is {keys_values!r}: expected 'visible+mask' (SAMI) or 'visible' (CrossMAE)")
        if encoder.num_prefix_tokens != 1 or encoder.cls_token is None or encoder.pos_embed is None:
            raise SamiCacheError("the encoder must have a class token, a position embedding and no register tokens")
        self.encoder = encoder
        self.keys_values = keys_values
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            CrossAttentionBlock(decoder_width, decoder_heads, keys_values) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.head = nn.Linear(decoder_width, target_channels)
        # Fixed, hence neither trained nor saved.
        self.register_buffer("decoder_positions", sincos_positions(decoder_width, self.grid_size)[None], persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.head):
            part.apply(_init_linear)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of tokens: (14, 14) for 224 pixels and patches of 16."""
        rows, columns = self.encoder.patch_embed.grid_size  # type: ignore[misc]
        return rows, columns

    def forward(self, pixels: Tensor, ids_shuffle: Tensor, mask_ratio: float, reconstruct: float = 1.0) -> Output:
        """Predict the target of the visible tokens and of the share `reconstruct` of the masked ones.

        `pixels`: float [B, 3, H, W], normalised with ImageNet's mean and standard deviation.
        `ids_shuffle`: int64 [B, N], each row a permutation of 0..N-1; the first `count_kept(N, mask_ratio)` of a row are
        the tokens that stay visible, the next `count_reconstructed` the masked ones that enter the decoder. The rest enter
        nothing (CrossMAE's partial reconstruction, arXiv 2401.14391, section 3.3).
        """
        n_keep = count_kept(ids_shuffle.shape[1], mask_ratio)
        ids_shuffle = ids_shuffle[:, : n_keep + count_reconstructed(ids_shuffle.shape[1] - n_keep, reconstruct)]
        ids, ids_restore = ids_shuffle.sort(dim=1)
        encoded = self.encode(pixels, ids_shuffle[:, :n_keep])
        projected = self.decoder_embed(encoded)
        masked = self.decode(projected, ids_shuffle)
        # The class token has no place in the image: it only serves as a key.
        merged = _gather(torch.cat([projected[:, 1:], masked], dim=1), ids_restore)
        return Output(self.head(self.decoder_norm(merged)), ids_restore >= n_keep, ids)

    def encode(self, pixels: Tensor, ids_keep: Tensor) -> Tensor:
        """The encoder on the kept tokens alone: [B, 1 + K, D], the class token first, then in the order of `ids_keep`."""
        tokens = self.encoder._pos_embed(self.encoder.patch_embed(pixels))
        tokens = torch.cat([tokens[:, :1], _gather(tokens[:, 1:], ids_keep)], dim=1)
        return self.encoder.norm(self.encoder.blocks(self.encoder.norm_pre(tokens)))

    def decode(self, projected: Tensor, ids: Tensor) -> Tensor:
        """The masked tokens [B, P - K, W] from the projected visible ones [B, 1 + K, W].

        `ids`: int64 [B, P], the visible tokens, then the masked ones to decode; the result is in this order.
        """
        n_keep = projected.shape[1] - 1
        positions = _gather(self.decoder_positions.expand(len(projected), -1, -1), ids)  # type: ignore[operator]
        visible = torch.cat([projected[:, :1], projected[:, 1:] + positions[:, :n_keep]], dim=1)
        masked = self.mask_token + positions[:, n_keep:]
        for block in self.decoder_blocks:
            masked = block(masked, visible)
        return masked


class CrossAttentionBlock(nn.Module):
    """Pre-norm transformer block whose queries are the masked tokens."""

    def __init__(self, width: int, heads: int, keys_values: KeysValues):
        super().__init__()
        self.heads = heads
        self.keys_values = keys_values
        self.norm_masked = nn.LayerNorm(width, eps=1e-6)
        self.norm_visible = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, masked: Tensor, visible: Tensor) -> Tensor:
        """`masked`: [B, M, W]; `visible`: [B, 1 + K, W]. Returns the new masked tokens [B, M, W]."""
        queries = self.norm_masked(masked)
        context = self.norm_visible(visible)
        if self.keys_values == "visible+mask":
            context = torch.cat([context, queries], dim=1)
        keys, values = self.key_value(context).chunk(2, dim=-1)
        split = self._split_heads
        attended = F.scaled_dot_product_attention(split(self.query(queries)), split(keys), split(values))
        masked = masked + self.out(attended.transpose(1, 2).flatten(2))
        return masked + self.mlp(self.norm_mlp(masked))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def create_encoder(student: str, **overrides) -> VisionTransformer:
    """A plain ViT with class token and no head, for 224 pixels and patches of 16, initialised as in MAE.

    `student` is a name in `STUDENTS`; `overrides` go to timm (`depth=2, embed_dim=64, num_heads=2` makes a test's size).
    The paper does not say how positions are embedded: here they start as MAE's sines and cosines and are trained on.
    """
    if student not in STUDENTS:
        raise SamiCacheError(f"unknown student {student!r}: expected one of {', '.join(STUDENTS)}")
    encoder = cast(VisionTransformer, timm.create_model(STUDENTS[student], num_classes=0, **overrides))
    encoder.apply(_init_linear)
    positions = cast(nn.Parameter, encoder.pos_embed)
    with torch.no_grad():
        nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(cast(nn.Parameter, encoder.cls_token), std=0.02)
        positions[:, 0] = 0
        positions[:, 1:] = sincos_positions(encoder.embed_dim, encoder.patch_embed.grid_size)
    return encoder


def export_encoder(encoder: VisionTransformer, *, head: bool = True, num_classes: int = 1000) -> dict[str, Tensor]:
    """The encoder's weights under stock timm's names, on the CPU, float32.

    With `head` they load strictly into `timm.create_model("vit_small_patch16_224")` (and its siblings): the untrained
    head that this needs is timm's own initial one under a fixed seed. Without, into the same built with `num_classes=0`.
    """
    weights = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in encoder.state_dict().items()}
    if head:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = nn.Linear(encoder.embed_dim, num_classes)
            init_weights_vit_timm(layer)
        weights |= {"head.weight": layer.weight.detach(), "head.bias": layer.bias.detach()}
    return weights


def count_kept(tokens: int, mask_ratio: float) -> int:
    """How many of `tokens` stay visible: 49 of 196 at 0.75. Rounds down, as MAE does."""
    kept = int(tokens * (1 - mask_ratio) + 1e-6)  # 10 * (1 - 0.9) is 0.9999999999999998
    if not 0 < kept < tokens:
        raise SamiCacheError(
            f"mask_ratio {mask_ratio} leaves {kept} of {tokens} tokens visible: take one between {1 / tokens:.3g} and "
            f"{1 - 1 / tokens:.3g}"
        )
    return kept


def count_reconstructed(masked: int, reconstruct: float) -> int:
    """How many of `masked` tokens are decoded and scored: 36 of 147 at 0.25. Rounds down, as `count_kept` does."""
    count = int(masked * reconstruct + 1e-6)
    if not 0 < count <= masked:
        raise SamiCacheError(
            f"reconstruct {reconstruct} decodes {count} of {masked} masked tokens: take a share between {1 / masked:.3g} and 1"
        )
    return count


def patch_targets(pixels: Tensor, patch: int = 16) -> Tensor:
    """MAE's target: each patch's pixels, less their mean, over their standard deviation (`norm_pix_loss`).

    `pixels`: float [B, 3, H, W]; any scale will do, since a patch's brightness and contrast are divided out.
    Returns float32 [B, N, 3 * patch * patch], within a patch ordered row, column, channel as MAE's `patchify` has it.
    """
    batch, channels, height, width = pixels.shape
    if height % patch or width % patch:
        raise SamiCacheError(f"an image of {height} x {width} pixels cannot be cut into patches of {patch}")
    cut = pixels.float().reshape(batch, channels, height // patch, patch, width // patch, patch)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def sincos_positions(width: int, grid_size: tuple[int, int]) -> Tensor:
    """MAE's fixed 2-D position embedding, float32 [rows * columns, width]: the column's half first, then the row's."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid_size), indexing="ij")
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def _gather(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
