"""Caches of every sort with nothing wrong: `verify` must not find anything.

Codecs, types, grids, shard and chunk sizes, with and without images, with failed samples and with replayed views; sealed
at once, after an interruption, after a repair, by two writers; then left alone, copied, moved, made read-only, or verified
while another process reads them. What `verify` says besides (leftovers in tmp/ and quarantine/) must be notes.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from conftest import make_identity, make_samples, teacher_like
from training_reads import shard_read

from pipelines.verify import VerifyConfig, verify
from sami_cache.samples import CacheSamples
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import Sample
from sami_cache.store.creation import create_cache
from sami_cache.store.fitting import fit_codec
from sami_cache.store.integrity import LEVELS, verify_cache
from sami_cache.store.repair import quarantine_shard
from sami_cache.store.writing import seal_cache, write_shard

SEED = 20240613
CODECS = (("pca", 0.05), ("pca", 0.01), ("pca", 1e-5), ("int8", 0.01), ("float16", 0.01))
HISTORIES = ("sealed at once", "interrupted", "repaired", "two writers")
STATES = ("as it is", "copied", "moved", "read-only", "read by another process", "verified by another process")


@dataclass
class Draft:
    """A cache and what its shards are to hold."""

    cache: Cache
    embeddings: np.ndarray
    samples: list[Sample]
    jpegs: list[bytes | None]

    def write(self, shard: int, cache: Cache | None = None) -> None:
        numbers = self.cache.shard_samples(shard)
        part = slice(numbers.start, numbers.stop)
        write_shard(cache or self.cache, shard, self.embeddings[part], self.samples[part], self.jpegs[part])


def draft_cache(path: Path, rng: random.Random) -> Draft:
    """A new cache of random settings, nothing committed yet."""
    name, error = rng.choice(CODECS)
    grid, channels, images, views = rng.choice((2, 4, 8)), rng.choice((8, 24)), rng.randrange(9, 40), rng.choice((0, 0, 2))
    count = images * max(1, views)
    embeddings = teacher_like(count, channels, grid, seed=rng.randrange(1000))
    codec = fit_codec(name, embeddings, error=error)
    layout = choose_layout(codec, grid, count, rng.choice((4, 8, 16, 64)))
    keys = [f"class/ü {number}.jpg" for number in range(images)]
    labels = [rng.choice((None, 0, 1)) for _ in range(images)]
    cache = create_cache(
        path,
        identity=make_identity(
            codec={"name": name, "error": codec.error},
            grid=grid,
            view={"mode": "replay", "views": views, "seed": 0} if views else {"mode": "dense"},
            images=rng.choice(({"short_side": 256, "quality": 90}, None)),
        ),
        codec=codec,
        layout=replace(layout, chunk_samples=rng.choice((1, 2, 4))),
        keys=keys,
        labels=labels,
        class_names=None,
        provenance={"note": "made by the tests"},
    )
    failed = [number for number in range(images) if rng.random() < rng.choice((0, 0.1))]
    samples, jpegs = [], []
    for number, plain in enumerate(make_samples(keys, bad=tuple(failed))):
        jpeg = None if number in failed else rng.randbytes(rng.randrange(1, 400))
        for _ in range(max(1, views)):
            view = [0.1, 0.25, 0.75, 1.0, float(rng.randrange(2))] if views else None
            samples.append(replace(plain, label=labels[number], view=view))
            jpegs.append(jpeg)
    return Draft(cache, embeddings, samples, jpegs)


def write_history(draft: Draft, history: str, rng: random.Random) -> set[str]:
    """Write and seal the cache; returns the folders of which notes must speak."""
    cache, shards = draft.cache, list(range(draft.cache.shards))
    chosen = rng.choice(shards)
    if history == "two writers":
        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(write_and_seal, draft, Cache(cache.path), order) for order in (shards, shards[::-1])]
        for writer in writers:
            writer.result()
        return set()
    for shard in shards:
        draft.write(shard)
    if history == "interrupted":  # killed before the record of a shard, and in the midst of a file
        cache.record_path(chosen).unlink()
        cache.record.cache_clear()
        (cache.path / "tmp" / "0.0.0.0.0123456789abcdef").write_bytes(rng.randbytes(100))
        torn = cache.path / cache.shard_files(chosen)[0]
        if kept := rng.randrange(3):
            torn.write_bytes(torn.read_bytes()[: -100 * kept])
        write_and_seal(draft, Cache(cache.path), [chosen])
        return {"tmp", "quarantine"} if kept else {"tmp"}
    seal_cache(cache)
    if history == "repaired":
        (cache.path / cache.shard_files(chosen)[-1]).write_bytes(b"damage")
        quarantine_shard(cache, chosen)
        write_and_seal(draft, cache, [chosen])
        return {"quarantine"}
    return set()


def write_and_seal(draft: Draft, cache: Cache, shards: list[int]) -> None:
    for shard in shards:
        draft.write(shard, cache)
    seal_cache(cache)


@contextmanager
def brought_to(path: Path, state: str, rng: random.Random) -> Iterator[Path]:
    """The cache in that state, at the path yielded."""
    target = path.with_name("target")
    if state == "copied":
        shutil.copytree(path, target, copy_function=shutil.copy)
        for file in target.rglob("*"):
            os.utime(file, (rng.randrange(2**31), rng.randrange(2**31)))
        yield target
    elif state == "moved":
        yield path.rename(target)
    elif state == "read-only":
        for entry in (path, *path.rglob("*")):
            entry.chmod(0o555 if entry.is_dir() else 0o444)
        yield path
        for entry in (path, *path.rglob("*")):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
    elif state.endswith("another process"):
        context = get_context("forkserver")
        context.set_forkserver_preload(["conftest", "sami_cache.loader", "sami_cache.store.integrity"])
        busy, enough = context.Event(), context.Event()
        process = context.Process(target=use, args=(path, state, busy, enough), daemon=True)
        process.start()
        while not busy.wait(1):
            assert process.is_alive()
        yield path
        enough.set()
        process.join()
        assert process.exitcode == 0
    else:
        yield path


def use(path: Path, state: str, busy: Event, enough: Event) -> None:
    """In a child process: read or verify the cache again and again."""
    while not enough.is_set():
        if state.startswith("verified"):
            assert verify_cache(path, level="deep").clean
        else:
            cache = Cache(path)
            read = partial(shard_read, CacheSamples(cache)) if cache.has_images else cache.read_codes
            for shard in range(cache.shards):
                read(shard)
        busy.set()


def run_instances(place: Path, numbers: range) -> Counter:
    """Make and verify one cache a number, which alone decides all about it; what was seen, counted."""
    seen: Counter = Counter()
    for number in numbers:
        rng = random.Random(f"{SEED}/{number}")
        # 72 numbers on end meet every history in every state at every level.
        history, state = HISTORIES[(number + number // 12) % 4], STATES[number % 6]
        level = LEVELS[(number + number // 24) % 3]
        draft = draft_cache(place / str(number) / "cache", rng)
        noted = write_history(draft, history, rng)
        cache, root = draft.cache, draft.cache.root()
        with brought_to(cache.path, state, rng) as path:
            report = verify(VerifyConfig(cache=path, level=level, root=root["root"])).report
        notes = {note.partition("/:")[0] for note in report.notes}
        seen.update({"verifies": 1, "false alarms": not report.clean, "notes": len(notes), "sealed": report.sealed})
        seen.update({"wrong notes": notes != noted, "wrong roots": report.root != root["root"]})
        codec, images = cache.attributes["codec"], "with images" if cache.has_images else "without images"
        failed = "with failed samples" if report.failed_samples else "no sample failed"
        kind, dtype = "replay" if cache.views else "dense", f"{codec['name']}, {codec['dtype']}"
        seen.update([history, state, f"level {level}", kind, dtype, f"grid {cache.grid}", images, failed])
        if report.findings or notes != noted:
            print(f"cache {number}, {history}, {state}, {level}: {report.findings}, {report.notes}")
        shutil.rmtree(place / str(number))
    return seen


def check(seen: Counter, verifies: int) -> None:
    assert seen["verifies"] == seen["sealed"] == verifies
    assert seen["false alarms"] == seen["wrong notes"] == seen["wrong roots"] == 0


@pytest.mark.usefixtures("spawn")  # the session has one fork server, and what it loads is what that fixture says
def test_clean_caches_of_many_sorts(tmp_path: Path) -> None:
    check(run_instances(tmp_path, range(20)), 20)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_1000_clean_caches(tmp_path: Path, campaign) -> None:
    verifies, processes = 1000, 2
    shares = [range(number, verifies, processes) for number in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        seen = sum(pool.map(run_instances, [tmp_path] * processes, shares), Counter())
    first = {what: seen[what] for what in ("verifies", "false alarms", "wrong notes", "wrong roots")}
    notes = "Cache `n` is drawn from the seed `{seed}/n` alone."
    campaign("clean-caches", seed=SEED, figures=first | dict(sorted(seen.items())), notes=notes)
    check(seen, verifies)
