"""Batches of training samples: pixels and targets of the same view, in a known order, prepared by threads.

A chunk of codes is decompressed once and its samples are written straight to where they belong in the batches to come. That
is possible because the order of an epoch is known beforehand: shards are shuffled, a few are open at a time, and samples are
drawn across them (`order.py`).
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sami_cache.batches import Batch
from sami_cache.data.views import VIEW_DRAWS, View, ViewConfig, crop_image, crop_pixels, random_view
from sami_cache.errors import SamiCacheError
from sami_cache.order import Course, deal, epoch_order, random_words, uniform
from sami_cache.samples import OpenShard, Samples
from sami_cache.workers import LoaderError, Workers

EVALUATION_EPOCH = 2**31 - 1
READERS = 2
"""Threads that have the shards to come read ahead; they hardly compute."""
CHUNKS_AT_ONCE = 4
"""Decompressed by one task, at most: handing out a task costs as much as copying four samples."""
WHOLE_IMAGE = torch.tensor([0.0, 0.0, 1.0, 1.0])
Images = Literal["pixels", "encoded", "none"]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are ordered and prepared."""

    batch_size: int
    """Samples a step, over all ranks and micro-batches."""
    micro_batches: int = 1
    """Into how many parts a rank's share of the step is cut."""
    seed: int = 0
    images: Images = "pixels"
    """pixels: the view, decoded and cut. encoded: the whole image's file, views and masks are not drawn. none: codes alone."""
    image_size: int = 224
    """Of the student's input, pixels."""
    tokens: int = 196
    teacher_size: int | None = None
    """Of an online teacher's input, pixels."""
    teacher_interpolation: str = "bilinear"
    views: ViewConfig = field(default_factory=ViewConfig)
    open_shards: int = 8
    """Shards that samples are drawn across. The codes of as many again are decoded ahead: 280 to 540 MB for 16 full shards,
    over all ranks together."""
    threads: int | None = None
    pin_memory: bool = False
    """Whether batches lie in memory that a CUDA device can copy while the processor goes on."""
    timeout: float = 60.0
    """Seconds without any sign of progress after which a sample that is waited for is given up."""


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

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Micro-batches from optimizer step `start_step` on, up to `stop_step` or without end.

        Raises what reading or decoding raises.
        """
        size = self.config.batch_size // self.world // self.config.micro_batches
        first_epoch, first_step = divmod(start_step, self.steps_per_epoch)
        last_epoch, last_step = divmod(sys.maxsize if stop_step is None else stop_step, self.steps_per_epoch)

        def course(epoch: int) -> Course:
            dealt = deal(self._order(epoch), self.config.batch_size, self.rank, self.world)
            dealt = dealt[first_step if epoch == first_epoch else 0 : last_step if epoch == last_epoch else None]
            return Course(epoch, dealt.ravel(), size, self.samples.chunk_samples, self.samples.shard_samples)

        def courses(workers: Workers) -> Iterator[Course]:
            # Sorting a million samples takes a second, which the epoch before has to spare.
            coming = workers.submit(f"the order of epoch {first_epoch}", course, first_epoch)
            for epoch in range(first_epoch + 1, last_epoch + (last_step > 0)):
                planned, coming = coming.result(), workers.submit(f"the order of epoch {epoch}", course, epoch)
                yield planned
            yield coming.result()

        # The next order must come even where every thread is stuck in a read, or nobody would notice.
        with Workers(self.threads, "loader") as workers, Workers(1, "order") as planner, Workers(READERS, "ahead") as readers:
            yield from _Service(self, workers, readers).serve(courses(planner))

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All chosen samples once, in storage order: whole images unflipped, or recorded views; masks never change."""
        numbers, samples = np.flatnonzero(self.chosen), self.samples
        course = Course(EVALUATION_EPOCH, numbers, batch_size, samples.chunk_samples, samples.shard_samples)
        with Workers(self.threads, "loader") as workers, Workers(READERS, "ahead") as readers:
            yield from _Service(self, workers, readers).serve(iter([course]))

    def _order(self, epoch: int) -> np.ndarray:
        config = self.config
        return epoch_order(
            self.chosen, self.samples.shard_samples, seed=config.seed, epoch=epoch, open_shards=config.open_shards
        )


class _Draft:
    """A micro-batch in preparation."""

    def __init__(self, number: int, epoch: int, numbers: np.ndarray, pieces: list[range], samples: Samples, pin: bool) -> None:
        """`pieces`: the rows whose images are read together."""
        self.number, self.epoch, self.numbers, self.pieces, self._pin = number, epoch, numbers, pieces, pin
        self._done, self._error, self._arrived = threading.Event(), None, []
        self._expected = len(pieces) + (len(numbers) if samples.codes_shape else 0)
        if not self._expected:
            self._done.set()
        self.codes: Tensor | None = None
        if samples.codes_shape:
            self.codes = self._empty(*samples.codes_shape, dtype=getattr(torch, samples.codes_dtype.name))
            self.codes_rows = list(self.codes.numpy())
        self.pixels: Tensor | None = None
        self.teacher_pixels: Tensor | None = None
        self.encoded: list[bytes] | None = None

    def prepare_images(self, config: LoaderConfig) -> None:
        """Make room for what comes with the codes; not before it is needed, pixels being larger."""
        self.boxes, self.flips = self._empty(4, dtype=torch.float32), self._empty(dtype=torch.bool)
        self.ids_shuffle = self._empty(config.tokens, dtype=torch.int64)
        if config.images == "pixels":
            self.pixels = self._empty(config.image_size, config.image_size, 3).permute(0, 3, 1, 2)
            if config.teacher_size:
                self.teacher_pixels = self._empty(config.teacher_size, config.teacher_size, 3).permute(0, 3, 1, 2)
            return
        self.boxes.copy_(WHOLE_IMAGE)
        self.flips.zero_()
        if config.images == "encoded":
            self.encoded = [b""] * len(self.numbers)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(len(self.numbers), *shape, dtype=dtype, pin_memory=self._pin)

    def got(self, what: object) -> None:
        """One sample's codes have arrived, or one piece's images. Called by any thread, once for each."""
        self._arrived.append(what)  # needs no lock, and whoever comes last sees all of them
        if len(self._arrived) == self._expected:
            self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is complete. Raises what preparing it raised."""
        done = self._done.wait(seconds)
        if self._error is not None:
            raise self._error
        return done


class _Service:
    """One pass over courses: what is asked of the workers, and when."""

    def __init__(self, loader: Loader, workers: Workers, readers: Workers) -> None:
        self.samples, self.config, self.workers, self.threads = loader.samples, loader.config, workers, loader.threads
        self.readers = readers
        shards = max(1, len(np.unique(np.flatnonzero(loader.chosen) // loader.samples.shard_samples)))
        self.window = loader.config.open_shards * -(-loader.count // shards) // loader.world
        self._most = 2 * loader.count > shards * loader.samples.shard_samples
        self._open: dict[int, OpenShard] = {}
        self._opening = threading.Lock()
        self._drafts: dict[int, _Draft] = {}
        """By number: those made and not handed out yet."""
        self._made = 0

    def serve(self, courses: Iterator[Course]) -> Iterator[Batch]:
        planned: deque[_Draft] = deque()
        prepared: deque[_Draft] = deque()
        coming, ahead, more = self._plan(courses), 0, True
        while True:
            while more and (ahead < self.window or not planned):
                draft = next(coming, None)
                if draft is None:
                    more = False
                else:
                    planned.append(draft)
                    ahead += len(draft.numbers)
            while planned and len(prepared) < self._batches_ahead(planned[0]):
                draft = planned.popleft()
                ahead -= len(draft.numbers)
                self._ask_for_images(draft)
                prepared.append(draft)
            if not prepared:
                return
            yield self._finish(prepared.popleft())

    def _plan(self, courses: Iterator[Course]) -> Iterator[_Draft]:
        """Every micro-batch in turn, the chunks it needs being asked for."""
        start = 0
        for course in courses:
            expected, coming = 0, course.shards if self._most else []
            for part in range(len(course)):
                # A window further than what is being decompressed, or the disk would stand still meanwhile.
                soon = course.shards_until(part) + self.config.open_shards
                for shard in coming[expected:soon]:
                    self.readers.submit(f"shard {shard}", self._expect, shard)
                expected = soon
                if self.samples.codes_shape:
                    chunks = course.first_needed(part)
                    size = max(1, min(CHUNKS_AT_ONCE, len(chunks) // self.threads))
                    for low in chunks[::size]:
                        self._ask_for_chunks(course, start, part, range(low, min(low + size, chunks.stop)))
                self._make_drafts(course, start, part)
                yield self._drafts[start + part]
            start += len(course)

    def _make_drafts(self, course: Course, start: int, last: int) -> None:
        """Of the course's micro-batches up to `last`, which are numbered from `start` on."""
        for number in range(self._made, start + last + 1):
            numbers = course.part(number - start)
            size = max(1, min(32, -(-len(numbers) // self.threads)))
            images = range(0, len(numbers) if self.config.images != "none" else 0)
            pieces = [images[low : low + size] for low in images[::size]]
            self._drafts[number] = _Draft(number, course.epoch, numbers, pieces, self.samples, self.config.pin_memory)
            self._made = number + 1

    def _ask_for_chunks(self, course: Course, start: int, part: int, groups: range) -> None:
        """Have chunks decompressed into all the micro-batches that hold samples of them."""
        # This is the thread that trains, and what it does the others wait for: it does no more than it must.
        self._make_drafts(course, start, max(course.last_part(group) for group in groups))
        left = list(groups)

        def read() -> None:
            while left:
                wanted = course.chunk(left[0])
                shard, chunk = divmod(wanted.number, self.samples.shard_samples // self.samples.chunk_samples)
                self.workers.sign(f"chunk {chunk} of shard {shard}")
                drafts = [self._drafts[start + part] for part in wanted.parts]
                targets = [draft.codes_rows[row] for draft, row in zip(drafts, wanted.rows, strict=True)]
                self._shard(shard).read_codes(chunk, dict(zip(wanted.places, targets, strict=True)))
                for draft in drafts:
                    draft.got(chunk)
                del left[0]

        def concerned() -> list[_Draft]:
            return [self._drafts[start + part] for group in left for part in course.chunk(group).parts]

        self._submit(f"{len(left)} chunks", read, concerned, start + part)

    def _ask_for_images(self, draft: _Draft) -> None:
        draft.prepare_images(self.config)
        for rows in draft.pieces:
            self._submit(f"{len(rows)} images", lambda rows=rows: self._read_images(draft, rows), lambda: [draft], draft.number)

    def _batches_ahead(self, draft: _Draft) -> int:
        """Enough that every thread has images to decode while the oldest micro-batch is being finished."""
        return 2 + 2 * self.threads // max(1, len(draft.pieces))

    def _submit(self, what: str, call: Callable[[], None], concerned: Callable[[], list[_Draft]], urgency: int) -> None:
        def tell(future: Future[None]) -> None:
            if not future.cancelled() and (error := future.exception()):
                for draft in concerned():
                    draft.fail(error)

        self.workers.submit(what, call, urgency=urgency).add_done_callback(tell)

    def _shard(self, number: int) -> OpenShard:
        opened = self._open.get(number)
        if opened is None:
            with self._opening:
                opened = self._open.get(number)
                if opened is None:
                    opened = self._open[number] = self.samples.open(number)
                    if len(self._open) > 4 * self.config.open_shards:
                        self._open.pop(next(iter(self._open)))
        return opened

    def _expect(self, shard: int) -> None:
        self._shard(shard).expect(images=self.config.images != "none")

    def _read_images(self, draft: _Draft, rows: range) -> None:
        config, numbers = self.config, draft.numbers[rows.start : rows.stop]
        if config.images == "encoded":
            assert draft.encoded is not None
            for row, number in zip(rows, numbers.tolist(), strict=True):
                shard, place = divmod(number, self.samples.shard_samples)
                self.workers.sign(f"sample {self.samples.keys[number]!r}")
                draft.encoded[row] = self._shard(shard).encoded(place)
            return draft.got(rows)
        words = random_words(config.seed, draft.epoch, numbers, VIEW_DRAWS + config.tokens)
        draft.ids_shuffle.numpy()[rows.start : rows.stop] = words[:, VIEW_DRAWS:].argsort(axis=1)
        for row, number, draws in zip(rows, numbers.tolist(), uniform(words[:, :VIEW_DRAWS]).tolist(), strict=True):
            self.workers.sign(f"sample {self.samples.keys[number]!r}")
            self._cut_image(draft, row, number, draws)
        return draft.got(rows)

    def _cut_image(self, draft: _Draft, row: int, number: int, draws: list[float]) -> None:
        shard, place = divmod(number, self.samples.shard_samples)
        opened = self._shard(shard)
        pixels, recorded = opened.pixels(place), opened.view(place)
        height, width = pixels.shape[:2]
        drawn = View() if draft.epoch == EVALUATION_EPOCH else random_view(draws, width, height, self.config.views)
        view = recorded or drawn
        draft.boxes.numpy()[row] = view.box
        draft.flips.numpy()[row] = view.flip
        assert draft.pixels is not None
        crop_pixels(pixels, view, draft.pixels[row])
        if draft.teacher_pixels is not None and self.config.teacher_size:
            cut = crop_image(
                Image.fromarray(pixels), view, self.config.teacher_size, interpolation=self.config.teacher_interpolation
            )
            draft.teacher_pixels[row].permute(1, 2, 0).numpy()[:] = cut

    def _finish(self, draft: _Draft) -> Batch:
        """The batch, once it is complete. Raises LoaderError if it does not come in time."""
        asked, timeout = time.monotonic(), self.config.timeout
        keys = [self.samples.keys[number] for number in draft.numbers.tolist()]
        while not draft.wait(min(1.0, timeout)):
            waited = time.monotonic() - max(asked, self.workers.last_sign)
            if waited >= timeout:
                busy = "; ".join(self.workers.at_work()[:2]) or "no worker is at it"
                raise LoaderError(
                    f"the batch of sample {keys[0]!r} and {len(keys) - 1} others did not come, nor anything else for "
                    f"{waited:.1f} s ({busy}). Check the disk and the network it lies on, or wait longer with --data-timeout; "
                    "a training goes on from its last checkpoint with --resume."
                )
        del self._drafts[draft.number]
        return Batch(
            samples=draft.numbers,
            keys=keys,
            pixels=draft.pixels,
            codes=draft.codes,
            whole=self.samples.whole,
            boxes=draft.boxes,
            flips=draft.flips,
            ids_shuffle=draft.ids_shuffle,
            teacher_pixels=draft.teacher_pixels,
            encoded=draft.encoded,
        )
