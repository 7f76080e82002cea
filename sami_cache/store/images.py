"""The re-encoded JPEGs of one shard: an Arrow IPC file that pyarrow reads, and that we read by offset.

Offsets and checksums stand in the commit record, so one image is one `pread` and no Arrow metadata is parsed on the way
(a cold memory map of the same file is 40 times slower).
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from sami_cache.errors import DamageError
from sami_cache.store.files import OpenFile
from sami_cache.store.shards import crc32c

SCHEMA = pa.schema([("key", pa.string()), ("source", pa.string()), ("jpeg", pa.binary()), ("crc32c", pa.uint32())])


def pack_images(images: dict[str, tuple[str, bytes]]) -> bytes:
    """An Arrow IPC file of {key: (source digest, JPEG)}, one uncompressed record batch, rows in the given order."""
    jpegs = [jpeg for _, jpeg in images.values()]
    columns = [list(images), [source for source, _ in images.values()], jpegs, [crc32c(jpeg) for jpeg in jpegs]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    return sink.getvalue().to_pybytes()


def locate_images(data: bytes) -> dict[str, tuple[str, list[int]]]:
    """Where each JPEG lies in what `pack_images` wrote: {key: (source digest, [offset, size, crc32c])}.

    Raises pyarrow.ArrowException, ValueError or OSError for other bytes, or where an image does not match its crc32c.
    """
    # Arrow copies what is not aligned, and a copy has no place in the file.
    buffer = pa.allocate_buffer(len(data))
    np.frombuffer(buffer, np.uint8)[:] = np.frombuffer(data, np.uint8)
    reader = pa.ipc.open_file(pa.BufferReader(buffer))
    if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
        raise ValueError("not an image file of a shard")
    batch = reader.get_batch(0)
    batch.validate(full=True)
    _, offsets, values = batch.column("jpeg").buffers()
    if batch.num_rows == 0 or values is None:
        return {}
    start = values.address - buffer.address
    bounds = np.frombuffer(offsets, np.int32)[: batch.num_rows + 1].astype(int) + start
    if not 0 <= start <= bounds[0] <= bounds[-1] <= len(data):
        raise ValueError("an image lies outside the file")
    places = [[int(low), int(high - low), crc32c(data[low:high])] for low, high in pairwise(bounds)]
    if [checksum for _, _, checksum in places] != batch.column("crc32c").to_pylist():
        raise ValueError("an image does not match its crc32c")
    keys, sources = batch.column("key").to_pylist(), batch.column("source").to_pylist()
    return {key: (source, place) for key, source, place in zip(keys, sources, places, strict=True)}


class ImageFile(OpenFile):
    """An open image file of a shard. Thread-safe."""

    def read(self, place: Sequence[int], key: str) -> bytes:
        """The JPEG of the sample `key`; `place`: the record's [offset, size, crc32c]. Raises DamageError."""
        offset, size, checksum = place
        data = self.read_at(offset, size, self.path)
        if crc32c(data) != checksum:
            raise DamageError(f"{self.path}: the image of {key!r} does not match its crc32c")
        return data
