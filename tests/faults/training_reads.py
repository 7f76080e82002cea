"""What training takes from a cache, to compare before and after damage."""

from pathlib import Path

import numpy as np

from sami_cache.errors import SamiCacheError
from sami_cache.samples import CacheSamples
from sami_cache.store.cache import Cache


def training_read(path: Path) -> list[object]:
    """All that training takes from a cache, through a freshly opened one. Raises SamiCacheError."""
    cache = Cache(path)
    samples = CacheSamples(cache)
    values: list[object] = [samples.keys, samples.labels, samples.usable.tolist(), cache.listing.to_pydict()]
    for shard in range(cache.shards):
        values += shard_read(samples, shard)
    return values


def shard_read(samples: CacheSamples, shard: int) -> list[object]:
    opened, numbers = samples.open(shard), samples.cache.shard_samples(shard)
    codes = np.empty((len(numbers), *samples.codes_shape), samples.codes_dtype)
    step = samples.chunk_samples
    for start in range(0, len(codes), step):
        opened.read_codes(start // step, dict(enumerate(codes[start : start + step])))
    usable = np.flatnonzero(samples.usable[numbers.start : numbers.stop]).tolist()
    images = [opened.encoded(place) for place in usable]
    views = [opened.view(place) for place in usable]
    return [codes.tobytes(), samples.cache.codec.decode(codes).tobytes(), images, views]


def outcome(path: Path, right: list[object]) -> str:
    """`reads refused`, `reads right` or `reads wrong`; what else is raised is the caller's to see."""
    try:
        return "reads right" if training_read(path) == right else "reads wrong"
    except SamiCacheError:
        return "reads refused"
