"""Settings of an extraction, resolved against the cache that is there, and the teacher and images they name."""

import os
import platform
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipelines.embedding import Embedder, ViewMode
from pipelines.encoding import PRECISIONS
from pipelines.tuning import compile_mode, tune
from sami_cache import __version__
from sami_cache.data.source import Rearranged
from sami_cache.data.sources import Source, open_source
from sami_cache.errors import DamageError, IdentityError, SamiCacheError
from sami_cache.models.teachers import load_teacher
from sami_cache.models.weights import check_file_digest
from sami_cache.processes import GRACE, choose_device, keep_freed_memory
from sami_cache.store.cache import Cache, choose_layout, choose_shard_samples, listing_digest
from sami_cache.store.codecs import CODECS, Codec
from sami_cache.store.copying import same_codec
from sami_cache.store.creation import is_free
from sami_cache.store.files import as_damage
from sami_cache.store.head import HEAD, is_cache
from sami_cache.store.places import AnyPath


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract. None means: what the cache says if there is one, else the default named in the field's text."""

    data: Path
    cache: AnyPath
    teacher: str
    weights: str | None = None
    weights_sha256: str | None = None
    """SHA-256 that the file of the weights must have."""
    layer: str | None = None
    image_size: int | None = None
    """Longest side of the teacher's input in pixels. Default: 1024 for SAM (224 for its views), grid x stride for others."""
    grid: int | None = None
    """Cells along each side of a stored embedding. Default: 32 dense, 14 replay."""
    precision: str | None = None
    """float32 or bfloat16. Default: bfloat16 on CUDA, float32 on the CPU."""
    views: int | None = None
    """Random views per image; 0, the default, is the dense mode."""
    seed: int | None = None
    """Of the random views and of random weights. Default 0."""
    codec: str | None = None
    """pca (default), int8 or float16."""
    error: float | None = None
    """Relative squared error of the pca codec. Default 0.01."""
    images: bool | None = None
    """Keep a JPEG of each image (short side 256) in the cache. Default True."""
    fit_images: int | None = None
    """Images the codec is fitted on. Default 256, fewer when their embeddings exceed 512 MiB."""
    codec_from: AnyPath | None = None
    """A cache to take the codec and the settings left open from, so that the two can be merged as they are."""
    shard_samples: int | None = None
    batch_size: int | None = None
    """Images the teacher sees at once. Default: 8 on the CPU, on a GPU what a measurement finds (`tuning.py`)."""
    device: str = "auto"
    attention: str | None = None
    """How a SAM's attention is computed: timm, folded or flex, equal but for rounding. Default: timm on the CPU, on a GPU the
    fastest of them there."""
    compile: bool | None = None
    """Have torch.compile make kernels of the teacher; equal but for rounding. Default False.

    This, `attention` and `batch_size` are recorded, are no part of the identity, and going on on the same hardware means them
    again, so that the same bits are computed."""
    workers: int | None = None
    """Threads that read and decode images. Default: one per core, 16 at most."""
    source_kind: str | None = None
    grace: float = GRACE
    """Seconds that the shard in hand may take after SIGTERM or SIGINT."""
    trust_images: bool = False
    """Go on without reading the images of committed shards again."""


@dataclass(kw_only=True)
class Progress:
    """A moment of an extraction."""

    stage: str
    """`wait` (for a worker), `check` (the images of committed shards), `copy` (what another cache holds), `fit`, `extract`,
    `stop` (the shard in hand is finished) or `seal`."""
    done: int = 0
    total: int = 0
    """Samples, those of earlier runs included."""
    per_second: float = 0.0
    """Samples of this run."""
    eta_seconds: float | None = None
    bytes: int = 0
    expected_bytes: float = 0.0
    failures: int = 0
    workers: int | None = None
    """Processes that extract, where there are several."""
    note: str = ""
    """Something to be said once."""


@dataclass
class Job:
    """An extraction whose settings are resolved and checked."""

    config: ExtractConfig
    source: Source
    embedder: Embedder
    cache: Cache | None
    codec_settings: dict[str, Any]
    codec: Codec | None = None
    """Another cache's, to be used instead of a fitted one."""
    attention: str = "timm"
    """How the teacher's attention is computed."""
    added: int = 0
    """Images that `cache` does not have yet; they come last in `source`."""

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.embedder.identity(), "codec": self.codec_settings}

    def head(self, codec: Codec) -> dict[str, Any]:
        """What a cache of this extraction is created with (`creation.static_files`)."""
        embedder = self.embedder
        return {
            "identity": self.identity,
            "codec": codec,
            "layout": self.cache.layout
            if self.cache
            else choose_layout(codec, embedder.grid, len(embedder), self.config.shard_samples),
            "keys": self.source.keys,
            "labels": self.source.labels,
            "class_names": self.source.class_names,
            "provenance": {
                "data": str(self.config.data.resolve()),
                "weights": self.config.weights,
                "weights_from": embedder.teacher.info.weights,
                "seed": embedder.mode.seed,
                "batch_size": embedder.batch_size,
                "attention": self.attention,
                "compiled": embedder.compiled,
                "device": _hardware(embedder.device),
                "machine": platform.machine(),
                "python": platform.python_version(),
                "versions": {name: version(name) for name in ("torch", "timm", "numpy", "pillow", "zstandard", "pyarrow")},
                "sami_cache": __version__,
            },
        }


def prepare_job(config: ExtractConfig) -> Job:
    """Resolve the settings against the cache that is there, load the teacher, and check that they agree.

    The source has the cache's images in the cache's order, then those that were added since (`Job.added`).
    """
    existing = Cache(config.cache) if is_cache(config.cache) else None
    if existing is None and not is_free(config.cache):
        raise SamiCacheError(f"{config.cache}: exists and is not a cache. Give another --cache, or move it away.")
    other = Cache(config.codec_from) if config.codec_from is not None else None
    model = existing or other
    with as_damage(model.path / HEAD, "not the head of an extraction") if model else nullcontext():
        settings = _settings(config, model.attributes if model else None)
    if settings["codec"] not in CODECS:
        raise SamiCacheError(f"codec {settings['codec']!r} is unknown; choose one of {', '.join(CODECS)}.")
    if settings["precision"] not in PRECISIONS:
        raise SamiCacheError(f"precision {settings['precision']!r} is unknown; choose one of {', '.join(PRECISIONS)}.")
    if settings["grid"] < 1 or settings["views"] < 0 or (settings["batch_size"] or 1) < 1:
        raise SamiCacheError("--grid and --batch-size must be at least 1, --views at least 0.")
    source = open_source(config.data, kind=config.source_kind)
    added = 0
    if existing:
        source, added = arrange(existing, source)
    if config.weights_sha256:
        check_file_digest(settings["weights"], config.weights_sha256)
    teacher = load_teacher(
        config.teacher,
        weights=settings["weights"],
        layer=settings["layer"],
        image_size=settings["image_size"],
        grid=settings["grid"],
        seed=settings["seed"],
    )
    device: torch.device = settings["device"]
    keep_freed_memory()
    samples = len(source) * max(1, settings["views"])
    value = 2 if settings["codec"] == "float16" else 1
    shard = choose_shard_samples(value * teacher.info.channels * settings["grid"] ** 2, samples)
    attention, batch_size = tune(
        teacher,
        grid=settings["grid"],
        precision=settings["precision"],
        device=device,
        attention=settings["attention"],
        batch_size=settings["batch_size"],
        # Batches end with their shards, and what is missing in one is computed all the same.
        limit=existing.layout.shard_samples if existing else config.shard_samples or shard,
    )
    if settings["compile"] and attention == "flex" and device.type == "cpu":
        raise SamiCacheError("--compile: torch cannot compile --attention flex for the CPU. Use --attention timm or folded.")
    embedder = Embedder(
        source=source,
        teacher=teacher,
        grid=settings["grid"],
        mode=ViewMode(views=settings["views"], seed=settings["seed"]),
        precision=settings["precision"],
        device=device,
        batch_size=batch_size,
        compiled=compile_mode(device, teacher.info.image_size) if settings["compile"] else None,
        images={"short_side": 256, "quality": 90} if settings["images"] else None,
        workers=config.workers or min(16, os.cpu_count() or 1),
    )
    codec: dict[str, Any] = {"name": settings["codec"], "error": settings["error"] if settings["codec"] == "pca" else None}
    codec["fit_images"] = settings["fit_images"]
    job = Job(config, source, embedder, existing, codec, attention=attention, added=added)
    if existing:
        existing.check_identity(job.identity)
    if other:
        other.check_identity(job.identity)
        if existing and not same_codec(existing, other):
            raise IdentityError(f"{existing.path} has a codec already, and not that of {other.path}. Leave out --codec-from.")
        job.codec = other.codec
    return job


_TYPES: dict[str, Any] = dict.fromkeys(("grid", "views", "seed", "fit_images"), int) | {
    "batch_size": int | None,
    "compile": bool,
    "image_size": int | None,
    "precision": str,
    "codec": str,
    "error": float | int,
    "images": bool,
}


def _settings(config: ExtractConfig, existing: dict[str, Any] | None) -> dict[str, Any]:
    """Each setting that was left open: the cache's, or that of the one whose codec is taken, else the default."""
    device = choose_device(config.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SamiCacheError(f"--device {device}: torch {torch.__version__} sees no GPU here. Use --device cpu.")
    views = config.views or 0
    defaults: dict[str, Any] = {
        "weights": None,
        "layer": None,
        "image_size": 224 if views and config.teacher in ("vit_h", "vit_l", "vit_b") else None,
        "grid": 14 if views else 32,
        "precision": "bfloat16" if on_gpu else "float32",
        "views": 0,
        "seed": 0,
        "codec": "pca",
        "error": 0.01,
        "images": True,
        "fit_images": 256,
        "batch_size": None,
        "attention": None,
        "compile": False,
    }
    if existing:
        identity, provenance = existing["identity"], existing["provenance"]
        defaults |= {
            "weights": provenance["weights"],
            "layer": identity["teacher"]["layer"],
            "image_size": identity["teacher"]["image_size"],
            "grid": identity["grid"],
            "precision": identity["precision"],
            "views": identity["view"].get("views", 0),
            "seed": identity["view"].get("seed", provenance["seed"]),
            "codec": identity["codec"]["name"],
            "error": identity["codec"]["error"] or 0.01,
            "images": identity["images"] is not None,
            "fit_images": identity["codec"]["fit_images"],
        }
        # They decide the last bits, and those of other hardware are others anyway: there its own choice is better, or must be.
        if provenance["device"] == _hardware(device):
            defaults |= {
                "batch_size": provenance["batch_size"],
                "attention": provenance.get("attention"),
                "compile": bool(provenance.get("compiled")),
            }
    for name, value in defaults.items() if existing else ():
        if not isinstance(value, _TYPES.get(name, str | None)):
            raise TypeError(f"{name} is {value!r}")
    given = {name: getattr(config, name) for name in defaults if getattr(config, name) is not None}
    return {**defaults, **given, "device": device}


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def arrange(cache: Cache, source: Source) -> tuple[Source, int]:
    """The images of a source in the order of a cache, then those that it does not have, and how many these are.

    Classes keep the cache's numbers; new ones follow. Raises IdentityError where images of the cache are gone or have other
    labels.
    """
    if listing_digest(source.keys, source.labels) == cache.attributes["listing"]:
        if len(source) * max(1, cache.views) == cache.samples:
            return source, 0
        raise DamageError(f"{cache.path}: its head counts {cache.samples} samples, its listing {len(source)} images")
    before, labels_before = cache.listing["key"].to_pylist(), cache.listing["label"].to_pylist()
    where = {key: index for index, key in enumerate(source.keys)}
    known = set(before)
    removed = sorted(known - where.keys())
    added = [index for index, key in enumerate(source.keys) if key not in known]
    names, numbers = source.class_names, None
    if names is not None and cache.attributes["class_names"] is not None:
        names = list(dict.fromkeys([*cache.attributes["class_names"], *names]))
        numbers = [names.index(name) for name in source.class_names or ()]
    labels = [label if label is None or numbers is None else numbers[label] for label in source.labels]
    moved = [key for key, label in zip(before, labels_before, strict=True) if key in where and labels[where[key]] != label]
    if not removed and not moved:
        order = [where[key] for key in before] + added
        return Rearranged(source, order, [labels[index] for index in order], names), len(added)
    lines = []
    for what, keys in (("removed", removed), ("with another label", sorted(moved))):
        if keys:
            lines.append(f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
    raise IdentityError(
        f"{cache.path} was made for {len(before)} images, {source.location} has {len(source)}:\n  "
        + "\n  ".join(lines)
        + f"\nGive the --data it was made from, or another --cache to make a new one. (`sami-cache subset {cache.path} --data "
        f"{source.location} --out NEW` keeps what is still there.)"
    )


def how_to_go_on(cache: AnyPath) -> str:
    return f"interrupted: what was committed to {cache} stays; run the same command again to go on."
