"""Semantic segmentation, trained as Mask2Former (arXiv 2112.01527) and measured by mean IoU."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2.functional as change
from PIL import Image
from torch import Tensor, nn

from sami_cache.data.class_masks import IGNORED, ClassLabels, MaskedPictures, resize_labels
from sami_cache.errors import SamiCacheError
from sami_cache.models.semantic import LOSSES, Mask2Former, class_scores
from sami_cache.processes import rank_and_world
from sami_cache.steps import PictureSteps, prepared

Viewing = Literal["whole", "sliding"]
RGB = tuple[float, float, float]
_TRIES = 10
_LONGEST = 4
"""Of the sides of a picture that is shown whole, in short sides: Mask2Former's 2048 for 512."""
_SCORES_AT_ONCE = 1 << 26
# Of Mask2Former's colour changes (SSD's), in torchvision's units: a brightness of 32 in 255, a hue of 18 in OpenCV's 180.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32 / 255, 0.5, 0.5, 0.1


@dataclass(frozen=True, kw_only=True)
class SemanticAugment:
    """How pictures are changed for training; the defaults are Mask2Former's for ADE20K."""

    smallest: float = 0.5
    largest: float = 2.0
    """Scale of a picture, drawn uniformly; at 1 its short side is the input's."""
    category_ratio: float = 0.75
    """Of ten parts drawn, the first is taken in which no class covers so much of what is labelled; else the tenth."""
    flip: bool = True
    colour: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest:
            raise SamiCacheError(f"scales from {self.smallest} to {self.largest}: expected 0 < smallest <= largest")
        if not 0 < self.category_ratio <= 1:
            raise SamiCacheError(f"category ratio {self.category_ratio}: expected above 0, up to 1, which takes any part")


class Example(NamedTuple):
    """One picture to learn."""

    pixels: Tensor  # float32 [3, S, S], normalised; 0 where the picture does not reach
    labels: Tensor  # int32 [S, S], IGNORED there and where there is no class
    seed: int  # of the points where its losses are taken


class Normalise:
    """uint8 [H, W, 3] -> float32 [3, H, W], less the mean and over the deviation, of R, G, B in 0..1."""

    def __init__(self, mean: RGB, std: RGB) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: np.ndarray) -> Tensor:
        return (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - self.mean) / self.std


def examples(
    pictures: MaskedPictures, classes: ClassLabels, size: int, augment: SemanticAugment, normalise: Normalise, seed: int
) -> Callable[[int, int], Example]:
    """(epoch, number of the picture) -> `Example` of `size` pixels a side, for threads."""

    def make(epoch: int, number: int) -> Example:
        rng = np.random.default_rng((seed, epoch, number))
        image, indices = pictures.read(number)
        labels = classes.encode(indices, pictures.mask_name(number))
        image, labels = random_part(image, labels, size, augment, rng)
        if augment.colour:
            image = change_colours(image, rng)
        below, beside = size - labels.shape[0], size - labels.shape[1]
        return Example(
            F.pad(normalise(image), (0, beside, 0, below)),
            F.pad(torch.from_numpy(labels), (0, beside, 0, below), value=IGNORED),
            int(rng.integers(2**62)),
        )

    return make


def random_part(
    image: np.ndarray, labels: np.ndarray, size: int, augment: SemanticAugment, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A part of a picture uint8 [H, W, 3] and its labels int32 [H, W], scaled; `size` pixels a side, or what there is."""
    height, width = labels.shape
    scale = size / min(height, width) * rng.uniform(augment.smallest, augment.largest)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    shown = min(size, columns), min(size, rows)
    box, part = (0.0, 0.0, 0.0, 0.0), labels
    for _ in range(_TRIES):
        top, left = (int(rng.integers(side - own + 1)) for side, own in ((rows, shown[1]), (columns, shown[0])))
        x, y = width / columns, height / rows
        # Only the part that is shown is made, from its place in the picture.
        box = (left * x, top * y, min(width, (left + shown[0]) * x), min(height, (top + shown[1]) * y))
        part = resize_labels(labels, shown, box)
        if augment.category_ratio == 1:
            break
        counts = np.unique(part[part != IGNORED], return_counts=True)[1]
        if len(counts) > 1 and counts.max() < augment.category_ratio * counts.sum():
            break
    cut = np.array(Image.fromarray(image).resize(shown, Image.Resampling.BILINEAR, box=box))
    if augment.flip and rng.integers(2):
        cut, part = cut[:, ::-1], part[:, ::-1]
    return np.ascontiguousarray(cut), np.ascontiguousarray(part)


def change_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] -> the same: brightness, contrast, saturation and hue, each changed every other time."""
    changed, factors, late = rng.random(4) < 0.5, rng.uniform(-1, 1, 4), rng.random() < 0.5
    strengths = (_BRIGHTNESS, _CONTRAST, _SATURATION)
    names = ("brightness", "contrast", "saturation", "hue")
    amounts = dict(zip(names, [*(1 + s * f for s, f in zip(strengths, factors, strict=False)), _HUE * factors[3]], strict=True))
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    for name in ("brightness", "saturation", "hue", "contrast") if late else names:
        if changed[names.index(name)]:
            pixels = getattr(change, f"adjust_{name}")(pixels, float(amounts[name]))
    return pixels.permute(1, 2, 0).contiguous().numpy()


def fitted(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] with a short side of `size`, its long side at most four times that."""
    height, width = image.shape[:2]
    scale = min(size / min(height, width), _LONGEST * size / max(height, width))
    columns, rows = max(1, round(width * scale)), max(1, round(height * scale))
    return np.array(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))


def score(model: nn.Module, pixels: Tensor, size: int, viewing: Viewing) -> Tensor:
    """Scores [C, H, W] of the classes for a normalised picture [3, H, W].

    whole: the picture as it is, filled up with zeros to multiples of 32. sliding: windows of `size`, two thirds of that apart;
    scores are averaged where they meet.
    """
    height, width = pixels.shape[1:]
    if viewing == "whole":
        padded = F.pad(pixels, (0, -width % 32, 0, -height % 32))
        classes, masks = model(padded[None])
        return class_scores(classes, masks, (padded.shape[1], padded.shape[2]))[0, :, :height, :width]
    padded = F.pad(pixels, (0, max(0, size - width), 0, max(0, size - height)))
    total, seen = torch.zeros(()), torch.zeros(padded.shape[1:], device=pixels.device)
    for top in _starts(padded.shape[1], size):
        for left in _starts(padded.shape[2], size):
            rows, columns = slice(top, top + size), slice(left, left + size)
            classes, masks = model(padded[None, :, rows, columns])
            found = class_scores(classes, masks, (size, size))[0]
            if not total.ndim:
                total = found.new_zeros(len(found), *padded.shape[1:])
            total[:, rows, columns] += found
            seen[rows, columns] += 1
    return (total / seen)[:, :height, :width]


def _starts(side: int, size: int) -> list[int]:
    """Of windows of `size` that cover `side`, the last at its end."""
    return [*range(0, side - size, max(1, size * 2 // 3)), side - size]


def best_labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The label of the highest score, int64 [H, W] at `size`, of scores [C, h, w], interpolated."""
    best = torch.full(size, -torch.inf, device=scores.device)
    labels = torch.zeros(size, dtype=torch.int64, device=scores.device)
    # In parts: 150 classes of a large photograph take gigabytes.
    at_once = max(1, _SCORES_AT_ONCE // (size[0] * size[1]))
    for first, some in zip(range(0, len(scores), at_once), scores.split(at_once), strict=True):
        highest, where = F.interpolate(some[None], size, mode="bilinear", align_corners=False)[0].max(0)
        better = highest > best
        best, labels = torch.where(better, highest, best), torch.where(better, where + first, labels)
    return labels


def count_pairs(true: Tensor, found: Tensor, classes: int) -> Tensor:
    """Confusion matrix int64 [C, C], true labels by found ones, of labels of one shape; IGNORED true ones are left out."""
    known = true != IGNORED
    return torch.bincount(true[known].long() * classes + found[known], minlength=classes**2).view(classes, classes)


def figures(confusion: Tensor) -> dict[str, float]:
    """`miou`, `mean_accuracy` and `pixel_accuracy`, 0..1, of a confusion matrix; means over the classes that truly occur."""
    pairs = confusion.double()
    right, true, found = pairs.diagonal(), pairs.sum(1), pairs.sum(0)
    occurs = true > 0
    iou = (right / (true + found - right).clamp(min=1))[occurs]
    return {
        "miou": float(iou.mean()) if len(iou) else 0.0,
        "mean_accuracy": float((right / true.clamp(min=1))[occurs].mean()) if len(iou) else 0.0,
        "pixel_accuracy": float(right.sum() / true.sum().clamp(min=1)),
    }


class SemanticTask:
    """Implements `training.Task`."""

    def __init__(
        self,
        model: Mask2Former,
        steps: PictureSteps[Example] | None,
        classes: ClassLabels,
        *,
        size: int,
        normalise: Normalise,
        held_out: MaskedPictures | None = None,
        viewing: Viewing = "whole",
        device: torch.device,
        threads: int | None = None,
    ) -> None:
        """`held_out`: what is evaluated on, its short sides brought to `size`. `steps`: None without training."""
        if viewing not in ("whole", "sliding"):
            raise SamiCacheError(f"--viewing {viewing}: expected whole or sliding")
        self.model: nn.Module = model
        self.viewing: Viewing = viewing
        self.steps, self.classes, self.size, self.normalise = steps, classes, size, normalise
        self.held_out, self.device, self.threads = held_out, device, threads
        self.steps_per_epoch: float | None = steps.steps_per_epoch if steps else None

    def batches(self, start_step: int) -> Iterator[list[Example]]:
        assert self.steps is not None
        with closing(self.steps.batches(start_step)) as batches:
            yield from batches

    def loss(self, model: nn.Module, batch: list[Example], device: torch.device) -> dict[str, Tensor]:
        pixels, labels = (torch.stack(values).to(device) for values in list(zip(*batch, strict=True))[:2])
        losses = model(pixels, labels, [one.seed for one in batch])
        return {"loss": losses["loss"], **{name: losses[name].detach() for name in LOSSES}}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`heldout_miou`, `heldout_mean_accuracy` and `heldout_pixel_accuracy`; empty without held-out data."""
        if self.held_out is None:
            return {}
        return {f"heldout_{name}": value for name, value in figures(self.confusion(model, self.held_out)).items()}

    def confusion(
        self, model: nn.Module, pictures: MaskedPictures, keep: Callable[[int, np.ndarray], Any] = lambda number, labels: None
    ) -> Tensor:
        """Confusion matrix over all pixels of the pictures at their own size, of all processes, int64 [C, C].

        `keep` is called with each picture's number and what was found in it, labels [H, W], in the process that looked at it.
        """
        rank, world = rank_and_world()
        pairs = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64, device=self.device)

        def read(number: int) -> tuple[int, Tensor, Tensor]:
            image, indices = pictures.read(number)
            true = self.classes.encode(indices, pictures.mask_name(number))
            return number, self.normalise(fitted(image, self.size)), torch.from_numpy(true)

        jobs = ((number,) for number in range(rank, len(pictures), world))
        for number, pixels, true in prepared(read, jobs, threads=self.threads):
            scores = score(model, pixels.to(self.device), self.size, self.viewing)
            found = best_labels(scores, (true.shape[0], true.shape[1]))
            pairs += count_pairs(true.to(self.device), found, len(self.classes))
            keep(number, found.cpu().numpy())
        if world > 1:
            dist.all_reduce(pairs)
        return pairs
