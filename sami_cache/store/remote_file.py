"""One object whose size is known, read by ranges, from memory, or from a local copy."""

import threading
from concurrent.futures import Future
from pathlib import Path

from sami_cache.errors import DamageError
from sami_cache.store import objects
from sami_cache.store.local_copies import LocalCopies, default_folder, read_copy
from sami_cache.store.places import RemotePath

_DOWNLOADS = threading.BoundedSemaphore(8)
"""At a time: enough to fill a fast line, few enough that the first ones come soon."""


class RemoteFile:
    """What `files.OpenFile` is for an object. Thread-safe."""

    def __init__(self, path: RemotePath, size: int) -> None:
        """Asks for nothing yet: the first read tells whether the object is there and of this size."""
        self.path, self.size = path, size
        self._whole: bytes | None = None
        self._coming: Future[Path | None] | None = None

    def read_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, fewer at the end. Raises DamageError, StoreError, DiskFullError."""
        if self._whole is not None:
            return self._whole[offset : offset + count]
        copy = self._coming.result() if self._coming is not None else None
        data = None if copy is None else read_copy(copy, offset, count)
        if data is not None:
            return data
        try:
            data, size = objects.read_range(self.path, offset, count)
        except FileNotFoundError:
            raise objects.missing(self.path) from None
        self._check_size(size)
        return data

    def expect(self, digest: str | None) -> None:
        """All of it will be read. With its XXH3-128: by a training, for which a local copy begins to come."""
        if self._whole is not None or self._coming is not None:
            return
        if digest is None:
            try:
                whole, size, _ = objects.read(self.path, self.size)
            except FileNotFoundError:
                raise objects.missing(self.path) from None
            self._check_size(size)
            self._whole = whole
        else:
            self._coming = Future()
            threading.Thread(target=self._fetch, args=(self._coming, digest), name="fetch", daemon=True).start()

    def _fetch(self, answer: "Future[Path | None]", digest: str) -> None:
        copies = self.path.copies or LocalCopies(default_folder())
        try:
            with _DOWNLOADS:
                answer.set_result(copies.fetch(self.path, self.size, digest))
        except BaseException as error:  # whoever reads is told
            answer.set_exception(error)

    def _check_size(self, size: int) -> None:
        if size != self.size:
            raise DamageError(f"{self.path}: {size} bytes, its commit record says {self.size}")
