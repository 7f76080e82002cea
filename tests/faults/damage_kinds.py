"""The thirty kinds of damage of test_damage.py: what happens to files on real disks, in copies, and by hand."""

import filecmp
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sami_cache.store.cache import Cache
from sami_cache.store.shards import crc32c

SHARDS = 3
"""Of every cache here."""
FOLDERS = ("codes", "images", "commits", "basis", "mean", "step")
Bytes = Callable[[bytes, random.Random], bytes]


class Subject:
    """A cache to damage, and those that files may come from."""

    def __init__(self, path: Path, stock: Path, rng: random.Random, number: int) -> None:
        """`number` chooses the class of file, so that every kind meets every class."""
        self.path, self.stock, self.rng = path, stock, rng
        classes: dict[str, list[str]] = {}
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            classes.setdefault(file_class(str(file.relative_to(path))), []).append(str(file.relative_to(path)))
        self.name = rng.choice(classes[sorted(classes)[number % len(classes)]])
        self.shard, self.other = rng.sample(range(SHARDS), 2)

    def shard_files(self, shard: int) -> list[str]:
        return [*Cache(self.path).shard_files(shard), f"commits/{shard:06d}.json"]

    def copy(self, source: str, names: list[str]) -> set[str]:
        """Overwrite files by those of another cache."""
        for name in names:
            shutil.copyfile(self.stock / source / name, self.path / name)
        return set(names)


def file_class(name: str) -> str:
    """The folder or file that changes after creation, else `creation`."""
    first = name.partition("/")[0]
    later = first in ("codes", "images", "commits", "manifest.parquet", "ROOT.json") and not name.endswith("zarr.json")
    return first if later else "creation"


# ---- each kind damages the subject and returns the names of the files that verify must name


def other_bytes(change: Bytes) -> Callable[[Subject], set[str]]:
    def damage(subject: Subject) -> set[str]:
        file = subject.path / subject.name
        data = file.read_bytes()
        changed = change(data, subject.rng)
        assert changed != data
        file.write_bytes(changed)
        return {subject.name}

    return damage


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for offset in rng.sample(range(len(data)), min(len(data), rng.choice((1, 2, 16)))):
        changed[offset] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, rng.randrange(len(data))))]


def extended(data: bytes, rng: random.Random) -> bytes:
    count = rng.randrange(1, 5000)
    return data + rng.choice((rng.randbytes(count), bytes(count), data))


def tail_zeroed(data: bytes, rng: random.Random) -> bytes:
    kept = rng.randrange(len(data.rstrip(b"\0")))
    return data[:kept] + bytes(len(data) - kept)


def head_zeroed(data: bytes, rng: random.Random) -> bytes:
    lost = rng.randrange(len(data) - len(data.lstrip(b"\0")) + 1, len(data) + 1)
    return bytes(lost) + data[lost:]


def sector_zeroed(data: bytes, rng: random.Random) -> bytes:
    starts = [start for start in range(0, len(data), 512) if any(data[start : start + 512])]
    start = rng.choice(starts)
    return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]


def randomised(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(data))


def reordered(data: bytes, rng: random.Random) -> bytes:
    cut = rng.randrange(1, len(data))
    return data[cut:] + data[:cut]


def shifted(data: bytes, rng: random.Random) -> bytes:
    """One byte slipped in, all others moved up by one, the last one lost."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 255]) + data[place:-1]


def replaced(make: Callable[[Subject, Path], object]) -> Callable[[Subject], set[str]]:
    def damage(subject: Subject) -> set[str]:
        file = subject.path / subject.name
        file.unlink()
        make(subject, file)
        return {subject.name}

    return damage


def link_to_another(subject: Subject, file: Path) -> None:
    file.symlink_to(subject.path / ("ROOT.json" if subject.name == "listing.parquet" else "listing.parquet"))


def grown(subject: Subject) -> set[str]:
    os.truncate(subject.path / subject.name, 1 << 40)  # sparse: nothing is written
    return {subject.name}


def read_only(subject: Subject) -> set[str]:
    named = other_bytes(flipped)(subject)
    (subject.path / subject.name).chmod(0o444)
    return named


def swap(subject: Subject, pairs: list[tuple[str, str]]) -> None:
    for one, two in pairs:
        for source, target in ((one, "tmp/swap"), (two, one), ("tmp/swap", two)):
            os.rename(subject.path / source, subject.path / target)


def files_swapped(subject: Subject) -> set[str]:
    pair = subject.rng.choice(list(zip(subject.shard_files(subject.shard), subject.shard_files(subject.other), strict=True)))
    swap(subject, [pair])
    return set(pair)


def shards_swapped(subject: Subject) -> set[str]:
    pairs = list(zip(subject.shard_files(subject.shard), subject.shard_files(subject.other), strict=True))
    swap(subject, pairs)
    return set(pairs[-1])  # the records are in the wrong place; all else fits the records


def chunks_swapped(subject: Subject) -> set[str]:
    """Index and checksums of the file fit: only the record knows which chunk belongs where."""
    cache, name = Cache(subject.path), subject.shard_files(subject.shard)[0]
    data, border = (subject.path / name).read_bytes(), -cache.layout.index_bytes
    index = np.frombuffer(data[border:-4], "<u8").reshape(-1, 2).copy()
    pair = subject.rng.sample(range(len(cache.shard_samples(subject.shard))), 2)
    index[pair] = index[pair[::-1]]
    table = index.tobytes()
    (subject.path / name).write_bytes(data[:border] + table + crc32c(table).to_bytes(4, "little"))
    return {name}


def overwritten_by_neighbour(subject: Subject) -> set[str]:
    place = subject.rng.randrange(3)
    source, target = (subject.shard_files(shard)[place] for shard in (subject.other, subject.shard))
    shutil.copyfile(subject.path / source, subject.path / target)
    return {target}


def duplicated(subject: Subject) -> set[str]:
    file = Path(subject.name)
    place, number = file.parent, subject.rng.randrange(SHARDS, 100)
    new = str(place / subject.rng.choice((f"{number}.0.0.0", f"{number:06d}.arrow", f"{number:06d}.json", f"{file.name}.bak")))
    shutil.copyfile(subject.path / subject.name, subject.path / new)
    return {new}


def of_another_cache(subject: Subject) -> set[str]:
    if filecmp.cmp(subject.path / subject.name, subject.stock / "other" / subject.name, shallow=False):
        subject.name = "listing.parquet"  # arrays of one shape have the same zarr.json in both
    return subject.copy("other", [subject.name])


def shard_of_other_images(subject: Subject) -> set[str]:
    subject.copy(f"older{subject.shard}", subject.shard_files(subject.shard))
    return {f"commits/{subject.shard:06d}.json"}  # the record is not the sealed one; the files are the record's


def shard_of_another_cache(subject: Subject) -> set[str]:
    subject.copy("other", subject.shard_files(subject.shard))
    return {f"commits/{subject.shard:06d}.json"}


def record_rolled_back(subject: Subject) -> set[str]:
    names = subject.shard_files(subject.shard)
    subject.copy(f"older{subject.shard}", names[-1:])
    return set(names)  # an older record does not fit the files either


def file_rolled_back(subject: Subject) -> set[str]:
    return subject.copy(f"older{subject.shard}", [subject.rng.choice(subject.shard_files(subject.shard)[:-1])])


def seal_rolled_back(subject: Subject) -> set[str]:
    names = subject.rng.choice((["manifest.parquet"], ["ROOT.json"], ["manifest.parquet", "ROOT.json"]))
    subject.copy(f"older{subject.shard}", names)
    if len(names) == 2:  # a seal that is whole in itself: the shard that it was not made for is the odd one out
        return {f"commits/{subject.shard:06d}.json"}
    return {"manifest.parquet", *names}  # which is the one that ROOT.json names


def two_at_once(subject: Subject) -> set[str]:
    files = sorted(str(file.relative_to(subject.path)) for file in subject.path.rglob("*") if file.is_file())
    files.remove("zarr.json")  # while the head is damaged, nothing else is checked
    damaged = subject.rng.sample(files, 2)
    if "spare.tar" in damaged:  # with the copy of a file damaged too, nothing can mend that file
        damaged = ["spare.tar", subject.rng.choice([name for name in files if file_class(name) != "creation"])]
    for subject.name in damaged:
        SINGLE[subject.rng.choice(list(SINGLE))](subject)
    return set(damaged)


def folder_gone(subject: Subject) -> set[str]:
    folder = subject.path / subject.rng.choice(FOLDERS)
    names = {str(file.relative_to(subject.path)) for file in folder.iterdir()}
    shutil.rmtree(folder)
    return names


def shard_gone(subject: Subject) -> set[str]:
    names = subject.shard_files(subject.shard)
    for name in names:
        (subject.path / name).unlink()
    return set(names)


SINGLE: dict[str, Callable[[Subject], set[str]]] = {
    "bits flipped": other_bytes(flipped),
    "truncated": other_bytes(truncated),
    "extended": other_bytes(extended),
    "tail zeroed": other_bytes(tail_zeroed),
    "head zeroed": other_bytes(head_zeroed),
    "sector zeroed": other_bytes(sector_zeroed),
    "random bytes of the same size": other_bytes(randomised),
    "bytes reordered": other_bytes(reordered),
    "bytes shifted by one": other_bytes(shifted),
    "deleted": replaced(lambda subject, file: None),
    "a folder in its place": replaced(lambda subject, file: file.mkdir()),
    "a FIFO in its place": replaced(lambda subject, file: os.mkfifo(file)),
    "a dangling link in its place": replaced(lambda subject, file: file.symlink_to("nothing")),
    "a link to another file in its place": replaced(link_to_another),
    "grown beyond the memory": grown,
    "damaged and read-only": read_only,
}
KINDS = SINGLE | {
    "two shards' files swapped": files_swapped,
    "two whole shards swapped": shards_swapped,
    "two chunks of a shard swapped": chunks_swapped,
    "overwritten by another shard's file": overwritten_by_neighbour,
    "copied to a name of no shard": duplicated,
    "replaced by another cache's file": of_another_cache,
    "a shard with its record of other images": shard_of_other_images,
    "a shard with its record of other settings": shard_of_another_cache,
    "a record rolled back": record_rolled_back,
    "codes or images rolled back": file_rolled_back,
    "manifest, root or both rolled back": seal_rolled_back,
    "two files at once": two_at_once,
    "a whole folder gone": folder_gone,
    "a whole shard gone": shard_gone,
}
