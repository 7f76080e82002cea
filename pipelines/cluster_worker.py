"""What a worker of a cluster does: it begins an extraction, and extracts one shard a task.

A worker process has two threads for shards and one teacher, which is one shard's at a time: while it is at work for one, the
first images of the next are decoded, and what it said of the one before is written. The commit record is the only truth: a
task may be repeated, at the same time too, and needs no lock.
"""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipelines.cluster_processes import DEVICE, SHARE
from pipelines.embedding import Embedded
from pipelines.extract import begin, commit_shard, shard_batches
from pipelines.jobs import ExtractConfig, Job, Progress, how_to_go_on, prepare_job
from pipelines.tally import Committed
from sami_cache.errors import IdentityError, SamiCacheError
from sami_cache.processes import StopSignal
from sami_cache.store.cache import Cache
from sami_cache.store.files import exists
from sami_cache.store.head import is_cache
from sami_cache.store.places import AnyPath


class RefusedError(IdentityError):
    """A worker does not see the cache, the images or the weights that the extraction is of."""

    def __init__(self, message: str, worker: str):
        super().__init__(message)
        self.worker = worker
        """Its address."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.worker)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One extraction, as its workers are told of it."""

    name: str
    """Another one each time; also the topic of its progress."""
    host: str
    """Of the process that the user started."""
    config: ExtractConfig
    """With absolute paths."""
    cache_id: str = ""
    """Of the cache at `config.cache`, once it is there."""


class _StoppedError(Exception):
    """This shard's turn came after the run was stopped."""


class _Turn:
    """Who holds it may use the teacher. It is not given to runs that were stopped, nor by a worker that leaves."""

    def __init__(self) -> None:
        self._lock, self._here = threading.Lock(), threading.local()
        self.since = 0.0
        """When it was given last, on the monotonic clock."""
        self.deadlines: dict[str, float] = {}
        """Of stopped runs: until when a shard in hand may be finished."""
        self.leaving: float | None = None
        """The same of all runs, once the worker is to leave."""

    def of(self, run: str) -> None:
        """What this thread does is for `run`."""
        self._here.run = run

    def __enter__(self) -> None:
        self._lock.acquire()
        self.since = time.monotonic()
        if self.seconds_left() is not None:
            self._lock.release()
            raise _StoppedError

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def seconds_left(self) -> float | None:
        """For the shard in hand of this thread; None where nobody has asked to stop."""
        asked = [moment for moment in (self.deadlines.get(self._here.run), self.leaving) if moment is not None]
        return min(asked) - time.monotonic() if asked else None


_turn = _Turn()
_opening = threading.Lock()
_opened: dict[tuple[ExtractConfig, str], Job] = {}
"""The job of the last run, with its teacher."""
_in_hand: set[int] = set()
"""Shards that a thread is at."""


def begin_run(run: Run) -> tuple[AnyPath, int]:
    """What comes before the shards (`extract.begin`), as a task: the path of the cache to be filled, and samples done.

    Its progress is logged under the run's name.
    """
    from distributed import get_worker

    worker, told, stage = get_worker(), 0.0, ""

    def tell(progress: Progress) -> None:
        nonlocal told, stage
        if time.monotonic() - told >= 0.5 or progress.stage != stage or progress.done == progress.total:
            told, stage = time.monotonic(), progress.stage
            worker.log_event(run.name, {"progress": asdict(progress)})

    with _opening, _named(run):
        _opened.clear()
        job, cache, grown = begin(_here(run.config), tell, StopSignal(lambda: how_to_go_on(run.config.cache)))
        if not job.added:
            _keep(run.config, job, cache)
    return cache.path, grown


def extract_shard(shard: int, run: Run) -> Committed | None:
    """Extract and commit a shard, as a task; None if the run was stopped before that was done.

    Raises:
        RefusedError: this worker does not see what the extraction is of.
        SamiCacheError: what `write_shard` raises.
    """
    _turn.of(run.name)
    job, cache = _open(run)
    if exists(cache.record_path(shard)):
        return Committed.before(cache, cache.record(shard))
    _in_hand.add(shard)
    try:
        parts = _embed(job, cache, shard)
        if parts is not None:
            with _named(run):
                return commit_shard(cache, shard, parts)
    finally:
        _in_hand.discard(shard)
    while _turn.leaving is not None:  # the scheduler gives it to another when this process ends
        time.sleep(1)
    return None


def _embed(job: Job, cache: Cache, shard: int) -> list[Embedded] | None:
    """What the teacher says of a shard; None if it was, or has to be, stopped."""
    parts, done, total = list[Embedded](), 0, len(cache.shard_samples(shard))
    with suppress(_StoppedError):
        for part in job.embedder.embed(shard_batches(job, cache, shard)):
            parts.append(part)
            done += len(part.samples)
            left = _turn.seconds_left()
            if left is not None and (total - done) * (time.monotonic() - _turn.since) / done > left:
                return None
    return parts if done == total else None


def stop_run(name: str, seconds: float) -> None:
    """Have this worker end what it does for a run, but for a shard in hand that it can finish in so many seconds."""
    _turn.deadlines.setdefault(name, time.monotonic() + seconds)


async def leave(seconds: float) -> None:
    """Have this worker begin no other shard; returns when the one in hand is committed, or cannot be in so many seconds."""
    _turn.leaving = time.monotonic() + seconds
    while _in_hand and time.monotonic() < _turn.leaving:
        await asyncio.sleep(0.05)


def dask_setup(worker: Any) -> None:
    """Called by Dask in a process that begins: Ctrl-C on a terminal reaches all of them, and is for the one that was typed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _open(run: Run) -> tuple[Job, Cache]:
    """The run's job here, its teacher loaded, once a process. Raises RefusedError."""
    with _opening:
        job = _opened.get((run.config, run.cache_id))
        if job is None:
            _opened.clear()
            try:
                job = _prepare(run)
            except SamiCacheError as error:
                from distributed import get_worker

                worker = get_worker()
                raise RefusedError(f"worker {worker.name} on {socket.gethostname()}: {error}", worker.address) from None
        assert job.cache is not None
        return job, job.cache


def _prepare(run: Run) -> Job:
    path = run.config.cache
    if not is_cache(path):
        raise IdentityError(f"{path}: there is no cache here. All workers must see it, and the images, at the same path.")
    cache = Cache(path)
    if cache.cache_id != run.cache_id:
        raise IdentityError(f"{path}: is cache {cache.cache_id[:12]}, expected {run.cache_id[:12]}: another disk?")
    job = prepare_job(_here(run.config))
    if job.added:
        new = ", ".join(job.source.keys[-job.added :][:3])
        raise IdentityError(f"{job.source.location} has {job.added} images that {path} was not made for: {new}")
    _keep(run.config, job, cache)
    return job


def _keep(config: ExtractConfig, job: Job, cache: Cache) -> None:
    job.cache, job.embedder = cache, replace(job.embedder, turn=_turn)
    job.embedder.teacher.to(job.embedder.device)
    _opened[replace(config, cache=cache.path, codec_from=None), cache.cache_id] = job


def _here(config: ExtractConfig) -> ExtractConfig:
    """The settings with this process's device and its share of the machine's cores."""
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get(SHARE, "1")))
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # whatever Dask set for the libraries below
    return replace(config, device=os.environ.get(DEVICE, config.device), workers=config.workers or min(16, cores))


@contextmanager
def _named(run: Run) -> Iterator[None]:
    """Errors say on which machine they came up, where that is not the user's."""
    try:
        yield
    except SamiCacheError as error:
        host = socket.gethostname()
        if host == run.host:
            raise
        raise type(error)(f"on {host}: {error}") from None
