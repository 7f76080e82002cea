"""Everything mode in the shape of `transformers.pipeline("mask-generation")`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sami_cache.data.images import decode_image
from sami_cache.errors import SamiCacheError
from sami_cache.inference.mask_generator import MaskGenerator, MaskGeneratorConfig
from sami_cache.inference.predictor import QUERIES_AT_ONCE, SamPredictor
from sami_cache.models.segment_anything import SegmentAnything

Picture = str | Path | Image.Image | np.ndarray


class MaskGenerationPipeline:
    """`generator(picture)` -> {"masks": list of bool [H, W], "scores": float32 [N]}, the highest predicted IoU first.

    Scores are the model's own estimates of the masks' IoU. A list of pictures gives a list. For big pictures see
    `MaskGenerator`, which hands out RLE: here every mask takes H x W bytes.
    """

    def __init__(self, model: SegmentAnything, **settings: Any) -> None:
        """`settings`: those of `MaskGeneratorConfig`, for all calls, or the same under transformers' names.

        Raises SamiCacheError for a name that is neither.
        """
        self.model, self.settings = model, _named(settings)

    def __call__(self, inputs: Picture | Sequence[Picture], *, points_per_batch: int = QUERIES_AT_ONCE, **settings: Any) -> Any:
        """Masks of a picture: a file's path, a PIL image, or uint8 [H, W, 3].

        Raises ImageError for a file that is no picture, SamiCacheError for a setting out of its range.
        """
        if isinstance(inputs, Sequence) and not isinstance(inputs, str):
            return [self(picture, points_per_batch=points_per_batch, **settings) for picture in inputs]
        config = MaskGeneratorConfig(**{**self.settings, **_named(settings), "output_mode": "binary_mask"})
        generator = MaskGenerator(SamPredictor(self.model, queries_at_once=points_per_batch), config)
        found = generator.generate(_pixels(inputs))
        return {
            "masks": [mask["segmentation"] for mask in found],
            "scores": torch.tensor([mask["predicted_iou"] for mask in found], dtype=torch.float32),
        }


# transformers removes doubles once, over all crops, where `segment-anything` does so in each crop and then between them.
_NAMES = {
    "points_per_crop": ("points_per_side",),
    "crops_n_layers": ("crop_n_layers",),
    "crops_nms_thresh": ("box_nms_thresh", "crop_nms_thresh"),
}
"""What settings of transformers are called in `MaskGeneratorConfig`."""


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under the names of `MaskGeneratorConfig`; its own win over transformers'."""
    known = {field.name for field in fields(MaskGeneratorConfig)} - {"output_mode"}
    for name in settings:
        if name not in known and name not in _NAMES:
            names = ", ".join(sorted(known | _NAMES.keys()))
            raise SamiCacheError(f"{name} is no setting of mask generation: expected one of {names}")
    translated = {ours: settings[name] for name, all_ours in _NAMES.items() if name in settings for ours in all_ours}
    return translated | {name: value for name, value in settings.items() if name in known}


def _pixels(picture: Picture) -> np.ndarray:
    if isinstance(picture, str | Path):
        return np.asarray(decode_image(Path(picture).read_bytes()))
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    return picture
