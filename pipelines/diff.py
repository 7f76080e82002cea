"""Two caches compared: what they were made with, which samples they hold, and by how much the embeddings differ."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sami_cache.store.cache import Cache
from sami_cache.store.head import identity_difference
from sami_cache.store.places import AnyPath

MEASURED = 256  # differing samples that are decoded to say by how much


@dataclass(kw_only=True)
class Difference:
    """How cache B differs from cache A."""

    same_root: bool
    """Both sealed, and their roots equal: every committed byte is the same."""
    settings: list[str]
    """`field: A has ..., B has ...`."""
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    """Keys that one of them lacks."""
    changed: list[str] = field(default_factory=list)
    """Keys whose codes or status differ."""
    compared: int = 0
    """Samples that both hold."""
    worst: float | None = None
    """Largest squared difference between embeddings, relative to their variance, over up to MEASURED changed samples."""

    @property
    def same(self) -> bool:
        return self.same_root or not (self.settings or self.only_a or self.only_b or self.changed)


def diff_caches(path_a: AnyPath, path_b: AnyPath) -> Difference:
    """Compare two caches, sealed or not. Raises SamiCacheError where there is none, DamageError if one is damaged."""
    a, b = Cache(path_a), Cache(path_b)
    root_a, root_b = a.root(), b.root()
    if root_a and root_b and root_a["root"] == root_b["root"]:
        return Difference(same_root=True, settings=[], compared=a.samples)
    settings = [
        line.replace("the cache has", "A has").replace("you ask for", "B has")
        for line in identity_difference(_settings(a), _settings(b))
    ]
    rows_a, rows_b = _rows(a), _rows(b)
    both = [key for key in rows_a if key in rows_b]
    result = Difference(
        same_root=False,
        settings=settings,
        only_a=[key[0] for key in rows_a if key not in rows_b],
        only_b=[key[0] for key in rows_b if key not in rows_a],
        compared=len(both),
    )
    if a.codec.channels != b.codec.channels or a.grid != b.grid:
        return result
    comparable = a.attributes["codec"]["arrays"] == b.attributes["codec"]["arrays"]
    changed = [key for key in both if not comparable or rows_a[key][:2] != rows_b[key][:2]]
    result.changed = [key[0] for key in changed]
    worst = [_distance(a, rows_a[key], b, rows_b[key]) for key in changed[:MEASURED]]
    result.worst = max((value for value in worst if value is not None), default=None)
    return result


def _settings(cache: Cache) -> dict[str, Any]:
    return {**cache.identity, "codec": cache.identity["codec"] | {"arrays": cache.attributes["codec"]["arrays"]}}


def _rows(cache: Cache) -> dict[tuple[str, str], tuple[Any, ...]]:
    """(status, codes checksum, sample number) of each sample, by key and view."""
    rows = {}
    for record in cache.records():
        start = cache.shard_samples(record.shard).start
        for index, sample in enumerate(record.samples):
            rows[sample.key, str(sample.view)] = (sample.status, sample.codes_crc32c, start + index)
    return rows


def _distance(a: Cache, row_a: tuple[Any, ...], b: Cache, row_b: tuple[Any, ...]) -> float | None:
    if row_a[0] != row_b[0] or row_a[1] is None:
        return None
    difference = a.read_embedding(row_a[2]) - b.read_embedding(row_b[2])
    return float(np.square(difference, dtype=np.float64).mean() / a.codec.variance)
