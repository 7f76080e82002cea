"""The benchmark of loaders at a tiny size: what every contestant serves, how it is reported, and the measures of an order."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import fill_all, new_cache
from photos import photo_folder

from sami_cache.store.writing import seal_cache

CONTESTANTS = ("sami-cache", "zarr-python", "tensorstore", "numpy memmap", "safetensors", "h5py", "LMDB", "WebDataset", "Lance")


@pytest.fixture
def benchmarks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = request.config.rootpath / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def where(benchmarks: Path, tmp_path: Path) -> dict:
    """A cache of 128 samples in eight shards, of synthetic codes, and its plain copy."""
    from loader_data import write_plain

    cache = new_cache(tmp_path / "cache.zarr", samples=128)
    fill_all(cache)
    seal_cache(cache)
    write_plain(cache, tmp_path / "plain")
    return {"plain": str(tmp_path / "plain"), "cache": str(cache.path), "cores": 2}


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_contestant_serves_every_sample_once_an_epoch_as_it_went_in(where: dict, tmp_path: Path, name: str) -> None:
    from loader_child import Contestant
    from loader_contestants import OURS, missing_packages

    if name != OURS and missing_packages(name):
        pytest.skip(f"needs {', '.join(missing_packages(name))}")
    for images in ("none", "encoded"):
        contestant = Contestant(name=name, images=images, folder=str(tmp_path / f"{name}-{images}"), **where)
        contestant.write()
        for way in contestant.ways():
            if way.endswith("threads"):
                assert contestant.check(way)["bytes"] > 200


def test_a_contestant_that_serves_something_else_is_found_out(where: dict, tmp_path: Path) -> None:
    from loader_child import Contestant

    contestant = Contestant(name="numpy memmap", images="encoded", folder=str(tmp_path / "files"), **where)
    contestant.write()
    way = contestant.ways()[0]
    for file, message in (("codes.npy", "other codes for sample 127"), ("jpegs.npy", "another JPEG for sample 127")):
        path = tmp_path / "files" / "files" / file
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(AssertionError, match=message):
            contestant.check(way)
        path.write_bytes(whole)
    twice = contestant.samples.codes.shape[0] - 1
    batches = contestant.batches
    contestant.batches = lambda way, repeats: _last_instead(batches(way, repeats), twice)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="128 samples, 127 different"):
        contestant.check(way)


def _last_instead(stream, last: int):
    """The stream with one sample replaced by another, codes and all."""
    yield next(stream)
    batches = list(stream)
    (source, at) = next((batch, row) for batch in batches for row in np.flatnonzero(batch.numbers == last))
    batch = batches[0]
    row = int(np.flatnonzero(batch.numbers != last)[0])
    batch.numbers, batch.codes[row], batch.jpegs[row] = batch.numbers.copy(), source.codes[at], source.jpegs[at]
    batch.numbers[row] = last
    yield from batches


def test_contestants_take_turns_and_who_is_missing_is_named(benchmarks: Path, tmp_path: Path, capsys) -> None:
    import loader

    photos = photo_folder(tmp_path / "photos", 8)
    given = ["--data", str(photos), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "page.md"), "--kinds", "grid-14"]
    sizes = ["--samples", "128", "--shard-samples", "16", "--rounds", "1", "--seconds", "0.05", "--images", "none"]
    absent = next((name for name in ("h5py", "LMDB", "LitData") if any(map(_absent, loader.PEERS[name][2]))), None)
    warm, cold = loader.main([*given, *sizes, "--only", loader.OURS, "safetensors", *filter(None, [absent])])
    for section in (warm, cold):
        for name in (loader.OURS, "safetensors"):
            entry = section.entries[name]  # has facts only if every sample it served in an epoch was the one that went in
            assert entry.speed > 0, entry.problem
            assert entry.facts["bytes"] > 1000
        assert section.ratio("safetensors") == pytest.approx(
            section.entries[loader.OURS].speed / section.entries["safetensors"].speed
        )
    assert len(warm.entries["safetensors"].tried) == 2
    text = (tmp_path / "page.md").read_text()
    assert text in capsys.readouterr().out
    assert "ours / bare zstd + crc32c | 75 % |" in text
    assert "ours / the disk, sequentially | 85 % |" in text
    assert absent is None or f"| {absent} | not installed: " in text
    assert not list((tmp_path / "work").glob("*-peers"))


def _absent(package: str) -> bool:
    return find_spec(package) is None


def test_measures_of_an_order_know_the_best_and_the_worst(benchmarks: Path) -> None:
    import shuffle

    storage = np.arange(4096)
    assert shuffle.correlation(storage, storage) == pytest.approx(1)
    assert shuffle.distinct_shards(storage, 64, 64).tolist() == [1] * 64
    assert shuffle.distinct_shards(storage.reshape(64, 64).T.ravel(), 64, 64).tolist() == [64] * 64
    assert shuffle.kept_pairs(storage, storage, 64) == 1
    assert shuffle.kept_pairs(storage, storage.reshape(64, 64).T.ravel(), 64) == 0
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in shuffle.run(32, 64, 6)[2:])}
    full, eight = rows["full permutation"], rows["8 open shards"]
    assert float(eight[2].split()[0]) <= 8 < float(full[2].split()[0])
    assert float(full[0].split()[0]) < float(eight[0].split()[0])
