"""Extraction: the teacher runs once over an image set, shard by shard, and what it says is committed to the cache."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import growing
from pipelines.embedding import Embedded
from pipelines.jobs import ExtractConfig, Job, Progress, how_to_go_on, prepare_job
from pipelines.plan import check_space, measure
from pipelines.sources import check_images, committed_sources
from pipelines.tally import Committed, Tally
from sami_cache.processes import Interrupted, StopSignal
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK
from sami_cache.store.creation import create_cache
from sami_cache.store.places import AnyPath, local_only
from sami_cache.store.writing import seal_cache, write_shard


@dataclass(kw_only=True)
class Summary:
    """What an extraction did."""

    cache: AnyPath
    root: dict[str, Any]
    samples_done: int
    """By this run; 0 when there was nothing left to do."""
    seconds: float
    bytes: int
    """Of the whole cache."""
    failures: list[tuple[str, str]]
    """(key, reason) of every sample without an embedding, whichever run met it."""
    error: float | None
    """What the codec lost over the whole set: squared error / variance. None without a usable sample."""
    asked: float | None
    """The error that was asked for (`pca`)."""
    fit_samples: int
    """On how many samples the codec was fitted."""
    fit_images: int
    """On how many it was to be fitted."""
    clipped: tuple[int, int]
    """Coefficients at the end of their range, and in how many samples."""
    other_writers: int = 0
    """Shards that another process committed first."""
    differences: list[int] = field(default_factory=list)
    """Those of them whose codes differ from ours: the teacher is not deterministic here."""
    before: Path | None = None
    """Where the cache is as it was before it grew."""


def extract(config: ExtractConfig, on_progress: Callable[[Progress], None] = lambda _: None) -> Summary:
    """Extract, or go on with what an earlier run of the same settings left, and seal the cache.

    Where images were added to those of the cache, it grows: only they go through the teacher (`growing.py`).

    Raises:
        IdentityError: the cache was made with other settings or images; the differing fields are listed. Images are compared
            by content, those of committed shards too, before the teacher runs.
        DiskFullError: before the start or before a shard that would not fit.
        Interrupted: on SIGINT or SIGTERM; committed shards stay, the one in hand is finished if it can be within the grace.
    """
    started = time.perf_counter()
    with StopSignal(lambda: how_to_go_on(config.cache), config.grace) as stop:
        job, cache, grown = begin(config, on_progress, stop)
        missing = missing_shards(cache)
        commits = run_shards(job, cache, missing, on_progress, stop) if missing else []
        return finish(config.cache, cache, commits, grown, started, on_progress)


def begin(config: ExtractConfig, on_progress: Callable[[Progress], None], stop: StopSignal) -> tuple[Job, Cache, int]:
    """All that comes before the shards: check, or fit and create, or grow.

    Returns the job, the cache whose missing shards are to be extracted, and how many samples were on the way.
    """
    growing.settle(config.cache)
    job = prepare_job(config)
    if job.cache is not None and not config.trust_images:
        _check_committed(job, job.cache, on_progress)
    if job.cache is None:
        outlook = measure(job, on_progress)
        check_space(outlook, config.cache)
        job.cache = create_cache(config.cache, **job.head(outlook.codec))
    if not job.added:
        return job, job.cache, 0
    local_only(config.cache, f"{job.added} images were added, and to grow a cache")
    grown = growing.grow(job, job.cache, on_progress, stop)
    return job, Cache(growing.growing_place(job)), grown


def missing_shards(cache: Cache) -> list[int]:
    committed = set(cache.committed())
    return [shard for shard in range(cache.shards) if shard not in committed]


def finish(
    path: AnyPath,
    cache: Cache,
    commits: list[Committed],
    grown: int,
    started: float,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Seal a cache whose shards are all committed, put it in the place `path` if it is a grown one, and sum up."""
    on_progress(Progress(stage="seal", done=cache.samples, total=cache.samples))
    root = seal_cache(cache)
    before = growing.settle(path)
    cache = Cache(path)
    lost = cache.manifest(root, ["key", "status", "error", "energy", "clipped"])
    failed = [(row, status) for row, status in enumerate(lost["status"].to_pylist()) if status != OK]
    error, energy, clipped = (_present(lost[name]) for name in ("error", "energy", "clipped"))
    return Summary(
        cache=path,
        root=root,
        samples_done=grown + sum(commit.samples for commit in commits if commit.won),
        seconds=time.perf_counter() - started,
        bytes=cache.size_on_disk(),
        failures=[(lost["key"][row].as_py(), status) for row, status in failed],
        error=float(np.average(error, weights=energy)) if energy.any() else None,
        asked=cache.codec.error,
        fit_samples=cache.codec.fit_samples,
        fit_images=cache.identity["codec"]["fit_images"],
        clipped=(int(clipped.sum()), int((clipped > 0).sum())),
        other_writers=sum(not commit.won for commit in commits),
        differences=[commit.shard for commit in commits if not commit.same],
        before=before,
    )


def _present(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, nulls left out. (Not by pyarrow.compute: beside torch it has ended processes by SIGABRT.)"""
    values = column.to_numpy()
    return values[~np.isnan(values)]


def _check_committed(job: Job, cache: Cache, on_progress: Callable[[Progress], None]) -> None:
    """Raise IdentityError if an image of a committed shard is no longer the one that was extracted."""
    done = np.cumsum([0, *(len(cache.shard_samples(shard)) for shard in cache.committed())]) // max(1, cache.views)
    check_images(
        cache,
        job.source,
        committed_sources(cache),
        workers=job.embedder.workers,
        on_progress=lambda parts: on_progress(Progress(stage="check", done=int(done[parts]), total=int(done[-1]))),
    )


def run_shards(
    job: Job, cache: Cache, missing: list[int], on_progress: Callable[[Progress], None], stop: StopSignal
) -> list[Committed]:
    """Extract and commit these shards; they are written in the background while the teacher works on the next ones.

    With 16 workers four at a time: compressing and checking a sample of SAM's takes 7 ms of a core at a grid of 32, which is
    more than the faster teachers take for one on a GPU.
    """
    tally = Tally(cache, missing, on_progress)
    pending: deque[Future[Committed]] = deque()

    def settle(left: int) -> None:
        """Wait until at most so many shards are being written."""
        while len(pending) > left:
            tally.add(pending.popleft().result())

    writers = max(1, min(4, job.embedder.workers // 4))
    stop.holding = True
    with ThreadPoolExecutor(writers, thread_name_prefix="commit") as pool:
        parts: list[Embedded] = []
        # Batches never cross shards, so that a resumed run computes the same ones.
        batches = [batch for shard in missing for batch in shard_batches(job, cache, shard)]
        shards = iter(missing)
        shard, embedded = next(shards), 0
        for part in job.embedder.embed(batches):
            parts.append(part)
            embedded += len(part.samples)
            left = len(cache.shard_samples(shard)) - sum(len(piece.samples) for piece in parts)
            if not left:
                settle(writers - 1)
                tally.check_room((1 + len(pending)) * len(cache.shard_samples(shard)))
                pending.append(pool.submit(commit_shard, cache, shard, parts))
                parts = []
                shard = next(shards, -1)
            if stop.number:
                if not left or left * tally.seconds() / embedded > stop.seconds_left():
                    settle(0)
                    raise Interrupted(how_to_go_on(cache.path), stop.number)
                tally.show("stop")
        settle(0)
    stop.holding = False
    return tally.commits


def shard_batches(job: Job, cache: Cache, shard: int) -> list[range]:
    """The sample numbers that the teacher sees together."""
    numbers, size = cache.shard_samples(shard), job.embedder.batch_size
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def commit_shard(cache: Cache, shard: int, parts: list[Embedded]) -> Committed:
    """Write what the teacher said of all samples of a shard; `parts` is empty then."""
    embeddings = np.concatenate([part.embeddings for part in parts])
    samples = [sample for part in parts for sample in part.samples]
    jpegs = [jpeg for part in parts for jpeg in part.jpegs]
    parts.clear()  # half a gigabyte for SAM, and twice that until here
    return Committed.of(cache, write_shard(cache, shard, embeddings, samples, jpegs))
