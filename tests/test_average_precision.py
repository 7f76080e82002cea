"""LVIS's numbers against an implementation of our own, on random sets. COCO's are compared in test_evaluate_promptable."""

from typing import Any

import numpy as np
import pytest
from lvis_reference import lvis_numbers

from sami_cache.inference.average_precision import average_precision, best_boxes
from sami_cache.inference.rle import encode_mask

SIDE = 160
CATEGORIES = [{"id": 3 * n + 2, "name": f"kind {n}", "frequency": "rcf"[n % 3]} for n in range(7)]


def rectangle(rng: np.random.Generator) -> list[int]:
    """x0, y0, x1, y1 of any size from a few pixels to most of the picture, as often small as large."""
    width, height = np.exp(rng.uniform(np.log(4), np.log(150), 2)).astype(int)
    x, y = rng.integers(0, SIDE - width), rng.integers(0, SIDE - height)
    return [int(value) for value in (x, y, x + width, y + height)]


def filled(box: list[int]) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def random_set(seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """Images, objects, detections: near objects, beside them, twice, of other categories; 350 in the first image."""
    rng = np.random.default_rng(seed)
    kinds = [category["id"] for category in CATEGORIES]
    images: list[dict[str, Any]] = []
    truth, found = [], []
    for number in range(10):
        image: dict[str, Any] = {"id": 10 + number, "width": SIDE, "height": SIDE}
        # The last category has no object, and the last image has none at all.
        boxes = [(int(rng.choice(kinds[:-1])), rectangle(rng)) for _ in range(rng.integers(3, 9) if number < 9 else 0)]
        present = sorted({kind for kind, _ in boxes})
        absent = sorted(set(kinds) - set(present))
        image["neg_category_ids"] = [kind for kind in absent if rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [kind for kind in present if rng.random() < 0.3]
        images.append(image)
        for kind, box in boxes:
            truth.append({"image_id": image["id"], "category_id": kind, "mask": filled(box)})
            for _ in range(rng.integers(0, 3)):
                low, high = np.array(box[:2]), np.array(box[2:])
                reach = np.maximum(1, (high - low) // 5)
                low = np.clip(low + rng.integers(-reach, reach + 1), 0, SIDE - 1)
                high = np.clip(high + rng.integers(-reach, reach + 1), low + 1, SIDE)
                mask = filled([int(value) for value in (*low, *high)])
                found.append({"image_id": image["id"], "category_id": kind, "mask": mask, "score": rng.random()})
        for _ in range(350 if number == 0 else 6):
            kind, mask = int(rng.choice(kinds)), filled(rectangle(rng))
            found.append({"image_id": image["id"], "category_id": kind, "mask": mask, "score": 0.8 * rng.random()})
    return images, truth, found


def ours(images: list[dict], truth: list[dict], found: list[dict]) -> dict[str, float]:
    annotations: list[dict[str, Any]] = [
        {
            "id": number,
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "segmentation": encode_mask(one["mask"]),
            "area": int(one["mask"].sum()),
            "bbox": [0, 0, 1, 1],
            "iscrowd": 0,
        }
        for number, one in enumerate(truth, 1)
    ]
    detections = [one | {"segmentation": encode_mask(one["mask"])} for one in found]
    kept = []
    for image in images:
        kept += best_boxes([one for one in detections if one["image_id"] == image["id"]], "lvis")
    dataset = {"images": images, "categories": CATEGORIES, "annotations": annotations}
    return average_precision(dataset, kept, style="lvis")


@pytest.mark.parametrize("seed", range(3))  # in the last no object is large: -1
def test_lvis_numbers_are_those_of_the_definition(seed) -> None:
    images, truth, found = random_set(seed)
    expected = lvis_numbers(images, CATEGORIES, truth, found)
    assert 0.02 < expected["AP"] < expected["AP50"] < 0.9
    assert ours(images, truth, found) == pytest.approx(expected, abs=1e-9)


def test_every_rule_of_lvis_changes_the_numbers() -> None:
    """So that the comparison above would notice if one were not followed."""
    images, truth, found = random_set(0)
    numbers = lvis_numbers(images, CATEGORIES, truth, found)
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        other = lvis_numbers([image | {key: []} for image in images], CATEGORIES, truth, found)
        assert abs(other["AP"] - numbers["AP"]) > 1e-4, key
    crowded = [one for one in found if one["image_id"] == images[0]["id"]]
    last = sorted(crowded, key=lambda one: -one["score"])[300:]
    assert len(last) > 20
    # The limit is the picture's and not the category's: what lies beyond it would still have been judged.
    judged = set(images[0]["neg_category_ids"]) | {one["category_id"] for one in truth if one["image_id"] == images[0]["id"]}
    assert any(one["category_id"] in judged for one in last)
