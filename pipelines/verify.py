"""Verification of a cache with everything that needs more than the cache: its sources, its teacher, and repair."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sami_cache.data.sources import Source, open_source
from sami_cache.errors import ImageError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK
from sami_cache.store.files import digest, move_aside
from sami_cache.store.integrity import Finding, Report, verify_cache
from sami_cache.store.writing import quarantine_shard, seal_cache

if TYPE_CHECKING:  # torch takes longer to load than a small cache to verify, and only audit and repair need it
    from pipelines.jobs import Job, Progress

AUDIT_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to check, beyond the bytes."""

    cache: Path
    level: str = "default"
    root: str | None = None
    """The root that the cache must have, noted when it was made."""
    sources: bool = False
    """Hash every source image again."""
    audit: int = 0
    """Samples to run through the teacher again."""
    tolerance: float = AUDIT_TOLERANCE
    """How far below its expected value the cosine of an audited sample may lie."""
    repair: bool = False
    data: Path | None = None
    """Where the images are; by default where they were at extraction."""
    weights: str | None = None
    """Of the teacher; by default those named at extraction."""
    device: str = "auto"
    workers: int | None = None


@dataclass(kw_only=True)
class Audit:
    """The teacher's answer today against the cache."""

    samples: int
    worst: float
    """Smallest cosine between the stored and the fresh embedding, both about the codec's mean."""
    median: float
    failed: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Verification:
    """Everything a verification found and did."""

    report: Report
    audit: Audit | None = None
    repaired: list[int] = field(default_factory=list)
    """Shards that were extracted again."""
    moved: list[str] = field(default_factory=list)
    """Where their files are now."""


def verify(
    config: VerifyConfig,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_extract: "Callable[[Progress], None]" = lambda _: None,
) -> Verification:
    """Check a cache and, if asked, mend it: damaged shards go to quarantine and exactly those are extracted again.

    Raises SamiCacheError where a check cannot be made (no cache, images or weights gone); damage is reported, not raised.
    """
    report = verify_cache(config.cache, level=config.level, expected_root=config.root, on_progress=on_progress)
    result = Verification(report=report)
    if config.repair and report.findings:
        _repair(config, result, on_extract)
        report = verify_cache(config.cache, level=config.level, expected_root=config.root, on_progress=on_progress)
        result.report = report
    if config.sources or config.audit:
        if any(finding.path == "zarr.json" for finding in report.findings):
            raise SamiCacheError(f"{config.cache}: its head is damaged, so neither sources nor teacher can be checked.")
        cache = Cache(config.cache)
        if config.sources:
            report.findings += check_sources(cache, open_source(_data(config, cache)))
        if config.audit:
            result.audit = _audit(config, cache, report)
        done = {"--sources": config.sources, "--audit": config.audit}
        report.not_checked = [text for text in report.not_checked if not any(flag in text for flag, on in done.items() if on)]
    return result


def check_sources(cache: Cache, source: Source) -> list[Finding]:
    """Compare every image with the digest in its commit record; one finding for each way in which they differ."""
    where = {key: index for index, key in enumerate(source.keys)}
    missing, changed, seen = [], [], set()
    for record in cache.records():
        for sample in record.samples:
            if sample.source is None or sample.key in seen:
                continue
            seen.add(sample.key)
            if sample.key not in where:
                missing.append(sample.key)
                continue
            try:
                if digest(source.read(where[sample.key])) != sample.source:
                    changed.append(sample.key)
            except ImageError:
                missing.append(sample.key)
    place = str(source.location)
    findings = []
    if missing:
        findings.append(Finding(path=place, what=f"{len(missing)} images of the cache are gone", samples=missing))
    if changed:
        findings.append(Finding(path=place, what=f"{len(changed)} images are not the ones extracted", samples=changed))
    return findings


def centred_cosine(stored: np.ndarray, fresh: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Cosine between embeddings [n, C, h, w] about the mean [C], per sample: float64 [n]."""
    a = (stored - mean[:, None, None]).reshape(len(stored), -1).astype(np.float64)
    b = (fresh - mean[:, None, None]).reshape(len(fresh), -1).astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)


def _data(config: VerifyConfig, cache: Cache) -> Path:
    return config.data or Path(cache.attributes["provenance"]["data"])


def _job(config: VerifyConfig) -> "Job":
    """The extraction that the cache came from, with its own settings."""
    from pipelines.jobs import ExtractConfig, prepare_job

    cache = Cache(config.cache)
    return prepare_job(
        ExtractConfig(
            data=_data(config, cache),
            cache=config.cache,
            teacher=cache.identity["teacher"]["name"],
            weights=config.weights,
            device=config.device,
            workers=config.workers,
            source_kind=cache.identity["source_kind"],
        )
    )


def _audit(config: VerifyConfig, cache: Cache, report: Report) -> Audit:
    """Run the teacher again on samples spread over the cache and compare."""
    job = _job(config)
    table = cache.table().select(["key", "status", "error"]).to_pydict()
    usable = [number for number, status in enumerate(table["status"]) if status == OK]
    if not usable:
        raise SamiCacheError(f"{cache.path}: no sample has an embedding, so there is nothing to audit.")
    chosen = sorted(np.random.default_rng(0).choice(usable, min(config.audit, len(usable)), replace=False).tolist())
    size = job.embedder.batch_size
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    cosines: list[float] = []
    failed: list[str] = []
    for batch, fresh in zip(batches, job.embedder.embed(batches), strict=True):
        stored = np.stack([cache.read_embedding(number) for number in batch])
        for number, sample, cosine in zip(
            batch, fresh.samples, centred_cosine(stored, fresh.embeddings, cache.codec.mean), strict=True
        ):
            cosines.append(float(cosine))
            # The codec moves an embedding by a known error e, which alone makes the cosine 1 / sqrt(1 + e), about 1 - e / 2.
            if sample.status != OK or cosine < 1 - table["error"][number] - config.tolerance:
                failed.append(table["key"][number])
    if failed:
        what = f"the teacher does not give {len(failed)} of {len(chosen)} embeddings again (worst cosine {min(cosines):.4f})"
        report.findings.append(Finding(path="codes", what=what, samples=failed))
    return Audit(samples=len(chosen), worst=min(cosines), median=float(np.median(cosines)), failed=failed)


def _repair(config: VerifyConfig, result: Verification, on_extract: "Callable[[Progress], None]") -> None:
    from pipelines.extract import run_shards
    from pipelines.jobs import how_to_go_on
    from sami_cache.processes import StopSignal

    named = [finding.path for finding in result.report.findings]
    static = [path for path in named if path == "zarr.json"] or [
        path for path in named if path in Cache(config.cache).attributes["files"]
    ]
    if static:
        raise SamiCacheError(
            f"{config.cache}: {', '.join(static)} cannot be mended from the images; extract into a new cache, or restore the "
            "files from a copy."
        )
    with StopSignal(lambda: how_to_go_on(config.cache)) as stop:
        job = _job(config)  # before anything is moved: without images and teacher nothing can be repaired
        cache = job.cache
        if cache is None:
            raise SamiCacheError(f"{config.cache}: there is no cache to repair.")
        for finding in result.report.findings:
            if finding.foreign:
                result.moved.append(str(move_aside(cache.path / finding.path, cache.path / "quarantine")))
        damaged = result.report.damaged_shards
        for shard in damaged:
            result.moved += [str(path) for path in quarantine_shard(cache, shard)]
        if damaged:
            run_shards(job, cache, damaged, on_extract, stop)
            result.repaired = damaged
        seal_cache(cache)
