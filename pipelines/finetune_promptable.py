"""Fine-tuning a pretrained student to segment anything from prompts."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.promptable import open_promptable
from pipelines.recipes import EFFICIENTSAM_SA1B
from pipelines.running import Prepared, RunOptions, run_task, step_options, train_config
from pipelines.starts import open_start
from sami_cache.data.annotations import open_annotations
from sami_cache.data.sources import open_source
from sami_cache.errors import SamiCacheError
from sami_cache.mask_losses import FOCAL_WEIGHT
from sami_cache.models.segment_anything import Family, SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import load_decoder, load_student
from sami_cache.order import split_held_out
from sami_cache.processes import rank_and_world
from sami_cache.prompts import PromptConfig, first_prompts, learnable
from sami_cache.steps import PictureSteps
from sami_cache.store.cache import Cache
from sami_cache.store.places import AnyPath
from sami_cache.tasks.neck import EncoderOf, NeckSamples, NeckTask
from sami_cache.tasks.promptable import PromptableTask, RoundsConfig, trained

# 64 objects a picture, and 11 rounds, whose activations are computed again.
MICRO_BATCH = {"cuda": 8, "cpu": 2}


@dataclass(frozen=True, kw_only=True)
class PromptableTrainingConfig(RunOptions):
    """A fine-tuning run. None means: decided from what is given and the recipe; the resolved values are saved with the run."""

    data: Path | None = None
    """Annotations to train on: a COCO-format JSON or a folder of SA-1B. With `from_cache`: the images it was made from."""
    images: Path | None = None
    """The pictures of `data`, where it is a JSON."""
    val: Path | None = None
    """Annotations to evaluate on; None: none."""
    val_images: Path | None = None
    """By default `images`."""
    from_cache: AnyPath | None = None
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
    image_size: int | None = None
    """By default that of `init`, else 1024."""
    depth: int | None = None
    """Blocks of a student from scratch; for tests."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    error_points: int | None = None
    """Default: 8, family efficientsam 4."""
    mask_rounds: int | None = None
    """Default: 2, family efficientsam 0."""
    focal_weight: float = FOCAL_WEIGHT
    """Of the focal loss beside the dice loss."""
    epochs: float = EFFICIENTSAM_SA1B.epochs
    batch_size: int = EFFICIENTSAM_SA1B.batch_size
    lr: float = EFFICIENTSAM_SA1B.lr
    weight_decay: float = EFFICIENTSAM_SA1B.weight_decay
    betas: tuple[float, float] = EFFICIENTSAM_SA1B.betas
    holdout: float | None = None
    """With `from_cache`: share of the images that are only evaluated on; None: 0.02."""


def finetune_promptable(
    config: PromptableTrainingConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Prepared], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue a fine-tuning; returns the last line of its log. `pipelines.promptable.open_promptable` opens the run."""
    return run_task(config, lambda device: prepare(config, device), on_log, on_start)


def prepare(config: PromptableTrainingConfig, device: torch.device) -> Prepared:
    """Resolve a configuration: model, weights, data and steps."""
    torch.manual_seed(config.seed)
    model = start_model(config)
    return _prepare_neck(config, model, device) if config.from_cache else _prepare_prompts(config, model, device)


def start_model(config: PromptableTrainingConfig) -> SegmentAnything:
    """The model with the weights that `init` and `decoder` give. Raises SamiCacheError where they do not fit."""
    family, student, size = config.family, config.student, config.image_size or EFFICIENTSAM_SA1B.image_size
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
        size = config.image_size or found.config.image_size
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
    if config.holdout is not None:
        raise SamiCacheError("--holdout goes with --from-cache; here --val says what to evaluate on")
    if not 0 <= config.focal_weight < math.inf:
        raise SamiCacheError(f"focal_weight is {config.focal_weight}: expected 0 or more")
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
    train = train_config(
        config, len(annotations), device, micro_batch=MICRO_BATCH, evaluates=held_out is not None, schedule="linear"
    )
    steps = PictureSteps(
        len(annotations),
        first_prompts(annotations, own, config.prompts, config.seed, rounds.error_points),
        **step_options(config, train),
    )
    rank, world = rank_and_world()
    numbers = range(rank, len(held_out) if held_out else 0, world)
    task = PromptableTask(
        own, steps, rounds, held_out=held_out, numbers=numbers, focal_weight=config.focal_weight, device=device
    )
    settings = _settings(config, own, steps.steps_per_epoch) | {
        "prompts": asdict(config.prompts),
        "rounds": {"error_points": rounds.error_points, "mask_rounds": rounds.mask_rounds},
        "focal_weight": config.focal_weight,
        "freeze_decoder": config.freeze_decoder,
        "pictures": {"train": len(annotations), "held_out": len(held_out) if held_out else 0},
        "annotations": {"train": annotations.fingerprint, "held_out": held_out.fingerprint if held_out else None},
    }
    return Prepared(task=task, train=train, settings=settings)


def _prepare_neck(config: PromptableTrainingConfig, model: SegmentAnything, device: torch.device) -> Prepared:
    assert config.from_cache is not None
    idle = ("images", "val", "val_images", "error_points", "mask_rounds")
    if given := [f"--{name.replace('_', '-')}" for name in idle if getattr(config, name) is not None]:
        raise SamiCacheError(f"{', '.join(given)}: not with --from-cache, which takes no prompts and evaluates on --holdout")
    holdout = 0.02 if config.holdout is None else config.holdout
    cache = Cache(config.from_cache)
    own = EncoderOf(model.config)
    own.load_state_dict(model.state_dict())
    samples = NeckSamples(cache, open_source(config.data) if config.data else None, own)
    chosen, held = map(np.flatnonzero, split_held_out(samples.samples.keys, samples.samples.usable, holdout))
    if not len(chosen):
        raise SamiCacheError("there is no image left to train on: extract more, or lower --holdout.")
    train = train_config(config, len(chosen), device, micro_batch=MICRO_BATCH, evaluates=bool(len(held)), schedule="linear")
    steps = PictureSteps(len(chosen), samples.make(chosen), **step_options(config, train))
    rank, world = rank_and_world()
    task = NeckTask(own, samples, steps, held_out=held[rank::world], device=device)
    settings = _settings(config, own, steps.steps_per_epoch) | {
        "from_cache": {"cache_id": cache.cache_id, "identity": cache.identity},
        "pixels": "originals" if config.data else "the cache's JPEGs",
        "holdout": holdout,
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
