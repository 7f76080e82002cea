"""Fine-tuning a pretrained student to detect and outline objects, and measuring what came of it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from pipelines.recipes import VITDET_COCO
from pipelines.running import Prepared, RunOptions, run_task, step_options, train_config
from pipelines.starts import start_encoder
from pipelines.task_models import find_task_model
from sami_cache.checkpoints import put_weights
from sami_cache.data.annotations import Annotations, CocoAnnotations, open_annotations
from sami_cache.errors import SamiCacheError
from sami_cache.inference.average_precision import Truth
from sami_cache.models.detector import Detector
from sami_cache.models.pyramid import CHANNELS, GLOBAL_BLOCKS, WINDOW, SimpleFeaturePyramid, layer_scale
from sami_cache.processes import choose_device
from sami_cache.steps import PictureSteps
from sami_cache.store.files import write_durably
from sami_cache.tasks.detection import DetectionTask, JitterConfig, category_of, examples, scores

MICRO_BATCH = {"cuda": 8, "cpu": 2}


@dataclass(frozen=True, kw_only=True)
class DetectionTrainingConfig(RunOptions):
    """A fine-tuning run; the defaults are the paper's."""

    data: Path
    """COCO-format JSON with categories."""
    images: Path
    """The folder of its pictures."""
    val: Path | None = None
    val_images: Path | None = None
    """By default `images`."""
    init: str | None = None
    """A run of `train`, an export, a plain ViT's weights or timm:NAME; None: scratch."""
    student: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    """To timm, for encoders of another shape: depth, embed_dim, num_heads."""
    image_size: int = VITDET_COCO.image_size
    window: int | None = WINDOW
    """Tokens a side within which most blocks attend; None: all attend to all."""
    global_blocks: int = GLOBAL_BLOCKS
    jitter: JitterConfig = field(default_factory=JitterConfig)
    layer_decay: float = 1.0
    """Of the learning rate, from block to block. The paper names none; ViTDet's for a base model is 0.7."""
    drop_path: float = 0.0
    """Of the encoder. The paper names none; ViTDet's for a base model is 0.1."""
    channels: int = CHANNELS
    """Of the pyramid and the heads."""
    detections: int = 100
    """At most, in a picture."""
    regions: int = 512
    """Of a picture, that the heads learn from in a step."""
    epochs: float = VITDET_COCO.epochs
    warmup_epochs: float = VITDET_COCO.warmup_epochs
    batch_size: int = VITDET_COCO.batch_size
    lr: float = VITDET_COCO.lr
    weight_decay: float = VITDET_COCO.weight_decay
    betas: tuple[float, float] = VITDET_COCO.betas


def finetune_detection(
    config: DetectionTrainingConfig,
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Prepared], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue a fine-tuning; returns the last line of its log."""
    return run_task(config, lambda device: prepare(config, device), on_log, on_start)


def prepare(config: DetectionTrainingConfig, device: torch.device) -> Prepared:
    """Resolve a configuration: data, model and steps."""
    if config.image_size % 32:
        raise SamiCacheError(f"--image-size {config.image_size}: expected a multiple of 32")
    annotations = _open(config.data, config.images)
    if not any(not one.crowd for number in range(len(annotations)) for one in annotations.objects(number)):
        raise SamiCacheError(f"{config.data} has no object to learn: crowds are left out")
    held_out = _open(config.val, config.val_images or config.images) if config.val else None
    categories = sorted(annotations.categories)
    for part in filter(None, (annotations, held_out)):
        known = {category_of(one) for number in range(len(part)) for one in part.objects(number)}
        if unknown := known - set(categories):
            raise SamiCacheError(f"{part.path} has objects of category {min(unknown)}, which {config.data} does not name")
    torch.manual_seed(config.seed)
    encoder, student, source = start_encoder(
        config.init, config.student, image_size=config.image_size, drop_path=config.drop_path, **config.shape
    )
    shape = {
        "student": student,
        "shape": config.shape,
        "image_size": config.image_size,
        "window": config.window,
        "global_blocks": config.global_blocks,
        "classes": len(categories),
        "detections": config.detections,
        "channels": config.channels,
        "categories": {str(category): annotations.categories[category] for category in categories},
    }
    model = _detector(encoder, shape, regions=config.regions)
    train = train_config(config, len(annotations), device, micro_batch=MICRO_BATCH, evaluates=held_out is not None)
    classes = {category: label for label, category in enumerate(categories, 1)}
    make = examples(annotations, classes, config.image_size, config.jitter, config.seed)
    steps = PictureSteps(len(annotations), make, **step_options(config, train))
    task = DetectionTask(
        model,
        steps,
        truth=Truth(held_out) if held_out else None,
        held_out=held_out,
        categories=categories,
        device=device,
        threads=config.workers,
    )
    paths = {"data": config.data, "images": config.images, "val": config.val, "val_images": config.val_images}
    settings = {
        "detector": shape,
        "jitter": asdict(config.jitter),
        "regions": config.regions,
        "layer_decay": config.layer_decay,
        "drop_path": config.drop_path,
        "steps_per_epoch": steps.steps_per_epoch,
        "annotations": {"train": annotations.fingerprint, "held_out": held_out.fingerprint if held_out else None},
        "pictures": {"train": len(annotations), "held_out": len(held_out) if held_out else 0},
        "places": {"init": source} | {name: str(path.resolve()) for name, path in paths.items() if path},
    }
    depth = len(encoder.blocks)
    return Prepared(
        task=task,
        train=train,
        settings=settings,
        lr_scale=lambda name: layer_scale(name, depth, config.layer_decay),
    )


def open_detector(run_or_file: Path, device: torch.device | str = "cpu") -> tuple[Detector, dict[str, Any]]:
    """The detector of a run's newest intact checkpoint or of its export, in evaluation mode, and its settings."""
    found = find_task_model(run_or_file, "detector")
    shape = found.settings
    encoder = start_encoder(None, shape["student"], image_size=shape["image_size"], **shape["shape"])[0]
    model = _detector(encoder, shape)
    put_weights(model, found.state, found.source)
    return model.to(device).eval(), shape


def _detector(encoder: VisionTransformer, shape: dict[str, Any], **training: Any) -> Detector:
    pyramid = SimpleFeaturePyramid(
        encoder, channels=shape["channels"], window=shape["window"], global_blocks=shape["global_blocks"]
    )
    size, detections = shape["image_size"], shape["detections"]
    return Detector(pyramid, shape["classes"], image_size=size, detections=detections, **training)


def evaluate_detection(
    run: Path, data: Path, images: Path, *, out: Path | None = None, device: str = "auto"
) -> dict[str, float]:
    """AP of boxes and masks on `data`, as `tasks.detection.scores` names them; with `out`, COCO's results are written there.

    `evaluate promptable --boxes OUT` takes that file as a detector's.
    """
    if out is not None and out.exists():
        raise SamiCacheError(f"{out} is there: nothing was overwritten. Remove it, or write to another file with --out")
    place = choose_device(device)
    model, settings = open_detector(run, place)
    annotations = _open(data, images)
    categories = [int(category) for category in settings["categories"]]
    truth = Truth(annotations)
    if unknown := set(categories) - {category["id"] for category in truth.categories}:
        raise SamiCacheError(f"{data} does not know category {min(unknown)}, which {run} detects")
    task = DetectionTask(model, None, truth=truth, held_out=annotations, categories=categories, device=place)
    with torch.no_grad():
        results = task.detect(model, annotations)
    if out is not None:
        write_durably(out, json.dumps(results).encode())
    return scores(truth, results, range(len(annotations)))


def _open(path: Path, images: Path) -> CocoAnnotations:
    annotations: Annotations = open_annotations(path, images)
    if not isinstance(annotations, CocoAnnotations) or not annotations.categories:
        raise SamiCacheError(f"{path} names no categories: a detector learns from COCO-format JSON that does")
    return annotations
