"""Two ways to serve a format in shuffled order, each by threads of the process and by torch DataLoader workers.

`random`: a full permutation, every sample fetched by itself. `blocks`: a few random blocks (as large as a shard of the cache)
are read whole into a window and the window's samples are permuted in memory, as our loader does with its shards.
"""

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from loader_samples import BATCH, Batch, PlainSamples, every, full_permutations, shard_windows

WINDOW = 8
"""Blocks of a window: our loader's default of open shards."""


# Neither fork (tensorstore, zarrs and Lance hang after it) nor spawn (torch is imported for seconds).
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "numpy", "loader_engines"])


class Format:
    """Files of one kind. Written once, opened in the process that reads."""

    layouts: ClassVar[dict[str, tuple[str, ...]]] = {"": ("random", "blocks")}
    """Layouts on disk and the orders they are read in."""
    checks: ClassVar[str] = "nothing"
    """What of the bytes it reads is checked."""

    def __init__(self, samples: PlainSamples, cache: Path, folder: Path, layout: str, jpegs: bool) -> None:
        self.samples, self.cache, self.folder, self.layout, self.jpegs = samples, cache, folder, layout, jpegs

    def write(self) -> None:
        """Make the files of the layout in `folder`."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What must be done before workers are started."""

    def open(self, order: str) -> None:
        """Make ready to be read in that order, in the process that reads."""

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        """Read samples into `codes` [n, kept, m, m]; returns their JPEGs if asked for. Called by several threads."""
        raise NotImplementedError

    def block(self, start: int, stop: int, codes: np.ndarray) -> list[bytes] | None:
        """The same for samples start .. stop - 1."""
        return self.fetch(np.arange(start, stop), codes)

    def stream(self, repeats: int) -> "Iterator[Batch]":
        """The order `own`: this worker's share of the batches, shuffled by the library itself."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and memory maps, so that the page cache can be dropped."""

    def paths(self) -> list[Path]:
        """Where its bytes lie."""
        return [self.folder]


@dataclass
class Reader:
    """Serves a format. `repeats` epochs are one stream, so that what begins and ends with an epoch is seldom paid for."""

    format: Format
    order: str
    workers: str
    cores: int
    repeats: int = 1
    seed: int = 0

    def batches(self) -> Iterator[Batch | None]:
        """Batches; the first item is None: files are open, workers are there, and no sample is read before the next call."""
        self.format.prepare()
        return load_with_processes(Share(self), self.cores) if self.workers == "processes" else _from_threads(self)

    def empty(self, count: int) -> np.ndarray:
        return np.empty((count, *self.format.samples.codes.shape[1:]), np.int8)

    def plan(self, window: int) -> Iterator[np.ndarray]:
        if self.order == "random":
            return full_permutations(len(self.format.samples), self.repeats, self.seed)
        blocks = -(-len(self.format.samples) // self.format.samples.block)
        return shard_windows(blocks, min(window, blocks), self.repeats, self.seed)

    def fetch(self, numbers: np.ndarray) -> Batch:
        codes = self.empty(len(numbers))
        return Batch(numbers, codes, self.format.fetch(numbers, codes))


class Window:
    """The samples of some blocks in one buffer that is used again for the next ones."""

    def __init__(self, reader: Reader, blocks: int) -> None:
        self.reader, self.size = reader, reader.format.samples.block
        self.buffer = reader.empty(blocks * self.size)
        self.numbers = np.empty(0, np.int64)
        self.jpegs: list[Any] = []
        self.parts: list[Any] = []

    def read(self, blocks: np.ndarray, submit: Any) -> None:
        """Begin to read `blocks`; `submit` runs a function now or in a thread and returns how to get its result."""
        total, starts = len(self.reader.format.samples), (blocks * self.size).tolist()
        ranges = [(start, min(start + self.size, total)) for start in starts]
        self.numbers = np.concatenate([np.arange(*each) for each in ranges])
        ends = np.cumsum([0, *(stop - start for start, stop in ranges)]).tolist()
        self.parts = [
            submit(self.reader.format.block, *each, self.buffer[low:high])
            for each, (low, high) in zip(ranges, itertools.pairwise(ends), strict=True)
        ]

    def batches(self, rng: np.random.Generator) -> Iterator[Batch]:
        self.jpegs = [jpeg for part in self.parts for jpeg in part() or ()]
        order = rng.permutation(len(self.numbers))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            jpegs = [self.jpegs[row] for row in rows] if self.reader.format.jpegs else None
            yield Batch(self.numbers[rows], self.buffer[rows], jpegs)


def _from_threads(reader: Reader) -> Iterator[Batch | None]:
    reader.format.open(reader.order)
    pool = ThreadPoolExecutor(reader.cores)
    try:
        yield None
        if reader.order == "own":
            yield from reader.format.stream(reader.repeats)
            return
        if reader.order == "random":
            ahead: deque[Any] = deque()
            for numbers in reader.plan(0):
                ahead.append(pool.submit(reader.fetch, numbers))
                if len(ahead) > 2 * reader.cores:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
            return
        rng = np.random.default_rng([reader.seed, 1])
        # While the samples of one window are handed out, the next is read.
        windows = itertools.cycle([Window(reader, WINDOW), Window(reader, WINDOW)])
        current = None
        for blocks in reader.plan(WINDOW):
            following = next(windows)
            following.read(blocks, lambda *call: pool.submit(*call).result)
            if current:
                yield from current.batches(rng)
            current = following
        if current:
            yield from current.batches(rng)
    finally:
        pool.shutdown(cancel_futures=True)
        reader.format.close()


class Share(torch.utils.data.IterableDataset):
    """What one of the DataLoader's workers serves: every n-th batch or window."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.go = reader, CONTEXT.Event()

    def __iter__(self) -> Iterator[Any]:
        info: Any = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        self.reader.format.open(self.reader.order)
        yield None
        self.go.wait()
        try:
            for batch in self._batches(info.id, info.num_workers):
                yield _as_tensors(batch)
        finally:
            self.reader.format.close()

    def _batches(self, worker: int, workers: int) -> Iterator[Batch]:
        reader = self.reader
        if reader.order == "own":
            yield from reader.format.stream(reader.repeats)
            return
        # Every worker holds a window: together as many blocks as threads would.
        size = max(1, min(WINDOW, len(reader.format.samples) // reader.format.samples.block) // workers)
        plan = every(reader.plan(size), worker, workers)
        if reader.order == "random":
            yield from map(reader.fetch, plan)
            return
        rng, window = np.random.default_rng([reader.seed, 1, worker]), Window(reader, size)
        for blocks in plan:
            window.read(blocks, _at_once)
            yield from window.batches(rng)


def _at_once(call: Any, *arguments: Any) -> Any:
    result = call(*arguments)
    return lambda: result


def load_with_processes(share: Share, workers: int) -> Iterator[Batch | None]:
    """What DataLoader workers serve; one None once every worker has sent its own."""
    loader = torch.utils.data.DataLoader(
        share, batch_size=None, num_workers=workers, prefetch_factor=4, multiprocessing_context=CONTEXT
    )
    items = iter(loader)
    for _ in range(workers):
        assert next(items) is None
    yield None
    share.go.set()
    for numbers, codes, jpegs in items:  # a tuple arrives as a list
        yield Batch(numbers, codes, jpegs and tuple(jpegs))


def _as_tensors(batch: Batch) -> tuple[Any, ...]:
    """Tensors travel in shared memory, lists of bytes through a pipe: so JPEGs are joined."""
    jpegs = None if batch.jpegs is None else join_jpegs(batch.jpegs)
    return torch.from_numpy(batch.numbers), torch.from_numpy(batch.codes), jpegs


def join_jpegs(jpegs: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.from_numpy(np.cumsum([0, *map(len, jpegs)]))
    return torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8), offsets
