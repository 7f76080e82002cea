"""From images to embeddings: the join of a source, views and a teacher that extraction, planning and auditing share."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from pipelines.encoding import Encoder, Packed, Pending
from sami_cache.data.images import decode_image, encode_jpeg, jpeg_size
from sami_cache.data.sources import Source
from sami_cache.data.views import VIEW_DRAWS, View, ViewConfig, crop_image, letterbox, random_view
from sami_cache.errors import ImageError
from sami_cache.models.teachers import Teacher
from sami_cache.store.commits import OK, Sample
from sami_cache.store.files import digest

DECODED_AHEAD = 3
"""Batches whose pictures are being read and decoded."""


@dataclass(frozen=True, kw_only=True)
class ViewMode:
    """Which embeddings there are of an image."""

    views: int = 0
    """0: dense, one embedding of the whole image. K > 0: replay, K recorded random views with one embedding each."""
    seed: int = 0
    """Of the random views."""
    config: ViewConfig = field(default_factory=ViewConfig)

    def identity(self) -> dict[str, Any]:
        if not self.views:
            return {"mode": "dense"}
        drawn = {"scale": list(self.config.scale), "ratio": list(self.config.ratio), "flip": self.config.flip}
        return {"mode": "replay", "views": self.views, "seed": self.seed, **drawn}

    def draw(self, key: str, number: int, width: int, height: int) -> View:
        """View `number` of the image `key`: a function of the seed, the key and the number alone."""
        entropy = int.from_bytes(blake3(key.encode()).digest()[:8], "little")
        draws = np.random.default_rng([self.seed, entropy, number]).random(VIEW_DRAWS).tolist()
        return random_view(draws, width, height, self.config)


@dataclass(kw_only=True)
class Embedded:
    """A batch of samples and what the teacher made of them."""

    samples: list[Sample]
    embeddings: np.ndarray
    """float32 [n, C, grid, grid]; zeros where the sample's status is not ok."""
    jpegs: list[bytes | None]


_Made = list[tuple[Sample, bytes | None]]
"""Samples with the JPEGs of their images."""


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """Reads, decodes, cuts and encodes samples of a source. Sample n is view n % views of image n // views."""

    source: Source
    teacher: Teacher
    grid: int
    mode: ViewMode
    precision: str
    device: torch.device
    batch_size: int
    images: dict[str, int] | None
    """`short_side` and `quality` of the JPEGs to make, None for none."""
    workers: int
    compiled: str | None = None
    """A mode of torch.compile for the teacher, None to run it as it is."""
    turn: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """Held while the teacher is at work: who waits for it has the first images decoded when it comes."""

    def identity(self) -> dict[str, Any]:
        """The part of a cache's identity that this decides."""
        teacher = asdict(self.teacher.info) | {"mean": list(self.teacher.info.mean), "std": list(self.teacher.info.std)}
        # The same weights come in files of many names, so the digest stands for them; that they are random is kept.
        if not self.teacher.info.weights.startswith("random"):
            teacher["weights"] = "pretrained"
        return {
            "teacher": teacher,
            "precision": self.precision,
            "grid": self.grid,
            "view": self.mode.identity(),
            "images": self.images,
            "source_kind": self.source.kind,
        }

    def __len__(self) -> int:
        return len(self.source) * max(1, self.mode.views)

    def embed(self, batches: Sequence[Sequence[int]]) -> Iterator[Embedded]:
        """Each batch of sample numbers (at most `batch_size`), in order; the next ones' images are decoded meanwhile.

        On a GPU a batch is handed out while the next ones are computed there, so that what is done with it costs no time.
        What the teacher sees depends on the batch alone, and a batch keeps its shape when an image is missing from it, so
        that computing it again gives the same bits on the same machine.
        """
        launched: deque[tuple[_Made, Pending]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool, ExitStack() as held:
            ahead = deque(self._submit(pool, batch) for batch in batches[:DECODED_AHEAD])
            try:
                held.enter_context(self.turn)
                for position in range(len(batches)):
                    packed, images = ahead.popleft()
                    made = [pair for image in images for pair in image.result()]
                    if position + DECODED_AHEAD < len(batches):
                        ahead.append(self._submit(pool, batches[position + DECODED_AHEAD]))
                    launched.append((made, self.encoder.launch(packed)))
                    if len(launched) > self.encoder.ahead:
                        yield _embedded(*launched.popleft())
                while launched:
                    yield _embedded(*launched.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    @cached_property
    def encoder(self) -> Encoder:
        """The teacher on its device, as it is run here; one, because it may have to be compiled."""
        return Encoder(self.teacher, grid=self.grid, precision=self.precision, device=self.device, compiled=self.compiled)

    def _submit(self, pool: ThreadPoolExecutor, numbers: Sequence[int]) -> tuple[Packed, list[Future[_Made]]]:
        """One task per image, so that the views of an image share its decoding."""
        views = max(1, self.mode.views)
        tasks: dict[int, list[int]] = {}
        for number in numbers:
            tasks.setdefault(number // views, []).append(number % views)
        packed, images, place = self.encoder.empty(self.batch_size), [], 0
        for image, which in tasks.items():
            images.append(pool.submit(self._prepare, image, which, packed, place))
            place += len(which)
        return packed, images

    def _prepare(self, image: int, views: list[int], packed: Packed, place: int) -> _Made:
        """Read an image and pack its views' pixels from `place` on."""
        key, label = self.source.keys[image], self.source.labels[image]
        source_digest = None
        try:
            data = self.source.read(image)
            source_digest = digest(data)
            picture = decode_image(data)
            jpeg = encode_jpeg(picture, **self.images) if self.images else None
        except ImageError as error:
            return [(Sample(key=key, label=label, source=source_digest, status=str(error)), None) for _ in views]
        size, interpolation = self.teacher.info.image_size, self.teacher.info.interpolation
        common: dict[str, Any] = {
            "key": key,
            "label": label,
            "source": source_digest,
            "width": picture.width,
            "height": picture.height,
        }
        if not self.mode.views:
            packed.put(place, letterbox(picture, size, interpolation=interpolation))
            return [(Sample(**common), jpeg)]
        samples = []
        for position, number in enumerate(views, place):
            # Drawn at the size at which students get to see the image, so that its box ends between pixels there.
            size_seen = jpeg_size(*picture.size, self.images["short_side"]) if self.images else picture.size
            view = self.mode.draw(key, number, *size_seen)
            packed.put(position, crop_image(picture, view, size, interpolation=interpolation))
            samples.append((Sample(**common, view=[*view.box, int(view.flip)]), jpeg))
        return samples


def _embedded(made: _Made, pending: Pending) -> Embedded:
    embeddings = pending.wait()[: len(made)]
    embeddings[[sample.status != OK for sample, _ in made]] = 0
    return Embedded(samples=[sample for sample, _ in made], embeddings=embeddings, jpegs=[jpeg for _, jpeg in made])
