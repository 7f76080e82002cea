"""A simulated cluster: how well N workers with random deaths share an extraction, the teacher being a sleep.

    python benchmarks/cluster.py [--workers 1 2 4 8 16 32 64] [--shards 6] [--sleep 20] [--out FILE]

Every worker is a process of Dask's, under a nanny that starts another in place of one that dies. A task is a shard: it sleeps
as long as a teacher would compute, then encodes, publishes, reads back and commits a small shard into a real cache. A task
whose shard is committed already does nothing, as in an extraction. Deaths are SIGKILLs to a random worker at random times (a
Poisson process), whatever the worker is at. In the end the cache is sealed and verified, and its root must be that of a cache
which one process wrote undisturbed.

Efficiency: shards x sleep / (workers x seconds from the first task handed out to the last commit). "With work left" is the same
up to the moment when the last shard was handed out for the first time: what comes after, workers without work while the last
ones finish, is the shorter the more shards each has. Lost: seconds that killed workers had slept for shards they had not
committed, over all seconds slept.

What is to be expected: deaths come to a worker at a rate r, a shard takes s seconds, x = r s. A shard that is begun anew after
each death takes (e^x - 1) / r seconds on average until it is done, of which s are useful: 1 - x / (e^x - 1) are lost, about
x / 2. A death loses between nothing and s, uniformly to first order, so that of D deaths the sum has a deviation of
s sqrt(D / 3).

Needs `distributed`, which the package does not.
"""

import argparse
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale import fill_shard, make_empty, small_jpeg

from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache
from sami_cache.store.writing import seal_cache

SHARD = 16
PRELOAD = ["distributed", "numpy", "pyarrow", "scale"]
"""What workers import. They are forked from one process that has it, or the start of 64 would be a minute of two cores."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run."""

    workers: int
    shards: int
    """Over all workers."""
    sleep: float
    """Seconds a shard."""
    deaths: float
    """Expected for every `sleep` seconds of one worker, that is, for every shard."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it."""

    seconds: float
    slept: float
    """By all workers, lost sleep counted."""
    lost: float
    busy: float
    """Efficiency with work left."""
    killed: int
    given_up: int
    """Tasks of workers that Dask took for dead although nobody had killed them."""
    start_seconds: float
    """Until all workers were there: not part of `seconds`."""
    memory: int
    """Of all workers, bytes; pages that several share are counted once (PSS)."""


def work(path: str, shard: int, sleep: float, log: str) -> None:
    """A worker's task. What it slept is written down beside it, for those who are killed cannot tell."""
    cache = Cache(path)
    if cache.record_path(shard).exists():
        return
    line = {"pid": os.getpid(), "shard": shard, "start": time.time()}
    place = Path(log) / f"{line['pid']}.{time.monotonic_ns()}"
    place.write_text(json.dumps(line))
    time.sleep(sleep)
    fill_shard(cache, shard, small_jpeg())
    place.write_text(json.dumps(line | {"slept": sleep}))


def read_log(log: Path, killed: dict[int, float], sleep: float) -> list[dict[str, Any]]:
    """What tasks wrote down, seconds slept filled in for those who could not. `killed`: when each process was killed.

    A task that neither ended nor was killed belongs to a worker that Dask took for dead: the machine let it wait.
    """
    lines, now = [], time.time()
    for place in log.iterdir():
        try:
            line = json.loads(place.read_text())
        except ValueError:  # killed while it wrote down that it was done, or that it began
            continue
        line["done"] = "slept" in line
        if not line["done"]:
            line["given_up"] = line["pid"] not in killed
            line["slept"] = min(sleep, killed.get(line["pid"], now) - line["start"])
        lines.append(line)
    return lines


def busy(lines: list[dict[str, Any]], workers: int, began: float) -> float:
    """The share of the workers' time that was slept for shards which they committed, until the last shard was handed out."""
    first: dict[int, float] = {}
    for line in lines:
        first[line["shard"]] = min(line["start"], first.get(line["shard"], math.inf))
    until = max(first.values())
    useful = sum(max(0.0, min(line["slept"], until - line["start"])) for line in lines if line["done"])
    return useful / (workers * (until - began))


def expected_loss(deaths: float, slept: float, sleep: float) -> tuple[float, float]:
    """The share of all `slept` seconds that is lost on average, and its standard deviation."""
    if not deaths:
        return 0.0, 0.0
    return 1 - deaths / math.expm1(deaths), sleep * math.sqrt(deaths * slept / sleep / 3) / slept


def kill_at_random(pids, rate: float, done: threading.Event, killed: dict[int, float], seed: int) -> None:
    """SIGKILL a random one of `pids()` after exponential waits, `rate` a second, until `done`."""
    rng = random.Random(seed)
    while rate and not done.wait(rng.expovariate(rate)):
        alive = [pid for pid in pids() if pid not in killed]
        if alive:
            pid = rng.choice(alive)
            killed[pid] = time.time()
            os.kill(pid, signal.SIGKILL)


def shared_memory(pids: list[int]) -> int:
    """Bytes of these processes, a page of several counted in shares; 0 where the system does not say."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def start_cluster(folder: Path, workers: int) -> Any:
    """A cluster of single-threaded worker processes, each under its nanny."""
    from dask.config import set as configure
    from distributed import LocalCluster, utils

    configure(
        {
            "distributed.worker.multiprocessing-method": "forkserver",
            # A shard whose worker was killed again and again is no poison here.
            "distributed.scheduler.allowed-failures": 1000,
            "distributed.comm.timeouts.connect": "120s",
            # Workers that wait should cost nothing: by default each wakes up 200 times a second to look at itself, which 64 of
            # them on a few cores spend more on than on their tasks.
            "distributed.worker.profile.enabled": False,
            "distributed.admin.tick.interval": "1s",
            "distributed.admin.system-monitor.interval": "5s",
            "distributed.admin.system-monitor.gil.enabled": False,
        }
    )
    utils.get_mp_context()  # sets a list of its own, once
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    settings: dict[str, Any] = {"dashboard_address": None, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, local_directory=str(folder / "scratch"), **settings
    )


def simulate(folder: Path, setting: Setting, seed: int = 0) -> tuple[Cache, Outcome]:
    """Fill a new cache in `folder` with a cluster; returns it, not sealed yet."""
    from distributed import Client, wait

    path, log = folder / "cache.zarr", folder / "log"
    log.mkdir(parents=True)
    cache = make_empty(path, setting.shards * SHARD, SHARD)
    done, killed = threading.Event(), {}
    started = time.monotonic()
    with start_cluster(folder, setting.workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(setting.workers, timeout=300)
        client.run(small_jpeg)  # all of them have their modules
        start_seconds = time.monotonic() - started

        def pids() -> list[int]:
            return [worker.pid for worker in list(cluster.workers.values()) if getattr(worker, "pid", None)]

        rate = setting.deaths * setting.workers / setting.sleep
        killer = threading.Thread(target=kill_at_random, args=(pids, rate, done, killed, seed), daemon=True)
        started, began = time.monotonic(), time.time()
        killer.start()
        try:
            tasks = [[str(path)] * setting.shards, range(setting.shards)]
            futures = client.map(work, *tasks, sleep=setting.sleep, log=str(log), pure=False)
            wait(futures, timeout=3600)
            seconds = time.monotonic() - started
        finally:
            done.set()
            killer.join()
        memory = shared_memory(pids())
        for future in futures:
            future.result()  # raises what a task raised
    lines = read_log(log, killed, setting.sleep)
    outcome = Outcome(
        seconds=seconds,
        slept=sum(line["slept"] for line in lines),
        lost=sum(line["slept"] for line in lines if not line["done"]),
        busy=busy(lines, setting.workers, began),
        killed=len(killed),
        given_up=sum(line.get("given_up", False) for line in lines),
        start_seconds=start_seconds,
        memory=memory,
    )
    return cache, outcome


def undisturbed_root(folder: Path, shards: int) -> str:
    """Of the cache that one process writes without a pause."""
    cache = make_empty(folder / "alone.zarr", shards * SHARD, SHARD)
    for shard in range(shards):
        fill_shard(cache, shard, small_jpeg())
    root = seal_cache(cache)["root"]
    shutil.rmtree(cache.path)
    return root


def run(folder: Path, setting: Setting, expected_root: str, seed: int = 0) -> Outcome:
    """Simulate, seal, verify and compare roots; the files are deleted."""
    place = folder / f"{setting.workers}-{setting.deaths}"
    try:
        cache, outcome = simulate(place, setting, seed)
        root = seal_cache(cache)["root"]
        report = verify_cache(cache.path, level="deep", expected_root=expected_root)
        assert report.clean, report.findings
        assert root == expected_root, (root, expected_root)
        return outcome
    finally:
        shutil.rmtree(place, ignore_errors=True)


def row(setting: Setting, outcome: Outcome) -> list[str]:
    ideal = setting.shards * setting.sleep / setting.workers
    loss, deviation = expected_loss(setting.deaths, outcome.slept, setting.sleep)
    return [
        str(setting.workers),
        str(setting.shards),
        f"{setting.deaths:g}",
        f"{outcome.killed}" + (f" (+ {outcome.given_up} taken for dead)" if outcome.given_up else ""),
        f"{ideal:.1f} s",
        f"{outcome.seconds:.1f} s",
        f"{ideal / outcome.seconds:.1%}",
        f"{outcome.busy:.1%}",
        f"{outcome.lost / outcome.slept:.1%}",
        f"{loss:.1%} ± {deviation:.1%}",
        f"{outcome.start_seconds:.1f} s",
        f"{outcome.memory / 2**30:.2f} GiB",
    ]


HEAD = ["workers", "shards", "deaths a shard", "killed", "ideal", "took", "efficiency", "with work left", "lost", "expected"]
HEAD += ["start, not counted", "memory"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--deaths", type=float, nargs="+", default=[0.0, 0.05, 0.15], help="a shard")
    parser.add_argument("--shards", type=int, default=6, help="a worker")
    parser.add_argument("--sleep", type=float, default=20, help="seconds a shard")
    parser.add_argument("--folder", type=Path, default=None, help="where the caches are made; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The process that workers are forked from finds its modules by the environment alone.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    started, load, rows = time.monotonic(), os.getloadavg()[0], []
    try:
        for workers in given.workers:
            shards = given.shards * workers
            expected = undisturbed_root(folder, shards)
            for deaths in given.deaths:
                setting = Setting(workers=workers, shards=shards, sleep=given.sleep, deaths=deaths)
                rows.append(row(setting, run(folder, setting, expected, seed=workers + round(1000 * deaths))))
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = f"python benchmarks/cluster.py --workers {' '.join(map(str, given.workers))} --deaths "
    command += f"{' '.join(f'{deaths:g}' for deaths in given.deaths)} --shards {given.shards} --sleep {given.sleep:g}"
    text = "\n".join(
        [
            "# A simulated cluster with deaths",
            "",
            f"Command: `{command}`. Hardware: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
            f", distributed {importlib.metadata.version('distributed')}; load {load:.1f} to {os.getloadavg()[0]:.1f}. Date: "
            f"{time.strftime('%Y%m%d')}. Duration: {time.monotonic() - started:.0f} s.",
            "",
            f"A shard: {given.sleep:g} s of sleep in place of the teacher, then {SHARD} small samples are really committed. "
            f"{given.shards} shards a worker. Every cache was sealed, found clean by `verify --deep`, and had the root of one "
            "written by a single undisturbed process. Deaths: SIGKILL of a random worker at random times, expected number a "
            "shard. Ideal: all workers sleep all the time and nothing is lost. With work left: efficiency until the last shard "
            "was handed out for the first time. Expected: 1 - x / (e^x - 1) for x deaths a shard, and a standard deviation.",
            "",
            *("| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows)),
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
