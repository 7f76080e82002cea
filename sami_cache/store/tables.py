"""Parquet tables of a cache, decoded from bytes whose digest was checked: whole, or a row group at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sami_cache.errors import DamageError
from sami_cache.store.places import AnyPath

_HELD = 2
"""Row groups that stay decoded: shards that are checked at the same time may lie on both sides of a border."""


class ParquetRows:
    """A Parquet file in memory whose rows are decoded when they are asked for. Thread-safe.

    Decoded, the manifest of a million samples is a third of a gigabyte, in the file 70 MB.
    """

    def __init__(self, path: AnyPath, data: bytes, rows: int) -> None:
        """
        Args:
            data: what `path` holds.
            rows: how many it must have: a small file can claim any number.

        Raises DamageError that names `path`.
        """
        self.path, self._lock = path, Lock()
        with self._decoding():
            self._file = pq.ParquetFile(pa.BufferReader(data))  # of a BytesIO it would make a copy
            metadata, self.schema = self._file.metadata, self._file.schema_arrow
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if not metadata.num_rows == sum(counts) == rows:
            raise DamageError(f"{path}: {metadata.num_rows} rows, expected {rows}")
        self._starts = list(accumulate(counts, initial=0))
        self._groups: dict[int, pa.Table] = {}

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise DamageError(f"{self.path}: not a Parquet file ({error})") from error

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, of some columns in this order. Raises DamageError."""
        with self._decoding():
            table = self._file.read(columns)
        return table.select(columns) if columns else table

    def slice(self, start: int, count: int) -> pa.Table:
        """`count` rows from `start` on, all columns. Raises DamageError."""
        parts, stop = [self.schema.empty_table()], start + count
        for group, (low, high) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if low < stop and start < high:
                parts.append(self._group(group).slice(max(0, start - low), min(stop, high) - max(start, low)))
        return pa.concat_tables(parts)

    def every(self, step: int, column: str) -> list[Any]:
        """A column's values in rows 0, step, 2 step and so on. Raises DamageError."""
        found: list[Any] = []
        for group, (low, high) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            with self._decoding():
                values = self._file.read_row_group(group, columns=[column])[column]
            found += values.take(pa.array(range(-low % step, high - low, step), pa.int64())).to_pylist()
        return found

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._groups:
                while len(self._groups) >= _HELD:
                    del self._groups[next(iter(self._groups))]  # the oldest
                with self._decoding():
                    self._groups[group] = self._file.read_row_group(group)
            return self._groups[group]
