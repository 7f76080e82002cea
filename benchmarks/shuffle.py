"""How well an epoch's order is shuffled, against a full permutation: rank correlation, and how many shards a batch holds.

    python benchmarks/shuffle.py [--shards 2502] [--epochs 20] [--out FILE]

`epoch_order` permutes the shards, cuts them into windows of `open_shards` and permutes the samples of each window. Measured for
ImageNet-1K's 2502 shards of 512 samples, of which every epoch's order is a new one.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sami_cache.order import epoch_order

OPEN_SHARDS = (1, 2, 4, 8, 16, 32)
BATCHES = (64, 256, 1024)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's; of ranks, as all we have are permutations of one range, it is Spearman's."""
    return float(np.corrcoef(first, second)[0, 1])


def positions(order: np.ndarray) -> np.ndarray:
    """Of each sample in the order."""
    where = np.empty(len(order), np.int64)
    where[order] = np.arange(len(order))
    return where


def distinct_shards(order: np.ndarray, shard_samples: int, batch: int) -> np.ndarray:
    """How many shards each full batch draws from."""
    whole = len(order) // batch * batch
    shards = np.sort((order[:whole] // shard_samples).reshape(-1, batch), 1)
    return 1 + (np.diff(shards, axis=1) != 0).sum(1)


def kept_pairs(before: np.ndarray, order: np.ndarray, batch: int) -> float:
    """The share of neighbours in a batch (first and second, second and third ...) that were in one batch an epoch before."""
    whole = len(order) // batch * batch
    batches = (positions(before) // batch)[order[:whole].reshape(-1, batch)]
    return float((batches[:, 1:] == batches[:, :-1]).mean())


def orders(kind: int | None, samples: int, shard_samples: int, epochs: int) -> Iterator[np.ndarray]:
    """The order of each epoch with so many open shards; None: full permutations."""
    usable = np.ones(samples, bool)
    for epoch in range(epochs):
        if kind is None:
            yield np.random.default_rng([0, epoch]).permutation(samples)
        else:
            yield epoch_order(usable, shard_samples, seed=0, epoch=epoch, open_shards=kind)


def measure(kind: int | None, samples: int, shard_samples: int, epochs: int) -> list[str]:
    """The cells of a row of the table."""
    storage, between, same = [], [], []
    shards: dict[int, list[np.ndarray]] = {batch: [] for batch in BATCHES}
    before = None
    for order in orders(kind, samples, shard_samples, epochs):
        storage.append(abs(correlation(order, np.arange(samples))))
        for batch in BATCHES:
            shards[batch].append(distinct_shards(order, shard_samples, batch))
        if before is not None:
            between.append(abs(correlation(positions(before), positions(order))))
            same.append(kept_pairs(before, order, 256))
        before = order
    diversity = [np.concatenate(values) for values in shards.values()]
    return [
        "full permutation" if kind is None else f"{kind} open shards",
        f"{np.mean(storage):.4f} ({max(storage):.4f})",
        f"{np.mean(between):.4f} ({max(between):.4f})" if between else "",
        *(f"{values.mean():.1f} ({values.min()})" for values in diversity),
        f"{np.mean(same):.2%}" if same else "",
    ]


def run(shards: int, shard_samples: int, epochs: int) -> list[str]:
    """Lines of a Markdown table."""
    head = ["", "with storage", "between epochs", *(f"shards in a batch of {batch}" for batch in BATCHES), "kept neighbours"]
    rows = [measure(kind, shards * shard_samples, shard_samples, epochs) for kind in (*OPEN_SHARDS, None)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2502)
    parser.add_argument("--shard-samples", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    table = run(given.shards, given.shard_samples, given.epochs)
    text = "\n".join(
        [
            "# How well an epoch is shuffled",
            "",
            f"Command: `python benchmarks/shuffle.py --shards {given.shards} --shard-samples {given.shard_samples} --epochs "
            f"{given.epochs}`. Hardware: {os.cpu_count()} cores, {platform.machine()}. Date: {time.strftime('%Y%m%d')}. "
            f"Duration: {time.monotonic() - started:.0f} s.",
            "",
            f"{given.shards * given.shard_samples} samples in {given.shards} shards, {given.epochs} epochs. Spearman's rank "
            "correlation, its size (mean over the epochs, largest in brackets): between the order and the storage order, and "
            "between the places of a sample in two epochs that follow each other. Distinct shards in a batch: mean (smallest). "
            "Kept neighbours: of two samples that follow each other in a batch of 256, how many were in one batch in the epoch "
            "before, too.",
            "",
            *table,
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
