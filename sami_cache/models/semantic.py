"""Mask2Former (arXiv 2112.01527) on ViTDet's pyramid, of transformers' parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sami_cache.errors import SamiCacheError
from sami_cache.models.pyramid import SimpleFeaturePyramid

LOSSES = ("loss_cross_entropy", "loss_mask", "loss_dice")


@dataclass(frozen=True, kw_only=True)
class Mask2FormerShape:
    """Sizes of the decoders and of their losses; the defaults are Mask2Former's."""

    queries: int = 100
    """Masks that are proposed in a picture."""
    encoder_layers: int = 6
    """Of the pixel decoder, with deformable attention."""
    decoder_layers: int = 9
    """Of the transformer decoder. The loss is taken before the first, too, and after each."""
    heads: int = 8
    encoder_feedforward: int = 1024
    feedforward: int = 2048
    points: int = 12544
    """Of a mask, where its losses are taken."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise SamiCacheError(f"{name} is {value}: expected 1 or more")


class Mask2Former(nn.Module):
    """Pixel decoder, transformer decoder, matching and losses are transformers'; the backbone is ours.

    Losses are taken picture by picture and averaged: Mask2Former divides by the number of masks in the whole batch, which would
    weigh a picture by whom it shares a micro-batch with.
    """

    def __init__(self, backbone: SimpleFeaturePyramid, classes: int, shape: Mask2FormerShape) -> None:
        """Decoders are as wide as the pyramid: a multiple of 32, and of the heads.

        Raises SamiCacheError where transformers is not installed.
        """
        super().__init__()
        width = backbone.out_channels
        if width % 32 or width % shape.heads:
            raise SamiCacheError(f"{width} channels, {shape.heads} heads: expected a multiple of 32 and of the heads")
        self.backbone, self.classes = backbone, classes
        try:
            from transformers import Mask2FormerConfig
            from transformers.models.mask2former import modeling_mask2former as parts
        except ImportError as error:
            raise SamiCacheError(f"Mask2Former needs transformers ({error}): pip install 'sami-cache[semantic]'") from error
        config: Any = Mask2FormerConfig(
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=shape.encoder_feedforward,
            encoder_layers=shape.encoder_layers,
            decoder_layers=shape.decoder_layers + 1,
            num_attention_heads=shape.heads,
            dim_feedforward=shape.feedforward,
            num_queries=shape.queries,
            train_num_points=shape.points,
        )
        config.num_labels = classes
        self.weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        self.pixel_decoder: nn.Module = parts.Mask2FormerPixelDecoder(config, feature_channels=[width] * 4)
        self.transformer: nn.Module = parts.Mask2FormerTransformerModule(in_features=width, config=config)
        self.class_predictor = nn.Linear(width, classes + 1)
        self.criterion: nn.Module = parts.Mask2FormerLoss(config=config, weight_dict=self.weights)
        initial = parts.Mask2FormerPreTrainedModel(config)._init_weights
        for module in (self.pixel_decoder, self.transformer, self.class_predictor):
            module.apply(initial)

    def forward(
        self, pixels: Tensor, labels: Tensor | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """Losses by name with labels, else the queries' logits: classes [B, Q, C + 1], the last none; masks [B, Q, H/4, W/4].

        Of losses, `loss` is what is minimised: the weighted sum over all layers; the others are the last layer's, unweighted.

        Args:
            pixels: normalised float [B, 3, H, W], sides multiples of 32.
            labels: int [B, H, W], below 0 where there is none.
            seeds: of the points that are drawn in each picture, so that they depend on nothing else; with `labels`.
        """
        features = [level.float() for level in self.backbone(pixels).values()]
        with torch.autocast(pixels.device.type, enabled=False):  # as Mask2Former's own: places in bfloat16 are too coarse
            decoded = self.pixel_decoder(features)
        found = self.transformer(
            multi_scale_features=decoded.multi_scale_features, mask_features=decoded.mask_features, output_hidden_states=True
        )
        masks = found.masks_queries_logits
        classes = [self.class_predictor(hidden.transpose(0, 1)) for hidden in found.intermediate_hidden_states]
        if labels is None or seeds is None:
            return classes[-1].float(), masks[-1].float()
        with torch.autocast(pixels.device.type, enabled=False):
            masks, classes = [one.float() for one in masks], [one.float() for one in classes]
            losses = [
                self._losses([one[number : number + 1] for one in masks], [one[number : number + 1] for one in classes], *true)
                for number, true in enumerate(zip(labels, seeds, strict=True))
            ]
            return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}

    def _losses(self, masks: list[Tensor], classes: list[Tensor], labels: Tensor, seed: int) -> dict[str, Tensor]:
        """Of one picture, from the logits of every layer."""
        present = labels[labels >= 0].unique()
        true = (labels == present[:, None, None]).float()
        layers = [
            {"masks_queries_logits": mask, "class_queries_logits": some} for mask, some in zip(masks, classes, strict=True)
        ]
        torch.manual_seed(seed)
        every = self.criterion(
            **layers[-1], mask_labels=[true], class_labels=[present.long()], auxiliary_predictions=layers[:-1]
        )
        total = torch.stack([self.weights[name.rstrip("_0123456789")] * value for name, value in every.items()]).sum()
        return {"loss": total, **{name: every[name] for name in LOSSES}}


def class_scores(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores [B, C, H, W] of the classes from logits as `Mask2Former` gives them, at `size` (H, W), that of the input."""
    masks = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", class_logits.softmax(-1)[..., :-1], masks)
