"""The commands finetune semantic and evaluate semantic."""

from pathlib import Path
from typing import Annotated

import typer

from cli import finetune_options as options
from cli.cache_commands import AsJson, Device, Grace, Workers
from cli.output import TrainingLines, duration, table
from pipelines.recipes import MASK2FORMER_ADE20K as RECIPE


def register(finetune: typer.Typer, evaluate: typer.Typer) -> None:
    """Add the commands of this file."""
    finetune.command(
        epilog="Examples: ADE20K: `sami-cache finetune semantic --init runs/vit_s --data images/training --masks "
        "annotations/training --val images/validation --val-masks annotations/validation`"
    )(semantic)
    example = "Example: `sami-cache evaluate semantic runs/semantic --data images/validation --masks annotations/validation`"
    evaluate.command("semantic", epilog=example)(evaluate_semantic)


def semantic(
    data: Annotated[Path, typer.Option(envvar="SAMI_DATA", help="What to train on: a folder of pictures.")],
    masks: Annotated[Path, typer.Option(help="PNGs of class numbers with the same names.")],
    run: options.Run = Path("runs/semantic"),
    val: Annotated[Path | None, typer.Option(help="What to evaluate on, like --data.")] = None,
    val_masks: Annotated[Path | None, typer.Option(help="Its PNGs.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Text, a class a line: number and name. Default: the numbers that occur.")
    ] = None,
    ignore: Annotated[list[int], typer.Option(help="A number that is no class; may be given again.")] = [0],  # noqa: B006
    init: options.Init = None,
    student: options.Student = None,
    image_size: Annotated[int, typer.Option(min=32, help="Of the square input, pixels; a multiple of 32.")] = RECIPE.image_size,
    window: Annotated[int, typer.Option(min=0, help="Tokens a side within which most blocks attend. 0: to everything.")] = 0,
    smallest: Annotated[float, typer.Option(help="The smallest scale of a picture's shorter side.")] = 0.5,
    largest: Annotated[float, typer.Option(help="And the largest.")] = 2.0,
    encoder_lr_scale: Annotated[
        float, typer.Option(help="What the encoder's learning rate is multiplied with.")
    ] = RECIPE.encoder_lr_scale,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = RECIPE.steps,
    warmup_steps: options.WarmupSteps = None,
    batch_size: options.BatchSize = RECIPE.batch_size,
    micro_batch: options.MicroBatch = None,
    lr: options.LearningRate = RECIPE.lr,
    weight_decay: options.WeightDecay = RECIPE.weight_decay,
    clip_grad: options.ClipGrad = 0.01,
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
    """Train a student to give every pixel a class: Mask2Former, measured by mIoU. Needs pip install 'sami-cache[semantic]'.

    Defaults are the paper's. Ctrl-C leaves a checkpoint; `--resume` continues.
    """
    from pipelines.finetune_semantic import SemanticTrainingConfig, finetune_semantic
    from pipelines.running import Prepared
    from sami_cache.processes import is_first_process
    from sami_cache.tasks.semantic import SemanticAugmentation

    config = SemanticTrainingConfig(
        run=run,
        data=data,
        masks=masks,
        val=val,
        val_masks=val_masks,
        classes=classes,
        ignored=tuple(ignore),
        init=init,
        student=student,
        image_size=image_size,
        window=window or None,
        augmentation=SemanticAugmentation(smallest=smallest, largest=largest),
        encoder_lr_scale=encoder_lr_scale,
        steps=steps,
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
        model = prepared.settings["semantic"]
        options.announce(run, f"{model['student']} at {model['image_size']} px, {len(model['classes'])} classes", prepared)

    last = finetune_semantic(config, lines, start)
    if not is_first_process():
        return
    text = f"{run}: {lines.steps} steps in {duration(last['seconds'])}, loss {last['loss']:.4f}"
    if "heldout_miou" in last:
        text += f"; held-out mIoU {100 * last['heldout_miou']:.1f}"
    typer.echo(text)
    typer.echo(f"Next: sami-cache evaluate semantic {run} --data DIR --masks DIR, or sami-cache export {run}")


def evaluate_semantic(
    run: Annotated[Path, typer.Argument(help="A run of `finetune semantic`.")],
    data: Annotated[Path, typer.Option(help="A folder of pictures.")],
    masks: Annotated[Path, typer.Option(help="PNGs of class numbers with the same names.")],
    out: Annotated[Path | None, typer.Option(help="A folder for PNGs of what was predicted.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a semantic segmenter: mIoU, and the accuracy of pixels and of classes."""
    import json

    from pipelines.finetune_semantic import evaluate_semantic as stage

    found = stage(run, data, masks, out=out, device=device)
    if as_json:
        typer.echo(json.dumps(found))
        return
    named = ((name.removeprefix("heldout_").replace("_", " "), value) for name, value in found.items())
    typer.echo(table([(name, f"{100 * value:.2f} %") for name, value in named]))
