"""How fast `verify` reads, against `cat` on the same files, and what a commit costs against computing the shard.

    python benchmarks/verify.py [--shards 96] [--folder DIR]

Reading: a cache of full-size shards (512 samples with a JPEG each) is verified and catted in turn, warm (read once before) and,
where the script may drop the page cache (root on Linux), cold; the ratio of each pair counts. Committing: `write_shard` of one
shard (encode, compress, publish, read back, record) against the teacher's time for the same images: EfficientNet-Lite0 at 512,
the smallest teacher there is here, and SAM's ViT-B at 1024 (random weights take as long).
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sami_cache.models.teachers import load_teacher
from sami_cache.processes import keep_freed_memory
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import Sample
from sami_cache.store.creation import create_cache
from sami_cache.store.fitting import fit_codec
from sami_cache.store.integrity import verify_cache
from sami_cache.store.writing import seal_cache, write_shard

SAMPLES, CHANNELS, GRID = 512, 64, 32
ROUNDS = 7


def make_cache(path: Path, shards: int) -> tuple[Cache, list[float]]:
    """A cache whose files have the sizes of real ones, of smooth correlated noise; and the seconds of each commit."""
    rng = np.random.default_rng(0)
    mixing = (rng.normal(size=(CHANNELS, CHANNELS)) * 0.93 ** np.arange(CHANNELS)).astype(np.float32)
    noise = rng.normal(size=(SAMPLES, CHANNELS, GRID, GRID)).astype(np.float32)
    embeddings = np.einsum("ij,njyx->niyx", mixing, noise + np.roll(noise, 1, 2) + np.roll(noise, 1, 3), optimize=True)
    codec = fit_codec("pca", embeddings[:64])
    keys = [f"n{index // 1300:08d}/n{index // 1300:08d}_{index}.JPEG" for index in range(SAMPLES * shards)]
    identity = {"grid": GRID, "view": {"mode": "dense"}, "images": {"short_side": 256, "quality": 90}, "codec": {}}
    cache = create_cache(
        path,
        identity=identity,
        codec=codec,
        layout=choose_layout(codec, GRID, len(keys), SAMPLES),
        keys=keys,
        labels=[None] * len(keys),
        class_names=None,
        provenance={},
    )
    seconds: list[float] = []
    for shard in range(shards):
        numbers = cache.shard_samples(shard)
        samples = [Sample(key=keys[number], source=f"{number:064x}", width=500, height=375) for number in numbers]
        jpegs = [rng.bytes(29_000) for _ in numbers]
        started = time.perf_counter()
        write_shard(cache, shard, embeddings, samples, jpegs)
        seconds.append(time.perf_counter() - started)
    seal_cache(cache)
    return cache, seconds


def files_of(cache: Cache) -> list[str]:
    return sorted(str(path) for path in cache.path.rglob("*") if path.is_file())


def drop_page_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def timed(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(cache: Cache, cold: bool) -> None:
    files = files_of(cache)
    size = sum(os.path.getsize(file) for file in files)

    def cat() -> None:
        with open(os.devnull, "wb") as nowhere:
            subprocess.run(["cat", *files], stdout=nowhere, check=True)

    def verify() -> None:
        assert verify_cache(cache.path).clean

    seconds: dict[str, list[float]] = {"cat": [], "verify": []}
    for number in range(ROUNDS):
        for name, run in (("cat", cat), ("verify", verify))[:: 1 if number % 2 else -1]:
            if cold and not drop_page_cache():
                print("| cold | not measured: the page cache cannot be dropped here | | |")
                return
            if not cold:
                cat()
            seconds[name].append(timed(run))
    best = {name: size / min(values) / 1e9 for name, values in seconds.items()}
    ratio = statistics.median(cat / verify for cat, verify in zip(seconds["cat"], seconds["verify"], strict=True))
    print(f"| {'cold' if cold else 'warm'} | {best['cat']:.2f} GB/s | {best['verify']:.2f} GB/s | {ratio:.0%} |", flush=True)


def teacher_seconds(name: str, size: int, batch: int, weights: str | None = None) -> float:
    """Seconds of the teacher for one image, the best of a few batches."""
    keep_freed_memory()
    teacher = load_teacher(name, weights=weights, image_size=size, grid=GRID)
    pixels = torch.zeros(batch, 3, size, size)
    with torch.inference_mode():
        return min(timed(lambda: teacher(pixels)) for _ in range(4)) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=96)
    parser.add_argument("--folder", type=Path, default=None, help="where the cache is made; default: the temporary folder")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        cache, commit_seconds = make_cache(folder / "cache.zarr", given.shards)
        size = sum(os.path.getsize(file) for file in files_of(cache))
        print(
            f"{os.cpu_count()} cores, {platform.machine()}; {given.shards} shards of {SAMPLES} samples, {size / 1e6:.0f} MB\n"
        )
        print("| page cache | `cat` | `verify` | verify / cat (median of pairs) |\n|---|---|---|---|")
        compare(cache, cold=False)
        compare(cache, cold=True)
        commit = statistics.median(commit_seconds)
        print(f"\nA shard of {SAMPLES} samples is committed in {commit:.2f} s.\n")
        print("| teacher | computes it in | share |\n|---|---|---|")
        for name, image_size, batch, weights in (("efficientnet_lite0", 512, 8, None), ("vit_b", 1024, 1, "random")):
            seconds = teacher_seconds(name, image_size, batch, weights) * SAMPLES
            print(f"| {name} at {image_size} | {seconds:.0f} s | {commit / seconds:.2%} |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
