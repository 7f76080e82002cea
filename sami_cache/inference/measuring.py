"""What a promptable model, or a stand-in for one, answers to the prompts of a protocol, and how good that is.

A picture is encoded once; its objects, and a detector's boxes, are decoded in chunks, and brought to the picture's resolution
one mask at a time, so that memory is bounded whatever the picture holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sami_cache.data.annotations import Object
from sami_cache.inference.protocols import (
    MaskRule,
    Protocol,
    box_to_mask,
    choose_mask,
    farthest_point,
    mask_iou,
    next_click,
)
from sami_cache.models.segment_anything import Masks, SegmentAnything
from sami_cache.prompts import clicks_of, tight_box

CHUNK = 32
"""Queries decoded at once."""


class Answers(ABC):
    """To Q queries about one picture."""

    predicted: np.ndarray
    """float [Q, 4]: the IoU that the model expects of each token's mask."""

    @abstractmethod
    def mask(self, query: int, token: int) -> np.ndarray:
        """bool [H, W]."""

    @abstractmethod
    def low_resolution(self, tokens: Sequence[int]) -> Tensor | None:
        """The logits of one token a query, as `Segmenter.answer` takes them for `previous`; None where it takes none."""


class Segmenter(ABC):
    """Something that answers prompts about one picture at a time."""

    takes_points: bool
    takes_masks: bool
    only_mask: str | None = None
    """What the mask is where there is no choice of masks."""

    @abstractmethod
    def set_image(self, image: np.ndarray) -> None:
        """uint8 [H, W, 3]."""

    @abstractmethod
    def answer(self, points: np.ndarray, labels: np.ndarray, previous: Tensor | None = None) -> Answers:
        """To points [Q, P, 2] in pixels of the picture with labels [Q, P], a box being its corners with labels 2 and 3."""


class ModelSegmenter(Segmenter):
    """A `SegmentAnything`, on the device where its weights are."""

    takes_points = True

    def __init__(self, model: SegmentAnything) -> None:
        self.model = model.eval()
        self.takes_masks = model.config.family == "sam"
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        self._size = image.shape[0], image.shape[1]
        self._embedding = self.model.encode(self.model.preprocess(image)[None].to(self._device))

    @torch.inference_mode()
    def answer(self, points: np.ndarray, labels: np.ndarray, previous: Tensor | None = None) -> Answers:
        places = self.model.to_input(torch.from_numpy(points).to(self._device, torch.float32), *self._size)[None]
        kinds = torch.from_numpy(labels).to(self._device, torch.int64)[None]
        masks = self.model.decode(self._embedding, *self.model.complete_prompts(places, kinds), previous)
        return _ModelAnswers(self.model, masks, *self._size)


class _ModelAnswers(Answers):
    def __init__(self, model: SegmentAnything, masks: Masks, height: int, width: int) -> None:
        self._model, self._logits, self._size = model, masks.logits[0], (height, width)
        self._takes_masks = model.config.family == "sam"
        self.predicted = masks.iou[0].float().cpu().numpy()

    @torch.inference_mode()
    def mask(self, query: int, token: int) -> np.ndarray:
        return (self._model.to_picture(self._logits[query, token][None, None], *self._size)[0, 0] > 0).cpu().numpy()

    def low_resolution(self, tokens: Sequence[int]) -> Tensor | None:
        if not self._takes_masks:
            return None
        return self._logits[torch.arange(len(tokens)), torch.tensor(tokens)][None, :, None]


class BoxItself(Segmenter):
    """The baseline that looks at nothing: the box is the mask."""

    takes_points = takes_masks = False
    only_mask = "the box itself"

    def set_image(self, image: np.ndarray) -> None:
        self._size = image.shape[0], image.shape[1]

    def answer(self, points: np.ndarray, labels: np.ndarray, previous: Tensor | None = None) -> Answers:
        if not (labels == (2, 3)).all():
            raise ValueError("the box itself as the mask answers boxes only")
        return _Boxes(points.reshape(-1, 4), *self._size)


class _Boxes(Answers):
    def __init__(self, boxes: np.ndarray, height: int, width: int) -> None:
        self._boxes, self._size = boxes, (height, width)
        self.predicted = np.ones((len(boxes), 4), np.float32)

    def mask(self, query: int, token: int) -> np.ndarray:
        return box_to_mask(self._boxes[query], *self._size)

    def low_resolution(self, tokens: Sequence[int]) -> Tensor | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Target:
    """An object to be found again."""

    truth: np.ndarray
    box: tuple[float, float, float, float]
    points: np.ndarray
    """int [P, 2]: the clicks that do not depend on the answers; at least the first."""


def measure_objects(
    segmenter: Segmenter, objects: Sequence[Object], protocol: Protocol, prompts: Sequence[str], *, chunk: int = CHUNK
) -> dict[str, list[float]]:
    """The IoU of every object under every prompt (`box`, or a number of clicks), in the order of `objects`.

    The picture must be set. Objects whose mask is empty are left out, under all prompts alike: nothing could point at them.
    """
    counts = sorted(int(prompt) for prompt in prompts if prompt != "box")
    ious: dict[str, list[float]] = {prompt: [] for prompt in prompts}
    for start in range(0, len(objects), chunk):
        made = (_make_target(one, protocol, max(counts, default=1)) for one in objects[start : start + chunk])
        targets = [target for target in made if target is not None]
        if not targets:
            continue
        if "box" in ious:
            ious["box"] += _box_ious(segmenter, targets, protocol)
        if counts:
            for count, values in _click_ious(segmenter, targets, protocol, counts).items():
                ious[str(count)] += values
    return ious


def segment_boxes(segmenter: Segmenter, boxes: np.ndarray, protocol: Protocol, *, chunk: int = CHUNK) -> Iterator[np.ndarray]:
    """The masks, bool [H, W], of a detector's boxes, float [N, 4], one after another."""
    for start in range(0, len(boxes), chunk):
        part = boxes[start : start + chunk]
        answers = _answer_boxes(segmenter, part)
        for query, box in enumerate(part):
            yield _choose(answers, query, protocol.detection_mask, box=box)[1]


def _make_target(one: Object, protocol: Protocol, clicks: int) -> Target | None:
    truth = one.mask()
    if not truth.any():
        return None
    points = clicks_of(one, truth, clicks if protocol.next_points == "uniform" else 1, protocol.seed)
    if protocol.first_point == "farthest":
        points[0] = farthest_point(truth)
    return Target(truth=truth, box=tight_box(truth) if protocol.boxes == "tight" else one.box, points=points)


def _answer_boxes(segmenter: Segmenter, boxes: np.ndarray) -> Answers:
    return segmenter.answer(boxes.reshape(-1, 2, 2), np.tile(np.array([2, 3]), (len(boxes), 1)))


def _choose(
    answers: Answers,
    query: int,
    rule: MaskRule,
    *,
    box: Sequence[float] | np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> tuple[int, np.ndarray]:
    return choose_mask(rule, answers.predicted[query], lambda token: answers.mask(query, token), box=box, truth=truth)


def _box_ious(segmenter: Segmenter, targets: Sequence[Target], protocol: Protocol) -> list[float]:
    answers = _answer_boxes(segmenter, np.array([target.box for target in targets]))
    return [
        mask_iou(_choose(answers, query, protocol.box_mask, box=target.box, truth=target.truth)[1], target.truth)
        for query, target in enumerate(targets)
    ]


def _click_ious(
    segmenter: Segmenter, targets: Sequence[Target], protocol: Protocol, counts: Sequence[int]
) -> dict[int, list[float]]:
    ious: dict[int, list[float]] = {count: [] for count in counts}
    points = np.stack([target.points for target in targets])
    labels = np.ones(points.shape[:2], np.int64)
    interactive, previous = protocol.next_points != "uniform", None
    for clicks in range(1, max(counts) + 1):
        if clicks not in ious and not interactive:
            continue  # the clicks are known, and nobody asks
        answers = segmenter.answer(points[:, :clicks], labels[:, :clicks], previous)
        tokens, following = [], []
        for query, target in enumerate(targets):
            token, mask = _choose(answers, query, protocol.mask_rule(str(clicks)), truth=target.truth)
            tokens.append(token)
            if clicks in ious:
                ious[clicks].append(mask_iou(mask, target.truth))
            if interactive and clicks < max(counts):
                following.append(next_click(protocol.next_points, mask, target.truth))
        if following:
            points = np.concatenate([points, np.array([[point] for point, _ in following])], axis=1)
            labels = np.concatenate([labels, np.array([[label] for _, label in following])], axis=1)
            previous = answers.low_resolution(tokens) if protocol.previous_mask else None
    return ious
