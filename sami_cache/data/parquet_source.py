"""Images in Parquet files, Hugging Face layout."""

import bisect
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sami_cache.data.source import Source, file_text, open_regular
from sami_cache.errors import ImageError, SamiCacheError, one_line

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "picture", "photo", "bytes")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_id", "cls", "target")


class ParquetSource(Source):
    """Parquet in Hugging Face layout. Order: files by path, then rows.

    Key: the file's path below the root (of a single file its name), "/", the row number in nine digits. Images are a struct
    column {bytes, path}, the same flattened to "<name>.bytes", or a plain binary column with a usual name; labels an integer
    column with a usual name or one that the schema declares a ClassLabel, where a negative number is no label.

    Reading in order is what is fast: row groups are decoded whole and kept, up to 128 MiB of them, and groups above 32 MiB
    are streamed in runs of rows. Memory is bounded as well as the files allow: one page is always decoded whole. Going back
    inside such a giant group starts it again.
    """

    kind = "parquet"
    cache_bytes = 128 << 20
    run_bytes = 32 << 20

    def __init__(self, root: Path, names: list[str]) -> None:
        self._files = [_ParquetLayout(os.path.join(root, name) if name else str(root), self.run_bytes) for name in names]
        keys: list[str] = []
        labels: list[int | None] = []
        class_names: list[str] | None = None
        for name, file in zip(names, self._files, strict=True):
            prefix = file_text(name or root.name)
            keys += [f"{prefix}/{row:09d}" for row in range(file.rows)]
            labels += file.labels
            class_names = class_names or file.class_names
            if file.class_names not in (None, class_names):
                raise SamiCacheError(
                    f"{file_text(file.path)} names other classes than the files before it; open them separately"
                )
            file.labels = []
        if not keys:
            raise SamiCacheError(f"no images in {file_text(root)}: its {len(names)} Parquet files hold no rows")
        highest = max((label for label in labels if label is not None), default=-1)
        if class_names is not None and highest >= len(class_names):
            raise SamiCacheError(f"{file_text(root)} has label {highest}, but its schema names {len(class_names)} classes")
        super().__init__(root, keys, labels, class_names)
        self._starts = np.cumsum([0, *(file.rows for file in self._files)]).tolist()
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._runs: OrderedDict[tuple[int, int, int], pa.Table] = OrderedDict()
        self._failed: dict[tuple[int, int], tuple[int, str]] = {}
        self._stream: tuple[tuple[int, int], int, Iterator[pa.Table]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_runs", "_failed", "_stream")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _read(self, index: int) -> bytes:
        number = bisect.bisect_right(self._starts, index) - 1
        file = self._files[number]
        group, row = file.locate(index - self._starts[number])
        run, row = divmod(row, file.run_rows[group])
        with self._lock:
            table = self._run(number, group, run)
        if row >= len(table):
            raise ImageError(f"row group {group} ends early")
        data, path = file.image(table, row)
        if data is None:
            raise ImageError("no image bytes" + (f", only a path: {file_text(path)}" if path else ""))
        return data

    def _run(self, number: int, group: int, run: int) -> pa.Table:
        """Rows run * run_rows and on of a row group, from those kept or by reading on from where the last read stopped."""
        if (table := self._runs.get((number, group, run))) is not None:
            self._runs.move_to_end((number, group, run))
            return table
        bad_from, reason = self._failed.get((number, group), (None, ""))
        if bad_from is not None and run >= bad_from:
            raise ImageError(reason)
        if self._stream is None or self._stream[0] != (number, group) or self._stream[1] > run:
            self._stream = (number, group), 0, self._files[number].stream(group)
        _, position, batches = self._stream
        while True:
            try:
                table = next(batches)
            except (pa.ArrowException, OSError, StopIteration) as error:
                reason = f"row group {group} cannot be read: {' '.join(str(error).split())[:160] or 'it ends early'}"
                self._stream, self._failed[number, group] = None, (position, reason)
                raise ImageError(reason) from error
            self._keep((number, group, position), table)
            position += 1
            self._stream = (number, group), position, batches
            if position > run:
                return table

    def _keep(self, place: tuple[int, int, int], table: pa.Table) -> None:
        self._runs[place] = table
        while len(self._runs) > 1 and sum(kept.nbytes for kept in self._runs.values()) > self.cache_bytes:
            self._runs.popitem(last=False)


class _ParquetLayout:
    """What one Parquet file's footer says: which column holds the images, the labels, where the row groups start."""

    def __init__(self, path: str, run_bytes: int) -> None:
        self.path = path
        try:
            with self._open() as parquet:
                schema, footer = parquet.schema_arrow, parquet.metadata
                self._check_rows(footer)
                self.column = self._image_column(schema)
                features = self._features(schema)
                label = self._label_column(schema, features)
                values = [] if label is None else parquet.read(columns=[label]).column(label).to_pylist()
        except (pa.ArrowException, OSError, ImageError, LookupError, ValueError, OverflowError, MemoryError) as error:
            raise SamiCacheError(
                f"{file_text(path)} is not a whole Parquet file: {one_line(error)}. Fetch it again or move it away"
            ) from error
        self.rows = footer.num_rows
        self.labels = [value if value is not None and 0 <= value < 1 << 63 else None for value in values] or [None] * self.rows
        self.class_names = None if label is None else features.get(label)
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        self.starts = np.cumsum([0, *(group.num_rows for group in groups)]).tolist()
        self.run_rows = [self._run_rows(group, run_bytes) for group in groups]

    def _open(self) -> pq.ParquetFile:
        os.close(open_regular(self.path))
        # As bytes: pyarrow cannot spell a name that is not UTF-8. Buffered, so that a large column is streamed page by page.
        file = pa.OSFile(os.fsencode(self.path))  # pyright: ignore[reportArgumentType]
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)

    def _check_rows(self, footer: pq.FileMetaData) -> None:
        """A footer can claim any number of rows; an image takes a byte at least."""
        groups, size = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)], os.stat(self.path).st_size
        if min(groups, default=0) < 0 or sum(groups) != footer.num_rows or footer.num_rows > size:
            raise ValueError(f"its footer claims {footer.num_rows} rows in {len(groups)} groups of together {sum(groups)}")

    def stream(self, group: int) -> Iterator[pa.Table]:
        """The image column of row group `group` in runs of run_rows[group] rows (the last may be shorter)."""
        wanted, held = self.run_rows[group], list[pa.RecordBatch]()
        with self._open() as parquet:
            for batch in parquet.iter_batches(wanted, row_groups=[group], columns=self._columns(), use_threads=False):
                held.append(batch)  # pyarrow may cut a batch in two
                if sum(part.num_rows for part in held) >= wanted:
                    yield pa.Table.from_batches(held)
                    held = []
        if held:
            yield pa.Table.from_batches(held)

    def locate(self, row: int) -> tuple[int, int]:
        group = bisect.bisect_right(self.starts, row) - 1
        return group, row - self.starts[group]

    def image(self, table: pa.Table, row: int) -> tuple[bytes | None, str | None]:
        """The bytes and the path of a row of a table that `stream` gave; None for what is not there."""
        if self.column in table.column_names:
            value = table.column(self.column)[row].as_py()
            return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        columns = [table.column(name)[row].as_py() for name in self._columns() if name in table.column_names]
        return columns[0], columns[1] if len(columns) > 1 else None

    def _columns(self) -> list[str]:
        return [f"{self.column}.bytes", f"{self.column}.path"] if self._nested else [self.column]

    def _image_column(self, schema: pa.Schema) -> str:
        nested, plain = [], []
        for field in schema:
            if pa.types.is_struct(field.type):
                children = {child.name: child.type for child in field.type}
                if "bytes" in children and _is_binary(children["bytes"]):
                    nested.append(field.name)
            elif _is_binary(field.type):
                flattened = field.name.endswith(".bytes")
                (nested if flattened else plain).append(field.name.removesuffix(".bytes"))
        found = nested or plain
        preferred = [name for name in _IMAGE_COLUMNS if name in found] or (found if len(found) == 1 else [])
        if not preferred:
            have = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise SamiCacheError(
                f"{file_text(self.path)} has no image column: expected a struct {{bytes, path}}, <name>.bytes, or a binary "
                f"column named {', '.join(_IMAGE_COLUMNS)}; found {one_line(have)}"
            )
        self._nested = bool(nested)
        if found.count(preferred[0]) > 1:
            raise SamiCacheError(f"{file_text(self.path)} has several columns named {file_text(preferred[0])!r}: rename one")
        return preferred[0]

    def _run_rows(self, group: pq.RowGroupMetaData, run_bytes: int) -> int:
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == self._columns()[0])
        return max(1, group.num_rows if size <= run_bytes else group.num_rows * run_bytes // size)

    @staticmethod
    def _features(schema: pa.Schema) -> dict[str, list[str] | None]:
        """Column -> class names, for the ClassLabel columns of Hugging Face's schema metadata."""
        try:
            features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
            labels = {name: value for name, value in features.items() if value.get("_type") == "ClassLabel"}
            return {name: list(map(str, value["names"])) if value.get("names") else None for name, value in labels.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no more than a hint, written by many tools
            return {}

    @staticmethod
    def _label_column(schema: pa.Schema, features: dict[str, list[str] | None]) -> str | None:
        integers = [field.name for field in schema if pa.types.is_integer(field.type)]
        return next((name for name in (*_LABEL_COLUMNS, *features) if name in integers), None)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
