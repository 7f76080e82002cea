"""What an extraction will take, measured on a sample of the images before anything is written."""

import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.embedding import Embedded
from pipelines.jobs import ExtractConfig, Job, Progress, prepare_job
from sami_cache.data.images import decode_image, encode_jpeg
from sami_cache.errors import DiskFullError, ImageError, SamiCacheError
from sami_cache.store.codecs import Codec
from sami_cache.store.commits import OK, TABLE_SCHEMA, FileEntry, Record, Sample, record_bytes, samples_table
from sami_cache.store.creation import static_files
from sami_cache.store.files import digest
from sami_cache.store.fitting import fit_codec
from sami_cache.store.images import locate_images, pack_images
from sami_cache.store.places import AnyPath, RemotePath
from sami_cache.store.shards import ShardLayout, pack_shard
from sami_cache.store.writing import check_embeddings, complete_samples, pack_manifest

MAX_FIT_BYTES = 512 << 20
RESERVE_BYTES = 64 << 20
PLANNED_IMAGES = 1024
SEAL_BYTES = 9_000
"""Of an empty manifest and ROOT.json."""


@dataclass(kw_only=True)
class Plan:
    """What an extraction will take; also what the disk check goes by."""

    images: int
    samples: int
    remaining: int
    """Samples not committed yet."""
    code_bytes: float
    """A sample, compressed, failed ones counted in."""
    image_bytes: float
    """A sample: its share of the re-encoded JPEG."""
    record_bytes: float
    """A sample: of its commit record and of the manifest."""
    there: float
    """Bytes that are on disk already, or that creation writes."""
    seconds_per_sample: float
    free_bytes: float
    codec: Codec
    identity: dict[str, Any]

    @property
    def bytes_per_sample(self) -> float:
        """Codes, images and records together."""
        return self.code_bytes + self.image_bytes + self.record_bytes

    @property
    def total_bytes(self) -> float:
        """Of the finished cache."""
        return self.there + self.remaining_bytes

    @property
    def remaining_bytes(self) -> float:
        return self.remaining * self.bytes_per_sample

    @property
    def hours(self) -> float:
        return self.remaining * self.seconds_per_sample / 3600


def plan(config: ExtractConfig, on_progress: Callable[[Progress], None] = lambda _: None) -> Plan:
    """Measure a sample of the images and say what the whole extraction takes. Writes nothing."""
    return measure(prepare_job(config), on_progress, images=PLANNED_IMAGES)


def measure(job: Job, on_progress: Callable[[Progress], None] = lambda _: None, *, images: int = 0) -> Plan:
    """Fit the codec (or take the cache's) on a random sample of the images and measure what a sample takes.

    `images`: re-encode so many, if there are, to tell what their JPEGs take, which differs more between images than codes do.
    """
    embedder, settings = job.embedder, job.codec_settings
    order = _random_order(job)
    tried, seconds = _embed_sample(job, order, on_progress)
    good = np.array([sample.status == OK for sample in tried.samples])
    if not good.any():
        raise SamiCacheError(
            f"{job.source.location}: none of {len(good)} images tried can be used; the first: {tried.samples[0].key!r}: "
            f"{tried.samples[0].status}."
        )
    check_embeddings(tried.embeddings, tried.samples, good)
    fitted = tried.embeddings if good.all() else tried.embeddings[good]
    known = job.cache.codec if job.cache else job.codec
    codec = known if known is not None else fit_codec(settings["name"], fitted, error=settings["error"] or 0.01)
    head = job.head(codec)
    layout = head["layout"]
    there = job.cache.size_on_disk() if job.cache else SEAL_BYTES + sum(map(len, static_files(**head).values()))
    done = sum(len(job.cache.shard_samples(shard)) for shard in job.cache.committed()) if job.cache else 0
    shards = -(-len(embedder) // layout.shard_samples) / len(embedder)
    code_bytes, bytes_of_records = _rehearse(codec, layout, tried, shards, max(1, embedder.mode.views))
    return Plan(
        images=len(job.source),
        samples=len(embedder),
        remaining=len(embedder) - done,
        code_bytes=code_bytes,
        image_bytes=_image_bytes(job, tried, layout, shards, order[:images]) if embedder.images else 0.0,
        record_bytes=bytes_of_records,
        there=there,
        seconds_per_sample=seconds,
        free_bytes=free_space(job.config.cache),
        codec=codec,
        identity=job.identity,
    )


def _image_bytes(job: Job, tried: Embedded, layout: ShardLayout, shards: float, images: list[int]) -> float:
    """Bytes a sample of the shards' image files; `shards`: a sample. An image is stored once in every shard it has views in.

    `images`: the first ones of the random order, whose JPEGs count; the tried ones are among them or all there is to go by.
    """
    distinct = {sample.key: jpeg for sample, jpeg in zip(tried.samples, tried.jpegs, strict=True)}
    sizes = [len(jpeg or b"") for jpeg in distinct.values()]
    sizes += _jpeg_sizes(job, images[len(sizes) :])
    found = {key: ("0" * 64, jpeg) for key, jpeg in distinct.items() if jpeg}
    empty = len(pack_images({}))
    row = (len(pack_images(found)) - empty - sum(len(jpeg) for _, jpeg in found.values())) / max(1, len(found))
    views, count = max(1, job.embedder.mode.views), len(job.embedder)
    first = np.arange(0, count, layout.shard_samples)
    last = np.minimum(first + layout.shard_samples, count) - 1
    stored = int((last // views - first // views + 1).sum()) / count
    return stored * float(np.mean([size + row if size else 0 for size in sizes])) + empty * shards


def _jpeg_sizes(job: Job, images: list[int]) -> list[int]:
    """Sizes of the re-encoded JPEGs of these images, 0 for what cannot be decoded."""
    embedder = job.embedder

    def encode(image: int) -> int:
        try:
            return len(encode_jpeg(decode_image(job.source.read(image)), **embedder.images or {}))
        except ImageError:
            return 0

    with ThreadPoolExecutor(embedder.workers, thread_name_prefix="decode") as pool:
        return list(pool.map(encode, images))


def _random_order(job: Job) -> list[int]:
    """The images by their keys' digests: a random order that is the same on every machine and in every run."""
    return sorted(range(len(job.source)), key=lambda index: digest(job.source.keys[index].encode()))


def _rehearse(codec: Codec, layout: ShardLayout, tried: Embedded, shards: float, views: int) -> tuple[float, float]:
    """Bytes a sample of codes and of records, manifest included, by making the files that the tried samples would get.

    `shards`: a sample, because each file has a part that does not grow with its samples.
    """
    samples, embeddings = tried.samples, tried.embeddings
    count = len(samples) // layout.chunk_samples * layout.chunk_samples or len(samples)  # a chunk in part is one filled up
    sizes, tables = np.zeros(2), [TABLE_SCHEMA.empty_table()]

    def record_of(part: slice, packed: bytes, images: bytes, checksums: list[int], rows: list[Sample]) -> Record:
        files = {"codes/0.0.0.0": FileEntry.of(packed), "images/000000.arrow": FileEntry.of(images)}
        number = part.start // layout.shard_samples
        common: dict[str, Any] = {"cache_id": "0" * 64, "content": "0" * 64, "shard": number, "files": files}
        return Record(chunk_crc32c=checksums, samples=rows, **common)

    parts = [slice(start, min(start + layout.shard_samples, count)) for start in range(0, count, layout.shard_samples)]
    for part in parts:
        good = np.array([sample.status == OK for sample in samples[part]])
        codes = np.zeros((len(good), *layout.sample_shape), layout.stored_dtype)
        codes[good] = codec.encode(embeddings[part][good])
        packed, checksums = pack_shard(codes, layout)
        pairs = zip(samples[part], tried.jpegs[part], strict=True)
        images = pack_images({sample.key: ("0" * 64, jpeg) for sample, jpeg in pairs if jpeg})
        places = {key: place for key, (_, place) in locate_images(images).items()}
        rows = complete_samples(codec, embeddings[part], codes, samples[part], good, places)
        record = record_of(part, packed, images, checksums, rows)
        sizes += len(packed), len(record_bytes(record))
        tables.append(samples_table(record))
    fixed = np.array([layout.index_bytes, len(record_bytes(record_of(parts[0], b"", b"", [], [])))])
    sizes -= len(parts) * fixed
    table = pa.concat_tables(tables)
    for name in ("key", "label", "source", "width", "height", "jpeg"):  # an image's, which its views repeat
        column = table[name].take(pa.array(np.arange(count) // views))
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    sizes[1] += len(pack_manifest([table])) - len(pack_manifest(tables[:1]))
    code_bytes, bytes_of_records = (sizes / count + fixed * shards).tolist()
    return code_bytes, bytes_of_records


def _embed_sample(job: Job, order: list[int], on_progress: Callable[[Progress], None]) -> tuple[Embedded, float]:
    """Embed views of the first images of `order`, a random one; also the seconds that a sample took, decoding included."""
    embedder = job.embedder
    views, batch = max(1, embedder.mode.views), embedder.batch_size
    affordable = MAX_FIT_BYTES // (4 * embedder.teacher.info.channels * embedder.grid**2)
    wanted = max(8, min(job.codec_settings["fit_images"], affordable))
    order = order[:wanted]
    # One view an image, and another of each only where the images are few.
    turns = range(min(views, -(-wanted // len(order))))
    numbers = [index * views + (position + turn) % views for turn in turns for position, index in enumerate(order)]
    numbers = sorted(numbers[:wanted])
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
    whole = Embedded(
        samples=[sample for part in parts for sample in part.samples],
        embeddings=np.concatenate([part.embeddings for part in parts]),
        jpegs=[jpeg for part in parts for jpeg in part.jpegs],
    )
    return whole, float(np.median(seconds))  # the median, because the first batch pays for warming up


def free_space(path: AnyPath) -> float:
    """Bytes; infinite in an object store."""
    if isinstance(path, RemotePath):
        return math.inf
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def check_space(outlook: Plan, cache: AnyPath) -> None:
    needed = outlook.remaining_bytes + RESERVE_BYTES
    if needed > outlook.free_bytes:
        raise DiskFullError(
            f"{cache}: the cache will take about {outlook.total_bytes / 1e9:.2f} GB ({outlook.bytes_per_sample / 1e3:.1f} KB a "
            f"sample), the disk has {outlook.free_bytes / 1e9:.2f} GB free. Make room, give a --cache on another disk, or make "
            "it smaller: a larger --error, a smaller --grid, --no-images."
        )
