"""Verification: is every byte of a cache the byte that was committed, and if not, which samples suffer?

Needs no teacher and no images; `pipelines/verify.py` adds the checks that do.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from blake3 import blake3

from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK, FileEntry, Record, root_fields, samples_table
from sami_cache.store.files import ASIDE, digest, hash_file, read_file, reading, size_of, sizes_below
from sami_cache.store.head import HEAD
from sami_cache.store.places import AnyPath
from sami_cache.store.shards import MAX_SHARD_BYTES, ShardFile, crc32c
from sami_cache.store.spare import SPARE, pack_spare, rightful_id, unpack_spare
from sami_cache.store.tables import ParquetRows

LEVELS = ("quick", "default", "deep")
_NOT_CHECKED = {
    "quick": "the bytes of codes and images (only that they are there and how long they are)",
    "default": "whether the codes decode to what their content digests say (--deep)",
}
_ALWAYS_OPEN = (
    "whether the teacher would give these embeddings again (--audit N)",
    "whether the source images are still the same (--sources)",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it was committed."""

    path: str
    """Relative to the cache."""
    what: str
    """What was expected and what was found."""
    shard: int | None = None
    samples: list[str] = field(default_factory=list)
    """Keys of the samples that suffer, where the damage can be narrowed down to samples."""
    foreign: bool = False
    """The file itself should not be there."""


@dataclass(kw_only=True)
class Report:
    """What a verification looked at and what it found."""

    cache: str
    level: str
    cache_id: str | None = None
    sealed: bool = False
    root: str | None = None
    content_root: str | None = None
    shards: int = 0
    samples: int = 0
    failed_samples: int = 0
    bytes_read: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.findings

    @property
    def damaged_shards(self) -> list[int]:
        return sorted({finding.shard for finding in self.findings if finding.shard is not None})


@dataclass
class _Sealed:
    """What the cache was sealed with, nothing where it is not sealed or that is damaged."""

    manifest: ParquetRows | None = None
    records: list[str] = field(default_factory=list)
    """The digest of each shard's record."""
    pinned: bool = False
    """Whether a root from elsewhere is to be met."""


@dataclass
class _ShardResult:
    findings: list[Finding]
    digests: tuple[str, str] | None = None
    """Of the record, and of the content it states. The record itself would fill the memory, over a whole cache."""
    failed: int = 0
    decoded: bool = False
    bytes_read: int = 0


def verify_cache(
    path: AnyPath,
    *,
    level: str = "default",
    expected_root: str | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
    threads: int | None = None,
) -> Report:
    """Check a cache and report.

    Args:
        level: `quick` (presence, sizes, records), `default` (every byte against its digest) or `deep` (every chunk is decoded
            too: finite, per-sample checksums, content root).
        expected_root: a root noted elsewhere; without one this finds accidents, not tampering.
        on_progress: called with (shards done, shards, bytes read so far).

    Raises SamiCacheError if there is no cache at `path`, OSError if a file may not be read. Damage never raises; it is
    reported.
    """
    if level not in LEVELS:
        raise SamiCacheError(f"verification level {level!r} is unknown; choose one of {', '.join(LEVELS)}.")
    report = Report(cache=str(path), level=level)
    report.not_checked = [text for name, text in _NOT_CHECKED.items() if name == level] + list(_ALWAYS_OPEN)
    if expected_root is None and level == "default":
        report.not_checked.append("whether somebody forged files to the same XXH3 (--deep, --root DIGEST)")
    if expected_root is None:
        report.not_checked.append("whether somebody replaced the whole cache by another consistent one (--root DIGEST)")
    try:
        cache = Cache(path)
        owner = rightful_id(path)
        if owner != cache.cache_id:
            raise DamageError(f"is the head of the cache {cache.cache_id}; the other files are of {owner}.")
    except DamageError as error:
        what = str(error).removeprefix(f"{path / HEAD}: ")
        report.findings.append(Finding(path=HEAD, what=f"{what} Nothing else can be checked without it."))
        return report
    report.cache_id, report.shards, report.samples = cache.cache_id, cache.shards, cache.samples
    _check_static(cache, report)
    root, sealed = None, _Sealed(pinned=expected_root is not None)
    try:
        root = cache.root()
        if root is None:
            what = "missing: the cache is not sealed. Run the same `sami-cache extract` command to finish it."
            report.findings.append(Finding(path="ROOT.json", what=what))
        else:
            # A pinned root is over the records, and training reads labels from the manifest.
            manifest = cache.manifest_rows(root)
            sealed.records = manifest.every(cache.layout.shard_samples, "record")
            sealed.manifest = manifest if level == "deep" or sealed.pinned else None
            report.bytes_read += root["manifest"]["size"]
    except DamageError as error:
        name = "ROOT.json" if root is None else "manifest.parquet"
        report.findings.append(Finding(path=name, what=_short(error, cache)))
    report.sealed = root is not None
    results: list[_ShardResult] = []
    with ThreadPoolExecutor(threads or max(4, min(8, os.cpu_count() or 1))) as pool:
        for result in pool.map(lambda shard: _check_shard(cache, shard, level, sealed), range(cache.shards)):
            results.append(result)
            report.findings += result.findings
            report.failed_samples += result.failed
            report.bytes_read += result.bytes_read
            if on_progress:
                on_progress(len(results), cache.shards, report.bytes_read)
    _check_roots(cache, report, root, results, expected_root)
    _check_strays(cache, report)
    return report


def _check_static(cache: Cache, report: Report) -> None:
    """The files written at creation: their bytes, that they are the ones that the cache_id stands for, and their copies."""
    metadata = cache.metadata_files()
    whole = {HEAD: read_file(cache.path / HEAD)}
    for name, entry in cache.files.items():
        try:
            whole[name] = cache.read_static(name)
        except DamageError as error:
            report.findings.append(Finding(path=name, what=_short(error, cache)))
            continue
        report.bytes_read += entry.size
        if metadata.get(name, whole[name]) != whole[name]:
            report.findings.append(Finding(path=name, what="is not the metadata that follows from the head"))
    if not report.findings:
        try:
            _ = cache.codec, Cache(cache.path).listing  # of one opened for it, so that the table does not stay
        except DamageError as error:
            report.findings.append(Finding(path=HEAD, what=str(error)))
    try:
        data = read_file(cache.path / SPARE, at_most=MAX_SHARD_BYTES)
        copies = unpack_spare(data, cache.path / SPARE)
        for name, entry in cache.files.items():
            if not entry.describes(copies.get(name, b"")):
                raise DamageError(f"{SPARE}: its copy of {name} is not the one the cache was made with")
        if data != pack_spare(copies | {HEAD: whole[HEAD]}):
            raise DamageError(f"{SPARE}: is not what was written, beside the copies; or its copy of {HEAD} is another one")
        report.bytes_read += len(data)
    except DamageError as error:
        report.findings.append(Finding(path=SPARE, what=_short(error, cache).removeprefix(f"{SPARE}: ")))


def _check_shard(cache: Cache, shard: int, level: str, sealed: "_Sealed") -> _ShardResult:
    name = cache.record_name(shard)
    try:
        outline = cache.outline(shard)
    except DamageError as error:
        return _ShardResult([Finding(path=name, what=_short(error, cache), shard=shard)])
    failed = sum(status != OK for status in outline.statuses)
    result = _ShardResult([], (outline.digest, outline.content), failed)
    if sealed.records and sealed.records[shard] != outline.digest:
        result.findings.append(Finding(path=name, what="is not the record that the cache was sealed with", shard=shard))
    for file, entry in outline.files.items():
        what, read = _check_file(cache.path / file, entry, level, sealed.pinned)
        result.bytes_read += read
        if what:
            keys = _damaged_samples(cache, shard, file)
            result.findings.append(Finding(path=file, what=what, shard=shard, samples=keys))
    if (level == "deep" or sealed.manifest is not None) and not result.findings:
        try:
            record = cache._read_record(shard)
        except DamageError as error:
            return _ShardResult([Finding(path=name, what=_short(error, cache), shard=shard)])
        numbers = cache.shard_samples(shard)
        if sealed.manifest is not None:
            try:
                same = sealed.manifest.slice(numbers.start, len(numbers)).equals(samples_table(record))
                what = "" if same else f"does not say what {name} says"
            except DamageError as error:
                what = _short(error, cache)
            if what:
                result.findings.append(Finding(path="manifest.parquet", what=what))
        if level == "deep":
            _check_content(cache, record, result)
    return result


def _check_file(path: AnyPath, entry: FileEntry, level: str, pinned: bool) -> tuple[str | None, int]:
    """What is wrong with a file of a shard, and how many of its bytes were read to say so.

    XXH3 finds every accident that BLAKE3 finds, at twice the speed; where somebody may have meant it, BLAKE3 it is.
    """
    try:
        with reading(path):
            size = size_of(path)
        if size != entry.size:
            return f"{size} bytes, its commit record says {entry.size}", 0
        if level == "quick":
            return None, 0
        strong = level == "deep" or pinned
        found = hash_file(path, blake3() if strong else xxhash.xxh3_128())
    except DamageError as error:
        return str(error).partition(": ")[2], 0
    name, expected = ("BLAKE3", entry.blake3) if strong else ("XXH3", entry.xxh3_128)
    if found != expected:
        return f"its {name} is {found[:16]}..., its commit record says {expected[:16]}...", size
    return None, size


def _damaged_samples(cache: Cache, shard: int, name: str) -> list[str]:
    """The keys of the samples whose bytes in file `name` are not the committed ones."""
    path, keys = cache.path / name, []
    try:
        record = cache._read_record(shard)
    except DamageError:  # sealed, and of another format: the file is named, its samples cannot be
        return []
    if not name.startswith("codes/"):
        try:
            data = read_file(path, at_most=2 * record.files[name].size + 1)
        except DamageError:
            data = b""
        for sample in record.samples:
            if sample.jpeg and crc32c(data[sample.jpeg[0] : sum(sample.jpeg[:2])]) != sample.jpeg[2]:
                keys.append(sample.key)
        return list(dict.fromkeys(keys))
    step = cache.layout.chunk_samples
    try:
        with ShardFile(path, cache.layout, record.files[name].size, record.chunk_crc32c) as file:
            for chunk in range(len(record.chunk_crc32c)):
                try:
                    file.read_chunk(chunk, {})
                except DamageError:
                    keys += [sample.key for sample in record.samples[chunk * step : (chunk + 1) * step]]
    except DamageError:  # the whole file or its index: no chunk can be found
        keys = [sample.key for sample in record.samples]
    return list(dict.fromkeys(keys))


def _check_content(cache: Cache, record: Record, result: _ShardResult) -> None:
    name = cache.shard_files(record.shard)[0]

    def finding(what: str, keys: list[str]) -> None:
        result.findings.append(Finding(path=name, what=what, shard=record.shard, samples=keys))

    try:
        codes = cache.read_codes(record.shard)
    except DamageError as error:
        return finding(_short(error, cache), [])
    content = digest(codes.data.cast("B"))
    if content != record.content:
        finding(f"its content is {content[:16]}..., its commit record says {record.content[:16]}...", [])
    if codes.dtype.kind == "f" and not np.isfinite(codes).all():
        bad = ~np.isfinite(codes).all(axis=(1, 2, 3))
        finding("holds NaN or infinity", [record.samples[index].key for index in np.flatnonzero(bad)])
    wrong = [
        sample.key
        for sample, values in zip(record.samples, codes, strict=True)
        if (crc32c(values.tobytes()) != sample.codes_crc32c if sample.status == OK else values.any())
    ]
    if wrong:
        finding("the codes of samples are not the committed ones", wrong)
    result.decoded = not result.findings
    return None


def _check_roots(
    cache: Cache, report: Report, root: dict[str, Any] | None, results: list[_ShardResult], expected_root: str | None
) -> None:
    records = [result.digests for result in results if result.digests]
    if len(records) == cache.shards:
        nothing = FileEntry.of(b"")
        found = root_fields(cache.cache_id, records, cache.samples, report.failed_samples, nothing)
        report.root = found["root"]
        if all(result.decoded for result in results):
            report.content_root = found["content_root"]
        replaced = any(finding.path.startswith("commits/") for finding in report.findings)
        wrong = [name for name in found if name != "manifest" and root and found[name] != root[name]]
        if root and wrong and not replaced:
            what = ", ".join(f"{name} {found[name]}, ROOT.json says {root[name]}" for name in wrong)
            report.findings.append(Finding(path="ROOT.json", what=f"the commit records have {what}"))
    if expected_root and report.root != expected_root:
        what = f"the cache's root is {report.root}, you expect {expected_root}"
        report.findings.append(Finding(path="ROOT.json", what=what))


def _check_strays(cache: Cache, report: Report) -> None:
    """Files that no record names: remains of interrupted writers before sealing, something foreign after."""
    known, sizes = {HEAD, SPARE, "ROOT.json", "manifest.parquet", *cache.files}, sizes_below(cache.path)
    for shard in range(cache.shards):
        if report.sealed or cache.record_name(shard) in sizes:
            known |= {*cache.shard_files(shard), cache.record_name(shard)}
    for name in sorted(sizes.keys() - known):
        if name.startswith(ASIDE):
            continue
        if report.sealed:
            report.findings.append(Finding(path=name, what="belongs to no shard of this cache", foreign=True))
        else:
            report.notes.append(f"{name}: not committed; the next `sami-cache extract` uses or replaces it")
    for folder, meaning in (("tmp", "left by interrupted writers"), ("quarantine", "moved aside by repairs")):
        there = [size for name, size in sizes.items() if name.startswith(f"{folder}/")]
        if there:
            report.notes.append(
                f"{folder}/: {len(there)} files, {sum(there) / 1e6:.1f} MB, {meaning}; delete them when nothing writes here"
            )


def _short(error: Exception, cache: Cache) -> str:
    """The error's text without the path that the finding names already."""
    text = str(error)
    return text.split(": ", 1)[1] if text.startswith(str(cache.path)) and ": " in text else text
