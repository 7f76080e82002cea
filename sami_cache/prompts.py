"""What a promptable model is shown of an annotated picture: the picture, the objects to learn, and a first prompt for each.

The prompts are Segment Anything's (arXiv 2304.02643, appendix A): a point uniform inside the mask, or its box with noise of a
tenth of its sides, at most 20 pixels. What is drawn is a function of (seed, epoch, picture) alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sami_cache.data.annotations import Annotations, Object
from sami_cache.errors import SamiCacheError
from sami_cache.models.segment_anything import SegmentAnything


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Which objects are learnt, and how they are first asked for."""

    max_objects: int = 64
    """A picture's, drawn anew in every epoch where it has more."""
    max_area: float = 0.9
    """Share of the picture; larger objects are left out, as crowds are."""
    box_share: float = 0.5
    """Objects whose first prompt is a box; the others get a point."""
    box_noise: float = 0.1
    """Standard deviation of every side of a box, as a share of the box's width or height."""
    box_noise_limit: float = 20.0
    """Pixels of the model's input."""
    flip: bool = False
    """Mirror every other picture. Published: no augmentation, on eleven million pictures; few pictures need it."""
    crop: float = 1.0
    """Cut out of a picture a part with sides of this share up to all, each drawn for itself; 1: the whole picture."""

    def __post_init__(self) -> None:
        if self.max_objects < 1 or not 0 < self.max_area <= 1:
            raise SamiCacheError(f"max_objects is {self.max_objects} and max_area {self.max_area}: expected 1 or more, 0 to 1")
        if not 0 <= self.box_share <= 1 or self.box_noise < 0 or self.box_noise_limit < 0:
            raise SamiCacheError("expected a box_share from 0 to 1, box_noise and box_noise_limit of 0 or more")
        if not 0 < self.crop <= 1:
            raise SamiCacheError(f"crop is {self.crop}: expected above 0, up to 1")


class Prompted(NamedTuple):
    """One picture, or with a leading [B] several, whose objects are then filled up to equal counts Q."""

    pixels: Tensor  # float32 [3, S, S]
    inside: Tensor  # bool [S / 4, S / 4], the cells of the picture, not of its padding
    targets: Tensor  # bool [Q, S / 4, S / 4]
    points: Tensor  # float32 [Q, 2, 2], in pixels of the input
    labels: Tensor  # int64 [Q, 2]: 2 and 3 for a box, else 1 and -1
    real: Tensor  # bool [Q], False: fills up
    draws: Tensor  # float32 [Q, R] in 0..1, which of the wrong cells each of R further rounds points at


def learnable(found: Object, config: PromptConfig) -> bool:
    """Whether the object is one to learn, as far as its annotation says without being decoded."""
    return not found.crowd and 0 < found.area <= config.max_area * found.height * found.width


def first_prompts(
    annotations: Annotations, model: SegmentAnything, config: PromptConfig, seed: int, error_points: int = 0
) -> Callable[[int, int], Prompted]:
    """(epoch, number of the picture) -> `Prompted`, for threads; Q is 0 where a picture has no object to learn.

    `error_points`: how many further rounds are to point at an error.
    """

    def make(epoch: int, number: int) -> Prompted:
        rng = np.random.default_rng((seed, epoch, number))
        chosen = [found for found in annotations.objects(number) if learnable(found, config)]
        if len(chosen) > config.max_objects:
            chosen = [chosen[index] for index in np.sort(rng.permutation(len(chosen))[: config.max_objects])]
        image = annotations.read_image(number)
        augment = augmentation(image.shape[0], image.shape[1], config, rng)
        image = np.ascontiguousarray(augment(image))
        height, width = image.shape[:2]
        rows, columns = model.covered(height, width)
        cells = model.config.image_size // 4
        targets, points, labels = [], [], []
        for found in chosen:
            mask = augment(found.mask())
            target = to_cells(mask, (rows, columns), cells)
            if not target.any():  # less than half of any cell: nothing that the loss could see
                continue
            if rng.random() < config.box_share:
                box = model.to_input(torch.tensor(tight_box(mask)).view(2, 2), height, width).numpy()
                noisy = noisy_box(box, config, rng)
                points.append(np.clip(noisy, 0, [columns, rows]))
                labels.append((2, 3))
            else:
                point = model.to_input(torch.from_numpy(uniform_points(mask, 1, rng)).float(), height, width).numpy()
                points.append(np.concatenate([point, np.full((1, 2), -1.0)]))
                labels.append((1, -1))
            targets.append(target)
        inside = np.zeros((cells, cells), bool)
        inside[: math.ceil(rows / 4), : math.ceil(columns / 4)] = True
        return Prompted(
            pixels=model.preprocess(image),
            inside=torch.from_numpy(inside),
            targets=torch.from_numpy(np.stack(targets) if targets else np.zeros((0, cells, cells), bool)),
            points=torch.from_numpy(np.array(points, np.float32).reshape(-1, 2, 2)),
            labels=torch.tensor(labels, dtype=torch.int64).view(-1, 2),
            real=torch.ones(len(targets), dtype=torch.bool),
            draws=torch.from_numpy(rng.random((len(targets), error_points), np.float32)),
        )

    return make


def augmentation(height: int, width: int, config: PromptConfig, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """What is done to a picture [H, W, ...] and its masks alike, a view of them. Draws nothing where nothing is to be done."""
    crop, flip = (slice(None), slice(None)), False
    if config.crop < 1:
        shares = rng.uniform(config.crop, 1, 2)
        rows, columns = max(1, round(height * shares[0])), max(1, round(width * shares[1]))
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        crop = slice(top, top + rows), slice(left, left + columns)
    if config.flip:
        flip = bool(rng.integers(2))
    return lambda values: values[crop][:, ::-1] if flip else values[crop]


def collate(pictures: list[Prompted]) -> Prompted:
    """Several pictures as one, every one with as many objects as the richest, at least one."""
    most = max(1, *(len(picture.labels) for picture in pictures))

    def fill(values: Tensor, value: float) -> Tensor:
        missing = values.new_full((most - len(values), *values.shape[1:]), value)
        return torch.cat([values, missing])

    return Prompted(
        pixels=torch.stack([picture.pixels for picture in pictures]),
        inside=torch.stack([picture.inside for picture in pictures]),
        targets=torch.stack([fill(picture.targets, False) for picture in pictures]),
        points=torch.stack([fill(picture.points, -1) for picture in pictures]),
        labels=torch.stack([fill(picture.labels, -1) for picture in pictures]),
        real=torch.stack([fill(picture.real, False) for picture in pictures]),
        draws=torch.stack([fill(picture.draws, 0) for picture in pictures]),
    )


def to_cells(mask: np.ndarray, covered: tuple[int, int], cells: int) -> np.ndarray:
    """A picture's mask at the resolution of the low-resolution masks: a cell is inside where half of it is.

    Args:
        mask: bool [H, W].
        covered: rows and columns of the input that the picture takes up.
        cells: a side of the square result, a quarter of the input's.

    Returns: bool [cells, cells].
    """
    height, width = mask.shape
    rows, columns = (math.ceil(side / 4) for side in covered)
    # What so many whole cells cover of the picture, and a fraction of a cell beyond it.
    bottom, right = 4 * rows * height / covered[0], 4 * columns * width / covered[1]
    canvas = np.zeros((math.ceil(bottom), math.ceil(right)), np.uint8)
    canvas[:height, :width] = mask * np.uint8(255)
    small = Image.fromarray(canvas).resize((columns, rows), Image.Resampling.BOX, box=(0, 0, right, bottom))
    result = np.zeros((cells, cells), bool)
    result[:rows, :columns] = np.asarray(small) >= 128
    return result


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 around the True pixels of bool [H, W], the last ones included whole; (0, 0, 0, 0) where there is none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def uniform_points(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """int [count, 2] pixels of a mask that is not empty, each drawn from all of it; fewer points are the first of more."""
    pixels = np.flatnonzero(mask)
    rows, columns = np.unravel_index(pixels[rng.integers(len(pixels), size=count)], mask.shape)
    return np.stack([columns, rows], axis=1)


def clicks_of(found: Object, mask: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int [count, 2]: the uniform points by which an object is asked for wherever answers are scored.

    A function of (seed, image id, annotation id) alone, so that no other object, nor the order, changes a point.
    """
    rng = np.random.default_rng([seed, found.image_id % 2**64, found.annotation_id % 2**64])
    return uniform_points(mask, count, rng)


def noisy_box(box: np.ndarray, config: PromptConfig, rng: np.random.Generator) -> np.ndarray:
    """Corners [2, 2] of the input with noise on each coordinate, in order."""
    noise = rng.normal(size=(2, 2)) * config.box_noise * (box[1] - box[0])
    return np.sort(box + np.clip(noise, -config.box_noise_limit, config.box_noise_limit), axis=0)
