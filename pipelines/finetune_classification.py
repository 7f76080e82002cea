"""Fine-tuning a student to classify pictures."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from pipelines.recipes import IMAGENET_CLASSIFICATION as IMAGENET
from pipelines.running import Prepared, RunOptions, micro_batches, run_task, step_options, train_config
from pipelines.starts import start_constants, start_encoder
from sami_cache.augmentation import Augment, AugmentConfig, Mixing, evaluation_view
from sami_cache.checkpoints import Checkpoint, load_newest, put_weights
from sami_cache.data.labelled import LabelledPictures
from sami_cache.data.sources import open_source
from sami_cache.errors import SamiCacheError
from sami_cache.models.pyramid import layer_scale
from sami_cache.models.students import STUDENTS
from sami_cache.processes import rank_and_world
from sami_cache.steps import PictureSteps
from sami_cache.tasks.classification import ClassificationTask, Classifier, Pool, training_items
from sami_cache.training import TrainConfig

MICRO_BATCH = {"cuda": 256, "cpu": 32}


@dataclass(frozen=True, kw_only=True)
class ClassificationTrainingConfig(RunOptions):
    """A fine-tuning run. None means: decided from what is given and the recipe; the resolved values are saved with the run."""

    data: Path
    """Pictures with labels to train on, as `open_source` reads them."""
    val: Path | None = None
    """The same to evaluate on; None: nothing."""
    init: str | Path | None = None
    """Where the weights start, as `starts.open_start` reads it; None: nowhere."""
    student: str | None = None
    """By default that of `init`, else vit_t."""
    shape: dict[str, Any] = field(default_factory=dict)
    """timm's options for a student of another shape: patch_size, embed_dim, depth, num_heads."""
    image_size: int = IMAGENET.image_size
    pool: Pool = "avg"
    """What is classified: the mean of the patch tokens, or the class token."""
    layer_decay: float | None = None
    """Of the learning rate, block by block towards the input; None: 0.75, none for vit_t and from scratch."""
    drop_path: float = IMAGENET.drop_path
    """Probability that a picture skips the last block; it grows linearly from 0 in the first."""
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(
            randaugment=IMAGENET.randaugment,
            mixup=IMAGENET.mixup,
            cutmix=IMAGENET.cutmix,
            smoothing=IMAGENET.smoothing,
        )
    )
    crop_ratio: float = IMAGENET.crop_ratio
    """Evaluation: the short side is resized to image_size / crop_ratio."""
    epochs: float = IMAGENET.epochs
    warmup_epochs: float = IMAGENET.warmup_epochs
    batch_size: int = IMAGENET.batch_size
    lr: float = IMAGENET.lr
    weight_decay: float = IMAGENET.weight_decay
    betas: tuple[float, float] = IMAGENET.betas


def finetune_classification(
    config: ClassificationTrainingConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Prepared], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue a fine-tuning; returns the last line of its log. `open_classifier` opens the run."""
    return run_task(config, lambda device: prepare(config, device), on_log, on_start)


def prepare(config: ClassificationTrainingConfig, device: torch.device) -> Prepared:
    """Resolve a configuration: data, model, weights and steps. Raises SamiCacheError where they do not fit together."""
    pictures = LabelledPictures(open_source(config.data))
    held_out = None if config.val is None else LabelledPictures(open_source(config.val), pictures)
    if pictures.classes < 2:
        raise SamiCacheError(f"{config.data} has one class: expected two or more")
    torch.manual_seed(config.seed)
    encoder, student, source = start_encoder(
        config.init, config.student, image_size=config.image_size, drop_path=config.drop_path, **config.shape
    )
    model = Classifier(encoder, pictures.classes, config.pool)
    mean, std = start_constants(config.init)
    train = _train_config(config, len(pictures), device, evaluates=held_out is not None)
    # Within a step pictures are sorted by number, in storage perhaps class by class; but neighbours are mixed.
    order = np.random.default_rng(config.seed).permutation(len(pictures))
    augment = Augment(config.image_size, config.augment, mean, config.seed)
    steps = PictureSteps(len(pictures), training_items(pictures, augment, order), **step_options(config, train))
    rank, world = rank_and_world()
    task = ClassificationTask(
        model,
        steps,
        Mixing(pictures.classes, config.augment, config.seed),
        mean=mean,
        std=std,
        device=device,
        held_out=held_out,
        numbers=range(rank, len(held_out), world) if held_out else (),
        view=evaluation_view(config.image_size, config.crop_ratio),
        evaluation_batch=config.micro_batch or MICRO_BATCH.get(device.type, MICRO_BATCH["cpu"]),
    )
    decay = IMAGENET.layer_decay_of(student, config.init is not None) if config.layer_decay is None else config.layer_decay
    if not 0 < decay <= 1:
        raise SamiCacheError(f"--layer-decay {decay}: expected a factor above 0, up to 1; 1 is none")
    depth = len(encoder.blocks)
    settings = {
        "classification": {
            "student": student,
            "shape": config.shape,
            "image_size": config.image_size,
            "pool": config.pool,
            "classes": pictures.classes,
            "class_names": pictures.class_names,
            "mean": mean,
            "std": std,
            "crop_ratio": config.crop_ratio,
        },
        "augment": asdict(config.augment),
        "layer_decay": decay,
        "drop_path": config.drop_path,
        "steps_per_epoch": steps.steps_per_epoch,
        "pictures": {
            "train": len(pictures),
            "held_out": len(held_out) if held_out else 0,
            "unlabelled": pictures.unlabelled + (held_out.unlabelled if held_out else 0),
        },
        "pretrained": config.init is not None,
        "places": {
            "data": str(config.data.resolve()),
            "val": str(config.val.resolve()) if config.val else None,
            "init": source,
        },
    }
    return Prepared(task=task, train=train, settings=settings, lr_scale=lambda name: layer_scale(name, depth, decay))


def open_classifier(run: Path) -> tuple[Classifier, Checkpoint]:
    """The model of a run's newest intact checkpoint, in evaluation mode on the CPU, and the checkpoint.

    Raises SamiCacheError where `run` is no run of `finetune classification`, DamageError where no checkpoint is intact.
    """
    checkpoint = load_newest(run / "checkpoints")
    if checkpoint is None:
        raise SamiCacheError(f"{run}: the run has no checkpoint yet. Let it reach its first, or continue it with --resume.")
    if "classification" not in checkpoint.config:
        raise SamiCacheError(f"{run}: this is no run of `sami-cache finetune classification`.")
    own = checkpoint.config["classification"]
    name, options = timm_model(own)
    model = Classifier(cast(VisionTransformer, timm.create_model(name, **options)), own["classes"], own["pool"])
    put_weights(model, checkpoint.model, f"the checkpoint of step {checkpoint.step} of {run}")
    return model.eval(), checkpoint


def timm_model(own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What makes a run's model with stock timm, from its settings: a name and options for `timm.create_model`."""
    options = {"num_classes": own["classes"], "global_pool": own["pool"], "img_size": own["image_size"], **own["shape"]}
    name: str = own["student"]
    return STUDENTS.get(name, name), options


def _train_config(config: ClassificationTrainingConfig, count: int, device: torch.device, *, evaluates: bool) -> TrainConfig:
    """The steps; where pictures are mixed, every part of a step is a number of pairs."""
    pair, world = (2 if config.augment.mixes else 1), rank_and_world()[1]
    together = pair * world
    if config.batch_size % together and config.batch_size <= count:
        raise SamiCacheError(
            f"--batch-size {config.batch_size} is no multiple of {together}: mixup and cutmix mix pairs in each of {world} "
            "processes. Choose another, or turn both off with 0"
        )
    if count < together:
        raise SamiCacheError(f"{count} pictures are too few to train on: expected {together} or more")
    fitting = replace(config, batch_size=min(config.batch_size, count // together * together))
    train = train_config(fitting, count, device, micro_batch=MICRO_BATCH, evaluates=evaluates)
    limit = config.micro_batch or MICRO_BATCH.get(device.type, MICRO_BATCH["cpu"])
    return replace(train, accumulate=micro_batches(train.batch_size // pair, world, max(1, limit // pair)))
