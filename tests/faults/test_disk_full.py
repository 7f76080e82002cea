"""A full disk: the command line stops with exit code 3 and says the numbers, loses nothing, and goes on once there is room.

On a small tmpfs. The disk is too small from the start (refused before anything is written), becomes short between two shards
(stopped while there is still room), or is filled by somebody else in the middle of writing, which is a real "no space left".
Then it is enlarged, and the same command comes to the root of an undisturbed run.
"""

import os
import random
import re
import shutil
import subprocess
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from photos import photo_folder
from watched import extract_arguments, mounted, noted, or_skip, run_watched, skip_without_mount, start

from pipelines.plan import RESERVE_BYTES
from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache

SEED = 20261123
PAGE = 4096
MEGABYTE = 1 << 20
NUMBERS = {
    "refused before the start": r"will take about [\d.]+ GB \([\d.]+ KB a sample\), the disk has [\d.]+ GB free",
    "stopped between shards": r"\d+ MB free, the next shard needs \d+ MB .* Stopped before the disk is full; \d+ of \d+",
    "full while creating": r"the disk is full \(\d+ MB free\) while making the cache",
    "full while writing a shard": r"the disk is full \(\d+ MB free\) while writing shard \d+, which was not committed",
    "full while sealing": r"the disk is full \(\d+ MB free\) while sealing it",
}


def fill_up(disk: str, leave: int) -> None:
    """Somebody else's file takes all but `leave` bytes (rounded down to pages)."""
    free = shutil.disk_usage(disk).free // PAGE * PAGE
    with (Path(disk) / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave // PAGE * PAGE)


def pages(paths: list[Path]) -> int:
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in paths)


def shard_bytes(calm: Cache, shard: int) -> int:
    return pages([calm.record_path(shard), *(calm.path / name for name in calm.shard_files(shard))])


def record_times(path: Path) -> dict[str, int]:
    return {record.name: record.stat().st_mtime_ns for record in path.glob("commits/*.json")}


def draw(rng: random.Random, how: str, calm: Cache) -> tuple[int, tuple[str, int] | None, int]:
    """The disk's size, the call before which it is filled, and what is left then."""
    enough = calm.size_on_disk() + RESERVE_BYTES + 4 * MEGABYTE
    if how == "refused before the start":
        return rng.randrange(PAGE, RESERVE_BYTES), None, 0
    if how == "full while creating":
        created = pages([calm.path / "zarr.json", *(calm.path / name for name in calm.files)])
        return enough, ("create_cache", 1), rng.randrange(created)
    if how == "full while sealing":
        return enough, ("seal_cache", 1), rng.randrange(pages([calm.path / "manifest.parquet", calm.path / "ROOT.json"]))
    call = rng.randint(1, calm.shards - 2)
    if how == "full while writing a shard":
        return enough, ("write_shard", call), rng.randrange(shard_bytes(calm, call - 1))
    # Room for this shard, and for the one that may be on its way already, but not for the reserve as well.
    return (
        enough,
        ("write_shard", call),
        rng.randrange(2 * max(map(partial(shard_bytes, calm), range(calm.shards))), 7 * MEGABYTE),
    )


def meet_full_disk(folder: Path, photos: Path, calm: Cache, how: str, rng: random.Random) -> Counter:
    size, strike, leave = draw(rng, how, calm)
    report, output = folder / "report", folder / "output"
    report.unlink(missing_ok=True)
    with ExitStack() as stack:
        with or_skip():
            disk = stack.enter_context(mounted("tmpfs", folder / "disk", kind="tmpfs", options=f"size={size}"))
        target = disk / "c.zarr"
        command, act = extract_arguments(photos, target), partial(fill_up, str(disk), leave)
        process = start(run_watched, command, str(report), str(output), strike, act)
        process.join(120)
        said = " ".join(output.read_text().split())
        drawn = f"{how}: size {size}, filled before {strike}, {leave} left: exit code {process.exitcode}, {said}"
        assert process.exitcode == 3, drawn
        assert re.search(NUMBERS[how], said), drawn
        assert "Make room" in said, drawn

        events = noted(report)
        committed = [shard for _, what, shard, *_ in events if what == "committed"]
        assert target.exists() == (how not in ("refused before the start", "full while creating")), drawn
        assert {path.name for path in disk.iterdir()} <= {"c.zarr", "ballast"}, drawn
        if target.exists():
            cache = Cache(target)
            assert cache.committed() == sorted(committed), drawn
            assert list((target / "tmp").iterdir()) == [], drawn
            for finding in verify_cache(target, level="deep").findings:
                assert finding.path == "ROOT.json" or finding.shard not in committed, f"{drawn}: {finding}"
        before = record_times(target)

        larger = size + calm.size_on_disk() + RESERVE_BYTES + 4 * MEGABYTE
        subprocess.run(["mount", "-o", f"remount,size={larger}", str(disk)], check=True)
        again = start(run_watched, command, str(report), str(output))
        again.join(120)
        assert again.exitcode == 0, f"{drawn}; then {output.read_text()}"
        assert Cache(target).root() == calm.root(), drawn
        assert verify_cache(target, level="deep").findings == [], drawn
        assert before.items() <= record_times(target).items(), drawn
    return Counter({how: 1, "disks": 1, "shards kept": len(committed)})


@pytest.fixture
def setting(spawn, tmp_path):
    skip_without_mount()
    photos = photo_folder(tmp_path / "photos", 72)
    process = start(run_watched, extract_arguments(photos, tmp_path / "calm.zarr"), os.devnull)
    process.join(120)
    assert process.exitcode == 0
    return tmp_path, photos, Cache(tmp_path / "calm.zarr")


def test_two_full_disks(setting):
    rng = random.Random(SEED)
    for how in ("stopped between shards", "full while writing a shard"):
        meet_full_disk(*setting, how, rng)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_full_disks(setting, campaign):
    rng, met = random.Random(SEED), Counter()
    share = {"full while writing a shard": 8, "stopped between shards": 4, "refused before the start": 2}
    for how in [name for name in NUMBERS for _ in range(share.get(name, 3))]:
        met += meet_full_disk(*setting, how, rng)
    assert met["disks"] == 20
    figures = {"real ENOSPC": sum(count for how, count in met.items() if how.startswith("full")), **met, "other roots": 0}
    campaign("disk-full", seed=SEED, figures=figures)
