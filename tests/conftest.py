"""Things several test files share: embeddings that behave like a teacher's, and a small cache made of them."""

import inspect
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from children import make_spawn

from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import Sample
from sami_cache.store.creation import create_cache
from sami_cache.store.files import canonical_json, seal
from sami_cache.store.fitting import fit_codec
from sami_cache.store.writing import seal_cache, write_shard


def teacher_like(samples: int, channels: int = 24, grid: int = 8, seed: int = 0) -> np.ndarray:
    """float32 [samples, channels, grid, grid]: correlated channels of falling variance, smooth in space, far from zero mean."""
    rng = np.random.default_rng(12345)  # the teacher; `seed` chooses the images
    mixing = rng.normal(size=(channels, channels)) * (0.7 ** np.arange(channels))
    offset = rng.normal(size=channels) * 3
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(samples, channels, grid, grid))
    smooth = (noise + np.roll(noise, 1, 2) + np.roll(noise, 1, 3)) / np.sqrt(3)
    return (np.einsum("ij,njyx->niyx", mixing, smooth) + offset[:, None, None]).astype(np.float32)


def make_identity(**changes: object) -> dict:
    identity: dict = {
        "teacher": {"name": "synthetic", "weights_sha256": "0" * 64},
        "precision": "float32",
        "grid": 8,
        "view": {"mode": "dense"},
        "codec": {"name": "pca", "error": 0.01},
        "images": {"short_side": 256, "quality": 90},
        "source_kind": "folder",
    }
    return identity | changes


def make_samples(keys: list[str], bad: tuple[int, ...] = ()) -> list[Sample]:
    return [
        Sample(
            key=key,
            label=index % 3,
            source=f"{index:064x}",
            width=None if index in bad else 40,
            height=None if index in bad else 30,
            status="truncated file" if index in bad else "ok",
        )
        for index, key in enumerate(keys)
    ]


def new_cache(
    path: Path,
    samples: int = 40,
    shard_samples: int = 16,
    codec: str = "pca",
    error: float = 0.01,
    chunk_samples: int | None = None,
    **changes: object,
) -> Cache:
    embeddings = teacher_like(samples)
    fitted = fit_codec(codec, embeddings, error=error)
    layout = choose_layout(fitted, 8, samples, shard_samples)
    keys = [f"class/{index:04d}.jpg" for index in range(samples)]
    return create_cache(
        path,
        identity=make_identity(codec={"name": codec, "error": fitted.error}, **changes),
        codec=fitted,
        layout=replace(layout, chunk_samples=chunk_samples or layout.chunk_samples),
        keys=keys,
        labels=[index % 3 for index in range(samples)],
        class_names=["a", "b", "c"],
        provenance={"note": "made by the tests"},
    )


def fill_shard(cache: Cache, shard: int, bad: tuple[int, ...] = ()):
    numbers = cache.shard_samples(shard)
    embeddings = teacher_like(cache.samples)[numbers.start : numbers.stop]
    keys = cache.listing["key"].to_pylist()[numbers.start : numbers.stop]
    jpegs = [None if index in bad else f"jpeg of {key}".encode() * 5 for index, key in enumerate(keys)]
    return write_shard(cache, shard, embeddings, make_samples(keys, bad), jpegs)


def full_cache(path: Path, **changes: object) -> Cache:
    cache = new_cache(path, **changes)  # type: ignore[arg-type]
    for shard in range(cache.shards):
        fill_shard(cache, shard, bad=(3,) if shard == 1 else ())
    seal_cache(cache)
    return cache


def embeddings_of(cache: Cache, shard: int) -> np.ndarray:
    numbers = cache.shard_samples(shard)
    return teacher_like(cache.samples)[numbers.start : numbers.stop]


def keys_of(cache: Cache, shard: int) -> list[str]:
    numbers = cache.shard_samples(shard)
    return cache.listing["key"].to_pylist()[numbers.start : numbers.stop]


def fill_all(cache: Cache) -> None:
    for shard in range(cache.shards):
        fill_shard(cache, shard)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def reseal_head(path: Path, **changes: object) -> None:
    """Write a head that is consistent with its own digest, whatever it says."""
    head = json.loads((path / "zarr.json").read_bytes())
    attributes = head["attributes"]["sami_cache"] | changes
    attributes = {name: value for name, value in attributes.items() if name != "blake3" and value is not ...}
    head["attributes"]["sami_cache"] = seal(attributes)
    (path / "zarr.json").write_bytes(canonical_json(head))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """40 samples in three sealed shards, one of them failed; 24 channels on an 8 x 8 grid."""
    return full_cache(tmp_path / "cache.zarr")


@pytest.fixture(scope="session")
def spawn():
    """Start the command line in a child process: `spawn("extract", "--teacher", ...)`."""
    return make_spawn()


@pytest.fixture
def campaign(request: pytest.FixtureRequest):
    """`campaign("bit-flips", seed=7, figures={"flips": 10000, ...})`: at full size, write the result to benchmarks/results/.

    Small versions of a campaign, which `make test` runs, write nothing.
    """
    started = time.monotonic()

    def publish(name: str, *, seed: int | str, figures: dict[str, object], notes: str = "") -> None:
        if request.node.get_closest_marker("slow") is None:
            return
        hardware = f"{os.cpu_count()}cpu-{platform.machine()}"
        today = time.strftime("%Y%m%d")
        rows = "\n".join(f"| {what} | {value} |" for what, value in figures.items())
        test = f"{request.path.relative_to(request.config.rootpath)}::{request.function.__name__}"
        text = (
            f"# Reliability: {name}\n\n{inspect.cleandoc(request.module.__doc__ or '')}\n\n"
            f"Command: `python -m pytest -m slow {test}`, seed {seed}. Hardware: {hardware}, {platform.system()} "
            f"{'.'.join(platform.release().split('.')[:2])}, Python {platform.python_version()}. "
            f"Duration: {time.monotonic() - started:.0f} s. Date: {today}.\n\n"
            f"| figure | value |\n|---|---|\n{rows}\n"
        )
        folder = request.config.rootpath / "benchmarks" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"reliability-{name}-{hardware}-{today}.md").write_text(text + (f"\n{notes}\n" if notes else ""))

    return publish
