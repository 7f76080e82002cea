"""Fine-tuning a pretrained student: so far, to segment anything from prompts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipelines.promptable import open_promptable
from pipelines.recipes import EFFICIENTSAM_SA1B
from pipelines.starts import open_start
from sami_cache.data.annotations import open_annotations
from sami_cache.data.sources import open_source
from sami_cache.errors import SamiCacheError
from sami_cache.models.segment_anything import Family, SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import load_decoder, load_student
from sami_cache.order import split_held_out
from sami_cache.processes import GRACE, StopSignal, distributed, rank_and_world
from sami_cache.prompts import PromptConfig, first_prompts, learnable
from sami_cache.steps import PictureSteps
from sami_cache.store.cache import Cache
from sami_cache.tasks.neck import EncoderOf, NeckSamples, NeckTask
from sami_cache.tasks.promptable import PromptableTask, RoundsConfig, trained
from sami_cache.training import TrainConfig, Trainer

# A quarter of the published batch on a large GPU, one picture where memory is small; the gradient is the same.
MICRO_BATCH = {"cuda": 8, "cpu": 2}
# They say where things are, not what is computed.
FREE_FIELDS = ("places",)


@dataclass(frozen=True, kw_only=True)
class PromptableTrainingConfig:
    """A fine-tuning run. None means: decided from what is given and the recipe; the resolved values are saved with the run."""

    run: Path
    data: Path | None = None
    """Annotations to train on: a COCO-format JSON or a folder of SA-1B. With `from_cache`: the images it was made from."""
    images: Path | None = None
    """The pictures of `data`, where it is a JSON."""
    val: Path | None = None
    """Annotations to evaluate on; None: none."""
    val_images: Path | None = None
    """By default `images`."""
    from_cache: Path | None = None
    """Train the encoder alone, on a cache of SAM's embeddings."""
    init: Path | None = None
    """Where the weights start: a run of `train` or of this, or a checkpoint; None: nowhere."""
    decoder: Path | None = None
    """Prompt encoder and mask decoder from another file."""
    freeze_decoder: bool = False
    family: Family | None = None
    """By default that of `init`, else sam."""
    student: str | None = None
    """By default that of `init`, else vit_t."""
    image_size: int = EFFICIENTSAM_SA1B.image_size
    depth: int | None = None
    """Blocks of a student from scratch; for tests."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    error_points: int | None = None
    """Default: 8, family efficientsam 4."""
    mask_rounds: int | None = None
    """Default: 2, family efficientsam 0."""
    epochs: float = EFFICIENTSAM_SA1B.epochs
    steps: int | None = None
    """Instead of epochs."""
    warmup_steps: int = 0
    batch_size: int | None = None
    """Pictures a step. Default: 128, or all there are if fewer."""
    micro_batch: int | None = None
    """Pictures a process sees at once, an upper limit."""
    lr: float = EFFICIENTSAM_SA1B.lr
    weight_decay: float = EFFICIENTSAM_SA1B.weight_decay
    clip_grad: float | None = None
    holdout: float = 0.02
    """With `from_cache`: share of the images that are only evaluated on."""
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    workers: int | None = None
    log_every: int | None = None
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    grace: float = GRACE
    data_timeout: float = 60.0
    """Seconds without a picture after which the run stops with an error."""
    resume: bool = False


@dataclass(kw_only=True)
class Prepared:
    """A run that is ready to start."""

    task: PromptableTask | NeckTask
    train: TrainConfig
    settings: dict[str, Any]
    """What is saved with the run, `train` left out."""


def finetune_promptable(
    config: PromptableTrainingConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Prepared], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue a fine-tuning; returns the last line of its log. `pipelines.promptable.open_promptable` opens the run."""
    nothing_yet = "interrupted outside of training; the same command starts, or with --resume goes on."
    with StopSignal(lambda: nothing_yet), distributed(config.device) as device:
        prepared = prepare(config, device)
        trainer = Trainer(
            prepared.task,
            prepared.train,
            config.run,
            device,
            resume=config.resume,
            settings=prepared.settings,
            free_fields=FREE_FIELDS,
            on_log=on_log,
            grace=config.grace,
        )
        if rank_and_world()[0] == 0:
            on_start(prepared)
        return trainer.fit()


def prepare(config: PromptableTrainingConfig, device: torch.device) -> Prepared:
    """Resolve a configuration: model, weights, data and steps."""
    torch.manual_seed(config.seed)
    model = start_model(config)
    return _prepare_neck(config, model, device) if config.from_cache else _prepare_prompts(config, model, device)


def start_model(config: PromptableTrainingConfig) -> SegmentAnything:
    """The model with the weights that `init` and `decoder` give. Raises SamiCacheError where they do not fit."""
    family, student, size = config.family, config.student, config.image_size
    if config.init is None:
        new = SegmentAnythingConfig(family=family or "sam", encoder=student or "vit_t", image_size=size)
        model = SegmentAnything(new if config.depth is None else replace(new, depth=config.depth))
    elif (start := open_start(config.init)) is not None:
        if student and student != start.student:
            raise SamiCacheError(f"--student {student}: {config.init} is a {start.student}")
        depth = len({key.split(".")[1] for key in start.state if key.startswith("blocks.")})
        own = SegmentAnythingConfig(family=family or "sam", encoder=start.student, image_size=size, depth=depth)
        model = SegmentAnything(own)
        load_student(model, start.state, start.source)
    else:
        found = open_promptable(config.init)
        if student and student != found.config.encoder:
            raise SamiCacheError(f"--student {student}: {config.init} has a {found.config.encoder}")
        same = family is None or family == found.config.family
        own = SegmentAnythingConfig(
            family=family or found.config.family, encoder=found.config.encoder, image_size=size, depth=found.config.depth
        )
        model = SegmentAnything(own)
        source, target = (found, model) if same else (found.image_encoder, model.image_encoder)
        try:
            target.load_state_dict(source.state_dict())
        except RuntimeError as error:  # only SAM's own encoders have weights that depend on it
            raise SamiCacheError(
                f"{config.init} does not fit --image-size {size}: its {found.config.encoder} is for {found.config.image_size}"
            ) from error
    if config.decoder is not None:
        load_decoder(model, config.decoder)
    return model


def _prepare_prompts(config: PromptableTrainingConfig, model: SegmentAnything, device: torch.device) -> Prepared:
    if config.data is None:
        raise SamiCacheError("there is nothing to train on: give --data (COCO-format JSON or SA-1B folder), or --from-cache")
    annotations = open_annotations(config.data, config.images)
    if not any(learnable(found, config.prompts) for number in range(len(annotations)) for found in annotations.objects(number)):
        raise SamiCacheError(f"{config.data} has no object to learn: crowds and whole pictures are left out")
    held_out = None if config.val is None else open_annotations(config.val, config.val_images or config.images)
    family = model.config.family
    rounds = RoundsConfig(
        error_points=(4 if family == "efficientsam" else 8) if config.error_points is None else config.error_points,
        mask_rounds=(0 if family == "efficientsam" else 2) if config.mask_rounds is None else config.mask_rounds,
    )
    rounds.check(family)
    own = trained(model)
    if config.freeze_decoder:
        own.prompt_encoder.requires_grad_(False)
        own.mask_decoder.requires_grad_(False)
    train = _train_config(config, len(annotations), device, evaluates=held_out is not None)
    steps = PictureSteps(
        len(annotations),
        first_prompts(annotations, own, config.prompts, config.seed, rounds.error_points),
        **_step_options(config, train),
    )
    rank, world = rank_and_world()
    numbers = range(rank, len(held_out) if held_out else 0, world)
    task = PromptableTask(own, steps, rounds, held_out=held_out, numbers=numbers, device=device)
    settings = _settings(config, own, steps.steps_per_epoch) | {
        "prompts": asdict(config.prompts),
        "rounds": {"error_points": rounds.error_points, "mask_rounds": rounds.mask_rounds},
        "freeze_decoder": config.freeze_decoder,
        "pictures": {"train": len(annotations), "held_out": len(held_out) if held_out else 0},
    }
    return Prepared(task=task, train=train, settings=settings)


def _prepare_neck(config: PromptableTrainingConfig, model: SegmentAnything, device: torch.device) -> Prepared:
    assert config.from_cache is not None
    cache = Cache(config.from_cache)
    own = EncoderOf(model.config)
    own.load_state_dict(model.state_dict())
    samples = NeckSamples(cache, open_source(config.data) if config.data else None, own)
    chosen, held = map(np.flatnonzero, split_held_out(samples.samples.keys, samples.samples.usable, config.holdout))
    if not len(chosen):
        raise SamiCacheError("there is no image left to train on: extract more, or lower --holdout.")
    train = _train_config(config, len(chosen), device, evaluates=bool(len(held)))
    steps = PictureSteps(len(chosen), samples.make(chosen), **_step_options(config, train))
    rank, world = rank_and_world()
    task = NeckTask(own, samples, steps, held_out=held[rank::world], device=device)
    settings = _settings(config, own, steps.steps_per_epoch) | {
        "from_cache": {"cache_id": cache.cache_id, "identity": cache.identity},
        "pixels": "originals" if config.data else "the cache's JPEGs",
        "holdout": config.holdout,
        "pictures": {"train": len(chosen), "held_out": len(held)},
    }
    return Prepared(task=task, train=train, settings=settings)


def _settings(config: PromptableTrainingConfig, model: SegmentAnything, steps_per_epoch: float) -> dict[str, Any]:
    paths = ("data", "images", "val", "val_images", "from_cache", "decoder", "init")
    return {
        "segment_anything": asdict(model.config),
        "steps_per_epoch": steps_per_epoch,
        "places": {name: str(path.resolve()) for name in paths if (path := getattr(config, name)) is not None},
    }


def _train_config(config: PromptableTrainingConfig, count: int, device: torch.device, *, evaluates: bool) -> TrainConfig:
    world = rank_and_world()[1]
    batch_size = config.batch_size or max(1, min(EFFICIENTSAM_SA1B.batch_size, count) // world * world)
    if batch_size % world:
        raise SamiCacheError(f"--batch-size {batch_size} is no multiple of the {world} processes.")
    share, limit = batch_size // world, config.micro_batch or MICRO_BATCH.get(device.type, 2)
    steps_per_epoch = max(1, count // batch_size)
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    cadence = max(steps_per_epoch, min(200, steps))
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        lr=config.lr,
        seed=config.seed,
        warmup_steps=config.warmup_steps,
        schedule="linear",
        accumulate=next(parts for parts in range(-(-share // limit), share + 1) if share % parts == 0),
        weight_decay=config.weight_decay,
        betas=EFFICIENTSAM_SA1B.betas,
        clip_grad=config.clip_grad,
        precision=config.precision,
        log_every=config.log_every or max(1, min(20, steps // 50)),
        checkpoint_every=config.checkpoint_every or cadence,
        evaluate_every=(config.evaluate_every or max(1, min(cadence, steps // 2))) if evaluates else None,
    )


def _step_options(config: PromptableTrainingConfig, train: TrainConfig) -> dict[str, Any]:
    rank, world = rank_and_world()
    return {
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "seed": config.seed,
        "rank": rank,
        "world": world,
        "threads": config.workers,
        "timeout": config.data_timeout,
    }
