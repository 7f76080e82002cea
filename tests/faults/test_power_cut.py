"""Power cuts: whatever was reported as committed is on the disk, whenever the plug is pulled.

A child fills, seals and repairs caches on a loop-mounted ext4 that writes nothing by itself (commit=300). At random moments,
many of them just after something was reported, the child is stopped and the device's content copied: what lies in the page
cache only is not in the copy. The copy is mounted, which replays its journal, and must hold every commit that was reported
before, whole; it is then finished to the same root.
Not covered: disks that lose what they have confirmed, or that reorder writes between two flushes.
"""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from conftest import fill_shard, new_cache
from photos import photo_folder
from watched import (
    extract_arguments,
    go_on,
    mounted,
    note,
    noted,
    or_skip,
    run_watched,
    skip_without_mount,
    start,
    stop,
)

from sami_cache.errors import SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache
from sami_cache.store.repair import quarantine_shard
from sami_cache.store.writing import seal_cache

SEED = 20261123
IMAGE_BYTES = 32 << 20
SAMPLES = 96
# (features of the file system, mount options): what is ordered, and how the journal is written, differs.
KINDS = [
    ("^fast_commit", "commit=300"),
    ("fast_commit", "commit=300"),
    ("^fast_commit", "commit=300,data=writeback"),
    ("^fast_commit", "commit=300,data=journal"),
]


def fill_caches(disk: str, report: str, seed: int, caches: int) -> None:
    """In a child process: make, fill, seal and repair caches, noting what is about to happen and what has returned."""
    rng = random.Random(seed)

    def returned(*event: object) -> None:
        note(report, *event)
        if rng.random() < 0.2:  # wait here for the next cut: a flush that is left out is made up for by the next one
            os.kill(os.getpid(), signal.SIGSTOP)

    def commit(cache: Cache, shard: int) -> None:
        note(report, cache.path.name, "writing", shard)
        assert fill_shard(cache, shard).won
        returned(cache.path.name, "committed", shard)
        time.sleep(rng.uniform(0, 0.01))  # the teacher thinks

    for number in range(caches):
        cache = new_cache(Path(disk) / f"{number}.zarr", samples=SAMPLES)
        returned(cache.path.name, "created", None)
        time.sleep(rng.uniform(0, 0.02))
        for shard in rng.sample(range(cache.shards), cache.shards):
            commit(cache, shard)
        returned(cache.path.name, "sealed", seal_cache(cache)["root"])
        time.sleep(rng.uniform(0, 0.02))
        for shard in rng.sample(range(cache.shards), 4):
            note(report, cache.path.name, "moving", shard)
            quarantine_shard(cache, shard)
            returned(cache.path.name, "moved", shard)
            time.sleep(rng.uniform(0, 0.01))
            commit(cache, shard)
        seal_cache(cache)


def finish_in_process(path: Path) -> None:
    cache = Cache(path)
    for shard in sorted(set(range(cache.shards)) - set(cache.committed())):
        assert fill_shard(cache, shard).won
    seal_cache(cache)


def content(image: Path) -> bytes:
    """What the device holds, at one instant: nothing changed from before the copy until after it."""
    before = image.read_bytes()
    while (after := image.read_bytes()) != before:
        before = after
    return after


def cuts(process: BaseProcess, image: Path, report: Path, rng: random.Random, gap: float) -> Iterator[tuple[list, bytes]]:
    """What the child had reported and what the disk held, at random moments and at its end; it stands still meanwhile."""
    try:
        while True:
            time.sleep(rng.uniform(0, gap))
            running = stop(process)
            events = noted(report)
            yield events, content(image)
            if not running:
                return
            go_on(process)
    finally:
        process.kill()
        process.join()


def examine(disk: Path, events: list, expected: str, finish) -> Counter:
    """Check what a power cut left, and go on with it. Returns what was met."""
    met: Counter = Counter(images=1)
    reported: dict[str, dict] = {}
    for name, what, detail, *_ in events:
        reported.setdefault(name, {})[("seal" if what == "sealed" else "shard", detail)] = what
    found = {path.name: path for path in disk.glob("[!.]*.zarr")}
    for name, states in reported.items():
        assert name in found, f"{name} was created, and is gone"
        lasting = {shard for (_, shard), what in states.items() if what == "committed"}
        lost = lasting - set(Cache(found[name]).committed())
        assert not lost, f"{name}: shards {sorted(lost)} were committed, and are gone"
        met["committed shards"] += len(lasting)
        moved = {shard for (_, shard), what in states.items() if what == "moved"}
        assert not moved & set(Cache(found[name]).committed()), f"{name}: a shard that was moved aside is back"
        met["cuts within a repair"] += any(what in ("moving", "moved") for what in states.values())
    for name, path in found.items():
        cache, states = Cache(path), reported.get(name, {})
        met["creations not reported yet"] += name not in reported
        missing = set(range(cache.shards)) - set(cache.committed())
        open_files = {file for shard in missing for file in cache.shard_files(shard)}
        report = verify_cache(path, level="deep")
        allowed = open_files | {"ROOT.json"} | {f"commits/{shard:06d}.json" for shard in missing}
        wrong = [finding for finding in report.findings if finding.path not in allowed]
        assert not wrong, f"{name}: {wrong}"
        root = cache.root()
        assert root is None or root["root"] == expected
        sealed = any(kind == "seal" for kind, _ in states)
        assert root is not None or not sealed, f"{name}: was sealed, and has no root"
        met["sealed caches"] += sealed
        met["unfinished caches"] += root is None or bool(missing)
        met["uncommitted leftovers"] += sum((path / file).exists() for file in open_files) + len(list(path.glob("tmp/*")))
        if name == max(found):  # the one that was being written
            finish(path)
            assert Cache(path).root()["root"] == expected
            assert verify_cache(path, level="deep").findings == []
    return met


@contextlib.contextmanager
def memory_folder(fallback: Path) -> Iterator[Path]:
    """A folder where copying a disk takes milliseconds."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else fallback) as folder:
        yield Path(folder)


def cut_power(tmp_path: Path, images: int, begin, finish, expected: str, gap: float) -> Counter:
    """Cut until there are so many images; a new file system whenever the child has ended."""
    skip_without_mount("mkfs.ext4", "ext4")
    rng, met = random.Random(SEED), Counter()
    with memory_folder(tmp_path) as folder:
        image, copy, report = folder / "image", folder / "copy", folder / "report"
        for session, (features, options) in enumerate(itertools.cycle(KINDS)):
            report.unlink(missing_ok=True)
            image.unlink(missing_ok=True)
            with image.open("wb") as file:
                file.truncate(IMAGE_BYTES)
            made = ["mkfs.ext4", "-q", "-F", "-b", "1024", "-J", "size=4", "-E", "lazy_itable_init=0", "-O", features]
            subprocess.run([*made, str(image)], check=True)
            with contextlib.ExitStack() as stack:
                with or_skip():
                    disk = stack.enter_context(mounted(image, folder / "disk", options=f"loop,{options}"))
                child = cuts(begin(disk, report, rng.getrandbits(32)), image, report, rng, gap)
                stack.callback(child.close)
                for events, data in child:
                    copy.write_bytes(data)
                    try:
                        with mounted(copy, folder / "after", options="loop") as after:
                            met += examine(after, events, expected, finish)
                    except (AssertionError, SamiCacheError) as error:
                        raise AssertionError(f"image {met['images'] + 1} ({features} {options}): {error}") from error
                    met[f"images with {features}, {options}"] += 1
                    if met["images"] == images:
                        met["file systems made"] = session + 1
                        return met
    raise AssertionError("unreachable")


def cut_store(tmp_path: Path, images: int, gap: float = 0.12) -> Counter:
    calm = new_cache(tmp_path / "calm.zarr", samples=SAMPLES)
    finish_in_process(calm.path)

    def begin(disk: Path, report: Path, seed: int) -> BaseProcess:
        return start(fill_caches, str(disk), str(report), seed, 2)

    return cut_power(tmp_path, images, begin, finish_in_process, Cache(calm.path).root()["root"], gap)


def run_without_reserve(arguments: list[str], report: str) -> None:
    """The command line on a disk that is smaller than what it would like to keep free."""
    import pipelines.extract
    import pipelines.plan

    pipelines.plan.RESERVE_BYTES = pipelines.extract.RESERVE_BYTES = 0
    run_watched(arguments, report)


def cut_command(tmp_path: Path, images: int, photos: int, gap: float) -> Counter:
    skip_without_mount("mkfs.ext4", "ext4")
    folder = photo_folder(tmp_path / "photos", photos)

    def begin(disk: Path, report: Path, seed: int) -> BaseProcess:
        return start(run_without_reserve, extract_arguments(folder, disk / "c.zarr"), str(report))

    def finish(path: Path) -> None:
        process = start(run_without_reserve, extract_arguments(folder, path), os.devnull)
        process.join(120)
        assert process.exitcode == 0

    calm = tmp_path / "calm-command.zarr"
    finish(calm)
    return cut_power(tmp_path, images, begin, finish, Cache(calm).root()["root"], gap)


def test_nothing_that_was_reported_is_lost_in_a_few_power_cuts(spawn, tmp_path):
    met = cut_store(tmp_path, images=12)
    assert met["images"] == 12
    assert met["committed shards"] > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_that_was_reported_is_lost_in_200_power_cuts(spawn, tmp_path, campaign):
    met = cut_store(tmp_path, images=180)
    command = cut_command(tmp_path, images=20, photos=80, gap=1.0)
    assert met["cuts within a repair"] > 5
    assert met["unfinished caches"] > 50
    assert command["committed shards"] > 5
    figures = {f"store: {what}": count for what, count in sorted(met.items())}
    figures |= {f"command line: {what}": count for what, count in sorted(command.items())}
    campaign("power-cut", seed=SEED, figures=figures | {"committed shards lost": 0, "torn files or records": 0})
