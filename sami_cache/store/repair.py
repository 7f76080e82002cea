"""Repair, as far as it needs neither images nor teacher: what is damaged makes way, what has a copy is put back."""

from contextlib import suppress

from sami_cache.errors import DamageError
from sami_cache.store.cache import Cache
from sami_cache.store.files import exists, make_hold, move_aside, put_back, read_file
from sami_cache.store.head import HEAD
from sami_cache.store.places import AnyPath
from sami_cache.store.spare import SPARE, cache_id_of, pack_spare, read_spare, rightful_id


def quarantine_shard(cache: Cache, shard: int) -> list[AnyPath]:
    """Move a shard's record and files to quarantine/, so that it is to be extracted again; returns where they are now.

    The record goes first: from then on the shard is uncommitted, whatever interrupts the rest. Files of a commit that another
    makes meanwhile stay.
    """
    cache.record.cache_clear()
    record, quarantine, moved = cache.record_path(shard), cache.path / "quarantine", []
    with suppress(FileNotFoundError):
        moved.append(move_aside(record, quarantine))
    for name in cache.shard_files(shard):
        path = cache.path / name
        if exists(record) or not exists(path):
            continue
        with suppress(FileNotFoundError):
            aside = move_aside(path, quarantine)
            if not exists(record):
                moved.append(aside)
                continue
            put_back(aside, path)
    return moved


def restore_static(path: AnyPath) -> tuple[list[str], list[AnyPath]]:
    """Put back what was written at creation and is not as it was: (files put back, where their remains are now).

    Needs neither images nor teacher. Raises DamageError where neither a file nor its copy is whole.
    """
    copies: dict[str, bytes] = {}
    with suppress(DamageError):
        copies = read_spare(path)
    restored: list[str] = []
    moved: list[AnyPath] = []

    def restore(name: str, data: bytes) -> None:
        aside = make_hold(path / name, data, path)
        if aside is not None:
            restored.append(name)
            moved.extend(aside)

    owner, heads = rightful_id(path), [copies.get(HEAD, b"")]
    with suppress(DamageError):
        heads.insert(0, read_file(path / HEAD))
    right = [head for head in heads if owner is not None and cache_id_of(head) == owner]
    if not right:
        raise _lost(path, [HEAD])
    restore(HEAD, right[0])
    cache = Cache(path)
    whole = {HEAD: right[0]}
    for name in cache.files:
        with suppress(DamageError):
            whole[name] = cache.read_static(name)
        if name not in whole and cache.files[name].describes(copies.get(name, b"")):
            whole[name] = copies[name]
    if lost := sorted(cache.files.keys() - whole.keys()):
        raise _lost(path, lost)
    for name, data in {**whole, SPARE: pack_spare(whole)}.items():
        restore(name, data)
    return restored, moved


def _lost(path: AnyPath, names: list[str]) -> DamageError:
    return DamageError(
        f"{path}: {', '.join(names)} cannot be mended: the images do not tell what was in there, and {SPARE} holds no whole "
        "copy. Extract into a new cache, or restore the files from a backup."
    )
