"""Object detection and instance segmentation, trained as ViTDet (arXiv 2203.16527) and measured as COCO does."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from sami_cache.data.annotations import Annotations, Object
from sami_cache.errors import SamiCacheError
from sami_cache.inference.average_precision import Truth, average_precision
from sami_cache.inference.rle import encode_mask
from sami_cache.models.detector import LOSSES, Detections, Detector, Targets
from sami_cache.processes import rank_and_world
from sami_cache.prompts import tight_box
from sami_cache.steps import PictureSteps, prepared
from sami_cache.tasks.sami import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class JitterConfig:
    """Large-scale jitter (arXiv 2012.07177): the picture at a random scale, a part of it or all with grey around it."""

    smallest: float = 0.1
    largest: float = 2.0
    """Of the input's side: what the picture is fitted into."""
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest:
            raise SamiCacheError(f"jitter from {self.smallest} to {self.largest}: expected 0 < smallest <= largest")


class Example(NamedTuple):
    """One picture to learn."""

    pixels: Tensor  # float32 [3, S, S], normalised
    targets: Targets
    seed: int  # of what its losses sample


def examples(
    annotations: Annotations, classes: dict[int, int], size: int, jitter: JitterConfig | None, seed: int
) -> Callable[[int, int], Example]:
    """(epoch, number of the picture) -> `Example`, for threads. Crowds are left out; there may be no object at all.

    `classes`: label from 1 by category. `jitter=None`: the whole picture, its longest side `size`.
    """

    def make(epoch: int, number: int) -> Example:
        rng = np.random.default_rng((seed, epoch, number))
        image = annotations.read_image(number)
        place = choose_place(image.shape[0], image.shape[1], size, jitter, rng)
        boxes, labels, masks = [], [], []
        for found in annotations.objects(number):
            if found.crowd:
                continue
            mask = place(found.mask().astype(np.uint8), Image.Resampling.NEAREST)
            if mask.any():
                boxes.append(tight_box(mask > 0))
                labels.append(classes[category_of(found)])
                masks.append(mask)
        targets = Targets(
            torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(np.stack(masks) if masks else np.zeros((0, size, size), np.uint8)),
        )
        return Example(normalised(place(image, Image.Resampling.BILINEAR)), targets, int(rng.integers(2**62)))

    return make


def category_of(found: Object) -> int:
    """Raises SamiCacheError where the object has none."""
    if found.category is None:
        raise SamiCacheError(f"{found.where}: no category_id, which a detector learns")
    return found.category


def choose_place(
    height: int, width: int, size: int, jitter: JitterConfig | None, rng: np.random.Generator
) -> Callable[[np.ndarray, Image.Resampling], np.ndarray]:
    """What brings a picture uint8 [H, W, ...] and its masks alike to [size, size, ...]: scaled, then cut or filled up.

    With jitter the part is any that fits, and zeros are below and to the right of what is smaller; without, all of it is there.
    """
    scale = size / max(height, width)
    if jitter is not None:
        scale *= rng.uniform(jitter.smallest, jitter.largest)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (int(rng.integers(max(0, side - size) + 1)) if jitter else 0 for side in (rows, columns))
    mirrored = jitter is not None and jitter.flip and bool(rng.integers(2))
    shown = min(size, rows), min(size, columns)
    # Only the part that is shown is made, from its place in the picture.
    source = (
        left * width / columns,
        top * height / rows,
        (left + shown[1]) * width / columns,
        (top + shown[0]) * height / rows,
    )

    def place(values: np.ndarray, filter: Image.Resampling) -> np.ndarray:
        part = np.asarray(Image.fromarray(values).resize((shown[1], shown[0]), filter, box=source))
        result = np.zeros((size, size, *values.shape[2:]), np.uint8)
        result[: shown[0], : shown[1]] = part[:, ::-1] if mirrored else part
        return result

    return place


def normalised(image: np.ndarray) -> Tensor:
    """uint8 [S, S, 3] -> float32 [3, S, S], less ImageNet's mean and over its deviation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - mean) / std


def to_results(
    found: Detections, image_id: int, size: tuple[int, int], side: int, categories: list[int]
) -> list[dict[str, Any]]:
    """Detections of a picture of `size` (height, width), shown at `side` pixels, as COCO's results with boxes and masks.

    `categories`: by label less 1. Boxes are cut to the picture.
    """
    height, width = size
    scale = side / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    boxes = found.boxes.float().cpu() * torch.tensor([width / columns, height / rows] * 2)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2, dtype=torch.float32))
    masks, results = found.masks.float().cpu(), []
    for number, box in enumerate(boxes):
        # One at a time: a hundred masks of a large picture do not fit.
        mask = paste_masks_in_image(masks[number : number + 1], box[None], (height, width))[0, 0] > 0.5
        x0, y0, x1, y1 = box.tolist()
        results.append(
            {
                "image_id": image_id,
                "category_id": categories[int(found.labels[number]) - 1],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(found.scores[number]),
                "segmentation": encode_mask(mask.numpy()),
            }
        )
    return results


class DetectionTask:
    """Implements `training.Task`."""

    def __init__(
        self,
        model: Detector,
        steps: PictureSteps[Example] | None,
        *,
        truth: Truth | None = None,
        held_out: Annotations | None = None,
        categories: list[int],
        device: torch.device,
        threads: int | None = None,
    ) -> None:
        """`held_out` with its `truth`: what is evaluated on. `categories`: by label less 1. `steps`: None without training."""
        self.model: nn.Module = model
        self.steps, self.truth, self.held_out, self.categories, self.device = steps, truth, held_out, categories, device
        self.threads = threads
        self.steps_per_epoch: float | None = steps.steps_per_epoch if steps else None

    def batches(self, start_step: int) -> Iterator[list[Example]]:
        assert self.steps is not None
        with closing(self.steps.batches(start_step)) as batches:
            yield from batches

    def loss(self, model: nn.Module, batch: list[Example], device: torch.device) -> dict[str, Tensor]:
        pixels = torch.stack([one.pixels for one in batch]).to(device)
        targets = [Targets(*(value.to(device) for value in one.targets)) for one in batch]
        losses = model(pixels, targets, [one.seed for one in batch])
        return {
            "loss": torch.stack([losses[name] for name in LOSSES]).sum(),
            **{name: losses[name].detach() for name in LOSSES},
        }

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`heldout_box_AP`, `heldout_mask_AP`, and both at IoU 0.5 and by size, as COCO's; empty without held-out data."""
        if self.truth is None or self.held_out is None:
            return {}
        return scores(self.truth, self.detect(model, self.held_out), range(len(self.held_out)))

    def detect(self, model: nn.Module, annotations: Annotations) -> list[dict[str, Any]]:
        """COCO's results for all pictures, those of every process in all of them."""
        assert self.truth is not None
        rank, world = rank_and_world()
        size, own = int(model.image_size), []  # type: ignore[arg-type]

        def read(number: int) -> tuple[int, Tensor, tuple[int, int]]:
            image = annotations.read_image(number)
            place = choose_place(image.shape[0], image.shape[1], size, None, np.random.default_rng(0))
            return number, normalised(place(image, Image.Resampling.BILINEAR)), (image.shape[0], image.shape[1])

        jobs = ((number,) for number in range(rank, len(annotations), world))
        for number, pixels, shape in prepared(read, jobs, threads=self.threads):
            (found,) = model(pixels[None].to(self.device))
            own += to_results(found, self.truth.images[number]["id"], shape, size, self.categories)
        if world == 1:
            return own
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, own)
        return [one for part in gathered for one in part]


def scores(truth: Truth, results: list[dict[str, Any]], numbers: range) -> dict[str, float]:
    """COCO's AP of boxes and masks, 0..1, by name. No detection at all: 0."""
    dataset, found = truth.dataset(numbers), {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        values = average_precision(dataset, results, style="coco", kind=kind) if results else {}  # type: ignore[arg-type]
        for metric in ("AP", "AP50", "APs", "APm", "APl"):
            found[f"heldout_{name}_{metric}"] = values.get(metric, 0.0)
    return found
