"""The cache: a Zarr v3 group whose shards are committed one by one. `docs/format.md` is the contract.

Opening, creating, and reading; `writing.py` commits shards and seals.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sami_cache.errors import DamageError, IdentityError, SamiCacheError
from sami_cache.store.codecs import Codec
from sami_cache.store.commits import Record, Sample, parse_record
from sami_cache.store.files import canonical_json, digest, fsync_directory, is_sealed, parse_sealed_json, seal, write_durably
from sami_cache.store.shards import ShardFile, ShardLayout, array_metadata, crc32c

FORMAT = 1
TARGET_SHARD_BYTES = 26_000_000
TARGET_CHUNK_BYTES = 820_000
_CODEC_ARRAYS = {"basis": ("kept", "channel"), "mean": ("channel",), "step": ("kept",)}
_FLOAT32_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def choose_layout(codec: Codec, grid: int, samples: int, shard_samples: int | None = None) -> ShardLayout:
    """The layout for `samples` samples: shards of about 26 MB before compression, chunks of about 0.8 MB.

    512 and 16 samples at 50 KB, 32 and 1 at 1 MB. Small sets get smaller shards, eight at least where that leaves 16 samples
    each, so that an interruption costs little and shuffling has shards to choose from.

    Args:
        shard_samples: a power of two that overrides the choice.
    """
    if shard_samples is not None and (shard_samples < 1 or shard_samples & (shard_samples - 1)):
        raise SamiCacheError(f"--shard-samples {shard_samples}: must be a power of two, such as 64 or 512.")
    shape = (codec.kept, grid, grid)
    size = int(np.prod(shape)) * np.dtype(codec.dtype).itemsize
    chunk = min(_power_of_two(TARGET_CHUNK_BYTES / size), 64)
    chosen = shard_samples or min(_power_of_two(TARGET_SHARD_BYTES / size), max(16, _power_of_two(samples / 8)))
    return ShardLayout(sample_shape=shape, dtype=codec.dtype, shard_samples=chosen, chunk_samples=min(chunk, chosen))


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def identity_difference(cache: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `field: the cache has A, you ask for B`, one per field that differs."""
    lines = []
    for name in sorted(cache.keys() | asked.keys()):
        mine, other = cache.get(name), asked.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            lines += identity_difference(mine, other, f"{prefix}{name}.")
        elif mine != other:
            lines.append(f"{prefix}{name}: the cache has {mine!r}, you ask for {other!r}")
    return lines


class Cache:
    """An opened cache. Cheap to open: nothing that grows with the number of samples is read until it is asked for."""

    def __init__(self, path: Path | str) -> None:
        """Open `path`. Raises SamiCacheError where there is no cache, DamageError where its head is not what was written."""
        self.path = Path(path)
        self.attributes = read_attributes(self.path)
        layout = self.attributes["layout"]
        parameters = self.attributes["codec"]
        self.samples: int = self.attributes["samples"]
        self.identity: dict[str, Any] = self.attributes["identity"]
        self.cache_id: str = self.attributes["cache_id"]
        self.grid: int = self.identity["grid"]
        self.layout = ShardLayout(
            sample_shape=(parameters["kept"], self.grid, self.grid),
            dtype=parameters["dtype"],
            shard_samples=layout["shard_samples"],
            chunk_samples=layout["chunk_samples"],
        )
        self._process = os.getpid()
        self.record = lru_cache(maxsize=64)(self._read_record)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.layout.shard_samples)

    @property
    def views(self) -> int:
        """Views per image: 0 for a dense cache."""
        return self.identity["view"].get("views", 0)

    @property
    def has_images(self) -> bool:
        return self.identity["images"] is not None

    def shard_samples(self, shard: int) -> range:
        """The sample numbers of a shard."""
        start = shard * self.layout.shard_samples
        return range(start, min(start + self.layout.shard_samples, self.samples))

    def shard_files(self, shard: int) -> list[str]:
        """The files of a shard, relative to the cache."""
        files = [f"codes/{self.layout.file_name(shard)}"]
        return [*files, f"images/{shard:06d}.arrow"] if self.has_images else files

    def record_path(self, shard: int) -> Path:
        return self.path / "commits" / f"{shard:06d}.json"

    def committed(self) -> list[int]:
        """The shards that have a commit record, in order."""
        names = (name[:-5] for name in os.listdir(self.path / "commits") if name.endswith(".json"))
        return sorted(shard for name in names if name.isdecimal() and (shard := int(name)) < self.shards)

    @cached_property
    def codec(self) -> Codec:
        """The fitted codec. Raises DamageError if its arrays are not the ones the cache was made with."""
        parameters = self.attributes["codec"]
        shapes = _codec_shapes(parameters["kept"], parameters["channels"])
        arrays = {}
        for name in _CODEC_ARRAYS:
            data = self.read_static(f"{name}/{'.'.join('0' for _ in shapes[name])}")
            arrays[name] = np.frombuffer(data[:-4], "<f4").reshape(shapes[name]).astype(np.float32)
        return Codec(
            name=parameters["name"],
            error=parameters["error"],
            dtype=parameters["dtype"],
            variance=parameters["variance"],
            spectrum=tuple(parameters["spectrum"]),
            fit_samples=parameters["fit_samples"],
            **arrays,
        )

    def read_static(self, name: str) -> bytes:
        """One of the files written at creation, checked against the digest in the head."""
        entry, path = self.attributes["files"][name], self.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamageError(f"{path}: missing") from None
        if len(data) != entry["size"] or digest(data) != entry["blake3"]:
            raise DamageError(f"{path}: its {len(data)} bytes are not the {entry['size']} the cache was made with")
        return data

    @cached_property
    def listing(self) -> pa.Table:
        """The images, in order: columns key (string) and label (int64 or null)."""
        return pq.read_table(BytesIO(self.read_static("listing.parquet")))

    def _read_record(self, shard: int) -> Record:
        path = self.record_path(shard)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamageError(
                f"{path}: missing. Shard {shard} was never committed, or its record is lost; the same `sami-cache extract` "
                "command extracts it."
            ) from None
        record = parse_record(data, path, cache_id=self.cache_id, shard=shard)
        if sorted(record.files) != sorted(self.shard_files(shard)) or len(record.samples) != len(self.shard_samples(shard)):
            raise DamageError(f"{path}: does not describe shard {shard} of this cache")
        return record

    def open_codes(self, shard: int) -> ShardFile:
        """The shard's file, its presence and size already checked. Raises DamageError."""
        self._check_process()
        record, name = self.record(shard), self.shard_files(shard)[0]
        return ShardFile(self.path / name, self.layout, record.files[name].size, record.chunk_crc32c)

    def read_codes(self, shard: int) -> np.ndarray:
        """All codes of a shard [n, kept, grid, grid], every byte checked. Raises DamageError."""
        with self.open_codes(shard) as file:
            return file.read(len(self.shard_samples(shard)))

    def read_embedding(self, sample: int) -> np.ndarray:
        """One sample, decoded: float32 [C, grid, grid]; only its chunk is read. Raises DamageError."""
        shard, index = divmod(sample, self.layout.shard_samples)
        chunk, place = divmod(index, self.layout.chunk_samples)
        out = np.empty(self.layout.chunk_shape, self.layout.stored_dtype)
        with self.open_codes(shard) as file:
            file.read_chunk(chunk, out)
        return self.codec.decode(out[place][None])[0]

    def read_jpegs(self, shard: int, indices: Sequence[int] | None = None) -> list[bytes | None]:
        """The JPEGs of samples of a shard (all by default), each checked; None where a sample has none. Raises DamageError."""
        self._check_process()
        record, (_, name) = self.record(shard), self.shard_files(shard)
        path = self.path / name
        jpegs: list[bytes | None] = []
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DamageError(f"{path}: missing. `sami-cache verify --repair` extracts it again.") from None
        try:
            for index in range(len(record.samples)) if indices is None else indices:
                sample = record.samples[index]
                if sample.jpeg is None:
                    jpegs.append(None)
                    continue
                offset, size, checksum = sample.jpeg
                data = os.pread(descriptor, size, offset)
                if len(data) != size or crc32c(data) != checksum:
                    raise DamageError(f"{path}: the image of {sample.key!r} does not match its crc32c")
                jpegs.append(data)
        finally:
            os.close(descriptor)
        return jpegs

    def records(self) -> Iterator[Record]:
        """All commit records, in order, read one at a time."""
        for shard in self.committed():
            yield self._read_record(shard)

    def root(self) -> dict[str, Any] | None:
        """What ROOT.json holds, None if the cache is not sealed. Raises DamageError."""
        path = self.path / "ROOT.json"
        if not path.exists():
            return None
        value = parse_sealed_json(path.read_bytes(), path)
        if value.get("cache_id") != self.cache_id:
            raise DamageError(f"{path}: is the root of another cache ({value.get('cache_id')})")
        return value

    def table(self) -> pa.Table:
        """One row a sample, columns `shard` and those of a record's samples: the manifest, or the records when unsealed."""
        root = self.root()
        if root is None:
            return samples_table([(record.shard, record.samples) for record in self.records()])
        path = self.path / "manifest.parquet"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamageError(f"{path}: missing") from None
        if digest(data) != root["manifest"]["blake3"]:
            raise DamageError(f"{path}: is not the manifest that ROOT.json names")
        return pq.read_table(BytesIO(data))

    def check_identity(self, asked: dict[str, Any]) -> None:
        """Raise IdentityError, listing the fields that differ, unless `asked` is what the cache was made with."""
        difference = identity_difference(self.identity, asked)
        if difference:
            raise IdentityError(
                f"{self.path} was made with other settings:\n  "
                + "\n  ".join(difference)
                + "\nRepeat the settings it has to continue it, or give another --cache to make a new one."
            )

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise SamiCacheError(
                f"{self.path}: this cache was opened before a fork. Open it again in the child, or start workers with the "
                "'spawn' method."
            )


_TYPES = {"label": pa.int64(), "width": pa.int32(), "height": pa.int32(), "codes_crc32c": pa.int64(), "clipped": pa.int64()}
_TYPES |= {"error": pa.float64(), "energy": pa.float64(), "view": pa.list_(pa.float64()), "jpeg": pa.list_(pa.int64())}


def samples_table(shards: Sequence[tuple[int, list[Sample]]]) -> pa.Table:
    """The samples of the given shards as one table."""
    columns: dict[str, pa.Array] = {"shard": pa.array([shard for shard, rows in shards for _ in rows], pa.int32())}
    for field in fields(Sample):
        values = [getattr(row, field.name) for _, rows in shards for row in rows]
        columns[field.name] = pa.array(values, _TYPES.get(field.name, pa.string()))
    return pa.table(columns)


def read_attributes(path: Path) -> dict[str, Any]:
    """The head of the cache at `path`, checked. Raises SamiCacheError if there is none, DamageError if it is damaged."""
    head = path / "zarr.json"
    try:
        data = head.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise SamiCacheError(
            f"{path}: there is no cache here (no zarr.json). `sami-cache extract --cache {path}` makes one; the default is "
            "`cache.zarr` or $SAMI_CACHE."
        ) from None
    try:
        value = json.loads(data)
        attributes = value["attributes"]["sami_cache"]
        intact = is_sealed(attributes) and canonical_json(_group_metadata(attributes)) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        intact, attributes = False, {}
    if not intact:
        raise DamageError(f"{head}: its content does not match the digest it carries; it is damaged or not a sami-cache.")
    if attributes["format"] != FORMAT:
        raise SamiCacheError(
            f"{head}: format {attributes['format']}, this program reads format {FORMAT}. Use a newer sami-cache for it."
        )
    return attributes


def _group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": {"sami_cache": attributes}}


def _codec_shapes(kept: int, channels: int) -> dict[str, tuple[int, ...]]:
    sizes = {"kept": kept, "channel": channels}
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in _CODEC_ARRAYS.items()}


def listing_digest(keys: Sequence[str], labels: Sequence[int | None]) -> str:
    """What stands for the images of a cache in its cache_id: their keys, labels and order."""
    return digest(canonical_json([list(keys), list(labels)]))


def create_cache(
    path: Path,
    *,
    identity: dict[str, Any],
    codec: Codec,
    layout: ShardLayout,
    keys: Sequence[str],
    labels: Sequence[int | None],
    class_names: Sequence[str] | None,
    provenance: dict[str, Any],
) -> Cache:
    """Create a cache, complete or not at all, and open it. If another process was first, theirs is opened.

    Args:
        identity: what must be equal for two caches to be the same kind; holds `grid`, `view` and `images` among others.
        keys, labels: of the images; a replay cache has identity["view"]["views"] samples an image.
        provenance: recorded, not compared: versions, hardware, where the images lay.

    Raises IdentityError if a cache of another identity is there, SamiCacheError if something else is.
    """
    files: dict[str, bytes] = {}
    samples = len(keys) * identity["view"].get("views", 1)
    files["codes/zarr.json"] = canonical_json(layout.metadata(samples))
    for name, shape in _codec_shapes(codec.kept, codec.channels).items():
        values = np.ascontiguousarray(getattr(codec, name), "<f4").tobytes()
        files[f"{name}/zarr.json"] = canonical_json(
            array_metadata(shape, "float32", shape, _FLOAT32_CODECS, _CODEC_ARRAYS[name])
        )
        files[f"{name}/{'.'.join('0' for _ in shape)}"] = values + crc32c(values).to_bytes(4, "little")
    sink = BytesIO()
    pq.write_table(
        pa.table({"key": pa.array(keys, pa.string()), "label": pa.array(labels, pa.int64())}), sink, compression="zstd"
    )
    files["listing.parquet"] = sink.getvalue()
    arrays = {name: digest(np.ascontiguousarray(getattr(codec, name), "<f4").tobytes()) for name in _CODEC_ARRAYS}
    essence = {
        "format": FORMAT,
        "identity": identity,
        "codec": {**codec.parameters(), "arrays": arrays},
        "layout": {"shard_samples": layout.shard_samples, "chunk_samples": layout.chunk_samples},
        "samples": samples,
        "listing": listing_digest(keys, labels),
    }
    attributes = {
        **essence,
        "cache_id": digest(canonical_json(essence)),
        "class_names": list(class_names) if class_names is not None else None,
        "files": {name: {"size": len(data), "blake3": digest(data)} for name, data in files.items()},
        "provenance": provenance,
    }
    files["zarr.json"] = canonical_json(_group_metadata(seal(attributes)))
    _publish_directory(path, files)
    cache = Cache(path)
    cache.check_identity(identity)
    return cache


def _publish_directory(path: Path, files: dict[str, bytes]) -> None:
    """Make the folder `path` with these files in one step, unless a cache is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    folders = {(building / name).parent for name in files} | {building / name for name in ("commits", "images", "tmp")}
    try:
        for folder in sorted(folders | {building}):
            folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_durably(building / name, data)
        for folder in sorted(folders | {building}, reverse=True):
            fsync_directory(folder)
        try:
            os.rename(building, path)
        except OSError as error:
            if not (path / "zarr.json").exists():
                raise SamiCacheError(
                    f"{path}: exists and is not a cache ({error.strerror}). Give another --cache, or move it away."
                ) from error
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
