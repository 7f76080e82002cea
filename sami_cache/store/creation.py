"""Creating a cache: complete or not at all, and of several creators the first one's.

A folder is built beside its place and renamed. In an object store `spare.tar`, which holds all the files, is created first:
whoever creates it has decided what all of them are, and any creator puts them there, the head last. A reader sees no cache
before the head.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sami_cache.errors import SamiCacheError
from sami_cache.store.cache import Cache, listing_digest
from sami_cache.store.codecs import Codec
from sami_cache.store.commits import FileEntry
from sami_cache.store.files import (
    as_damage,
    canonical_json,
    digest,
    disk_full_as_error,
    fsync_directory,
    make_hold,
    publish,
    seal,
    sizes_below,
    write_durably,
)
from sami_cache.store.head import (
    CODEC_ARRAYS,
    FORMAT,
    HEAD,
    STATIC_FILES,
    array_dtype,
    array_file,
    group_metadata,
    is_cache,
    metadata_files,
    parse_attributes,
)
from sami_cache.store.places import AnyPath, RemotePath
from sami_cache.store.shards import ShardLayout, crc32c
from sami_cache.store.spare import SPARE, pack_spare, read_spare


def create_cache(path: AnyPath, **head: Any) -> Cache:
    """Create a cache, complete or not at all, and open it. If another process was first, theirs is opened.

    `head`: what `static_files` takes. Raises IdentityError if a cache of another identity is there, SamiCacheError if
    something else is.
    """
    if isinstance(path, RemotePath):
        _publish_objects(path, static_files(**head))
    else:
        _publish_directory(path, static_files(**head))
    cache = Cache(path)
    cache.check_identity(head["identity"])
    return cache


def static_files(
    *,
    identity: dict[str, Any],
    codec: Codec,
    layout: ShardLayout,
    keys: Sequence[str],
    labels: Sequence[int | None],
    class_names: Sequence[str] | None,
    provenance: dict[str, Any],
) -> dict[str, bytes]:
    """The files that are written when a cache is created, and never again: {path in the cache: bytes}.

    Args:
        identity: what must be equal for two caches to be the same kind; holds `grid`, `view` and `images` among others.
        keys, labels: of the images; a replay cache has identity["view"]["views"] samples an image.
        provenance: recorded, not compared: versions, hardware, where the images lay.
    """
    samples = len(keys) * identity["view"].get("views", 1)
    files = metadata_files(layout, samples, codec.parameters())
    arrays = {
        name: getattr(codec, name).astype(np.dtype(array_dtype(name)).newbyteorder("<")).tobytes() for name in CODEC_ARRAYS
    }
    files |= {array_file(name): data + crc32c(data).to_bytes(4, "little") for name, data in arrays.items()}
    sink = BytesIO()
    pq.write_table(
        pa.table({"key": pa.array(keys, pa.string()), "label": pa.array(labels, pa.int64())}), sink, compression="zstd"
    )
    files["listing.parquet"] = sink.getvalue()
    essence = {
        "format": FORMAT,
        "identity": identity,
        "codec": {**codec.parameters(), "arrays": {name: digest(data) for name, data in arrays.items()}},
        "layout": {"shard_samples": layout.shard_samples, "chunk_samples": layout.chunk_samples},
        "samples": samples,
        "listing": listing_digest(keys, labels),
    }
    attributes = {
        **essence,
        "cache_id": digest(canonical_json(essence)),
        "class_names": list(class_names) if class_names is not None else None,
        "files": {name: asdict(FileEntry.of(data)) for name, data in files.items()},
        "provenance": provenance,
    }
    files[HEAD] = canonical_json(group_metadata(seal(attributes)))
    return {**files, SPARE: pack_spare(files)}


def is_free(path: AnyPath) -> bool:
    """Whether a cache can be made at `path`: nothing is there, or an empty folder, or what a creation left that was killed."""
    if isinstance(path, RemotePath):
        return sizes_below(path).keys() <= STATIC_FILES | {SPARE}
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _publish_objects(path: RemotePath, files: dict[str, bytes]) -> None:
    """Make a cache of the files in `spare.tar` at `path`, which are `files` unless another creator was first."""
    if is_cache(path):
        return
    if not is_free(path):
        raise SamiCacheError(f"{path}: objects are there that are no cache. Give another --cache, or move them away.")
    if not publish(path / SPARE, files[SPARE], path):
        files = read_spare(path)
        with as_damage(path / SPARE, "does not hold the files of a cache"):
            entries = parse_attributes(files[HEAD], path / SPARE)["files"]
            if entries.keys() != STATIC_FILES or not all(FileEntry(**entries[name]).describes(files[name]) for name in entries):
                raise ValueError("they are not those that its head names")
    for name in (*sorted(STATIC_FILES), HEAD):
        make_hold(path / name, files[name], path)


def _publish_directory(path: Path, files: dict[str, bytes]) -> None:
    """Make the folder `path` with these files in one step, unless a cache is there already."""
    new = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    with disk_full_as_error(new[-1].parent if new else path.parent, "making the cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
    building = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    folders = {(building / name).parent for name in files} | {building / name for name in ("commits", "images", "tmp")}
    try:
        with disk_full_as_error(path.parent, "making the cache"):
            for folder in sorted(folders | {building}):
                folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                write_durably(building / name, data)
            for folder in sorted(folders | {building}, reverse=True):
                fsync_directory(folder)
        try:
            with disk_full_as_error(path.parent, "making the cache"):
                os.rename(building, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not (path / "zarr.json").exists():
                raise SamiCacheError(
                    f"{path}: exists and is not a cache ({error.strerror}). Give another --cache, or move it away."
                ) from error
        with disk_full_as_error(path.parent, "making the cache"):
            for folder in (path.parent, *(folder.parent for folder in new)):
                fsync_directory(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
