"""Semantic segmentation, trained as Mask2Former (arXiv 2112.01527) and measured by mean IoU."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from sami_cache.data.semantic import IGNORED, SegmentedPictures
from sami_cache.errors import SamiCacheError
from sami_cache.models.semantic import to_classes
from sami_cache.processes import rank_and_world, totals
from sami_cache.steps import PictureSteps, prepared
from sami_cache.tasks.detection import normalised


@dataclass(frozen=True, kw_only=True)
class SemanticAugmentation:
    """Mask2Former's for ADE20K: scale, crop that no class fills, flip, colours."""

    smallest: float = 0.5
    largest: float = 2.0
    """Of the input's side: what the shorter side of the picture becomes."""
    fullest: float = 0.75
    """Share of a crop that one class may take; ten crops are tried."""
    flip: bool = True
    colours: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest or not 0 < self.fullest <= 1:
            raise SamiCacheError(
                f"scales {self.smallest} to {self.largest}, fullest {self.fullest}: expected 0 < small <= large"
            )


class Example(NamedTuple):
    """One picture to learn."""

    pixels: Tensor  # float32 [3, S, S], normalised
    labels: Tensor  # uint8 [S, S], 255 ignored
    seed: int  # of the points that its loss draws


def examples(
    pictures: SegmentedPictures,
    place: dict[int, int],
    ignored: frozenset[int],
    size: int,
    augmentation: SemanticAugmentation,
    seed: int,
) -> Callable[[int, int], Example]:
    """(epoch, number of the picture) -> `Example`, for threads."""
    jitter = v2.ColorJitter(32 / 255, (0.5, 1.5), (0.5, 1.5), 18 / 360)

    def make(epoch: int, number: int) -> Example:
        rng = np.random.default_rng((seed, epoch, number))
        image = pictures.read_image(number)
        labels = pictures.labels(number, place, ignored, (image.shape[0], image.shape[1]))
        scale = size * rng.uniform(augmentation.smallest, augmentation.largest) / min(labels.shape)
        rows, columns = (max(1, round(side * scale)) for side in labels.shape)
        picture = np.array(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
        classes = np.array(Image.fromarray(labels).resize((columns, rows), Image.Resampling.NEAREST))
        top, left = choose_crop(classes, size, augmentation.fullest, rng)
        picture, classes = (values[top : top + size, left : left + size] for values in (picture, classes))
        if augmentation.flip and rng.integers(2):
            picture, classes = picture[:, ::-1], classes[:, ::-1]
        if augmentation.colours:
            picture = coloured(picture, jitter, rng)
        canvas, known = np.zeros((size, size, 3), np.uint8), np.full((size, size), IGNORED, np.uint8)
        canvas[: picture.shape[0], : picture.shape[1]] = picture
        known[: classes.shape[0], : classes.shape[1]] = classes
        return Example(normalised(canvas), torch.from_numpy(known), int(rng.integers(2**62)))

    return make


def choose_crop(labels: np.ndarray, size: int, fullest: float, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a crop of at most `size` in which no class takes more than `fullest` of what is known; or the tenth."""
    top = left = 0
    for _ in range(10):
        top, left = (int(rng.integers(max(0, side - size) + 1)) for side in labels.shape)
        counts = np.bincount(labels[top : top + size, left : left + size].ravel(), minlength=256)[:IGNORED]
        if counts.sum() and (np.count_nonzero(counts) > 1 and counts.max() < fullest * counts.sum()):
            break
    return top, left


def coloured(image: np.ndarray, jitter: v2.ColorJitter, rng: np.random.Generator) -> np.ndarray:
    """torchvision's colour jitter with what it draws from `rng`: torch's generator belongs to all threads."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    functions = v2.functional
    changes: list[tuple[Any, tuple[float, float]]] = [
        (functions.adjust_brightness, jitter.brightness),  # type: ignore[list-item]
        (functions.adjust_contrast, jitter.contrast),  # type: ignore[list-item]
        (functions.adjust_saturation, jitter.saturation),  # type: ignore[list-item]
        (functions.adjust_hue, jitter.hue),  # type: ignore[list-item]
    ]
    for number in rng.permutation(len(changes)):
        change, (low, high) = changes[number]
        if rng.integers(2):
            pixels = change(pixels, rng.uniform(low, high))
    return pixels.permute(1, 2, 0).numpy()


class SemanticTask:
    """Implements `training.Task`."""

    def __init__(
        self,
        model: nn.Module,
        steps: PictureSteps[Example] | None,
        *,
        held_out: SegmentedPictures | None = None,
        place: dict[int, int],
        ignored: frozenset[int],
        device: torch.device,
        threads: int | None = None,
    ) -> None:
        """`place`: class by the number in the masks. `held_out`: what is evaluated on. `steps`: None without training."""
        self.model, self.steps, self.held_out, self.device = model, steps, held_out, device
        self.place, self.ignored, self.threads = place, ignored, threads
        self.steps_per_epoch: float | None = steps.steps_per_epoch if steps else None

    def batches(self, start_step: int) -> Iterator[list[Example]]:
        assert self.steps is not None
        with closing(self.steps.batches(start_step)) as batches:
            yield from batches

    def loss(self, model: nn.Module, batch: list[Example], device: torch.device) -> dict[str, Tensor]:
        pixels = torch.stack([one.pixels for one in batch]).to(device)
        return model(pixels, [one.labels.to(device) for one in batch], [one.seed for one in batch])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`heldout_miou`, `heldout_accuracy` (of pixels) and `heldout_class_accuracy` (mean over classes), 0..1."""
        if self.held_out is None:
            return {}
        classes = len(self.place)
        confusion = np.zeros((classes, classes), np.int64)
        for number, predicted in self.predict(model, self.held_out):
            size = predicted.shape[0], predicted.shape[1]
            truth = self.held_out.labels(number, self.place, self.ignored, size)
            confusion += confusion_matrix(truth, predicted, classes)
        flat = {str(cell): float(count) for cell, count in enumerate(confusion.ravel())}
        summed = totals(flat, self.device)
        return scores(np.array([summed[name] for name in flat]).reshape(classes, classes))

    def predict(self, model: nn.Module, pictures: SegmentedPictures) -> Iterator[tuple[int, np.ndarray]]:
        """This process's pictures: (number, uint8 [H, W] of classes). A whole picture at once, its longest side the input's."""
        rank, world = rank_and_world()
        size = int(model.image_size)  # type: ignore[arg-type]

        def read(number: int) -> tuple[int, Tensor, tuple[int, int], tuple[int, int]]:
            image = pictures.read_image(number)
            scale = size / max(image.shape[:2])
            rows, columns = (max(1, round(side * scale)) for side in image.shape[:2])
            canvas = np.zeros((size, size, 3), np.uint8)
            canvas[:rows, :columns] = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
            return number, normalised(canvas), (rows, columns), (image.shape[0], image.shape[1])

        jobs = ((number,) for number in range(rank, len(pictures), world))
        for number, pixels, shown, shape in prepared(read, jobs, threads=self.threads):
            found = model(pixels[None].to(self.device))
            yield number, to_classes(found, shown, *shape).cpu().numpy()


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes, classes], pixels by true class (rows) and predicted class; ignored ones do not count."""
    known = truth != IGNORED
    cells = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def scores(confusion: np.ndarray) -> dict[str, float]:
    """Of a confusion matrix. Means are over the classes that occur in the truth or, for the IoU, in the prediction."""
    right, true, found = np.diag(confusion).astype(float), confusion.sum(1), confusion.sum(0)
    union = true + found - right
    return {
        "heldout_miou": float((right[union > 0] / union[union > 0]).mean()) if (union > 0).any() else 0.0,
        "heldout_accuracy": float(right.sum() / max(1, confusion.sum())),
        "heldout_class_accuracy": float((right[true > 0] / true[true > 0]).mean()) if (true > 0).any() else 0.0,
    }
