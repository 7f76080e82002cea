"""What the kinds of image source have in common: the interface, and careful handling of files that others made."""

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from sami_cache.errors import ImageError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_ENCODED_BYTES = 1 << 30
"""Files and tar members above this are not read into memory."""

_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]")


class Source(ABC):
    """`len(source)` samples. `read(i)` gives the encoded bytes of sample i and may be called from several threads.

    kind: "folder", "tar" or "parquet", part of a cache's identity. location: what was opened, absolute. keys: unique text,
    one a sample. labels: class numbers or None, one a sample. class_names: the name of each class number, or None.
    Instances can be pickled, and do not change.
    """

    kind: str

    def __init__(self, location: Path, keys: list[str], labels: list[int | None], class_names: list[str] | None = None) -> None:
        self.location = location
        self.keys = keys
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"<{self.kind} source of {len(self)} images at {file_text(self.location)}>"

    def read(self, index: int) -> bytes:
        """The encoded image `index` (0 .. len - 1), unchecked. Raises ImageError with the reason if there is none to be had."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            return self._read(index)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    @abstractmethod
    def _read(self, index: int) -> bytes:
        """The same for an index that is in range; an OSError becomes the reason."""


class Rearranged(Source):
    """Some samples of another source in an order of their own, with labels of their own."""

    def __init__(self, source: Source, indices: Sequence[int], labels: list[int | None], class_names: list[str] | None) -> None:
        """`indices`: which samples of `source`, in order; `labels`: of these."""
        super().__init__(source.location, [source.keys[index] for index in indices], labels, class_names)
        self.kind = source.kind
        self._source, self._indices = source, indices

    def _read(self, index: int) -> bytes:
        return self._source._read(self._indices[index])


def file_text(name: str | os.PathLike[str]) -> str:
    """A file name as valid UTF-8 on one line; different names stay different."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] == "\\":
            return r"\\"
        return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"  # Python keeps stray bytes as U+DC80..DCFF

    return _UNSAFE.sub(escape, os.fspath(name))


def open_regular(path: str) -> int:
    """A descriptor of a regular file. A pipe or a device is opened without waiting for it, and refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError("not a regular file")
    return descriptor


def check_encoded_size(size: int) -> None:
    if size > MAX_ENCODED_BYTES:
        raise ImageError(f"too large: expected at most {MAX_ENCODED_BYTES} encoded bytes, found {size}")
