"""How busy a cluster's worker keeps its teacher: with one thread for shards, with two, and as the single process does it.

    python benchmarks/cluster_overlap.py --data photos/ [--shards 8] [--teacher-seconds 0.5] [--read-seconds 0.05] [--out FILE]

The teacher takes a fixed time a batch, in which it needs no CPU, as one on a GPU; an image takes a fixed time to arrive, as
from a busy disk. All else is real: decoding, EfficientNet-Lite0 at 64 px, encoding, flushing, reading back. Busy: the seconds
of the teacher over the seconds from the first shard to the last commit.
"""

import argparse
import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import cluster_worker
from pipelines.extract import begin, run_shards
from pipelines.jobs import ExtractConfig
from sami_cache.processes import StopSignal

SHARD, BATCH = 32, 8


def slow(job: Any, teacher_seconds: float, read_seconds: float) -> None:
    """Have the job's teacher and its images take their time."""
    forward, read = job.embedder.teacher.forward, job.source.read

    def answer(pixels: Any) -> Any:
        time.sleep(teacher_seconds)
        return forward(pixels)

    def fetch(index: int) -> bytes:
        time.sleep(read_seconds)
        return read(index)

    job.embedder.teacher.forward, job.source.read = answer, fetch


def busy(config: ExtractConfig, threads: int, shards: int, slowness: tuple[float, float]) -> float:
    """The share of the time that the teacher is at work; `threads` 0: as the single process does it."""
    stop = StopSignal(lambda: "")
    job, cache, _ = begin(config, lambda _: None, stop)
    slow(job, *slowness)
    run = cluster_worker.Run(name="run", host="", config=replace(config, cache=cache.path), cache_id=cache.cache_id)
    cluster_worker._keep(run.config, job, cache)
    started = time.perf_counter()
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(partial(cluster_worker.extract_shard, run=run), range(shards)))
    else:
        job.embedder = replace(job.embedder, turn=StopSignal(lambda: ""))
        run_shards(job, cache, list(range(shards)), lambda _: None, stop)
    return shards * (SHARD // BATCH) * slowness[0] / (time.perf_counter() - started)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--teacher-seconds", type=float, default=0.5, help="a batch of 8")
    parser.add_argument("--read-seconds", type=float, default=0.05, help="an image")
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    given = parser.parse_args(arguments)
    started, load, rows = time.monotonic(), os.getloadavg()[0], []
    for what, threads in (("a worker, one thread", 1), ("a worker, two threads", 2), ("the single process", 0)):
        with tempfile.TemporaryDirectory() as folder:
            config = ExtractConfig(
                data=given.data.absolute(),
                cache=Path(folder) / "cache.zarr",
                teacher="efficientnet_lite0",
                grid=4,
                shard_samples=SHARD,
                batch_size=BATCH,
                fit_images=16,
                device="cpu",
                workers=4,
            )
            share = busy(config, threads, given.shards, (given.teacher_seconds, given.read_seconds))
        rows.append(f"| {what} | {share:.1%} |")
    command = f"python benchmarks/cluster_overlap.py --shards {given.shards} --teacher-seconds {given.teacher_seconds:g} "
    command += f"--read-seconds {given.read_seconds:g}"
    text = "\n".join(
        [
            "# How busy a cluster's worker keeps its teacher",
            "",
            f"Command: `{command} --data PHOTOS`. Hardware: {os.cpu_count()} cores, {platform.machine()}; load {load:.1f} to "
            f"{os.getloadavg()[0]:.1f}. Date: {time.strftime('%Y%m%d')}. Duration: {time.monotonic() - started:.0f} s.",
            "",
            f"{given.shards} shards of {SHARD} photographs, batches of {BATCH}: {SHARD // BATCH * given.teacher_seconds:g} s "
            "of teacher a shard.",
            "",
            "| | the teacher is busy |",
            "|---|---|",
            *rows,
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
