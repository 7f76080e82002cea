"""The commands finetune semantic and evaluate semantic."""

from pathlib import Path
from typing import Annotated

import typer

from cli import finetune_options as options
from cli.cache_commands import AsJson, Device, Grace, Workers
from cli.output import TrainingLines, duration, table
from pipelines.recipes import MASK2FORMER_ADE20K as RECIPE

Masks = Annotated[Path, typer.Option(help="The folder of their PNGs of class indices, under the same names.")]


def register(finetune: typer.Typer, evaluate: typer.Typer) -> None:
    """Add the commands of this file."""
    finetune.command(
        epilog="Examples: ADE20K: `sami-cache finetune semantic --init runs/vit_s --data images/training --masks "
        "annotations/training --val images/validation --val-masks annotations/validation --reduce-zero-label`; timm's weights: "
        "`--init timm:vit_small_patch16_224.dino`; your own: `--classes names.txt --steps 2000`"
    )(semantic)
    evaluate.command(
        "semantic",
        epilog="Example: `sami-cache evaluate semantic runs/semantic --data images/validation --masks annotations/validation`",
    )(evaluate_semantic)


def semantic(
    data: Annotated[Path, typer.Option(envvar="SAMI_DATA", help="The folder of pictures to train on.")],
    masks: Masks,
    run: options.Run = Path("runs/semantic"),
    val: Annotated[Path | None, typer.Option(help="Pictures to evaluate on.")] = None,
    val_masks: Annotated[Path | None, typer.Option(help="Their PNGs.")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Names of the classes: a name a line, JSON or YAML. Default: the indices that occur in --masks."),
    ] = None,
    ignore_index: Annotated[int, typer.Option(help="Index of pixels without a class. -1: there are none.")] = 255,
    reduce_zero_label: Annotated[
        bool,
        typer.Option("--reduce-zero-label", help="Index 0 is no class either, and names begin with index 1: ADE20K's way."),
    ] = False,
    init: options.Init = None,
    student: options.Student = None,
    image_size: Annotated[int, typer.Option(min=32, help="Of the square input, pixels; a multiple of 32.")] = RECIPE.image_size,
    window: Annotated[int, typer.Option(min=0, help="Tokens a side within which most blocks attend. 0: to everything.")] = 0,
    queries: Annotated[int, typer.Option(min=1, help="Masks that are proposed in a picture.")] = 100,
    points: Annotated[int, typer.Option(min=1, help="Of a mask, where its losses are taken. For small inputs: fewer.")] = 12544,
    smallest: Annotated[float, typer.Option(help="The smallest scale of a picture; at 1 its short side is the input's.")] = 0.5,
    largest: Annotated[float, typer.Option(help="And the largest.")] = 2.0,
    category_ratio: Annotated[float, typer.Option(help="Most of a part that one class may cover. 1: all of it.")] = 0.75,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror every other picture.")] = True,
    colour: Annotated[bool, typer.Option("--colour/--no-colour", help="Change colours.")] = True,
    viewing: Annotated[str, typer.Option(help="Evaluate a picture whole, or sliding: in windows of --image-size.")] = "whole",
    backbone_lr: Annotated[float, typer.Option(help="Of the encoder: what --lr is multiplied with.")] = RECIPE.backbone_lr,
    drop_path: Annotated[float, typer.Option(help="Of the encoder.")] = 0.0,
    epochs: Annotated[float, typer.Option(min=0, help="Instead of --steps.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = RECIPE.steps,
    warmup_steps: options.WarmupSteps = None,
    batch_size: options.BatchSize = RECIPE.batch_size,
    micro_batch: options.MicroBatch = None,
    lr: options.LearningRate = RECIPE.lr,
    weight_decay: options.WeightDecay = RECIPE.weight_decay,
    clip_grad: Annotated[float, typer.Option(min=0, help="Largest norm of the gradient. 0: no clipping.")] = RECIPE.clip_grad,
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
    """Train a student to name the class of every pixel: Mask2Former, measured by mean IoU.

    Needs the extra `semantic`: pip install 'sami-cache[semantic]'. Defaults are the paper's. Ctrl-C leaves a checkpoint;
    `--resume` continues.
    """
    from pipelines.finetune_semantic import SemanticTrainingConfig, finetune_semantic
    from pipelines.running import Prepared
    from sami_cache.models.semantic import Mask2FormerShape
    from sami_cache.processes import is_first_process
    from sami_cache.tasks.semantic import SemanticAugment

    config = SemanticTrainingConfig(
        run=run,
        data=data,
        masks=masks,
        val=val,
        val_masks=val_masks,
        classes=classes,
        ignore_index=None if ignore_index < 0 else ignore_index,
        reduce_zero_label=reduce_zero_label,
        init=init,
        student=student,
        image_size=image_size,
        window=window or None,
        mask2former=Mask2FormerShape(queries=queries, points=points),
        augment=SemanticAugment(smallest=smallest, largest=largest, category_ratio=category_ratio, flip=flip, colour=colour),
        viewing=viewing,  # type: ignore[arg-type]
        backbone_lr=backbone_lr,
        drop_path=drop_path,
        epochs=epochs,
        steps=steps,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        weight_decay=weight_decay,
        clip_grad=clip_grad or None,
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
        model = prepared.settings["semantic"]
        options.announce(run, f"{model['student']} at {model['image_size']} px, {len(model['indices'])} classes", prepared)

    last = finetune_semantic(config, lines, start)
    if not is_first_process():
        return
    text = f"{run}: {lines.steps} steps in {duration(last['seconds'])}, loss {last['loss']:.4f}"
    if "heldout_miou" in last:
        text += f"; held-out mIoU {100 * last['heldout_miou']:.1f}, pixel accuracy {100 * last['heldout_pixel_accuracy']:.1f}"
    typer.echo(text)
    typer.echo(f"Next: sami-cache evaluate semantic {run} --data DIR --masks DIR, or sami-cache export {run}")


def evaluate_semantic(
    run: Annotated[Path, typer.Argument(help="A run of `finetune semantic`, or a file of `export`.")],
    data: Annotated[Path, typer.Option(help="The folder of pictures.")],
    masks: Masks,
    out: Annotated[Path | None, typer.Option(help="Write what was found there, as PNGs of class indices.")] = None,
    viewing: Annotated[str | None, typer.Option(help="whole or sliding. Default: the run's.")] = None,
    by_class: Annotated[bool, typer.Option("--by-class", help="Print each class's IoU too.")] = False,
    device: Device = "auto",
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Measure a segmentation at the pictures' own size: mean IoU, mean accuracy, pixel accuracy."""
    import json

    from pipelines.semantic import evaluate_semantic as stage

    found = stage(run, data, masks, out=out, viewing=viewing, device=device, workers=workers)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(found))
        return
    names = {"miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}
    rows = [(shown, f"{100 * found[name]:.1f}") for name, shown in names.items()]
    if by_class:
        rows += [(name, f"{100 * value:.1f}") for name, value in found["iou"].items()]
    typer.echo(table(rows))
    typer.echo(
        f"Percent, over {found['pictures']} pictures, {found['viewing']}; means over the {len(found['iou'])} classes there."
    )
