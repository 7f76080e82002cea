"""Pretraining a student from a cache, from pixels, or with the teacher online."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipelines.encoding import PRECISIONS
from pipelines.recipes import SAMI_IMAGENET
from pipelines.running import Prepared, cadence, micro_batches, run_task
from sami_cache.checkpoints import load_weights
from sami_cache.data.sources import open_source
from sami_cache.errors import SamiCacheError
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.losses import Kind
from sami_cache.models.students import SAMI, KeysValues, create_encoder
from sami_cache.models.teachers import Teacher, load_teacher
from sami_cache.models.weights import check_file_digest
from sami_cache.order import split_held_out
from sami_cache.processes import GRACE, rank_and_world
from sami_cache.samples import CacheSamples, Samples, SourceSamples
from sami_cache.store.cache import Cache
from sami_cache.store.local_copies import DEFAULT_BYTES, LocalCopies, default_folder
from sami_cache.store.places import AnyPath, RemotePath
from sami_cache.tasks.sami import CacheTargets, OnlineTargets, PixelTargets, SAMIConfig, SAMITask, Target
from sami_cache.training import TrainConfig

MICRO_BATCH = {"cuda": 512, "cpu": 32}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A pretraining run. None means: decided from the cache and the recipe; the resolved values are saved with the run."""

    run: Path
    cache: AnyPath | None = None
    """Where the samples come from; None only with `teacher_online` or target pixels."""
    data: Path | None = None
    """The images themselves: for caches without images, and for training without a cache."""
    student: str = "vit_s"
    target: Target = "teacher"
    teacher_online: bool = False
    teacher: str | None = None
    """Online teacher; by default the cache's."""
    weights: str | None = None
    weights_sha256: str | None = None
    """SHA-256 that the file of the weights must have."""
    layer: str | None = None
    image_size: int | None = None
    """Of the online teacher's input, pixels; by default 14 cells' worth."""
    epochs: float = SAMI_IMAGENET.epochs
    steps: int | None = None
    """Instead of epochs."""
    warmup_epochs: float | None = None
    """Default: a tenth of the epochs, 40 of 400 as published."""
    batch_size: int | None = None
    """Images a step. Default: 4096, or for small sets the largest power of two that makes four steps an epoch."""
    micro_batch: int | None = None
    """Images a process sees at once, an upper limit."""
    base_lr: float = SAMI_IMAGENET.base_lr
    weight_decay: float = SAMI_IMAGENET.weight_decay
    clip_grad: float | None = None
    mask_ratio: float = SAMI_IMAGENET.mask_ratio
    loss: Kind = "mse"
    keys_values: KeysValues = "visible+mask"
    reconstruct: float = 1.0
    """Share of the masked tokens that are decoded and scored."""
    decoder_width: int = SAMI_IMAGENET.decoder_width
    decoder_depth: int = SAMI_IMAGENET.decoder_depth
    holdout: float = 0.02
    """Share of the images that are never trained on, and that cosine and loss are reported for."""
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    device: str = "auto"
    workers: int | None = None
    log_every: int | None = None
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    grace: float = GRACE
    """Seconds that the step in hand and its checkpoint may take after SIGTERM or SIGINT."""
    data_timeout: float = 60.0
    """Seconds without any progress in reading after which the run stops with an error."""
    shard_cache: Path | None = None
    """Where local copies of the shards of a cache in an object store are kept. Default: below the user's cache folder."""
    shard_cache_bytes: int = DEFAULT_BYTES
    """What they may take."""
    resume: bool = False
    """Continue the run in `run`."""
    init: Path | None = None
    """Start from the weights of another run or file."""


def train(
    config: TrainingConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Prepared], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue a pretraining; returns the last line of its log. Raises what `Trainer` and the loader raise."""
    return run_task(config, lambda device: prepare(config, device), on_log, on_start)


def prepare(config: TrainingConfig, device: torch.device) -> Prepared:
    """Resolve a configuration: samples, split, sizes, model and targets."""
    samples, cache = _samples(config)
    chosen, held = split_held_out(samples.keys, samples.usable, config.holdout)
    count = int(chosen.sum())
    if not count:
        raise SamiCacheError("there is no image left to train on: extract more, or lower --holdout.")
    rank, world = rank_and_world()
    batch_size = config.batch_size or min(SAMI_IMAGENET.batch_size, 1 << max(0, (count // 4).bit_length() - 1))
    limit = config.micro_batch or MICRO_BATCH.get(device.type, 32)
    accumulate = micro_batches(batch_size, world, limit)
    if config.weights_sha256 and not config.teacher_online:
        raise SamiCacheError("--weights-sha256 is of the online teacher's weights: it goes with --teacher-online.")
    teacher = _teacher(config, cache) if config.teacher_online else None
    loader_config = LoaderConfig(
        batch_size=batch_size,
        micro_batches=accumulate,
        seed=config.seed,
        teacher_size=teacher.info.image_size if teacher else None,
        teacher_interpolation=teacher.info.interpolation if teacher else "bilinear",
        threads=config.workers,
        pin_memory=device.type == "cuda",
        timeout=config.data_timeout,
    )
    loader = Loader(samples, chosen, loader_config, rank=rank, world=world)
    steps = config.steps or max(1, round(config.epochs * loader.steps_per_epoch))
    warmup_epochs = config.warmup_epochs
    warmup = steps // 10 if warmup_epochs is None else min(steps, round(warmup_epochs * loader.steps_per_epoch))
    train_config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        lr=config.base_lr * batch_size / 256,
        seed=config.seed,
        warmup_steps=warmup,
        accumulate=accumulate,
        weight_decay=config.weight_decay,
        betas=SAMI_IMAGENET.betas,
        clip_grad=config.clip_grad,
        precision=config.precision,
        compile=config.compile,
        **cadence(config, steps, loader.steps_per_epoch, evaluates=bool(held.any())),
    )
    torch.manual_seed(config.seed)
    sami = SAMIConfig(
        mask_ratio=config.mask_ratio,
        loss=config.loss,
        tokens="masked" if config.target == "pixels" else "all",
        reconstruct=config.reconstruct,
    )
    targets = _targets(config, cache, teacher, samples, held if held.any() else chosen, loader_config, device)
    model = SAMI(
        create_encoder(config.student),
        target_channels=targets.channels,
        decoder_width=config.decoder_width,
        decoder_depth=config.decoder_depth,
        keys_values=config.keys_values,
    )
    share = np.zeros_like(held)
    share[np.array_split(np.flatnonzero(held), world)[rank]] = True
    held_out = Loader(samples, share, _for_evaluation(loader_config)) if share.any() else None
    task = SAMITask(model, targets, loader, held_out, sami, device)
    settings = {
        "student": config.student,
        "target": config.target,
        "teacher_online": None if teacher is None else {**asdict(teacher.info), "calibrated": True},
        "cache": None if cache is None else {"cache_id": cache.cache_id, "identity": cache.identity},
        "sami": asdict(sami),
        "decoder": {"width": config.decoder_width, "depth": config.decoder_depth, "keys_values": config.keys_values},
        "target_channels": targets.channels,
        "holdout": config.holdout,
        "samples": {"train": count, "held_out": int(held.sum())},
        "views": asdict(loader_config.views),
        "steps_per_epoch": loader.steps_per_epoch,
        "init": None if config.init is None else str(config.init),
        "places": {
            "cache": None if config.cache is None else str(config.cache.resolve()),
            "data": None if config.data is None else str(config.data.resolve()),
            "weights": config.weights,
        },
    }
    init = config.init
    begin = (lambda: None) if init is None else lambda: load_weights(task.model, init)
    return Prepared(task=task, train=train_config, settings=settings, begin=begin)


def _samples(config: TrainingConfig) -> tuple[Samples, Cache | None]:
    """A cache's samples, or the images of a source where no cache is given."""
    if config.cache is None:
        if config.data is None or (config.target == "teacher" and not config.teacher_online):
            raise SamiCacheError("there is nothing to train from: give --cache, or --data with --teacher-online (or pixels).")
        return SourceSamples(open_source(config.data)), None
    cache = Cache(config.cache)
    if isinstance(cache.path, RemotePath):
        copies = LocalCopies(config.shard_cache or default_folder(), config.shard_cache_bytes)
        copies.check_room(cache.path, min(cache.shards, 3 * LoaderConfig.open_shards))
        cache.path = replace(cache.path, copies=copies)
    if config.teacher_online and cache.views:
        raise SamiCacheError(
            f"{cache.path} holds recorded views, and a teacher online sees new ones: take the images themselves (--no-cache "
            "--data DIR)."
        )
    needed = config.data is not None and not cache.has_images
    return CacheSamples(cache, open_source(config.data) if needed and config.data else None), cache


def _teacher(config: TrainingConfig, cache: Cache | None) -> Teacher:
    """The online teacher: the cache's unless told otherwise, at a resolution that gives the student's 14 x 14 cells."""
    if config.target != "teacher":
        raise SamiCacheError("--teacher-online goes with --target teacher.")
    known = cache.identity["teacher"] if cache else {}
    name = config.teacher or known.get("name")
    if name is None:
        raise SamiCacheError("--teacher-online without a cache needs the teacher's name: --teacher vit_h, for example.")
    same = name == known.get("name")
    weights = config.weights or (cache.attributes["provenance"]["weights"] if cache and same else None)
    layer = config.layer or (known.get("layer") if same else None)
    size = config.image_size or 14 * (known["stride"] if same else 16)
    if config.weights_sha256:
        check_file_digest(weights, config.weights_sha256)
    teacher = load_teacher(name, weights=weights, layer=layer, image_size=size, grid=14)
    if same and teacher.info.weights_sha256 != known["weights_sha256"]:
        raise SamiCacheError(
            f"the online teacher's weights ({teacher.info.weights_sha256[:12]}...) are not those of the cache "
            f"({known['weights_sha256'][:12]}...): give the same --weights, or train without the cache."
        )
    return teacher


def _targets(
    config: TrainingConfig,
    cache: Cache | None,
    teacher: Teacher | None,
    samples: Samples,
    chosen: Any,
    loader_config: LoaderConfig,
    device: torch.device,
) -> CacheTargets | PixelTargets | OnlineTargets:
    if config.target == "pixels":
        return PixelTargets()
    if teacher is None:
        if cache is None:
            raise SamiCacheError("no cache to train from: give --cache, or --data together with --teacher-online.")
        return CacheTargets(cache.codec)
    on_gpu = device.type == "cuda"
    targets = OnlineTargets(teacher, precision=PRECISIONS["bfloat16" if on_gpu else "float32"]).to(device)
    targets.calibrate(Loader(samples, chosen, _for_evaluation(loader_config)).evaluation(16), 64, device)
    return targets


def _for_evaluation(config: LoaderConfig) -> LoaderConfig:
    return replace(config, batch_size=1, micro_batches=1)
