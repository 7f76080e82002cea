"""Commit records, seals, roots, and reading what was committed."""

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    fill_all,
    fill_shard,
    full_cache,
    keys_of,
    make_identity,
    make_samples,
    new_cache,
    teacher_like,
    tree,
)

from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store import cache as cache_module
from sami_cache.store import writing
from sami_cache.store.cache import Cache
from sami_cache.store.commits import TABLE_SCHEMA, FileEntry, merkle_root, parse_record, record_bytes
from sami_cache.store.creation import create_cache
from sami_cache.store.files import canonical_json, seal
from sami_cache.store.fitting import fit_codec
from sami_cache.store.images import locate_images, pack_images
from sami_cache.store.integrity import verify_cache
from sami_cache.store.writing import seal_cache, write_shard


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
    real = pq.ParquetWriter
    monkeypatch.setattr(writing.pq, "ParquetWriter", lambda sink, schema, **_: real(sink, schema, compression="gzip"))
    assert seal_cache(cache) == root
    assert tree(cache.path) == before


@pytest.mark.parametrize("wrong", ["a value", "a column too many"])
def test_sealing_again_replaces_a_manifest_that_says_something_else(cache: Cache, wrong: str) -> None:
    """One that its ROOT.json names: what is compared is what it says."""
    before, root = tree(cache.path), seal_cache(cache)
    table = cache.table()
    if wrong == "a value":
        place = table.schema.get_field_index("error")
        table = table.set_column(place, table.schema.field(place), pa.array([0.5] * 40))
    else:
        table = table.append_column("more", pa.array([1] * 40))
    (cache.path / "manifest.parquet").unlink()
    pq.write_table(table, cache.path / "manifest.parquet")
    entry = asdict(FileEntry.of((cache.path / "manifest.parquet").read_bytes()))
    (cache.path / "ROOT.json").write_bytes(canonical_json(seal({**root, "manifest": entry})))
    seal_cache(Cache(cache.path))
    assert {path: data for path, data in tree(cache.path).items() if not path.startswith("quarantine/")} == before


def test_the_manifest_is_packed_in_row_groups_whatever_the_shards(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    table = cache.table()
    monkeypatch.setattr(writing, "ROW_GROUP", 12)
    for parts in ([table], [table.slice(start, 5) for start in range(0, 40, 5)], [table.slice(0, 24), table.slice(24)]):
        file = pq.ParquetFile(pa.BufferReader(writing.pack_manifest(parts)))
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [12, 12, 12, 4]
        assert file.read().equals(table)
    file = pq.ParquetFile(pa.BufferReader(writing.pack_manifest([table.slice(0, 24)])))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [12, 12]


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
    assert cache.table(["status", "key"]).equals(unsealed.select(["status", "key"]))
    seal_cache(cache)
    sealed = cache.table()
    assert sealed.equals(unsealed)
    assert cache.table(["status", "key"]).equals(unsealed.select(["status", "key"]))
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
