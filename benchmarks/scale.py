"""What grows with the number of samples: seconds and peak memory of every stage, each in a process of its own.

    python benchmarks/scale.py [--samples 10000 100000 1280000] [--folder DIR] [--out FILE]

A cache of so many samples is made by the writers themselves: every shard is encoded, published, read back and committed, codes
(8 channels, 4 x 4) and JPEGs (8 x 8 pixels) being small, so that what costs is what there is of every sample and every
file. Shards hold 512 samples. Keys are as long as ImageNet's, and in an order as good as random, as a folder's images are
stored: what is listed of them compresses no better than theirs. Peak memory is `ru_maxrss` of the process that ran the stage,
interpreter and imports counted; in the seconds they are not. What can be repeated and takes less than ten seconds is run three
times, and the run that computed least is taken: on a shared machine it was disturbed least.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from sami_cache.order import Course, deal, epoch_order
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import Sample
from sami_cache.store.creation import create_cache
from sami_cache.store.files import digest
from sami_cache.store.fitting import fit_codec
from sami_cache.store.integrity import verify_cache
from sami_cache.store.writing import Commit, seal_cache, write_shard

CHANNELS, GRID, SHARD = 8, 4, 512
BATCH, BATCHES = 64, 1000


def image_of(number: int) -> int:
    """Which image is stored at a place: a permutation of the first 16.9 million numbers, far from its neighbours' images."""
    return number * 6_119_531 % 16_900_000


def label_of(number: int) -> int:
    return image_of(number) // 1300


def key_of(number: int) -> str:
    """As long as ImageNet's."""
    return f"n{label_of(number):08d}/n{label_of(number):08d}_{image_of(number) % 1300}.JPEG"


def embeddings_of(shard: int, count: int) -> np.ndarray:
    """float32 [count, 8, 4, 4]: noise with correlated channels, another for every shard."""
    rng = np.random.default_rng([1, shard])
    mixing = (np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS)) * 0.8 ** np.arange(CHANNELS)).astype(np.float32)
    return np.einsum("ij,njyx->niyx", mixing, rng.standard_normal((count, CHANNELS, GRID, GRID), np.float32))


def small_jpeg() -> bytes:
    sink = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(sink, "JPEG", quality=50)
    return sink.getvalue()


def fill_shard(cache: Cache, shard: int, jpeg: bytes) -> Commit:
    """Commit a shard of synthetic embeddings, the same for every run."""
    numbers = cache.shard_samples(shard)
    # Digests that do not compress, and JPEGs that differ behind their end: what is recorded of a sample has its full size.
    jpegs = [jpeg + number.to_bytes(8, "little") for number in numbers]
    rows = [
        Sample(key=key_of(number), label=label_of(number), source=digest(data), width=500, height=375)
        for number, data in zip(numbers, jpegs, strict=True)
    ]
    return write_shard(cache, shard, embeddings_of(shard, len(numbers)), rows, jpegs)


def make_empty(path: Path, samples: int, shard_samples: int = SHARD) -> Cache:
    """A cache without a shard."""
    codec = fit_codec("pca", embeddings_of(0, 256), error=0.01)
    return create_cache(
        path,
        identity={"grid": GRID, "view": {"mode": "dense"}, "images": {"short_side": 8, "quality": 50}, "codec": {}},
        codec=codec,
        layout=choose_layout(codec, GRID, samples, shard_samples),
        keys=[key_of(index) for index in range(samples)],
        labels=[label_of(index) for index in range(samples)],
        class_names=None,
        provenance={},
    )


def create(path: Path, samples: int) -> str:
    cache = make_empty(path, samples)
    return f"{cache.shards} shards, listing.parquet {os.path.getsize(path / 'listing.parquet') / samples:.1f} bytes a sample"


def write(path: Path, samples: int) -> str:
    cache, jpeg = Cache(path), small_jpeg()
    for shard in range(cache.shards):
        fill_shard(cache, shard, jpeg)
    records = sum(entry.stat().st_size for entry in os.scandir(path / "commits"))
    return f"records {records / samples:.0f} bytes a sample"


def resume(path: Path, samples: int) -> str:
    cache = Cache(path)
    committed = set(cache.committed())
    return f"{sum(shard not in committed for shard in range(cache.shards))} shards missing"


def records(path: Path, samples: int) -> str:
    return f"{sum(len(record.samples) for record in Cache(path).records())} samples read"


def seal(path: Path, samples: int) -> str:
    seal_cache(Cache(path))
    return f"manifest.parquet {os.path.getsize(path / 'manifest.parquet') / samples:.1f} bytes a sample"


def opened(path: Path, samples: int) -> str:
    return f"{Cache(path).shards} shards"


def listing(path: Path, samples: int) -> str:
    return f"{len(Cache(path).listing)} images"


def table(path: Path, samples: int) -> str:
    return f"{Cache(path).table().nbytes / samples:.0f} bytes a sample as Arrow columns"


def inspect(path: Path, samples: int) -> str:
    from pipelines.inspect import inspect_cache

    inspect_cache(path)
    return ""


def verify(level: str) -> Callable[[Path, int], str]:
    def run(path: Path, samples: int) -> str:
        report = verify_cache(path, level=level)
        assert report.clean, report.findings
        return f"{report.bytes_read / 1e6:.0f} MB read"

    return run


def order(path: Path, samples: int) -> str:
    """What the loader's planner does for an epoch."""
    dealt = deal(epoch_order(np.ones(samples, bool), SHARD, seed=0, epoch=0, open_shards=8), 4 * BATCH, 0, 1)
    return f"{len(Course(0, dealt.ravel(), BATCH, 64, 512))} batches planned"


def samples_of(path: Path, samples: int) -> str:
    from sami_cache.samples import CacheSamples

    return f"{len(CacheSamples(Cache(path)).keys)} keys"


def batches(path: Path, samples: int) -> str:
    from sami_cache.loader import Loader, LoaderConfig
    from sami_cache.samples import CacheSamples

    source = CacheSamples(Cache(path))
    started = time.perf_counter()
    loader = Loader(source, source.usable, LoaderConfig(batch_size=BATCH, images="encoded", threads=2))
    times = [time.perf_counter() - started for _ in islice(loader.batches(), BATCHES)]
    return f"the first after {times[0]:.2f} s, then {(BATCHES - 1) * BATCH / (times[-1] - times[0]):.0f} samples/s"


def imports(path: Path, samples: int) -> str:
    return ""


STAGES: dict[str, tuple[str, Callable[[Path, int], str]]] = {
    "imports": ("nothing: the interpreter and what it imports", imports),
    "create": ("create (`create_cache`, codec fitted)", create),
    "write": ("write (`write_shard`, all shards)", write),
    "resume": ("open and see that nothing is missing (`committed`)", resume),
    "records": ("read all records, one at a time", records),
    "seal": ("seal (`seal_cache`)", seal),
    "again": ("seal again: an extraction with nothing to do", seal),
    "open": ("open (`Cache(path)`)", opened),
    "listing": ("list the images (`Cache.listing`)", listing),
    "table": ("list the samples (`Cache.table`)", table),
    "inspect": ("`inspect`", inspect),
    "quick": ("`verify --quick`", verify("quick")),
    "verify": ("`verify`", verify("default")),
    "deep": ("`verify --deep`", verify("deep")),
    "order": ("shuffle: one epoch's order and course", order),
    "torch": ("nothing, with the loader's imports", imports),
    "samples": ("the loader's table (`CacheSamples`)", samples_of),
    "batches": (f"the same, and the first {BATCHES:,} batches of {BATCH}, codes and JPEGs", batches),
}
ONCE, ROUNDS = ("create", "write", "seal"), 3
_LOADER = ("sami_cache.loader", "sami_cache.samples")
IMPORTS = {"inspect": ("pipelines.inspect",), "torch": _LOADER, "samples": _LOADER, "batches": _LOADER}
"""What a stage needs beyond what this file imports; torch alone is half a gigabyte that the other stages do not have."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one stage at one size."""

    seconds: float
    user: float
    """Seconds that all threads of the process computed: what other work on the machine stretches little."""
    system: float
    """Seconds that the system worked for it: above all files, and memory that is handed out, page by page cleared."""
    peak: int
    """Bytes of resident memory at most."""
    note: str


def run_stage(name: str, path: Path, samples: int) -> Cost:
    """Run a stage in this process."""
    for module in IMPORTS.get(name, ()):
        import_module(module)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    note = STAGES[name][1](path, samples)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Cost(seconds=seconds, user=user, system=system, peak=after.ru_maxrss * 1024, note=note)


def measure(name: str, path: Path, samples: int) -> Cost:
    """Run a stage in a fresh process, up to ROUNDS times."""
    command = [sys.executable, __file__, "--stage", name, "--folder", str(path), "--samples", str(samples)]
    costs: list[Cost] = []
    while not costs or (name not in ONCE and len(costs) < ROUNDS and costs[0].seconds < 10):
        costs.append(Cost(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)))
    cost = min(costs, key=lambda cost: cost.user + cost.system)
    times = f"{cost.seconds:8.2f} s, computing {cost.user:.2f}, system {cost.system:.2f}"
    print(f"{samples:>9} {name:8} {times}, {cost.peak / 2**20:6.0f} MiB  {cost.note}", file=sys.stderr, flush=True)
    return cost


def measure_size(folder: Path, samples: int) -> dict[str, Cost]:
    """All stages on a cache of so many samples, which is deleted afterwards."""
    path = folder / f"{samples}.zarr"
    try:
        return {name: measure(name, path, samples) for name in STAGES}
    finally:
        shutil.rmtree(path, ignore_errors=True)


def exponent(small: float, large: float, factor: float) -> float:
    """p where the cost grew like samples^p."""
    return math.log(large / small) / math.log(factor)


def report(costs: dict[int, dict[str, Cost]]) -> list[str]:
    """Lines of Markdown: a row a stage, seconds and peak of every size, and how both grew."""
    sizes = sorted(costs)
    steps = list(pairwise(sizes))
    head = ["", *(f"{size:,}" for size in sizes), *(f"exponent, {a:,} to {b:,}" for a, b in steps), "memory a sample"]
    lines = [head, ["---"] * len(head)]
    for name, (title, _) in STAGES.items():
        cells = [costs[size][name] for size in sizes]
        row = [title]
        for cost in cells:
            row.append(f"{cost.seconds:.3g} s ({cost.user:.3g} + {cost.system:.3g}), {cost.peak / 2**20:.0f} MiB")
        # Under a twentieth of a second it is the clock and the interpreter that are compared.
        pairs = list(pairwise(cells))
        for (a, b), (small, large) in zip(steps, pairs, strict=True):
            parts = ((small.seconds, large.seconds), (small.user, large.user))
            row.append(" / ".join(f"{exponent(*part, b / a):.2f}" for part in parts if part[0] > 0.002 and part[1] > 0.05))
        growth = (cells[-1].peak - cells[0].peak) / (sizes[-1] - sizes[0]) if steps else 0
        lines.append([*row, f"{max(0.0, growth):.0f} B" if steps else ""])
    notes = [f"- {title}: {costs[sizes[-1]][name].note}" for name, (title, _) in STAGES.items() if costs[sizes[-1]][name].note]
    return [*("| " + " | ".join(line) + " |" for line in lines), "", f"What they say at {sizes[-1]:,}:", "", *notes]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_280_000])
    parser.add_argument("--folder", type=Path, default=None, help="where the caches are made; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # what a child is started with
    given = parser.parse_args(arguments)
    if given.stage:
        print(json.dumps(vars(run_stage(given.stage, given.folder, given.samples[0]))))
        return
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    started, load = time.monotonic(), os.getloadavg()[0]
    try:
        costs = {size: measure_size(folder, size) for size in sorted(given.samples)}
    finally:
        shutil.rmtree(folder)
    sizes = " ".join(map(str, given.samples))
    text = "\n".join(
        [
            "# What grows with the number of samples",
            "",
            f"Command: `python benchmarks/scale.py --samples {sizes}`. Hardware: {os.cpu_count()} cores, {platform.machine()}, "
            f"Python {platform.python_version()}; load {load:.1f} to {os.getloadavg()[0]:.1f}, this one's own counted. Date: "
            f"{time.strftime('%Y%m%d')}. Duration: {time.monotonic() - started:.0f} s.",
            "",
            f"Caches of {CHANNELS} channels, {GRID} x {GRID}, shards of {SHARD}, with JPEGs of {len(small_jpeg())} bytes. Each "
            "stage in a fresh process: seconds by the clock (seconds its threads computed + seconds the system worked for it) "
            "without interpreter and imports, peak resident memory with them. Files are warm in the page cache. Of what can be "
            "repeated and takes less than ten seconds, the least disturbed of three. Exponent p: time grew like samples^p, 1 "
            "being linear, by the clock / by what the threads computed, which other work on the machine stretches least. "
            "Memory a sample: what the peak grew by from the smallest cache to the largest, over the samples between.",
            "",
            *report(costs),
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
