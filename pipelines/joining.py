"""Caches made of caches: several joined, or some samples of one. No teacher is asked again."""

import fnmatch
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.jobs import Progress
from sami_cache.data.sources import open_source
from sami_cache.errors import SamiCacheError
from sami_cache.processes import GRACE, StopSignal
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK
from sami_cache.store.copying import Place, copy_shard, same_codec
from sami_cache.store.creation import create_cache
from sami_cache.store.head import identity_difference
from sami_cache.store.places import AnyPath, local_only
from sami_cache.store.writing import seal_cache


@dataclass(kw_only=True)
class Joined:
    """What came of joining."""

    cache: AnyPath
    root: dict[str, Any]
    linked: int
    """Shards whose files are another cache's, not written again."""
    written: int
    twice: int
    """Images that were in several caches; one of each was taken."""
    recoded: int
    """Samples that were decoded and encoded again under the first cache's codec."""
    seconds: float
    bytes: int


@dataclass(frozen=True)
class _Image:
    cache: Cache
    number: int
    label: int | None


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    recode: bool = False,
    grace: float = GRACE,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Joined:
    """One sealed cache of all images of several sealed caches of the same identity, in the order given.

    An image that several hold (the same key and the same bytes) is taken from the first that has an embedding of it. Classes
    go by their names. Interrupted, the same call goes on.

    Args:
        recode: where the codecs were fitted on other images: decode, and encode under the first cache's codec.

    Raises:
        SamiCacheError: settings or codecs differ, a cache is not sealed, one key stands for two images.
        DamageError: a byte of theirs is not the one that was committed.
    """
    caches = [_open_sealed(path, out) for path in paths]
    first = caches[0]
    for other in caches[1:]:
        if difference := identity_difference(first.identity, other.identity):
            lines = [line.replace("the cache has", "it has").replace("you ask for", f"{other.path} has") for line in difference]
            raise SamiCacheError(f"{first.path} cannot be joined with {other.path}:\n  " + "\n  ".join(lines))
        if not recode and not same_codec(first, other):
            raise SamiCacheError(
                f"{first.path} and {other.path}: their codecs were fitted on different images, so that codes of one mean "
                "nothing to the other. --recode decodes the others and encodes them again under the first one's, which adds "
                "about as much error again to their samples; extracted with `--codec-from`, caches share one from the start."
            )
    class_names = _all_classes(caches)
    chosen: dict[str, tuple[_Image, str | None, bool]] = {}
    twice = 0
    for cache in caches:
        names = cache.attributes["class_names"]
        # Of each image its first view: what decides between two images is the same in all.
        table = (
            cache.table().select(["key", "label", "source", "status"]).take(np.arange(0, cache.samples, max(1, cache.views)))
        )
        for number, row in enumerate(table.to_pylist()):
            key, label, source, good = row["key"], row["label"], row["source"], row["status"] == OK
            if names and class_names and label is not None:
                label = class_names.index(names[label])
            image = _Image(cache, number, label)
            if key in chosen:
                twice += 1
                before, other, was_good = chosen[key]
                if good and was_good and source != other:
                    raise SamiCacheError(
                        f"{key!r} is one image in {before.cache.path} and another in {cache.path} (other bytes). Rename it in "
                        "one of the image sets, or leave it out of one with `sami-cache subset`."
                    )
                if was_good or not good:
                    continue
            chosen[key] = image, source, good
    images = [image for image, _, _ in chosen.values()]
    recoded = sum(max(1, first.views) for image in images if not same_codec(first, image.cache))
    provenance = first.attributes["provenance"] | {"merged": [_origin(cache) for cache in caches]}
    return _make(out, first, images, class_names or None, provenance, grace, on_progress, twice=twice, recoded=recoded)


def subset(
    path: Path,
    out: Path,
    *,
    match: Sequence[str] = (),
    keys: Path | None = None,
    data: Path | None = None,
    count: int | None = None,
    seed: int = 0,
    grace: float = GRACE,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Joined:
    """A sealed cache of some images of a sealed one, in its order. Every condition given must hold.

    Args:
        match: shell patterns, any of which the key matches.
        keys: a text file with a key a line.
        data: keep what is still among these images.
        count: so many of what is left, drawn with `seed`.

    Raises SamiCacheError where nothing is left or a key is not there, DamageError where a byte is not as committed.
    """
    cache = _open_sealed(path, out)
    table = cache.listing
    all_keys, labels = table["key"].to_pylist(), table["label"].to_pylist()
    wanted = np.ones(len(all_keys), bool)
    if match:
        wanted &= [any(fnmatch.fnmatchcase(key, pattern) for pattern in match) for key in all_keys]
    if keys is not None:
        listed = set(keys.read_text().splitlines()) - {""}
        if unknown := sorted(listed - set(all_keys)):
            shown = ", ".join(unknown[:3])
            raise SamiCacheError(f"{keys}: {len(unknown)} keys are not in {path}: {shown}{', ...' if len(unknown) > 3 else ''}")
        wanted &= [key in listed for key in all_keys]
    if data is not None:
        there = set(open_source(data, kind=cache.identity["source_kind"]).keys)
        wanted &= [key in there for key in all_keys]
    numbers = np.flatnonzero(wanted)
    if count is not None:
        if count > len(numbers):
            raise SamiCacheError(f"{path}: {len(numbers)} images fit, {count} asked for")
        numbers = np.sort(np.random.default_rng(seed).choice(numbers, count, replace=False))
    if not len(numbers):
        raise SamiCacheError(f"{path}: none of its {len(all_keys)} images fits; its keys look like {all_keys[0]!r}")
    images = [_Image(cache, number, labels[number]) for number in numbers.tolist()]
    provenance = cache.attributes["provenance"] | {"subset_of": _origin(cache)}
    return _make(out, cache, images, cache.attributes["class_names"], provenance, grace, on_progress)


def _make(
    out: Path,
    like: Cache,
    images: Sequence[_Image],
    class_names: list[str] | None,
    provenance: dict[str, Any],
    grace: float,
    on_progress: Callable[[Progress], None],
    twice: int = 0,
    recoded: int = 0,
) -> Joined:
    """Make, or go on making, the cache `out` of these images, with the identity, codec and layout of `like`; seal it."""
    started = time.perf_counter()
    listings = {id(image.cache): image.cache.listing["key"].to_pylist() for image in images}
    with StopSignal(lambda: f"interrupted: what is in {out} stays; run the same command again to go on.", grace) as stop:
        new = create_cache(
            out,
            identity=like.identity,
            codec=like.codec,
            layout=like.layout,
            keys=[listings[id(image.cache)][image.number] for image in images],
            labels=[image.label for image in images],
            class_names=class_names,
            provenance=provenance,
        )
        views = max(1, like.views)
        expected = [listings[id(image.cache)][image.number] for image in images]
        if new.listing["key"].to_pylist() != expected or not same_codec(new, like):
            raise SamiCacheError(f"{out}: is a cache of other images. Give another place, or move it away.")
        committed = set(new.committed())
        linked = written = 0
        done = sum(len(new.shard_samples(shard)) for shard in committed)
        stop.holding = True
        for shard in range(new.shards):
            numbers = new.shard_samples(shard)
            if shard not in committed:
                places = [
                    Place(image.cache, image.number * views + number % views, image.label)
                    for number, image in ((number, images[number // views]) for number in numbers)
                ]
                if copy_shard(new, shard, places):
                    linked += 1
                else:
                    written += 1
                done += len(numbers)
            on_progress(Progress(stage="copy", done=done, total=new.samples))
            stop.check()
        stop.holding = False
        root = seal_cache(new)
    return Joined(
        cache=out,
        root=root,
        linked=linked,
        written=written,
        twice=twice,
        recoded=recoded,
        seconds=time.perf_counter() - started,
        bytes=new.size_on_disk(),
    )


def _open_sealed(place: AnyPath, new: AnyPath) -> Cache:
    path, out = local_only(place, "to join caches"), local_only(new, "to join caches")
    cache = Cache(path)
    if out.exists() and out.resolve() == path.resolve():
        raise SamiCacheError(f"{out}: is one of the caches to read from; give another --out")
    if cache.root() is None:
        raise SamiCacheError(f"{path}: is not sealed; finish it with the `sami-cache extract` command that began it.")
    return cache


def _all_classes(caches: Sequence[Cache]) -> list[str] | None:
    """The classes of all caches by name, in order of appearance. Raises SamiCacheError where labels have no names to go by."""
    names = [cache.attributes["class_names"] for cache in caches]
    if all(one is None for one in names):
        return None
    for cache, one in zip(caches, names, strict=True):
        if one is None and cache.listing["label"].null_count < len(cache.listing):
            raise SamiCacheError(
                f"{cache.path}: its classes have no names, those of the others have: its labels mean nothing there"
            )
    return list(dict.fromkeys(name for one in names for name in one or ()))


def _origin(cache: Cache) -> dict[str, Any]:
    root = cache.root()
    return {"path": str(cache.path.resolve()), "cache_id": cache.cache_id, "root": root and root["root"]}
