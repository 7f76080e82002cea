"""Single flipped bits, spread evenly over everything a cache is made of.

Every flip must be found by `verify`, which names the flipped file and no other (each file is checked against a digest that
another file holds, so no flip can make a second file look wrong). Then the cache is read as training reads it: what comes
back is either a SamiCacheError or exactly the values that were committed.
"""

import json
import random
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from conftest import full_cache
from training_reads import outcome, training_read

from sami_cache.store.cache import Cache
from sami_cache.store.head import CODEC_ARRAYS
from sami_cache.store.integrity import verify_cache

SEED = 20240611
COUNTS = ("flips", "found", "right file named", "reads refused", "reads right", "reads wrong")
# What no training read looks at: the arrays' zarr.json and the spare copies, and of an image file all but the JPEGs.
UNREAD = ("array zarr.json", "image file: Arrow framing", "spare.tar")


def make_cache(path: Path) -> Path:
    return full_cache(path, chunk_samples=4).path


def strata(cache: Path) -> dict[str, dict[str, np.ndarray]]:
    """{stratum: {file: the offsets in it}}, over every byte of every file found in the cache."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for file in sorted(file for file in cache.rglob("*") if file.is_file()):
        name, size = str(file.relative_to(cache)), file.stat().st_size
        offsets = np.arange(size)
        if name.startswith("images/"):
            record = json.loads((cache / "commits" / file.with_suffix(".json").name).read_bytes())
            inside = np.zeros(size, bool)
            for start, length, _ in filter(None, record["samples"]["jpeg"]):
                inside[start : start + length] = True
            parts = {"image file: JPEG bytes": offsets[inside], "image file: Arrow framing": offsets[~inside]}
        elif name.startswith("codes/") and file.name != "zarr.json":
            border = size - Cache(cache).layout.index_bytes
            index = np.frombuffer(file.read_bytes()[border:-4], "<u8").reshape(-1, 2)
            ends = index[index[:, 1] <= size].sum(1).astype(int)  # absent chunks are 2^64 - 1 long
            checksums = np.concatenate([ends - 4, ends - 3, ends - 2, ends - 1])
            parts = {
                "codes: chunk data": np.setdiff1d(offsets[:border], checksums),
                "codes: chunk checksums": checksums,
                "codes: shard index": offsets[border:-4],
                "codes: index checksum": offsets[-4:],
            }
        elif file.name == "zarr.json":
            parts = {"head" if name == "zarr.json" else "array zarr.json": offsets}
        elif file.parent.name in CODEC_ARRAYS:
            parts = {"decoding arrays": offsets}
        else:
            parts = {"commit records" if file.parent.name == "commits" else name: offsets}
        for stratum, places in parts.items():
            found.setdefault(stratum, {})[name] = places
    return found


def flip_bits(path: Path, numbers: range) -> dict[str, Counter]:
    """Flip, check, read and restore, once for each number, which alone decides what is flipped; the counts by stratum."""
    right, places = training_read(path), strata(path)
    counts = {stratum: Counter() for stratum in places}
    for number in numbers:
        rng = random.Random(f"{SEED}/{number}")
        stratum = list(places)[number % len(places)]
        name = rng.choice(list(places[stratum]))
        offset, bit = int(rng.choice(places[stratum][name])), rng.randrange(8)
        with open(path / name, "r+b") as file:
            file.seek(offset)
            (value,) = file.read(1)
            file.seek(offset)
            file.write(bytes([value ^ 1 << bit]))
            file.flush()
            named = {finding.path for finding in verify_cache(path, threads=1).findings}
            read = outcome(path, right)
            file.seek(offset)
            file.write(bytes([value]))
        counts[stratum].update({"flips": 1, "found": bool(named), "right file named": named == {name}, read: 1})
        if named != {name} or read == "reads wrong":
            print(f"flip {number}: {name}, byte {offset}, bit {bit}: verify names {sorted(named)}, {read}")
    assert verify_cache(path).clean
    return counts


def check(counts: dict[str, Counter], flips: int) -> None:
    total = sum(counts.values(), Counter())
    assert [total[what] for what in COUNTS[:3]] == [flips] * 3
    assert total["reads wrong"] == 0
    for stratum, seen in counts.items():
        if stratum in UNREAD:
            assert seen["reads right"] == seen["flips"], stratum
        else:  # a reader checks every byte that it uses, its checksums included
            assert seen["reads refused"] == seen["flips"], stratum


def test_every_byte_has_a_stratum(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c.zarr")
    found: dict[str, int] = {}
    for files in strata(path).values():
        for name, offsets in files.items():
            found[name] = found.get(name, 0) + len(offsets)
    assert found == {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}


def test_flipped_bits_in_every_part_of_a_cache(tmp_path: Path) -> None:
    check(flip_bits(make_cache(tmp_path / "c.zarr"), range(154)), 154)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_10000_flipped_bits(tmp_path: Path, campaign) -> None:
    flips, processes = 10_000, 2
    path = make_cache(tmp_path / "0.zarr")
    copies = [path, *(Path(shutil.copytree(path, tmp_path / f"{number}.zarr")) for number in range(1, processes))]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(flip_bits, copies, [range(number, flips, processes) for number in range(processes)]))
    counts = {stratum: sum((part[stratum] for part in parts), Counter()) for stratum in parts[0]}
    rows = {"all": sum(counts.values(), Counter()), **counts}
    campaign(
        "bit-flips",
        seed=SEED,
        figures={stratum: ", ".join(f"{seen[what]} {what}" for what in COUNTS) for stratum, seen in rows.items()},
        notes=f"Flip `n` is drawn from the seed `{{seed}}/n` alone. Training does not read {', '.join(UNREAD)}.",
    )
    check(counts, flips)
