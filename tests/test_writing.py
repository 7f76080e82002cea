"""Committing shards: one step at a time, whole or not at all, first writer first."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    embeddings_of,
    fill_shard,
    full_cache,
    keys_of,
    make_identity,
    make_samples,
    new_cache,
    teacher_like,
    tree,
)

from sami_cache.errors import DamageError, DiskFullError, SamiCacheError
from sami_cache.store import cache as cache_module
from sami_cache.store import writing
from sami_cache.store.cache import Cache
from sami_cache.store.creation import create_cache
from sami_cache.store.files import publish, write_durably
from sami_cache.store.fitting import fit_codec
from sami_cache.store.images import pack_images
from sami_cache.store.integrity import verify_cache
from sami_cache.store.repair import quarantine_shard
from sami_cache.store.shards import pack_shard
from sami_cache.store.writing import seal_cache, write_shard


def test_a_commit_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    commit = fill_shard(cache, 2)
    assert (commit.won, commit.same, cache.committed()) == (True, True, [2])
    embeddings = embeddings_of(cache, 2)
    codes = cache.read_codes(2)
    np.testing.assert_array_equal(codes, cache.codec.encode(embeddings))
    for index, sample in enumerate(commit.record.samples):
        number = cache.shard_samples(2)[index]
        np.testing.assert_array_equal(cache.read_embedding(number), cache.codec.decode(codes[index : index + 1])[0])
        error, energy = cache.codec.distortion(embeddings[index : index + 1], codes[index : index + 1])
        assert (sample.error, sample.energy) == (pytest.approx(error[0], rel=1e-5), pytest.approx(energy[0], rel=1e-5))
        assert (sample.status, sample.clipped, sample.label) == ("ok", 0, index % 3)


def test_nothing_in_a_cache_depends_on_when_or_in_which_order_it_was_made(tmp_path: Path) -> None:
    one, two = full_cache(tmp_path / "one.zarr"), new_cache(tmp_path / "two.zarr")
    for shard in (2, 0, 1):
        fill_shard(two, shard, bad=(3,) if shard == 1 else ())
    seal_cache(two)
    assert tree(one.path) == tree(two.path)


def test_the_first_record_wins(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0)
    before = tree(cache.path)
    again = fill_shard(Cache(cache.path), 0)
    assert (again.won, again.same) == (False, True)
    other = write_shard(Cache(cache.path), 0, teacher_like(16, seed=9), make_samples(keys_of(cache, 0)), [b"other"] * 16)
    assert (other.won, other.same) == (False, False)
    assert other.record == again.record
    assert tree(cache.path) == before


def test_what_is_committed_is_never_written_again(tmp_path: Path) -> None:
    """Not even where its files are gone: they would be ours then, under the record of another."""
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0)
    for name in cache.shard_files(0):
        (cache.path / name).unlink()
    before = tree(cache.path)
    assert not write_shard(cache, 0, teacher_like(16, seed=9), make_samples(keys_of(cache, 0)), [b"other"] * 16).won
    assert tree(cache.path) == before


def overtake(monkeypatch: pytest.MonkeyPatch, moment: str, act) -> None:
    """Let another writer act just before the named step of this one."""
    real = getattr(writing, moment)

    def step(*args, **kwargs):
        monkeypatch.setattr(writing, moment, real)
        act()
        return real(*args, **kwargs)

    monkeypatch.setattr(writing, moment, step)


@pytest.mark.parametrize("moment", ["_publish_codes", "_publish_images", "_complete_samples", "record_bytes"])
@pytest.mark.parametrize("theirs", ["same", "failed sample", "other embeddings"])
def test_a_writer_overtaken_at_any_step_leaves_the_others_commit_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, theirs: str
) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    second = Cache(cache.path)

    def act() -> None:
        if theirs == "other embeddings":
            values = teacher_like(16, seed=5)
            write_shard(second, 0, values, make_samples(keys_of(cache, 0)), [b"j" * 9] * 16)
        else:
            fill_shard(second, 0, bad=(3,) if theirs == "failed sample" else ())

    overtake(monkeypatch, moment, act)
    commit = fill_shard(cache, 0)
    assert not commit.won
    assert commit.same == (theirs == "same")
    for shard in (1, 2):
        fill_shard(cache, shard)
    seal_cache(cache)
    assert verify_cache(cache.path, level="deep").findings == []


def write_in_thread(cache: Cache, name: str, found: dict, done: threading.Event | None = None, bad=(), noise=0.0):
    """A writer in a thread called `name`, whose codes differ by a few where there is noise."""

    def write() -> None:
        own = Cache(cache.path)
        embeddings, keys = embeddings_of(own, 0), keys_of(own, 0)
        shaken = np.random.default_rng(0).normal(size=embeddings.shape) * noise * own.codec.step[0]
        jpegs = [None if index in bad else key.encode() for index, key in enumerate(keys)]
        found[name] = write_shard(own, 0, embeddings + shaken.astype(np.float32), make_samples(keys, bad), jpegs)
        if done:
            done.set()

    thread = threading.Thread(target=write, name=name)
    thread.start()
    return thread


@pytest.mark.parametrize("torn", [False, True], ids=["another image read", "torn leftover"])
def test_of_two_live_writers_that_disagree_the_records_files_stay(tmp_path: Path, monkeypatch, torn: bool) -> None:
    """B moves aside what A has published, before A's record is there to tell it not to; then A commits, and B goes on."""
    cache = new_cache(tmp_path / "c.zarr")
    if torn:
        (cache.path / "codes" / "0.0.0.0").write_bytes(b"torn")
    a_ready, b_saw, b_moved, a_done = (threading.Event() for _ in range(4))
    real_bytes, real_move = writing.record_bytes, writing.move_aside

    def in_b() -> bool:
        return threading.current_thread().name == "B"

    def record_bytes(record):
        (b_moved if in_b() else a_ready).set()
        assert (a_done if in_b() else b_moved).wait(10)
        return real_bytes(record)

    def move_aside(*arguments):
        if torn:
            if in_b():
                b_saw.set()
            assert (a_ready if in_b() else b_saw).wait(10)
        return real_move(*arguments)

    monkeypatch.setattr(writing, "record_bytes", record_bytes)
    monkeypatch.setattr(writing, "move_aside", move_aside)
    found: dict = {}
    a = write_in_thread(cache, "A", found, a_done)
    if not torn:
        assert a_ready.wait(10)
    b = write_in_thread(cache, "B", found, bad=() if torn else (3,), noise=0.02 if torn else 0.0)
    a.join()
    b.join()
    assert (found["A"].won, found["B"].won) == (True, False)
    assert [finding.path for finding in verify_cache(cache.path, level="deep").findings if finding.shard == 0] == []


@pytest.mark.parametrize("folder", ["codes", "images", "commits", "tmp"])
def test_nothing_is_written_through_a_link(tmp_path: Path, folder: str) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    (cache.path / folder).rename(tmp_path / "outside")
    (cache.path / folder).symlink_to(tmp_path / "outside")
    before = sorted((tmp_path / "outside").iterdir())
    with pytest.raises(SamiCacheError, match=rf"{folder}: expected a folder, found a link"):
        fill_shard(cache, 0)
    assert sorted((tmp_path / "outside").iterdir()) == before


def test_a_committed_file_that_was_moved_by_mistake_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other commits between our look at its record and our move of its file."""
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0, bad=(3,))
    record = cache.record_path(0).read_bytes()
    cache.record_path(0).unlink()
    overtake(monkeypatch, "move_aside", lambda: cache.record_path(0).write_bytes(record))
    commit = fill_shard(Cache(cache.path), 0)
    assert (commit.won, commit.same) == (False, False)
    for shard in (1, 2):
        fill_shard(cache, shard)
    seal_cache(cache)
    assert verify_cache(cache.path, level="deep").findings == []


def test_writers_started_together_make_one_cache(tmp_path: Path) -> None:
    for attempt in range(5):
        cache = new_cache(tmp_path / f"{attempt}.zarr")
        with ThreadPoolExecutor(6) as pool:
            commits = list(pool.map(lambda number, path=cache.path: fill_shard(Cache(path), number % 3), range(12)))
        assert sorted(commit.record.shard for commit in commits if commit.won) == [0, 1, 2]
        assert all(commit.same for commit in commits)
        seal_cache(cache)
        assert verify_cache(cache.path, level="deep").findings == []
        assert list((cache.path / "tmp").iterdir()) == []


def test_a_leftover_of_the_same_bytes_is_used(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0)
    before = tree(cache.path)
    cache.record_path(0).unlink()
    assert fill_shard(Cache(cache.path), 0).won
    assert tree(cache.path) == before


def test_a_whole_leftover_of_slightly_other_numbers_is_adopted(tmp_path: Path) -> None:
    """Another device moves a few codes by one; its writer may be alive and about to commit that very file."""
    cache = new_cache(tmp_path / "c.zarr")
    codes = cache.codec.encode(embeddings_of(cache, 0))
    codes[0, 0, 0, :4] += 1
    data, _ = pack_shard(codes, cache.layout)
    (cache.path / "codes" / "0.0.0.0").write_bytes(data)
    keys = keys_of(cache, 0)
    images = pack_images({key: (f"{index:064x}", b"their jpeg of " + key.encode()) for index, key in enumerate(keys)})
    (cache.path / "images" / "000000.arrow").write_bytes(images)
    commit = fill_shard(cache, 0)
    assert commit.won
    assert commit.same
    np.testing.assert_array_equal(cache.read_codes(0), codes)
    assert cache.read_jpegs(0, [2]) == [b"their jpeg of " + keys[2].encode()]
    assert not (cache.path / "quarantine").exists()
    fill_shard(cache, 1)
    fill_shard(cache, 2)
    seal_cache(cache)
    assert verify_cache(cache.path, level="deep").findings == []


@pytest.mark.parametrize(
    "leftover", ["empty", "torn", "flipped", "garbage", "other shard", "other images", "longer", "folder", "fifo", "dangling"]
)
@pytest.mark.parametrize("kind", ["codes", "images"])
def test_a_leftover_that_is_not_this_shard_makes_way(tmp_path: Path, kind: str, leftover: str) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    commit = fill_shard(cache, 0)
    fill_shard(cache, 1)
    expected = tree(cache.path)
    names = cache.shard_files(0)
    name = names[0] if kind == "codes" else names[1]
    path = cache.path / name
    whole = path.read_bytes()
    quarantine_shard(cache, 0)
    for name_ in names:
        (cache.path / name_).write_bytes(expected[name_])
    path.unlink()
    if leftover == "folder":
        path.mkdir()
        (path / "x").touch()
    elif leftover == "fifo":
        os.mkfifo(path)
    elif leftover == "dangling":
        path.symlink_to("nowhere")
    else:
        flipped = bytearray(whole)
        flipped[600] ^= 4
        other = pack_shard(cache.codec.encode(teacher_like(16, seed=8)), cache.layout)[0]
        if kind == "images":
            other = pack_images(dict.fromkeys(keys_of(cache, 0), ("f" * 64, b"x")))
        path.write_bytes(
            {
                "empty": b"",
                "torn": whole[: len(whole) // 2],
                "flipped": bytes(flipped),
                "garbage": os.urandom(3000),
                "other shard": (cache.path / cache.shard_files(1)[names.index(name)]).read_bytes(),
                "other images": other,
                "longer": whole + b"\0",
            }[leftover]
        )
    again = fill_shard(Cache(cache.path), 0)
    assert again.won
    assert again.record == commit.record
    assert {name: data for name, data in tree(cache.path).items() if not name.startswith("quarantine")} == expected
    assert len(os.listdir(cache.path / "quarantine")) == 4  # ours of before, and what was in the way


def test_failed_samples_have_zero_codes_and_a_reason(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr", codec="float16")
    embeddings = embeddings_of(cache, 0).copy()
    embeddings[[3, 5]] = np.nan  # what lies there is never looked at
    keys = keys_of(cache, 0)
    write_shard(cache, 0, embeddings, make_samples(keys, (3, 5)), [None if i in (3, 5) else b"j" for i in range(16)])
    codes = cache.read_codes(0)
    assert not codes[[3, 5]].any()
    assert codes[4].any()
    for index in (3, 5):
        sample = cache.record(0).samples[index]
        assert sample.status == "truncated file"
        assert (sample.codes_crc32c, sample.error, sample.energy, sample.clipped, sample.jpeg) == (None,) * 5
    assert cache.read_jpegs(0, [2, 3]) == [b"j", None]


def test_a_failed_sample_cannot_fail_the_codec(tmp_path: Path) -> None:
    """Where the mean is beyond float16, a stand-in of zeros would be refused as an embedding far from the mean."""
    embeddings = teacher_like(16) + 1e5
    codec = fit_codec("float16", embeddings)
    cache = create_cache(
        tmp_path / "c.zarr",
        identity=make_identity(codec={"name": "float16", "error": None}, images=None),
        codec=codec,
        layout=cache_module.choose_layout(codec, 8, 16, 16),
        keys=[str(index) for index in range(16)],
        labels=[None] * 16,
        class_names=None,
        provenance={},
    )
    commit = write_shard(cache, 0, embeddings, make_samples(keys_of(cache, 0), (2,)), [None] * 16)
    assert commit.won
    assert not cache.read_codes(0)[2].any()


def test_a_shard_in_which_everything_failed_is_committed(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr", samples=16)
    fill_shard(cache, 0, bad=tuple(range(16)))
    assert not cache.read_codes(0).any()
    assert cache.read_jpegs(0) == [None] * 16
    assert seal_cache(cache)["failed"] == 16
    assert verify_cache(cache.path, level="deep").findings == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "constant", "all nan"])
def test_an_embedding_that_is_no_embedding_is_refused_before_anything_is_written(tmp_path: Path, value) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    before = tree(cache.path)
    embeddings = embeddings_of(cache, 1).copy()
    if value == "constant":
        embeddings[7] = 3.0
    elif value == "all nan":
        embeddings[7] = np.nan
    else:
        embeddings[7, 2, 3, 4] = value
    what = "is the same everywhere" if value == "constant" else "holds NaN or infinity"
    with pytest.raises(SamiCacheError, match=f"embedding of 'class/0023.jpg' {what}; it was not stored"):
        write_shard(cache, 1, embeddings, make_samples(keys_of(cache, 1)), [b"j"] * 16)
    assert tree(cache.path) == before


def test_wrong_shapes_are_refused(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    with pytest.raises(SamiCacheError, match=r"shard 2: embeddings \(16, 24, 8, 8\) of 16 samples, expected \(8, 24, 8, 8\)"):
        write_shard(cache, 2, teacher_like(16), make_samples([str(i) for i in range(16)]), [None] * 16)


def test_what_is_read_back_must_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    real = pack_shard
    monkeypatch.setattr(writing, "pack_shard", lambda codes, layout: real(codes + 1, layout))
    with pytest.raises(DamageError, match="read back, it does not hold the codes that were written"):
        fill_shard(cache, 0)
    assert cache.committed() == []


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_with_its_own_exit_code_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    expected = tree(full_cache(tmp_path / "undisturbed.zarr").path)
    cache = new_cache(tmp_path / "c.zarr")
    real, calls = getattr(os, call), 0

    def fail_after(limit: int):
        def step(*args):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise OSError(code, os.strerror(code))
            return real(*args)

        return step

    for limit in range({"write": 3, "fsync": 5, "link": 3}[call]):  # as many as there are until the record has its name
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail_after(limit))
            with pytest.raises(DiskFullError, match=r"the disk is full .*MB free\) while writing shard 0") as caught:
                fill_shard(cache, 0)
        assert caught.value.exit_code == 3
        assert cache.committed() == []
        assert list((cache.path / "tmp").iterdir()) == []
    assert fill_shard(cache, 0).won
    for shard in (1, 2):
        fill_shard(cache, shard, bad=(3,) if shard == 1 else ())
    seal_cache(cache)
    assert tree(cache.path) == expected


def test_a_write_that_takes_only_part_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    write_durably(tmp_path / "f", b"0123456789" * 3)
    assert (tmp_path / "f").read_bytes() == b"0123456789" * 3


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_another_error_passes_and_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
        with pytest.raises(OSError, match=os.strerror(code)):
            fill_shard(cache, 0)
    assert cache.committed() == []
    assert fill_shard(cache, 0).won


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
        monkeypatch.setattr(os, "link", lambda *_, code=code: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
        with pytest.raises(SamiCacheError, match="this file system refuses hard links"):
            publish(tmp_path / "f", b"x", tmp_path / "tmp")
        assert not (tmp_path / "f").exists()
