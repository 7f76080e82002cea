"""Fine-tuning a pretrained student to give every pixel a class, and measuring what came of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.recipes import MASK2FORMER_ADE20K as ADE20K
from pipelines.running import Prepared, RunOptions, run_task, step_options, train_config
from pipelines.starts import start_encoder
from pipelines.task_models import find_task_model
from sami_cache.checkpoints import put_weights
from sami_cache.data.semantic import IGNORED, SegmentedPictures
from sami_cache.errors import SamiCacheError
from sami_cache.models.pyramid import CHANNELS, GLOBAL_BLOCKS, SimpleFeaturePyramid
from sami_cache.models.semantic import QUERIES, Segmenter
from sami_cache.steps import PictureSteps
from sami_cache.tasks.semantic import SemanticAugmentation, SemanticTask, examples

MICRO_BATCH = {"cuda": 16, "cpu": 2}
_ENCODER = ".pyramid.encoder."


@dataclass(frozen=True, kw_only=True)
class SemanticTrainingConfig(RunOptions):
    """A fine-tuning run; the defaults are the paper's."""

    data: Path
    """A folder of pictures."""
    masks: Path
    """PNGs of class numbers with the same names."""
    val: Path | None = None
    val_masks: Path | None = None
    classes: Path | None = None
    """Text, a class a line: its number in the PNGs, and its name. None: the numbers that occur."""
    ignored: tuple[int, ...] = (0,)
    """Numbers that are no class; ADE20K's and COCO's 0 is "unlabelled"."""
    init: str | None = None
    """A run of `train`, an export, a plain ViT's weights or timm:NAME; None: scratch."""
    student: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    """To timm, for encoders of another shape: depth, embed_dim, num_heads."""
    image_size: int = ADE20K.image_size
    window: int | None = None
    """Tokens a side within which most blocks attend; None: all attend to all, which 32 x 32 tokens allow."""
    global_blocks: int = GLOBAL_BLOCKS
    augmentation: SemanticAugmentation = field(default_factory=SemanticAugmentation)
    channels: int = CHANNELS
    queries: int = QUERIES
    decoder_layers: int = 10
    encoder_lr_scale: float = ADE20K.encoder_lr_scale
    epochs: float = 0
    """Instead of steps, where above 0."""
    steps: int | None = ADE20K.steps
    batch_size: int = ADE20K.batch_size
    lr: float = ADE20K.lr
    weight_decay: float = ADE20K.weight_decay
    betas: tuple[float, float] = ADE20K.betas
    clip_grad: float | None = 0.01
    """Mask2Former's own; the paper names none."""


def finetune_semantic(
    config: SemanticTrainingConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Prepared], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue a fine-tuning; returns the last line of its log."""
    return run_task(config, lambda device: prepare(config, device), on_log, on_start)


def prepare(config: SemanticTrainingConfig, device: torch.device) -> Prepared:
    """Resolve a configuration: data, model and steps."""
    if config.image_size % 32:
        raise SamiCacheError(f"--image-size {config.image_size}: expected a multiple of 32")
    if (config.val is None) != (config.val_masks is None):
        raise SamiCacheError("--val and --val-masks go together")
    pictures = SegmentedPictures(config.data, config.masks)
    held_out = SegmentedPictures(config.val, config.val_masks) if config.val and config.val_masks else None
    names = find_classes([part for part in (pictures, held_out) if part], config.classes, frozenset(config.ignored))
    place = {number: label for label, number in enumerate(names)}
    torch.manual_seed(config.seed)
    encoder, student, source = start_encoder(config.init, config.student, image_size=config.image_size, **config.shape)
    shape = {
        "student": student,
        "shape": config.shape,
        "image_size": config.image_size,
        "window": config.window,
        "global_blocks": config.global_blocks,
        "channels": config.channels,
        "queries": config.queries,
        "decoder_layers": config.decoder_layers,
        "classes": {str(number): name for number, name in names.items()},
        "ignored": list(config.ignored),
    }
    model = _segmenter(encoder, shape)
    train = train_config(
        config, len(pictures), device, micro_batch=MICRO_BATCH, evaluates=held_out is not None, schedule="poly"
    )
    ignored = frozenset(config.ignored)
    make = examples(pictures, place, ignored, config.image_size, config.augmentation, config.seed)
    steps = PictureSteps(len(pictures), make, **step_options(config, train))
    task = SemanticTask(model, steps, held_out=held_out, place=place, ignored=ignored, device=device, threads=config.workers)
    paths = {"data": config.data, "masks": config.masks, "val": config.val, "val_masks": config.val_masks}
    settings = {
        "semantic": shape,
        "augmentation": asdict(config.augmentation),
        "encoder_lr_scale": config.encoder_lr_scale,
        "steps_per_epoch": steps.steps_per_epoch,
        "names": {"train": pictures.fingerprint, "held_out": held_out.fingerprint if held_out else None},
        "pictures": {"train": len(pictures), "held_out": len(held_out) if held_out else 0},
        "places": {"init": source} | {name: str(path.resolve()) for name, path in paths.items() if path},
    }
    return Prepared(
        task=task,
        train=train,
        settings=settings,
        lr_scale=lambda name: config.encoder_lr_scale if _ENCODER in name else 1.0,
    )


def find_classes(parts: list[SegmentedPictures], file: Path | None, ignored: frozenset[int]) -> dict[int, str]:
    """Names by number, ascending: of a file, or the numbers that occur in the masks. Raises SamiCacheError for none."""
    if file is None:
        found = {int(value) for part in parts for number in range(len(part)) for value in np.unique(part.values(number))}
        names = {number: str(number) for number in sorted(found - ignored)}
    else:
        names = {}
        try:
            for line in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
                number, _, name = line.partition(" ")
                names[int(number)] = name.strip() or number
        except (OSError, ValueError) as error:
            raise SamiCacheError(f"{file}: expected a class a line, its number and its name ({error})") from error
        names = {number: name for number, name in sorted(names.items()) if number not in ignored}
    if not 0 < len(names) < IGNORED:
        raise SamiCacheError(f"{len(names)} classes: expected 1 to {IGNORED - 1}")
    return names


def open_segmenter(run_or_file: Path, device: torch.device | str = "cpu") -> tuple[Segmenter, dict[str, Any]]:
    """The model of a run's newest intact checkpoint or of its export, in evaluation mode, and its settings."""
    found = find_task_model(run_or_file, "semantic")
    shape = found.settings
    encoder = start_encoder(None, shape["student"], image_size=shape["image_size"], **shape["shape"])[0]
    model = _segmenter(encoder, shape)
    put_weights(model, found.state, found.source)
    return model.to(device).eval(), shape


def evaluate_semantic(run: Path, data: Path, masks: Path, *, out: Path | None = None, device: str = "auto") -> dict[str, float]:
    """mIoU and accuracies on `data`, as `tasks.semantic.scores` names them; with `out`, PNGs of class numbers there."""
    if out is not None and out.exists():
        raise SamiCacheError(f"{out} is there: nothing was overwritten. Remove it, or write to another folder with --out")
    place_on = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    model, shape = open_segmenter(run, place_on)
    numbers = [int(number) for number in shape["classes"]]
    place = {number: label for label, number in enumerate(numbers)}
    pictures = SegmentedPictures(data, masks)
    task = SemanticTask(model, None, held_out=pictures, place=place, ignored=frozenset(shape["ignored"]), device=place_on)
    with torch.no_grad():
        if out is not None:
            values = np.array(numbers, np.uint8 if max(numbers) < 256 else np.uint16)
            for number, predicted in task.predict(model, pictures):
                path = out / f"{pictures.keys[number]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values[predicted]).save(path)
        return task.evaluate(model)


def _segmenter(encoder: Any, shape: dict[str, Any]) -> Segmenter:
    pyramid = SimpleFeaturePyramid(
        encoder, channels=shape["channels"], window=shape["window"], global_blocks=shape["global_blocks"]
    )
    return Segmenter(
        pyramid,
        len(shape["classes"]),
        image_size=shape["image_size"],
        queries=shape["queries"],
        decoder_layers=shape["decoder_layers"],
    )
