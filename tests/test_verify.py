"""Verification and repair with a real teacher: what bytes alone cannot tell, and exit codes as a user sees them."""

import json
import os
import shutil

import pytest
import torch
from photos import photo_folder
from PIL import Image

from pipelines.diff import diff_caches
from pipelines.extract import extract
from pipelines.inspect import inspect_cache
from pipelines.jobs import ExtractConfig
from pipelines.verify import VerifyConfig, verify
from sami_cache.errors import IdentityError, SamiCacheError
from sami_cache.store.cache import Cache

LITE0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    photo_folder(folder / "photos", 60)
    (folder / "photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    extract(ExtractConfig(data=folder / "photos", cache=folder / "cache.zarr", **LITE0))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may break; the photos are where they were at extraction."""
    shutil.copytree(original / "cache.zarr", tmp_path / "cache.zarr")
    return tmp_path


def check(folder, **changes):
    return verify(VerifyConfig(cache=folder / "cache.zarr", device="cpu", **changes))


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 16
    path.write_bytes(data)


def test_everything_can_be_checked(folder):
    result = check(folder, level="deep", sources=True, audit=12)
    assert result.report.clean
    assert result.audit.samples == 12
    assert result.audit.worst > 0.98
    assert result.report.not_checked == ["whether somebody replaced the whole cache by another consistent one (--root DIGEST)"]
    assert check(folder, level="deep", sources=True, audit=1, root=result.report.root).report.not_checked == []


def test_the_audit_refuses_another_teacher(folder, original):
    with pytest.raises(IdentityError, match=r"teacher\.weights_sha256"):
        check(folder, audit=4, weights="random")


def test_the_audit_notices_stored_nonsense(folder):
    """Consistent bytes, wrong numbers: a cache whose samples were shuffled before it was sealed passes all but the audit."""
    from sami_cache.store.commits import Sample
    from sami_cache.store.repair import quarantine_shard
    from sami_cache.store.writing import seal_cache, write_shard

    cache = Cache(folder / "cache.zarr")
    record = cache.record(1)
    embeddings = cache.codec.decode(cache.read_codes(1))[::-1].copy()
    jpegs = cache.read_jpegs(1)
    names = ("key", "label", "source", "width", "height", "view", "status")
    rows = [Sample(**{name: getattr(sample, name) for name in names}) for sample in record.samples]
    quarantine_shard(cache, 1)
    write_shard(cache, 1, embeddings, rows, jpegs)
    seal_cache(cache)
    assert check(folder, level="deep", sources=True).report.clean
    result = check(folder, audit=60)
    assert len(result.audit.failed) >= 10
    assert any("does not give" in finding.what for finding in result.report.findings)


def test_sources_that_changed_are_named(folder, original, tmp_path):
    shutil.copytree(original / "photos", tmp_path / "photos")
    victim = tmp_path / "photos" / "coffee" / "0002.jpg"
    stamp = victim.stat()
    Image.open(victim).rotate(90).save(victim)
    os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # found by content, not by time stamp
    (tmp_path / "photos" / "rocket" / "0003.jpg").unlink()
    findings = check(folder, sources=True, data=tmp_path / "photos").report.findings
    assert [finding.samples for finding in findings] == [["rocket/0003.jpg"], ["coffee/0002.jpg"]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: flip(cache / "codes/1.0.0.0"),
        lambda cache: (cache / "codes/0.0.0.0").unlink(),
        lambda cache: (cache / "images/000002.arrow").write_bytes(b""),
        lambda cache: flip(cache / "commits/000003.json"),
        lambda cache: (cache / "commits/000001.json").unlink(),
        lambda cache: (cache / "manifest.parquet").unlink(),
        lambda cache: flip(cache / "ROOT.json"),
        lambda cache: shutil.copy(cache / "codes/1.0.0.0", cache / "codes/2.0.0.0"),
        lambda cache: shutil.copy(cache / "codes/1.0.0.0", cache / "codes/77.0.0.0"),
    ],
    ids=["flip codes", "no codes", "empty images", "flip record", "no record", "no manifest", "flip root", "swap", "stray"],
)
def test_repair_ends_at_the_same_root_and_touches_nothing_else(folder, damage):
    target = folder / "cache.zarr"
    before = {path: path.stat().st_ino for path in target.glob("c*/*")}
    root = Cache(target).root()
    damage(target)
    assert not check(folder).report.clean
    result = check(folder, repair=True)
    assert result.report.clean
    assert Cache(target).root() == root
    assert check(folder, level="deep").report.clean
    mended = {f"{name}" for shard in result.repaired for name in (f"{shard}.0.0.0", f"{shard:06d}.json")}
    assert len(result.repaired) <= 1
    for path, inode in before.items():
        if path.name not in mended:
            assert path.stat().st_ino == inode


def test_files_with_a_copy_are_put_back_without_images_or_teacher(folder):
    """And a lost shard beside them is extracted again afterwards."""
    target = folder / "cache.zarr"
    root = Cache(target).root()
    flip(target / "basis/0.0")
    (target / "zarr.json").unlink()
    result = check(folder, repair=True, data=folder / "nowhere")
    assert (result.restored, result.repaired) == (["zarr.json", "basis/0.0"], [])
    assert result.report.clean
    (target / "listing.parquet").write_bytes(b"")
    (target / "codes/1.0.0.0").unlink()
    (target / "codes/foreign").touch()
    result = check(folder, repair=True)
    assert (result.restored, result.repaired) == (["listing.parquet"], [1])
    assert result.report.clean
    assert Cache(target).root() == root


def test_repair_refuses_images_that_were_edited(folder, original, tmp_path):
    """Else the shard would silently become that of other images. The manifest knows them even if the record is lost."""
    shutil.copytree(original / "photos", tmp_path / "photos")
    key = Cache(folder / "cache.zarr").record(1).samples[2].key
    with Image.open(tmp_path / "photos" / key) as image:
        image.rotate(90).save(tmp_path / "photos" / key)
    for damage in ("codes/1.0.0.0", "commits/000001.json"):
        flip(folder / "cache.zarr" / damage)
        with pytest.raises(IdentityError, match=rf"1 edited: {key}"):
            check(folder, repair=True, data=tmp_path / "photos")
    assert not (folder / "cache.zarr" / "quarantine").exists()


def test_repair_needs_images_and_moves_nothing_without_them(folder):
    flip(folder / "cache.zarr" / "codes/1.0.0.0")
    with pytest.raises(SamiCacheError, match="nowhere"):
        check(folder, repair=True, data=folder / "nowhere")
    assert not (folder / "cache.zarr" / "quarantine").exists()


def test_no_cache_is_not_damage(tmp_path):
    with pytest.raises(SamiCacheError, match=r"there is no cache here .* `sami-cache extract") as caught:
        verify(VerifyConfig(cache=tmp_path / "nothing.zarr"))
    assert caught.value.exit_code == 2


def test_read_only_caches_verify(folder):
    for path in [folder / "cache.zarr", *(folder / "cache.zarr").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert check(folder, level="deep").report.clean


def test_diff_and_inspect(folder, original):
    other = extract(ExtractConfig(data=original / "photos", cache=folder / "other.zarr", **{**LITE0, "error": 0.03})).cache
    same = diff_caches(original / "cache.zarr", folder / "cache.zarr")
    assert same.same
    assert same.same_root
    found = diff_caches(original / "cache.zarr", other)
    assert "codec.error: A has 0.01, B has 0.03" in found.settings
    assert not found.same
    assert len(found.changed) == 61
    assert 0.01 < found.worst < 0.2
    part = extract(ExtractConfig(data=original / "photos" / "coffee", cache=folder / "part.zarr", **LITE0)).cache
    assert len(diff_caches(original / "cache.zarr", part).only_a) == 61
    told = inspect_cache(folder / "cache.zarr")
    json.dumps(told)
    assert told["usable"] == 60
    assert [failure["key"] for failure in told["failures"]] == ["torn.jpg"]
    assert told["bytes"]["total"] == sum(path.stat().st_size for path in (folder / "cache.zarr").rglob("*") if path.is_file())
    assert told["error"]["worst"][0]["error"] >= told["error"]["p99"] >= told["error"]["median"] > 0


def test_one_changed_weight_changes_the_teacher(folder, tmp_path):
    """The teacher's file with one value changed is refused before anything is computed."""
    from sami_cache.models.weights import bundled_lite0, read_state

    state = dict(read_state(bundled_lite0()))
    name = next(key for key in state if key.endswith("weight") and state[key].ndim == 4)
    state[name] = state[name].clone()
    state[name][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(IdentityError, match=r"teacher\.weights_sha256"):
        check(folder, audit=4, weights=str(tmp_path / "changed.pth"))
