"""Stage: masks of a picture, by prompts or of everything in it, as files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.promptable import open_promptable
from sami_cache.data.images import decode_image
from sami_cache.errors import ImageError, SamiCacheError
from sami_cache.inference.checked_prompts import Prompts, check_prompts
from sami_cache.inference.mask_generator import MaskGenerator, MaskGeneratorConfig
from sami_cache.inference.overlay import draw_masks, draw_prompts
from sami_cache.inference.predictor import SamPredictor
from sami_cache.inference.rle import decode_mask, encode_mask
from sami_cache.processes import choose_device

MASKS, OVERLAY = "masks.json", "overlay.jpg"


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """One picture and what to ask about it. Places are pixels of the upright picture."""

    image: Path
    model: Path
    """A run of `finetune promptable`, or a file as `load_segment_anything` reads it."""
    out: Path
    positive: tuple[tuple[float, float], ...] = ()
    negative: tuple[tuple[float, float], ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Each is a query of its own; x0 y0 x1 y1."""
    all_masks: bool = False
    """Keep all three masks of an ambiguous query, not the best alone."""
    everything: MaskGeneratorConfig | None = None
    """No prompts: a grid of points."""
    overwrite: bool = False
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """What was written."""

    masks: Path
    overlay: Path
    annotations: list[dict[str, Any]] = field(default_factory=list)


def segment(config: SegmentConfig) -> Segmented:
    """Write `masks.json` (COCO RLE, laid out as SA-1B's files), a PNG a mask and `overlay.jpg` to `config.out`.

    Raises SamiCacheError for prompts that cannot be meant, a folder that holds other results, or what is no model; ImageError
    for what is no picture.
    """
    asked = bool(config.positive or config.negative or config.boxes)
    if asked == (config.everything is not None):
        what = "both prompts and --everything" if asked else "nothing"
        raise SamiCacheError(f"asked for {what}: give points or boxes (--point x,y, --box x0,y0,x1,y1), or --everything.")
    image = _read(config.image)
    prompts = None if config.everything else _prompts(config, *image.shape[:2])
    predictor = SamPredictor(open_promptable(config.model, choose_device(config.device)))
    _prepare(config.out, overwrite=config.overwrite)
    if config.everything:
        found = MaskGenerator(predictor, config.everything).generate(image)
    else:
        assert prompts is not None
        predictor.set_image(image)
        found = _answers(predictor, prompts, all_masks=config.all_masks)
    return _write(config, image, found, prompts)


def _read(path: Path) -> np.ndarray:
    try:
        return np.array(decode_image(path.read_bytes()))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def _prompts(config: SegmentConfig, height: int, width: int) -> Prompts:
    """Points are one query, which a single box joins; several boxes are a query each."""
    points = [*config.positive, *config.negative]
    labels = [1] * len(config.positive) + [0] * len(config.negative)
    if points and len(config.boxes) > 1:
        raise SamiCacheError(
            f"{len(points)} points and {len(config.boxes)} boxes: several boxes are a query each, and which of them the points "
            "belong to is open. Ask with one box at a time, or without the points."
        )
    if config.negative and not config.positive and not config.boxes:
        raise SamiCacheError("nothing but --negative points: say also what is wanted, by --point x,y or --box x0,y0,x1,y1.")
    given = ([points], [labels]) if points else (None, None)
    return check_prompts(height, width, *given, config.boxes or None)


def _answers(predictor: SamPredictor, prompts: Prompts, *, all_masks: bool) -> list[dict[str, Any]]:
    """A query's mask of the highest predicted IoU, or all three, best first."""
    points = prompts.points[:, prompts.labels[0] < 2]
    labels = prompts.labels[:, prompts.labels[0] < 2]
    corners = prompts.points[:, prompts.labels[0] >= 2].reshape(len(points), -1)
    # SAM's single mask is for what leaves no doubt. EfficientSAM as released never trained it.
    sure = prompts.labels.shape[1] > 1 and predictor.model.config.family == "sam" and not all_masks
    given = ((points, labels) if points.shape[1] else (None, None)) + (corners if corners.shape[1] else None,)
    found, query = [], 0
    for part in predictor.decode(*given, multimask_output=not sure):
        for logits, iou in zip(part.logits, part.iou, strict=True):
            for index in iou.argsort(descending=True).tolist()[: None if all_masks else 1]:
                picture = predictor.model.to_picture(logits[None, index : index + 1], *predictor.original_size)[0, 0]
                found.append(_annotation((picture > 0).cpu().numpy(), float(iou[index])) | {"query": query})
            query += 1
    return found


def _annotation(mask: np.ndarray, iou: float) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0], rows[-1] - rows[0]] if len(rows) else [0, 0, 0, 0]
    return {
        "segmentation": encode_mask(mask),
        "area": int(mask.sum()),
        "bbox": [int(side) for side in box],
        "predicted_iou": iou,
    }


def _prepare(out: Path, *, overwrite: bool) -> None:
    """The folder, checked: results of another call are in it only if they may be replaced."""
    out.mkdir(parents=True, exist_ok=True)
    old = _results(out)
    if old and not overwrite:
        raise SamiCacheError(f"{out} holds {old[0].name} of an earlier call: choose another --out, or replace it: --overwrite")


def _results(out: Path) -> list[Path]:
    return [path for path in (out / MASKS, out / OVERLAY, *sorted(out.glob("mask_[0-9]*.png"))) if path.exists()]


def _write(config: SegmentConfig, image: np.ndarray, found: list[dict[str, Any]], prompts: Prompts | None) -> Segmented:
    for path in _results(config.out):  # of another call, whose masks would be taken for this one's
        path.unlink()
    annotations = []
    for index, mask in enumerate(found):
        name = f"mask_{index:04d}.png"
        Image.fromarray(decode_mask(mask["segmentation"]).astype(np.uint8) * 255).save(config.out / name)
        annotations.append({"id": index, **mask, "file_name": name})
    height, width = image.shape[:2]
    content = {
        "image": {"image_id": 0, "file_name": config.image.name, "height": height, "width": width},
        "annotations": annotations,
    }
    # Big ones first, so that what lies on them is seen.
    largest = sorted(found, key=lambda mask: -mask["area"])
    drawn = draw_masks(image, (decode_mask(mask["segmentation"]) for mask in largest))
    if prompts is not None:
        drawn = draw_prompts(drawn, prompts)
    Image.fromarray(drawn).save(config.out / OVERLAY, quality=90)
    # Last: where it is, all the others are.
    (config.out / MASKS).write_text(json.dumps(content))
    return Segmented(masks=config.out / MASKS, overlay=config.out / OVERLAY, annotations=annotations)
