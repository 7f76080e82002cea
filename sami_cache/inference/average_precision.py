"""Average precision of instance segmentation as COCO and LVIS define it, by faster-coco-eval.

https://cocodataset.org/#detection-eval and arXiv 1908.03195. Areas: small below 32 x 32 pixels, large above 96 x 96.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from sami_cache.data.annotations import CocoAnnotations
from sami_cache.errors import SamiCacheError, one_line

Style = Literal["coco", "lvis"]
MAX_DETECTIONS = {"coco": 100, "lvis": 300}
"""The best by score: COCO an image and category, LVIS an image."""
_NAMES = {
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
}
_COCO_NAMES = _NAMES | {
    "AR1": "AR_all",
    "AR10": "AR_second",
    "AR100": "AR_third",
    "ARs": "AR_small",
    "ARm": "AR_medium",
    "ARl": "AR_large",
}
_LVIS_NAMES = _NAMES | {
    "APr": "APr",
    "APc": "APc",
    "APf": "APf",
    "AR300": "AR_all",
    "ARs": "AR_small",
    "ARm": "AR_medium",
    "ARl": "AR_large",
}


class Truth:
    """What detections are compared with: the annotations of a COCO-format or LVIS file."""

    def __init__(self, annotations: CocoAnnotations) -> None:
        """Raises SamiCacheError where the file has no categories, or an annotation has none."""
        self._annotations = annotations
        data = json.loads(annotations.path.read_bytes())
        self.name = str(annotations.path)
        self.images: list[dict[str, Any]] = data["images"]
        """In the order of the annotations' keys."""
        self.categories: list[dict[str, Any]] = data.get("categories") or []
        if not self.categories:
            raise SamiCacheError(
                f"{self.name} has no categories, which AP is the mean over; mIoU needs none: leave out --boxes."
            )
        self._areas: dict[int, list[float | None]] = {image["id"]: [] for image in self.images}
        for entry in data["annotations"]:
            self._areas[entry["image_id"]].append(entry.get("area"))

    @property
    def style(self) -> Style:
        """What the file is made for: LVIS says how frequent each of its categories is."""
        return "lvis" if all("frequency" in category for category in self.categories) else "coco"

    def dataset(self, indices: Sequence[int]) -> dict[str, Any]:
        """The images at `indices` with all their annotations, as the library takes it.

        Annotations are numbered from 1: the library's number 0 means "not found", and files in the wild begin with it.
        """
        entries = []
        for index in indices:
            areas = self._areas[self.images[index]["id"]]
            for one, area in zip(self._annotations.objects(index), areas, strict=True):
                if one.category is None:
                    raise SamiCacheError(f"{one.where}: no category_id, which AP needs; mIoU does not: leave out --boxes.")
                entries.append(
                    {
                        "id": len(entries) + 1,
                        "image_id": one.image_id,
                        "category_id": one.category,
                        "segmentation": one.rle(),
                        "bbox": [one.box[0], one.box[1], one.box[2] - one.box[0], one.box[3] - one.box[1]],
                        # Not rounded: a fraction decides between small and medium.
                        "area": one.area if area is None else area,
                        "iscrowd": int(one.crowd),
                    }
                )
        return {"images": [self.images[i] for i in indices], "categories": self.categories, "annotations": entries}


def read_boxes(path: Path, truth: Truth) -> dict[int, list[dict[str, Any]]]:
    """A detector's boxes, a list as COCO's results are: image_id, category_id, bbox [x, y, width, height], score.

    By image id, in the file's order. Raises SamiCacheError for anything else, and for images and categories that the
    annotations do not have.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise SamiCacheError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SamiCacheError(f"{path}: not JSON ({one_line(error, 120)}): expected COCO's results of a detector") from error
    if not isinstance(entries, list):
        raise SamiCacheError(f"{path}: expected a list of boxes, COCO's results format, found a {type(entries).__name__}")
    images, categories = {image["id"] for image in truth.images}, {category["id"] for category in truth.categories}
    boxes: dict[int, list[dict[str, Any]]] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: box {number}"
        if not isinstance(entry, dict):
            raise SamiCacheError(f"{where}: expected an object with image_id, category_id, bbox and score")
        for key in ("image_id", "category_id"):
            if type(entry.get(key)) is not int:
                raise SamiCacheError(f"{where}: expected a whole number as {key}, found {one_line(entry.get(key), 40)}")
        if entry.get("image_id") not in images:
            found = one_line(entry.get("image_id"), 40)
            raise SamiCacheError(f"{where}: image_id {found} is none of the {len(images)} images of {truth.name}")
        if entry.get("category_id") not in categories:
            raise SamiCacheError(
                f"{where}: category_id {one_line(entry.get('category_id'), 40)} is none of the {len(categories)} categories of "
                f"{truth.name}, {min(categories)} to {max(categories)}: give the detector's results with the data's own ids"
            )
        box, score = entry.get("bbox"), entry.get("score")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
            raise SamiCacheError(f"{where}: expected bbox [x, y, width, height] in pixels, found {one_line(box, 80)}")
        if not _is_number(score):
            raise SamiCacheError(f"{where}: expected a number as score, found {one_line(score, 40)}")
        kept = {key: entry[key] for key in ("image_id", "category_id", "bbox", "score")}
        boxes.setdefault(entry["image_id"], []).append(kept)
    return boxes


def best_boxes(boxes: list[dict[str, Any]], style: Style) -> list[dict[str, Any]]:
    """Those of one image that count: all in COCO, whose limit is the library's; LVIS's 300 of the highest score.

    LVIS's own code cuts before it evaluates; faster-coco-eval's `maxDets` is an image and category whatever the style.
    """
    if style == "coco":
        return boxes
    return sorted(boxes, key=lambda box: -box["score"])[: MAX_DETECTIONS["lvis"]]


def average_precision(
    dataset: dict[str, Any], detections: Iterable[dict[str, Any]], *, style: Style, kind: Literal["segm", "bbox"] = "segm"
) -> dict[str, float]:
    """COCO's twelve numbers or LVIS's thirteen, 0..1, -1 where nothing is there to be found.

    Args:
        dataset: as `Truth.dataset` makes it.
        detections: image_id, category_id, score, and `segmentation` or `bbox`, by `kind`. Not both: of masks with a box
            beside them COCO's tools take the box's area to tell small from large.
    """
    if style == "lvis" and not all("frequency" in category for category in dataset["categories"]):
        raise SamiCacheError("LVIS's AP needs the frequency (r, c, f) of every category: take the metric coco for this data.")
    wanted = "segmentation" if kind == "segm" else "bbox"
    if style == "lvis":
        detections = _looked_for(dataset, detections)
    results = [{key: entry[key] for key in ("image_id", "category_id", "score", wanted)} for entry in detections]
    truth = COCO({**dataset, "annotations": [dict(entry) for entry in dataset["annotations"]]})
    evaluation = COCOeval_faster(truth, truth.loadRes(results), kind, lvis_style=style == "lvis")
    if style == "lvis":
        evaluation.params.maxDets = [MAX_DETECTIONS["lvis"]]
    evaluation.run()
    found = evaluation.stats_as_dict
    return {name: float(found[theirs]) for name, theirs in (_LVIS_NAMES if style == "lvis" else _COCO_NAMES).items()}


def _looked_for(dataset: dict[str, Any], detections: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """LVIS's rule: detections of a category that an image is not known to have, or to lack, are not judged.

    faster-coco-eval knows the rule, and fails on an image without annotations all of whose detections fall under it.
    """
    known = {image["id"]: set(image.get("neg_category_ids", [])) for image in dataset["images"]}
    for entry in dataset["annotations"]:
        known[entry["image_id"]].add(entry["category_id"])
    return [entry for entry in detections if entry["category_id"] in known[entry["image_id"]]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
