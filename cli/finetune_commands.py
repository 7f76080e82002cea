"""Commands that fine-tune a pretrained student for a task: finetune promptable."""

from pathlib import Path
from typing import Annotated

import typer

from cli.cache_commands import Device, Grace, Workers
from cli.output import TrainingLines, duration


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    finetune = typer.Typer(help="Fine-tune a pretrained student for a task.", no_args_is_help=True)
    finetune.command(
        epilog="Examples: `sami-cache finetune promptable --init runs/vit_s --data instances.json --images photos/`; SA-1B: "
        "`--data sa1b/`; from a cache of SAM's embeddings, with SAM's own decoder: `sami-cache finetune promptable "
        "--from-cache sam.zarr --init runs/vit_s --decoder sam_vit_h_4b8939.pth`; then `--init runs/promptable` with `--data`"
    )(promptable)
    app.add_typer(finetune, name="finetune")


def promptable(
    run: Annotated[
        Path, typer.Option("--run", "--run-dir", help="Where the run is written; torchrun takes --run for its own.")
    ] = Path("runs/promptable"),
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="SAMI_DATA",
            help="What to train on: a COCO-format JSON or a folder of SA-1B. With --from-cache: the images it was made from.",
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of the JSON's pictures.")] = None,
    val: Annotated[Path | None, typer.Option(help="What to evaluate on, like --data.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Its pictures. Default: --images.")] = None,
    from_cache: Annotated[
        Path | None, typer.Option(help="Teach the encoder alone, from a dense cache of SAM's neck (MobileSAM's way).")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Start from a run of `train` or of this, or a checkpoint, such as EfficientSAM's. Default: scratch."),
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="Take prompt encoder and mask decoder from this file: SAM's own.")
    ] = None,
    freeze_decoder: Annotated[bool, typer.Option("--freeze-decoder", help="Train the encoder alone.")] = False,
    family: Annotated[str | None, typer.Option(help="sam or efficientsam. Default: of --init, else sam.")] = None,
    student: Annotated[str | None, typer.Option(help="vit_t, vit_s or vit_b. Default: of --init, else vit_t.")] = None,
    image_size: Annotated[int, typer.Option(help="Of the square input, pixels; a multiple of 16.")] = 1024,
    epochs: Annotated[float, typer.Option(help="As published, on SA-1B: 5.")] = 5,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    warmup_steps: Annotated[int, typer.Option(help="Linear warm-up.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step. Default: 128, or all if there are fewer.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Pictures a process sees at once. Default: 8 on CUDA, 2 on the CPU.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate at the start; falls linearly to 0.")] = 4e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.1,
    clip_grad: Annotated[float | None, typer.Option(help="Largest norm of the gradient. Default: no clipping.")] = None,
    max_objects: Annotated[int, typer.Option(help="Of a picture in a step.")] = 64,
    error_points: Annotated[
        int | None, typer.Option(help="Rounds with a point where the last answer is wrong. Default: 8; efficientsam 4.")
    ] = None,
    mask_rounds: Annotated[
        int | None, typer.Option(help="Rounds with the last answer and nothing new. Default: 2; efficientsam 0.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="With --from-cache: share of the images kept to evaluate on.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of weights, order and prompts.")] = 0,
    precision: Annotated[str, typer.Option(help="auto (bfloat16 where the device has it), float32 or bfloat16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run.")] = False,
    log_every: Annotated[int | None, typer.Option(help="Steps.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps.")] = None,
    device: Device = "auto",
    workers: Workers = None,
    grace: Grace = 20.0,
    data_timeout: Annotated[
        float, typer.Option(min=0.1, max=86400, help="Seconds without a picture after which the run stops.")
    ] = 60.0,
) -> None:
    """Train a student to segment anything it is prompted for, as Segment Anything and EfficientSAM were.

    Defaults are the paper's. Ctrl-C leaves a checkpoint; `--resume` continues. With `--from-cache` no annotations are needed:
    the encoder learns to give SAM's embeddings, which SAM's own decoder reads.
    """
    from pipelines.finetune import Prepared, PromptableTrainingConfig, finetune_promptable
    from sami_cache.processes import is_first_process
    from sami_cache.prompts import PromptConfig

    config = PromptableTrainingConfig(
        run=run,
        data=data,
        images=images,
        val=val,
        val_images=val_images,
        from_cache=from_cache,
        init=init,
        decoder=decoder,
        freeze_decoder=freeze_decoder,
        family=family,  # type: ignore[arg-type]
        student=student,
        image_size=image_size,
        prompts=PromptConfig(max_objects=max_objects),
        error_points=error_points,
        mask_rounds=mask_rounds,
        epochs=epochs,
        steps=steps,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        holdout=holdout,
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
        model, counts, step = prepared.settings["segment_anything"], prepared.settings["pictures"], prepared.train
        typer.echo(
            f"{run}: {model['encoder']} at {model['image_size']} px, family {model['family']}; {counts['train']} pictures to "
            f"train on, {counts['held_out']} held out; {step.steps} steps of {step.batch_size} in {step.accumulate} parts, "
            f"lr {step.lr:.3g}",
            err=True,
        )

    last = finetune_promptable(config, lines, start)
    if not is_first_process():
        return
    text = f"{run}: {lines.steps} steps in {duration(last['seconds'])}, loss {last['loss']:.4f}"
    if "heldout_box_miou" in last:
        text += f"; held-out mIoU: box {last['heldout_box_miou']:.3f}, 1 click {last['heldout_click_miou']:.3f}"
        text += f" (the box itself: {last['heldout_box_itself_miou']:.3f})"
    elif "heldout_cosine" in last:
        text += f"; held out: loss {last['heldout_loss']:.4f}, cosine {last['heldout_cosine']:.4f}"
    typer.echo(text)
