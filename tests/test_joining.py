"""Caches made of caches, with a real teacher: what comes out is compared with extracting the same images at once."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import photo_folder
from typer.testing import CliRunner

from cli.main import app
from pipelines.embedding import Embedder
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from pipelines.joining import merge, subset
from pipelines.verify import VerifyConfig, verify
from sami_cache.errors import DamageError, IdentityError, Interrupted, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache

LITE0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 16, "device": "cpu", "workers": 2}


def config(data: Path, cache: Path, **changes) -> ExtractConfig:
    return ExtractConfig(**{"data": data, "cache": cache, **LITE0, **changes})


def by_key(path: Path) -> dict[tuple[str, int], tuple]:
    """What a cache says of every sample, and its codes."""
    cache, found = Cache(path), {}
    names = cache.attributes["class_names"]
    for shard in range(cache.shards):
        codes = cache.read_codes(shard)
        jpegs = cache.read_jpegs(shard)
        for index, sample in enumerate(cache.record(shard).samples):
            label = names[sample.label] if names and sample.label is not None else sample.label
            told = (label, sample.source, sample.width, sample.status, sample.view, sample.error, sample.codes_crc32c)
            view = len([1 for key, _ in found if key == sample.key])
            found[sample.key, view] = (told, codes[index].tobytes(), jpegs[index])
    return found


def assert_as_extracted(path: Path, whole: Path) -> None:
    """The samples are those of one extraction, but for the last digit, which a batch of other images rounds otherwise."""
    told, at_once = by_key(path), by_key(whole)
    assert told.keys() == at_once.keys()
    for key, (sample, codes, jpeg) in told.items():
        assert (sample[:5], jpeg) == (at_once[key][0][:5], at_once[key][2])
        differences = np.frombuffer(codes, np.int8).astype(int) - np.frombuffer(at_once[key][1], np.int8)
        assert abs(differences).max() <= 1
        assert np.mean(differences != 0) < 0.01
    assert np.mean([told[key][1] == at_once[key][1] for key in told]) > 0.8


def clean(path: Path) -> bool:
    return verify_cache(path, level="deep").findings == []


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two halves of 72 photographs, the second extracted with the first one's codec, and the whole with it."""
    folder = tmp_path_factory.mktemp("joining")
    photo_folder(folder / "whole", 72)
    (folder / "whole" / "chelsea" / "torn.jpg").write_bytes((folder / "whole" / "chelsea" / "0001.jpg").read_bytes()[:900])
    names = sorted(path.relative_to(folder / "whole") for path in (folder / "whole").rglob("*.jpg"))
    for number, name in enumerate(names):
        # The second half lacks the first class, so that its classes have other numbers.
        half = folder / ("a" if number % 2 or name.parts[0] == "astronaut" else "b") / name
        half.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "whole" / name, half)
    extract(config(folder / "a", folder / "a.zarr"))
    extract(config(folder / "b", folder / "b.zarr", codec_from=folder / "a.zarr"))
    extract(config(folder / "whole", folder / "whole.zarr", codec_from=folder / "a.zarr"))
    return folder


def test_two_halves_are_the_whole(halves):
    joined = merge([halves / "a.zarr", halves / "b.zarr"], halves / "both.zarr")
    assert clean(joined.cache)
    assert joined.linked == len(Cache(halves / "a.zarr").listing) // 16 > 0
    assert joined.root["failed"] == 1
    assert_as_extracted(joined.cache, halves / "whole.zarr")
    apart = by_key(halves / "a.zarr") | by_key(halves / "b.zarr")
    assert by_key(joined.cache) == apart
    assert Cache(joined.cache).attributes["class_names"] == ["astronaut", "chelsea", "coffee", "rocket"]
    # Linked, not copied.
    assert (joined.cache / "codes" / "0.0.0.0").stat().st_ino == (halves / "a.zarr" / "codes" / "0.0.0.0").stat().st_ino
    again = merge([halves / "a.zarr", halves / "b.zarr"], halves / "both.zarr")
    assert (again.root, again.linked, again.written) == (joined.root, 0, 0)


def test_an_image_in_both_is_taken_once(halves, tmp_path):
    joined = merge([halves / "b.zarr", halves / "whole.zarr"], tmp_path / "c.zarr")
    assert joined.twice == len(Cache(halves / "b.zarr").listing)
    assert clean(joined.cache)
    assert by_key(joined.cache) == by_key(halves / "whole.zarr") | by_key(halves / "b.zarr")


def test_one_key_for_two_images_is_refused(halves, tmp_path):
    shutil.copytree(halves / "b", tmp_path / "b")
    coffee, other = sorted((tmp_path / "b" / "coffee").iterdir())[:2]
    shutil.copy(other, coffee)
    extract(config(tmp_path / "b", tmp_path / "b.zarr", codec_from=halves / "a.zarr"))
    with pytest.raises(SamiCacheError, match=rf"'coffee/{coffee.name}' is one image in .*whole.zarr and another in .*b.zarr"):
        merge([halves / "whole.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr")


def test_another_codec_is_encoded_again_only_when_asked(halves, tmp_path):
    extract(config(halves / "b", tmp_path / "b.zarr"))
    with pytest.raises(SamiCacheError, match=r"fitted on different images.*--recode.*--codec-from"):
        merge([halves / "a.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()
    joined = merge([halves / "a.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr", recode=True)
    assert joined.recoded == len(Cache(tmp_path / "b.zarr").listing)
    assert clean(joined.cache)
    # The errors that the records state are what these embeddings lost, as measured against the teacher by an audit's means.
    cache, whole = Cache(joined.cache), Cache(halves / "whole.zarr")
    places = {key: number for number, key in enumerate(whole.listing["key"].to_pylist())}
    from pipelines.verify import embed_again, extraction_of

    job = extraction_of(VerifyConfig(cache=halves / "whole.zarr", data=halves / "whole"))
    fresh = {sample.key: embedding for _, sample, embedding in embed_again(job, places.values()) if sample.status == "ok"}
    stated, measured = [], []
    for number, row in enumerate(cache.table().to_pylist()):
        if number >= len(Cache(halves / "a.zarr").listing) and row["status"] == "ok":
            lost = ((cache.read_embedding(number) - fresh[row["key"]]) ** 2).sum()
            spread = ((fresh[row["key"]] - cache.codec.mean[:, None, None]) ** 2).sum()
            measured.append(lost / spread)
            stated.append(row["error"])
    assert len(stated) > 20
    assert np.mean(stated) == pytest.approx(np.mean(measured), rel=0.15)
    assert np.mean(measured) > 1.3 * np.mean(Cache(halves / "a.zarr").table()["error"].drop_null().to_numpy())


def test_other_settings_are_refused(halves, tmp_path):
    extract(config(halves / "b", tmp_path / "b.zarr", error=0.05))
    with pytest.raises(SamiCacheError, match=r"cannot be joined with .*\n  codec.error: it has 0.01, .*b.zarr has 0.05"):
        merge([halves / "a.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr")
    with pytest.raises(IdentityError, match=r"codec.error"):
        extract(config(halves / "b", tmp_path / "d.zarr", error=0.05, codec_from=halves / "a.zarr"))


def test_damage_does_not_spread(halves, tmp_path):
    for name, number in (("linked", 0), ("read", 1)):
        broken = tmp_path / f"{name}.zarr"
        shutil.copytree(halves / "b.zarr", broken)
        path = broken / "codes" / f"{number}.0.0.0"
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
        with pytest.raises(DamageError, match=rf"{name}.zarr/codes/{number}.0.0.0"):
            merge([broken, halves / "a.zarr"], tmp_path / f"{name}-out.zarr")


def test_subset(halves, tmp_path):
    whole = by_key(halves / "whole.zarr")
    cats = subset(halves / "whole.zarr", tmp_path / "cats.zarr", match=["chelsea/*"])
    assert clean(cats.cache)
    assert by_key(cats.cache) == {key: value for key, value in whole.items() if key[0].startswith("chelsea/")}
    wanted = sorted(key for key, _ in whole)[::7]
    (tmp_path / "keys.txt").write_text("\n".join(wanted))
    some = subset(halves / "whole.zarr", tmp_path / "some.zarr", keys=tmp_path / "keys.txt")
    assert sorted(key for key, _ in by_key(some.cache)) == wanted
    there = subset(halves / "whole.zarr", tmp_path / "there.zarr", data=halves / "b", count=5)
    keys = {key for key, _ in by_key(there.cache)}
    assert len(keys) == 5
    assert all((halves / "b" / key).exists() for key in keys)
    with pytest.raises(SamiCacheError, match="none of its 73 images fits"):
        subset(halves / "whole.zarr", tmp_path / "none.zarr", match=["dogs/*"])
    (tmp_path / "keys.txt").write_text("nowhere.jpg")
    with pytest.raises(SamiCacheError, match=r"1 keys are not in .*: nowhere.jpg"):
        subset(halves / "whole.zarr", tmp_path / "none.zarr", keys=tmp_path / "keys.txt")


@pytest.mark.parametrize("views", [0, 3])
def test_added_images_alone_go_through_the_teacher(halves, tmp_path, monkeypatch, views):
    """Two growths, the first with a class between the others; the samples are those of one extraction with the same codec."""
    data, path = tmp_path / "data", tmp_path / "c.zarr"
    shutil.copytree(halves / "b", data)
    first = extract(config(data, path, views=views))
    images = len(Cache(path).listing)
    seen: list[int] = []
    embed = Embedder.embed
    monkeypatch.setattr(
        Embedder, "embed", lambda self, batches: seen.extend(n for b in batches for n in b) or embed(self, batches)
    )
    for folder in ("astronaut", "chelsea"):
        shutil.copytree(halves / "whole" / folder, data / folder, dirs_exist_ok=True)
        seen.clear()
        before = len(Cache(path).listing)
        grown = extract(config(data, path))
        assert seen == list(range(before * max(1, views), Cache(path).samples))
        assert grown.samples_done == len(seen)
        assert clean(path)
    # As the first one was is still there, and whole; its whole shards are the grown one's.
    kept = sorted(tmp_path.glob("c.zarr.before-*"))
    assert len(kept) == 2
    assert all(clean(one) for one in kept)
    assert first.root["root"] in {verify_cache(one).root for one in kept}
    assert Cache(path).attributes["class_names"] == ["chelsea", "coffee", "rocket", "astronaut"]
    assert Cache(path).listing["key"].to_pylist()[:images] == Cache(kept[0]).listing["key"].to_pylist()[:images]
    whole = extract(config(data, tmp_path / "whole.zarr", views=views, codec_from=path))
    assert_as_extracted(path, whole.cache)
    # Nothing more to do, also with the classes in the cache's order; and repair still finds its images.
    seen.clear()
    assert extract(config(data, path)).samples_done == 0
    assert not seen
    (path / "codes" / "1.0.0.0").unlink()
    result = verify(VerifyConfig(cache=path, repair=True))
    assert result.repaired == [1]
    assert clean(path)


def test_growth_is_resumed(halves, tmp_path, monkeypatch):
    data, path = tmp_path / "data", tmp_path / "c.zarr"
    shutil.copytree(halves / "b", data)
    extract(config(data, path))
    shutil.copytree(halves / "a", data, dirs_exist_ok=True)
    before = Cache(path).cache_id

    def stopped(*_: object) -> None:
        raise Interrupted("stopped", 15)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.extract.run_shards", stopped)
        with pytest.raises(Interrupted):
            extract(config(data, path))
    assert Cache(path).cache_id == before
    # Killed between the two renames: the cache is in neither place that anybody looks at.
    with monkeypatch.context() as patch:
        rename = os.rename

        def one_rename(source, target):
            if target == path:
                raise KeyboardInterrupt
            rename(source, target)

        patch.setattr("pipelines.growing.os.rename", one_rename)
        with pytest.raises(KeyboardInterrupt):
            extract(config(data, path))
    assert not path.exists()
    done = extract(config(data, path))
    assert done.samples_done == 0
    assert clean(path)
    assert Cache(path).samples == 73
    assert not list(tmp_path.glob(".c.zarr.growing-*"))


def test_an_unfinished_cache_grows_too(halves, tmp_path, monkeypatch):
    data, path = tmp_path / "data", tmp_path / "c.zarr"
    shutil.copytree(halves / "b", data)
    extract(config(data, path))
    for name in ("ROOT.json", "manifest.parquet", "commits/000001.json"):
        (path / name).unlink()
    shutil.copytree(halves / "whole" / "astronaut", data / "astronaut", dirs_exist_ok=True)
    extract(config(data, path))
    assert clean(path)
    assert Cache(path).samples == len(list(data.rglob("*.jpg")))


def test_commands(halves, tmp_path):
    runner = CliRunner()
    both = runner.invoke(app, ["merge", str(halves / "a.zarr"), str(halves / "b.zarr"), "--out", str(tmp_path / "c.zarr")])
    assert both.exit_code == 0
    assert "72 of 73 samples" in both.output
    some = runner.invoke(
        app, ["subset", "--cache", str(tmp_path / "c.zarr"), "--count", "9", "--out", str(tmp_path / "d.zarr")]
    )
    assert some.exit_code == 0
    assert "of 9 samples" in some.output
