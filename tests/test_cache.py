"""Creating and opening a cache: complete or not at all, and nothing but what it says it is."""

import errno
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    full_cache,
    make_identity,
    new_cache,
    reseal_head,
    teacher_like,
    tree,
)

from sami_cache.errors import DamageError, DiskFullError, IdentityError, SamiCacheError
from sami_cache.store import cache as cache_module
from sami_cache.store import creation
from sami_cache.store.cache import Cache, choose_layout, listing_digest
from sami_cache.store.commits import FileEntry
from sami_cache.store.creation import create_cache
from sami_cache.store.files import canonical_json, digest, write_durably
from sami_cache.store.fitting import fit_codec
from sami_cache.store.head import CODEC_ARRAYS, identity_difference
from sami_cache.store.integrity import verify_cache

# ---- creating


def test_creating_is_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = write_durably, []

    def fail_late(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(creation, "write_durably", fail_late)
    with pytest.raises(DiskFullError, match=r"the disk is full .* while making the cache"):
        new_cache(tmp_path / "c.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_sees_half_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any point before the rename, nothing has the cache's name."""
    monkeypatch.setattr(creation.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
        {"codec": {"kept": 2**40, "channels": 24, "directions": 24, "block": 8, "dtype": "int8", "error": None}},
        {"codec": {"kept": 24, "channels": 24, "directions": 24, "block": 0, "dtype": "int8", "error": None}},
        {"codec": {"kept": 24, "channels": 24, "directions": 24, "block": 3, "dtype": "int8", "error": None}},
        {"files": {}},
        {"files": {"../../../etc/passwd": asdict(FileEntry.of(b"0"))}},
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


@pytest.mark.parametrize(
    ("number", "mend"),
    [(1, "It was never released: extract the images"), (2, "It was never released"), (4, "Use a newer sami-cache")],
)
def test_another_format_is_refused_and_what_to_do_is_said(tmp_path: Path, number: int, mend: str) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    reseal_head(cache.path, format=number)
    with pytest.raises(SamiCacheError, match=rf"format {number}, this program reads format 3\. {mend}"):
        Cache(cache.path)


@pytest.mark.parametrize(
    "change",
    [
        {"step": np.float32(-1)},
        {"step": np.float32("nan")},
        {"basis": np.float32("inf")},
        {"mean": np.float32("nan")},
        {"index": np.int32(24 * 64)},
        {"index": np.int32(-1)},
        {"variance": float(0)},
        {"name": "zip"},
    ],
    ids=str,
)
def test_a_codec_that_decodes_nonsense_is_damage_whoever_vouches_for_it(tmp_path: Path, change: dict) -> None:
    """Created like any other, so that every digest is right."""
    codec = fit_codec("pca", teacher_like(16))
    ((name, value),) = change.items()
    if name in CODEC_ARRAYS:
        array = getattr(codec, name).copy()
        array.flat[-1] = value
        value = array
    layout, keys = choose_layout(codec, 8, 16), [f"{index}.jpg" for index in range(16)]
    head = {"identity": make_identity(), "layout": layout, "keys": keys, "labels": [None] * 16, "class_names": None}
    cache = create_cache(tmp_path / "c.zarr", codec=replace(codec, **{name: value}), provenance={}, **head)
    with pytest.raises(DamageError, match=r"zarr\.json: codec"):
        _ = cache.codec


@pytest.mark.parametrize(
    ("sizes", "grid", "what"),
    [
        ((25, 24, 8), 8, "embeddings of 24 channels, 8 x 8"),
        ((24, 2**20, 8), 8, "embeddings of 1048576 channels, 8 x 8"),
        ((24, 24, 3), 8, r"codec of sizes \[.*, 24, 24, 3\] in a grid of 8"),
        ((24, 24, 1024), 1024, "embeddings of 24 channels, 1024 x 1024"),
    ],
)
def test_a_codec_of_sizes_that_none_has_is_damage(tmp_path: Path, sizes: tuple, grid: int, what: str) -> None:
    """A few kilobytes could otherwise ask a reader for any memory they like."""
    directions, channels, block = sizes
    codec = fit_codec("pca", teacher_like(16))
    layout, keys = choose_layout(codec, 8, 16), [f"{index}.jpg" for index in range(16)]
    arrays = {"basis": np.zeros((directions, channels)), "dct": np.zeros((block, block)), "mean": np.zeros(channels)}
    head = {"identity": make_identity(grid=grid), "layout": layout, "keys": keys, "labels": [None] * 16, "class_names": None}
    with pytest.raises(DamageError, match=rf"zarr\.json: not the head of a cache \(.*{what}"):
        create_cache(tmp_path / "c.zarr", codec=replace(codec, **arrays), provenance={}, **head)


def test_the_digest_of_a_listing_is_that_of_its_canonical_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is cut, and whatever holds it."""
    keys = ["a.jpg", 'b"\\.jpg', "ä/\U0001f600.jpg", ",", "[]"]
    for step in (1, 2, 5, 100):
        monkeypatch.setattr(cache_module, "_LISTED_AT_ONCE", step)
        for count in range(6):
            for labels in ([None] * count, [None, -1, 2**62, 0, 7][:count]):
                expected = digest(canonical_json([keys[:count], labels]))
                table = pa.table({"key": pa.array(keys[:count], pa.string()), "label": pa.array(labels, pa.int64())})
                pieces = pa.concat_tables([table.slice(0, 2), table.slice(2)])
                assert listing_digest(keys[:count], labels) == expected
                assert listing_digest(tuple(keys[:count]), tuple(labels)) == expected
                assert listing_digest(pieces["key"], pieces["label"]) == expected


def test_another_codec_or_listing_under_a_resealed_head_is_refused(tmp_path: Path) -> None:
    """The cache_id covers the values, not only the head's own list of files: a pinned root pins them."""
    cache, other = full_cache(tmp_path / "c.zarr"), new_cache(tmp_path / "o.zarr", samples=80)
    root = verify_cache(cache.path).root
    pq.write_table(cache.listing.take(list(range(40))[::-1]), other.path / "listing.parquet")
    files = json.loads((cache.path / "zarr.json").read_bytes())["attributes"]["sami_cache"]["files"]
    for name, use in (("mean/0", lambda c: c.codec), ("listing.parquet", lambda c: c.listing)):
        data, before = (other.path / name).read_bytes(), (cache.path / name).read_bytes()
        (cache.path / name).write_bytes(data)
        reseal_head(cache.path, files=files | {name: asdict(FileEntry.of(data))})
        opened = Cache(cache.path)
        with pytest.raises(DamageError, match=f"{name.split('/')[0]}: is not the .* that the head names"):
            use(opened)
        assert [finding.path for finding in verify_cache(cache.path, expected_root=root).findings] == ["zarr.json", "spare.tar"]
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
