"""The head of a cache: the attributes of its group, and the Zarr metadata that follow from them."""

import json
from typing import Any

from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store.files import canonical_json, exists, is_sealed, names_in, read_file
from sami_cache.store.places import AnyPath, RemotePath
from sami_cache.store.shards import ShardLayout, array_metadata

FORMAT = 3
HEAD = "zarr.json"
CODEC_ARRAYS = {
    "basis": ("direction", "channel"),
    "dct": ("frequency", "cell"),
    "index": ("kept",),
    "mean": ("channel",),
    "step": ("kept",),
}
# What a cache is: these fields make its cache_id.
ESSENCE = ("format", "identity", "codec", "layout", "samples", "listing")
_PLAIN_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def read_attributes(path: AnyPath) -> dict[str, Any]:
    """The head of the cache at `path`, checked. Raises SamiCacheError if there is none, DamageError if it is damaged."""
    head = path / HEAD
    if not is_cache(path):
        raise SamiCacheError(
            f"{path}: there is no cache here (no zarr.json). `sami-cache extract --cache {path}` makes one; the default is "
            "`cache.zarr` or $SAMI_CACHE."
        )
    return parse_attributes(read_file(head), head)


def is_cache(path: AnyPath) -> bool:
    """Whether there is a cache at `path`, be it one that has lost its head."""
    if exists(path / HEAD):
        return True
    commits = path / "commits"
    return bool(names_in(commits)) if isinstance(commits, RemotePath) else commits.is_dir()


def parse_attributes(data: bytes, head: AnyPath | str) -> dict[str, Any]:
    """What the bytes of a zarr.json say. Raises DamageError, SamiCacheError for another format."""
    try:
        value = json.loads(data)
        attributes = value["attributes"]["sami_cache"]
        intact = is_sealed(attributes) and canonical_json(group_metadata(attributes)) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        intact, attributes = False, {}
    if not intact:
        raise DamageError(
            f"{head}: its content does not match the digest it carries; it is damaged or not a sami-cache. `sami-cache verify "
            "--repair` puts back the copy that the cache keeps."
        )
    if attributes.get("format") != FORMAT:
        found = attributes.get("format")
        mend = "It was never released: extract the images again." if found in (1, 2) else "Use a newer sami-cache for it."
        raise SamiCacheError(f"{head}: format {found}, this program reads format {FORMAT}. {mend}")
    return attributes


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": {"sami_cache": attributes}}


def codec_shapes(codec: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the codec's arrays, from what the head says of it."""
    sizes = {"kept": codec["kept"], "channel": codec["channels"], "direction": codec["directions"]}
    sizes |= {"frequency": codec["block"], "cell": codec["block"]}
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in CODEC_ARRAYS.items()}


def array_dtype(name: str) -> str:
    return "int32" if name == "index" else "float32"


def array_file(name: str) -> str:
    """The one chunk of one of the codec's arrays."""
    return f"{name}/{'.'.join('0' for _ in CODEC_ARRAYS[name])}"


STATIC_FILES = frozenset(
    {"codes/zarr.json", "listing.parquet"}
    | {f"{name}/zarr.json" for name in CODEC_ARRAYS}
    | {array_file(name) for name in CODEC_ARRAYS}
)
"""What is written at creation, beside the head itself and the copies."""


def metadata_files(layout: ShardLayout, samples: int, codec: dict[str, Any]) -> dict[str, bytes]:
    """The zarr.json of every array, by path; `codec` as in the head."""
    files = {"codes/zarr.json": canonical_json(layout.metadata(samples))}
    for name, shape in codec_shapes(codec).items():
        metadata = array_metadata(shape, array_dtype(name), shape, _PLAIN_CODECS, CODEC_ARRAYS[name])
        files[f"{name}/zarr.json"] = canonical_json(metadata)
    return files


def identity_difference(cache: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `field: the cache has A, you ask for B`, one per field that differs."""
    lines = []
    for name in sorted(cache.keys() | asked.keys()):
        mine, other = cache.get(name), asked.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            lines += identity_difference(mine, other, f"{prefix}{name}.")
        elif mine != other:
            lines.append(f"{prefix}{name}: the cache has {mine!r}, you ask for {other!r}")
    return lines
