"""What is flushed, and in which order: checked by watching the system calls, so that a removed fsync fails."""

import errno
import os
from pathlib import Path

import pytest
from conftest import (
    fill_shard,
    full_cache,
    new_cache,
)

from sami_cache.store.cache import Cache
from sami_cache.store.files import move_aside, publish, write_durably
from sami_cache.store.repair import quarantine_shard


class Spy:
    """The order of what reaches the disk: ("fsync", path, size), ("link" or "rename", from, to)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple] = []
        fsync, link, rename = os.fsync, os.link, os.rename

        def spy_fsync(descriptor: int) -> None:
            self.events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
            fsync(descriptor)

        def spy_move(kind: str, real):
            def move(source, target) -> None:
                real(source, target)
                self.events.append((kind, str(source), str(target)))

            return move

        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(os, "link", spy_move("link", link))
        monkeypatch.setattr(os, "rename", spy_move("rename", rename))

    def moved_to(self, target: Path) -> tuple[int, str]:
        """When `target` got its name, and from where."""
        ((when, source),) = [(i, e[1]) for i, e in enumerate(self.events) if e[0] != "fsync" and e[2] == str(target)]
        return when, source

    def flushed(self, path: Path | str) -> list[int]:
        return [i for i, event in enumerate(self.events) if event[:2] == ("fsync", str(path))]


def test_data_is_flushed_before_it_gets_its_name_and_names_before_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    spy = Spy(monkeypatch)
    fill_shard(cache, 0)
    record = cache.record_path(0)
    committed, _ = spy.moved_to(record)
    for path in (*(cache.path / name for name in cache.shard_files(0)), record):
        linked, temporary = spy.moved_to(path)
        assert Path(temporary).parent == cache.path / "tmp"
        (data,) = spy.flushed(temporary)
        assert spy.events[data][2] == path.stat().st_size  # all of it was written by then
        (folder,) = spy.flushed(path.parent)
        assert data < linked < folder
        assert path == record or folder < committed


def test_the_name_of_an_adopted_file_is_flushed_before_the_record_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer may have been killed, or be asleep, between link and flush."""
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0)
    cache.record_path(0).unlink()
    spy = Spy(monkeypatch)
    fill_shard(Cache(cache.path), 0)
    committed, _ = spy.moved_to(cache.record_path(0))
    for name in cache.shard_files(0):
        assert min(spy.flushed((cache.path / name).parent)) < committed


def test_a_new_cache_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    cache = new_cache(tmp_path / "deep" / "down" / "c.zarr")
    renamed, building = spy.moved_to(cache.path)
    for path in (cache.path, *cache.path.rglob("*")):
        (flush,) = spy.flushed(Path(building) / path.relative_to(cache.path))
        assert flush < renamed
        assert path.is_dir() or spy.events[flush][2] == path.stat().st_size
    for folder in (cache.path.parent, tmp_path / "deep", tmp_path):  # the folders that were made for it
        assert min(spy.flushed(folder)) > renamed


def test_moving_aside_is_flushed_and_the_record_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    spy = Spy(monkeypatch)
    moved = quarantine_shard(cache, 1)
    assert [path.parent for path in moved] == [cache.path / "quarantine"] * 3
    moves = [spy.moved_to(path) for path in moved]
    assert [source for _, source in moves] == [
        str(cache.record_path(1)),
        *(str(cache.path / name) for name in cache.shard_files(1)),
    ]
    assert any(moves[0][0] < flush < moves[1][0] for flush in spy.flushed(cache.path / "commits"))
    for folder in ("codes", "images", "quarantine", ""):
        assert max(spy.flushed(cache.path / folder)) > moves[0][0]


def test_publishing_never_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    assert publish(tmp_path / "f", b"first", tmp_path / "tmp")
    assert not publish(tmp_path / "f", b"second", tmp_path / "tmp")
    assert (tmp_path / "f").read_bytes() == b"first"
    assert list((tmp_path / "tmp").iterdir()) == []
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "f", b"third")
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "link", b"through a link")
    assert not (tmp_path / "elsewhere").exists()


def test_moving_aside_never_replaces(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / "f").write_text(str(number))
        move_aside(tmp_path / "f", tmp_path / "quarantine")
    assert sorted(int(path.read_text()) for path in (tmp_path / "quarantine").iterdir()) == list(range(20))


@pytest.mark.parametrize("failing", ["tmp", "folder"])
def test_a_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """A disk says once that it could not write, and the next flush succeeds over lost data: the first word counts."""
    real = os.fsync

    def broken(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if (place.parent.name == "tmp") if failing == "tmp" else (place == tmp_path / "f"):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    (tmp_path / "f").mkdir()
    with pytest.raises(OSError, match="Input/output error"):
        publish(tmp_path / "f" / "name", b"data", tmp_path / "tmp")
    assert (tmp_path / "f" / "name").exists() == (failing == "folder")  # there, and not yet promised
    assert list((tmp_path / "tmp").iterdir()) == []
