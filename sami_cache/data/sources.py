"""Where encoded images come from: a folder of files, tar shards in webdataset layout, Parquet in Hugging Face layout.

A source is a numbered list of samples whose keys and order depend on names and contents alone, so that the same data gives
the same cache on every machine. Only listings are held in memory; bytes are read when asked for. Links to files and folders
are followed, hidden files (a leading dot) are skipped, and whatever is no regular file is refused without being waited for.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from sami_cache.data.parquet_source import ParquetSource
from sami_cache.data.source import IMAGE_EXTENSIONS, MAX_ENCODED_BYTES, Source, check_encoded_size, file_text, open_regular
from sami_cache.data.tar_source import TarSource
from sami_cache.errors import SamiCacheError

__all__ = ["FolderSource", "ParquetSource", "Source", "TarSource", "open_source"]

_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def open_source(path: Path, *, kind: str | None = None) -> Source:
    """The images at `path`: a .tar or .parquet file, or a folder that holds tars, Parquet files or images at any depth.

    `kind` ("folder", "tar" or "parquet") settles what a folder of several sorts is read as. Raises SamiCacheError where
    there is nothing to read, more than one sort to choose from, or a damaged or compressed archive.
    """
    if kind is not None and kind not in _KINDS:
        raise SamiCacheError(f"unknown source kind {kind!r}: expected one of {', '.join(_KINDS)}")
    path = Path(path).absolute()
    where = file_text(path)
    if not path.exists():
        raise SamiCacheError(
            f"no images: {where} does not exist. The default is $SAMI_DATA, or data/ in the current folder; "
            "name another with --data DIR"
        )
    found = _find(path)
    if found["folder"] == [""]:
        raise SamiCacheError(f"{where} is one image: expected a folder of images, a .tar or a .parquet file")
    if found["compressed tar"] and kind in (None, "tar"):
        name = file_text(path / found["compressed tar"][0])
        raise SamiCacheError(
            f"{name} is compressed, and a compressed tar can only be read from its start. Decompress it first: "
            f"`gunzip {name}` for gzip, and give the .tar"
        )
    present = [name for name in _KINDS if found[name] and kind in (None, name)]
    if not present:
        wanted = " or ".join(_EXTENSIONS[name] for name in _KINDS if kind in (None, name))
        raise SamiCacheError(f"no images in {where}: looked for {wanted}, at any depth, hidden names left out")
    if len(present) > 1:
        counts = ", ".join(f"{len(found[name])} {_EXTENSIONS[name]}" for name in present)
        raise SamiCacheError(
            f"{where} holds more than one sort of source: {counts}. Say which with --source-kind {' or '.join(present)}"
        )
    return _KINDS[present[0]](path, found[present[0]])


class FolderSource(Source):
    """Image files in folders. Key: the path below the root with "/"; order: by the keys' BLAKE3, as good as random.

    Sorted by name, the images of a class would lie side by side, and a window of a few shards would hold a few classes.

    An image's class is the folder it lies in, by its path below the root ("train/cat"); classes are numbered by sorted name.
    Images at the root itself have no class. In keys and class names a backslash is written `\\\\`, and bytes that are not
    UTF-8 and control characters `\\xNN`, which keeps different names different.
    """

    kind = "folder"

    def __init__(self, root: Path, names: list[str]) -> None:
        names = sorted(names, key=lambda name: blake3(file_text(name).encode()).digest())
        keys = [file_text(name) for name in names]
        folders = [key.rpartition("/")[0] for key in keys]
        class_names = sorted(set(folders) - {""})
        number: dict[str, int | None] = {name: i for i, name in enumerate(class_names)}
        super().__init__(root, keys, [number.get(folder) for folder in folders], class_names or None)
        self._unlike_key = {i: name for i, (name, key) in enumerate(zip(names, keys, strict=True)) if name != key}

    def _read(self, index: int) -> bytes:
        descriptor = open_regular(os.path.join(self.location, self._unlike_key.get(index, self.keys[index])))
        with open(descriptor, "rb") as file:
            check_encoded_size(os.fstat(descriptor).st_size)
            return file.read(MAX_ENCODED_BYTES)


_KINDS: dict[str, type[FolderSource | TarSource | ParquetSource]] = {
    "folder": FolderSource,
    "tar": TarSource,
    "parquet": ParquetSource,
}
_EXTENSIONS = {"folder": " ".join(IMAGE_EXTENSIONS), "tar": ".tar", "parquet": ".parquet"}


def _find(path: Path) -> dict[str, list[str]]:
    """Sort -> sorted paths below `path`; a `path` that is itself a file is the empty path."""
    found: dict[str, list[str]] = {"folder": [], "tar": [], "parquet": [], "compressed tar": []}
    for name in _walk(str(path)) if path.is_dir() else [""]:
        if sort := _sort(name or path.name):
            found[sort].append(name)
    for names in found.values():
        names.sort(key=file_text)
    return found


def _sort(name: str) -> str | None:
    extension = name[name.rfind(".") :].lower()
    if extension in IMAGE_EXTENSIONS:
        return "folder"
    if extension in (".tar", ".parquet"):
        return extension[1:]
    return "compressed tar" if _COMPRESSED_TAR.search(name) else None


def _walk(root: str) -> Iterator[str]:
    """Every entry below `root` that is no folder, by relative path; each folder once, however many links lead to it.

    Real folders are walked before links, and links in sorted order, so that the path under which a folder counts does not
    depend on the order in which the disk lists it.
    """
    seen: set[tuple[int, int]] = set()
    todo, links = [""], list[str]()
    while todo or links:
        if not todo:
            links.sort(key=file_text)
            todo, links = [links[0]], links[1:]
        folder = todo.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = os.scandir(os.path.join(root, folder))
        except OSError as error:
            place = file_text(os.path.join(root, folder))
            raise SamiCacheError(f"cannot list {place}: {error.strerror}. Make it readable or move it away") from error
        prefix = folder + "/" if folder else ""
        with entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    todo.append(prefix + entry.name)
                elif entry.is_symlink() and _leads_to_folder(entry):
                    links.append(prefix + entry.name)
                else:
                    yield prefix + entry.name


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
