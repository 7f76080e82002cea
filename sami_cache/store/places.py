"""Where a cache lies: a folder, or a prefix in an object store.

A `RemotePath` stands wherever the store layer holds a `Path`; what touches the bytes (`files.py`) tells the two apart.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sami_cache.errors import SamiCacheError

if TYPE_CHECKING:
    from sami_cache.store.local_copies import LocalCopies

SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class RemotePath:
    """A place in an object store, such as `s3://bucket/prefix/cache.zarr`. Cheap and picklable; nothing is connected yet."""

    scheme: str
    bucket: str
    key: str = ""
    """Without slashes at its ends; empty for the bucket itself."""
    copies: "LocalCopies | None" = field(default=None, compare=False, repr=False)
    """Where training keeps local copies of what lies below; None: in the user's cache folder."""

    def __truediv__(self, name: str) -> "RemotePath":
        return replace(self, key="/".join(part for part in (*self.key.split("/"), *name.split("/")) if part))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return replace(self, key=self.key.rpartition("/")[0])

    def resolve(self) -> "RemotePath":
        """Itself: a URL means the same everywhere."""
        return self

    absolute = resolve


AnyPath = Path | RemotePath


def parse_place(text: str | Path | RemotePath) -> AnyPath:
    """The place that a command line or a setting names. Raises SamiCacheError for a URL that no cache can be at."""
    if not isinstance(text, str):
        return text
    match = _URL.fullmatch(text)
    if match is None:
        return Path(text)
    scheme, (bucket, _, key) = match[1], match[2].partition("/")
    if scheme not in SCHEMES:
        raise SamiCacheError(
            f"{text}: caches lie in folders, or at s3://, gs:// or az://BUCKET/PREFIX; {scheme}:// is not known."
        )
    if not bucket or any(part in (".", "..") for part in key.split("/")):
        raise SamiCacheError(f"{text}: expected {scheme}://BUCKET/PREFIX, without parts that are . or ..")
    return RemotePath(scheme, bucket) / key


def local_only(path: AnyPath, doing: str) -> Path:
    """`path` if it is a folder's. Raises SamiCacheError where `doing` needs links, which object stores do not have."""
    if isinstance(path, RemotePath):
        raise SamiCacheError(
            f"{path}: {doing} links files, which an object store cannot. Copy the cache to a local disk first (`aws s3 cp "
            "--recursive`, `rclone copy`: its files are the same there), and the result back."
        )
    return path
