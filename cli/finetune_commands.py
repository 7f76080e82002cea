"""Commands that fine-tune a pretrained student for a task. Other tasks than promptable have files of their own."""

from pathlib import Path
from typing import Annotated

import typer

from cli import finetune_classification_command, finetune_detection_command, finetune_semantic_command
from cli import finetune_options as options
from cli.cache_commands import PLACE, Device, Grace, Workers
from cli.evaluate_commands import evaluate_app
from cli.output import TrainingLines, duration
from pipelines.recipes import EFFICIENTSAM_SA1B as SA1B


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    finetune = typer.Typer(help="Fine-tune a pretrained student for a task.", no_args_is_help=True)
    finetune.command(
        epilog="Examples: `sami-cache finetune promptable --init runs/vit_s --data instances.json --images photos/`; SA-1B: "
        "`--data sa1b/`; from a cache of SAM's embeddings, with SAM's own decoder: `sami-cache finetune promptable "
        "--from-cache sam.zarr --init runs/vit_s --decoder sam_vit_h_4b8939.pth`; then `--init runs/promptable` with `--data`"
    )(promptable)
    finetune_detection_command.register(finetune, evaluate_app)
    finetune_semantic_command.register(finetune, evaluate_app)
    finetune.command(epilog=finetune_classification_command.EPILOG)(finetune_classification_command.classification)
    app.add_typer(finetune, name="finetune")


def promptable(
    run: options.Run = Path("runs/promptable"),
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
        Path | None, typer.Option(help="Teach the encoder alone, from a dense cache of SAM's neck (MobileSAM's way).", **PLACE)
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
    image_size: Annotated[
        int | None, typer.Option(help="Of the square input, pixels; a multiple of 16. Default: of --init, else 1024.")
    ] = None,
    epochs: options.Epochs = SA1B.epochs,
    steps: options.Steps = None,
    warmup_steps: options.WarmupSteps = None,
    batch_size: options.BatchSize = SA1B.batch_size,
    micro_batch: options.MicroBatch = None,
    lr: options.LearningRate = SA1B.lr,
    weight_decay: options.WeightDecay = SA1B.weight_decay,
    clip_grad: options.ClipGrad = None,
    max_objects: Annotated[int, typer.Option(min=1, help="Of a picture in a step.")] = SA1B.max_objects,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror every other picture. Published: no augmentation.")] = False,
    crop: Annotated[
        float, typer.Option(help="Cut parts out of the pictures, with sides of this share up to all. For small data: 0.5.")
    ] = 1.0,
    box_share: Annotated[
        float, typer.Option(help="Of the objects, those that are first asked for by a box, not a point.")
    ] = 0.5,
    box_noise: Annotated[
        float, typer.Option(help="Standard deviation of a box's sides, as a share of them. For small data and exact boxes: 0.")
    ] = 0.1,
    focal_weight: Annotated[
        float, typer.Option(help="Of the focal loss beside the dice loss. For small data: 4, which finds whole objects sooner.")
    ] = 20.0,
    error_points: Annotated[
        int | None, typer.Option(min=0, help="Rounds with a point where the last answer is wrong. Default: 8; efficientsam 4.")
    ] = None,
    mask_rounds: Annotated[
        int | None, typer.Option(min=0, help="Rounds with the last answer and nothing new. Default: 2; efficientsam 0.")
    ] = None,
    holdout: Annotated[
        float | None, typer.Option(help="With --from-cache: share of the images kept to evaluate on. Default: 0.02.")
    ] = None,
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
    """Train a student to segment anything it is prompted for, as Segment Anything and EfficientSAM were.

    Defaults are the paper's. Ctrl-C leaves a checkpoint; `--resume` continues. With `--from-cache` no annotations are needed:
    the encoder learns to give SAM's embeddings, which SAM's own decoder reads.
    """
    from pipelines.finetune_promptable import PromptableTrainingConfig, finetune_promptable
    from pipelines.running import Prepared
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
        prompts=PromptConfig(max_objects=max_objects, flip=flip, crop=crop, box_share=box_share, box_noise=box_noise),
        focal_weight=focal_weight,
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
        model = prepared.settings["segment_anything"]
        options.announce(run, f"{model['encoder']} at {model['image_size']} px, family {model['family']}", prepared)

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
    typer.echo(f"Next: sami-cache demo-web {run}, or sami-cache evaluate promptable {run} --data FILE")
