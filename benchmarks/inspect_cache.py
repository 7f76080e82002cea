"""What `inspect` costs on a big cache: seconds and peak memory, each in a process of its own.

    python benchmarks/inspect_cache.py [--samples 1000000] [--folder DIR]

The cache is written by the writers themselves, but for its shards: one shard's codes and images are written and linked to
every other shard's names, and the records name them; keys, digests and errors differ. Head, records and manifest are those
of a real cache of that size, and any sample can be decoded. `verify --help` shows what the interpreter alone costs.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import Sample, record_bytes
from sami_cache.store.creation import create_cache
from sami_cache.store.fitting import fit_codec
from sami_cache.store.writing import seal_cache, write_shard

SHARD, CHANNELS, GRID = 512, 64, 8
MEASURED = (
    "import resource, subprocess, sys, time; started = time.perf_counter();"
    "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode;"
    "print(code, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def make_cache(path: Path, samples: int) -> Cache:
    """A cache of `samples` samples that are not sealed yet: full-size records, small codes."""
    rng = np.random.default_rng(0)
    mixing = (rng.normal(size=(CHANNELS, CHANNELS)) * 0.93 ** np.arange(CHANNELS)).astype(np.float32)
    embeddings = np.einsum("ij,njyx->niyx", mixing, rng.normal(size=(SHARD, CHANNELS, GRID, GRID)).astype(np.float32))
    codec = fit_codec("pca", embeddings[:64])
    keys = [f"n{index // 1300:08d}/n{index // 1300:08d}_{index}.JPEG" for index in range(samples)]
    cache = create_cache(
        path,
        identity={"grid": GRID, "view": {"mode": "dense"}, "images": {"short_side": 256, "quality": 90}, "codec": {}},
        codec=codec,
        layout=choose_layout(codec, GRID, samples, SHARD),
        keys=keys,
        labels=[index // 1300 for index in range(samples)],
        class_names=None,
        provenance={},
    )
    sink = BytesIO()
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).resize((256, 256)).save(sink, "JPEG")
    rows = [Sample(key=key, source=f"{index:064x}", width=500, height=375) for index, key in enumerate(keys[:SHARD])]
    first = write_shard(cache, 0, embeddings, rows, [sink.getvalue()] * SHARD).record
    for shard in range(1, samples // SHARD):
        names = dict(zip(cache.shard_files(0), cache.shard_files(shard), strict=True))
        for old, new in names.items():
            os.link(cache.path / old, cache.path / new)
        factors, digests = rng.lognormal(0, 0.3, SHARD).tolist(), rng.bytes(32 * SHARD).hex()
        changed = [
            replace(
                sample,
                key=keys[shard * SHARD + index],
                source=digests[64 * index : 64 * index + 64],
                error=float(f"{(sample.error or 0) * factors[index]:.6g}"),
            )
            for index, sample in enumerate(first.samples)
        ]
        files = {new: first.files[old] for old, new in names.items()}
        record = replace(first, shard=shard, files=files, samples=changed)
        cache.record_path(shard).write_bytes(record_bytes(record))
    return cache


def cost(name: str, *arguments: str) -> None:
    """Run the command line and print a row of the table."""
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", "cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, seconds, peak = done.stdout.split()
    assert code == "0", done.stderr
    print(f"| {name} | {float(seconds):.1f} s | {int(peak) / 1024:.0f} MiB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where the cache is made; default: the temporary folder")
    given = parser.parse_args()
    samples = given.samples // SHARD * SHARD
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        started = time.perf_counter()
        cache = make_cache(folder / "cache.zarr", samples)
        path = str(cache.path)
        print(
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; {samples} samples in ", end=""
        )
        print(f"{cache.shards} shards, records made in {time.perf_counter() - started:.0f} s\n")
        print("| command | time | peak memory |\n|---|---|---|")
        cost("`verify --help` (the interpreter alone)", "verify", "--help")
        cost("`inspect`, not sealed yet", "inspect", path)
        started = time.perf_counter()
        seal_cache(cache)
        sealed = time.perf_counter() - started
        cost("`inspect`", "inspect", path)
        cost("`inspect --json`", "inspect", path, "--json")
        cost("`inspect --report FILE.html --no-teacher`", "inspect", path, "--report", f"{folder}/x.html", "--no-teacher")
        size = os.path.getsize(cache.path / "manifest.parquet")
        print(f"\nmanifest.parquet: {size / 1e6:.0f} MB, sealed in {sealed:.0f} s.")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
