"""Which samples an epoch serves when, and all that is random about them: functions of (seed, epoch, sample) alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sami_cache.errors import SamiCacheError
from sami_cache.store.files import digest

_STRIDE = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def epoch_order(usable: np.ndarray, shard_samples: int, *, seed: int, epoch: int, open_shards: int) -> np.ndarray:
    """The sample numbers of an epoch in training order: int64 [usable.sum()], each exactly once.

    Shards are permuted, then cut into windows of `open_shards`; the samples of a window are permuted together.
    """
    rng = np.random.default_rng([seed, epoch])
    numbers = np.flatnonzero(usable)
    shards = numbers // shard_samples
    present = np.unique(shards)
    rank = np.empty(int(present.max(initial=0)) + 1, np.int64)
    rank[rng.permutation(present)] = np.arange(len(present))
    window = rank[shards] // open_shards
    return numbers[np.lexsort((rng.random(len(numbers)), window))]


def deal(order: np.ndarray, batch_size: int, rank: int, world: int) -> np.ndarray:
    """The samples of one rank: int64 [steps, batch_size / world]; what fills no batch at the end is left out.

    Which samples make a step depends on `order` alone. Within a step they are sorted before they are dealt: neighbours in
    storage go to the same rank, so that it reads its share of the shards and not all of them.
    """
    steps, share = len(order) // batch_size, batch_size // world
    batches = np.sort(order[: steps * batch_size].reshape(steps, batch_size), axis=1)
    return batches[:, rank * share : (rank + 1) * share]


class Course:
    """What is to be read for a run of micro-batches."""

    def __init__(self, epoch: int, numbers: np.ndarray, size: int, chunk_samples: int, shard_samples: int) -> None:
        """`numbers`: int64 [n], the samples in order, `size` to a micro-batch (the last one may be smaller)."""
        self.epoch, self.numbers, self.size = epoch, numbers, size
        chunks = numbers // chunk_samples
        self._by_chunk = np.argsort(chunks, kind="stable")
        grouped = chunks[self._by_chunk]
        starts = np.flatnonzero(np.diff(grouped, prepend=-1))
        # Chunks in the order in which they are needed, and for one micro-batch in the order in which they lie on the disk.
        needed = self._by_chunk[starts] // size
        order = np.lexsort((grouped[starts], needed))
        self._chunks = grouped[starts][order]
        self._starts, self._stops = starts[order], np.append(starts[1:], len(numbers))[order]
        self._bounds = np.searchsorted(needed[order], np.arange(len(self) + 1))
        self._chunk_samples = chunk_samples
        shards, first = np.unique(self._chunks // (shard_samples // chunk_samples), return_index=True)
        self.shards: list[int] = shards[first.argsort()].tolist()
        """In the order in which they are first needed."""
        self._shard_starts = np.sort(first)

    def __len__(self) -> int:
        return (len(self.numbers) + self.size - 1) // self.size

    def part(self, number: int) -> np.ndarray:
        """The samples of a micro-batch."""
        return self.numbers[number * self.size : (number + 1) * self.size]

    def first_needed(self, number: int) -> range:
        """The chunks that this micro-batch is the first to need, to be asked for with `chunk`."""
        return range(*self._bounds[number : number + 2].tolist())

    def chunk(self, group: int) -> "WantedChunk":
        """Which samples of a chunk go where."""
        places = self._by_chunk[self._starts[group] : self._stops[group]]
        return WantedChunk(
            int(self._chunks[group]),
            (self.numbers[places] % self._chunk_samples).tolist(),
            (places // self.size).tolist(),
            (places % self.size).tolist(),
        )

    def shards_until(self, number: int) -> int:
        """How many of `shards` are needed by this micro-batch and those before it."""
        return int(np.searchsorted(self._shard_starts, self._bounds[number + 1]))

    def last_part(self, group: int) -> int:
        """The last micro-batch that needs the chunk."""
        return int(self._by_chunk[self._stops[group] - 1]) // self.size


class WantedChunk(NamedTuple):
    """A chunk and all that a course needs of it, in the order in which it is needed."""

    number: int
    """Counted over all shards."""
    places: list[int]
    """Of the samples in the chunk."""
    parts: list[int]
    """The micro-batch of each."""
    rows: list[int]
    """Its row there."""


def random_words(seed: int, epoch: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """`count` random words for each of the samples `numbers`: uint64 [n, count].

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which is a counter and a mixing function and so makes any number of
    streams at once; a generator of numpy's for each sample would take longer than cutting its pixels.
    """
    key = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    streams = _mix(key + numbers.astype(np.uint64) * _STRIDE)
    return _mix(streams[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _STRIDE)


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def uniform(words: np.ndarray) -> np.ndarray:
    """Random words as float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def split_held_out(keys: Sequence[str], usable: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out): bool [samples] each. An image is held out by its key's digest, with all its views, in every run."""
    if not 0 <= share < 1:
        raise SamiCacheError(f"--holdout {share:g}: a share of the images between 0 and 1, such as 0.02.")
    limit = int(share * 2**32)
    held = np.array([int(digest(key.encode())[:8], 16) < limit for key in keys], bool)
    return usable & ~held, usable & held
