"""An image encoder taught to answer like SAM's, from a cache of SAM's embeddings.

The decoupled distillation of MobileSAM (arXiv 2306.14289): SAM's own decoder then works with the student at once. The
teacher's embeddings lie in the cache as extraction resampled them: the picture's part of the 64 x 64 map, to the cache's grid.
The student's map goes the same way before the two are compared, so that what the cache has is matched, and nothing else: a
map's padding, which no cache holds, is left to the student.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sami_cache.data.images import decode_image, decode_jpeg
from sami_cache.data.source import Source
from sami_cache.data.views import valid_region
from sami_cache.errors import IdentityError, ImageError, SamiCacheError
from sami_cache.models.segment_anything import WIDTH, SegmentAnything
from sami_cache.processes import totals
from sami_cache.samples import CacheSamples
from sami_cache.steps import PictureSteps, prepared
from sami_cache.store.cache import Cache
from sami_cache.store.files import digest

SAM_TEACHERS = ("vit_h", "vit_l", "vit_b")


class Taught(NamedTuple):
    """One picture with its embedding, or with a leading [B] several."""

    pixels: Tensor  # float32 [3, S, S]
    covered: Tensor  # float32 [2], rows and columns of the student's map that the picture takes up, in cells
    target: Tensor  # float32 [256, g, g], g: the cache's grid


class EncoderOf(SegmentAnything):
    """The same model under the same names, with the image encoder as its `forward`, where wrappers look for it."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised [B, 3, S, S] -> [B, 256, S / 16, S / 16]."""
        return self.encode(pixels)


class NeckSamples:
    """A cache's pictures and SAM embeddings. Thread-safe."""

    def __init__(self, cache: Cache, originals: Source | None, model: SegmentAnything) -> None:
        """`originals`: the images that the cache was made from; without them its own JPEGs, short side 256, are enlarged."""
        check_neck(cache)
        if originals is None and not cache.has_images:
            raise SamiCacheError(f"{cache.path} holds no images: give those it was made from with --data DIR")
        self.cache, self.originals, self.model = cache, originals, model
        self.samples = CacheSamples(cache, originals)
        self._where = {key: index for index, key in enumerate(originals.keys)} if originals else {}
        self._sources = cache.table(["source"])["source"].to_pylist() if originals else []

    def make(self, chosen: np.ndarray) -> Callable[[int, int], Taught]:
        """(epoch, place among `chosen`, numbers of samples) -> `Taught`; every epoch is alike, since nothing is augmented."""

        def taught(epoch: int, place: int) -> Taught:
            number = int(chosen[place])
            image = self._picture(number)
            rows, columns = self.model.covered(*image.shape[:2])
            return Taught(
                pixels=self.model.preprocess(image),
                covered=torch.tensor([rows / 16, columns / 16]),
                target=torch.from_numpy(self.cache.read_embedding(number)),
            )

        return taught

    def _picture(self, number: int) -> np.ndarray:
        key = self.samples.keys[number]
        if self.originals is None:
            shard, place = divmod(number, self.samples.shard_samples)
            (data,) = self.cache.read_jpegs(shard, [place])
            return decode_jpeg(data or b"")
        if key not in self._where:
            raise IdentityError(
                f"{self.originals.location}: image {key!r} of the cache is not there. Give what it was made from"
            )
        data = self.originals.read(self._where[key])
        if digest(data) != self._sources[number]:
            raise IdentityError(f"{self.originals.location}: image {key!r} is not the one the cache was made from")
        try:
            return np.array(decode_image(data))
        except ImageError as error:
            raise ImageError(f"{self.originals.location}: image {key!r}: {error}") from error


def check_neck(cache: Cache) -> None:
    """Raise SamiCacheError unless the cache holds SAM's embeddings of whole pictures."""
    teacher, view = cache.identity["teacher"], cache.identity["view"]
    found = f"{teacher.get('name')}, layer {teacher.get('layer')}, {teacher.get('channels')} channels, {view.get('mode')}"
    is_neck = teacher.get("name") in SAM_TEACHERS and teacher.get("layer") == "neck" and teacher.get("channels") == WIDTH
    if is_neck and not cache.views:
        return
    raise SamiCacheError(
        f"{cache.path} holds other features than SAM's decoder reads: expected a teacher {', '.join(SAM_TEACHERS)}, layer "
        f"neck, {WIDTH} channels, whole pictures (dense); found {found}. Extract one (sami-cache extract --teacher vit_h "
        "--grid 64), or fine-tune from annotations: --data, without --from-cache"
    )


class NeckTask:
    """Implements `training.Task`."""

    def __init__(
        self,
        model: EncoderOf,
        samples: NeckSamples,
        steps: PictureSteps[Taught],
        *,
        held_out: np.ndarray,
        device: torch.device,
    ) -> None:
        """`held_out`: numbers of the samples to evaluate on, this process's share. Only the encoder is trained."""
        self.model: nn.Module = model
        self.steps, self.held_out, self.device = steps, held_out, device
        self.steps_per_epoch: float | None = steps.steps_per_epoch
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("image_encoder."))
        codec = samples.cache.codec
        self._variance, self._held = codec.variance, samples.make(held_out)
        self._mean = torch.from_numpy(codec.mean.copy()).to(device)[:, None, None]

    def batches(self, start_step: int) -> Iterator[Taught]:
        with closing(self.steps.batches(start_step)) as pictures:
            for some in pictures:
                yield _collate(some)

    def loss(self, model: nn.Module, batch: Taught, device: torch.device) -> dict[str, Tensor]:
        """The mean squared error, 1 for a student that knows the teacher's mean and nothing else."""
        prediction, target = self._matched(model, batch)
        return {"loss": F.mse_loss(prediction, target) / self._variance}

    def _matched(self, model: nn.Module, batch: Taught) -> tuple[Tensor, Tensor]:
        pixels, covered, target = (value.to(self.device) for value in batch)
        embeddings = model(pixels)
        with torch.autocast(self.device.type, enabled=False):
            return valid_region(embeddings.float(), covered, target.shape[-1]), target

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`heldout_loss`, and `heldout_cosine`: the mean over cells of the cosine, both less the teacher's mean."""
        sums = {"loss": 0.0, "cosine": 0.0, "pictures": 0.0}
        places = ((0, place) for place in range(len(self.held_out)))
        for taught in prepared(self._held, places, threads=self.steps.threads, timeout=self.steps.timeout):
            prediction, target = self._matched(model, _collate([taught]))
            sums["loss"] += float(F.mse_loss(prediction, target)) / self._variance
            sums["cosine"] += float(F.cosine_similarity(prediction - self._mean, target - self._mean, dim=1).mean())
            sums["pictures"] += 1
        total = totals(sums, self.device)
        count = total.pop("pictures")
        return {f"heldout_{name}": value / count for name, value in total.items()} if count else {}


def _collate(pictures: list[Taught]) -> Taught:
    return Taught(*(torch.stack(values) for values in zip(*pictures, strict=True)))
