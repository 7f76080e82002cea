"""The commands finetune detection and evaluate detection."""

from pathlib import Path
from typing import Annotated

import typer

from cli import finetune_options as options
from cli.cache_commands import AsJson, Device, Grace, Workers
from cli.output import TrainingLines, duration, table
from pipelines.recipes import VITDET_COCO as RECIPE


def register(finetune: typer.Typer, evaluate: typer.Typer) -> None:
    """Add the commands of this file."""
    finetune.command(
        epilog="Examples: `sami-cache finetune detection --init runs/vit_s --data instances_train2017.json --images train2017 "
        "--val instances_val2017.json --val-images val2017`; timm's weights: `--init timm:vit_small_patch16_224.dino`"
    )(detection)
    evaluate.command(
        "detection", epilog="Example: `sami-cache evaluate detection runs/detection --data val.json --images val`"
    )(evaluate_detection)


def detection(
    data: Annotated[Path, typer.Option(envvar="SAMI_DATA", help="What to train on: COCO-format JSON with categories.")],
    images: Annotated[Path, typer.Option(help="The folder of its pictures.")],
    run: options.Run = Path("runs/detection"),
    val: Annotated[Path | None, typer.Option(help="What to evaluate on, like --data.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Its pictures. Default: --images.")] = None,
    init: options.Init = None,
    student: options.Student = None,
    image_size: Annotated[int, typer.Option(min=32, help="Of the square input, pixels; a multiple of 32.")] = RECIPE.image_size,
    window: Annotated[int, typer.Option(min=0, help="Tokens a side within which most blocks attend. 0: to everything.")] = 14,
    smallest: Annotated[float, typer.Option(help="Large-scale jitter: the smallest scale of a picture.")] = 0.1,
    largest: Annotated[float, typer.Option(help="And the largest.")] = 2.0,
    layer_decay: Annotated[float, typer.Option(help="Of the learning rate, block by block; ViTDet's for vit_b: 0.7.")] = 1.0,
    drop_path: Annotated[float, typer.Option(help="Of the encoder; ViTDet's for vit_b: 0.1.")] = 0.0,
    epochs: options.Epochs = RECIPE.epochs,
    steps: options.Steps = None,
    warmup_epochs: options.WarmupEpochs = RECIPE.warmup_epochs,
    warmup_steps: options.WarmupSteps = None,
    batch_size: options.BatchSize = RECIPE.batch_size,
    micro_batch: options.MicroBatch = None,
    lr: options.LearningRate = RECIPE.lr,
    weight_decay: options.WeightDecay = RECIPE.weight_decay,
    clip_grad: options.ClipGrad = None,
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
    """Train a student to detect and outline objects: ViTDet's Mask R-CNN, measured by COCO's AP.

    Defaults are the paper's. Ctrl-C leaves a checkpoint; `--resume` continues.
    """
    from pipelines.finetune_detection import DetectionTrainingConfig, finetune_detection
    from pipelines.running import Prepared
    from sami_cache.processes import is_first_process
    from sami_cache.tasks.detection import JitterConfig

    config = DetectionTrainingConfig(
        run=run,
        data=data,
        images=images,
        val=val,
        val_images=val_images,
        init=init,
        student=student,
        image_size=image_size,
        window=window or None,
        jitter=JitterConfig(smallest=smallest, largest=largest),
        layer_decay=layer_decay,
        drop_path=drop_path,
        epochs=epochs,
        steps=steps,
        warmup_epochs=warmup_epochs,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
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
    lines = TrainingLines()

    def start(prepared: Prepared) -> None:
        lines.steps = prepared.train.steps
        model = prepared.settings["detector"]
        options.announce(run, f"{model['student']} at {model['image_size']} px, {model['classes']} categories", prepared)

    last = finetune_detection(config, lines, start)
    if not is_first_process():
        return
    text = f"{run}: {lines.steps} steps in {duration(last['seconds'])}, loss {last['loss']:.4f}"
    if "heldout_box_AP" in last:
        text += f"; held-out AP: box {100 * last['heldout_box_AP']:.1f}, mask {100 * last['heldout_mask_AP']:.1f}"
    typer.echo(text)
    typer.echo(f"Next: sami-cache evaluate detection {run} --data FILE --images DIR, or sami-cache export {run}")


def evaluate_detection(
    run: Annotated[Path, typer.Argument(help="A run of `finetune detection`.")],
    data: Annotated[Path, typer.Option(help="COCO-format JSON.")],
    images: Annotated[Path, typer.Option(help="The folder of its pictures.")],
    out: Annotated[Path | None, typer.Option(help="Write what was detected there, as COCO's results.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a detector: COCO's AP of boxes and masks. `evaluate promptable --boxes OUT` takes what it writes."""
    import json

    from pipelines.finetune_detection import evaluate_detection as stage

    found = stage(run, data, images, out=out, device=device)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        table([(name.removeprefix("heldout_").replace("_", " "), f"{100 * value:.1f}") for name, value in found.items()])
    )
    typer.echo("Percent, over an IoU of 0.50 to 0.95 (AP50: 0.50); s, m, l: by size. As COCO defines them.")
