"""Committing shards and sealing a cache.

One shard is one commit: its files are published, read back and compared, then its record is published. Whoever publishes
the record first has committed the shard; a file without a record is not data.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from blake3 import blake3

from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.codecs import Codec
from sami_cache.store.commits import OK, TABLE_SCHEMA, FileEntry, Record, Sample, record_bytes, root_fields, samples_table
from sami_cache.store.files import (
    canonical_json,
    digest,
    disk_full_as_error,
    exists,
    hash_file,
    make_hold,
    move_aside,
    publish,
    put_back,
    read_file,
    seal,
)
from sami_cache.store.images import locate_images, pack_images
from sami_cache.store.places import AnyPath, RemotePath
from sami_cache.store.shards import MAX_SHARD_BYTES, ShardFile, ShardLayout, crc32c, pack_shard, parse_index

ROW_GROUP = 1 << 17
"""Rows of the manifest that are packed together: 35 MB before they are."""
_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What came of writing a shard."""

    record: Record
    won: bool
    """False if another writer committed the shard first; `record` is theirs then."""
    same: bool
    """Whether the committed codes are the ones that were to be written."""


class _Overtaken(Exception):
    """Another writer has committed this shard meanwhile."""


@dataclass
class _Known:
    """What a writer has seen the shard's files hold, by name."""

    held: dict[str, list[bytes]] = field(default_factory=dict)
    displaced: bool = False
    """Whether it has moved a file aside that another may have committed since."""


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
    codes = np.zeros((len(good), *cache.layout.sample_shape), cache.layout.stored_dtype)
    codes[good] = cache.codec.encode(_only(embeddings, good))

    def close(found: np.ndarray) -> bool:
        usable = _only(embeddings, good)
        ours, _ = cache.codec.distortion(usable, _only(codes, good))
        theirs, _ = cache.codec.distortion(usable, _only(found, good))
        # Another device or batch size moves a few codes by one; another image or teacher does not come near.
        return bool(np.all(theirs <= 2 * ours + 1e-3)) and not found[~good].any()

    def complete(stored: np.ndarray, jpegs: dict[str, list[int]]) -> list[Sample]:
        return complete_samples(cache.codec, embeddings, stored, samples, good, jpegs)

    return _commit(cache, shard, codes, samples, images, close, complete)


def write_codes(
    cache: Cache, shard: int, codes: np.ndarray, samples: Sequence[Sample], images: Sequence[bytes | None]
) -> Commit:
    """Publish and commit one shard whose codes are known, those of another cache with the same codec for instance.

    Args:
        codes: [n, kept, grid / block, grid / block] of the layout's dtype.
        samples: complete but for the places of their images.
        images: as `write_shard` has them.

    Raises what `write_shard` raises.
    """

    def complete(_: np.ndarray, jpegs: dict[str, list[int]]) -> list[Sample]:
        return [replace(sample, jpeg=jpegs.get(sample.key)) for sample in samples]

    return _commit(cache, shard, codes, samples, images, lambda found: np.array_equal(found, codes), complete)


def _commit(
    cache: Cache,
    shard: int,
    codes: np.ndarray,
    samples: Sequence[Sample],
    images: Sequence[bytes | None],
    close: Callable[[np.ndarray], bool],
    complete: Callable[[np.ndarray, dict[str, list[int]]], list[Sample]],
) -> Commit:
    """Publish a shard's files, read them back, and publish its record.

    Args:
        close: whether codes that another writer left there will do.
        complete: the record's samples, for the codes and the images' places that are there in the end.
    """
    names = cache.shard_files(shard)
    won, content = False, digest(codes.data.cast("B"))
    known = _Known()
    with suppress(_Overtaken), disk_full_as_error(cache.path, f"writing shard {shard}, which was not committed"):
        _check_not_committed(cache, shard)
        mine, codes, checksums = _publish_codes(cache, shard, codes, close, known)
        files, jpegs = {names[0]: mine}, {}
        if cache.has_images:
            files[names[1]], jpegs = _publish_images(cache, shard, samples, images, known)
        content = digest(codes.data.cast("B"))
        record = Record(
            cache_id=cache.cache_id,
            shard=shard,
            files=files,
            content=content,
            chunk_crc32c=checksums,
            samples=complete(codes, jpegs),
        )
        won = publish(cache.record_path(shard), record_bytes(record), cache.path / "tmp")
    committed = cache.record(shard)
    if won or known.displaced:
        with disk_full_as_error(cache.path, f"settling shard {shard}"):
            _enforce(cache, committed, known)
    return Commit(record=committed, won=won, same=committed.content == content)


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


def _check_not_committed(cache: Cache, shard: int) -> None:
    if exists(cache.record_path(shard)):
        raise _Overtaken


def _enforce(cache: Cache, record: Record, known: _Known) -> None:
    """Have the shard's files be those that its record names, if we know what they hold.

    The record decides. A writer that disagrees may have moved a file aside before it could see the record that names it, so
    the winner looks again, and so does whoever moved something and then lost.
    """
    for name, entry in record.files.items():
        path = cache.path / name
        with suppress(DamageError):
            if hash_file(path, xxhash.xxh3_128()) == entry.xxh3_128:
                continue
        for data in known.held.get(name, []):
            if entry.describes(data):
                make_hold(path, data, cache.path)


def _publish_or_adopt(
    cache: Cache, shard: int, name: str, data: bytes, adoptable: Callable[[bytes], bool], known: _Known
) -> bytes:
    """Make the shard's file `name` exist; returns what it holds: `data`, or what was there if that is adoptable.

    A file without a record was left by a writer that died, or belongs to one that is just about to commit. The latter must
    stay as it is, so a whole one is adopted; anything else makes way.
    """
    path, quarantine = cache.path / name, cache.path / "quarantine"
    held = known.held.setdefault(name, [])
    held.append(data)
    while not publish(path, data, cache.path / "tmp"):
        try:
            found = read_file(path, at_most=MAX_SHARD_BYTES)
        except DamageError:  # no file, or one that another writer has moved away just now
            found = b""
        held.append(found)
        if found == data or adoptable(found):
            return found
        _check_not_committed(cache, shard)
        known.displaced = True
        if isinstance(path, RemotePath):  # an object is replaced in one step, and there is no moment in which it is gone
            held += [read_file(place, at_most=MAX_SHARD_BYTES) for place in make_hold(path, data, cache.path) or ()]
            _check_not_committed(cache, shard)
            return data
        with suppress(FileNotFoundError):
            moved = move_aside(path, quarantine)
            overtaken = exists(cache.record_path(shard))
            with suppress(DamageError):
                held.append(read_file(moved, at_most=MAX_SHARD_BYTES))
                if overtaken or held[-1] != found:
                    # Between the look and the move another has committed it, or put a whole file in its place.
                    put_back(moved, path)
            if overtaken:
                raise _Overtaken
    return data


def _publish_codes(
    cache: Cache, shard: int, codes: np.ndarray, close: Callable[[np.ndarray], bool], known: _Known
) -> tuple[FileEntry, np.ndarray, list[int]]:
    """Publish or adopt the shard file; returns its size and digest, the codes read back from it, and its chunks' checksums."""
    name = cache.shard_files(shard)[0]
    path = cache.path / name
    packed, checksums = pack_shard(codes, cache.layout)

    def read(data: bytes) -> tuple[np.ndarray, list[int]]:
        stated = checksums if data == packed else _chunk_checksums(data, cache.layout, len(checksums), path)
        with ShardFile(path, cache.layout, len(data), stated) as file:
            return file.read(len(codes)), stated

    def adoptable(data: bytes) -> bool:
        try:
            found, _ = read(data)
        except DamageError:
            return False
        return close(found)

    for _ in range(_ATTEMPTS):
        data = _publish_or_adopt(cache, shard, name, packed, adoptable, known)
        # Unless a writer that disagrees has put its own there meanwhile, this reads what was written.
        with suppress(DamageError):
            stored, checksums = read(data)
            if data != packed or np.array_equal(stored, codes):
                return FileEntry.of(data), stored, checksums
        _check_not_committed(cache, shard)
    raise DamageError(f"{path}: read back, it does not hold the codes that were written. Check the disk and the memory.")


def _chunk_checksums(data: bytes, layout: ShardLayout, count: int, path: AnyPath) -> list[int]:
    """The crc32c of the first `count` chunks of a shard file. Raises DamageError."""
    index = parse_index(data[-layout.index_bytes :], layout, len(data) - layout.index_bytes, str(path))
    return [crc32c(data[offset : offset + size - 4]) for offset, size in index[:count].tolist()]


def _publish_images(
    cache: Cache, shard: int, samples: Sequence[Sample], images: Sequence[bytes | None], known: _Known
) -> tuple[FileEntry, dict[str, list[int]]]:
    """Publish or adopt the image file; returns its size and digest, and where each key's image lies in it."""
    pairs = zip(samples, images, strict=True)
    table = {sample.key: (sample.source or "", jpeg) for sample, jpeg in pairs if jpeg is not None}
    sources = {key: source for key, (source, _) in table.items()}

    def adoptable(data: bytes) -> bool:
        try:
            return {key: source for key, (source, _) in locate_images(data).items()} == sources
        except (pa.ArrowException, ValueError, OSError):
            return False

    data = _publish_or_adopt(cache, shard, cache.shard_files(shard)[1], pack_images(table), adoptable, known)
    entry = FileEntry.of(data)
    return entry, {key: place for key, (_, place) in locate_images(data).items()}


def _only(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The good rows; a shard's embeddings are not copied for nothing."""
    return values if good.all() else values[good]


def complete_samples(
    codec: Codec,
    embeddings: np.ndarray,
    codes: np.ndarray,
    samples: Sequence[Sample],
    good: np.ndarray,
    jpegs: dict[str, list[int]],
) -> list[Sample]:
    """The samples with what their codes lost, their checksums and the places of their images, as a record holds them."""
    error, energy = codec.distortion(_only(embeddings, good), _only(codes, good))
    clipped = codec.clipped(codes)
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
    records, failed = [], 0

    def tables() -> Iterator[pa.Table]:
        nonlocal failed
        for shard in range(cache.shards):  # one at a time: as objects, all samples of a big cache would fill the memory
            record = cache._read_record(shard)
            records.append((record.digest, record.content))
            failed += sum(sample.status != OK for sample in record.samples)
            yield samples_table(record)

    manifest = pack_manifest(tables())
    root = root_fields(cache.cache_id, records, cache.samples, failed, FileEntry.of(manifest))
    with suppress(DamageError):
        sealed = cache.root()
        same = sealed and all(sealed[name] == value for name, value in root.items() if name != "manifest")
        if sealed and same and _says_the_same(cache, sealed, manifest):
            return {**root, "manifest": sealed["manifest"]}
    with disk_full_as_error(cache.path, "sealing it"):
        make_hold(cache.path / "manifest.parquet", manifest, cache.path)
        make_hold(cache.path / "ROOT.json", canonical_json(seal(root)), cache.path)
    return root


def _says_the_same(cache: Cache, sealed: dict[str, Any], manifest: memoryview) -> bool:
    """Whether the manifest that the cache is sealed with has the rows of `manifest`. Raises DamageError if it is damaged."""
    path = cache.path / "manifest.parquet"
    if sealed["manifest"] == asdict(FileEntry.of(manifest)):
        return hash_file(path, blake3()) == sealed["manifest"]["blake3"]
    # Another version of pyarrow writes the same table in other bytes: that is no reason to seal again. A column at a time, for
    # two whole tables of a big cache would fill the memory.
    ours = pq.ParquetFile(pa.BufferReader(manifest))
    same = all(cache.manifest(sealed, [name]).equals(ours.read([name])) for name in TABLE_SCHEMA.names)
    return same and pq.read_schema(BytesIO(read_file(path, at_most=MAX_SHARD_BYTES))).equals(ours.schema_arrow)


def pack_manifest(tables: Iterable[pa.Table]) -> memoryview:
    """manifest.parquet of the rows of `tables`, never more of which are held at a time than a row group has."""
    sink = BytesIO()
    with pq.ParquetWriter(sink, TABLE_SCHEMA, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            if sum(part.num_rows for part in waiting) >= ROW_GROUP:
                rows = pa.concat_tables(waiting)
                whole = rows.num_rows // ROW_GROUP * ROW_GROUP
                writer.write_table(rows.slice(0, whole), ROW_GROUP)
                waiting = [rows.slice(whole)]
        if any(part.num_rows for part in waiting):
            writer.write_table(pa.concat_tables(waiting), ROW_GROUP)
    return sink.getbuffer()
