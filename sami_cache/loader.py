"""Training samples from a cache (or straight from images): pixels and targets of the same view, in a known order.

The order of an epoch, every view and every mask are functions of (seed, epoch, sample) alone: the same for any number of
threads, ranks or restarts. Shards are shuffled, a few are open at a time, and samples are drawn across them.
"""

import io
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sami_cache.data.images import decode_image
from sami_cache.data.sources import Source
from sami_cache.data.views import View, ViewConfig, crop_image, random_view
from sami_cache.errors import DamageError, IdentityError, ImageError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK
from sami_cache.store.files import digest
from sami_cache.workers import LoaderError, Workers

EVALUATION_EPOCH = 2**31 - 1


@dataclass(frozen=True)
class LoadedShard:
    """One shard in memory; rows by place in the shard."""

    codes: np.ndarray | None
    """[n, kept, m, m], or None where there is no cache."""
    images: Sequence[bytes | None]
    """Encoded images."""
    views: Sequence[View | None]
    """Replay caches: the recorded view, else None."""
    sizes: Sequence[tuple[int, int] | None]
    """Width and height of the source image, None if not known yet."""


class Samples(Protocol):
    """Where training samples come from, shard by shard. Thread-safe."""

    keys: list[str]
    labels: list[int | None]
    usable: np.ndarray
    """bool [samples]."""
    shard_samples: int

    def load(self, shard: int, sign: Callable[[], None] = lambda: None) -> LoadedShard:
        """Read a shard; `sign` is called when a part of it is there."""
        ...


class CacheSamples:
    """The samples of a cache: codes and JPEGs, every byte checked against the commit records on the way."""

    def __init__(self, cache: Cache, source: Source | None = None) -> None:
        """`source`: where to read images from if the cache holds none; each is checked against the digest in its record."""
        self.cache, self.source = cache, source
        if not cache.has_images and source is None:
            raise SamiCacheError(
                f"{cache.path} was extracted with --no-images: give the images it was made from with --data DIR, or extract a "
                "cache that holds them."
            )
        missing = cache.shards - len(cache.committed())
        if missing:
            raise SamiCacheError(
                f"{cache.path} is not complete: {missing} of {cache.shards} shards are missing. Run the same `sami-cache "
                "extract` command to finish it, then train."
            )
        table = cache.table()
        self._records = table["record"].take(list(range(0, len(table), cache.layout.shard_samples))).to_pylist()
        self.keys = table["key"].to_pylist()
        self.labels = table["label"].to_pylist()
        self.usable = np.array([status == OK for status in table["status"].to_pylist()])
        self.shard_samples = cache.layout.shard_samples
        self._where = {key: index for index, key in enumerate(source.keys)} if source and not cache.has_images else {}

    def load(self, shard: int, sign: Callable[[], None] = lambda: None) -> LoadedShard:
        """Read a shard. Raises DamageError where a byte is not the one committed."""
        record = self.cache.record(shard)
        if record.digest != self._records[shard]:
            raise DamageError(
                f"{self.cache.record_path(shard)}: is not the record that the cache was sealed with. `sami-cache verify "
                "--repair` mends what the images can mend."
            )
        images = (
            self.cache.read_jpegs(shard)
            if self.cache.has_images
            else [self._read(s.key, s.source, sign) for s in record.samples]
        )
        views = [None if s.view is None else _recorded_view(s.view) for s in record.samples]
        sizes = [None if s.width is None or s.height is None else (s.width, s.height) for s in record.samples]
        return LoadedShard(self.cache.read_codes(shard), images, views, sizes)

    def _read(self, key: str, expected: str | None, sign: Callable[[], None]) -> bytes | None:
        if expected is None or self.source is None:
            return None
        if key not in self._where:
            raise IdentityError(
                f"{self.source.location}: image {key!r} of the cache is not there. Give the --data it was made from."
            )
        data = self.source.read(self._where[key])
        sign()
        if digest(data) != expected:
            raise IdentityError(
                f"{self.source.location}: image {key!r} is not the one the cache was made from. Extract it anew."
            )
        return data


class SourceSamples:
    """The images of a source without a cache, for training with the teacher online."""

    def __init__(self, source: Source, shard_samples: int = 256) -> None:
        self.source, self.shard_samples = source, shard_samples
        self.keys, self.labels = list(source.keys), list(source.labels)
        self.usable = np.ones(len(source), bool)

    def load(self, shard: int, sign: Callable[[], None] = lambda: None) -> LoadedShard:
        """Read the images of a shard. Raises ImageError naming the one that cannot be read."""
        numbers = range(shard * self.shard_samples, min((shard + 1) * self.shard_samples, len(self.keys)))
        images = []
        for number in numbers:
            images.append(self.source.read(number))
            sign()
        return LoadedShard(None, images, [None] * len(images), [None] * len(images))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one micro-batch, on the CPU."""

    samples: np.ndarray
    """int64 [B], sample numbers."""
    keys: list[str]
    pixels: Tensor
    """uint8 [B, 3, S, S], the view as the student sees it, RGB."""
    codes: Tensor | None
    """[B, kept, m, m], as the cache stores them; the whole image (dense) or the view itself (replay)."""
    boxes: Tensor
    """float32 [B, 4], what to cut from `codes`: (x0, y0, x1, y1) in [0, 1]."""
    flips: Tensor
    """bool [B], whether to mirror what was cut."""
    ids_shuffle: Tensor
    """int64 [B, tokens], a random order of the tokens: the first are kept, the others masked."""
    teacher_pixels: Tensor | None
    """uint8 [B, 3, T, T], the view as an online teacher sees it."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are ordered and prepared."""

    batch_size: int
    """Samples a step, over all ranks and micro-batches."""
    micro_batches: int = 1
    """Into how many parts a rank's share of the step is cut."""
    seed: int = 0
    image_size: int = 224
    """Of the student's input, pixels."""
    tokens: int = 196
    teacher_size: int | None = None
    """Of an online teacher's input, pixels."""
    teacher_interpolation: str = "bilinear"
    views: ViewConfig = field(default_factory=ViewConfig)
    open_shards: int = 8
    """Shards that samples are drawn across; up to twice as many lie decoded in memory, 17 to 34 MB each at full size."""
    threads: int | None = None
    timeout: float = 60.0
    """Seconds without any sign of progress after which a sample that is waited for is given up."""


def epoch_order(usable: np.ndarray, shard_samples: int, *, seed: int, epoch: int, open_shards: int) -> np.ndarray:
    """The sample numbers of an epoch in training order: int64 [usable.sum()], each exactly once.

    Shards are permuted, then cut into windows of `open_shards`; the samples of a window are permuted together.
    """
    rng = np.random.default_rng([seed, epoch])
    numbers = np.flatnonzero(usable)
    shards = numbers // shard_samples
    present = np.unique(shards)
    rank = np.empty(int(present.max(initial=0)) + 1, np.int64)
    rank[rng.permutation(present)] = np.arange(len(present))
    window = rank[shards] // open_shards
    return numbers[np.lexsort((rng.random(len(numbers)), window))]


class Loader:
    """Serves the batches of a training run, from any step on."""

    def __init__(self, samples: Samples, chosen: np.ndarray, config: LoaderConfig, *, rank: int = 0, world: int = 1) -> None:
        """
        Args:
            chosen: bool [samples], which ones to serve (usable ones only).
            rank, world: this process serves the rank-th of `world` equal parts of every step.
        """
        self.samples, self.chosen, self.config, self.rank, self.world = samples, chosen, config, rank, world
        self.count = int(chosen.sum())
        parts = world * config.micro_batches
        if config.batch_size % parts:
            raise SamiCacheError(
                f"--batch-size {config.batch_size} cannot be cut into {parts} equal parts ({world} processes x "
                f"{config.micro_batches} micro-batches): choose a multiple of {parts}."
            )
        if config.batch_size > self.count:
            raise SamiCacheError(
                f"--batch-size {config.batch_size} is more than the {self.count} samples there are to train on."
            )
        self.steps_per_epoch = self.count // config.batch_size
        self.threads = config.threads or min(16, os.cpu_count() or 1)
        self._shards: OrderedDict[int, Future[LoadedShard]] = OrderedDict()

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Micro-batches from optimizer step `start_step` on, without end. Raises what reading or decoding raises."""
        size = self.config.batch_size // self.world // self.config.micro_batches

        def plan() -> Iterator[tuple[int, np.ndarray]]:
            step, order, ordered = start_step, np.empty(0, np.int64), -1
            while True:
                epoch, place = divmod(step, self.steps_per_epoch)
                if epoch != ordered:
                    order, ordered = self._order(epoch), epoch
                for part in range(self.config.micro_batches):
                    first = place * self.config.batch_size + (self.rank * self.config.micro_batches + part) * size
                    yield epoch, order[first : first + size]
                step += 1

        yield from self._serve(plan())

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All chosen samples once, in storage order, whole images unflipped, with masks that never change."""
        numbers = np.flatnonzero(self.chosen)
        parts = (numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size))
        yield from self._serve((EVALUATION_EPOCH, part) for part in parts)

    def _order(self, epoch: int) -> np.ndarray:
        config = self.config
        return epoch_order(
            self.chosen, self.samples.shard_samples, seed=config.seed, epoch=epoch, open_shards=config.open_shards
        )

    def _serve(self, plan: Iterator[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        """Prepare the planned batches in threads, a few ahead of the one that is handed out."""
        # Shards have threads of their own: a sample waits for its shard, and must not hold the thread the shard needs.
        pools = Workers(self.threads, "sample"), Workers(max(1, self.threads // 2), "shard")
        ahead: deque[tuple[np.ndarray, list[Future[_Row]]]] = deque()

        def collate() -> Batch:
            numbers, futures = ahead.popleft()
            return self._collate(numbers, [self._row_of(n, f, pools) for n, f in zip(numbers.tolist(), futures, strict=True)])

        try:
            for epoch, numbers in plan:
                ahead.append((numbers, self._submit(*pools, epoch, numbers)))
                if len(ahead) > 3:
                    yield collate()
            while ahead:
                yield collate()
        finally:
            self._shards.clear()
            for pool in pools:
                pool.close()

    def _row_of(self, number: int, future: "Future[_Row]", pools: "tuple[Workers, Workers]") -> "_Row":
        """The prepared sample. Raises LoaderError if it does not come in time."""
        asked = time.monotonic()
        while True:
            try:
                return future.result(min(1.0, self.config.timeout))
            except TimeoutError:
                waited = time.monotonic() - max(asked, *(pool.last_sign for pool in pools))
                if waited < self.config.timeout:
                    continue
            busy = "; ".join(line for pool in reversed(pools) for line in pool.at_work()[:2]) or "no worker is at it"
            raise LoaderError(
                f"sample {self.samples.keys[number]!r} of shard {number // self.samples.shard_samples} did not come, nor "
                f"anything else for {waited:.1f} s ({busy}). Check the disk and the network it lies on, or wait longer with "
                "--data-timeout; a training goes on from its last checkpoint with --resume."
            )

    def _submit(self, pool: Workers, readers: Workers, epoch: int, numbers: np.ndarray) -> "list[Future[_Row]]":
        rows = []
        for number in numbers.tolist():
            shard, place = divmod(number, self.samples.shard_samples)
            loaded = self._shards.get(shard)
            if loaded is None:
                loaded = self._shards[shard] = readers.submit(f"shard {shard}", self.samples.load, shard, readers.sign)
                while len(self._shards) > 2 * self.config.open_shards:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(shard)
            rows.append(pool.submit(f"sample {self.samples.keys[number]!r}", self._row, loaded, place, number, epoch))
        return rows

    def _row(self, loaded: Future[LoadedShard], place: int, number: int, epoch: int) -> "_Row":
        shard, config = loaded.result(), self.config
        rng = np.random.default_rng([config.seed, epoch, number])
        order = rng.permutation(config.tokens)
        data = shard.images[place]
        if data is None:
            raise DamageError(f"sample {self.samples.keys[number]!r} has no image")
        try:
            # What the cache holds was decoded and re-encoded by us, and checked byte by byte.
            image = Image.open(io.BytesIO(data)).convert("RGB") if shard.sizes[place] else decode_image(data)
        except (ImageError, OSError) as error:
            raise ImageError(
                f"image {self.samples.keys[number]!r}: {error}. Remove it, or train from a cache: extraction records such "
                "images and goes on."
            ) from error
        recorded = shard.views[place]
        width, height = shard.sizes[place] or image.size
        drawn = View() if epoch == EVALUATION_EPOCH else random_view(rng, width, height, config.views)
        view = recorded or drawn
        return _Row(
            pixels=crop_image(image, view, config.image_size),
            codes=None if shard.codes is None else shard.codes[place],
            # A recorded view's embedding is already that of the view.
            cut=View() if recorded else view,
            order=order,
            teacher_pixels=crop_image(image, view, config.teacher_size, interpolation=config.teacher_interpolation)
            if config.teacher_size
            else None,
        )

    def _collate(self, numbers: np.ndarray, rows: "list[_Row]") -> Batch:
        codes = [row.codes for row in rows if row.codes is not None]
        teacher = [row.teacher_pixels for row in rows if row.teacher_pixels is not None]
        return Batch(
            samples=numbers,
            keys=[self.samples.keys[number] for number in numbers.tolist()],
            pixels=_stack_pixels([row.pixels for row in rows]),
            codes=torch.from_numpy(np.stack(codes)) if codes else None,
            boxes=torch.tensor([row.cut.box for row in rows], dtype=torch.float32),
            flips=torch.tensor([row.cut.flip for row in rows]),
            ids_shuffle=torch.from_numpy(np.stack([row.order for row in rows])),
            teacher_pixels=_stack_pixels(teacher) if teacher else None,
        )


@dataclass(frozen=True, kw_only=True)
class _Row:
    pixels: np.ndarray
    codes: np.ndarray | None
    cut: View
    order: np.ndarray
    teacher_pixels: np.ndarray | None


def _recorded_view(values: list[float]) -> View:
    x0, y0, x1, y1, flip = values
    return View((x0, y0, x1, y1), bool(flip))


def _stack_pixels(pixels: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def split_held_out(keys: Sequence[str], usable: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out): bool [samples] each. An image is held out by its key's digest, with all its views, in every run."""
    if not 0 <= share < 1:
        raise SamiCacheError(f"--holdout {share:g}: a share of the images between 0 and 1, such as 0.02.")
    limit = int(share * 2**32)
    held = np.array([int(digest(key.encode())[:8], 16) < limit for key in keys], bool)
    return usable & ~held, usable & held
