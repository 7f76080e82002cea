"""Local copies of shard files that lie in an object store: a folder of limited size, shared by all processes of a machine.

A copy is named after its content, written under another name, compared with the commit record, and renamed. Whatever takes
the room that another needs goes, the longest unused first; a reader that finds its copy gone reads from the store.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sami_cache.errors import DamageError, DiskFullError, SamiCacheError
from sami_cache.store import objects
from sami_cache.store.places import RemotePath

DEFAULT_BYTES = 50_000_000_000
_PART = ".part"
_LOCK = "lock"
_DOWNLOADS = 3
_BLOCK = 1 << 20


def default_folder() -> Path:
    """Below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sami-cache" / "shards"


@dataclass(frozen=True)
class LocalCopies:
    """A folder of local copies. Safe to use from any number of threads and processes."""

    folder: Path
    limit: int = DEFAULT_BYTES
    """Bytes that all copies together may take, those that are just being written too."""

    def fetch(self, path: RemotePath, size: int, digest: str) -> Path | None:
        """A local copy of `path`, made if there is none or it is damaged; None where it is larger than all of the room.

        Args:
            size, digest: what the commit record says: bytes, XXH3-128.

        Raises DamageError where the object is not what was committed, DiskFullError, StoreError.
        """
        final = self.folder / f"{digest}-{size}"
        if self._is_whole(final, size, digest):
            return final
        if size > self.limit:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        part = final.with_name(final.name + _PART)
        with _locked(part) as descriptor:
            try:
                whole = self._is_whole(final, size, digest)  # whoever had the lock before may have fetched it
                if not whole and self._make_room(descriptor, part, size):
                    _download(path, descriptor, size, digest)
                    with _locked(self.folder / _LOCK):  # who counts meanwhile might meet it under neither name
                        os.rename(part, final)
                    return final
                part.unlink()
                return final if whole else None
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def check_room(self, cache: RemotePath, shards: int) -> None:
        """Raise SamiCacheError unless so many shards of a cache fit: of fewer, each would be fetched again and again."""
        sizes = [objects.sizes_below(cache / folder) for folder in ("codes", "images")]
        largest = sum(max(files.values(), default=0) for files in sizes)
        if shards * largest > self.limit:
            raise SamiCacheError(
                f"--shard-cache-size: {self.limit / 1e6:.1f} MB for local copies in {self.folder}, but {shards} shards of up "
                f"to {largest / 1e6:.1f} MB are in use at a time, three windows. Give at least {shards * largest / 1e6:.1f} MB."
            )

    def _is_whole(self, path: Path, size: int, digest: str) -> bool:
        """Whether the copy is there and right; marks it as used. To look brings it into memory, where it is wanted next."""
        hasher = xxhash.xxh3_128()
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != size:
                    return False
                while block := file.read(_BLOCK):
                    hasher.update(block)
            os.utime(path)
        except OSError:  # gone, or on bad sectors: fetched again either way
            return False
        return hasher.hexdigest() == digest

    def _make_room(self, descriptor: int, part: Path, size: int) -> bool:
        """Reserve `size` bytes for a part, at the cost of the copies that were not used for the longest time.

        False where the limit does not allow it, for all the room is taken by parts. Raises DiskFullError.
        """
        with _locked(self.folder / _LOCK):
            os.ftruncate(descriptor, 0)
            others = sorted(self._files(part))
            used = sum(count for _, count, _ in others)
            while True:
                if used + size <= self.limit:
                    try:
                        os.posix_fallocate(descriptor, 0, size)
                        return True
                    except OSError as error:
                        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                            raise
                        if not others:
                            raise DiskFullError(
                                f"{self.folder}: the disk is full, there is no room for a local copy of {size / 1e6:.0f} MB. "
                                "Make room, or give --shard-cache another place; a training goes on with --resume."
                            ) from error
                if not others:
                    return False
                _, count, path = others.pop(0)
                used -= count if _remove(path) else 0

    def _files(self, own: Path) -> Iterator[tuple[float, int, Path]]:
        """(when last used, bytes, path) of all copies and parts but `own`."""
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name not in (_LOCK, own.name) and entry.is_file(follow_symlinks=False):
                    yield entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)


def read_copy(path: Path, offset: int, count: int) -> bytes | None:
    """Bytes of a local copy, None where it has made way for others meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.pread(descriptor, count, offset)
    finally:
        os.close(descriptor)


def _download(path: RemotePath, descriptor: int, size: int, digest: str) -> None:
    """Write an object to a file, from its beginning. Raises DamageError unless these are the bytes that were committed."""
    found = 0, ""
    for _ in range(_DOWNLOADS):
        hasher, offset = xxhash.xxh3_128(), 0
        try:
            for piece in objects.pieces(path):
                hasher.update(piece)
                if offset + len(piece) <= size:  # or else it is not the file, and must not take room that was not made
                    _write(descriptor, piece, offset)
                offset += len(piece)
        except FileNotFoundError:
            raise objects.missing(path) from None
        found = offset, hasher.hexdigest()
        if found == (size, digest):
            return
    raise DamageError(
        f"{path}: {found[0]} bytes of XXH3 {found[1][:16]}... came, its commit record says {size} of {digest[:16]}.... "
        "`sami-cache verify --repair` mends what the images can mend."
    )


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _remove(path: Path) -> bool:
    """Remove a copy, or the part of a process that has ended. False for a part that is being written, or is done now."""
    if path.name.endswith(_PART):
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink()
            return True
        return False  # it has become a copy meanwhile, and takes its room as that
    path.unlink(missing_ok=True)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of the file `path`, made if need be, which nobody else has meanwhile. The lock ends with its process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Renamed or removed while we waited, it is another file that has the name.
            if _is_at(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
