"""Mask2Former (arXiv 2112.01527), transformers' own, on ViTDet's pyramid."""

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sami_cache.errors import SamiCacheError
from sami_cache.models.pyramid import SimpleFeaturePyramid

QUERIES = 100


class PyramidBackbone(nn.Module):
    """A pyramid where transformers expects a backbone."""

    def __init__(self, pyramid: SimpleFeaturePyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.channels = [pyramid.out_channels] * 4

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(feature_maps=tuple(self.pyramid(pixel_values).values()))


class Segmenter(nn.Module):
    """A class for every pixel. Losses are taken picture by picture and averaged: it does not matter how a batch is cut."""

    def __init__(
        self, pyramid: SimpleFeaturePyramid, classes: int, *, image_size: int, queries: int = QUERIES, decoder_layers: int = 10
    ) -> None:
        """`decoder_layers`: rounds of masked attention, one more than published counts them, the first looking at nothing."""
        super().__init__()
        if find_spec("transformers") is None:
            raise SamiCacheError(
                "Mask2Former is that of transformers, which is not installed: pip install 'sami-cache[semantic]'"
            )
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

        width = pyramid.out_channels
        stages = ["stage1", "stage2", "stage3", "stage4"]
        # Only its channels are looked at: the pyramid takes its place.
        sizes: dict[str, Any] = {
            "embedding_size": width,
            "hidden_sizes": [width] * 4,
            "depths": [1] * 4,
            "out_features": stages,
        }
        stand_in = ResNetConfig(layer_type="basic", **sizes)
        settings: dict[str, Any] = {
            "backbone_config": stand_in,
            "feature_size": width,
            "mask_feature_size": width,
            "hidden_dim": width,
            "num_queries": queries,
            "num_labels": classes,
            "decoder_layers": decoder_layers,
            "num_attention_heads": 8,
        }
        self.model: Any = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**settings))
        self.model.model.pixel_level_module.encoder = PyramidBackbone(pyramid)
        self.classes, self.image_size = classes, image_size

    def forward(
        self, pixels: Tensor, labels: Sequence[Tensor] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor] | Tensor:
        """The loss with labels, else scores: float32 [B, classes, S / 4, S / 4], the more the likelier.

        Args:
            pixels: normalised float [B, 3, S, S].
            labels: of each picture, uint8 [S, S], 255 where there is none.
            seeds: of the points at which each picture's masks are compared, so that they depend on nothing else; with `labels`.
        """
        inner = self.model.model
        features = inner.pixel_level_module.encoder(pixels).feature_maps
        with torch.autocast(pixels.device.type, enabled=False):
            levels = inner.pixel_level_module.decoder([level.float() for level in features])
            decoded = inner.transformer_module(
                multi_scale_features=levels.multi_scale_features,
                mask_features=levels.mask_features,
                output_hidden_states=True,
            )
            classes = [self.model.class_predictor(state.transpose(0, 1)) for state in decoded.intermediate_hidden_states]
            masks = decoded.masks_queries_logits
            if labels is None or seeds is None:
                # Mask2Former's own way from masks and classes to pixels; "no object" has no say.
                return torch.einsum("bqc,bqhw->bchw", classes[-1].softmax(-1)[..., :-1], masks[-1].sigmoid())
            losses = []
            for number, own in enumerate(labels):
                torch.manual_seed(seeds[number])
                part = slice(number, number + 1)
                losses.append(self._loss([one[part] for one in masks], [one[part] for one in classes], own))
            return {"loss": torch.stack(losses).mean()}

    def _loss(self, masks: list[Tensor], classes: list[Tensor], labels: Tensor) -> Tensor:
        there = [value for value in labels.unique().tolist() if value < self.classes]
        truth = torch.stack([labels == value for value in there]).float() if there else None
        if truth is None:  # nothing is known of this picture: what it gives is a gradient of zero
            return sum((one.sum() * 0 for one in (*masks, *classes)), torch.zeros((), device=labels.device))
        # As Mask2Former does: an ignored pixel is of no class, hence outside of every mask.
        losses = self.model.get_loss_dict(
            masks_queries_logits=masks[-1],
            class_queries_logits=classes[-1],
            mask_labels=[truth],
            class_labels=[torch.tensor(there, device=labels.device)],
            auxiliary_predictions=self.model.get_auxiliary_logits(classes, masks),
        )
        return self.model.get_loss(losses)


def to_classes(scores: Tensor, shown: tuple[int, int], height: int, width: int) -> Tensor:
    """Scores [1, C, S / 4, S / 4] as classes: uint8 [height, width]. `shown`: rows and columns of the input it filled."""
    side = scores.shape[-1] * 4
    scores = F.interpolate(scores, (side, side), mode="bilinear", align_corners=False)[..., : shown[0], : shown[1]]
    return F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)[0].argmax(0).to(torch.uint8)
