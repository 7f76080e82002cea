"""LVIS's average precision (arXiv 1908.03195) written down anew in numpy, after its toolkit's rules. Slow, plain, for tests.

A picture is judged on categories that it is known to have (an annotation) or to lack (`neg_category_ids`). Of a category in its
`not_exhaustive_category_ids` not all objects are annotated, so that a detection without a match is no mistake. The 300 of the
highest score in a picture count.
"""

from typing import Any

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return np.logical_and(one, other).sum() / np.logical_or(one, other).sum()


def lvis_numbers(
    images: list[dict[str, Any]], categories: list[dict[str, Any]], truth: list[dict[str, Any]], found: list[dict[str, Any]]
) -> dict[str, float]:
    """The toolkit's thirteen numbers, 0..1, -1 where nothing is there to be found.

    `truth`: image_id, category_id, mask (bool [H, W]); `found`: these and a score.
    """
    precision, recall = {}, {}
    for category in categories:
        for name, area in AREAS.items():
            precision[category["id"], name], recall[category["id"], name] = curve(images, category["id"], area, truth, found)

    def mean(values: dict, area: str, frequency: str = "rcf", thresholds: slice = slice(None)) -> float:
        """Over all categories that have objects."""
        chosen = [values[one["id"], area] for one in categories if one["frequency"] in frequency]
        chosen = [value[thresholds] for value in chosen if value is not None]
        return float(np.mean(chosen)) if chosen else -1.0

    return {
        "AP": mean(precision, "all"),
        "AP50": mean(precision, "all", thresholds=slice(0, 1)),
        "AP75": mean(precision, "all", thresholds=slice(5, 6)),
        **{f"AP{area}": mean(precision, area) for area in "sml"},
        **{f"AP{frequency}": mean(precision, "all", frequency) for frequency in "rcf"},
        "AR300": mean(recall, "all"),
        **{f"AR{area}": mean(recall, area) for area in "sml"},
    }


def curve(
    images: list[dict], category: int, area: tuple[float, float], truth: list[dict], found: list[dict]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Precision [10 thresholds, 101 recalls] and the recall reached [10], or None where the category has no objects."""
    scores, right, counted, objects = [], [], [], 0
    for image in images:
        mine = [one for one in truth if (one["image_id"], one["category_id"]) == (image["id"], category)]
        if not mine and category not in image["neg_category_ids"]:
            continue
        best = sorted((one for one in found if one["image_id"] == image["id"]), key=lambda one: -one["score"])[:300]
        best = [one for one in best if one["category_id"] == category]
        wanted = np.array([area[0] <= one["mask"].sum() <= area[1] for one in mine], bool)
        objects += wanted.sum()
        overlaps = np.array([[overlap(one["mask"], other["mask"]) for other in mine] for one in best]).reshape(
            len(best), len(mine)
        )
        lenient = category in image["not_exhaustive_category_ids"]
        scores += [one["score"] for one in best]
        right.append(np.zeros((len(THRESHOLDS), len(best)), bool))
        counted.append(np.ones((len(THRESHOLDS), len(best)), bool))
        for row, threshold in enumerate(THRESHOLDS):
            free = np.ones(len(mine), bool)
            for index, detection in enumerate(best):
                # The best match that is still free and wanted; failing that, one that only excuses the detection.
                for eligible in (free & wanted, free & ~wanted):
                    close = np.where(eligible, overlaps[index], -1)
                    if mine and close.max() >= threshold:
                        match = close.argmax()
                        free[match] = False
                        right[-1][row, index] = wanted[match]
                        counted[-1][row, index] = wanted[match]
                        break
                else:
                    inside = area[0] <= detection["mask"].sum() <= area[1]
                    counted[-1][row, index] = inside and not lenient
    if not objects:
        return None, None
    order = np.argsort(-np.array(scores), kind="stable")
    rights = np.concatenate(right, axis=1)[:, order]
    wrongs = np.concatenate(counted, axis=1)[:, order] & ~rights
    precision, reached = np.zeros((len(THRESHOLDS), len(RECALLS))), np.zeros(len(THRESHOLDS))
    for row in range(len(THRESHOLDS)):
        hits, misses = rights[row].cumsum(), wrongs[row].cumsum()
        reached[row] = hits[-1] / objects if len(hits) else 0
        for column, recall in enumerate(RECALLS):
            # The highest precision at this recall or more; detections that do not count may come before any that does.
            here = (hits / objects >= recall) & (hits + misses > 0)
            precision[row, column] = (hits[here] / (hits + misses)[here]).max() if here.any() else 0
    return precision, reached
