"""The command finetune classification."""

from pathlib import Path
from typing import Annotated

import typer

from cli import finetune_options as options
from cli.cache_commands import Device, Grace, Workers
from cli.output import TrainingLines, duration
from pipelines.recipes import IMAGENET_CLASSIFICATION as IMAGENET
from pipelines.recipes import PUBLISHED_TOP1

EPILOG = (
    "Examples: `sami-cache finetune classification --init runs/vit_s --data imagenet/train --val imagenet/val`; another start: "
    "`--init timm:vit_small_patch16_224.dino`; small pictures: `sami-cache finetune classification --init runs/vit_t --data "
    "cifar10/train.parquet --val cifar10/test.parquet --image-size 64 --crop-ratio 1 --epochs 10 --batch-size 128 --lr 2e-4`"
)


def classification(
    data: Annotated[
        Path, typer.Option(envvar="SAMI_DATA", help="What to train on: a folder for each class, tars (webdataset), Parquet.")
    ],
    run: options.Run = Path("runs/classification"),
    val: Annotated[Path | None, typer.Option(help="What to evaluate on, like --data.")] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Start from a run of `train` or of this, a file of `export`, or timm:NAME. Default: scratch."),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="vit_t, vit_s, vit_b, or a plain ViT of timm's. Default: of --init, else vit_t.")
    ] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Of the square input, pixels.")] = IMAGENET.image_size,
    pool: Annotated[str, typer.Option(help="avg: the mean of the patch tokens is classified; token: the class token.")] = "avg",
    epochs: options.Epochs = IMAGENET.epochs,
    steps: options.Steps = None,
    warmup_epochs: options.WarmupEpochs = IMAGENET.warmup_epochs,
    warmup_steps: options.WarmupSteps = None,
    batch_size: options.BatchSize = IMAGENET.batch_size,
    micro_batch: options.MicroBatch = None,
    lr: options.LearningRate = IMAGENET.lr,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Of the learning rate towards the input. Default: 0.75; 1 (none) for vit_t and from scratch."),
    ] = None,
    weight_decay: options.WeightDecay = IMAGENET.weight_decay,
    clip_grad: options.ClipGrad = None,
    drop_path: Annotated[float, typer.Option(min=0, max=0.99, help="Of the last block; less before it.")] = IMAGENET.drop_path,
    randaugment: Annotated[str, typer.Option(help="As timm spells it; '' for none.")] = IMAGENET.randaugment,
    crop: Annotated[float, typer.Option(help="Smallest share of a picture's area that a training view has.")] = 0.08,
    mixup: Annotated[float, typer.Option(min=0, help="Alpha; 0 for none.")] = IMAGENET.mixup,
    cutmix: Annotated[float, typer.Option(min=0, help="Alpha; 0 for none.")] = IMAGENET.cutmix,
    smoothing: Annotated[float, typer.Option(min=0, max=0.99, help="Of labels.")] = IMAGENET.smoothing,
    crop_ratio: Annotated[
        float, typer.Option(help="Evaluation: the short side is resized to --image-size / this, and the middle cut out.")
    ] = IMAGENET.crop_ratio,
    seed: options.Seed = 0,
    precision: options.Precision = "auto",
    resume: options.Resume = False,
    log_every: options.Every = None,
    checkpoint_every: options.Every = None,
    evaluate_every: options.Every = None,
    device: Device = "auto",
    workers: Workers = None,
    grace: Grace = 20.0,
    data_timeout: options.DataTimeout = 60.0,
) -> None:
    """Train a student to classify pictures, by the recipe that ImageNet-1K figures are published with.

    Defaults are the paper's, and MAE's where the paper says nothing. Evaluated are top-1 and top-5 on --val. Ctrl-C leaves a
    checkpoint; `--resume` continues. `sami-cache export` then writes a model that stock timm loads.
    """
    from pipelines.finetune_classification import ClassificationTrainingConfig, finetune_classification
    from pipelines.running import Prepared
    from sami_cache.augmentation import AugmentConfig
    from sami_cache.processes import is_first_process

    config = ClassificationTrainingConfig(
        run=run,
        data=data,
        val=val,
        init=init,
        student=student,
        image_size=image_size,
        pool=pool,  # type: ignore[arg-type]
        epochs=epochs,
        steps=steps,
        warmup_epochs=warmup_epochs,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        drop_path=drop_path,
        augment=AugmentConfig(randaugment=randaugment, crop=crop, mixup=mixup, cutmix=cutmix, smoothing=smoothing),
        crop_ratio=crop_ratio,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
        resume=resume,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        evaluate_every=evaluate_every,
        device=device,
        workers=workers,
        grace=grace,
        data_timeout=data_timeout,
    )
    lines, about = TrainingLines(), {}

    def start(prepared: Prepared) -> None:
        lines.steps = prepared.train.steps
        about.update(prepared.settings["classification"])
        what = f"{about['student']} at {about['image_size']} px, {about['classes']} classes, from "
        options.announce(run, what + prepared.settings["places"]["init"], prepared)

    last = finetune_classification(config, lines, start)
    if not is_first_process():
        return
    text = f"{run}: {lines.steps} steps in {duration(last['seconds'])}, loss {last['loss']:.4f}"
    if "heldout_top1" in last:
        text += f"; held-out top-1 {100 * last['heldout_top1']:.2f} %"
        text += f", top-5 {100 * last['heldout_top5']:.2f} %" if "heldout_top5" in last else ""
    typer.echo(text)
    if about["classes"] == 1000 and (published := PUBLISHED_TOP1.get(about["student"])):
        figures = ", ".join(f"{name} {value}" for name, value in published.items())
        typer.echo(f"Published for ImageNet-1K, 100 epochs: {figures} (arXiv 2312.00863, table 1)")
    typer.echo(f"Next: sami-cache export {run}")
