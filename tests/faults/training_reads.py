"""What training takes from a cache, to compare before and after damage."""

from pathlib import Path

from sami_cache.errors import SamiCacheError
from sami_cache.loader import CacheSamples
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
    loaded = samples.load(shard)
    decoded = samples.cache.codec.decode(loaded.codes)
    return [loaded.codes.tobytes(), decoded.tobytes(), loaded.images, loaded.views, loaded.sizes]


def outcome(path: Path, right: list[object]) -> str:
    """`reads refused`, `reads right` or `reads wrong`; what else is raised is the caller's to see."""
    try:
        return "reads right" if training_read(path) == right else "reads wrong"
    except SamiCacheError:
        return "reads refused"
