"""Hostile inputs: fuzzed pictures of every format, bombs, pipes, devices, loops and odd names, tars that climb and lie about
sizes, Parquet files and caches whose metadata claim 2^62 samples or lead outside, weights and checkpoints with a payload.

Each goes through what a user would do with it: extraction, opening, inspecting, comparing, verifying, training, resuming and
repairing, loading weights. Counted are dead processes, errors that are not a SamiCacheError, files that take longer than the
deadline, files changed outside the cache, and payloads that ran; memory is the growth of a process over its start.
"""

import hashlib
import json
import os
import random
import shutil
import stat
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hostile_caches import forge_head, hostile_cache, hostile_run, hostile_weights
from hostile_child import attempt, make_good
from hostile_files import all_bombs, deep_folder, hostile_parquet, hostile_tar, image_folder, special_folder
from photos import photo_folder

from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache

SEED = 20260
DEADLINE = 30.0
"""Seconds without a new line in a child's log, on a machine that may be busy."""
MEMORY_CAP = 1536
"""MiB over the start of a process that decodes with one thread; a picture of 100 million pixels takes up to 1200."""
BATCH = {"pictures": 1, "bombs": 1, "special": 4, "tar": 60, "parquet": 40, "cache": 20, "weights": 60, "run": 40}
"""Inputs a process tries; one of pictures and bombs is a whole folder."""


@dataclass
class Outcome:
    """What came of a campaign."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    growth: int = 0
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, text: str) -> None:
        self.counts[what] += 1
        self.problems.append(f"{what}: {text}")


@dataclass
class Task:
    """One thing to try."""

    number: int
    kind: str
    path: Path
    cache: Path
    """What the child may write to; everything else is watched."""
    made: str
    """What it is, in words."""


def snapshot(root: Path, *, leaving_out: set[Path]) -> dict[str, tuple[object, ...]]:
    """Everything below `root`: kinds, sizes, times and contents."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if Path(folder) / name not in leaving_out]
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except OSError:  # deeper than the longest path
                continue
            content = ""
            if stat.S_ISREG(status.st_mode):
                if status.st_size < 1 << 24:
                    with open(path, "rb") as file:
                        content = hashlib.blake2b(file.read()).hexdigest()
                found[path] = status.st_mode, status.st_size, status.st_mtime_ns, content
            else:
                found[path] = (status.st_mode,)
    return found


def try_all(work: Path, good: Path, tasks: list[Task], outcome: Outcome) -> None:
    """Try tasks in child processes, a new one after each death; what killed one is noted and left out."""
    home, outside, markers = work / "home", work / "outside", work / "markers"
    before = snapshot(work, leaving_out={work / "logs", *(task.cache for task in tasks)})
    before |= snapshot(good, leaving_out=set())
    left = list(tasks)
    while left:
        log = work / "logs" / f"{len(left):06d}-{time.monotonic_ns()}"
        arguments = [(task.number, task.kind, str(task.path), str(task.cache)) for task in left]
        process = get_context("forkserver").Process(target=attempt, args=(str(log), str(home), str(good), arguments))
        process.start()
        hung = not _watch(process, log)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        with outcome.lock:
            at, last = _count(lines, {task.number: task for task in left}, outcome)
            if not lines or "done" not in lines[-1]:
                made = next((task.made for task in left if task.number == at), "before the first task")
                outcome.note("hangs" if hung else "deaths", f"exit {process.exitcode}, task {at} ({made}), trying {last}")
        left = [task for task in left if at is not None and task.number > at] if not lines or "done" not in lines[-1] else []
    after = snapshot(work, leaving_out={work / "logs", *(task.cache for task in tasks)}) | snapshot(good, leaving_out=set())
    with outcome.lock:
        for path in sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)):
            if Path(path).is_relative_to(markers):
                outcome.note("payloads that ran", path)
            else:
                place = "" if not Path(path).is_relative_to(outside) else " (outside)"
                outcome.note("files changed outside the cache", path + place)


def _watch(process, log: Path) -> bool:
    """Wait for the end of `process`; kill it and give False when its log stands still for too long."""
    size, since = -1, time.monotonic()
    while process.is_alive():
        process.join(0.1)
        now = log.stat().st_size if log.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > DEADLINE:
            process.kill()
            process.join()
            return False
    return True


def _count(lines: list[dict], tasks: dict[int, Task], outcome: Outcome) -> tuple[int | None, str]:
    """Add a log to `outcome`; returns the task and the file that came last."""
    at, last, start, most = None, "", None, MEMORY_CAP
    for line in lines:
        if "baseline" in line:
            start = line["rss"]
        elif "task" in line:
            at = line["task"]
        last = line.get("trying", last)
        for what in ("accepted", "refused"):
            if what in line:
                outcome.counts[f"pictures {what}" if "picture" in line else f"attempts {what}"] += 1
        outcome.slowest = max(outcome.slowest, line.get("seconds", 0))
        outcome.counts["messages with control characters"] += "odd" in line
        if "escape" in line and at is not None:
            outcome.note("escapes", f"task {at} ({tasks[at].made}), {line['escape']}: {line['what']}")
        if start is not None:
            growth = line["rss"] - start
            outcome.growth = max(outcome.growth, growth)
            if growth > most and at is not None:  # a peak stays in what the kernel says of the process from then on
                most = growth
                outcome.note("over the memory cap", f"task {at} ({tasks[at].made}), {growth} MiB at {last}")
    return at, last


def try_batch(work: Path, good: Path, outcome: Outcome, sort: str, numbers: range, seed: int) -> None:
    """Make these inputs in the folder `work`, try them, and remove it."""
    for name in ("home", "outside", "markers", "logs", "inputs", "caches"):
        (work / name).mkdir(parents=True)
    (work / "outside" / "canary").write_bytes(b"canary")
    tasks, files = [], 0
    for number in numbers:
        task, count = make_task(work, good, sort, number, random.Random(f"{seed}-{sort}-{number}"))
        tasks.append(task)
        files += count
    try_all(work, good, tasks, outcome)
    with outcome.lock:
        outcome.counts[f"files: {sort}"] += files
    shutil.rmtree(work)


def make_task(work: Path, good: Path, sort: str, number: int, rng: random.Random) -> tuple[Task, int]:
    """Make one hostile input; returns it, and how many files it counts as."""
    path, cache = work / "inputs" / f"{number:04d}", work / "caches" / f"{number:04d}"
    kind, count, made = "source", 1, sort
    if sort in ("pictures", "bombs"):
        count = len(image_folder(path, rng, 250, {})) if sort == "pictures" else len(image_folder(path, rng, 20, all_bombs()))
    elif sort == "special":
        count = len(deep_folder(path) if number % 8 == 7 else special_folder(path, rng))
    elif sort == "tar":
        path = path.with_suffix(".tar")
        path.write_bytes(hostile_tar(rng, str(work / "outside")))
    elif sort == "parquet":
        path = path.with_suffix(".parquet")
        path.write_bytes(hostile_parquet(rng))
    elif sort == "cache":
        kind, cache = "cache", path
        made = hostile_cache(rng, good / "cache.zarr", path, work / "outside")
    elif sort == "weights":
        kind = "weights"
        path = hostile_weights(rng, path, work / "outside")
        made = path.name
    else:
        kind, cache = "run", path
        made = hostile_run(rng, good / "run", path, work / "outside")
    return Task(number, kind, path, cache, f"{sort} {number}: {made}"), count


@pytest.fixture(scope="module")
def good(tmp_path_factory, spawn) -> Path:
    """A sealed cache and a training run to make hostile copies of."""
    folder = tmp_path_factory.mktemp("good")
    photo_folder(folder / "photos", 24)
    process = get_context("forkserver").Process(target=make_good, args=(folder,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return folder


def test_what_the_forger_forges_is_believed(good, tmp_path):
    """Else a campaign of forged heads is refused for the forger's mistakes."""
    path = Path(shutil.copytree(good / "cache.zarr", tmp_path / "cache.zarr"))
    codes = Cache(path).read_codes(1)
    forge_head(path, lambda attributes: attributes["provenance"].update(forged=True))
    cache = Cache(path)
    assert cache.attributes["provenance"]["forged"]
    assert np.array_equal(cache.read_codes(1), codes)
    assert cache.codec.kept == len(cache.codec.step)
    assert [finding.path for finding in verify_cache(path).findings] == ["spare.tar"]
    forge_head(path, lambda attributes: attributes["codec"].update(variance=2 * cache.codec.variance))
    assert Cache(path).codec.variance == 2 * cache.codec.variance
    assert Cache(path).cache_id != cache.cache_id
    assert np.array_equal(Cache(path).read_codes(1), codes)


def run_campaign(tmp: Path, good: Path, sizes: dict[str, int], seed: int) -> Outcome:
    outcome = Outcome()
    batches = [
        (sort, range(start, min(size, start + BATCH[sort])))
        for sort, size in sizes.items()
        for start in range(0, size, BATCH[sort])
    ]
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(try_batch, tmp / f"{sort}-{numbers.start}", good, outcome, sort, numbers, seed)
            for sort, numbers in batches
        ]
        for each in running:
            each.result()
    return outcome


def figures(outcome: Outcome) -> dict[str, object]:
    wrong = ("deaths", "hangs", "escapes", "files changed outside the cache", "payloads that ran", "over the memory cap")
    files = {name: count for name, count in sorted(outcome.counts.items()) if name.startswith("files: ")}
    return {
        "files": sum(files.values()),
        **files,
        **{name: outcome.counts[name] for name in wrong},
        f"largest memory over the start, MiB (cap {MEMORY_CAP})": outcome.growth,
        "messages with control characters": outcome.counts["messages with control characters"],
        f"slowest picture, s (deadline {DEADLINE:.0f})": outcome.slowest,
        **{name: outcome.counts[name] for name in sorted(outcome.counts) if name.endswith(("accepted", "refused"))},
    }


def check(outcome: Outcome) -> None:
    shown = "\n".join(outcome.problems[:40])
    assert not outcome.problems, f"{figures(outcome)}\n{len(outcome.problems)} problems:\n{shown}"
    for kind in ("attempts accepted", "attempts refused", "pictures accepted", "pictures refused"):
        assert outcome.counts[kind] > 10, f"{kind}: the campaign did not try what it says: {outcome.counts}"


def test_hostile_inputs_small(tmp_path, good):
    sizes = {"bombs": 1, "special": 1, "tar": 16, "parquet": 6, "cache": 20, "weights": 16, "run": 10}
    outcome = run_campaign(tmp_path, good, sizes, SEED)
    print(figures(outcome))
    check(outcome)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_hostile_inputs(tmp_path, good, campaign):
    sizes = {"pictures": 12, "bombs": 2, "special": 16, "tar": 600, "parquet": 500, "cache": 480, "weights": 400, "run": 160}
    outcome = run_campaign(tmp_path, good, sizes, SEED)
    assert figures(outcome)["files"] >= 5000
    check(outcome)
    campaign("hostile-inputs", seed=SEED, figures=figures(outcome))
