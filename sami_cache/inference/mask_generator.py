"""Everything mode: masks of all that a grid of points finds, as `SamAutomaticMaskGenerator` of `segment-anything` finds it.

Its rules and its utilities, but not its memory: that one enlarges 192 masks to the picture at once, 9 GB for 12 megapixels.
Here masks that the decoder itself thinks little of are never enlarged, the others a few at a time, and what is kept is RLE.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval.core import mask as coco
from segment_anything.utils.amg import (
    batched_mask_to_box,
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
)
from torch import Tensor
from torchvision.ops import nms

from sami_cache.errors import SamiCacheError
from sami_cache.inference.predictor import SamPredictor
from sami_cache.inference.regions import remove_small_regions
from sami_cache.inference.rle import decode_mask, encode_mask

OutputMode = Literal["coco_rle", "uncompressed_rle", "binary_mask"]
VALUES_AT_ONCE = 1 << 23
"""Logits of the picture's size that are held at once (32 MB), or one mask's if that is more."""
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class MaskGeneratorConfig:
    """`segment-anything`'s settings under its names, with its values but for `output_mode`."""

    points_per_side: int = 32
    """Of the grid of points: its square are asked for."""
    pred_iou_thresh: float = 0.88
    """A mask is kept if the model's estimate of its IoU is higher."""
    stability_score_thresh: float = 0.95
    """A mask is kept if its IoU with itself, cut at logits `stability_score_offset` higher and lower, is as high."""
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    """Of two masks of one crop whose boxes' IoU is higher, the one with the better estimate is kept."""
    crop_n_layers: int = 0
    """Layer i asks again in (2^i)^2 crops of the picture."""
    crop_nms_thresh: float = 0.7
    """The same between crops; the smaller crop's mask is kept."""
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    """A layer's grid has so many times fewer points a side than the one before."""
    min_mask_region_area: int = 0
    """Pixels; smaller holes are filled and smaller islands removed."""
    output_mode: OutputMode = "coco_rle"
    """binary_mask is bool [H, W] a mask: 12 MB each for 12 megapixels."""

    def __post_init__(self) -> None:
        least = {
            "points_per_side": 1,
            "stability_score_offset": 0,
            "crop_n_layers": 0,
            "crop_n_points_downscale_factor": 1,
            "min_mask_region_area": 0,
        }
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise SamiCacheError(f"{name} is {getattr(self, name)}: expected {value} or more")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh", "crop_overlap_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise SamiCacheError(f"{name} is {getattr(self, name)}: expected 0 to 1")
        if self.points_per_side // self.crop_n_points_downscale_factor**self.crop_n_layers < 1:
            raise SamiCacheError(
                f"crop_n_points_downscale_factor is {self.crop_n_points_downscale_factor}: no point is left in layer "
                f"{self.crop_n_layers} of {self.points_per_side} points a side"
            )
        if self.output_mode not in ("coco_rle", "uncompressed_rle", "binary_mask"):
            raise SamiCacheError(f"output_mode is {self.output_mode!r}: expected coco_rle, uncompressed_rle or binary_mask")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A mask that passed the filters."""

    rle: dict[str, Any]  # of the whole picture
    box: tuple[int, int, int, int]  # x0 y0 x1 y1 in the picture, the last column and row included
    predicted_iou: float
    stability: float
    point: tuple[float, float]  # in the picture
    crop: tuple[int, int, int, int]  # x0 y0 x1 y1, the end excluded


class MaskGenerator:
    """Masks of everything in a picture."""

    def __init__(self, predictor: SamPredictor, config: MaskGeneratorConfig | None = None) -> None:
        self.predictor, self.config = predictor, config or MaskGeneratorConfig()
        self.grids = build_all_layer_point_grids(
            self.config.points_per_side, self.config.crop_n_layers, self.config.crop_n_points_downscale_factor
        )

    @torch.no_grad()
    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Masks of an upright RGB picture, uint8 [H, W, 3]; the best estimate first, with crops the smallest crops first.

        Each has `segmentation` (see `output_mode`), `area` in pixels, `bbox` (x y w h; to the last column and row, as
        segment-anything has it), `predicted_iou`, `point_coords` [[x, y]], `stability_score` and `crop_box` (x y w h).
        Leaves the predictor without a picture. Raises SamiCacheError for what is no such picture.
        """
        if image.ndim != 3:
            raise SamiCacheError(f"expected a picture as uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        height, width = image.shape[:2]
        crops, layers = generate_crop_boxes((height, width), self.config.crop_n_layers, self.config.crop_overlap_ratio)
        found = [mask for crop, layer in zip(crops, layers, strict=True) for mask in self._crop(image, crop, layer)]
        if len(crops) > 1:
            areas = [(mask.crop[2] - mask.crop[0]) * (mask.crop[3] - mask.crop[1]) for mask in found]
            found = _distinct(found, [1 / area for area in areas], self.config.crop_nms_thresh)
        if self.config.min_mask_region_area > 0:
            found = self._without_small_regions(found)
        return [self._record(mask) for mask in found]

    def _crop(self, image: np.ndarray, crop: list[int], layer: int) -> list[_Found]:
        x0, y0, x1, y1 = crop
        self.predictor.set_image(image[y0:y1, x0:x1])
        points = self.grids[layer] * np.array([x1 - x0, y1 - y0])
        found, asked = [], 0
        for part in self.predictor.decode(points[:, None], np.ones((len(points), 1))):
            queries, three = part.iou.shape
            places = points[asked : asked + queries].repeat(three, axis=0)
            found += self._good_ones(part.logits.flatten(0, 1), part.iou.flatten(), places, crop, image.shape[:2])
            asked += queries
        self.predictor.reset_image()
        return _distinct(found, [mask.predicted_iou for mask in found], self.config.box_nms_thresh)

    def _good_ones(
        self, low_res: Tensor, iou: Tensor, points: np.ndarray, crop: list[int], size: tuple[int, int]
    ) -> Iterator[_Found]:
        """Of N answers those that pass the filters. Enlarging is what costs, so they go first that need none."""
        config = self.config
        keep = iou > config.pred_iou_thresh if config.pred_iou_thresh > 0 else torch.ones_like(iou, dtype=torch.bool)
        if config.stability_score_thresh > 0 and self.predictor.model.config.family == "sam":
            # Bilinear enlarging has no values above those it starts from: cut at the higher logit, nothing would be left.
            keep &= low_res.amax(dim=(1, 2)) > config.stability_score_offset - _ROUNDING
        kept = keep.nonzero()[:, 0]
        if not len(kept):
            return
        x0, y0, x1, y1 = crop
        for part in kept.split(max(1, VALUES_AT_ONCE // ((x1 - x0) * (y1 - y0)))):
            logits = self.predictor.model.to_picture(low_res[part][:, None], y1 - y0, x1 - x0)[:, 0]
            stability = self._stability(logits)
            masks = logits > 0
            del logits
            boxes = batched_mask_to_box(masks)
            good = ~is_box_near_crop_edge(boxes, crop, [0, 0, size[1], size[0]])
            if config.stability_score_thresh > 0:
                good &= stability >= config.stability_score_thresh
            for index in good.nonzero()[:, 0].tolist():
                answer = int(part[index])
                bx0, by0, bx1, by1 = boxes[index].tolist()
                yield _Found(
                    rle=_encode(masks[index].cpu().numpy(), crop, size),
                    box=(bx0 + x0, by0 + y0, bx1 + x0, by1 + y0),
                    predicted_iou=float(iou[answer]),
                    stability=float(stability[index]),
                    point=(float(points[answer, 0]) + x0, float(points[answer, 1]) + y0),
                    crop=(x0, y0, x1, y1),
                )

    def _stability(self, logits: Tensor) -> Tensor:
        """[N, H, W] -> float32 [N], 0 for nothing at all. segment-anything's own overflows above 32767 pixels a row."""
        offset = self.config.stability_score_offset
        inner, outer = (torch.count_nonzero(logits > cut, dim=(1, 2)).float() for cut in (offset, -offset))
        return inner / outer.clamp(min=1)

    def _without_small_regions(self, found: list[_Found]) -> list[_Found]:
        """Masks that needed no mending win over those that became the same by it."""
        mended, scores = [], []
        for mask in found:
            pixels, changed = remove_small_regions(decode_mask(mask.rle), self.config.min_mask_region_area)
            scores.append(float(not changed))
            if changed:
                x0, y0, x1, y1 = batched_mask_to_box(torch.from_numpy(pixels)).tolist()
                height, width = pixels.shape
                mended.append(replace(mask, rle=_encode(pixels, [0, 0, width, height], (height, width)), box=(x0, y0, x1, y1)))
            else:
                mended.append(mask)
        return _distinct(mended, scores, max(self.config.box_nms_thresh, self.config.crop_nms_thresh))

    def _record(self, mask: _Found) -> dict[str, Any]:
        segmentation: Any = mask.rle
        if self.config.output_mode == "binary_mask":
            segmentation = decode_mask(mask.rle)
        elif self.config.output_mode == "uncompressed_rle":
            segmentation = mask_to_rle_pytorch(torch.from_numpy(decode_mask(mask.rle))[None])[0]
        return {
            "segmentation": segmentation,
            "area": int(coco.area(mask.rle)),
            "bbox": _width_and_height(mask.box),
            "predicted_iou": mask.predicted_iou,
            "point_coords": [list(mask.point)],
            "stability_score": mask.stability,
            "crop_box": _width_and_height(mask.crop),
        }


def _distinct(found: list[_Found], scores: list[float], threshold: float) -> list[_Found]:
    """Best score first, without those whose box is nearly that of a better one."""
    if not found:
        return []
    boxes = torch.tensor([mask.box for mask in found], dtype=torch.float32)
    return [found[index] for index in nms(boxes, torch.tensor(scores, dtype=torch.float32), threshold).tolist()]


def _encode(mask: np.ndarray, crop: list[int], size: tuple[int, int]) -> dict[str, Any]:
    """A crop's mask as RLE of the whole picture."""
    if mask.shape == tuple(size):
        return encode_mask(mask)
    x0, y0, x1, y1 = crop
    whole = np.zeros(size, dtype=np.uint8, order="F")
    whole[y0:y1, x0:x1] = mask
    return encode_mask(whole)


def _width_and_height(box: tuple[int, int, int, int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
