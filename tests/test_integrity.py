"""Verification: every way in which a file can be wrong is found, the right file and samples are named, nothing raises."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import fill_shard, full_cache, make_samples, new_cache, teacher_like

from sami_cache.errors import SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import FileEntry
from sami_cache.store.files import canonical_json, seal
from sami_cache.store.integrity import LEVELS, Report, verify_cache
from sami_cache.store.repair import quarantine_shard
from sami_cache.store.shards import crc32c, pack_shard
from sami_cache.store.writing import seal_cache, write_shard

FILES = (
    *("zarr.json", "listing.parquet", "manifest.parquet", "ROOT.json", "spare.tar"),
    *(
        "codes/zarr.json",
        "basis/zarr.json",
        "basis/0.0",
        "dct/zarr.json",
        "dct/0.0",
        "mean/zarr.json",
        "mean/0",
        "step/zarr.json",
        "step/0",
    ),
    *("index/zarr.json", "index/0"),
    *(f"codes/{shard}.0.0.0" for shard in range(3)),
    *(f"images/{shard:06d}.arrow" for shard in range(3)),
    *(f"commits/{shard:06d}.json" for shard in range(3)),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache that no test changes; chunks of 4 samples, so that damage can be narrowed down."""
    return full_cache(tmp_path_factory.mktemp("whole") / "c.zarr", chunk_samples=4).path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "c.zarr"))


def named(report: Report) -> set[str]:
    return {finding.path for finding in report.findings}


def keys(shard: int) -> list[str]:
    return [f"class/{number:04d}.jpg" for number in range(16 * shard, min(16 * shard + 16, 40))]


def shard_of(name: str) -> int:
    return int(Path(name).name.split(".")[0])


def reads(cache: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that training reads, each through a freshly opened cache."""
    for shard in range(3):
        yield f"codes {shard}", lambda shard=shard: Cache(cache).read_codes(shard).tobytes()
        yield f"jpegs {shard}", lambda shard=shard: Cache(cache).read_jpegs(shard)
    for sample in (0, 17, 39):
        yield f"sample {sample}", lambda sample=sample: Cache(cache).read_embedding(sample).tobytes()
    yield "table", lambda: Cache(cache).table().drop_columns("record").to_pylist()
    yield "listing", lambda: list(Cache(cache).listing.to_pylist())


@pytest.fixture(scope="module")
def right(whole: Path) -> dict[str, object]:
    return {name: use() for name, use in reads(whole)}


def assert_no_wrong_value(cache: Path, right: dict[str, object]) -> int:
    """How many reads raise; all others give the committed values."""
    refused = 0
    for name, use in reads(cache):
        try:
            value = use()
        except SamiCacheError:
            refused += 1
        else:
            assert value == right[name], name
    return refused


def test_the_list_of_files_is_complete(whole: Path) -> None:
    assert {str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()} == set(FILES)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "make",
    [
        full_cache,
        lambda path: full_cache(path, images=None),
        lambda path: full_cache(path, codec="float16"),
        lambda path: full_cache(path, codec="int8", samples=33, chunk_samples=1),
        lambda path: full_cache(path, error=1e-5),
    ],
    ids=["dense", "no images", "float16", "int8", "wide"],
)
def test_clean_caches_are_clean(tmp_path: Path, make, level: str) -> None:
    cache = make(tmp_path / "c.zarr")
    calls: list[tuple[int, int, int]] = []
    report = verify_cache(cache.path, level=level, on_progress=lambda *numbers: calls.append(numbers))
    assert report.clean
    assert report.findings == report.notes == []
    assert report.sealed
    root = cache.root()
    assert root is not None
    assert report.root == root["root"]
    assert report.content_root == (root["content_root"] if level == "deep" else None)
    assert (report.shards, report.samples, report.failed_samples) == (3, cache.samples, 1)
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    assert any("--audit" in text for text in report.not_checked)
    assert any("--deep" in text for text in report.not_checked) == (level == "default")
    assert any("only that they are there" in text for text in report.not_checked) == (level == "quick")


def test_default_reads_every_byte_of_the_shards(whole: Path) -> None:
    size = sum((whole / name).stat().st_size for name in FILES if name.startswith(("codes/", "images/")))
    assert verify_cache(whole, level="default").bytes_read - verify_cache(whole, level="quick").bytes_read == size - (
        (whole / "codes/zarr.json").stat().st_size
    )


def test_there_must_be_a_cache(tmp_path: Path) -> None:
    with pytest.raises(SamiCacheError, match="there is no cache here"):
        verify_cache(tmp_path / "none")
    with pytest.raises(SamiCacheError, match="level 'thorough' is unknown; choose one of quick, default, deep"):
        verify_cache(tmp_path, level="thorough")


# ---- one file is wrong


def damaged_samples(name: str, offset: int, cache: Path) -> set[str] | None:
    """The samples whose bytes hold `offset` of file `name`, None if that cannot be said without the code under test."""
    record = json.loads((cache / f"commits/{shard_of(name):06d}.json").read_bytes())
    if name.startswith("images/"):
        places = zip(record["samples"]["key"], record["samples"]["jpeg"], strict=True)
        return {key for key, place in places if place and place[0] <= offset < place[0] + place[1]}
    data = (cache / name).read_bytes()
    index = np.frombuffer(data[-4 - 16 * 4 : -4], "<u8").reshape(-1, 2).tolist()
    if offset >= len(data) - 4 - 16 * 4:
        return set(keys(shard_of(name)))
    (chunk,) = [number for number, (start, size) in enumerate(index) if start <= offset < start + size]
    return set(keys(shard_of(name))[4 * chunk : 4 * chunk + 4])


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_found_and_the_samples_named(path: Path, whole: Path, right: dict, name: str) -> None:
    data = (whole / name).read_bytes()
    rng = random.Random(name)
    for offset in {0, 1, len(data) - 1, len(data) - 5, *(rng.randrange(len(data)) for _ in range(8))}:
        flipped = bytearray(data)
        flipped[offset] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(flipped)
        report = verify_cache(path)
        assert named(report) == {name}, offset
        if name.startswith(("codes/0", "codes/1", "codes/2", "images/")):
            (finding,) = report.findings
            assert finding.shard == shard_of(name)
            assert set(finding.samples) == damaged_samples(name, offset, whole)
        if name.startswith("commits/"):
            assert report.findings[0].shard == shard_of(name)
        assert_no_wrong_value(path, right)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one byte more": lambda data: data + b"\0",
    "twice": lambda data: data + data,
    "tail of zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "all zeros": lambda data: bytes(len(data)),
    "reversed": lambda data: data[::-1],
    "json of another shape": lambda data: b'{"blake3":[]}\n',
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FILES)
def test_files_of_other_content_are_found(path: Path, right: dict, name: str, change: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(CHANGES[change](data))
    report = verify_cache(path)
    assert named(report) == {name}
    if name.startswith("codes/") and name != "codes/zarr.json":
        assert report.findings[0].samples == keys(shard_of(name))
    if len(CHANGES[change](data)) != len(data):
        assert named(verify_cache(path, level="quick")) == {name}
    assert_no_wrong_value(path, right)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_found(path: Path, right: dict, name: str, level: str) -> None:
    (path / name).unlink()
    report = verify_cache(path, level=level)
    assert named(report) == {name}
    assert "missing" in report.findings[0].what
    if name.startswith("images/"):
        assert report.findings[0].samples == [key for key in keys(shard_of(name)) if key != "class/0019.jpg"]
    if name == "ROOT.json":
        assert not report.sealed
        assert "not sealed. Run the same `sami-cache extract` command" in report.findings[0].what
        assert_no_wrong_value(path, right)
        return
    assert assert_no_wrong_value(path, right) > 0 or "/zarr.json" in name or name == "spare.tar"


@pytest.mark.parametrize("what", ["folder", "fifo", "loop", "dangling", "device"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_found_without_waiting(path: Path, right: dict, name: str, what: str) -> None:
    (path / name).unlink()
    if what == "folder":
        (path / name).mkdir()
    elif what == "fifo":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to({"loop": (path / name).name, "dangling": "nothing", "device": "/dev/zero"}[what])
    assert named(verify_cache(path)) == {name}
    assert_no_wrong_value(path, right)


@pytest.mark.parametrize("name", FILES)
def test_files_grown_beyond_the_memory_are_found(path: Path, right: dict, name: str) -> None:
    os.truncate(path / name, 1 << 42)  # sparse: nothing is written
    assert named(verify_cache(path)) == {name}
    assert_no_wrong_value(path, right)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["commits", "codes", "images", "basis", "tmp"])
def test_missing_folders_are_found(path: Path, name: str, level: str) -> None:
    shutil.rmtree(path / name)
    report = verify_cache(path, level=level)
    assert {Path(found).parts[0] for found in named(report)} == ({name} if name != "tmp" else set())
    (path / name).write_text("a file in a folder's place")
    report = verify_cache(path, level=level)
    assert name in {Path(found).parts[0] for found in named(report)}


def test_unreadable_sectors_are_found_and_the_rest_is_checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from sami_cache.store import files

    real = files.open_to_read
    bad = {path / "codes/0.0.0.0", path / "commits/000001.json", path / "mean/0", path / "manifest.parquet"}

    def broken(file: Path) -> int:
        with files.reading(file):
            if file in bad:
                raise OSError(errno.EIO, "Input/output error")
        return real(file)

    monkeypatch.setattr(files, "open_to_read", broken)
    (path / "images/000002.arrow").unlink()
    found = {finding.path: finding.what for finding in verify_cache(path).findings}
    assert set(found) == {str(file.relative_to(path)) for file in bad} | {"images/000002.arrow"}
    assert "cannot be read (Input/output error)" in found["mean/0"]


def test_a_file_that_may_not_be_read_is_not_called_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    real = os.open

    def refuse(file, *args) -> int:
        if str(file).endswith("0.0.0.0"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(file, *args)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        verify_cache(path)


# ---- whole files from elsewhere


@pytest.mark.parametrize("folder", ["codes/{}.0.0.0", "images/00000{}.arrow", "commits/00000{}.json"])
def test_two_shards_files_swapped(path: Path, right: dict, folder: str) -> None:
    a, b = folder.format(0), folder.format(1)
    one, two = (path / a).read_bytes(), (path / b).read_bytes()
    (path / a).write_bytes(two)
    (path / b).write_bytes(one)
    assert named(verify_cache(path)) == {a, b}
    assert_no_wrong_value(path, right)


def test_two_whole_shards_swapped(path: Path, right: dict) -> None:
    for folder in ("codes/{}.0.0.0", "images/00000{}.arrow", "commits/00000{}.json"):
        os.rename(path / folder.format(0), path / "swap")
        os.rename(path / folder.format(1), path / folder.format(0))
        os.rename(path / "swap", path / folder.format(1))
    report = verify_cache(path, level="quick")
    assert named(report) == {"commits/000000.json", "commits/000001.json"}
    assert report.damaged_shards == [0, 1]
    assert_no_wrong_value(path, right)


def sealed_with_other_images(path: Path) -> Cache:
    """The same settings, keys and labels, so the same kind of cache, but shard 1 came from other pictures."""
    cache = new_cache(path, chunk_samples=4)
    fill_shard(cache, 0)
    write_shard(cache, 1, teacher_like(16, seed=77), make_samples(keys(1)), [b"another picture"] * 16)
    fill_shard(cache, 2)
    seal_cache(cache)
    return cache


@pytest.mark.parametrize("level", LEVELS)
def test_a_shard_and_its_record_from_a_cache_of_other_images(path: Path, tmp_path: Path, level: str) -> None:
    other = sealed_with_other_images(tmp_path / "other.zarr")
    assert other.cache_id == Cache(path).cache_id
    for name in (*other.shard_files(1), "commits/000001.json"):
        shutil.copy(other.path / name, path / name)
    report = verify_cache(path, level=level)
    assert named(report) == {"commits/000001.json"}
    assert report.damaged_shards == [1]
    assert "is not the record that the cache was sealed with" in report.findings[0].what


@pytest.mark.parametrize("level", LEVELS)
def test_a_shard_and_its_record_from_a_cache_of_other_settings(path: Path, tmp_path: Path, right: dict, level: str) -> None:
    other = full_cache(tmp_path / "other.zarr", chunk_samples=4, precision="bfloat16")
    for name in (*other.shard_files(1), "commits/000001.json"):
        shutil.copy(other.path / name, path / name)
    report = verify_cache(path, level=level)
    assert named(report) == {"commits/000001.json"}
    assert "The file belongs elsewhere" in report.findings[0].what
    assert_no_wrong_value(path, right)


@pytest.mark.parametrize("name", ["zarr.json", "ROOT.json", "manifest.parquet", "basis/0.0", "listing.parquet"])
def test_a_file_of_the_cache_itself_from_another_cache(path: Path, tmp_path: Path, right: dict, name: str) -> None:
    other = full_cache(tmp_path / "other.zarr", samples=38, chunk_samples=4, precision="bfloat16")
    shutil.copy(other.path / name, path / name)
    found = named(verify_cache(path))
    assert name in found or (name == "zarr.json" and {f"commits/{shard:06d}.json" for shard in range(3)} <= found)
    if name != "zarr.json":
        assert found == {name}
        assert_no_wrong_value(path, right)


def test_files_rolled_back_to_before_a_repair(path: Path, tmp_path: Path) -> None:
    """Each one is whole, of this cache and of its place, and older."""
    old = Path(shutil.copytree(path, tmp_path / "old"))
    cache = Cache(path)
    quarantine_shard(cache, 1)
    write_shard(cache, 1, teacher_like(16, seed=77), make_samples(keys(1)), [b"another picture"] * 16)
    seal_cache(cache)
    assert verify_cache(path, level="deep").findings == []
    now = Path(shutil.copytree(path, tmp_path / "now"))
    for names, expected in (
        (["commits/000001.json"], {"commits/000001.json", "codes/1.0.0.0", "images/000001.arrow"}),
        (["codes/1.0.0.0"], {"codes/1.0.0.0"}),
        (["images/000001.arrow"], {"images/000001.arrow"}),
        (["commits/000001.json", "codes/1.0.0.0", "images/000001.arrow"], {"commits/000001.json"}),
        (["manifest.parquet"], {"manifest.parquet"}),
        (["ROOT.json"], {"ROOT.json", "manifest.parquet"}),
        (["ROOT.json", "manifest.parquet"], {"commits/000001.json"}),
    ):
        for name in names:
            shutil.copy(old / name, path / name)
        assert named(verify_cache(path)) == expected
        for name in names:
            shutil.copy(now / name, path / name)
    for name in FILES:  # everything at once: only a root noted elsewhere can tell
        shutil.copy(old / name, path / name)
    assert verify_cache(path).findings == []
    root = verify_cache(now).root
    (finding,) = verify_cache(path, expected_root=root).findings
    assert finding.path == "ROOT.json"
    assert finding.what.endswith(f"you expect {root}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("codes/0.0.0.0", "codes/3.0.0.0"),
        ("codes/0.0.0.0", "codes/0.0.0.0.bak"),
        ("images/000000.arrow", "images/000003.arrow"),
        ("commits/000000.json", "commits/000003.json"),
        ("commits/000000.json", "commits/0.json"),
        ("zarr.json", "sub/zarr.json"),
        ("ROOT.json", "codes/c/0/0/0/0"),
    ],
)
def test_a_file_under_another_name_is_foreign(path: Path, right: dict, name: str, copy: str, level: str) -> None:
    (path / copy).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path / name, path / copy)
    report = verify_cache(path, level=level)
    (finding,) = report.findings
    assert (finding.path, finding.foreign, finding.shard) == (copy, True, None)
    assert assert_no_wrong_value(path, right) == 0


def test_several_damages_are_all_named(path: Path) -> None:
    changed = {"codes/0.0.0.0", "images/000001.arrow", "commits/000002.json", "mean/0", "manifest.parquet"}
    for name in changed:
        data = bytearray((path / name).read_bytes())
        data[40] ^= 1
        (path / name).write_bytes(data)
    report = verify_cache(path)
    assert named(report) == changed
    assert report.damaged_shards == [0, 1, 2]


# ---- what each level and the pinned root are for


def forge_codes(path: Path, codes: np.ndarray) -> None:
    """Replace shard 0's codes and everything that stands for their bytes, but nothing that stands for their content."""
    cache = Cache(path)
    data, checksums = pack_shard(codes, cache.layout)
    (path / "codes/0.0.0.0").write_bytes(data)
    record = {name: value for name, value in json.loads(cache.record_path(0).read_bytes()).items() if name != "blake3"}
    record["files"]["codes/0.0.0.0"] = asdict(FileEntry.of(data))
    record["chunk_crc32c"] = checksums
    cache.record_path(0).write_bytes(canonical_json(seal(record)))
    for name in ("ROOT.json", "manifest.parquet"):
        (path / name).unlink()
    seal_cache(Cache(path))


def test_deep_finds_what_only_decoding_can_tell(path: Path) -> None:
    codes = Cache(path).read_codes(0)
    codes[5, 0, 0, 0] += 1
    forge_codes(path, codes)
    assert verify_cache(path).findings == []
    report = verify_cache(path, level="deep")
    assert named(report) == {"codes/0.0.0.0"}
    assert [key for finding in report.findings for key in finding.samples] == ["class/0005.jpg"]
    assert report.content_root is None


def test_deep_finds_numbers_that_are_none_and_failed_samples_that_hold_some(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr", codec="float16", chunk_samples=4)
    for shard in range(3):
        fill_shard(cache, shard, bad=(3,) if shard == 0 else ())
    seal_cache(cache)
    codes = cache.read_codes(0)
    codes[3, 0, 0, 0], codes[7, 1, 1, 1] = 1, np.nan
    forge_codes(cache.path, codes)
    found = {finding.what: finding.samples for finding in verify_cache(cache.path, level="deep").findings}
    assert found["holds NaN or infinity"] == ["class/0007.jpg"]
    assert found["the codes of samples are not the committed ones"] == ["class/0003.jpg", "class/0007.jpg"]


def test_quick_does_not_read_the_shards_and_says_so(path: Path) -> None:
    data = bytearray((path / "codes/0.0.0.0").read_bytes())
    data[40] ^= 1
    (path / "codes/0.0.0.0").write_bytes(data)
    report = verify_cache(path, level="quick")
    assert report.clean
    assert "the bytes of codes and images (only that they are there and how long they are)" in report.not_checked


def test_an_expected_root_tells_a_consistent_forgery(path: Path) -> None:
    root = verify_cache(path).root
    assert verify_cache(path, expected_root=root).clean
    assert not any("--root" in text for text in verify_cache(path, expected_root=root).not_checked)
    assert any("--root" in text for text in verify_cache(path).not_checked)
    codes = Cache(path).read_codes(0)
    codes[0] += 1
    forge_codes(path, codes)
    assert verify_cache(path).clean
    (finding,) = verify_cache(path, expected_root=root).findings
    assert "you expect" in finding.what


def test_a_forged_manifest_under_a_forged_root_is_found(path: Path) -> None:
    """Training reads labels from the manifest; the pinned root is over the records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path / "manifest.parquet")
    forged = table.set_column(table.schema.get_field_index("label"), "label", pa.array([1] * 40, pa.int64()))
    pq.write_table(forged, path / "manifest.parquet")
    data = (path / "manifest.parquet").read_bytes()
    root = {name: value for name, value in json.loads((path / "ROOT.json").read_bytes()).items() if name != "blake3"}
    root["manifest"] = asdict(FileEntry.of(data))
    (path / "ROOT.json").write_bytes(canonical_json(seal(root)))
    assert named(verify_cache(path, level="deep")) == {"manifest.parquet"}
    assert named(verify_cache(path, expected_root=root["root"])) == {"manifest.parquet"}


@pytest.mark.parametrize(
    "change",
    [
        {"root": "0" * 64},
        {"content_root": "0" * 64},
        {"shards": 4},
        {"samples": 41},
        {"ok": 40},
        {"failed": 0},
        {"root": 5},
        {"root": "xyz"},
        {"manifest": None},
        {"manifest": asdict(FileEntry.of(b"")) | {"size": -1}},
        {"failed": "none"},
        {"cache_id": "0" * 64},
        {"cache_id": None},
    ],
    ids=str,
)
def test_a_root_with_a_right_digest_and_wrong_fields_is_found(path: Path, change: dict) -> None:
    root = {name: value for name, value in json.loads((path / "ROOT.json").read_bytes()).items() if name != "blake3"}
    (path / "ROOT.json").write_bytes(canonical_json(seal(root | change)))
    assert named(verify_cache(path)) == {"ROOT.json"}
    seal_cache(Cache(path))
    assert verify_cache(path).clean


def test_metadata_that_would_mislead_stock_readers_is_found_even_if_the_head_vouches_for_it(path: Path) -> None:
    forged = (path / "codes/zarr.json").read_bytes().replace(b'"shape":[40,', b'"shape":[4000000000,')
    (path / "codes/zarr.json").write_bytes(forged)
    head = json.loads((path / "zarr.json").read_bytes())
    attributes = {name: value for name, value in head["attributes"]["sami_cache"].items() if name != "blake3"}
    attributes["files"]["codes/zarr.json"] = asdict(FileEntry.of(forged))
    head["attributes"]["sami_cache"] = seal(attributes)
    (path / "zarr.json").write_bytes(canonical_json(head))
    assert named(verify_cache(path)) == {"codes/zarr.json", "spare.tar"}  # the copy is still the right one


def test_an_unsealed_cache_says_so_and_leftovers_are_notes(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "c.zarr")
    fill_shard(cache, 0)
    fill_shard(cache, 1)
    cache.record_path(1).unlink()
    (cache.path / "tmp" / "left").write_bytes(bytes(10))
    report = verify_cache(cache.path)
    assert not report.sealed
    assert named(report) == {"ROOT.json", "commits/000001.json", "commits/000002.json"}
    assert report.damaged_shards == [1, 2]
    assert report.root is None
    notes = "\n".join(report.notes)
    assert "codes/1.0.0.0: not committed; the next `sami-cache extract` uses or replaces it" in notes
    assert "tmp/: 1 files" in notes
    assert "codes/0.0.0.0" not in notes
    assert verify_cache(cache.path, expected_root="0" * 64).findings[-1].what.endswith("you expect " + "0" * 64)


def test_a_head_that_is_gone_is_damage_where_the_rest_of_a_cache_is_there(path: Path) -> None:
    (path / "zarr.json").unlink()
    (finding,) = verify_cache(path).findings
    assert finding.path == "zarr.json"


# ---- a campaign


def test_random_bit_flips_are_all_found_and_never_read(whole: Path, path: Path, right: dict) -> None:
    """300 single flips, stratified over the kinds of file; seed 2024. `make test-slow` runs 10,000."""
    rng = random.Random(2024)
    kinds = [
        [name for name in FILES if name.startswith(prefix)]
        for prefix in ("codes/", "images/", "commits/", "basis/", "mean/", "zarr.json", "listing", "manifest", "ROOT")
    ]
    found = refused = 0
    for number in range(300):
        name = rng.choice(kinds[number % len(kinds)])
        data = bytearray((whole / name).read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(data)
        found += named(verify_cache(path)) == {name}
        refused += assert_no_wrong_value(path, right) > 0
        shutil.copy(whole / name, path / name)
    assert found == 300
    # What nothing of ours reads (the arrays' zarr.json, the framing of Arrow) is all that may go unnoticed while reading.
    assert refused > 200
    assert crc32c(b"123456789") == 0xE3069283  # the polynomial is Castagnoli's
