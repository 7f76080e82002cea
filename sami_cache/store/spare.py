"""`spare.tar`: copies of the files that are written once, at creation, and that no image and no teacher could give back.

The head (zarr.json), the codec's arrays and the listing are a few hundred kilobytes beside which the shards are gigabytes, and
without them the shards mean nothing. Shards need no copy: they can be extracted again.
"""

import re
import tarfile
from collections import Counter
from contextlib import suppress
from io import BytesIO

from sami_cache.errors import DamageError, SamiCacheError, one_line
from sami_cache.store.files import check_seal, names_in, read_file
from sami_cache.store.head import HEAD, parse_attributes
from sami_cache.store.places import AnyPath
from sami_cache.store.shards import MAX_SHARD_BYTES

SPARE = "spare.tar"
_ASKED_RECORDS = 16
_MEMBERS = 32
_OWNER = re.compile(rb'\{"blake3":"[0-9a-f]{64}","cache_id":"([0-9a-f]{64})"')


def pack_spare(files: dict[str, bytes]) -> bytes:
    """An uncompressed tar of `files` (path in the cache: bytes), the same bytes for the same files."""
    sink = BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, BytesIO(files[name]))
    return sink.getvalue()


def read_spare(cache: AnyPath) -> dict[str, bytes]:
    """The copies of the cache at `cache`, as `unpack_spare` finds them. Raises DamageError."""
    path = cache / SPARE
    return unpack_spare(read_file(path, at_most=MAX_SHARD_BYTES), path)


def unpack_spare(data: bytes, path: AnyPath) -> dict[str, bytes]:
    """The copies as far as they can be found; whether each is whole is for the caller to check. Raises DamageError."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
            while (member := tar.next()) is not None and len(files) < _MEMBERS:
                if not member.isreg() or member.size < 0:
                    break
                files[member.name] = data[member.offset_data : member.offset_data + member.size]
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise DamageError(f"{path}: not readable as a tar ({one_line(error)})") from error
    return files


def rightful_id(cache: AnyPath) -> str | None:
    """The cache_id that most of zarr.json, spare.tar, ROOT.json and the first commit records bear; the head's in a tie.

    Each of them proves that it is whole, and a whole one may still be another cache's.
    """
    found: list[str | None] = []
    for read in (lambda: read_file(cache / HEAD), lambda: read_spare(cache)[HEAD]):
        with suppress(DamageError, KeyError):
            found.append(cache_id_of(read()))
    names: set[str] = set()
    with suppress(OSError):
        names = names_in(cache / "commits")
    records = sorted(name for name in names if name.endswith(".json"))[:_ASKED_RECORDS]
    for path in (cache / "ROOT.json", *(cache / "commits" / name for name in records)):
        with suppress(DamageError):
            owner = _OWNER.match(check_seal(read_file(path), path))
            found.append(owner and owner[1].decode())
    counted = Counter(name for name in found if name is not None).most_common(1)
    return counted[0][0] if counted else None


def cache_id_of(head: bytes) -> str | None:
    """The cache_id that the bytes of a zarr.json bear, None if they are no whole head."""
    with suppress(SamiCacheError, KeyError):
        return parse_attributes(head, HEAD)["cache_id"]
    return None
