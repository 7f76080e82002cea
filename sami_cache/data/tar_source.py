"""Images in tar shards, webdataset layout."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from sami_cache.data.source import IMAGE_EXTENSIONS, Source, check_encoded_size, file_text, open_regular
from sami_cache.errors import ImageError, SamiCacheError, one_line


class TarSource(Source):
    """Tar files in webdataset layout, one sample an image member.

    Key: the tar's path below the root (of a single tar its name), "/", the member's name. Order: tars by path, members as
    they lie in the file, so that reading is sequential. Of members with the same name the last counts, as in `tar -x`. Links,
    sparse members and hidden names are left out. Nothing is unpacked: a name such as ../x is only a name.

    Members that agree up to the first dot of their file name belong together: the label is the integer in `.cls`, or that under
    "label" or "cls" in `.json`.
    """

    kind = "tar"

    def __init__(self, root: Path, names: list[str]) -> None:
        keys: list[str] = []
        labels: list[int | None] = []
        places: list[tuple[int, int, int]] = []
        self._tars = [os.path.join(root, name) if name else str(root) for name in names]
        for number, tar in enumerate(self._tars):
            prefix = file_text(names[number] or root.name)
            for member, offset, size, label in _index_tar(tar):
                keys.append(f"{prefix}/{file_text(member)}")
                labels.append(label)
                places.append((number, offset, size))
        if not keys:
            raise SamiCacheError(
                f"no images in {file_text(root)}: its {len(names)} tars hold no {' '.join(IMAGE_EXTENSIONS)} members"
            )
        super().__init__(root, keys, labels)
        self._places = np.array(places, dtype=np.int64)

    def _read(self, index: int) -> bytes:
        number, offset, size = self._places[index].tolist()
        check_encoded_size(size)
        descriptor = open_regular(self._tars[number])
        try:
            return _read_at(descriptor, offset, size)
        finally:
            os.close(descriptor)


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    if len(data) < size:
        raise ImageError(f"the tar ends early: expected {size} bytes at {offset}, found {len(data)}")
    return data


def _index_tar(path: str) -> list[tuple[str, int, int, int | None]]:
    """Name, offset, size and label of every image member, in file order, from one pass over the headers."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with open(open_regular(path), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
                if member.size < 0 or tar.offset < member.offset_data:  # tarfile would go round in circles
                    raise tarfile.ReadError(f"byte {member.offset}: the header gives a size of {member.size}")
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or member.issparse() or name.startswith("."):
                    continue
                sample = f"{folder}/{name.partition('.')[0]}"
                extension = name[name.rfind(".") :].lower()
                if extension in IMAGE_EXTENSIONS:
                    images.pop(member.name, None)
                    images[member.name] = member.offset_data, member.size, sample
                elif extension in (".cls", ".json") and member.size < 1 << 20:
                    label = _parse_label(os.pread(file.fileno(), member.size, member.offset_data), extension)
                    if label is not None:
                        labels[sample] = label
            # tarfile takes a damaged header for the end; the true end is a block of zeros
            if os.pread(file.fileno(), 512, tar.offset) != bytes(512):
                raise tarfile.ReadError(f"byte {tar.offset}: expected a header or the end mark of zeros, found neither")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError, ImageError) as error:
        raise SamiCacheError(
            f"{file_text(path)} is damaged or truncated: {one_line(error)}. Fetch it again, or move it away to go on without it"
        ) from error
    return [(name, offset, size, labels.get(sample)) for name, (offset, size, sample) in images.items()]


def _parse_label(data: bytes, extension: str) -> int | None:
    try:
        value: Any = json.loads(data) if extension == ".json" else int(data)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None
