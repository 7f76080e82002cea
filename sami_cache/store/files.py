"""Files that appear whole or not at all, survive a power cut, and say which bytes they should hold.

A file is published by writing it under a temporary name, flushing it, and linking it to its name: the link fails if the
name is taken, so the first writer wins and nothing is ever overwritten. In an object store a conditional put does the same.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

from sami_cache.errors import DamageError, DiskFullError, SamiCacheError, one_line
from sami_cache.store import objects
from sami_cache.store.places import AnyPath, RemotePath
from sami_cache.store.remote_file import RemoteFile

ASIDE = ("tmp/", "quarantine/")
"""What lies below these folders of a cache is none of its data."""
_DAMAGE = (errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


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


_SEAL = re.compile(rb'\{"blake3":"([0-9a-f]{64})",')


def check_seal(data: bytes, path: AnyPath | str) -> bytes:
    """`data` if it is as it was sealed, judged by its bytes alone. Raises DamageError.

    In canonical JSON the field `blake3` comes first, so the digest is that of what follows it.
    """
    seal = _SEAL.match(data)
    if seal is None or digest(b"{" + data[seal.end() :]) != seal[1].decode():
        raise DamageError(f"{path}: its content does not match the digest it carries. Run `sami-cache verify` on the cache.")
    return data


def parse_sealed_json(data: bytes, path: AnyPath | str) -> dict[str, Any]:
    """Read canonical JSON of a sealed value, byte by byte what was written. Raises DamageError."""
    try:
        value = json.loads(data)
        if is_sealed(value) and canonical_json(value) == data:
            return value
    except (ValueError, TypeError, RecursionError):
        pass
    raise DamageError(f"{path}: its content does not match the digest it carries. Run `sami-cache verify` on the cache.")


@contextmanager
def as_damage(path: AnyPath | str, what: str) -> Iterator[None]:
    """Turn a missing field or a wrong type in what `path` holds into a DamageError.

    A digest proves that a value is the one somebody wrote, not that it makes sense.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamageError(f"{path}: {what} ({type(error).__name__}: {one_line(error)})") from error


@contextmanager
def reading(path: AnyPath | str) -> Iterator[None]:
    """Turn the errors of a file that is gone, is no file, or lies on bad sectors into a DamageError.

    Others (no permission, too many open files) say nothing about the file and pass.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DamageError(f"{path}: missing. `sami-cache verify --repair` mends what the images can mend.") from None
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise DamageError(f"{path}: cannot be read ({error.strerror})") from error


def open_to_read(path: Path) -> int:
    """A descriptor of the regular file `path`. Raises DamageError if there is none."""
    with reading(path):
        # Without O_NONBLOCK a FIFO in the place of a file would stop us for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamageError(f"{path}: is not a regular file")
    return descriptor


class OpenFile:
    """A regular file of a known size, open for reading until it is closed or nobody holds it any more. Thread-safe."""

    def __init__(self, path: AnyPath, size: int) -> None:
        """Open `path`. Raises DamageError if it is not there or does not hold exactly `size` bytes; of an object, when it is
        read.
        """
        self.path, self._descriptor = path, -1
        self._remote = RemoteFile(path, size) if isinstance(path, RemotePath) else None
        if isinstance(path, RemotePath):
            return
        self._descriptor = open_to_read(path)
        actual = os.fstat(self._descriptor).st_size
        if actual != size:
            raise DamageError(f"{path}: {actual} bytes, its commit record says {size}")

    def read_at(self, offset: int, count: int, where: AnyPath | str) -> bytes:
        """`count` bytes from `offset` on. Raises DamageError that names `where`."""
        with reading(where):
            data = self._remote.read_at(offset, count) if self._remote else os.pread(self._descriptor, count, offset)
        if len(data) != count:
            raise DamageError(f"{where}: {len(data)} bytes read, {count} expected")
        return data

    def expect(self, digest: str | None = None) -> None:
        """Have the system read the whole file ahead, where it can: pieces in any order are then no slower than the disk.

        Of an object, a training that gives its XXH3-128 begins to get a local copy; without, it is read into memory at once.
        """
        if self._remote:
            self._remote.expect(digest)
        elif hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_file(path: AnyPath, at_most: int = 1 << 26) -> bytes:
    """The bytes of the regular file `path`. Raises DamageError if there is none, or it holds more than `at_most` bytes."""
    if isinstance(path, RemotePath):
        try:
            data, size, _ = objects.read(path, at_most)
        except FileNotFoundError:
            raise objects.missing(path) from None
        if data is None:
            raise DamageError(f"{path}: {size} bytes, at most {at_most} expected")
        return data
    with os.fdopen(open_to_read(path), "rb", buffering=0) as file, reading(path):
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise DamageError(f"{path}: {size} bytes, at most {at_most} expected")
        return file.readall()


def hash_file(path: AnyPath, hasher: Any, block: int = 1 << 19) -> str:
    """The hexadecimal digest of a file, read once from front to back. Raises DamageError where it cannot be read."""
    if isinstance(path, RemotePath):
        with reading(path):
            for piece in objects.pieces(path):
                hasher.update(piece)
        return hasher.hexdigest()
    buffer = bytearray(block)  # half a megabyte stays in the processor's cache between reading and hashing
    view = memoryview(buffer)
    with os.fdopen(open_to_read(path), "rb", buffering=0) as file, reading(path):
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return hasher.hexdigest()


def exists(path: AnyPath) -> bool:
    """Whether the name is taken, be it by a link that leads nowhere."""
    if not isinstance(path, RemotePath):
        return os.path.lexists(path)
    with suppress(FileNotFoundError):
        objects.head(path)
        return True
    return False


def size_of(path: AnyPath) -> int:
    """Bytes. Raises FileNotFoundError and other errors of the system."""
    return objects.head(path)[0] if isinstance(path, RemotePath) else path.stat().st_size


def stamp_of(path: AnyPath) -> object:
    """What changes when the file is replaced by another; None where there is none."""
    with suppress(FileNotFoundError):
        return objects.head(path)[1] if isinstance(path, RemotePath) else path.stat().st_ino
    return None


def names_in(folder: AnyPath) -> set[str]:
    """The names in a folder of a cache. Raises what the system raises; a folder of an object store is never missing."""
    return set(objects.sizes_below(folder)) if isinstance(folder, RemotePath) else set(os.listdir(folder))


def sizes_below(folder: AnyPath) -> dict[str, int]:
    """The bytes of everything below a folder but folders, by its name relative to it; links count themselves."""
    if isinstance(folder, RemotePath):
        return objects.sizes_below(folder)
    found: dict[str, int] = {}
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            with suppress(FileNotFoundError):
                found[str(path.relative_to(folder))] = path.lstat().st_size
    return found


@contextmanager
def disk_full_as_error(path: AnyPath, doing: str) -> Iterator[None]:
    """Turn "no space left" into a DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(path, RemotePath):
            raise
        free = shutil.disk_usage(path).free
        raise DiskFullError(
            f"{path}: the disk is full ({free / 1e6:.0f} MB free) while {doing}. Make room, then run the same command again: "
            "it goes on where this one stopped."
        ) from error


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
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def publish(path: AnyPath, data: bytes | memoryview, staging: AnyPath) -> bool:
    """Make `path` exist with `data`, durably, unless the name is taken. True if this call made it.

    Args:
        path: the final name, on the same file system as `staging`.
        staging: the directory for the temporary name, which an object store does not need.
    """
    if isinstance(path, RemotePath) or isinstance(staging, RemotePath):
        assert isinstance(path, RemotePath)
        return objects.put(path, data)
    for folder in (staging, path.parent):
        _make_folder(folder, staging.parent)
    temporary = staging / f"{path.name}.{secrets.token_hex(8)}"
    try:
        write_durably(temporary, data)
        try:
            os.link(temporary, path)
            made = True
        except FileExistsError:
            made = False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise SamiCacheError(
                f"{path}: this file system refuses hard links ({error.strerror}), which the cache needs to commit a file "
                "in one step. Put the cache on a local file system such as ext4 or xfs."
            ) from error
    finally:
        temporary.unlink(missing_ok=True)
    # Another's file too: it may be linked and not yet flushed, and a record that names it must not reach the disk first.
    fsync_directory(path.parent)
    return made


def _make_folder(folder: Path, cache: Path) -> None:
    """Make a folder of a cache unless it is there. Raises SamiCacheError where it is a link, which may lead anywhere."""
    if folder == cache:
        return
    try:
        folder.mkdir()
        fsync_directory(cache)
    except FileExistsError:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise SamiCacheError(
                f"{folder}: expected a folder, found a link or a file; nothing is written through it. Move it away, and put "
                "back the folder it stands for."
            ) from None


def move_aside(path: AnyPath, directory: AnyPath) -> AnyPath:
    """Move `path` into `directory` under a name that is free there; returns the new place. Nothing is deleted.

    Raises FileNotFoundError.
    """
    if isinstance(path, RemotePath) or isinstance(directory, RemotePath):
        assert isinstance(path, RemotePath)
        assert isinstance(directory, RemotePath)
        return objects.move_aside(path, directory)
    for folder in (directory, path.parent):
        _make_folder(folder, directory.parent)
    target = directory / f"{path.parent.name}.{path.name}.{secrets.token_hex(4)}"
    os.rename(path, target)
    for folder in (directory.parent, directory, path.parent):
        fsync_directory(folder)
    return target


def put_back(aside: AnyPath, path: AnyPath) -> None:
    """Give what was moved aside its name again, unless that is taken by now; the place aside keeps it too."""
    if isinstance(path, RemotePath) or isinstance(aside, RemotePath):
        publish(path, read_file(aside, at_most=1 << 31), path)
        return
    with suppress(FileExistsError):
        os.link(aside, path)


def make_hold(path: AnyPath, data: bytes | memoryview, cache: AnyPath) -> list[AnyPath] | None:
    """Make `path` hold `data`; whatever else it held is moved to the cache's quarantine.

    Returns None if it held that already, else where its remains are now.
    """
    if isinstance(path, RemotePath) or isinstance(cache, RemotePath):
        assert isinstance(path, RemotePath)
        assert isinstance(cache, RemotePath)
        remains = objects.make_hold(path, data, cache / "quarantine")
        return None if remains is None else [*remains]
    moved: list[AnyPath] = []
    while not publish(path, data, cache / "tmp"):
        with suppress(DamageError):
            if read_file(path, at_most=len(data)) == data:
                return moved or None
        with suppress(FileNotFoundError):
            moved.append(move_aside(path, cache / "quarantine"))
    return moved
