"""Verification: is every byte of a cache the byte that was committed, and if not, which samples suffer?

Needs no teacher and no images; `pipelines/verify.py` adds the checks that do.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store.cache import Cache, samples_table
from sami_cache.store.commits import OK, Record, merkle_root
from sami_cache.store.files import digest
from sami_cache.store.shards import ShardFile, crc32c

LEVELS = ("quick", "default", "deep")
_NOT_CHECKED = {
    "quick": "the bytes of codes, images and manifest (only that they are there and how long they are)",
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
class _ShardResult:
    findings: list[Finding]
    record: Record | None = None
    content: str | None = None
    bytes_read: int = 0


def verify_cache(
    path: Path,
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

    Raises SamiCacheError if there is no cache at `path`. Damage never raises; it is reported.
    """
    if level not in LEVELS:
        raise SamiCacheError(f"verification level {level!r} is unknown; choose one of {', '.join(LEVELS)}.")
    report = Report(cache=str(path), level=level)
    report.not_checked = [text for name, text in _NOT_CHECKED.items() if name == level] + list(_ALWAYS_OPEN)
    if expected_root is None:
        report.not_checked.append("whether somebody replaced the whole cache by another consistent one (--root DIGEST)")
    if not (path / "zarr.json").exists() and (path / "commits").is_dir():
        report.findings.append(Finding(path="zarr.json", what="missing; nothing else can be checked without it"))
        return report
    try:
        cache = Cache(path)
    except DamageError as error:
        report.findings.append(Finding(path="zarr.json", what=f"{error} Nothing else can be checked without it."))
        return report
    report.cache_id, report.shards, report.samples = cache.cache_id, cache.shards, cache.samples
    _check_static(cache, report)
    try:
        root = cache.root()
    except DamageError as error:
        report.findings.append(Finding(path="ROOT.json", what=str(error)))
        root = None
    report.sealed = root is not None
    results: list[_ShardResult] = []
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for result in pool.map(lambda shard: _check_shard(cache, shard, level), range(cache.shards)):
            results.append(result)
            report.bytes_read += result.bytes_read
            if on_progress:
                on_progress(len(results), cache.shards, report.bytes_read)
    for result in results:
        report.findings += result.findings
        if result.record:
            report.failed_samples += sum(sample.status != OK for sample in result.record.samples)
    _check_roots(cache, report, root, results, expected_root)
    _check_strays(cache, report)
    return report


def _check_static(cache: Cache, report: Report) -> None:
    for name in cache.attributes["files"]:
        try:
            report.bytes_read += len(cache.read_static(name))
        except DamageError as error:
            report.findings.append(Finding(path=name, what=_short(error, cache)))


def _check_shard(cache: Cache, shard: int, level: str) -> _ShardResult:
    try:
        record = cache._read_record(shard)
    except DamageError as error:
        name = str(cache.record_path(shard).relative_to(cache.path))
        return _ShardResult([Finding(path=name, what=_short(error, cache), shard=shard)])
    result = _ShardResult([], record)
    for name, entry in record.files.items():
        path = cache.path / name
        try:
            actual = path.stat().st_size
        except FileNotFoundError:
            result.findings.append(Finding(path=name, what=f"missing, {entry.size} bytes expected", shard=shard))
            continue
        if actual != entry.size:
            what = f"{actual} bytes, its commit record says {entry.size}"
            result.findings.append(Finding(path=name, what=what, shard=shard))
        elif level != "quick":
            found = digest_file(path)
            result.bytes_read += actual
            if found != entry.blake3:
                keys = _damaged_samples(cache, record, name)
                what = f"its BLAKE3 is {found[:16]}..., its commit record says {entry.blake3[:16]}..."
                result.findings.append(Finding(path=name, what=what, shard=shard, samples=keys))
    if level == "deep" and not result.findings:
        _check_content(cache, record, result)
    return result


def digest_file(path: Path, block: int = 1 << 22) -> str:
    """BLAKE3 of a file, read once from front to back."""
    hasher, buffer = blake3(), bytearray(block)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return hasher.hexdigest()


def _damaged_samples(cache: Cache, record: Record, name: str) -> list[str]:
    """The keys of the samples whose bytes in file `name` are not the committed ones."""
    if not name.startswith("codes/"):
        keys = []
        data = (cache.path / name).read_bytes()
        for sample in record.samples:
            if sample.jpeg and crc32c(data[sample.jpeg[0] : sum(sample.jpeg[:2])]) != sample.jpeg[2]:
                keys.append(sample.key)
        return list(dict.fromkeys(keys))
    out = np.empty(cache.layout.chunk_shape, cache.layout.stored_dtype)
    step, keys = cache.layout.chunk_samples, []
    try:
        with ShardFile(cache.path / name, cache.layout, record.files[name].size, record.chunk_crc32c) as file:
            for chunk in range(len(record.chunk_crc32c)):
                try:
                    file.read_chunk(chunk, out)
                except DamageError:
                    keys += [sample.key for sample in record.samples[chunk * step : (chunk + 1) * step]]
    except DamageError:  # the index itself: no chunk can be found
        keys = [sample.key for sample in record.samples]
    return keys


def _check_content(cache: Cache, record: Record, result: _ShardResult) -> None:
    name = cache.shard_files(record.shard)[0]

    def finding(what: str, keys: list[str]) -> None:
        result.findings.append(Finding(path=name, what=what, shard=record.shard, samples=keys))

    try:
        codes = cache.read_codes(record.shard)
    except DamageError as error:
        return finding(_short(error, cache), [])
    result.content = digest(codes.data)
    if result.content != record.content:
        finding(f"its content is {result.content[:16]}..., its commit record says {record.content[:16]}...", [])
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
    return None


def _check_roots(
    cache: Cache, report: Report, root: dict[str, Any] | None, results: list[_ShardResult], expected_root: str | None
) -> None:
    records = [result.record for result in results if result.record]
    if len(records) == cache.shards:
        report.root = merkle_root(cache.cache_id, [record.digest for record in records])
        if all(result.content for result in results):
            report.content_root = merkle_root(cache.cache_id, [result.content or "" for result in results])
    if root is None:
        what = "missing: the cache is not sealed. Run the same `sami-cache extract` command to finish it."
        if not any(finding.path == "ROOT.json" for finding in report.findings):
            report.findings.append(Finding(path="ROOT.json", what=what))
    else:
        for name, found in (("root", report.root), ("content_root", report.content_root)):
            if found and found != root[name]:
                what = f"{name} of the commit records is {found[:16]}..., ROOT.json says {root[name][:16]}..."
                report.findings.append(Finding(path="ROOT.json", what=what))
        _check_manifest(cache, report, root, records)
    if expected_root and report.root != expected_root:
        what = f"the cache's root is {report.root}, you expect {expected_root}"
        report.findings.append(Finding(path="ROOT.json", what=what))


def _check_manifest(cache: Cache, report: Report, root: dict[str, Any], records: list[Record]) -> None:
    path, entry = cache.path / "manifest.parquet", root["manifest"]

    def finding(what: str) -> None:
        report.findings.append(Finding(path=path.name, what=what))

    if not path.exists():
        return finding(f"missing, {entry['size']} bytes expected")
    size = path.stat().st_size
    if size != entry["size"]:
        return finding(f"{size} bytes, ROOT.json says {entry['size']}")
    if report.level == "quick":
        return None
    report.bytes_read += size
    if digest_file(path) != entry["blake3"]:
        return finding("its BLAKE3 is not the one in ROOT.json")
    if report.level == "deep" and len(records) == cache.shards:
        table = samples_table([(record.shard, record.samples) for record in records])
        if not cache.table().equals(table):
            return finding("does not say what the commit records say")
    return None


def _check_strays(cache: Cache, report: Report) -> None:
    """Files that no record names: remains of interrupted writers before sealing, something foreign after."""
    known = {"zarr.json", "ROOT.json", "manifest.parquet", *cache.attributes["files"]}
    for shard in cache.committed() if not report.sealed else range(cache.shards):
        known |= {*cache.shard_files(shard), str(cache.record_path(shard).relative_to(cache.path))}
    strays = []
    for folder, folders, names in os.walk(cache.path):
        place = Path(folder).relative_to(cache.path)
        folders[:] = [name for name in folders if str(place / name) not in ("tmp", "quarantine")]
        strays += [str(place / name) for name in names if str(place / name) not in known]
    for name in sorted(strays):
        if report.sealed:
            report.findings.append(Finding(path=name, what="belongs to no shard of this cache", foreign=True))
        else:
            report.notes.append(f"{name}: not committed; the next `sami-cache extract` uses or replaces it")
    for folder, meaning in (("tmp", "left by interrupted writers"), ("quarantine", "moved aside by repairs")):
        entries = list(os.scandir(cache.path / folder)) if (cache.path / folder).is_dir() else []
        if entries:
            size = sum(entry.stat().st_size for entry in entries)
            report.notes.append(
                f"{folder}/: {len(entries)} files, {size / 1e6:.1f} MB, {meaning}; delete them when nothing writes here"
            )


def _short(error: Exception, cache: Cache) -> str:
    """The error's text without the path that the finding names already."""
    text = str(error)
    return text.split(": ", 1)[1] if text.startswith(str(cache.path)) and ": " in text else text
