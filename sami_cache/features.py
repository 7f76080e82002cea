"""Features of whole data sets, kept on disk so that they are computed once.

    FOLDER/<key>.npy        float16 [N, D]
    FOLDER/<key>.json       what they are of, and the digest of the .npy; sealed by a digest of its own

A file's name is the digest of what its features depend on, so others are never taken for them; what is damaged or half written
counts as not there. Files appear whole: the .npy first, then what vouches for it.
"""

import io
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store.files import (
    canonical_json,
    digest,
    disk_full_as_error,
    fsync_directory,
    parse_sealed_json,
    read_file,
    seal,
    write_durably,
)

_AT_MOST = 1 << 36


def read_features(folder: Path, of: dict[str, Any]) -> np.ndarray | None:
    """float16 [N, D] that `save_features` has kept under the same `of`; None where there are none, or damaged ones."""
    path = _place(folder, of)
    if not path.with_suffix(".json").exists():
        return None
    try:
        record = parse_sealed_json(read_file(path.with_suffix(".json")), path.with_suffix(".json"))
        data = read_file(path, at_most=_AT_MOST)
    except DamageError:
        return None
    if record.get("of") != of or record.get("npy") != digest(data):
        return None
    return np.load(io.BytesIO(data), allow_pickle=False)


def save_features(folder: Path, of: dict[str, Any], features: np.ndarray) -> np.ndarray:
    """Keep float [N, D]; `of`: what they depend on, as JSON. Returns them as they will be read, float16.

    Raises SamiCacheError where a number is too large for float16, or nothing can be written.
    """
    with np.errstate(over="ignore"):
        kept = np.ascontiguousarray(features, np.float16)
    if not np.isfinite(kept).all():
        raise SamiCacheError(
            f"features of {of.get('model')} are not finite in float16: the weights are damaged, or need scaling"
        )
    content = io.BytesIO()
    np.save(content, kept, allow_pickle=False)
    data, path = content.getvalue(), _place(folder, of)
    record = canonical_json(seal({"of": of, "npy": digest(data), "shape": list(kept.shape)}))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with disk_full_as_error(folder, "keeping features"):
            _replace(path, data)
            _replace(path.with_suffix(".json"), record)
    except OSError as error:
        raise SamiCacheError(f"{path}: not written ({error.strerror}). Give another place with --features DIR.") from error
    return kept


def _place(folder: Path, of: dict[str, Any]) -> Path:
    return folder / f"{digest(canonical_json(of))[:24]}.npy"


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
