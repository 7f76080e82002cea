"""How far an extraction is: counted shard by shard, whoever commits them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.jobs import Progress
from pipelines.plan import RESERVE_BYTES, free_space
from sami_cache.errors import DiskFullError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK, Record
from sami_cache.store.files import size_of
from sami_cache.store.writing import Commit


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What came of a shard, small enough to be sent from process to process."""

    shard: int
    samples: int
    failures: int
    """Samples without an embedding."""
    bytes: int
    """Of its files and its record."""
    won: bool = True
    """False if another writer committed the shard first."""
    same: bool = True
    """Whether the committed codes are the ones that were to be written."""

    @classmethod
    def of(cls, cache: Cache, commit: Commit) -> "Committed":
        return cls(**_counted(cache, commit.record), won=commit.won, same=commit.same)

    @classmethod
    def before(cls, cache: Cache, record: Record) -> "Committed":
        """Of a shard that was committed when its turn came, by this run: by a worker that died before it could say so."""
        return cls(**_counted(cache, record))


def _counted(cache: Cache, record: Record) -> dict[str, Any]:
    return {
        "shard": record.shard,
        "samples": len(record.samples),
        "failures": sum(sample.status != OK for sample in record.samples),
        "bytes": sum(entry.size for entry in record.files.values()) + size_of(cache.record_path(record.shard)),
    }


class Tally:
    """What of a cache is committed, as `Progress`, and whether the disk can hold what is open."""

    def __init__(self, cache: Cache, missing: Sequence[int], on_progress: Callable[[Progress], None]):
        self.cache, self.commits = cache, list[Committed]()
        before = cache.samples - sum(len(cache.shard_samples(shard)) for shard in missing)
        self.progress = Progress(stage="extract", done=before, total=cache.samples, bytes=cache.size_on_disk())
        self._fresh, self._started, self._on_progress = 0, time.perf_counter(), on_progress
        self.show()

    def show(self, stage: str | None = None) -> None:
        self.progress.stage = stage or self.progress.stage
        self._on_progress(self.progress)

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def add(self, committed: Committed) -> None:
        progress = self.progress
        self.commits.append(committed)
        self._fresh += committed.samples
        progress.done += committed.samples
        progress.bytes += committed.bytes
        progress.failures += committed.failures
        progress.per_second = self._fresh / self.seconds()
        progress.eta_seconds = (progress.total - progress.done) / progress.per_second
        progress.expected_bytes = progress.bytes / progress.done * progress.total
        self.show()

    def check_room(self, samples: int) -> None:
        """Stop while there is still room for everything that is open, rather than when a write fails.

        `samples`: of the shards that are about to be written. Raises DiskFullError.
        """
        progress = self.progress
        per_sample = progress.bytes / progress.done if progress.done else float(np.prod(self.cache.layout.sample_shape))
        free = free_space(self.cache.path)
        if free < 2 * samples * per_sample + RESERVE_BYTES / 8:
            left = (progress.total - progress.done) * per_sample
            raise DiskFullError(
                f"{self.cache.path}: {free / 1e6:.0f} MB free, the next shard needs {samples * per_sample / 1e6:.0f} MB and "
                f"the rest of the cache about {left / 1e6:.0f} MB. Stopped before the disk is full; {progress.done} of "
                f"{progress.total} samples are committed. Make room, then run the same command again."
            )
