"""What an extraction will take, measured on a sample of the images before anything is written."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.embedding import Embedded
from pipelines.jobs import ExtractConfig, Job, Progress, prepare_job
from sami_cache.errors import DiskFullError, SamiCacheError
from sami_cache.store.cache import choose_layout
from sami_cache.store.codecs import Codec
from sami_cache.store.commits import OK
from sami_cache.store.files import digest
from sami_cache.store.fitting import fit_codec
from sami_cache.store.images import pack_images
from sami_cache.store.shards import pack_shard
from sami_cache.store.writing import check_embeddings

MAX_FIT_BYTES = 512 << 20
RESERVE_BYTES = 64 << 20
# Of a commit record and the manifest, per sample: measured 390 to 450 with keys of 20 to 50 characters.
RECORD_BYTES = 420


@dataclass(kw_only=True)
class Plan:
    """What an extraction will take; also what the disk check goes by."""

    images: int
    samples: int
    remaining: int
    """Samples not committed yet."""
    usable: float
    """Share of the images that can be decoded."""
    code_bytes: float
    """Per usable sample, compressed."""
    image_bytes: float
    """Per usable sample: its share of the re-encoded JPEG."""
    seconds_per_sample: float
    free_bytes: int
    codec: Codec
    identity: dict[str, Any]

    @property
    def bytes_per_sample(self) -> float:
        """Codes, images and records together."""
        return (self.code_bytes + self.image_bytes) * self.usable + RECORD_BYTES

    @property
    def total_bytes(self) -> float:
        return self.samples * self.bytes_per_sample

    @property
    def remaining_bytes(self) -> float:
        return self.remaining * self.bytes_per_sample

    @property
    def hours(self) -> float:
        return self.remaining * self.seconds_per_sample / 3600


def plan(config: ExtractConfig, on_progress: Callable[[Progress], None] = lambda _: None) -> Plan:
    """Measure a sample of the images and say what the whole extraction takes. Writes nothing."""
    return measure(prepare_job(config), on_progress)


def measure(job: Job, on_progress: Callable[[Progress], None] = lambda _: None) -> Plan:
    """Fit the codec (or take the cache's) on a random sample of the images and measure what a sample takes."""
    embedder, settings = job.embedder, job.codec_settings
    parts, seconds = _embed_sample(job, on_progress)
    samples = [sample for part in parts for sample in part.samples]
    embeddings = np.concatenate([part.embeddings for part in parts])
    good = np.array([sample.status == OK for sample in samples])
    if not good.any():
        raise SamiCacheError(
            f"{job.source.location}: none of {len(samples)} images tried can be used; the first: {samples[0].key!r}: "
            f"{samples[0].status}."
        )
    check_embeddings(embeddings, samples, good)
    embeddings = embeddings[good]
    codec = job.cache.codec if job.cache else fit_codec(settings["name"], embeddings, error=settings["error"] or 0.01)
    layout = choose_layout(codec, embedder.grid, len(embedder), job.config.shard_samples)
    whole = len(embeddings) // layout.chunk_samples * layout.chunk_samples or len(embeddings)
    packed = [
        pack_shard(codec.encode(embeddings[start : min(start + layout.shard_samples, whole)]), layout)[0]
        for start in range(0, whole, layout.shard_samples)
    ]
    jpegs: dict[str, tuple[str, bytes]] = {}
    for part in parts:
        jpegs |= {sample.key: ("0" * 64, jpeg) for sample, jpeg in zip(part.samples, part.jpegs, strict=True) if jpeg}
    committed = job.cache.committed() if job.cache else []
    done = sum(len(job.cache.shard_samples(shard)) for shard in committed) if job.cache else 0
    return Plan(
        images=len(job.source),
        samples=len(embedder),
        remaining=len(embedder) - done,
        usable=float(good.mean()),
        code_bytes=sum(map(len, packed)) / whole,
        image_bytes=len(pack_images(jpegs)) / len(jpegs) / max(1, embedder.mode.views) if jpegs else 0.0,
        seconds_per_sample=seconds,
        free_bytes=free_space(job.config.cache),
        codec=codec,
        identity=job.identity,
    )


def _embed_sample(job: Job, on_progress: Callable[[Progress], None]) -> tuple[list[Embedded], float]:
    """Embed a random sample of the images, one view each; also the seconds that a sample took, decoding included."""
    embedder = job.embedder
    views, batch = max(1, embedder.mode.views), embedder.batch_size
    affordable = MAX_FIT_BYTES // (4 * embedder.teacher.info.channels * embedder.grid**2)
    wanted = max(8, min(job.codec_settings["fit_images"], affordable))
    # By the keys' digests: a random sample that is the same on every machine and in every run.
    order = sorted(range(len(job.source)), key=lambda index: digest(job.source.keys[index].encode()))[:wanted]
    numbers = [index * views + position % views for position, index in enumerate(order)]
    parts: list[Embedded] = []
    seconds: list[float] = []
    done, failures, last = 0, 0, time.perf_counter()
    for part in embedder.embed([numbers[start : start + batch] for start in range(0, len(numbers), batch)]):
        parts.append(part)
        done += len(part.samples)
        failures += sum(sample.status != OK for sample in part.samples)
        now = time.perf_counter()
        seconds.append((now - last) / len(part.samples))
        last = now
        on_progress(Progress(stage="fit", done=done, total=len(numbers), failures=failures))
    return parts, float(np.median(seconds))  # the median, because the first batch pays for warming up


def free_space(path: Path) -> int:
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def check_space(outlook: Plan, cache: Path) -> None:
    needed = outlook.remaining_bytes + RESERVE_BYTES
    if needed > outlook.free_bytes:
        raise DiskFullError(
            f"{cache}: the cache will take about {outlook.total_bytes / 1e9:.2f} GB ({outlook.bytes_per_sample / 1e3:.1f} KB a "
            f"sample), the disk has {outlook.free_bytes / 1e9:.2f} GB free. Make room, give a --cache on another disk, or make "
            "it smaller: a larger --error, a smaller --grid, --no-images."
        )
