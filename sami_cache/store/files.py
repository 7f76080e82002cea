"""Files that appear whole or not at all, survive a power cut, and say which bytes they should hold.

A file is published by writing it under a temporary name, flushing it, and linking it to its name: the link fails if the
name is taken, so the first writer wins and nothing is ever overwritten.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from blake3 import blake3

from sami_cache.errors import DamageError, SamiCacheError


def digest(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3 of `data`, 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte sequence that stands for `value`: sorted keys, no spaces, ASCII, no NaN, a newline at the end."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with the digest of its canonical JSON in the field `blake3`."""
    return {**value, "blake3": digest(canonical_json(value))}


def is_sealed(value: Any) -> bool:
    """Whether `value` is a dict that carries its own right digest."""
    return isinstance(value, dict) and seal({k: v for k, v in value.items() if k != "blake3"}) == value


def parse_sealed_json(data: bytes, path: Path | str) -> dict[str, Any]:
    """Read canonical JSON of a sealed value, byte by byte what was written. Raises DamageError."""
    try:
        value = json.loads(data)
        if is_sealed(value) and canonical_json(value) == data:
            return value
    except (ValueError, TypeError, RecursionError):
        pass
    raise DamageError(f"{path}: its content does not match the digest it carries. Run `sami-cache verify` on the cache.")


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Create `path` (which must not exist) with `data` and flush it. The directory is the caller's to flush."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(path: Path, data: bytes | memoryview, staging: Path) -> bool:
    """Make `path` exist with `data`, durably, unless the name is taken. True if this call made it.

    Args:
        path: the final name, on the same file system as `staging`.
        staging: the directory for the temporary name.
    """
    staging.mkdir(exist_ok=True)
    temporary = staging / f"{path.name}.{secrets.token_hex(8)}"
    try:
        write_durably(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except PermissionError as error:
            raise SamiCacheError(
                f"{path}: this file system refuses hard links ({error.strerror}), which the cache needs to commit a file "
                "in one step. Put the cache on a local file system such as ext4 or xfs."
            ) from error
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


def move_aside(path: Path, directory: Path) -> Path:
    """Move `path` into `directory` under a name that is free there; returns the new place. Nothing is deleted."""
    directory.mkdir(exist_ok=True)
    number = 0
    while True:
        target = directory / f"{path.parent.name}.{path.name}.{number}"
        if not target.exists():
            break
        number += 1
    os.rename(path, target)
    fsync_directory(directory)
    fsync_directory(path.parent)
    return target
