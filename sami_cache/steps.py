"""Whole pictures in training order, one prepared item each: for tasks whose pictures are not cut into views.

Which pictures make a step is a function of (seed, epoch) alone, as in `loader`; so is what an item draws, if `make` draws from
its arguments.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, TimeoutError
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from sami_cache.errors import SamiCacheError
from sami_cache.order import deal, epoch_order
from sami_cache.workers import LoaderError, Workers

T = TypeVar("T")


class PictureSteps(Generic[T]):
    """Micro-batches of `make(epoch, number)` for the `count` pictures of a data set, without end."""

    def __init__(
        self,
        count: int,
        make: Callable[[int, int], T],
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        """`batch_size`: pictures of a step, over all `world` ranks and `accumulate` micro-batches. `timeout`: seconds."""
        if batch_size > count:
            raise SamiCacheError(f"--batch-size {batch_size} is more than the {count} pictures there are to train on: lower it")
        self.count, self.make, self.batch_size, self.seed, self.rank, self.world = count, make, batch_size, seed, rank, world
        self.size, self.accumulate = batch_size // world // accumulate, accumulate
        self.steps_per_epoch = count // batch_size
        self.threads, self.timeout = threads or default_threads(), timeout

    def batches(self, start_step: int) -> Generator[list[T], None, None]:
        """This rank's micro-batches from `start_step` on."""
        items = prepared(self.make, self._numbers(start_step), threads=self.threads, ahead=self.size, timeout=self.timeout)
        try:
            while True:
                yield list(islice(items, self.size))
        finally:
            items.close()

    def _numbers(self, start_step: int) -> Iterator[tuple[int, int]]:
        epoch, step = divmod(start_step, self.steps_per_epoch)
        every = np.ones(self.count, bool)
        while True:
            order = epoch_order(every, 1, seed=self.seed, epoch=epoch, open_shards=self.count)
            for number in deal(order, self.batch_size, self.rank, self.world)[step:].ravel().tolist():
                yield epoch, number
            epoch, step = epoch + 1, 0


def prepared(
    make: Callable[..., T], jobs: Iterable[tuple], *, threads: int | None = None, ahead: int = 0, timeout: float = 60.0
) -> Generator[T, None, None]:
    """`make(*job)` for every job, in order, prepared by threads: two a thread, and `ahead` more, are held at most.

    Raises what `make` raises, LoaderError where an item takes longer than `timeout` seconds.
    """
    threads = threads or default_threads()
    with Workers(threads, "picture") as workers:
        waiting: deque[Future[T]] = deque()
        for job in jobs:
            waiting.append(workers.submit(f"picture {job[-1]}", make, *job))
            if len(waiting) > 2 * threads + ahead:
                yield _result(waiting.popleft(), workers, timeout)
        while waiting:
            yield _result(waiting.popleft(), workers, timeout)


def default_threads() -> int:
    """One a core, at most 16."""
    return min(16, os.cpu_count() or 1)


def _result(future: Future[T], workers: Workers, timeout: float) -> T:
    try:
        return future.result(timeout)
    except TimeoutError:
        busy = "; ".join(workers.at_work()) or "no thread is at anything"
        raise LoaderError(f"no picture came for {timeout:g} s ({busy}). A slow disk needs a larger --data-timeout") from None
