"""From images to embeddings: the join of a source, views and a teacher that extraction, planning and auditing share."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from sami_cache.data.images import decode_image, encode_jpeg, jpeg_size
from sami_cache.data.sources import Source
from sami_cache.data.views import VIEW_DRAWS, View, ViewConfig, crop_image, letterbox, random_view, valid_region
from sami_cache.errors import ImageError
from sami_cache.models.teachers import Teacher
from sami_cache.store.commits import Sample
from sami_cache.store.files import digest

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    seconds: float
    """Spent in the teacher."""


@dataclass(kw_only=True)
class _Prepared:
    sample: Sample
    pixels: np.ndarray | None = None  # uint8 [h, w, 3], the teacher's input before padding
    jpeg: bytes | None = None


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

        What the teacher sees depends on the batch alone, and a batch keeps its shape when an image is missing from it, so
        that computing it again gives the same bits on the same machine.
        """
        self.teacher.to(self.device)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool, ExitStack() as held:
            ahead = deque(self._submit(pool, batch) for batch in batches[:3])
            try:
                held.enter_context(self.turn)
                for position in range(len(batches)):
                    prepared = [item for future in ahead.popleft() for item in future.result()]
                    if position + 3 < len(batches):
                        ahead.append(self._submit(pool, batches[position + 3]))
                    start = time.perf_counter()
                    embeddings = self._encode(prepared)
                    yield Embedded(
                        samples=[item.sample for item in prepared],
                        embeddings=embeddings,
                        jpegs=[item.jpeg for item in prepared],
                        seconds=time.perf_counter() - start,
                    )
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, numbers: Sequence[int]) -> list[Future[list[_Prepared]]]:
        """One task per image, so that the views of an image share its decoding."""
        views = max(1, self.mode.views)
        tasks: dict[int, list[int]] = {}
        for number in numbers:
            tasks.setdefault(number // views, []).append(number % views)
        return [pool.submit(self._prepare, image, which) for image, which in tasks.items()]

    def _prepare(self, image: int, views: list[int]) -> list[_Prepared]:
        key, label = self.source.keys[image], self.source.labels[image]
        source_digest = None
        try:
            data = self.source.read(image)
            source_digest = digest(data)
            picture = decode_image(data)
            jpeg = encode_jpeg(picture, **self.images) if self.images else None
        except ImageError as error:
            return [_Prepared(sample=Sample(key=key, label=label, source=source_digest, status=str(error))) for _ in views]
        size, interpolation = self.teacher.info.image_size, self.teacher.info.interpolation
        common: dict[str, Any] = {
            "key": key,
            "label": label,
            "source": source_digest,
            "width": picture.width,
            "height": picture.height,
        }
        if not self.mode.views:
            pixels = letterbox(picture, size, interpolation=interpolation)
            return [_Prepared(sample=Sample(**common), pixels=pixels, jpeg=jpeg)]
        prepared = []
        for number in views:
            # Drawn at the size at which students get to see the image, so that its box ends between pixels there.
            size_seen = jpeg_size(*picture.size, self.images["short_side"]) if self.images else picture.size
            view = self.mode.draw(key, number, *size_seen)
            pixels = crop_image(picture, view, size, interpolation=interpolation)
            sample = Sample(**common, view=[*view.box, int(view.flip)])
            prepared.append(_Prepared(sample=sample, pixels=pixels, jpeg=jpeg))
        return prepared

    @torch.inference_mode()
    def _encode(self, prepared: list[_Prepared]) -> np.ndarray:
        """float32 [batch_size, C, grid, grid] for up to batch_size images."""
        size, stride = self.teacher.info.image_size, self.teacher.info.stride
        batch = torch.zeros(self.batch_size, 3, size, size, device=self.device)
        valid = torch.full((self.batch_size, 2), size / stride, device=self.device)
        for index, item in enumerate(prepared):
            if item.pixels is not None:
                pixels = torch.from_numpy(item.pixels).to(self.device).permute(2, 0, 1)
                height, width = pixels.shape[1:]
                batch[index, :, :height, :width] = self.teacher.normalise(pixels)
                valid[index] = torch.tensor([height / stride, width / stride])
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            maps = self.teacher(batch)
        embeddings = valid_region(maps.float(), valid, self.grid).cpu().numpy()[: len(prepared)]
        embeddings[[item.pixels is None for item in prepared]] = 0
        return embeddings
