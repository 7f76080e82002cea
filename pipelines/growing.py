"""A cache that grows with its images: what it holds is linked into a larger one, which takes its place once it is sealed.

What a cache is (its images among it) is in its head and in every record, and none of its files is ever changed. So the grown
cache is built beside the old one, as `.NAME.growing-<digest of its images>`: whole shards are linked there, only their records
are new. The old one stays as `NAME.before-<its cache_id>`; both share their files, and either may be deleted.
"""

import glob
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.jobs import Job, Progress, how_to_go_on
from sami_cache.errors import Interrupted, SamiCacheError
from sami_cache.processes import StopSignal
from sami_cache.store.cache import Cache, listing_digest
from sami_cache.store.commits import OK
from sami_cache.store.copying import Place, copy_shard, gather
from sami_cache.store.creation import create_cache
from sami_cache.store.files import fsync_directory
from sami_cache.store.places import AnyPath, RemotePath, local_only
from sami_cache.store.writing import check_embeddings, complete_samples, write_codes


def growing_place(job: Job) -> Path:
    """Where the grown cache of a job is built."""
    path = local_only(job.config.cache, "to grow a cache")
    return path.with_name(f".{path.name}.growing-{listing_digest(job.source.keys, job.source.labels)[:12]}")


def grow(job: Job, old: Cache, on_progress: Callable[[Progress], None], stop: StopSignal) -> int:
    """Make, or go on making, the grown cache, with all that `old` has committed; returns how many samples were embedded.

    These are the ones that fill up the last shard of `old`; the caller extracts the shards behind it.
    """
    head = job.head(old.codec)
    head["provenance"]["grown_from"] = {"cache_id": old.cache_id, "samples": old.samples}
    new = create_cache(growing_place(job), **head)
    labels = [label for label in old.listing["label"].to_pylist() for _ in range(max(1, old.views))]
    there, committed, embedded = set(new.committed()), old.committed(), 0
    stop.holding = True
    for done, shard in enumerate(committed):
        numbers, wanted = old.shard_samples(shard), new.shard_samples(shard)
        places = [Place(old, number, labels[number]) for number in numbers]
        if shard not in there and len(numbers) == len(wanted):
            copy_shard(new, shard, places)
        elif shard not in there:
            embedded = _fill_up(job, new, shard, places, wanted[len(numbers) :])
        on_progress(Progress(stage="copy", done=wanted.stop, total=new.samples))
        if stop.number and done + 1 < len(committed):
            raise Interrupted(how_to_go_on(old.path), stop.number)
    stop.holding = False
    stop.check()
    return embedded


def _fill_up(job: Job, new: Cache, shard: int, places: list[Place], numbers: range) -> int:
    """Commit a shard whose first samples another cache holds and whose others, `numbers`, go through the teacher."""
    size = job.embedder.batch_size
    parts = list(job.embedder.embed([numbers[start : start + size] for start in range(0, len(numbers), size)]))
    samples = [sample for part in parts for sample in part.samples]
    embeddings = np.concatenate([part.embeddings for part in parts])
    good = np.array([sample.status == OK for sample in samples])
    check_embeddings(embeddings, samples, good)
    codes = np.zeros((len(samples), *new.layout.sample_shape), new.layout.stored_dtype)
    codes[good] = new.codec.encode(embeddings[good])
    rows = complete_samples(new.codec, embeddings, codes, samples, good, {})
    old_codes, old_rows, old_images = gather(new, places)
    images = [*old_images, *(jpeg for part in parts for jpeg in part.jpegs)]
    write_codes(new, shard, np.concatenate([old_codes, codes]), [*old_rows, *rows], images)
    return len(samples)


def settle(path: AnyPath) -> Path | None:
    """Put a grown and sealed cache in the place of `path`; returns where the old one is now, None if none had grown.

    Two renames: what is killed between them leaves no cache at `path`, and the next call finishes.
    """
    if isinstance(path, RemotePath):
        return None
    for new in sorted(path.parent.glob(f".{glob.escape(path.name)}.growing-*")) if path.parent.is_dir() else ():
        if (new / "ROOT.json").exists() and (grown := Cache(new)).root() is not None:
            before = _before(path, str(grown.attributes["provenance"]["grown_from"]["cache_id"]))
            if os.path.lexists(path):
                if Cache(path).cache_id != grown.attributes["provenance"]["grown_from"]["cache_id"]:
                    continue  # built beside another cache, whose place this is not
                if os.path.lexists(before):
                    raise SamiCacheError(f"{before}: is in the way of the cache that {path} was before it grew. Move it away.")
                os.rename(path, before)
            elif not before.is_dir():
                continue
            os.rename(new, path)
            fsync_directory(path.parent)
            return before
    return None


def _before(path: Path, cache_id: str) -> Path:
    return path.with_name(f"{path.name}.before-{cache_id[:12]}")
