"""Committing shards and sealing a cache.

One shard is one commit: its files are published, read back and compared, then its record is published. Whoever publishes
the record first has committed the shard; a file without a record is not data.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sami_cache.errors import DamageError, DiskFullError, SamiCacheError
from sami_cache.store.cache import Cache, samples_table
from sami_cache.store.commits import OK, FileEntry, Record, Sample, merkle_root, record_bytes
from sami_cache.store.files import canonical_json, digest, move_aside, publish, seal
from sami_cache.store.images import locate_images, pack_images
from sami_cache.store.shards import ShardFile, crc32c, pack_shard


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What came of writing a shard."""

    record: Record
    won: bool
    """False if another writer committed the shard first; `record` is theirs then."""
    same: bool
    """Whether the committed codes are the ones that were to be written."""


def write_shard(
    cache: Cache, shard: int, embeddings: np.ndarray, samples: Sequence[Sample], images: Sequence[bytes | None]
) -> Commit:
    """Encode, publish and commit one shard.

    Args:
        embeddings: float32 [n, C, grid, grid], n the shard's samples; rows of samples whose status is not `ok` are ignored.
        samples: their key, label, source digest, sizes, view and status.
        images: the JPEG of each sample, None where it has none; views of one image repeat it, it is stored once.

    Raises:
        SamiCacheError naming the sample, if an embedding holds NaN or infinity or is the same everywhere.
        DamageError if what is read back is not what was written.
        DiskFullError, with nothing committed.
    """
    expected = (len(cache.shard_samples(shard)), cache.codec.channels, cache.grid, cache.grid)
    if embeddings.shape != expected or len(samples) != expected[0] or len(images) != expected[0]:
        raise SamiCacheError(f"shard {shard}: embeddings {embeddings.shape} of {len(samples)} samples, expected {expected}")
    good = np.array([sample.status == OK for sample in samples])
    check_embeddings(embeddings, samples, good)
    codes = cache.codec.encode(np.where(good[:, None, None, None], embeddings, 0))
    codes[~good] = 0
    names = cache.shard_files(shard)
    try:
        mine, codes, checksums = _publish_codes(cache, shard, embeddings, codes, good)
        files = {names[0]: mine}
        jpegs: dict[str, list[int]] = {}
        if cache.has_images:
            files[names[1]], jpegs = _publish_images(cache, names[1], samples, images)
        rows = _complete_samples(cache, embeddings, codes, samples, good, jpegs)
        record = Record(
            cache_id=cache.cache_id,
            shard=shard,
            files=files,
            content=digest(codes.data),
            chunk_crc32c=checksums,
            samples=rows,
        )
        won = publish(cache.record_path(shard), record_bytes(record), cache.path / "tmp")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(cache.path).free
        raise DiskFullError(
            f"{cache.path}: the disk is full ({free / 1e6:.0f} MB free) while writing shard {shard}, which was not committed. "
            "Make room, then run the same command again: it goes on with this shard."
        ) from error
    committed = cache.record(shard)
    return Commit(record=committed, won=won, same=committed.content == record.content)


def check_embeddings(embeddings: np.ndarray, samples: Sequence[Sample], good: np.ndarray) -> None:
    """Raise SamiCacheError naming the first good sample whose embedding holds NaN or infinity or is the same everywhere."""
    flat = embeddings.reshape(len(embeddings), -1)
    low, high = flat.min(1), flat.max(1)  # NaN and infinity survive min and max
    for index in np.flatnonzero(good & ~(np.isfinite(low) & np.isfinite(high) & (low < high))).tolist():
        wrong = "is the same everywhere" if low[index] == high[index] else "holds NaN or infinity"
        raise SamiCacheError(
            f"the teacher's embedding of {samples[index].key!r} {wrong}; it was not stored. Check the teacher's weights, "
            "and its precision (--precision float32)."
        )


def _publish_codes(
    cache: Cache, shard: int, embeddings: np.ndarray, codes: np.ndarray, good: np.ndarray
) -> tuple[FileEntry, np.ndarray, list[int]]:
    """Publish the shard file, or adopt the intact one that another writer of the same shard has left."""
    path = cache.path / cache.shard_files(shard)[0]
    packed, checksums = pack_shard(codes, cache.layout)
    if not publish(path, packed, cache.path / "tmp"):
        # Either a writer died between file and record, or one is just about to commit. Its file must then stay as it is, so
        # it is adopted if it is whole and holds these embeddings; otherwise it is no shard and makes way.
        adopted = path.read_bytes()
        if adopted != packed:
            found = _whole_shard(cache, shard, path, adopted, embeddings, codes, good)
            if found is None:
                move_aside(path, cache.path / "quarantine")
                return _publish_codes(cache, shard, embeddings, codes, good)
            (codes, checksums), packed = found, adopted
    with ShardFile(path, cache.layout, len(packed), checksums) as file:
        if not np.array_equal(file.read(len(codes)), codes):
            raise DamageError(
                f"{path}: read back, it does not hold the codes that were written. Check the disk and the memory."
            )
    return FileEntry(size=len(packed), blake3=digest(packed)), codes, checksums


def _whole_shard(
    cache: Cache, shard: int, path: Path, data: bytes, embeddings: np.ndarray, codes: np.ndarray, good: np.ndarray
) -> tuple[np.ndarray, list[int]] | None:
    """The codes and chunk checksums of a shard file that has no record, if it is intact and holds these embeddings."""
    count = -(-len(codes) // cache.layout.chunk_samples)
    try:
        with ShardFile(path, cache.layout, len(data), [0] * count) as file:
            spans = [(int(offset), int(size)) for offset, size in file.index[:count]]
            file.checksums = [crc32c(data[offset : offset + size - 4]) for offset, size in spans]
            found, checksums = file.read(len(codes)), file.checksums
    except DamageError:
        return None
    ours, _ = cache.codec.distortion(embeddings[good], codes[good])
    theirs, _ = cache.codec.distortion(embeddings[good], found[good])
    # Another device or batch size moves a few codes by one; another image or teacher does not come near.
    close = bool(np.all(theirs <= 2 * ours + 1e-3)) and not found[~good].any()
    return (found, checksums) if close else None


def _publish_images(
    cache: Cache, name: str, samples: Sequence[Sample], images: Sequence[bytes | None]
) -> tuple[FileEntry, dict[str, list[int]]]:
    path = cache.path / name
    pairs = zip(samples, images, strict=True)
    table = {sample.key: (sample.source or "", jpeg) for sample, jpeg in pairs if jpeg is not None}
    data = pack_images(table)
    if not publish(path, data, cache.path / "tmp"):
        adopted = path.read_bytes()
        if adopted != data:
            try:
                located = locate_images(adopted)
            except (pa.ArrowInvalid, ValueError, OSError):
                located = {}
            if {key: source for key, (source, _) in located.items()} != {key: source for key, (source, _) in table.items()}:
                move_aside(path, cache.path / "quarantine")
                return _publish_images(cache, name, samples, images)
            data = adopted
    entry = FileEntry(size=len(data), blake3=digest(data))
    return entry, {key: place for key, (_, place) in locate_images(data).items()}


def _complete_samples(
    cache: Cache,
    embeddings: np.ndarray,
    codes: np.ndarray,
    samples: Sequence[Sample],
    good: np.ndarray,
    jpegs: dict[str, list[int]],
) -> list[Sample]:
    error, energy = cache.codec.distortion(embeddings[good], codes[good])
    clipped = cache.codec.clipped(codes)
    rows, measured = [], iter(zip(error, energy, strict=True))
    for index, sample in enumerate(samples):
        values: dict[str, Any] = vars(sample) | {"jpeg": jpegs.get(sample.key)}
        if good[index]:
            lost, power = next(measured)
            values |= {
                "codes_crc32c": crc32c(codes[index].tobytes()),
                # Six digits say all there is to say; more would be the rounding of the last float operation.
                "error": float(f"{lost:.6g}"),
                "energy": float(f"{power:.6g}"),
                "clipped": int(clipped[index]),
            }
        rows.append(Sample(**values))
    return rows


def seal_cache(cache: Cache) -> dict[str, Any]:
    """Write manifest.parquet and ROOT.json once every shard is committed; returns the root's fields.

    Safe to repeat. A manifest or root of other content (after a repair that changed a shard) is moved to quarantine first.
    Raises SamiCacheError naming the shards that are missing.
    """
    missing = sorted(set(range(cache.shards)) - set(cache.committed()))
    if missing:
        raise SamiCacheError(
            f"{cache.path}: {len(missing)} of {cache.shards} shards are not committed (the first: {missing[0]}); run the same "
            "`sami-cache extract` command to finish them."
        )
    records = list(cache.records())
    sink = BytesIO()
    pq.write_table(samples_table([(record.shard, record.samples) for record in records]), sink, compression="zstd")
    manifest = sink.getvalue()
    ok = sum(sample.status == OK for record in records for sample in record.samples)
    root = {
        "cache_id": cache.cache_id,
        "root": merkle_root(cache.cache_id, [record.digest for record in records]),
        "content_root": merkle_root(cache.cache_id, [record.content for record in records]),
        "shards": len(records),
        "samples": cache.samples,
        "ok": ok,
        "failed": cache.samples - ok,
        "manifest": {"size": len(manifest), "blake3": digest(manifest)},
    }
    for path, data in (
        (cache.path / "manifest.parquet", manifest),
        (cache.path / "ROOT.json", canonical_json(seal(root))),
    ):
        if path.exists() and path.read_bytes() != data:
            move_aside(path, cache.path / "quarantine")
        publish(path, data, cache.path / "tmp")
    return root


def quarantine_shard(cache: Cache, shard: int) -> list[Path]:
    """Move a shard's record and files to quarantine/, so that it is to be extracted again; returns where they are now.

    The record goes first: from then on the shard is uncommitted, whatever interrupts the rest.
    """
    cache.record.cache_clear()
    paths = [cache.record_path(shard), *(cache.path / name for name in cache.shard_files(shard))]
    return [move_aside(path, cache.path / "quarantine") for path in paths if os.path.lexists(path)]
