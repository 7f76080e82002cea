"""Commit records: one immutable, self-verifying JSON file per shard, and the roots over all of them.

A shard exists once its record exists. The record names the shard's files with their sizes and digests and says of every
sample where it came from. Nothing in it depends on when or where it was made, so two runs of a deterministic teacher
write the same records.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import xxhash
from blake3 import blake3

from sami_cache.errors import DamageError
from sami_cache.store.files import as_damage, canonical_json, check_seal, digest, parse_sealed_json, seal
from sami_cache.store.places import AnyPath

OK = "ok"


@dataclass(kw_only=True)
class Sample:
    """One row of a record. What the caller of `Cache.write_shard` does not know is filled in there."""

    key: str
    label: int | None = None
    source: str | None = None
    """BLAKE3 of the encoded source image; None if it could not be read."""
    width: int | None = None
    """Of the decoded, upright source image, in pixels."""
    height: int | None = None
    view: list[float] | None = None
    """Replay caches: [x0, y0, x1, y1, flip], the box in [0, 1] and the flip as 0 or 1."""
    status: str = OK
    """`ok`, or in a few words why this sample has no embedding (its codes are zeros then)."""
    codes_crc32c: int | None = None
    """Of the sample's uncompressed codes."""
    error: float | None = None
    """Relative squared error of the codec on this sample."""
    energy: float | None = None
    """Mean square of the embedding about the codec's mean, relative to the codec's variance."""
    clipped: int | None = None
    """How many codes lie at the end of their range."""
    jpeg: list[int] | None = None
    """Where the image lies in the shard's image file: [offset, size, crc32c]."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file holds."""

    size: int
    blake3: str
    xxh3_128: str
    """Finds accidents at the speed of memory; it stops nobody who means harm, for which there is the BLAKE3."""

    def __post_init__(self) -> None:
        """Raises ValueError for what is neither a size nor a digest."""
        digests = len(bytes.fromhex(self.blake3)), len(bytes.fromhex(self.xxh3_128))
        if not isinstance(self.size, int) or self.size < 0 or digests != (32, 16):
            raise ValueError(f"size {self.size!r}, blake3 {self.blake3!r}, xxh3_128 {self.xxh3_128!r}")

    @classmethod
    def of(cls, data: bytes | memoryview) -> "FileEntry":
        return cls(size=len(data), blake3=digest(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))

    def describes(self, data: bytes | memoryview) -> bool:
        """Whether these are the bytes."""
        return len(data) == self.size and digest(data) == self.blake3


@dataclass(frozen=True, kw_only=True)
class Record:
    """A commit record."""

    cache_id: str
    shard: int
    files: dict[str, FileEntry]
    """By path relative to the cache: the shard of `codes`, and `images/...` if the cache has images."""
    content: str
    """BLAKE3 of the shard's uncompressed codes."""
    chunk_crc32c: list[int]
    samples: list[Sample]
    digest: str = ""
    """The record's own BLAKE3, set when it is read back."""


# The columns of a record, and with the shard's number and its record's digest in front, of the manifest.
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int64()),
        ("source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("view", pa.list_(pa.float64())),
        ("status", pa.string()),
        ("codes_crc32c", pa.int64()),
        ("error", pa.float64()),
        ("energy", pa.float64()),
        ("clipped", pa.int64()),
        ("jpeg", pa.list_(pa.int64())),
    ]
)
TABLE_SCHEMA = pa.schema([("shard", pa.int32()), ("record", pa.string()), *_SCHEMA])
_COLUMNS = _SCHEMA.names


def samples_table(record: Record) -> pa.Table:
    """The samples of a record: one row each, columns `shard`, `record` (its digest) and those of `Sample`."""
    count = len(record.samples)
    columns: dict[str, list[Any]] = {name: [getattr(sample, name) for sample in record.samples] for name in _COLUMNS}
    return pa.table({"shard": [record.shard] * count, "record": [record.digest] * count, **columns}, schema=TABLE_SCHEMA)


def record_bytes(record: Record) -> bytes:
    """The record as it is stored; samples are columns, so that a name is written once."""
    value: dict[str, Any] = {
        "cache_id": record.cache_id,
        "shard": record.shard,
        "files": {name: asdict(entry) for name, entry in record.files.items()},
        "content": record.content,
        "chunk_crc32c": record.chunk_crc32c,
        "samples": {name: [getattr(sample, name) for sample in record.samples] for name in _COLUMNS},
    }
    return canonical_json(seal(value))


def parse_record(data: bytes, path: AnyPath | str, *, cache_id: str, shard: int) -> Record:
    """Read a record. Raises DamageError if it is damaged, or is another cache's or another shard's."""
    value = parse_sealed_json(data, path)
    _check_owner(value, path, cache_id, shard)
    with as_damage(path, "not a commit record of this format"):
        columns = value["samples"]
        rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
        record = Record(
            cache_id=cache_id,
            shard=shard,
            files={name: FileEntry(**entry) for name, entry in value["files"].items()},
            content=value["content"],
            chunk_crc32c=value["chunk_crc32c"],
            samples=[Sample(**dict(zip(_COLUMNS, row, strict=True))) for row in rows],
            digest=value["blake3"],
        )
        _check_types(record)
    return record


_STATUS = b'"status":'


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a verification needs of a record: a tenth of the work of building it whole."""

    digest: str
    content: str
    files: dict[str, FileEntry]
    chunks: int
    statuses: list[str]


def outline_record(data: bytes, path: AnyPath | str, *, cache_id: str, shard: int) -> Outline:
    """Read the parts of a record that bind its files. Raises DamageError if a byte is not as it was sealed."""
    check_seal(data, path)
    with as_damage(path, "not a commit record of this format"):
        # In canonical JSON the names stand in order, and within a string a quote is escaped: the samples' columns, nine tenths
        # of it, can be left unread.
        head, _, tail = data.partition(b',"samples":')
        value = json.loads(head + b"}") | json.loads(b"{" + data[data.rindex(b'"shard":') :])
        _check_owner(value, path, cache_id, shard)
        statuses, _ = json.JSONDecoder().raw_decode(tail[tail.index(_STATUS) + len(_STATUS) :].decode("ascii"))
        if not isinstance(statuses, list):
            raise TypeError("status")
        files = {name: FileEntry(**entry) for name, entry in value["files"].items()}
        _check_digest(value["content"])
        return Outline(
            digest=value["blake3"],
            content=value["content"],
            files=files,
            chunks=len(value["chunk_crc32c"]),
            statuses=statuses,
        )


def _check_digest(text: str) -> None:
    """Raises for what is no BLAKE3 digest."""
    if len(bytes.fromhex(text)) != 32:
        raise ValueError(f"digest {text!r}")


def _check_owner(value: dict[str, Any], path: AnyPath | str, cache_id: str, shard: int) -> None:
    for name, expected in (("cache_id", cache_id), ("shard", shard)):
        if value.get(name) != expected:
            raise DamageError(f"{path}: {name} is {value.get(name)!r}, expected {expected!r}. The file belongs elsewhere.")


def _check_types(record: Record) -> None:
    """Raises for values of another type or out of bounds, wherever they would mislead a reader."""
    _check_digest(record.content)
    samples_table(record)
    room = max((entry.size for name, entry in record.files.items() if name.startswith("images/")), default=0)
    integers = list(record.chunk_crc32c)
    for sample in record.samples:
        if not isinstance(sample.key, str) or not isinstance(sample.status, str):
            raise TypeError("a sample without key or status")
        if sample.jpeg is not None:
            offset, size, checksum = sample.jpeg
            integers += [offset, size, checksum, room - offset - size]
        if sample.view is not None and len(sample.view) != 5:
            raise ValueError(f"view {sample.view}")
    if not all(isinstance(value, int) and value >= 0 for value in integers):
        raise ValueError("an offset, size or checksum out of bounds")


def root_fields(
    cache_id: str, records: Sequence[tuple[str, str]], samples: int, failed: int, manifest: FileEntry
) -> dict[str, Any]:
    """What ROOT.json says of a cache.

    Args:
        records: (digest, content) of every commit record, in order.
    """
    return {
        "cache_id": cache_id,
        "root": merkle_root(cache_id, [digest for digest, _ in records]),
        "content_root": merkle_root(cache_id, [content for _, content in records]),
        "shards": len(records),
        "samples": samples,
        "ok": samples - failed,
        "failed": failed,
        "manifest": asdict(manifest),
    }


def merkle_root(cache_id: str, leaves: Sequence[str]) -> str:
    """BLAKE3 Merkle root over hexadecimal digests, one per shard in order, bound to the cache.

    Leaves, inner nodes and the root are hashed with different first bytes, so that none can pass for another (RFC 6962,
    section 2.1); an odd node moves up unchanged.
    """
    level = [blake3(b"\x00" + bytes.fromhex(leaf)).digest() for leaf in leaves]
    while len(level) > 1:
        paired = [blake3(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    return blake3(b"\x02" + bytes.fromhex(cache_id) + len(leaves).to_bytes(8, "big") + b"".join(level)).hexdigest()
