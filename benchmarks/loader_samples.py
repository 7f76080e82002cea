"""The samples as plain arrays, a batch of them, and the orders they are served in. Peers import it: nothing of sami_cache."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64


class PlainSamples:
    """Codes int8 [n, kept, m, m] and JPEGs in three flat files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes = np.load(folder / "codes.npy", mmap_mode="r")
        self.offsets = np.load(folder / "offsets.npy")
        self.jpeg_bytes = np.load(folder / "jpegs.npy", mmap_mode="r")
        self.block = int(json.loads((folder / "done").read_text()))
        """Samples of a shard of the cache: what peers that read in blocks read at a time."""

    def __len__(self) -> int:
        return len(self.codes)

    def jpeg(self, number: int) -> bytes:
        return self.jpeg_bytes[self.offsets[number] : self.offsets[number + 1]].tobytes()

    @staticmethod
    def write(folder: Path, codes: np.ndarray, jpegs: Sequence[bytes], block: int) -> None:
        folder.mkdir(parents=True)
        np.save(folder / "codes.npy", codes)
        np.save(folder / "jpegs.npy", np.frombuffer(b"".join(jpegs), np.uint8))
        np.save(folder / "offsets.npy", np.cumsum([0, *map(len, jpegs)]))
        (folder / "done").write_text(str(block))


@dataclass
class Batch:
    """What the consumer is handed. Arrays are numpy's or torch's."""

    numbers: Any
    """int64 [B]."""
    codes: Any
    """int8 [B, kept, m, m], contiguous."""
    jpegs: Any = None
    """B byte strings; or, from another process, all of them in one uint8 array and where each begins and ends."""

    def jpeg(self, row: int) -> bytes:
        if isinstance(self.jpegs, list):
            return self.jpegs[row]
        joined, offsets = (np.asarray(part) for part in self.jpegs)
        return joined[offsets[row] : offsets[row + 1]].tobytes()

    def __len__(self) -> int:
        return len(self.numbers)


def full_permutations(samples: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """The numbers of each batch: `repeats` epochs, every sample once in each, the last batch of an epoch perhaps smaller."""
    for epoch in range(repeats):
        order = np.random.default_rng([seed, epoch]).permutation(samples)
        yield from (order[start : start + BATCH] for start in range(0, samples, BATCH))


def shard_windows(blocks: int, window: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """The blocks of each window: in each epoch every block once, in random order."""
    for epoch in range(repeats):
        order = np.random.default_rng([seed, epoch]).permutation(blocks)
        yield from (order[start : start + window] for start in range(0, blocks, window))


def every(items: Iterator[Any], worker: int, workers: int) -> Iterator[Any]:
    """The share of one of several workers."""
    return itertools.islice(items, worker, None, workers)
