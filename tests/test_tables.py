"""Rows of a Parquet file in memory: what is asked for is right, and little of the rest is decoded."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import full_cache

from sami_cache.errors import DamageError
from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache
from sami_cache.store.tables import ParquetRows

TABLE = pa.table({"key": [f"photo {number}" for number in range(100)], "label": list(range(100))})


def packed(group: int, table: pa.Table = TABLE) -> bytes:
    sink = BytesIO()
    pq.write_table(table, sink, row_group_size=group)
    return sink.getvalue()


@pytest.fixture(params=[7, 16, 100, 1000])
def rows(request: pytest.FixtureRequest) -> ParquetRows:
    return ParquetRows(Path("t.parquet"), packed(request.param), 100)


def test_slices_are_those_of_the_whole_table(rows: ParquetRows) -> None:
    for start, count in ((0, 100), (0, 1), (6, 2), (13, 40), (93, 7), (99, 1), (50, 0)):
        assert rows.slice(start, count).equals(TABLE.slice(start, count)), (start, count)
    assert rows.read().equals(TABLE)
    assert rows.read(["label", "key"]).equals(TABLE.select(["label", "key"]))


@pytest.mark.parametrize("step", [1, 3, 7, 16, 50, 99, 1000])
def test_every_step_th_value(rows: ParquetRows, step: int) -> None:
    assert rows.every(step, "label") == list(range(0, 100, step))


def test_two_row_groups_are_held_and_each_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, decoded = ParquetRows(Path("t.parquet"), packed(10), 100), []
    read = rows._file.read_row_group

    def counted(group: int, **options: Any) -> pa.Table:
        decoded.append(group)
        return read(group, **options)

    monkeypatch.setattr(rows, "_file", type("File", (), {"read_row_group": staticmethod(counted)}))
    for start in range(0, 100, 4):
        assert rows.slice(start, 4).equals(TABLE.slice(start, 4))
        assert len(rows._groups) <= 2
    assert decoded == list(range(10))


def test_threads_that_ask_at_once_get_their_rows() -> None:
    rows = ParquetRows(Path("t.parquet"), packed(10), 100)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: rows.slice(start, 4), range(0, 100, 4)))
    assert pa.concat_tables(parts).equals(TABLE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a Parquet file"),
        (packed(10)[:-9], "not a Parquet file"),
        (packed(10, TABLE.slice(1)), "99 rows, expected 100"),
    ],
)
def test_what_is_no_such_table_is_damage_that_names_the_file(data: bytes, message: str) -> None:
    with pytest.raises(DamageError, match=rf"t\.parquet: {message}"):
        ParquetRows(Path("t.parquet"), data, 100)


@pytest.mark.parametrize(
    "use",
    [lambda rows: rows.read(), lambda rows: rows.slice(0, 9), lambda rows: rows.every(2, "key")],
    ids=["read", "slice", "every"],
)
def test_pages_that_do_not_decode_are_damage(use: Callable[[ParquetRows], object]) -> None:
    data = bytearray(packed(50))
    data[4:40] = bytes(36)
    with pytest.raises(DamageError, match=r"t\.parquet: not a Parquet file"):
        use(ParquetRows(Path("t.parquet"), bytes(data), 100))


@pytest.mark.parametrize("level", ["quick", "default", "deep"])
def test_a_verification_never_holds_the_whole_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    whole: list[str] = []
    read = ParquetRows.read

    def noticed(rows: ParquetRows, columns: list[str] | None = None) -> pa.Table:
        whole.append(rows.path.name)
        return read(rows, columns)

    monkeypatch.setattr(ParquetRows, "read", noticed)
    opened: list[Cache] = []

    def noted(path: Path) -> Cache:
        opened.append(Cache(path))
        return opened[-1]

    monkeypatch.setattr("sami_cache.store.integrity.Cache", noted)
    assert verify_cache(cache.path, level=level).clean
    assert whole == ["listing.parquet"]
    # Nor, all the time, the listing.
    assert "listing" not in vars(opened[0])
