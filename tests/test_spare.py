"""The copies of what only creation knows: made with the cache, put back, and never believed without a look."""

from pathlib import Path

import pytest
from conftest import full_cache, new_cache, reseal_head, tree

from sami_cache.errors import DamageError
from sami_cache.store.cache import Cache
from sami_cache.store.head import HEAD, STATIC_FILES
from sami_cache.store.integrity import verify_cache
from sami_cache.store.repair import restore_static
from sami_cache.store.spare import SPARE, pack_spare, read_spare, rightful_id

EVERYTHING = [HEAD, SPARE, *sorted(STATIC_FILES)]


def without_quarantine(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(path).items() if not name.startswith("quarantine/")}


def test_a_new_cache_holds_copies_of_all_that_is_no_shard(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    assert read_spare(cache.path) == {name: (cache.path / name).read_bytes() for name in (HEAD, *STATIC_FILES)}
    assert restore_static(cache.path) == ([], [])


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("damage", ["flip", "gone", "empty", "folder"])
def test_each_file_is_put_back_byte_for_byte(tmp_path: Path, name: str, damage: str) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    before, target = tree(cache.path), cache.path / name
    if damage == "flip":
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    else:
        target.unlink()
        if damage == "empty":
            target.touch()
        if damage == "folder":
            target.mkdir()
    damaged = target.read_bytes() if target.is_file() else None
    assert [finding.path for finding in verify_cache(cache.path).findings] == [name]
    restored, moved = restore_static(cache.path)
    assert restored == [name]
    assert without_quarantine(cache.path) == before
    assert [path.read_bytes() for path in moved if path.is_file()] == ([] if damaged is None else [damaged])
    assert verify_cache(cache.path, level="deep").clean


def test_all_of_them_at_once(tmp_path: Path) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    before = tree(cache.path)
    for name in (HEAD, *STATIC_FILES):
        (cache.path / name).unlink()
    for name in ("basis", "mean", "step"):
        (cache.path / name).rmdir()
    assert sorted(restore_static(cache.path)[0]) == sorted([HEAD, *STATIC_FILES])
    assert without_quarantine(cache.path) == before


def test_another_caches_head_is_told_by_the_records(tmp_path: Path) -> None:
    """It is whole, and so are the copies of it: what the other files bear decides."""
    cache, other = full_cache(tmp_path / "c.zarr"), full_cache(tmp_path / "o.zarr", samples=48)
    before = tree(cache.path)
    (cache.path / HEAD).write_bytes((other.path / HEAD).read_bytes())
    (finding,) = verify_cache(cache.path).findings
    assert finding.path == HEAD
    assert f"the other files are of {Cache(tmp_path / 'o.zarr').cache_id}" not in finding.what
    assert restore_static(cache.path)[0] == [HEAD]
    assert without_quarantine(cache.path) == before
    # Another cache's copies, on the other hand, are the ones to go.
    (cache.path / SPARE).write_bytes((other.path / SPARE).read_bytes())
    assert rightful_id(cache.path) == cache.cache_id
    assert restore_static(cache.path)[0] == [SPARE]
    assert without_quarantine(cache.path) == before


def test_what_is_lost_twice_is_said_and_nothing_is_moved(tmp_path: Path) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    (cache.path / SPARE).unlink()
    (cache.path / "mean/0").unlink()
    before = tree(cache.path)
    with pytest.raises(DamageError, match=r"mean/0 cannot be mended: .* restore the files from a backup"):
        restore_static(cache.path)
    (cache.path / HEAD).write_bytes(b"{}")
    with pytest.raises(DamageError, match=r"zarr\.json cannot be mended"):
        restore_static(cache.path)
    assert tree(cache.path) == before | {HEAD: b"{}"}


def test_copies_are_not_believed(tmp_path: Path) -> None:
    """A copy with a bit flipped, and copies that climb out of the folder, put nothing anywhere."""
    cache = full_cache(tmp_path / "c.zarr")
    copies = read_spare(cache.path)
    (cache.path / "mean/0").unlink()
    flipped = bytes([copies["mean/0"][0] ^ 1]) + copies["mean/0"][1:]
    for forged in ({**copies, "mean/0": flipped}, {**copies, "mean/0": b"", "../mean/0": copies["mean/0"]}):
        (cache.path / SPARE).write_bytes(pack_spare(forged))
        with pytest.raises(DamageError, match=r"mean/0 cannot be mended"):
            restore_static(cache.path)
    assert not (tmp_path / "mean").exists()
    (cache.path / SPARE).write_bytes(b"no tar")
    with pytest.raises(DamageError, match=r"spare\.tar: is not a tar that was written here|not readable as a tar"):
        read_spare(cache.path)


def test_a_head_of_another_format_is_not_overwritten(tmp_path: Path) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    reseal_head(cache.path, format=2)
    assert rightful_id(cache.path) == cache.cache_id
