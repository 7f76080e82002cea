"""Evaluation of a promptable model: mIoU from boxes and clicks, and instance segmentation AP from a detector's boxes."""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import blake3
import numpy as np
import torch

from pipelines.promptable import open_promptable
from pipelines.published import PUBLISHED_AP, PUBLISHED_MIOU
from sami_cache import __version__
from sami_cache.data.annotations import Annotations, CocoAnnotations, Object, open_annotations
from sami_cache.errors import SamiCacheError
from sami_cache.inference.average_precision import (
    MAX_DETECTIONS,
    Style,
    Truth,
    average_precision,
    best_boxes,
    read_boxes,
)
from sami_cache.inference.measuring import BoxItself, ModelSegmenter, Segmenter, measure_objects, segment_boxes
from sami_cache.inference.protocols import MAX_CLICKS, Protocol
from sami_cache.inference.rle import encode_mask
from sami_cache.models.segment_anything import EFFICIENTSAM_POINTS, SegmentAnything
from sami_cache.processes import StopSignal, choose_device
from sami_cache.store.files import disk_full_as_error, fsync_directory, write_durably

BOX_BASELINE = "the box itself as the mask"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to measure, on what."""

    model: Path | None
    """A run or checkpoint; None for the baseline, which is the box itself as the mask."""
    data: Path
    images: Path | None = None
    protocol: Protocol
    prompts: tuple[str, ...] = ("box", "1", "3", "5")
    """`box`, or a number of clicks."""
    boxes: Path | None = None
    """A detector's results; with them AP is measured too."""
    metric: str = "auto"
    """coco, lvis, or what the data is made for."""
    limit: int | None = None
    """Of pictures, the first of the data."""
    out: Path = Path("evaluation.json")
    overwrite: bool = False
    device: str = "auto"

    @property
    def masks_out(self) -> Path:
        """Where the masks of the detector's boxes go, as COCO results."""
        return self.out.with_suffix(".masks.json")


class Moment(NamedTuple):
    """How far it is."""

    done: int
    total: int
    """Pictures."""
    objects: int
    seconds: float


def evaluate(
    config: EvaluationConfig, progress: Callable[[Moment], None] = lambda _: None, *, model: SegmentAnything | None = None
) -> dict[str, Any]:
    """Measure, write `config.out` (and `config.masks_out` where there are boxes), and return what was written.

    Both files appear whole, when everything is measured, or not at all.

    Args:
        model: instead of the one that `config.model` names, whose name the result then has.

    Raises:
        SamiCacheError: for arguments and files that are not as they must be, before anything is measured wherever possible.
    """
    _check(config)
    with StopSignal(lambda: "interrupted: nothing was written; the same command begins again.") as stop:
        result, detections = _measure(config, progress, model)
        stop.holding = True  # both files, or none
        if config.boxes is not None:
            _publish(config.masks_out, detections, None)
        _publish(config.out, result, 2)
    return result


def _measure(
    config: EvaluationConfig, progress: Callable[[Moment], None], model: SegmentAnything | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    started = time.monotonic()
    annotations = open_annotations(config.data, config.images)
    total = len(annotations) if config.limit is None else min(config.limit, len(annotations))
    truth, boxes = _read_detector(config, annotations)
    style = _style(config, truth) if truth else None
    device = choose_device(config.device)
    if model is None and config.model is not None:
        model = open_promptable(config.model, device)
    segmenter: Segmenter = BoxItself() if model is None else ModelSegmenter(model)
    prompts = tuple(prompt for prompt in config.prompts if prompt == "box" or segmenter.takes_points)
    if not prompts and truth is None:
        raise SamiCacheError(
            "the box itself as the mask answers no clicks: add box to --prompts, or give a detector's --boxes."
        )
    if model is not None and model.config.family == "efficientsam":
        for prompt in prompts:
            if prompt != "box" and int(prompt) > EFFICIENTSAM_POINTS:
                raise SamiCacheError(f"prompt {prompt}: a model of family efficientsam takes {EFFICIENTSAM_POINTS} clicks")
    protocol = replace(config.protocol, previous_mask=config.protocol.previous_mask and segmenter.takes_masks)

    tally = _Tally(segmenter, prompts, protocol)
    for index in range(total):
        objects = annotations.objects(index)
        wanted = best_boxes(boxes.get(truth.images[index]["id"], []), style) if truth and style else []
        tally.add(annotations, index, objects, wanted)
        progress(Moment(index + 1, total, tally.measured, time.monotonic() - started))

    result: dict[str, Any] = {
        "model": _describe_model(config, model),
        "data": {"annotations": str(config.data), "pictures": total, "of": len(annotations), **tally.counts},
        "protocol": asdict(protocol),
        "miou": tally.rows(),
    }
    if truth is not None and style is not None and config.boxes is not None:
        result["ap"] = _score(config, truth, style, range(total), tally, protocol)
    result["published"] = {
        "note": "Published by others in arXiv 2312.00863, on COCO's and LVIS's validation sets, percent; never ours.",
        "miou": asdict(PUBLISHED_MIOU),
        "ap": asdict(PUBLISHED_AP),
    }
    result |= {"seconds": round(time.monotonic() - started, 3), "device": str(device), "sami_cache": __version__}
    return result, tally.detections


class _Tally:
    """What was measured so far."""

    def __init__(self, segmenter: Segmenter, prompts: tuple[str, ...], protocol: Protocol) -> None:
        """
        Args:
            protocol: with `previous_mask` as the model takes it.
        """
        self._segmenter, self._prompts, self._protocol = segmenter, prompts, protocol
        self._ious: dict[str, list[float]] = {prompt: [] for prompt in prompts}
        self.counts = {"objects": 0, "crowd_dropped": 0, "empty_left_out": 0}
        self.detections: list[dict[str, Any]] = []
        self.boxes: list[dict[str, Any]] = []

    @property
    def only_mask(self) -> str | None:
        return self._segmenter.only_mask

    @property
    def measured(self) -> int:
        return self.counts["objects"] + len(self.detections)

    def add(
        self,
        annotations: Annotations,
        index: int,
        objects: list[Object],
        boxes: list[dict[str, Any]],
    ) -> None:
        """Measure one picture, which is read and encoded only where something is asked of it."""
        kept = [one for one in objects if self._protocol.crowd or not one.crowd] if self._prompts else []
        if self._prompts:
            self.counts["crowd_dropped"] += len(objects) - len(kept)
        if not (kept or boxes):
            return
        image = annotations.read_image(index)
        self._segmenter.set_image(image)
        if kept:
            found = measure_objects(self._segmenter, kept, self._protocol, self._prompts)
            measured = len(found[self._prompts[0]])
            for prompt, values in found.items():
                self._ious[prompt] += values
            self.counts["objects"] += measured
            self.counts["empty_left_out"] += len(kept) - measured
        if boxes:
            corners = _corners(boxes, *image.shape[:2])
            masks = segment_boxes(self._segmenter, corners, self._protocol)
            for box, mask in zip(boxes, masks, strict=True):
                about = {key: box[key] for key in ("image_id", "category_id")}
                self.detections.append({**about, "segmentation": encode_mask(mask), "score": box["score"]})
            self.boxes += boxes

    def rows(self) -> list[dict[str, Any]]:
        """One a prompt, each with what it is under."""
        return [
            {
                "prompt": prompt,
                "miou": float(np.mean(values)) if values else None,
                "objects": len(values),
                "protocol": self._protocol.name,
                "settings": self._protocol.settings(prompt, self._segmenter.only_mask),
            }
            for prompt, values in self._ious.items()
        ]


def _check(config: EvaluationConfig) -> None:
    for prompt in config.prompts:
        if prompt != "box" and not (prompt.isascii() and prompt.isdigit() and prompt[0] != "0" and int(prompt) <= MAX_CLICKS):
            raise SamiCacheError(f"prompt {prompt!r}: expected box, or a number of clicks from 1 to {MAX_CLICKS}")
    if not config.prompts and config.boxes is None:
        raise SamiCacheError("nothing to measure: give --prompts, or a detector's --boxes.")
    if config.limit is not None and config.limit < 1:
        raise SamiCacheError(f"limit is {config.limit}: expected at least one picture")
    if not config.out.parent.is_dir():
        raise SamiCacheError(f"{config.out}: there is no folder {config.out.parent}; make it, or name another file with --out.")
    for path in (config.out, *([config.masks_out] if config.boxes else [])):
        if path.exists() and not config.overwrite:
            raise SamiCacheError(f"{path} is there already: name another file with --out, or replace it with --overwrite.")


def _read_detector(config: EvaluationConfig, annotations: Annotations) -> tuple[Truth | None, dict[int, list[dict[str, Any]]]]:
    if config.boxes is None:
        return None, {}
    if not isinstance(annotations, CocoAnnotations):
        raise SamiCacheError(
            f"{config.data}: AP needs categories, which SA-1B has none of: give a COCO-format JSON with --data."
        )
    truth = Truth(annotations)
    return truth, read_boxes(config.boxes, truth)


def _style(config: EvaluationConfig, truth: Truth) -> Style:
    if config.metric not in ("auto", "coco", "lvis"):
        raise SamiCacheError(f"metric is {config.metric!r}: expected auto, coco or lvis")
    if config.metric == "lvis" and truth.style != "lvis":
        raise SamiCacheError(
            f"{truth.name}: LVIS's AP needs the frequency (r, c, f) of every category; take --metric coco for this data."
        )
    return truth.style if config.metric == "auto" else cast(Style, config.metric)


def _corners(boxes: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """float [N, 4] x0, y0, x1, y1, within the picture, over whose edge detectors often reach."""
    given = np.array([box["bbox"] for box in boxes], dtype=np.float64)
    corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
    return np.clip(corners, 0, [width, height, width, height])


def _score(
    config: EvaluationConfig, truth: Truth, style: Style, indices: Iterable[int], tally: _Tally, protocol: Protocol
) -> dict[str, Any]:
    dataset = truth.dataset(list(indices))
    boxes = cast(Path, config.boxes)
    return {
        "metric": style,
        "masks": average_precision(dataset, tally.detections, style=style),
        "boxes": average_precision(dataset, tally.boxes, style=style, kind="bbox"),
        "protocol": protocol.name,
        "settings": f"mask {tally.only_mask or protocol.detection_mask}, boxes and scores of {boxes.name}, "
        f"maxDets {MAX_DETECTIONS[style]} ({'an image' if style == 'lvis' else 'an image and category'}), "
        f"crowd as {style.upper()} has it",
        "detector": {"file": str(boxes), "blake3": blake3.blake3(boxes.read_bytes()).hexdigest()},
        "detections": len(tally.detections),
        "masks_file": str(config.masks_out),
    }


def _describe_model(config: EvaluationConfig, model: SegmentAnything | None) -> dict[str, Any]:
    if model is None:
        return {"name": BOX_BASELINE}
    hasher = blake3.blake3()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"name": str(config.model), "weights_blake3": hasher.hexdigest(), **asdict(model.config)}


def _publish(path: Path, value: Any, indent: int | None) -> None:
    """Under its name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with disk_full_as_error(path.parent, f"writing {path.name}"):
            write_durably(temporary, (json.dumps(value, indent=indent) + "\n").encode())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    fsync_directory(path.parent)
