"""One shard of a Zarr v3 array as bytes: the `sharding_indexed` codec, by the specification.

Layout: the compressed inner chunks one after another, then the index: for each inner chunk its offset and byte count as
little-endian uint64 (both 2^64 - 1 for a chunk that is absent), then the crc32c of the index. Each inner chunk is
transposed (its samples' maps of one kept coefficient side by side), then zstd (level 1, with zstd's own content checksum),
then its crc32c.

zarr-python and tensorstore read these files; we write and read them ourselves because a store of theirs neither flushes
what it writes nor tells a missing file from zeros, and because one reused decompressor is twice as fast.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import zstandard

from sami_cache.errors import DamageError
from sami_cache.store.files import OpenFile
from sami_cache.store.places import AnyPath

MAX_SHARD_SAMPLES = 1 << 15
MAX_SHARD_BYTES = 1 << 31
ABSENT = 2**64 - 1
_CRC_OF_WHOLE = 0x48674BC7
# Codes come in the order of their spread, a chunk's samples side by side. What serves them is a Huffman table for every 32 KB
# (a block is never larger than the window) and no matches, which are accidents here: on photographs 5 % fewer bytes than plain
# level 1 (docs/codec.md). To a reader it is zstd like any other.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(1, window_log=15, min_match=7, hash_log=6, write_checksum=True)
_local = threading.local()
# numpy copies these by single instructions, raw bytes (V16) by a call of memmove each.
_ITEMS = {np.dtype(name).itemsize: np.dtype(name) for name in ("u1", "u2", "u4", "u8", "c16")}


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How the samples of the array `codes` are cut into files and chunks."""

    sample_shape: tuple[int, ...]
    """Of one sample's codes: (kept, grid / block, grid / block)."""
    dtype: str
    """numpy's name of the codes' type: int8 or float16."""
    shard_samples: int
    chunk_samples: int

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no cache has, so that no file can make us allocate what it likes."""
        numbers = (*self.sample_shape, self.shard_samples, self.chunk_samples)
        if self.dtype not in ("int8", "float16") or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"codes of type {self.dtype!r} and sizes {numbers}")
        too_many = self.shard_samples > MAX_SHARD_SAMPLES or self.shard_bytes > MAX_SHARD_BYTES
        if too_many or self.shard_samples % self.chunk_samples:
            raise ValueError(
                f"a shard of {self.shard_samples} samples, {self.shard_bytes} bytes: at most {MAX_SHARD_SAMPLES} and "
                f"{MAX_SHARD_BYTES}, and whole chunks"
            )

    @property
    def shard_bytes(self) -> int:
        """Of the codes of a full shard, before compression."""
        return math.prod(self.sample_shape) * self.stored_dtype.itemsize * self.shard_samples

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_samples, *self.sample_shape)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_samples // self.chunk_samples

    @property
    def index_bytes(self) -> int:
        return 16 * self.chunks_per_shard + 4

    @cached_property
    def stored_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def chunk_bytes(self) -> int:
        """Of the codes of a chunk, before compression."""
        return math.prod(self.chunk_shape) * self.stored_dtype.itemsize

    @cached_property
    def item(self) -> np.dtype:
        """One kept coefficient's map as one value: 4 x 4 codes in one instruction are three times as fast as byte by byte."""
        size = math.prod(self.sample_shape[1:]) * self.stored_dtype.itemsize
        return _ITEMS.get(size, np.dtype(f"V{size}"))

    def metadata(self, samples: int) -> dict[str, Any]:
        """The array's zarr.json."""
        bytes_codec: dict[str, Any] = {"name": "bytes"}
        if self.stored_dtype.itemsize > 1:
            bytes_codec["configuration"] = {"endian": "little"}
        transpose = {"name": "transpose", "configuration": {"order": [1, 0, *range(2, len(self.chunk_shape))]}}
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": [
                transpose,
                bytes_codec,
                {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
                {"name": "crc32c"},
            ],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        return array_metadata(
            (samples, *self.sample_shape),
            self.dtype,
            (self.shard_samples, *self.sample_shape),
            [{"name": "sharding_indexed", "configuration": sharding}],
            ("sample", "kept", "block_y", "block_x"),
        )

    def file_name(self, shard: int) -> str:
        return ".".join([str(shard), *("0" for _ in self.sample_shape)])


def array_metadata(
    shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], codecs: list[Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """A Zarr v3 array's zarr.json. Chunk files lie flat in the array's folder (`3.0.0.0`), not four folders deep."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": list(names),
    }


def crc32c(data: Any) -> int:
    """CRC-32C (Castagnoli) of a bytes-like object."""
    # The extension takes nothing but bytes; the copy costs 1/20 of the decompression that follows.
    return google_crc32c.value(data if isinstance(data, bytes) else bytes(data))


def pack_shard(codes: np.ndarray, layout: ShardLayout) -> tuple[bytes, list[int]]:
    """The bytes of a shard file and the crc32c of each of its inner chunks.

    Args:
        codes: [n, *sample_shape] of the layout's dtype, 1 <= n <= shard_samples; the last chunk is filled up with zeros
            and chunks behind it are absent, as Zarr has it.
    """
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
    parts, index, checksums, offset = [], np.full((layout.chunks_per_shard, 2), ABSENT, "<u8"), [], 0
    for number, start in enumerate(range(0, len(codes), layout.chunk_samples)):
        chunk = np.zeros(layout.chunk_shape, layout.stored_dtype)
        piece = codes[start : start + layout.chunk_samples]
        chunk[: len(piece)] = piece
        packed = compressor.compress(np.ascontiguousarray(chunk.swapaxes(0, 1)).data)
        checksum = crc32c(packed)
        parts += [packed, checksum.to_bytes(4, "little")]
        index[number] = offset, len(packed) + 4
        checksums.append(checksum)
        offset += len(packed) + 4
    table = index.tobytes()
    return b"".join([*parts, table, crc32c(table).to_bytes(4, "little")]), checksums


def parse_index(tail: bytes, layout: ShardLayout, data_bytes: int, where: str) -> np.ndarray:
    """The index as int64 [chunks, 2] (offset, byte count), (-1, 0) where absent. Raises DamageError.

    Args:
        tail: the last `layout.index_bytes` bytes of the file.
        data_bytes: the length of the file before the index; no chunk may reach past it.
    """
    if len(tail) != layout.index_bytes or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise DamageError(f"{where}: the shard's index does not match its crc32c")
    index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)
    absent = (index == ABSENT).all(1)
    present = index[~absent]
    if (present > data_bytes).any() or (present.sum(1) > data_bytes).any() or (present[:, 1] < 5).any():
        raise DamageError(f"{where}: the shard's index points outside the file")
    return np.where(absent[:, None], np.array([-1, 0]), index.astype(np.int64))


def unpack_chunk(packed: bytes, layout: ShardLayout, checksum: int, wanted: Mapping[int, np.ndarray], where: str) -> None:
    """Decompress one inner chunk, checked by the commit record's crc32c and by zstd's own. Raises DamageError.

    Args:
        packed: the chunk's bytes in the file, its crc32c at the end.
        checksum: the crc32c that the commit record states.
        wanted: by place in the chunk, where a sample's codes are to go: [*sample_shape] of the layout's type, C-contiguous.
    """
    # Over data and its own crc32c together, every crc32c is the same number; so nothing has to be copied to be checked.
    if crc32c(packed) != _CRC_OF_WHOLE or int.from_bytes(packed[-4:], "little") != checksum:
        raise DamageError(f"{where}: the chunk does not match its crc32c")
    size = layout.chunk_bytes
    target = _scratch(size)
    try:
        with _local.decompressor.stream_reader(memoryview(packed)[:-4], closefd=False) as reader:
            filled = 0
            while filled < size and (count := reader.readinto(target[filled:])):
                filled += count
            surplus = reader.read(1)
    except zstandard.ZstdError as error:
        raise DamageError(f"{where}: zstd cannot decode the chunk ({error})") from error
    if filled != size or surplus:
        raise DamageError(f"{where}: the chunk holds {filled} bytes{' or more' if surplus else ''}, expected {size}")
    kept, item = layout.sample_shape[0], layout.item
    stored = np.frombuffer(target, item).reshape(kept, layout.chunk_samples).T
    for place, out in wanted.items():
        np.ndarray(kept, item, out)[:] = stored[place]


def _scratch(size: int) -> memoryview:
    """This thread's memory for one decompressed chunk; fresh pages for every chunk would cost as much as the decompression."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor, _local.scratch = zstandard.ZstdDecompressor(), bytearray()
    if len(_local.scratch) < size:
        _local.scratch = bytearray(size)
    return memoryview(_local.scratch)[:size]


class ShardFile(OpenFile):
    """An open shard file: reads any of its inner chunks. Thread-safe."""

    def __init__(self, path: AnyPath, layout: ShardLayout, size: int, checksums: list[int]) -> None:
        """Open `path`, which must hold exactly `size` bytes. Raises DamageError.

        Args:
            size, checksums: of the file and of its chunks, from the commit record.
        """
        super().__init__(path, size)
        self.layout, self.checksums = layout, checksums
        data_bytes = size - layout.index_bytes
        tail = self.read_at(max(0, data_bytes), min(size, layout.index_bytes), path)
        self.index = parse_index(tail, layout, data_bytes, str(path))

    def read_chunk(self, chunk: int, wanted: Mapping[int, np.ndarray]) -> None:
        """Check inner chunk `chunk` and copy samples of it as `unpack_chunk` does. Raises DamageError."""
        offset, count = self.index[chunk].tolist()
        where = f"{self.path}, chunk {chunk}"
        if offset < 0 or chunk >= len(self.checksums):
            raise DamageError(f"{where}: absent from the shard")
        packed = self.read_at(offset, count, where)
        unpack_chunk(packed, self.layout, self.checksums[chunk], wanted, where)

    def read(self, samples: int) -> np.ndarray:
        """The first `samples` samples: [samples, *sample_shape]."""
        self.expect()
        out = np.empty((samples, *self.layout.sample_shape), self.layout.stored_dtype)
        step = self.layout.chunk_samples
        for start in range(0, samples, step):
            self.read_chunk(start // step, dict(enumerate(out[start : start + step])))
        return out
