"""What a cache holds, told from its head, its manifest and the sizes of its files; no codes are read.

A million samples are columns of numbers here: only the keys that are shown become Python objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sami_cache.errors import DamageError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK, samples_table
from sami_cache.store.files import ASIDE, as_damage, sizes_below
from sami_cache.store.head import HEAD
from sami_cache.store.places import AnyPath

COLUMNS = ["key", "status", "error", "energy", "clipped"]
WORST = 5
LISTED = 1000
"""Failed samples that are listed one by one; the others are counted."""
REASONS = 20
EXAMPLES = 3
RECORDS = 256
"""Commit records that are read of a cache without a manifest, spread evenly over those that are there."""
BINS = 60
# A channel that is constant over the fitting sample stands in no stored direction; float32 leaves a trace of 1e-7.
DEAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was recorded of samples: all of a sealed cache, else those of the records read."""

    numbers: np.ndarray
    """int64 [n], the sample of each row below."""
    keys: pa.ChunkedArray
    status: pa.ChunkedArray
    good: np.ndarray
    """int64 [m], the rows whose samples have an embedding; the next three are of these."""
    error: np.ndarray
    energy: np.ndarray
    clipped: np.ndarray
    records: int | None
    """Commit records read, None where the manifest was."""

    def keys_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        return self.keys.take(pa.array(rows, pa.int64())).to_pylist()


def inspect_cache(path: AnyPath) -> dict[str, Any]:
    """A summary of the cache at `path`, ready for JSON. Raises SamiCacheError where there is none, DamageError if damaged."""
    cache = Cache(path)
    return summarise(cache, measure(cache))


def measure(cache: Cache) -> Measured:
    """The recorded columns: of the manifest, or without one of up to RECORDS commit records. Raises DamageError."""
    root = cache.root()
    if root is not None:
        table, numbers, records, place = cache.manifest(root, COLUMNS), np.arange(cache.samples), None, "manifest.parquet"
    else:
        committed = cache.committed()
        chosen = [committed[i] for i in np.linspace(0, len(committed) - 1, min(RECORDS, len(committed))).round().astype(int)]
        tables = [samples_table(cache._read_record(shard)).select(COLUMNS) for shard in chosen]
        table = pa.concat_tables(tables) if tables else pa.table({name: [] for name in COLUMNS})
        numbers = np.concatenate([np.arange(0), *(np.array(cache.shard_samples(shard)) for shard in chosen)])
        records, place = len(chosen), "commits"
    good = _equal(table["status"], OK)
    usable = table.select(COLUMNS[2:]).filter(pa.array(good))
    error, energy, clipped = (usable[name].to_numpy().astype(np.float64) for name in COLUMNS[2:])
    if not all(np.isfinite(values).all() and (values >= 0).all() for values in (error, energy, clipped)):
        raise DamageError(f"{cache.path / place}: a sample is `ok` and has no error, energy or number of clipped codes")
    return Measured(
        numbers=numbers,
        keys=table["key"],
        status=table["status"],
        good=np.flatnonzero(good),
        error=error,
        energy=energy,
        clipped=clipped.astype(np.int64),
        records=records,
    )


def summarise(cache: Cache, measured: Measured) -> dict[str, Any]:
    """What `sami-cache inspect` tells, ready for JSON."""
    root, committed = cache.root(), cache.committed()
    samples = sum(len(cache.shard_samples(shard)) for shard in committed)
    failed = np.setdiff1d(np.arange(len(measured.numbers)), measured.good, assume_unique=True)
    return {
        "cache": str(cache.path),
        "cache_id": cache.cache_id,
        "sealed": root is not None,
        "root": root and root["root"],
        "content_root": root and root["content_root"],
        "identity": cache.identity,
        "provenance": cache.attributes.get("provenance"),
        "samples": cache.samples,
        "committed": samples,
        "read": {"samples": len(measured.numbers), "records": measured.records, "of_records": len(committed)},
        "usable": len(measured.good),
        "failed": len(failed),
        "failures": _labels(
            cache, measured, failed[:LISTED], "reason", measured.status.take(pa.array(failed[:LISTED])).to_pylist()
        ),
        "failures_left_out": max(0, len(failed) - LISTED),
        **_reasons(measured, failed),
        "shards": cache.shards,
        "shard_samples": cache.layout.shard_samples,
        "chunk_samples": cache.layout.chunk_samples,
        "codes": _codes(cache),
        "bytes": _bytes(cache, committed, samples * len(measured.good) / max(1, len(measured.numbers))),
        "error": {"asked": cache.codec.error, **_errors(cache, measured)},
        "clipped": _clipped(cache, measured),
        "spectrum": _spectrum(cache),
    }


def _labels(cache: Cache, measured: Measured, rows: np.ndarray, name: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """One dict a row: its sample, key, view if there are any, and `name` with its value."""
    numbers = measured.numbers[rows].tolist()
    return [
        {"sample": number, "key": key, **({"view": number % cache.views} if cache.views else {}), name: value}
        for number, key, value in zip(numbers, measured.keys_of(rows), values, strict=True)
    ]


def _equal(texts: pa.ChunkedArray, text: str) -> np.ndarray:
    # Not by pyarrow.compute: its threads, with torch's in the process, can end it by SIGABRT. A part at a time, as objects.
    parts = (np.asarray(part.to_numpy(zero_copy_only=False) == text) for part in texts.chunks)
    return np.concatenate([np.zeros(0, bool), *parts])


def _reasons(measured: Measured, failed: np.ndarray) -> dict[str, Any]:
    """Why samples have no embedding: the REASONS most frequent reasons with a few keys each, and how many others there are."""
    texts = measured.status.take(pa.array(failed, pa.int64()))
    counted = texts.value_counts()
    names, counts = counted.field("values"), counted.field("counts").to_numpy()
    order = np.argsort(-counts, kind="stable")[:REASONS]
    reasons = []
    for reason, count in zip(names.take(pa.array(order)).to_pylist(), counts[order].tolist(), strict=True):
        rows = failed[np.flatnonzero(_equal(texts, reason))[:EXAMPLES]]
        reasons.append({"reason": reason, "count": count, "keys": measured.keys_of(rows)})
    return {"failure_reasons": reasons, "failure_reasons_left_out": len(counts) - len(reasons)}


def _codes(cache: Cache) -> dict[str, Any]:
    """What is stored of an embedding: coefficients, by direction and by vertical and horizontal frequency in a block."""
    codec = cache.codec
    return {
        "dtype": codec.dtype,
        "channels": codec.channels,
        "grid": cache.grid,
        "block": codec.block,
        "coefficients": codec.channels * codec.block**2,
        "kept": len(np.unique(codec.index)),
        "rows": codec.kept,
    }


def _bytes(cache: Cache, committed: list[int], usable: float) -> dict[str, Any]:
    """Sizes of files by what they hold, in all and for each of `usable` samples."""
    there = {name: size for name, size in sizes_below(cache.path).items() if not name.startswith(ASIDE)}
    parts, missing = {"codes": 0, "images": 0}, 0
    for shard in committed:  # what lies there without a record is no data
        for name in cache.shard_files(shard):
            missing += name not in there
            parts[name.partition("/")[0]] += there.get(name, 0)
    seals = sum(there.get(name, 0) for name in ("manifest.parquet", "ROOT.json"))
    records = sum(size for name, size in there.items() if name.startswith("commits/")) + seals
    total = sum(there.values())
    float16 = 2 * cache.attributes["codec"]["channels"] * cache.grid**2
    count = usable or np.nan
    each = {
        "per_sample": total / count,
        "codes_per_sample": parts["codes"] / count,
        "jpeg_per_sample": parts["images"] / count,
        "records_per_sample": records / count,
        "bits_per_value": 8 * parts["codes"] / count / (float16 / 2),
    }
    return {
        "total": total,
        "codes": parts["codes"],
        "jpeg": parts["images"],
        "records": records,
        "other": total - parts["codes"] - parts["images"] - records,
        "missing_files": missing,
        **{name: value if usable else None for name, value in each.items()},
        "float16_per_sample": float16,
        "float16_to_codes": float16 * usable / parts["codes"] if parts["codes"] and usable else None,
        "codes_to_jpeg": parts["codes"] / parts["images"] if parts["images"] else None,
    }


def _errors(cache: Cache, measured: Measured) -> dict[str, Any]:
    """The codec's relative squared error: of the set, over samples, and as a histogram with bins of equal ratio."""
    error, energy = measured.error, measured.energy
    if not len(error):
        return {"overall": None, "median": None, "p99": None, "max": None, "worst": [], "histogram": None}
    worst = np.argsort(-error, kind="stable")[:WORST]
    floor = max(float(error.max()) * 1e-9, 1e-300)  # an error of 0 has no logarithm
    edges = np.geomspace(max(float(error.min()), floor) * 0.999, max(float(error.max()), floor) * 1.001, BINS + 1)
    return {
        "overall": float((error * energy).sum() / max(energy.sum(), np.finfo(float).tiny)),
        "median": float(np.median(error)),
        "p99": float(np.quantile(error, 0.99)),
        "max": float(error.max()),
        "worst": _labels(cache, measured, measured.good[worst], "error", error[worst].tolist()),
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(np.maximum(error, edges[0]), edges)[0].tolist()},
    }


def _clipped(cache: Cache, measured: Measured) -> dict[str, Any]:
    """Saturation: coefficients at the end of their range, whose true value may lie beyond."""
    clipped = measured.clipped
    worst = np.argsort(-clipped, kind="stable")[:WORST]
    worst = worst[clipped[worst] > 0]
    codes = _codes(cache)
    values = len(clipped) * codes["kept"] * (codes["grid"] // codes["block"]) ** 2
    return {
        "possible": cache.layout.stored_dtype.kind == "i",
        "codes": int(clipped.sum()),
        "share": float(clipped.sum() / max(1, values)),
        "samples": int(np.count_nonzero(clipped)),
        "worst": _labels(cache, measured, measured.good[worst], "codes", clipped[worst].tolist()),
    }


def _spectrum(cache: Cache) -> dict[str, Any]:
    """How the variance is spread over principal directions, and what the codes leave out; None where the codec does not tell.

    `noise`: the mean squared error of rounding to the finest step, step^2 / 12. (A coefficient too wide for one code has
    coarser steps beside its finest one.)
    """
    codec, held = cache.codec, {}
    with as_damage(cache.path / HEAD, "the codec's spectrum"):
        spectrum = np.array(codec.spectrum, dtype=np.float64).reshape(len(codec.spectrum))
    for share in (90, 99):
        known = len(spectrum) and spectrum.sum() > 0
        held[f"directions_for_{share}"] = (
            int(np.searchsorted(np.cumsum(spectrum) / spectrum.sum(), share / 100) + 1) if known else None
        )
    dead = None
    if codec.name == "pca":
        dead = np.flatnonzero(np.square(codec.basis, dtype=np.float64).sum(0) < DEAD)
    elif codec.name == "int8":  # the step follows the largest magnitude, and is exactly 1 where there is none
        dead = np.flatnonzero((codec.step == 1) | (codec.step < 1e-6 * np.where(codec.step == 1, 0, codec.step).max()))
    return {
        "variance": spectrum.tolist(),
        **held,
        "noise": float(codec.step.min()) ** 2 / 12 if codec.name != "float16" else None,
        "dead_channels": None if dead is None else dead.tolist(),
    }
