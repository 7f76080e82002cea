"""Shards made of samples that other caches hold already: nothing is computed again, and every byte is checked on the way."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import xxhash

from sami_cache.errors import DamageError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK, Sample, record_bytes
from sami_cache.store.files import fsync_directory, hash_file, publish
from sami_cache.store.places import local_only
from sami_cache.store.shards import crc32c
from sami_cache.store.writing import write_codes

_OTHER_DISK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Place(NamedTuple):
    """A sample of a cache, and the label it is to have."""

    cache: Cache
    number: int
    label: int | None


def same_codec(a: Cache, b: Cache) -> bool:
    """Whether the codes of both decode alike: their arrays are the same to the bit."""
    names = ("name", "dtype", "block", "arrays")
    return all(a.attributes["codec"][name] == b.attributes["codec"][name] for name in names)


def copy_shard(cache: Cache, shard: int, places: Sequence[Place]) -> bool:
    """Commit a shard of `cache` that is to hold these samples, in this order.

    Where they are a whole shard of a cache of the same codec and layout, its files are linked (on another disk: copied) after
    their digests were compared; no byte is written twice then. Samples of another codec are decoded and encoded again, and the
    error that adds is added to the sample's. Returns whether files were linked. Raises DamageError, DiskFullError.
    """
    if _link(cache, shard, places):
        return True
    write_codes(cache, shard, *gather(cache, places))
    return False


def gather(cache: Cache, places: Sequence[Place]) -> tuple[np.ndarray, list[Sample], list[bytes | None]]:
    """Codes [n, kept, grid / block, grid / block] under `cache`'s codec, samples and images at `places`. Raises DamageError."""
    codes = np.zeros((len(places), *cache.layout.sample_shape), cache.layout.stored_dtype)
    samples: list[Sample | None] = [None] * len(places)
    images: list[bytes | None] = [None] * len(places)
    groups: dict[tuple[int, int], list[int]] = {}
    for row, place in enumerate(places):
        groups.setdefault((id(place.cache), place.number // place.cache.layout.shard_samples), []).append(row)
    for (_, shard), rows in groups.items():
        source = places[rows[0]].cache
        within = [places[row].number % source.layout.shard_samples for row in rows]
        stored = _read(source, shard, within)
        found = [
            replace(source.record(shard).samples[index], label=places[row].label)
            for index, row in zip(within, rows, strict=True)
        ]
        if same_codec(source, cache):
            codes[rows] = stored
        else:
            codes[rows], found = _encode_again(source, cache, stored, found)
        for row, sample in zip(rows, found, strict=True):
            samples[row] = sample
        if cache.has_images:
            for row, jpeg in zip(rows, source.read_jpegs(shard, within), strict=True):
                images[row] = jpeg
    return codes, [sample for sample in samples if sample is not None], images


def _read(cache: Cache, shard: int, within: Sequence[int]) -> np.ndarray:
    """Codes of some samples of a shard: only their chunks are read."""
    out = np.empty((len(within), *cache.layout.sample_shape), cache.layout.stored_dtype)
    chunks: dict[int, dict[int, np.ndarray]] = {}
    for row, index in enumerate(within):
        chunk, place = divmod(index, cache.layout.chunk_samples)
        chunks.setdefault(chunk, {})[place] = out[row]
    with cache.open_codes(shard) as file:
        for chunk, wanted in chunks.items():
            file.read_chunk(chunk, wanted)
    return out


def _encode_again(source: Cache, cache: Cache, stored: np.ndarray, samples: list[Sample]) -> tuple[np.ndarray, list[Sample]]:
    """Codes of `source` under `cache`'s codec; the samples say what is lost by both.

    The second rounding knows nothing of the first, so that their squared errors add up.
    """
    codes = np.zeros((len(stored), *cache.layout.sample_shape), cache.layout.stored_dtype)
    rows = [row for row, sample in enumerate(samples) if sample.status == OK]
    if not rows:
        return codes, samples
    embeddings = source.codec.decode(stored[rows])
    codes[rows] = cache.codec.encode(embeddings)
    error, energy = cache.codec.distortion(embeddings, codes[rows])
    clipped = cache.codec.clipped(codes[rows])
    found = list(samples)
    for index, row in enumerate(rows):
        before = samples[row].error or 0.0
        found[row] = replace(
            samples[row],
            codes_crc32c=crc32c(codes[row].tobytes()),
            error=float(f"{before + error[index]:.6g}"),
            energy=float(f"{energy[index]:.6g}"),
            clipped=int(clipped[index]),
        )
    return codes, found


def _link(cache: Cache, shard: int, places: Sequence[Place]) -> bool:
    """Commit a shard by linking another cache's files, unless it is not a whole shard of one, or files stand in the way."""
    source, first, _ = places[0]
    size = source.layout.shard_samples
    if first % size or not same_codec(source, cache) or source.layout != cache.layout:
        return False
    theirs = first // size
    if len(places) != len(source.shard_samples(theirs)) or source.has_images != cache.has_images:
        return False
    if any(place.cache is not source or place.number != first + row for row, place in enumerate(places)):
        return False
    record = source.record(theirs)
    names = dict(zip(source.shard_files(theirs), cache.shard_files(shard), strict=True))
    for old, new in names.items():
        path, entry = source.path / old, record.files[old]
        if hash_file(path, xxhash.xxh3_128()) != entry.xxh3_128:
            raise DamageError(
                f"{path}: does not hold what its commit record says. Run `sami-cache verify --repair` on {source.path} first."
            )
        if not _link_file(source, old, cache, new):
            with suppress(DamageError):
                if hash_file(cache.path / new, xxhash.xxh3_128()) == entry.xxh3_128:
                    continue
            return False
    samples = [replace(sample, label=place.label) for sample, place in zip(record.samples, places, strict=True)]
    files = {names[name]: entry for name, entry in record.files.items()}
    mine = replace(record, cache_id=cache.cache_id, shard=shard, files=files, samples=samples, digest="")
    publish(cache.record_path(shard), record_bytes(mine), cache.path / "tmp")
    return True


def _link_file(source: Cache, old: str, cache: Cache, new: str) -> bool:
    """Make file `new` of `cache` be `old` of `source`. False if the name is taken."""
    theirs, ours = local_only(source.path, "to join caches") / old, local_only(cache.path, "to join caches") / new
    try:
        os.link(theirs, ours)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _OTHER_DISK:
            raise
        return publish(ours, theirs.read_bytes(), cache.path / "tmp")
    fsync_directory(ours.parent)
    return True
