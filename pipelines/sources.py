"""Are the images still the ones that were extracted? Told by content: a time stamp says nothing about bytes."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from sami_cache.data.sources import Source
from sami_cache.errors import IdentityError, ImageError
from sami_cache.store.cache import Cache
from sami_cache.store.files import digest


def committed_sources(cache: Cache) -> Iterator[dict[str, str]]:
    """For each committed shard the BLAKE3 of the encoded source images by key; those that could not be read are left out."""
    for record in cache.records():
        yield {sample.key: sample.source for sample in record.samples if sample.source}


def compare_images(
    source: Source,
    expected: Iterable[dict[str, str]],
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[str], list[str]]:
    """Hash images again: (keys that are gone or cannot be read, keys whose bytes are not the expected ones).

    Args:
        expected: BLAKE3 of the images' bytes by key, in parts.
        on_progress: called with the number of parts done.
    """
    where = {key: index for index, key in enumerate(source.keys)}

    def found(key: str) -> str | None:
        try:
            return digest(source.read(where[key]))
        except (KeyError, ImageError):
            return None

    missing: dict[str, None] = {}
    changed: dict[str, None] = {}
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1), thread_name_prefix="check") as pool:
        for done, part in enumerate(expected, 1):
            for key, value in zip(part, pool.map(found, part), strict=True):
                if value != part[key]:
                    (missing if value is None else changed)[key] = None
            on_progress(done)
    return list(missing), list(changed)


def check_images(
    cache: Cache,
    source: Source,
    expected: Iterable[dict[str, str]],
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Raise IdentityError naming the images whose content is not what the cache was made from."""
    missing, changed = compare_images(source, expected, workers=workers, on_progress=on_progress)
    if not missing and not changed:
        return
    lines = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in (("edited", changed), ("gone or unreadable", missing))
        if keys
    ]
    raise IdentityError(
        f"{cache.path} holds embeddings of other images than {source.location} has now:\n  "
        + "\n  ".join(lines)
        + "\nPut back the images it was made from (`sami-cache verify --sources --json` lists all that differ), or give "
        "another --cache to make a new one."
    )
