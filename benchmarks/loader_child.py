"""One contestant in a process of its own: told on standard input what to do, answers with a line of JSON each time."""

import gc
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from loader_contestants import OURS, PEERS, STILL_CACHED, format_class, missing_packages
from loader_measures import cpu_seconds, drop, files_below, peak_memory, warm_up_files
from loader_samples import PlainSamples

ENDLESS = 1_000_000
COLD_EPOCHS = 4
"""At most in a round: workers are started anew for each."""


class Contestant:
    """What is measured: streams of batches, by way (layout, order, workers)."""

    def __init__(self, name: str, images: str, plain: str, cache: str, folder: str, cores: int) -> None:
        self.name, self.images, self.cores = name, images, cores
        self.samples, self.cache, self.folder = PlainSamples(Path(plain)), Path(cache), Path(folder)

    def missing(self) -> list[str]:
        return missing_packages(self.name) if self.name in PEERS else []

    def ways(self) -> list[str]:
        """As `layout | order | workers`."""
        if self.name not in PEERS:
            return [" | own | threads"]
        return [
            f"{layout} | {order} | {workers}"
            for layout, orders in format_class(self.name).layouts.items()
            for order in orders
            for workers in ("threads", "processes")
        ]

    def format(self, layout: str) -> Any:
        folder = self.folder / (layout or "files").replace(" ", "-")
        return format_class(self.name)(self.samples, self.cache, folder, layout, self.images != "none")

    def write(self) -> dict[str, Any]:
        """Make the files of every layout once; contestants that share a folder find them there."""
        if self.name not in PEERS:
            return {}
        for layout in format_class(self.name).layouts:
            made = self.format(layout)
            if not made.folder.exists():
                made.folder.mkdir(parents=True)
                made.write()
        for file in files_below([self.folder]):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return {"checks": format_class(self.name).checks}

    def paths(self, way: str) -> list[Path]:
        if self.name in PEERS:
            return self.format(way.split(" | ", maxsplit=1)[0].strip()).paths()
        parts = ["codes", "images", "commits"] if self.images != "none" else ["codes", "commits"]
        return [self.cache / part for part in parts]

    def batches(self, way: str, repeats: int, seed: int = 0) -> Iterator[Any]:
        if self.name in PEERS:
            from loader_engines import Reader

            layout, order, workers = (part.strip() for part in way.split(" | "))
            return Reader(self.format(layout), order, workers, self.cores, repeats, seed).batches()
        import loader_ours

        if self.name == OURS:
            return loader_ours.our_batches(self.cache, self.images, self.cores, repeats, seed)
        references = loader_ours.WARM[self.images] | loader_ours.COLD[self.images]
        return references[self.name](self.cache, self.samples, self.cores, repeats)

    def check(self, way: str) -> dict[str, Any]:
        """One epoch: every sample once, shuffled, and each exactly what went in. Returns memory and bytes on disk."""
        if self.name not in PEERS and self.name != OURS:
            return {}
        served: list[int] = []
        with peak_memory() as memory:
            stream = self.batches(way, 1)
            assert next(stream) is None
            for batch in stream:
                numbers = np.asarray(batch.numbers)
                codes = np.asarray(batch.codes)
                assert codes.flags.c_contiguous, "not contiguous"
                assert codes.dtype == np.int8, codes.dtype
                for row, number in enumerate(numbers.tolist()):
                    assert np.array_equal(codes[row], self.samples.codes[number]), f"other codes for sample {number}"
                    if self.images == "encoded":
                        assert batch.jpeg(row) == self.samples.jpeg(number), f"another JPEG for sample {number}"
                served += numbers.tolist()
        assert sorted(served) == list(range(len(self.samples))), f"{len(served)} samples, {len(set(served))} different"
        near = np.abs(np.diff(served)) <= 1
        assert near.mean() < 0.5, "hardly shuffled"
        size = sum(os.path.getsize(file) for file in files_below(self.paths(way)))
        return {"bytes": size / len(served), **memory}

    def warm(self, way: str, seconds: float) -> dict[str, Any]:
        """Samples and processor seconds a second of an endless stream, once it flows."""
        warm_up_files(self.paths(way))
        stream = self.batches(way, ENDLESS)
        assert next(stream) is None
        next(stream)
        _take(stream, min(1.0, seconds / 2))
        cpu = cpu_seconds()
        samples, wall = _take(stream, seconds)
        cpu = cpu_seconds() - cpu
        stream.close()  # type: ignore[attr-defined]
        return {"speed": samples / wall, "cpu": cpu / samples}

    def cold(self, way: str, seconds: float, seed: int) -> dict[str, Any]:
        """The same for whole epochs that begin with nothing in the page cache, the last one cut off."""
        samples, wall, cpu, resident = 0, 0.0, 0.0, 0.0
        files = files_below(self.paths(way))
        for epoch in itertools.count():
            stream = self.batches(way, 1, seed + epoch)
            assert next(stream) is None
            gc.collect()  # whatever still maps the files
            left = drop(files)
            if left > 0.01 and epoch == 0:
                raise RuntimeError(STILL_CACHED.format(left))
            if left > 0.01:
                return {"speed": samples / wall, "cpu": cpu / samples, "resident": resident}
            resident = max(resident, left)
            before = cpu_seconds()
            taken, spent = _take(stream, seconds - wall)
            cpu += cpu_seconds() - before
            stream.close()  # type: ignore[attr-defined]
            samples, wall = samples + taken, wall + spent
            if wall >= seconds or epoch + 1 == COLD_EPOCHS:
                return {"speed": samples / wall, "cpu": cpu / samples, "resident": resident}
        raise AssertionError


def _take(stream: Iterator[Any], seconds: float) -> tuple[int, float]:
    """Samples served and seconds passed until `seconds` are over or the stream ends."""
    samples, started = 0, time.perf_counter()
    for batch in stream:
        samples += len(batch)
        if time.perf_counter() - started >= seconds:
            break
    return samples, time.perf_counter() - started


def main() -> None:
    # Libraries print; our answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contestant = Contestant(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        act: Callable[..., Any] = getattr(contestant, command.pop("do"))
        try:
            answer = {"answer": act(**command)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        print(json.dumps(answer), file=answers, flush=True)
    left = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    if left:
        os._exit(0)  # a library's thread would keep the process


if __name__ == "__main__":
    main()
