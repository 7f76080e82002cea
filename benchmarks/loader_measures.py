"""Processor time, memory and page cache of a contestant: its process and all that descend from it."""

import os
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def tree(process: int | None = None) -> Iterator[int]:
    """This process and its descendants."""
    process = process or os.getpid()
    yield process
    children = []
    for thread in _listed(f"/proc/{process}/task"):
        # Threads come and go meanwhile. One that has gone has left its children to another.
        with suppress(OSError):
            children += Path(f"/proc/{process}/task/{thread}/children").read_text().split()
    for child in dict.fromkeys(children):
        yield from tree(int(child))


def _listed(folder: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(folder)
    return []


def cpu_seconds() -> float:
    """User and system time of the tree, those that have ended included, in ticks of 10 ms."""
    ticks = 0
    for process in tree():
        try:
            values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(value) for value in values[11:15])
    return ticks / TICK


def resident() -> tuple[int, int]:
    """Proportional set size of the tree: (anonymous and shared memory, mapped files), bytes."""
    own = mapped = 0
    for process in tree():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        own += values["Pss_Anon"] + values["Pss_Shmem"]
        mapped += values["Pss_File"]
    return own, mapped


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Largest resident memory in the block beyond what there was before it: `own` (anonymous and shared) and `mapped`."""
    before, found, over = resident(), {"own": 0, "mapped": 0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for name, now, then in zip(found, resident(), before, strict=True):
                found[name] = max(found[name], now - then)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def files_below(paths: Iterable[Path]) -> list[str]:
    return sorted(str(file) for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def warm_up_files(paths: Iterable[Path]) -> None:
    """Read all files into the page cache."""
    buffer = bytearray(4 << 20)
    for file in files_below(paths):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def drop(files: list[str]) -> float:
    """Drop the files, which must have been synced, from the page cache; returns which share of their bytes is still there."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    there = 0
    for start in range(0, len(files), 1000):
        command = ["fincore", "--bytes", "--raw", "--noheadings", "--output", "RES", *files[start : start + 1000]]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        there += sum(map(int, found.stdout.split()))
    return there / max(1, sum(os.path.getsize(file) for file in files))
