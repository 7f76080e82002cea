"""The cache: a Zarr v3 group whose shards are committed one by one. `docs/format.md` is the contract.

Opening and reading; `creation.py` makes one, `writing.py` commits shards and seals.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from blake3 import blake3

from sami_cache.errors import DamageError, IdentityError, SamiCacheError
from sami_cache.store.codecs import CODECS, Codec
from sami_cache.store.commits import TABLE_SCHEMA, FileEntry, Outline, Record, outline_record, parse_record, samples_table
from sami_cache.store.files import (
    ASIDE,
    as_damage,
    canonical_json,
    digest,
    exists,
    names_in,
    parse_sealed_json,
    read_file,
    reading,
    sizes_below,
)
from sami_cache.store.head import (
    ESSENCE,
    STATIC_FILES,
    array_dtype,
    array_file,
    codec_shapes,
    identity_difference,
    metadata_files,
    read_attributes,
)
from sami_cache.store.images import ImageFile
from sami_cache.store.places import AnyPath, parse_place
from sami_cache.store.shards import ShardFile, ShardLayout
from sami_cache.store.tables import ParquetRows

TARGET_SHARD_BYTES = 34_000_000
TARGET_CHUNK_BYTES = 820_000
MAX_SHARDS = 1 << 20
MAX_VALUES = 1 << 24
"""Of one embedding: 64 MB as float32."""
_LISTED_AT_ONCE = 1 << 14


def choose_layout(codec: Codec, grid: int, samples: int, shard_samples: int | None = None) -> ShardLayout:
    """The layout for `samples` samples: shards of 17 to 34 MB before compression, chunks of about 0.8 MB.

    512 and 16 samples at 50 KB, 32 and 1 at 1 MB. Small sets get smaller shards, eight at least where that leaves 16 samples
    each, so that an interruption costs little and shuffling has shards to choose from.

    Args:
        shard_samples: a power of two that overrides the choice.
    """
    if shard_samples is not None and (shard_samples < 1 or shard_samples & (shard_samples - 1)):
        raise SamiCacheError(f"--shard-samples {shard_samples}: must be a power of two, such as 64 or 512.")
    shape = codec.sample_shape(grid)
    size = int(np.prod(shape)) * np.dtype(codec.dtype).itemsize
    if codec.channels * grid**2 > MAX_VALUES:
        raise SamiCacheError(
            f"--grid {grid}: an embedding of {codec.channels} channels has {codec.channels * grid**2} values then, the most is "
            f"{MAX_VALUES}. Choose a smaller grid."
        )
    chunk = min(_power_of_two(TARGET_CHUNK_BYTES / size), 64)
    chosen = shard_samples or choose_shard_samples(size, samples)
    try:
        layout = ShardLayout(sample_shape=shape, dtype=codec.dtype, shard_samples=chosen, chunk_samples=min(chunk, chosen))
    except ValueError as error:
        raise SamiCacheError(f"--shard-samples {chosen}: {error}.") from error
    if samples > MAX_SHARDS * chosen:
        raise SamiCacheError(f"--shard-samples {chosen}: more than {MAX_SHARDS} shards for {samples} samples; choose more.")
    return layout


def choose_shard_samples(size: int, samples: int) -> int:
    """Samples a shard, a power of two, where one takes `size` bytes before compression."""
    return min(_power_of_two(TARGET_SHARD_BYTES / size), max(16, _power_of_two(samples / 8)), 4096)


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


class Cache:
    """An opened cache. Cheap to open: nothing that grows with the number of samples is read until it is asked for."""

    def __init__(self, path: AnyPath | str) -> None:
        """Open `path`, a folder or a URL.

        Raises SamiCacheError where there is no cache, DamageError where its head is not what was written.
        """
        self.path = parse_place(path)
        self.attributes = read_attributes(self.path)
        with as_damage(self.path / "zarr.json", "not the head of a cache"):
            layout, codec = self.attributes["layout"], self.attributes["codec"]
            self.samples: int = self.attributes["samples"]
            self.identity: dict[str, Any] = self.attributes["identity"]
            self.cache_id: str = self.attributes["cache_id"]
            self.grid: int = self.identity["grid"]
            numbers = [codec[name] for name in ("kept", "channels", "directions", "block")]
            if not all(isinstance(number, int) and number > 0 for number in numbers) or self.grid % codec["block"]:
                raise ValueError(f"codec of sizes {numbers} in a grid of {self.grid}")
            if codec["directions"] > codec["channels"] or codec["channels"] * self.grid**2 > MAX_VALUES:
                raise ValueError(f"embeddings of {codec['channels']} channels, {self.grid} x {self.grid}")
            self.layout = ShardLayout(
                sample_shape=(codec["kept"], self.grid // codec["block"], self.grid // codec["block"]),
                dtype=codec["dtype"],
                shard_samples=layout["shard_samples"],
                chunk_samples=layout["chunk_samples"],
            )
            self.has_images: bool = self.identity["images"] is not None
            self.views: int = self.identity["view"].get("views", 0)
            """Views per image: 0 for a dense cache."""
            self.files = {name: FileEntry(**entry) for name, entry in self.attributes["files"].items()}
            if not isinstance(codec["error"], float | int | None):
                raise TypeError(f"error {codec['error']!r}")
            possible = 0 < self.samples <= MAX_SHARDS * self.layout.shard_samples and self.samples % max(1, self.views) == 0
            if not possible or self.files.keys() != STATIC_FILES:
                raise ValueError(f"{self.samples} samples, {self.views} views, files {sorted(self.files)}")
            if self.cache_id != digest(canonical_json({name: self.attributes[name] for name in ESSENCE})):
                raise ValueError(f"cache_id {self.cache_id}")
        self._process = os.getpid()
        self.record = lru_cache(maxsize=64)(self._read_record)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.layout.shard_samples)

    def shard_samples(self, shard: int) -> range:
        """The sample numbers of a shard."""
        start = shard * self.layout.shard_samples
        return range(start, min(start + self.layout.shard_samples, self.samples))

    def shard_files(self, shard: int) -> list[str]:
        """The files of a shard, relative to the cache."""
        files = [f"codes/{self.layout.file_name(shard)}"]
        return [*files, f"images/{shard:06d}.arrow"] if self.has_images else files

    def record_name(self, shard: int) -> str:
        """The file of a shard's commit record, relative to the cache."""
        return f"commits/{shard:06d}.json"

    def record_path(self, shard: int) -> AnyPath:
        return self.path / self.record_name(shard)

    def committed(self) -> list[int]:
        """The shards that have a commit record, in order."""
        with reading(self.path / "commits"):
            names = names_in(self.path / "commits")
        numbers = (int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal())
        return sorted(shard for shard in numbers if shard < self.shards and self.record_path(shard).name in names)

    def metadata_files(self) -> dict[str, bytes]:
        """The zarr.json of every array, by path relative to the cache: they follow from the head."""
        return metadata_files(self.layout, self.samples, self.attributes["codec"])

    @cached_property
    def codec(self) -> Codec:
        """The fitted codec. Raises DamageError if its arrays are not the ones the cache was made with."""
        codec = self.attributes["codec"]
        arrays = {}
        for name, shape in codec_shapes(codec).items():
            data = self.read_static(array_file(name))[:-4]
            with as_damage(self.path / name, "is not the array that the head names"):
                if digest(data) != codec["arrays"][name]:
                    raise ValueError(digest(data))
                dtype = np.dtype(array_dtype(name))
                arrays[name] = np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape).astype(dtype)
        with as_damage(self.path / "zarr.json", "codec"):
            if arrays["index"].min() < 0 or arrays["index"].max() >= codec["directions"] * codec["block"] ** 2:
                raise ValueError("index out of range")
            if not all(np.isfinite(array).all() for array in arrays.values()) or not (arrays["step"] > 0).all():
                raise ValueError("values that no codec has")
            if codec["name"] not in CODECS or not 0 < float(codec["variance"]) < np.inf:
                raise ValueError(f"{codec['name']!r} of variance {codec['variance']!r}")
            return Codec(
                name=codec["name"],
                error=codec["error"],
                dtype=codec["dtype"],
                variance=float(codec["variance"]),
                spectrum=tuple(codec["spectrum"]),
                fit_samples=codec["fit_samples"],
                **arrays,
            )

    def read_static(self, name: str) -> bytes:
        """One of the files written at creation, checked against the digest in the head. Raises DamageError."""
        return self._read_checked(name, self.files[name], "the cache was made with")

    def _read_checked(self, name: str, entry: FileEntry, whose: str) -> bytes:
        path = self.path / name
        data = read_file(path, at_most=max(entry.size, 1 << 26))
        if len(data) != entry.size or digest(data) != entry.blake3:
            raise DamageError(f"{path}: its {len(data)} bytes are not the {entry.size} {whose}")
        return data

    @cached_property
    def listing(self) -> pa.Table:
        """The images, in order: columns key (string) and label (int64 or null). Raises DamageError."""
        path = self.path / "listing.parquet"
        table = ParquetRows(path, self.read_static(path.name), self.samples // max(1, self.views)).read()
        with as_damage(path, "not a listing"):
            found = listing_digest(table["key"], table["label"])
        if found != self.attributes["listing"]:
            raise DamageError(f"{path}: is not the listing that the head names")
        return table

    def _read_record(self, shard: int) -> Record:
        path = self.record_path(shard)
        record = parse_record(read_file(path), path, cache_id=self.cache_id, shard=shard)
        self._check_shape(shard, sorted(record.files), len(record.samples), len(record.chunk_crc32c))
        return record

    def outline(self, shard: int) -> Outline:
        """The commit record of a shard, as far as it binds the shard's files. Raises DamageError."""
        path = self.record_path(shard)
        outline = outline_record(read_file(path), path, cache_id=self.cache_id, shard=shard)
        self._check_shape(shard, sorted(outline.files), len(outline.statuses), outline.chunks)
        return outline

    def _check_shape(self, shard: int, *shape: object) -> None:
        count = len(self.shard_samples(shard))
        if shape != (sorted(self.shard_files(shard)), count, -(-count // self.layout.chunk_samples)):
            raise DamageError(f"{self.record_path(shard)}: does not describe shard {shard} of this cache")

    def open_codes(self, shard: int) -> ShardFile:
        """The shard's file, its presence and size already checked. Raises DamageError."""
        self.check_process()
        record, name = self.record(shard), self.shard_files(shard)[0]
        return ShardFile(self.path / name, self.layout, record.files[name].size, record.chunk_crc32c)

    def read_codes(self, shard: int) -> np.ndarray:
        """All codes of a shard [n, kept, grid / block, grid / block], every byte checked. Raises DamageError."""
        with self.open_codes(shard) as file:
            return file.read(len(self.shard_samples(shard)))

    def read_embedding(self, sample: int) -> np.ndarray:
        """One sample, decoded: float32 [C, grid, grid]; only its chunk is read. Raises DamageError."""
        shard, index = divmod(sample, self.layout.shard_samples)
        chunk, place = divmod(index, self.layout.chunk_samples)
        out = np.empty((1, *self.layout.sample_shape), self.layout.stored_dtype)
        with self.open_codes(shard) as file:
            file.read_chunk(chunk, {place: out[0]})
        return self.codec.decode(out)[0]

    def read_jpegs(self, shard: int, indices: Sequence[int] | None = None) -> list[bytes | None]:
        """The JPEGs of samples of a shard (all by default), each checked; None where a sample has none. Raises DamageError."""
        self.check_process()
        record, (_, name) = self.record(shard), self.shard_files(shard)
        chosen = record.samples if indices is None else [record.samples[index] for index in indices]
        with ImageFile(self.path / name, record.files[name].size) as file:
            return [None if sample.jpeg is None else file.read(sample.jpeg, sample.key) for sample in chosen]

    def records(self) -> Iterator[Record]:
        """All commit records, in order, read one at a time."""
        for shard in self.committed():
            yield self._read_record(shard)

    def size_on_disk(self) -> int:
        """Bytes of all files of the cache, quarantine and temporary files left out."""
        sizes = sizes_below(self.path)
        return sum(size for name, size in sizes.items() if not name.startswith(ASIDE))

    def root(self) -> dict[str, Any] | None:
        """What ROOT.json holds, None if the cache is not sealed. Raises DamageError."""
        path = self.path / "ROOT.json"
        if not exists(path):
            return None
        value = parse_sealed_json(read_file(path), path)
        if value.get("cache_id") != self.cache_id:
            raise DamageError(f"{path}: is the root of another cache ({value.get('cache_id')})")
        with as_damage(path, "not the root of a cache"):
            FileEntry(**value["manifest"])
            if not all(isinstance(value[name], int) for name in ("shards", "samples", "ok", "failed")):
                raise TypeError("counts")
            if not all(len(bytes.fromhex(value[name])) == 32 for name in ("root", "content_root")):
                raise ValueError("roots")
        return value

    def manifest_rows(self, root: dict[str, Any]) -> ParquetRows:
        """The table that ROOT.json names, its bytes checked, its rows not decoded yet. Raises DamageError."""
        data = self._read_checked("manifest.parquet", FileEntry(**root["manifest"]), "that ROOT.json names")
        rows = ParquetRows(self.path / "manifest.parquet", data, self.samples)
        if not rows.schema.equals(TABLE_SCHEMA):
            raise DamageError(f"{rows.path}: has other columns than a manifest")
        return rows

    def manifest(self, root: dict[str, Any], columns: list[str] | None = None) -> pa.Table:
        """The table that ROOT.json names, or some of its columns. Raises DamageError."""
        return self.manifest_rows(root).read(columns)

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """One row a sample, columns `shard`, `record` and those of `Sample`: the manifest, or the records when unsealed.

        Args:
            columns: only these, in this order; all of them take a quarter of a kilobyte a sample.
        """
        root, names = self.root(), columns or TABLE_SCHEMA.names
        if root is not None:
            return self.manifest(root, columns)
        tables = (samples_table(record).select(names) for record in self.records())
        return pa.concat_tables([TABLE_SCHEMA.empty_table().select(names), *tables])

    def check_identity(self, asked: dict[str, Any]) -> None:
        """Raise IdentityError, listing the fields that differ, unless `asked` is what the cache was made with."""
        difference = identity_difference(self.identity, asked)
        if difference:
            raise IdentityError(
                f"{self.path} was made with other settings:\n  "
                + "\n  ".join(difference)
                + "\nRepeat the settings it has to continue it, or give another --cache to make a new one."
            )

    def check_process(self) -> None:
        """Raise SamiCacheError after a fork: what this process has open is shared with its parent."""
        if os.getpid() != self._process:
            raise SamiCacheError(
                f"{self.path}: this cache was opened before a fork. Open it again in the child, or start workers with the "
                "'spawn' method."
            )


def listing_digest(keys: Sequence[str] | pa.ChunkedArray, labels: Sequence[int | None] | pa.ChunkedArray) -> str:
    """What stands for the images of a cache in its cache_id: their keys, labels and order.

    The digest of the canonical JSON of [keys, labels], taken in parts: whole, that of a million images is 300 MB of objects.
    """
    hasher = blake3(b"[")
    columns: list[tuple[Any, bytes]] = [(keys, b","), (labels, b"]\n")]
    for column, end in columns:
        hasher.update(b"[")
        for start in range(0, len(column), _LISTED_AT_ONCE):
            part = column[start : start + _LISTED_AT_ONCE]
            values = part.to_pylist() if isinstance(part, pa.ChunkedArray) else list(part)
            hasher.update((b"," if start else b"") + canonical_json(values)[1:-2])
        hasher.update(b"]" + end)
    return hasher.hexdigest()
