"""Whole files that are not what was committed: cut, grown, zeroed, gone, replaced, swapped, rolled back.

Thirty kinds of damage, each to codes, images, commit records, the files written at creation, the manifest and the root where
it applies. `verify` must find each instance and name exactly the files that are wrong, `verify --quick` all that are not as
long as they were. A training read of the damaged cache gives the committed values or raises (but for a whole shard from
another cache of the same settings, with its record, which `verify` alone tells). `verify --repair` must end at the very same
root (the teacher is deterministic) and the very same bytes, and must keep what it moves: nothing that was there is deleted or
overwritten.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from damage_kinds import KINDS, SHARDS, Subject, file_class
from photos import photo_folder
from training_reads import outcome, training_read

import pipelines.jobs
import sami_cache.store.cache
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from pipelines.verify import VerifyConfig, verify
from sami_cache.models.teachers import load_teacher
from sami_cache.store.cache import Cache
from sami_cache.store.commits import Sample
from sami_cache.store.files import digest
from sami_cache.store.repair import quarantine_shard
from sami_cache.store.writing import seal_cache, write_shard

SEED = 20240612
CHECKS = (
    *("found", "right files named", "sizes found by --quick", "no wrong value read"),
    *("mended", "same root and bytes", "nothing deleted"),
)


def make_stock(stock: Path) -> Path:
    """The cache, one of other settings, and for each shard an older state of the cache, whole, where that shard was other."""
    photos, others = photo_folder(stock / "photos", 20), photo_folder(stock / "others", 23, seed=1)
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    config = {"teacher": "efficientnet_lite0", "shard_samples": 8, "device": "cpu", "workers": 1}
    extract(ExtractConfig(data=photos, cache=stock / "cache", grid=3, **config))
    extract(ExtractConfig(data=others, cache=stock / "other", grid=2, **config))
    for shard in range(SHARDS):
        cache = Cache(shutil.copytree(stock / "cache", stock / f"older{shard}"))
        record, jpegs = cache.record(shard), cache.read_jpegs(shard)
        embeddings = cache.codec.decode(cache.read_codes(shard))
        names = ("key", "label", "source", "width", "height", "view", "status")
        good = [place for place, sample in enumerate(record.samples) if sample.status == "ok"]
        for place, source in zip(good, [*good[1:], good[0]], strict=True):
            embeddings[place], record.samples[place].source = embeddings[source] * 1.1, f"{shard * 100 + place:064x}"
            jpegs[place] = b"an older " + (jpegs[place] or b"")
        rows = [Sample(**{name: getattr(sample, name) for name in names}) for sample in record.samples]
        quarantine_shard(cache, shard)
        write_shard(cache, shard, embeddings, rows, jpegs)
        seal_cache(cache)
    return stock


def prepare_process() -> None:
    """One thread, so that the teacher gives the same bits everywhere, and one load of it a process instead of one a repair."""
    torch.set_num_threads(1)
    pipelines.jobs.load_teacher = lru_cache(load_teacher)


def remains(path: Path) -> dict[int, str]:
    """{inode: digest of the content} of everything in the cache; what is no file, or very long, by its inode alone."""
    found = {}
    for folder, folders, files in os.walk(path):
        for entry in (Path(folder) / name for name in (*folders, *files)):
            stamp, plain = entry.lstat(), entry.is_file() and not entry.is_symlink()
            found[stamp.st_ino] = digest(entry.read_bytes()) if plain and stamp.st_size < 1 << 26 else ""
    return found


def whole_tree(path: Path) -> dict[str, bytes]:
    files = [file for file in path.rglob("*") if file.is_file() and "quarantine" not in file.parts]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def named_right(kind: str, damaged: set[str], named: set[str]) -> bool:
    """Whether the damaged files are named and no others, except those that lost the one file that vouches for them."""
    if kind == "replaced by another cache's file" and damaged == {"zarr.json"}:
        # Head against all the others: either says that the other belongs to another cache.
        return damaged <= named or {f"commits/{shard:06d}.json" for shard in range(SHARDS)} <= named
    witnesses = {name: f"commits/{int(Path(name).name.split('.')[0]):06d}.json" for name in damaged if is_shard_file(name)}
    witnesses["manifest.parquet"] = "ROOT.json"
    return named <= damaged and all(witnesses.get(name) in named for name in damaged - named)


def is_shard_file(name: str) -> bool:
    return file_class(name) in ("codes", "images") and Path(name).name.split(".")[0].isdecimal()


def size_of(path: Path) -> int | None:
    """None for what is no file."""
    return path.stat().st_size if path.is_file() else None


@lru_cache
def right_values(stock: Path) -> list[object]:
    return training_read(stock / "cache")


def run_instance(stock: Path, place: Path, kind: str, number: int) -> dict[str, bool]:
    """Copy, damage, verify, repair: what went right. `kind` and `number` alone decide what is damaged."""
    path = Path(shutil.copytree(stock / "cache", place / "cache"))
    damaged = KINDS[kind](Subject(path, stock, random.Random(f"{SEED}/{kind}/{number}"), number))
    named, quick = (
        {finding.path for finding in verify(VerifyConfig(cache=path, level=level)).report.findings}
        for level in ("default", "quick")
    )
    resized = {name for name in damaged if size_of(path / name) != size_of(stock / "cache" / name)}
    result = {
        "found": bool(named),
        "right files named": named_right(kind, damaged, named),
        "sizes found by --quick": resized & named <= quick,
        "no wrong value read": outcome(path, right_values(stock)) != "reads wrong",
    }
    before = remains(path)
    try:
        report = verify(VerifyConfig(cache=path, repair=True, device="cpu", workers=1)).report
    except Exception as error:  # a failure of this instance; the others go on
        print(f"{kind}, instance {number}, repair: {type(error).__name__}: {error}")
        report = None
    after = remains(path)
    mended = report is not None and report.clean
    return result | {
        "mended": mended,
        "same root and bytes": mended and whole_tree(path) == whole_tree(stock / "cache"),
        "nothing deleted": all(after.get(inode) == content for inode, content in before.items()),
    }


def run_instances(stock: Path, place: Path, jobs: list[tuple[str, int]]) -> dict[str, Counter]:
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for kind, number in jobs:
        result = run_instance(stock, place, kind, number)
        shutil.rmtree(place / "cache")
        counts[kind].update({"instances": 1, **result})
        if not all(result.values()):
            print(f"{kind}, instance {number}: {', '.join(what for what in CHECKS if not result[what])} failed")
    return counts


def check(counts: dict[str, Counter], instances: int) -> None:
    wrong = {(kind, what): seen[what] for kind, seen in counts.items() for what in CHECKS if seen[what] != instances}
    assert not wrong


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(pipelines.jobs, "load_teacher", load_teacher)  # to be put back after prepare_process
    monkeypatch.setattr(sami_cache.store.cache, "TARGET_CHUNK_BYTES", 1)  # a sample a chunk, so that shards have several
    prepare_process()
    yield make_stock(tmp_path / "stock")
    torch.set_num_threads(threads)


def test_there_are_thirty_kinds() -> None:
    assert len(KINDS) == 30


def test_damage_of_every_kind_is_found_and_mended(stock: Path, tmp_path: Path) -> None:
    check(run_instances(stock, tmp_path, [(kind, number) for number, kind in enumerate(KINDS)]), 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_100_instances_of_every_kind(stock: Path, tmp_path: Path, campaign) -> None:
    instances, processes = 100, 2
    jobs = [(kind, number) for kind in KINDS for number in range(instances)]
    places = [tmp_path / f"process{number}" for number in range(processes)]
    shares = [jobs[number::processes] for number in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=prepare_process) as pool:
        parts = list(pool.map(run_instances, [stock] * processes, places, shares))
    counts = {kind: sum((part[kind] for part in parts), Counter()) for kind in KINDS}
    rows = {"all": sum(counts.values(), Counter()), **counts}
    campaign(
        "damage",
        seed=SEED,
        figures={kind: ", ".join(f"{seen[what]} {what}" for what in ("instances", *CHECKS)) for kind, seen in rows.items()},
        notes="Instance `n` of a kind is drawn from the seed `{seed}/{kind}/n` alone.",
    )
    check(counts, instances)
