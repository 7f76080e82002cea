"""Promptable segmentation: an image encoder, and the prompt encoder and mask decoder of one of two families.

`sam`: as in Segment Anything (arXiv 2304.02643); the modules are those of the package `segment-anything`, so that Meta's
weights fit by name. `efficientsam`: as released with EfficientSAM (arXiv 2312.00863, https://github.com/yformer/EfficientSAM),
whose 278 tensors fit by name. Either takes one of our students, or SAM's own encoder, as `image_encoder`.

Coordinates are pixels of the square input, (x, y), a pixel's centre half a pixel further. Labels: 1 inside, 0 outside, 2 and
3 a box's top left and bottom right corner, -1 no point.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sami_cache.errors import SamiCacheError
from sami_cache.models.folded_attention import fold_attention

Family = Literal["sam", "efficientsam"]
ENCODERS = {"vit_t": (192, 3), "vit_s": (384, 6), "vit_b": (768, 12)}
"""Width and heads of the students; all have 12 blocks."""
SAM_ENCODERS = {
    "sam_vit_b": "samvit_base_patch16",
    "sam_vit_l": "samvit_large_patch16",
    "sam_vit_h": "samvit_huge_patch16",
}
"""timm's names of SAM's own encoders."""
WIDTH = 256
"""Channels of the embedding and of the decoder."""
PRETRAINED_GRID = 14
"""Of the students' position embedding."""
EFFICIENTSAM_POINTS = 6
"""A query of the official EfficientSAM has exactly so many points."""
# The same constants for both: SAM states them for 0..255, EfficientSAM for 0..1.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class SegmentAnythingConfig:
    """What a model is, without its weights. Recorded with every run and every checkpoint of ours."""

    family: Family = "sam"
    encoder: str = "vit_t"
    image_size: int = 1024
    """Of the square input, pixels; a multiple of 16."""
    depth: int = 12
    """Blocks of a student; other values are for tests."""

    def __post_init__(self) -> None:
        if self.family not in ("sam", "efficientsam"):
            raise SamiCacheError(f"family is {self.family!r}: expected sam or efficientsam")
        if self.encoder not in ENCODERS and self.encoder not in SAM_ENCODERS:
            raise SamiCacheError(f"encoder is {self.encoder!r}: expected one of {', '.join([*ENCODERS, *SAM_ENCODERS])}")
        if self.image_size % 16 or self.image_size <= 0:
            raise SamiCacheError(f"image_size is {self.image_size}: expected a positive multiple of 16")


class Masks(NamedTuple):
    """What a decoder says to every query: four masks, of which the first is the one for prompts that leave no doubt."""

    logits: Tensor  # float [B, Q, 4, S / 4, S / 4], above 0: inside
    iou: Tensor  # float [B, Q, 4], the decoder's own estimate of each mask's IoU

    @property
    def single(self) -> "Masks":
        """Token 0's mask: [B, Q, 1, ...]."""
        return Masks(self.logits[:, :, :1], self.iou[:, :, :1])

    @property
    def three(self) -> "Masks":
        """The three of an ambiguous prompt (SAM: whole, part, subpart): [B, Q, 3, ...]."""
        return Masks(self.logits[:, :, 1:], self.iou[:, :, 1:])


class SegmentAnything(nn.Module):
    """Images and prompts in, masks out. Made with random weights; see `load_segment_anything` for others."""

    def __init__(self, config: SegmentAnythingConfig) -> None:
        super().__init__()
        self.config = config
        size, grid = config.image_size, config.image_size // 16
        if config.encoder in SAM_ENCODERS:
            name, norm = SAM_ENCODERS[config.encoder], partial(nn.LayerNorm, eps=1e-6)
            self.image_encoder: nn.Module = timm.create_model(name, num_classes=0, norm_layer=norm, img_size=size)
        else:
            self.image_encoder = ImageEncoder(*ENCODERS[config.encoder], depth=config.depth)
        if config.family == "sam":
            self.prompt_encoder: nn.Module = PromptEncoder(
                embed_dim=WIDTH, image_embedding_size=(grid, grid), input_image_size=(size, size), mask_in_chans=16
            )
            transformer = TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8)
            self.mask_decoder: nn.Module = MaskDecoder(transformer_dim=WIDTH, transformer=transformer)
        else:
            self.prompt_encoder, self.mask_decoder = EfficientSAMPrompts(), EfficientSAMDecoder()
        fold_attention(self.mask_decoder.get_submodule("transformer"))

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised [B, 3, S, S] -> embeddings [B, 256, S / 16, S / 16]."""
        expected = (3, self.config.image_size, self.config.image_size)
        if tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"expected [B, {', '.join(map(str, expected))}], got {tuple(pixels.shape)}")
        if self.config.encoder in SAM_ENCODERS:
            return cast(Any, self.image_encoder).forward_features(pixels)
        return self.image_encoder(pixels)

    def decode(self, embeddings: Tensor, points: Tensor, labels: Tensor, masks: Tensor | None = None) -> Masks:
        """Answer Q queries about each of B images.

        Args:
            embeddings: [B, 256, S / 16, S / 16].
            points: float [B, Q, P, 2], as `complete_prompts` returns them, as are `labels`: int [B, Q, P].
            masks: float [B, Q, 1, S / 4, S / 4], the logits of an earlier answer as a further prompt; family `sam` only.
        """
        batch, queries = labels.shape[:2]
        sparse = self.embed_prompts(points.flatten(0, 1), labels.flatten(0, 1))
        images = embeddings.repeat_interleave(queries, dim=0)
        if self.config.family == "sam":
            prompts = cast(PromptEncoder, self.prompt_encoder)
            if masks is None:
                images = images + prompts.no_mask_embed.weight[..., None, None]
            else:
                images = images + prompts.mask_downscaling(masks.flatten(0, 1))
        elif masks is not None:
            raise SamiCacheError("a decoder of family efficientsam takes no mask as a prompt; one of family sam does.")
        logits, iou = decode_tokens(self.mask_decoder, images, self._image_positions(embeddings), sparse)
        return Masks(logits.unflatten(0, (batch, queries)), iou.unflatten(0, (batch, queries)))

    def embed_prompts(self, points: Tensor, labels: Tensor) -> Tensor:
        """float [N, P, 2] and int [N, P] -> tokens [N, P, 256]."""
        encoder: Any = self.prompt_encoder
        place = encoder.pe_layer._pe_encoding((points + 0.5) / self.config.image_size)
        none = (labels == -1)[..., None]
        if self.config.family == "sam":
            kinds = [encoder.point_embeddings[kind].weight for kind in range(4)]
            place = torch.where(none, encoder.not_a_point_embed.weight, place)
        else:
            # Of a negative point it knows the place alone; the place of no point is that of (-1, -1).
            inside, corners = encoder.point_embeddings, (encoder.bbox_top_left_embeddings, encoder.bbox_bottom_right_embeddings)
            kinds = [torch.zeros_like(inside.weight), inside.weight, *(corner.weight for corner in corners)]
            place = place + none * encoder.invalid_points.weight
        for label, weight in enumerate(kinds):
            place = place + (labels == label)[..., None] * weight
        return place

    def complete_prompts(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, Q, P, 2] and [B, Q, P] with the points that a family adds where there are fewer than it was taught with.

        SAM: one that is none, where no query has a box. EfficientSAM: as many as make six; what is over six is an error.
        """
        have = points.shape[2]
        # Where no point is, is nowhere: EfficientSAM's decoder looks at the place even so.
        points = torch.where((labels == -1)[..., None], -1.0, points)
        missing = int(not bool((labels >= 2).any())) if self.config.family == "sam" else EFFICIENTSAM_POINTS - have
        if missing < 0:
            raise SamiCacheError(
                f"{have} points in a query (a box counts as two): a model of family efficientsam takes {EFFICIENTSAM_POINTS}."
            )
        return F.pad(points, (0, 0, 0, missing), value=-1.0), F.pad(labels, (0, missing), value=-1)

    def covered(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the input that a picture of this size takes up: the whole square, or SAM's longest side."""
        size = self.config.image_size
        if self.config.family == "efficientsam":
            return size, size
        scale = size / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def preprocess(self, image: np.ndarray) -> Tensor:
        """An upright RGB picture, uint8 [H, W, 3], as normalised float32 [3, S, S].

        SAM: longest side to S by Pillow's bilinear filter, zeros below and to the right. EfficientSAM: squashed to S x S,
        bilinear without antialiasing. Raises ValueError for anything but uint8 [H, W, 3].
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"expected a picture as uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        rows, columns = self.covered(*image.shape[:2])
        if self.config.family == "sam":
            resized = np.array(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
            pixels = (torch.from_numpy(resized).permute(2, 0, 1).float() - mean) / std
            return F.pad(pixels, (0, self.config.image_size - columns, 0, self.config.image_size - rows))
        # In 0..1 before resizing, as published: in 0..255 the last bits differ.
        pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)[None].float() / 255
        if image.shape[:2] != (rows, columns):
            pixels = F.interpolate(pixels, (rows, columns), mode="bilinear", align_corners=False)
        return (pixels[0] - mean / 255) / (std / 255)

    def to_input(self, points: Tensor, height: int, width: int) -> Tensor:
        """Points [..., 2] of a picture of this size as points of the input."""
        rows, columns = self.covered(height, width)
        return points * points.new_tensor([columns / width, rows / height])

    def to_picture(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Low-resolution logits [N, M, S / 4, S / 4] at the resolution of the picture: float [N, M, height, width]."""
        if self.config.family == "efficientsam":
            return F.interpolate(logits.float(), (height, width), mode="bicubic", align_corners=False)
        size, (rows, columns) = self.config.image_size, self.covered(height, width)
        padded = F.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
        return F.interpolate(padded[..., :rows, :columns], (height, width), mode="bilinear", align_corners=False)

    def _image_positions(self, embeddings: Tensor) -> Tensor:
        encoder: Any = self.prompt_encoder
        return encoder.pe_layer(tuple(embeddings.shape[-2:]))[None]


class ImageEncoder(nn.Module):
    """A student without class token and final norm, for square inputs of any multiple of 16, with SAM's neck.

    The position embedding stays that of pretraining, 14 x 14 and a class token's, and is resized on the way, as in the
    released EfficientSAM: so weights go to and fro unchanged.
    """

    def __init__(self, width: int, heads: int, *, depth: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 16, 16)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PRETRAINED_GRID**2, width))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.neck = nn.Sequential(
            nn.Conv2d(width, WIDTH, 1, bias=False),
            LayerNorm2d(WIDTH),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            LayerNorm2d(WIDTH),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 256, S / 16, S / 16]."""
        cells = cast(nn.Conv2d, self.patch_embed.proj)(pixels)
        tokens = (cells + self.positions(cells.shape[-1])).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.neck(tokens.transpose(1, 2).unflatten(2, cells.shape[-2:]))

    def positions(self, grid: int) -> Tensor:
        """[1, width, grid, grid]."""
        positions = self.pos_embed[:, 1:].unflatten(1, (PRETRAINED_GRID, PRETRAINED_GRID)).permute(0, 3, 1, 2)
        if grid == PRETRAINED_GRID:
            return positions
        return F.interpolate(positions, (grid, grid), mode="bicubic", align_corners=False)


class EfficientSAMPrompts(nn.Module):
    """The parameters of EfficientSAM's prompt encoder, under its names."""

    def __init__(self) -> None:
        super().__init__()
        self.pe_layer = PositionEmbeddingRandom(WIDTH // 2)
        self.invalid_points = nn.Embedding(1, WIDTH)
        self.point_embeddings = nn.Embedding(1, WIDTH)
        self.bbox_top_left_embeddings = nn.Embedding(1, WIDTH)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, WIDTH)


class EfficientSAMDecoder(nn.Module):
    """EfficientSAM's mask decoder: SAM's with GELU, one group norm in the upscaler, and its own two-way blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = EfficientSAMTransformer()
        self.iou_token = nn.Embedding(1, WIDTH)
        self.mask_tokens = nn.Embedding(4, WIDTH)
        self.final_output_upscaling_layers = nn.Sequential(
            nn.Sequential(nn.ConvTranspose2d(WIDTH, WIDTH // 4, 2, 2), nn.GroupNorm(1, WIDTH // 4), nn.GELU()),
            nn.Sequential(nn.ConvTranspose2d(WIDTH // 4, WIDTH // 8, 2, 2), nn.Identity(), nn.GELU()),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(_Mlp(WIDTH, WIDTH, WIDTH // 8, hidden_layers=2) for _ in range(4))
        self.iou_prediction_head = _Mlp(WIDTH, WIDTH, 4, hidden_layers=2)

    @property
    def output_upscaling(self) -> nn.Module:
        return self.final_output_upscaling_layers


class EfficientSAMTransformer(nn.Module):
    """Tokens and image attend to each other, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoWayBlock(add_place=layer > 0) for layer in range(2))
        self.final_attn_token_to_image = Attention(WIDTH, 8, downsample_rate=2)
        self.norm_final_attn = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor, image_positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 256, g, g], the same, [N, T, 256] -> tokens [N, T, 256], image [N, g * g, 256]."""
        keys, places = (value.flatten(2).transpose(1, 2) for value in (image, image_positions))
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, places)
        attended = self.final_attn_token_to_image(q=queries + tokens, k=keys + places, v=keys)
        return self.norm_final_attn(queries + attended), keys


class _TwoWayBlock(nn.Module):
    def __init__(self, *, add_place: bool) -> None:
        super().__init__()
        self.add_place = add_place
        self.self_attn = Attention(WIDTH, 8)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.cross_attn_token_to_image = Attention(WIDTH, 8, downsample_rate=2)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = _Mlp(WIDTH, 2048, WIDTH, hidden_layers=1)
        self.norm3 = nn.LayerNorm(WIDTH)
        self.norm4 = nn.LayerNorm(WIDTH)
        self.cross_attn_image_to_token = Attention(WIDTH, 8, downsample_rate=2)

    def forward(self, queries: Tensor, keys: Tensor, query_places: Tensor, key_places: Tensor) -> tuple[Tensor, Tensor]:
        if self.add_place:
            queries = queries + query_places
        queries = self.norm1(queries + self.self_attn(q=queries, k=queries, v=queries))
        attended = self.cross_attn_token_to_image(q=queries + query_places, k=keys + key_places, v=keys)
        queries = self.norm2(queries + attended)
        queries = self.norm3(queries + self.mlp(queries))
        attended = self.cross_attn_image_to_token(q=keys + key_places, k=queries + query_places, v=queries)
        return queries, self.norm4(keys + attended)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int, *, hidden_layers: int) -> None:
        super().__init__()
        widths = [width, *[hidden] * hidden_layers]
        pairs = pairwise(widths)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(before, after), nn.GELU()) for before, after in pairs))
        self.fc = nn.Linear(hidden, out)

    def forward(self, values: Tensor) -> Tensor:
        return self.fc(self.layers(values))


def decode_tokens(decoder: nn.Module, images: Tensor, positions: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """All four masks of N queries, by the parts that both families' decoders have under the same names.

    `MaskDecoder.forward` of segment-anything takes one image and hands out three masks or one.

    Args:
        images: [N, 256, g, g], every query's image, its dense prompt added.
        positions: [1, 256, g, g]; prompts: [N, P, 256].

    Returns:
        Logits [N, 4, 4 g, 4 g] and predicted IoU [N, 4].
    """
    parts = cast(Any, decoder)
    own = torch.cat([parts.iou_token.weight, parts.mask_tokens.weight]).expand(prompts.shape[0], -1, -1)
    out, image = parts.transformer(images, positions.expand_as(images), torch.cat([own, prompts], dim=1))
    upscaled = parts.output_upscaling(image.transpose(1, 2).reshape(images.shape))
    weights = torch.stack([mlp(out[:, 1 + token]) for token, mlp in enumerate(parts.output_hypernetworks_mlps)], dim=1)
    logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return logits, parts.iou_prediction_head(out[:, 0])
