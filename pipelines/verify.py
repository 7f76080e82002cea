"""Verification of a cache with everything that needs more than the cache: its sources, its teacher, and repair."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.sources import check_images, committed_sources, compare_images
from sami_cache.data.sources import Source, open_source
from sami_cache.errors import DamageError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK, Sample
from sami_cache.store.files import as_damage, disk_full_as_error, move_aside, stamp_of
from sami_cache.store.head import HEAD, STATIC_FILES
from sami_cache.store.integrity import Finding, Report, verify_cache
from sami_cache.store.places import AnyPath
from sami_cache.store.repair import quarantine_shard, restore_static
from sami_cache.store.spare import SPARE
from sami_cache.store.writing import seal_cache

if TYPE_CHECKING:  # torch takes longer to load than a small cache to verify, and only audit and repair need it
    from pipelines.jobs import Job, Progress
    from sami_cache.processes import StopSignal

AUDIT_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to check, beyond the bytes."""

    cache: AnyPath
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
    weights_sha256: str | None = None
    """That the file of the weights must have."""
    device: str = "auto"
    workers: int | None = None
    grace: float = 20.0
    """Seconds that a shard being extracted again may take after SIGTERM or SIGINT."""


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
    restored: list[str] = field(default_factory=list)
    """Files that were put back from the copy that the cache keeps."""
    moved: list[str] = field(default_factory=list)
    """Where what was there before is now."""


def verify(
    config: VerifyConfig,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_extract: "Callable[[Progress], None]" = lambda _: None,
) -> Verification:
    """Check a cache and, if asked, mend it: what is damaged goes to quarantine; files of the cache itself are put back from
    their copies, shards are extracted again, exactly the damaged ones.

    Raises SamiCacheError where a check cannot be made (no cache, images or weights gone); damage is reported, not raised.
    """
    if config.weights_sha256 and not (config.audit or config.repair):
        raise SamiCacheError("--weights-sha256 is of the teacher's weights: it goes with --audit or --repair.")

    def check() -> Report:
        return verify_cache(config.cache, level=config.level, expected_root=config.root, on_progress=on_progress)

    result = Verification(report=check())
    # One damage may hide another: under a damaged head nothing else is seen, and a stray file only once the cache is sealed.
    rounds = 4 if config.repair else 0
    while rounds and result.report.findings and _repair(config, result, on_extract):
        result.report, rounds = check(), rounds - 1
    report = result.report
    if config.sources or config.audit:
        if any(finding.path == HEAD for finding in report.findings):
            raise SamiCacheError(f"{config.cache}: its head is damaged, so neither sources nor teacher can be checked.")
        cache = Cache(config.cache)
        if config.sources:
            report.findings += check_sources(
                cache, open_source(_data(config, cache), kind=cache.identity["source_kind"]), config.workers
            )
        if config.audit:
            result.audit = _audit(config, cache, report)
        done = {"--sources": config.sources, "--audit": config.audit}
        report.not_checked = [text for text in report.not_checked if not any(flag in text for flag, on in done.items() if on)]
    return result


def check_sources(cache: Cache, source: Source, workers: int | None = None) -> list[Finding]:
    """Compare every image with the digest in its commit record; one finding for each way in which they differ."""
    missing, changed = compare_images(source, committed_sources(cache), workers=workers)
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
    with as_damage(cache.path / HEAD, "does not say where the images lay; give --data"):
        return config.data or Path(cache.attributes["provenance"]["data"])


def extraction_of(config: VerifyConfig) -> "Job":
    """The extraction that the cache came from, with its own settings.

    Raises SamiCacheError where images or weights are not to be had, IdentityError where they are others.
    """
    from pipelines.jobs import ExtractConfig, prepare_job

    cache = Cache(config.cache)
    return prepare_job(
        ExtractConfig(
            data=_data(config, cache),
            cache=config.cache,
            teacher=cache.identity["teacher"]["name"],
            weights=config.weights,
            weights_sha256=config.weights_sha256,
            device=config.device,
            workers=config.workers,
            source_kind=cache.identity["source_kind"],
        )
    )


def embed_again(job: "Job", numbers: Iterable[int]) -> Iterator[tuple[int, Sample, np.ndarray]]:
    """The teacher's answer today to samples of its cache, in rising order: (number, sample, float32 [C, grid, grid]).

    The embedding is zeros where the sample's status is not ok.
    """
    chosen, size = sorted(numbers), job.embedder.batch_size
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    for batch, fresh in zip(batches, job.embedder.embed(batches), strict=True):
        yield from zip(batch, fresh.samples, fresh.embeddings, strict=True)


def _audit(config: VerifyConfig, cache: Cache, report: Report) -> Audit:
    """Run the teacher again on samples spread over the cache and compare."""
    job = extraction_of(config)
    table = cache.table(["key", "status", "error"]).to_pydict()
    usable = [number for number, status in enumerate(table["status"]) if status == OK]
    if not usable:
        raise SamiCacheError(f"{cache.path}: no sample has an embedding, so there is nothing to audit.")
    chosen = sorted(np.random.default_rng(0).choice(usable, min(config.audit, len(usable)), replace=False).tolist())
    cosines: list[float] = []
    failed: list[str] = []
    for number, sample, fresh in embed_again(job, chosen):
        cosine = float(centred_cosine(cache.read_embedding(number)[None], fresh[None], cache.codec.mean)[0])
        cosines.append(cosine)
        # The codec moves an embedding by a known error e, which alone makes the cosine 1 / sqrt(1 + e), about 1 - e / 2.
        if sample.status != OK or cosine < 1 - table["error"][number] - config.tolerance:
            failed.append(table["key"][number])
    if failed:
        what = f"the teacher does not give {len(failed)} of {len(chosen)} embeddings again (worst cosine {min(cosines):.4f})"
        report.findings.append(Finding(path="codes", what=what, samples=failed))
    return Audit(samples=len(chosen), worst=min(cosines), median=float(np.median(cosines)), failed=failed)


def _repair(config: VerifyConfig, result: Verification, on_extract: "Callable[[Progress], None]") -> bool:
    """Mend what the findings name, and say whether anything was done: first what needs no images, then the shards."""
    from pipelines.jobs import how_to_go_on
    from sami_cache.processes import StopSignal

    report, quarantine = result.report, config.cache / "quarantine"
    with StopSignal(lambda: how_to_go_on(config.cache), config.grace) as stop:
        before = len(result.moved), len(result.restored)
        with disk_full_as_error(config.cache, "putting files back"):
            for finding in report.findings:
                if finding.foreign:
                    result.moved.append(str(move_aside(config.cache / finding.path, quarantine)))
            if any(finding.path in (HEAD, SPARE, *STATIC_FILES) for finding in report.findings):
                restored, moved = restore_static(config.cache)
                result.restored += restored
                result.moved += map(str, moved)
        if (len(result.moved), len(result.restored)) != before:
            return True
        cache = Cache(config.cache)
        if report.damaged_shards:
            _extract_again(config, cache, report.damaged_shards, result, on_extract, stop)
        seals = [cache.path / name for name in ("manifest.parquet", "ROOT.json")]
        sealed = [stamp_of(path) for path in seals]
        seal_cache(cache)
        return bool(report.damaged_shards) or sealed != [stamp_of(path) for path in seals]


def _extract_again(
    config: VerifyConfig,
    cache: Cache,
    damaged: list[int],
    result: Verification,
    on_extract: "Callable[[Progress], None]",
    stop: "StopSignal",
) -> None:
    from pipelines.extract import run_shards

    # Before a shard is moved: without images and teacher none can be repaired, with other images none should be.
    job = extraction_of(config)
    check_images(cache, job.source, _sources_of(cache, damaged), workers=config.workers)
    with disk_full_as_error(config.cache, "moving damaged shards aside"):
        for shard in damaged:
            result.moved += map(str, quarantine_shard(cache, shard))
    run_shards(job, cache, damaged, on_extract, stop)
    result.repaired = sorted({*result.repaired, *damaged})


def _sources_of(cache: Cache, shards: list[int]) -> Iterator[dict[str, str]]:
    """What is known of the images of these shards: what the record says, or if that is lost, the manifest.

    Where both are whole and differ, one is of another time, and the image is not known.
    """
    sealed: dict[int, dict[str, str]] = {shard: {} for shard in shards}
    with suppress(DamageError):
        root = cache.root()
        if root is not None:
            table = cache.manifest(root, ["shard", "key", "source"])
            for row in table.filter(pa.array(np.isin(table["shard"].to_numpy(), shards))).to_pylist():
                if row["source"]:
                    sealed[row["shard"]][row["key"]] = row["source"]
    for shard in shards:
        try:
            known = {sample.key: sample.source for sample in cache.record(shard).samples if sample.source}
        except DamageError:
            yield sealed[shard]
            continue
        yield {key: source for key, source in known.items() if sealed[shard].get(key, source) == source}
