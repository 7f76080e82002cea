"""Fine-tuning a pretrained student to name the class of every pixel, and measuring what came of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipelines.class_names import find_class_names, read_class_names
from pipelines.recipes import MASK2FORMER_ADE20K
from pipelines.running import Prepared, RunOptions, run_task, step_options, train_config
from pipelines.semantic import build
from pipelines.starts import start_constants, start_encoder
from sami_cache.data.class_masks import ClassLabels, MaskedPictures
from sami_cache.errors import SamiCacheError
from sami_cache.models.pyramid import CHANNELS, GLOBAL_BLOCKS
from sami_cache.models.semantic import Mask2FormerShape
from sami_cache.steps import PictureSteps
from sami_cache.tasks.semantic import Normalise, SemanticAugment, SemanticTask, Viewing, examples

MICRO_BATCH = {"cuda": 8, "cpu": 2}


@dataclass(frozen=True, kw_only=True)
class SemanticTrainingConfig(RunOptions):
    """A fine-tuning run; the defaults are the paper's, and Mask2Former's where the paper names none."""

    data: Path
    """The folder of pictures to train on."""
    masks: Path
    """The folder of their PNGs of class indices, under the same names."""
    val: Path | None = None
    val_masks: Path | None = None
    classes: Path | None = None
    """Names of the classes, as `read_class_names` reads them; None: the indices that occur in `masks` are the classes."""
    ignore_index: int | None = 255
    """Of pixels without a class; None: no pixel is."""
    reduce_zero_label: bool = False
    """Index 0 is no class either, as in ADE20K."""
    init: str | None = None
    """A run of `train`, an export, a plain ViT's weights or timm:NAME; None: scratch."""
    student: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    """To timm, for encoders of another shape: depth, embed_dim, num_heads."""
    image_size: int = MASK2FORMER_ADE20K.image_size
    window: int | None = None
    """Tokens a side within which most blocks attend; None: all attend to all."""
    global_blocks: int = GLOBAL_BLOCKS
    mask2former: Mask2FormerShape = field(default_factory=Mask2FormerShape)
    channels: int = CHANNELS
    """Of the pyramid and the decoders."""
    augment: SemanticAugment = field(default_factory=SemanticAugment)
    viewing: Viewing = "whole"
    """How a picture is evaluated: at once, or in windows of the size trained on."""
    backbone_lr: float = MASK2FORMER_ADE20K.backbone_lr
    """What the encoder's learning rate is multiplied with; the pyramid's is not, which is new."""
    drop_path: float = 0.0
    """Of the encoder. The paper names none."""
    epochs: float = 0
    """Above 0: instead of steps."""
    steps: int | None = MASK2FORMER_ADE20K.steps
    batch_size: int = MASK2FORMER_ADE20K.batch_size
    lr: float = MASK2FORMER_ADE20K.lr
    weight_decay: float = MASK2FORMER_ADE20K.weight_decay
    betas: tuple[float, float] = MASK2FORMER_ADE20K.betas
    clip_grad: float | None = MASK2FORMER_ADE20K.clip_grad


def finetune_semantic(
    config: SemanticTrainingConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Prepared], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue a fine-tuning; returns the last line of its log. `pipelines.semantic.open_semantic` opens the run."""
    return run_task(config, lambda device: prepare(config, device), on_log, on_start)


def prepare(config: SemanticTrainingConfig, device: torch.device) -> Prepared:
    """Resolve a configuration: data, classes, model and steps. Raises SamiCacheError where they do not fit together."""
    if config.image_size % 32:
        raise SamiCacheError(f"--image-size {config.image_size}: expected a multiple of 32")
    if (config.val is None) != (config.val_masks is None):
        raise SamiCacheError("--val and --val-masks: expected both, or neither")
    pictures = MaskedPictures(config.data, config.masks)
    held_out = MaskedPictures(config.val, config.val_masks) if config.val and config.val_masks else None
    classes = _classes(config, pictures)
    torch.manual_seed(config.seed)
    encoder, student, source = start_encoder(
        config.init, config.student, image_size=config.image_size, drop_path=config.drop_path, **config.shape
    )
    mean, std = start_constants(config.init)
    own = {
        "student": student,
        "shape": config.shape,
        "image_size": config.image_size,
        "window": config.window,
        "global_blocks": config.global_blocks,
        "channels": config.channels,
        "mask2former": asdict(config.mask2former),
        "indices": classes.indices,
        "class_names": classes.names,
        "ignored": classes.ignored,
        "mean": mean,
        "std": std,
        "viewing": config.viewing,
    }
    options = replace(config, steps=None) if config.epochs else config
    train = train_config(
        options, len(pictures), device, micro_batch=MICRO_BATCH, evaluates=held_out is not None, schedule="poly"
    )
    normalise = Normalise(mean, std)
    make = examples(pictures, classes, config.image_size, config.augment, normalise, config.seed)
    steps = PictureSteps(len(pictures), make, **step_options(config, train))
    task = SemanticTask(
        build(encoder, own),
        steps,
        classes,
        size=config.image_size,
        normalise=normalise,
        held_out=held_out,
        viewing=config.viewing,
        device=device,
        threads=config.workers,
    )
    paths = {"data": config.data, "masks": config.masks, "val": config.val, "val_masks": config.val_masks}
    settings = {
        "semantic": own,
        "augment": asdict(config.augment),
        "backbone_lr": config.backbone_lr,
        "drop_path": config.drop_path,
        "steps_per_epoch": steps.steps_per_epoch,
        "masks": {"train": pictures.fingerprint, "held_out": held_out.fingerprint if held_out else None},
        "pictures": {
            "train": len(pictures),
            "held_out": len(held_out) if held_out else 0,
            "unlabelled": pictures.unlabelled + (held_out.unlabelled if held_out else 0),
        },
        "pretrained": config.init is not None,
        "places": {"init": source} | {name: str(path.resolve()) for name, path in paths.items() if path},
    }
    return Prepared(
        task=task,
        train=train,
        settings=settings,
        lr_scale=lambda name: config.backbone_lr if name.startswith("backbone.encoder.") else 1.0,
    )


def _classes(config: SemanticTrainingConfig, pictures: MaskedPictures) -> ClassLabels:
    ignored = [] if config.ignore_index is None else [config.ignore_index]
    if config.reduce_zero_label:
        ignored.append(0)
    if config.classes is None:
        return ClassLabels(find_class_names(pictures, config.workers), ignored)
    return ClassLabels(read_class_names(config.classes, int(config.reduce_zero_label)), ignored)
