"""Creating, committing, sealing and reading a cache: one step at a time, whole or not at all, first writer first."""

import errno
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fill_shard, full_cache, make_identity, make_samples, new_cache, teacher_like

from sami_cache.errors import DamageError, DiskFullError, IdentityError, SamiCacheError
from sami_cache.store import cache as cache_module
from sami_cache.store import writing
from sami_cache.store.cache import Cache, create_cache, identity_difference
from sami_cache.store.codecs import fit_codec
from sami_cache.store.commits import TABLE_SCHEMA, merkle_root, parse_record, record_bytes
from sami_cache.store.files import canonical_json, digest, move_aside, publish, seal, write_durably
from sami_cache.store.images import locate_images, pack_images
from sami_cache.store.integrity import verify_cache
from sami_cache.store.shards import pack_shard
from sami_cache.store.writing import quarantine_shard, seal_cache, write_shard


def embeddings_of(cache: Cache, shard: int) -> np.ndarray:
    numbers = cache.shard_samples(shard)
    return teacher_like(cache.samples)[numbers.start : numbers.stop]


def keys_of(cache: Cache, shard: int) -> list[str]:
    numbers = cache.shard_samples(shard)
    return cache.listing["key"].to_pylist()[numbers.start : numbers.stop]


def fill_all(cache: Cache) -> None:
    for shard in range(cache.shards):
        fill_shard(cache, shard)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def reseal_head(path: Path, **changes: object) -> None:
    """Write a head that is consistent with its own digest, whatever it says."""
    head = json.loads((path / "zarr.json").read_bytes())
    attributes = head["attributes"]["sami_cache"] | changes
    attributes = {name: value for name, value in attributes.items() if name != "blake3" and value is not ...}
    head["attributes"]["sami_cache"] = seal(attributes)
    (path / "zarr.json").write_bytes(canonical_json(head))


# ---- creating


def test_creating_is_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = write_durably, []

    def fail_late(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(cache_module, "write_durably", fail_late)
    with pytest.raises(DiskFullError, match=r"the disk is full .* while making the cache"):
        new_cache(tmp_path / "c.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_sees_half_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any point before the rename, nothing has the cache's name."""
    monkeypatch.setattr(cache_module.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        new_cache(tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def test_of_two_creators_the_first_wins_and_the_second_opens_its_cache(tmp_path: Path) -> None:
    first = new_cache(tmp_path / "c.zarr")
    before = tree(first.path)
    second = new_cache(tmp_path / "c.zarr")
    assert second.cache_id == first.cache_id
    with pytest.raises(IdentityError, match=r"precision: the cache has 'float32', you ask for 'bfloat16'"):
        new_cache(tmp_path / "c.zarr", precision="bfloat16")
    assert tree(first.path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.zarr"]


def test_creators_started_together_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        caches = list(pool.map(lambda _: new_cache(tmp_path / "c.zarr"), range(8)))
    assert len({cache.cache_id for cache in caches}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.zarr"]


def test_an_empty_folder_is_taken_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert new_cache(tmp_path / "empty").samples == 40
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(SamiCacheError, match=f"{name}: exists and is not a cache .* Give another --cache"):
            new_cache(tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes.txt").read_text() == "mine"
    assert new_cache(tmp_path / "a" / "b" / "c.zarr").samples == 40


def test_the_cache_id_depends_on_the_images_and_the_settings_but_not_on_provenance(tmp_path: Path) -> None:
    def make(name: str, **changes: object) -> str:
        codec = fit_codec("pca", teacher_like(8))
        given: dict = {
            "identity": make_identity(),
            "codec": codec,
            "layout": cache_module.choose_layout(codec, 8, 2),
            "keys": ["a", "b"],
            "labels": [0, 1],
            "class_names": None,
            "provenance": {},
        }
        return create_cache(tmp_path / name, **(given | changes)).cache_id

    same = make("0")
    assert make("1", provenance={"machine": "another"}) == same
    changes = [
        {"keys": ["a", "c"]},
        {"labels": [0, 2]},
        {"keys": ["b", "a"]},
        {"identity": make_identity(precision="bfloat16")},
    ]
    assert len({same, *(make(f"d{number}", **change) for number, change in enumerate(changes))}) == 5


# ---- opening


def test_identity_mismatch_lists_every_field(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    asked = make_identity(codec={"name": "pca", "error": 0.02}, teacher={"name": "synthetic", "weights_sha256": "1" * 64})
    asked["images"] = None
    del asked["source_kind"]
    with pytest.raises(IdentityError) as caught:
        cache.check_identity(asked)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{cache.path} was made with other settings:"
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [
        "codec.error",
        "images",
        "source_kind",
        "teacher.weights_sha256",
    ]
    assert "codec.error: the cache has 0.01, you ask for 0.02" in lines[1]
    assert identity_difference(cache.identity, json.loads(json.dumps(cache.identity))) == []


def test_opening_what_is_no_cache_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        with pytest.raises(SamiCacheError, match=r"there is no cache here .*sami-cache extract --cache"):
            Cache(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"attributes":[]}',
        b'{"attributes":{"sami_cache":1}}',
        b"[" * 100_000,
        b'{"a":NaN}',
        b"\xff",
    ],
)
def test_a_head_that_is_no_head_is_damage(tmp_path: Path, data: bytes) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    (cache.path / "zarr.json").write_bytes(data)
    with pytest.raises(DamageError, match=r"zarr\.json: its content does not match the digest it carries"):
        Cache(cache.path)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": ...},
        {"samples": 2**62},
        {"samples": -1},
        {"samples": "40"},
        {"samples": 41},
        {"identity": ...},
        {"identity": {}},
        {"layout": []},
        {"layout": {"shard_samples": 2**40, "chunk_samples": 1}},
        {"codec": {"kept": 2**40, "dtype": "int8"}},
        {"files": {}},
        {"files": {"../../../etc/passwd": {"size": 1, "blake3": "0" * 64}}},
        {"files": 7},
        {"listing": "0" * 64},
        {"cache_id": "0" * 64},
    ],
    ids=lambda change: json.dumps(change, default=lambda _: "absent")[:40],
)
def test_a_head_with_a_right_digest_and_wrong_fields_is_damage(tmp_path: Path, change: dict) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    reseal_head(cache.path, **change)
    with pytest.raises(DamageError, match=r"zarr\.json: not the head of a cache"):
        Cache(cache.path)
    report = verify_cache(cache.path)
    assert [finding.path for finding in report.findings] == ["zarr.json"]


def test_a_newer_format_is_said_to_be_newer(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    reseal_head(cache.path, format=2)
    with pytest.raises(SamiCacheError, match=r"format 2, this program reads format 1\. Use a newer sami-cache"):
        Cache(cache.path)


def test_another_codec_or_listing_under_a_resealed_head_is_refused(tmp_path: Path) -> None:
    """The cache_id covers the values, not only the head's own list of files: a pinned root pins them."""
    cache, other = full_cache(tmp_path / "c.zarr"), new_cache(tmp_path / "o.zarr", samples=80)
    root = verify_cache(cache.path).root
    pq.write_table(cache.listing.take(list(range(40))[::-1]), other.path / "listing.parquet")
    files = json.loads((cache.path / "zarr.json").read_bytes())["attributes"]["sami_cache"]["files"]
    for name, use in (("mean/0", lambda c: c.codec), ("listing.parquet", lambda c: c.listing)):
        data, before = (other.path / name).read_bytes(), (cache.path / name).read_bytes()
        (cache.path / name).write_bytes(data)
        reseal_head(cache.path, files=files | {name: {"size": len(data), "blake3": digest(data)}})
        opened = Cache(cache.path)
        with pytest.raises(DamageError, match=f"{name.split('/')[0]}: is not the .* that the head names"):
            use(opened)
        assert [finding.path for finding in verify_cache(cache.path, expected_root=root).findings] == ["zarr.json"]
        (cache.path / name).write_bytes(before)


def test_use_after_a_fork_is_an_error_not_a_hang(cache: Cache) -> None:
    def child(queue) -> None:
        for use in (cache.read_codes, cache.read_jpegs, cache.read_embedding):
            try:
                use(0)
                queue.put("read")
            except SamiCacheError as error:
                queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    answers = [queue.get() for _ in range(3)]
    process.join()
    assert all("opened before a fork. Open it again in the child" in answer for answer in answers)


# ---- committing


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


# ---- durability


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


# ---- records


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0)
    whole = cache.record_path(0).read_bytes()
    pretty = json.dumps(json.loads(whole), indent=1).encode()
    for data in (b"", whole[:-1], whole + b" ", whole.replace(b'"shard":0', b'"shard":1'), pretty, b"[]", b"[" * 10**5):
        cache.record_path(0).write_bytes(data)
        with pytest.raises(DamageError, match=r"000000\.json: its content does not match the digest it carries"):
            Cache(cache.path).record(0)
    cache.record_path(0).unlink()
    with pytest.raises(DamageError, match=r"000000\.json: missing"):
        Cache(cache.path).record(0)


def test_a_record_of_elsewhere_is_refused(tmp_path: Path) -> None:
    cache, other = new_cache(tmp_path / "c.zarr"), new_cache(tmp_path / "o.zarr", precision="bfloat16")
    for one in (cache, other):
        fill_shard(one, 0)
        fill_shard(one, 1)
    shutil.copy(cache.record_path(1), cache.record_path(0))
    with pytest.raises(DamageError, match=r"shard is 1, expected 0\. The file belongs elsewhere"):
        Cache(cache.path).record(0)
    shutil.copy(other.record_path(0), cache.record_path(0))
    with pytest.raises(DamageError, match=r"cache_id is '\w+', expected '\w+'\. The file belongs elsewhere"):
        Cache(cache.path).record(0)


_CODES, _IMAGES = "codes/0.0.0.0", "images/000000.arrow"
FORGERIES = {
    "a file outside": lambda v: v["files"].update({"../../../etc/passwd": v["files"].pop(_CODES)}),
    "one file less": lambda v: v["files"].pop(_IMAGES),
    "files a list": lambda v: v.update(files=[1]),
    "no size": lambda v: v["files"][_CODES].pop("size"),
    "size of text": lambda v: v["files"][_CODES].update(size="5"),
    "negative size": lambda v: v["files"][_CODES].update(size=-5),
    "fractional size": lambda v: v["files"][_CODES].update(size=4253.0),
    "no digest": lambda v: v["files"][_CODES].update(blake3="zz"),
    "content a number": lambda v: v.update(content=5),
    "short content": lambda v: v.update(content="00"),
    "one chunk less": lambda v: v.update(chunk_crc32c=v["chunk_crc32c"][1:]),
    "a chunk too many": lambda v: v.update(chunk_crc32c=[*v["chunk_crc32c"], 0]),
    "a chunk of text": lambda v: v.update(chunk_crc32c=["a"] * len(v["chunk_crc32c"])),
    "chunks a number": lambda v: v.update(chunk_crc32c=1),
    "no samples": lambda v: v.pop("samples"),
    "samples a list": lambda v: v.update(samples=[]),
    "a column less": lambda v: v["samples"].pop("label"),
    "a row less": lambda v: [column.pop() for column in v["samples"].values()],
    "a ragged column": lambda v: v["samples"]["label"].pop(),
    "no key": lambda v: v["samples"]["key"].__setitem__(0, None),
    "a key of numbers": lambda v: v["samples"]["key"].__setitem__(0, 5),
    "no status": lambda v: v["samples"]["status"].__setitem__(0, None),
    "a huge label": lambda v: v["samples"]["label"].__setitem__(0, 2**70),
    "a label of text": lambda v: v["samples"]["label"].__setitem__(0, "cat"),
    "an image before the file": lambda v: v["samples"]["jpeg"].__setitem__(0, [-4, 8, 0]),
    "an image behind the file": lambda v: v["samples"]["jpeg"].__setitem__(0, [0, 2**62, 0]),
    "an image of negative size": lambda v: v["samples"]["jpeg"].__setitem__(0, [0, -1, 0]),
    "an image of two numbers": lambda v: v["samples"]["jpeg"].__setitem__(0, [0, 1]),
    "an image of fractions": lambda v: v["samples"]["jpeg"].__setitem__(0, [0.0, 1.0, 2.0]),
    "an image of text": lambda v: v["samples"]["jpeg"].__setitem__(0, "abc"),
    "a view of one number": lambda v: v["samples"]["view"].__setitem__(0, [0.5]),
    "an error of text": lambda v: v["samples"]["error"].__setitem__(0, "small"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_record_with_a_right_digest_and_wrong_fields_is_damage(tmp_path: Path, forgery: str) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    value = {name: part for name, part in json.loads(cache.record_path(0).read_bytes()).items() if name != "blake3"}
    FORGERIES[forgery](value)
    cache.record_path(0).write_bytes(canonical_json(seal(value)))
    fresh = Cache(cache.path)
    for use in (fresh.record, fresh.read_codes, fresh.read_jpegs):
        with pytest.raises(DamageError, match=r"000000\.json: (not a commit record of this format|does not describe shard 0)"):
            use(0)
    report = verify_cache(cache.path, level="deep")
    assert "commits/000000.json" in [finding.path for finding in report.findings]


def test_a_record_survives_being_written_and_read(cache: Cache) -> None:
    record = cache.record(1)
    data = record_bytes(record)
    assert data == cache.record_path(1).read_bytes()
    assert parse_record(data, "x", cache_id=cache.cache_id, shard=1) == record
    viewed = replace(record, samples=[replace(sample, view=[0.1, 0.2, 0.9, 1.0, 1.0]) for sample in record.samples])
    assert parse_record(record_bytes(viewed), "x", cache_id=cache.cache_id, shard=1).samples == viewed.samples


def test_only_files_of_the_right_name_are_records(cache: Cache) -> None:
    for name in ("1.json", "000003.json", "0000001.json", "x.json", "000001.json.bak", "\u0661.json", "9" * 200 + ".json"):
        (cache.path / "commits" / name).write_bytes(cache.record_path(1).read_bytes())
    cache.record_path(1).unlink()
    assert cache.committed() == [0, 2]
    shutil.rmtree(cache.path / "commits")
    with pytest.raises(DamageError, match="commits: missing"):
        cache.committed()


# ---- sealing and reading


def test_sealing_an_unfinished_cache_names_what_is_missing(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0)
    with pytest.raises(SamiCacheError, match=r"2 of 3 shards are not committed \(the first: 1\)"):
        seal_cache(cache)
    assert cache.root() is None
    assert not (cache.path / "manifest.parquet").exists()


def test_sealing_again_changes_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    before, root = tree(cache.path), seal_cache(cache)
    assert root["samples"] == 40
    assert (root["ok"], root["failed"], root["shards"]) == (39, 1, 3)
    assert tree(cache.path) == before
    # Another version of pyarrow writes other bytes for the same table.
    real = pq.write_table
    monkeypatch.setattr(writing.pq, "write_table", lambda table, sink, **_: real(table, sink, compression="gzip"))
    assert seal_cache(cache) == root
    assert tree(cache.path) == before


@pytest.mark.parametrize("name", ["manifest.parquet", "ROOT.json"])
def test_sealing_mends_a_damaged_seal(cache: Cache, name: str) -> None:
    before = tree(cache.path)
    (cache.path / name).write_bytes(b"{}")
    seal_cache(Cache(cache.path))
    after = tree(cache.path)
    assert {path: data for path, data in after.items() if not path.startswith("quarantine/")} == before
    assert [data for path, data in after.items() if path.startswith("quarantine/")] == [b"{}"]


def test_sealers_started_together_agree(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    fill_all(cache)
    with ThreadPoolExecutor(6) as pool:
        roots = list(pool.map(lambda _: seal_cache(Cache(cache.path)), range(6)))
    assert all(root == roots[0] for root in roots)
    assert not (cache.path / "quarantine").exists()
    assert verify_cache(cache.path).findings == []


def test_the_root_is_over_the_records_and_bound_to_the_cache(cache: Cache) -> None:
    root = cache.root()
    assert root is not None
    records = list(cache.records())
    assert root["root"] == merkle_root(cache.cache_id, [record.digest for record in records])
    assert root["content_root"] == merkle_root(cache.cache_id, [record.content for record in records])
    leaves = [record.digest for record in records]
    others = [
        merkle_root("0" * 64, leaves),
        merkle_root(cache.cache_id, leaves[::-1]),
        merkle_root(cache.cache_id, leaves[:2]),
        merkle_root(cache.cache_id, [*leaves, leaves[-1]]),
        merkle_root(cache.cache_id, []),
    ]
    assert len({root["root"], *others}) == 6


def test_merkle_nodes_of_one_kind_cannot_pass_for_another() -> None:
    """Computed by hand from docs/format.md."""
    from blake3 import blake3

    a, b, c = (bytes([number]) * 32 for number in (1, 2, 3))
    leaf = [blake3(b"\x00" + value).digest() for value in (a, b, c)]
    pair = blake3(b"\x01" + leaf[0] + leaf[1]).digest()
    top = blake3(b"\x01" + pair + leaf[2]).digest()
    expected = blake3(b"\x02" + bytes(32) + (3).to_bytes(8, "big") + top).hexdigest()
    assert merkle_root("00" * 32, [a.hex(), b.hex(), c.hex()]) == expected
    # Two leaves whose parent is given as a single leaf make another root.
    assert merkle_root("00" * 32, [(leaf[0] + leaf[1]).hex()]) != merkle_root("00" * 32, [a.hex(), b.hex()])


def test_the_table_says_what_the_records_say(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    assert cache.table().equals(TABLE_SCHEMA.empty_table())
    for shard in (2, 0, 1):
        fill_shard(cache, shard, bad=(3,) if shard == 1 else ())
    unsealed = cache.table()
    seal_cache(cache)
    sealed = cache.table()
    assert sealed.equals(unsealed)
    assert pq.read_table(cache.path / "manifest.parquet").equals(sealed)
    rows = sealed.to_pylist()
    assert [row["key"] for row in rows] == cache.listing["key"].to_pylist()
    for record in cache.records():
        for number, sample in zip(cache.shard_samples(record.shard), record.samples, strict=True):
            assert rows[number] == {"shard": record.shard, "record": record.digest, **vars(sample)}


def test_a_manifest_that_the_root_does_not_name_is_refused(cache: Cache) -> None:
    table = cache.table()
    pq.write_table(table.slice(0, 39), cache.path / "manifest.parquet")
    with pytest.raises(DamageError, match=r"manifest\.parquet: its \d+ bytes are not the \d+ that ROOT\.json names"):
        cache.table()
    (cache.path / "manifest.parquet").unlink()
    with pytest.raises(DamageError, match=r"manifest\.parquet: missing"):
        cache.table()


def test_jpegs_are_read_by_offset_and_by_pyarrow(cache: Cache) -> None:
    for shard in range(cache.shards):
        jpegs, keys = cache.read_jpegs(shard), keys_of(cache, shard)
        bad = 3 if shard == 1 else -1
        assert jpegs == [None if i == bad else f"jpeg of {key}".encode() * 5 for i, key in enumerate(keys)]
        assert cache.read_jpegs(shard, [5, 0]) == [jpegs[5], jpegs[0]]
        table = pa.ipc.open_file(cache.path / f"images/{shard:06d}.arrow").read_all()
        assert table["jpeg"].to_pylist() == [jpeg for jpeg in jpegs if jpeg is not None]
        assert table["key"].to_pylist() == [key for i, key in enumerate(keys) if i != bad]


def test_views_of_one_image_share_one_jpeg(tmp_path: Path) -> None:
    codec = fit_codec("pca", teacher_like(40))
    cache = create_cache(
        tmp_path / "c.zarr",
        identity=make_identity(view={"mode": "replay", "views": 4, "seed": 0}),
        codec=codec,
        layout=cache_module.choose_layout(codec, 8, 40, 32),
        keys=[f"{number}" for number in range(10)],
        labels=[None] * 10,
        class_names=None,
        provenance={},
    )
    assert (cache.samples, cache.views, cache.shards) == (40, 4, 2)
    keys = [f"{number // 4}" for number in range(32)]
    samples = [replace(sample, view=[0.0, 0.0, 1.0, 1.0, 0.0]) for sample in make_samples(keys)]
    write_shard(cache, 0, teacher_like(32), samples, [f"jpeg {key}".encode() for key in keys])
    assert cache.read_jpegs(0) == [f"jpeg {key}".encode() for key in keys]
    assert len(locate_images((cache.path / "images/000000.arrow").read_bytes())) == 8


def test_an_image_file_with_a_changed_image_is_not_located() -> None:
    data = pack_images({"a": ("s", b"first"), "b": ("s", b"second")})
    assert {key: place[:2] for key, (_, place) in locate_images(data).items()} == {
        "a": [data.index(b"first"), 5],
        "b": [data.index(b"second"), 6],
    }
    with pytest.raises(ValueError, match="does not match its crc32c"):
        locate_images(data.replace(b"second", b"sec0nd"))
    for broken in (b"", data[: len(data) // 2], b"x" * 500):
        with pytest.raises((pa.ArrowException, ValueError, OSError)):
            locate_images(broken)


def test_a_read_only_cache_is_read_verified_and_sealed_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for call in ("link", "rename", "mkdir", "unlink", "write", "fsync"):
        monkeypatch.setattr(os, call, refuse)
    opened = Cache(cache.path)
    assert opened.read_codes(0).any()
    assert opened.table().num_rows == 40
    assert seal_cache(opened)["ok"] == 39
    assert verify_cache(cache.path, level="deep").findings == []
