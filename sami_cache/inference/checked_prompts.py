"""Prompts of people and programs, checked before a model sees them: to a model every number is a prompt."""

from typing import Any, NamedTuple

import numpy as np

from sami_cache.errors import SamiCacheError

BOX_SLACK = 1.0
"""Pixels by which a box may leave the picture: those of data sets do so by rounding."""
_LABELS = (-1, 0, 1)


class Prompts(NamedTuple):
    """Q queries about one picture, as `SegmentAnything.to_input` and `complete_prompts` take them."""

    points: np.ndarray  # float64 [Q, P, 2], pixels of the picture, (x, y); a box is its two corners
    labels: np.ndarray  # int64 [Q, P]: 1 inside, 0 outside, 2 and 3 a box's corners, -1 no point


def check_prompts(height: int, width: int, points: Any = None, labels: Any = None, boxes: Any = None) -> Prompts:
    """Queries about a picture of `height` x `width` pixels, with their boxes' corners after their points.

    Args:
        points: float [Q, P, 2], (x, y) in pixels, x from 0 up to but without `width`; or None.
        labels: [Q, P], 1 inside, 0 outside, -1 no point (fills up queries of fewer points; its place is not looked at).
        boxes: float [Q, 4], x0 y0 x1 y1 in pixels, x from 0 to `width`; or None.

    Raises SamiCacheError, which says which prompt is wrong and why, for anything else, and for a query without any prompt.
    """
    if points is None and labels is None and boxes is None:
        raise SamiCacheError("no prompt at all: expected points with their labels, a box, or both.")
    if (points is None) != (labels is None):
        raise SamiCacheError("points and labels go together: a label for every point, 1 for inside and 0 for outside.")
    corners = np.zeros((0, 4)) if boxes is None else _numbers(boxes, "boxes", "[queries, 4], x0 y0 x1 y1", (None, 4))
    queries = len(corners)
    if points is None:
        places, kinds = np.zeros((queries, 0, 2)), np.zeros((queries, 0), np.int64)
    else:
        places = _numbers(points, "points", "[queries, points, 2], x y", (None, None, 2))
        kinds = _checked_labels(labels, places)
        queries = len(places)
        if boxes is not None and len(corners) != queries:
            raise SamiCacheError(f"{len(corners)} boxes for {queries} queries: expected one a query.")
        _check_points(places, kinds, height, width)
    if boxes is None:
        empty = (kinds == -1).all(axis=1)
        if empty.any():
            raise SamiCacheError(
                f"{_query(int(empty.argmax()), queries)}no prompt at all: every label is -1 and there is no box."
            )
        return Prompts(places, kinds)
    _check_boxes(corners, height, width)
    corner_kinds = np.broadcast_to(np.array([2, 3]), (queries, 2))
    return Prompts(np.concatenate([places, corners.reshape(-1, 2, 2)], axis=1), np.concatenate([kinds, corner_kinds], axis=1))


def _numbers(values: Any, name: str, meaning: str, shape: tuple[int | None, ...]) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SamiCacheError(f"{name}: expected numbers as {meaning}, found {type(values).__name__} ({error}).") from error
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        raise SamiCacheError(f"{name}: expected {meaning}, found the shape {list(array.shape)}.")
    return array


def _checked_labels(labels: Any, places: np.ndarray) -> np.ndarray:
    array = _numbers(labels, "labels", "[queries, points]", (None, None))
    if array.shape != places.shape[:2]:
        raise SamiCacheError(
            f"labels: expected one for each of {list(places.shape[:2])} points, found the shape {list(array.shape)}."
        )
    wrong = ~np.isin(array, _LABELS)
    if wrong.any():
        query, point = (int(index) for index in np.argwhere(wrong)[0])
        raise SamiCacheError(
            f"{_query(query, len(array))}point {point}: label {array[query, point]:g}: expected 1 (inside), 0 (outside) or -1 "
            "(no point); boxes are given as boxes."
        )
    return array.astype(np.int64)


def _check_points(places: np.ndarray, kinds: np.ndarray, height: int, width: int) -> None:
    size = np.array([width, height])
    right = ((places >= 0) & (places < size)).all(axis=2)  # false for NaN
    wrong = ~right & (kinds != -1)
    if not wrong.any():
        return
    query, point = (int(index) for index in np.argwhere(wrong)[0])
    x, y = places[query, point]
    where = f"{_query(query, len(places))}point {point}: ({x:g}, {y:g})"
    if not np.isfinite([x, y]).all():
        raise SamiCacheError(f"{where} is no place: expected finite numbers.")
    raise SamiCacheError(
        f"{where} lies outside the picture, which is {width} x {height} pixels: expected x from 0 to {width - 1}, y from 0 to "
        f"{height - 1}, the picture upright."
    )


def _check_boxes(corners: np.ndarray, height: int, width: int) -> None:
    for query, (x0, y0, x1, y1) in enumerate(corners):
        where = f"{_query(query, len(corners))}box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if not np.isfinite([x0, y0, x1, y1]).all():
            raise SamiCacheError(f"{where} is no box: expected finite numbers.")
        if not (x0 < x1 and y0 < y1):
            raise SamiCacheError(f"{where} is empty: expected x0 y0 x1 y1 with x0 < x1 and y0 < y1 (not width and height).")
        if min(x0, y0) < -BOX_SLACK or x1 > width + BOX_SLACK or y1 > height + BOX_SLACK:
            raise SamiCacheError(
                f"{where} leaves the picture, which is {width} x {height} pixels: expected x from 0 to {width}, y from 0 to "
                f"{height}, the picture upright."
            )


def _query(index: int, queries: int) -> str:
    return "" if queries == 1 else f"query {index}, "
