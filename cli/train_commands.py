"""Commands that train and use students: train, export, report, demo."""

from pathlib import Path
from typing import Annotated

import typer

from cli.cache_commands import PLACE, CachePath, Device, Grace, WeightsDigest, Workers
from cli.output import TrainingLines, duration, parse_size, size


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command(
        epilog="Examples: `sami-cache train --student vit_s`, with `--resume` to continue it; several GPUs: "
        "`torchrun --nproc-per-node 8 -m cli.main train --student vit_b`; "
        "MAE: `sami-cache train --target pixels --run runs/mae`"
    )(train)
    app.command(epilog="Examples: `sami-cache export runs/vit_s`; `sami-cache export runs/promptable --out model.pt`")(export)
    app.command(epilog="Example: `sami-cache report runs/vit_s`")(report)
    app.command(epilog="Example: `sami-cache demo --out demo`")(demo)


def train(
    student: Annotated[str, typer.Option(help="vit_t, vit_s or vit_b.")] = "vit_s",
    cache: CachePath = Path("cache.zarr"),
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", "--run-dir", help="Where the run is written; torchrun takes --run for its own. Default: runs/STUDENT."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="SAMI_DATA", help="The images, for caches without them and for training without a cache."),
    ] = None,
    target: Annotated[str, typer.Option(help="teacher (SAMI) or pixels (MAE).")] = "teacher",
    teacher_online: Annotated[
        bool, typer.Option("--teacher-online", help="Run the teacher on every view instead of reading the cache.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Take the images from --data and use no cache at all.")] = False,
    teacher: Annotated[str | None, typer.Option(help="The online teacher. Default: the cache's.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of the online teacher.")] = None,
    weights_sha256: WeightsDigest = None,
    layer: Annotated[str | None, typer.Option(help="Of the online teacher.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Of the online teacher's input. Default: 14 x its stride.")] = None,
    epochs: Annotated[float, typer.Option(help="As published: 400.")] = 400,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    warmup_epochs: Annotated[float | None, typer.Option(help="Default: a tenth of the run (40 of 400).")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step. Default: 4096; for small sets a quarter of the set.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Images a process sees at once. Default: 512 on CUDA, 32 on the CPU.")
    ] = None,
    base_lr: Annotated[float, typer.Option(help="Learning rate per 256 images of the batch.")] = 1.5e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.05,
    clip_grad: Annotated[float | None, typer.Option(help="Largest norm of the gradient. Default: no clipping.")] = None,
    mask_ratio: Annotated[float, typer.Option(help="Share of tokens removed from the encoder's input.")] = 0.75,
    loss: Annotated[str, typer.Option(help="mse or cosine.")] = "mse",
    keys_values: Annotated[
        str, typer.Option(help="What masked tokens attend to: visible+mask (as published) or visible (CrossMAE).")
    ] = "visible+mask",
    reconstruct: Annotated[
        float, typer.Option(help="Share of the masked tokens that are decoded and scored; CrossMAE takes 0.25 and up.")
    ] = 1.0,
    decoder_width: Annotated[int, typer.Option(help="Published: 512.")] = 512,
    decoder_depth: Annotated[int, typer.Option(help="Published: 8.")] = 8,
    holdout: Annotated[float, typer.Option(help="Share of the images kept out of training, to report on.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of weights, order, views and masks.")] = 0,
    precision: Annotated[str, typer.Option(help="auto (bfloat16 where the device has it), float32 or bfloat16.")] = "auto",
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run.")] = False,
    init: Annotated[Path | None, typer.Option(help="Start a new run from the weights of another run or file.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps.")] = None,
    device: Device = "auto",
    workers: Workers = None,
    grace: Grace = 20.0,
    data_timeout: Annotated[
        float, typer.Option(min=0.1, max=86400, help="Seconds without any progress in reading after which the run stops.")
    ] = 60.0,
    shard_cache: Annotated[
        Path | None,
        typer.Option(help="For a cache in an object store: keeps local copies of its shards. Default: in ~/.cache/sami-cache."),
    ] = None,
    shard_cache_size: Annotated[
        str, typer.Option(help="What they may take; the longest unused make way. 24 shards must fit.")
    ] = "50GB",
) -> None:
    """Pretrain a student from a cache (SAMI), from pixels (MAE), or with the teacher online.

    Defaults are the paper's. Ctrl-C leaves a checkpoint; `--resume` continues. The resolved configuration, the metrics
    (JSON lines and TensorBoard) and the checkpoints lie in the run's folder.
    """
    from pipelines.running import Prepared
    from pipelines.train import TrainingConfig
    from pipelines.train import train as stage
    from sami_cache.processes import is_first_process

    run = run or Path("runs") / student
    config = TrainingConfig(
        run=run,
        cache=None if no_cache else cache,
        data=data,
        student=student,
        target=target,  # type: ignore[arg-type]
        teacher_online=teacher_online,
        teacher=teacher,
        weights=weights,
        weights_sha256=weights_sha256,
        layer=layer,
        image_size=image_size,
        epochs=epochs,
        steps=steps,
        warmup_epochs=warmup_epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        base_lr=base_lr,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        mask_ratio=mask_ratio,
        loss=loss,  # type: ignore[arg-type]
        keys_values=keys_values,  # type: ignore[arg-type]
        reconstruct=reconstruct,
        decoder_width=decoder_width,
        decoder_depth=decoder_depth,
        holdout=holdout,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
        compile=compile_model,
        device=device,
        workers=workers,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        evaluate_every=evaluate_every,
        grace=grace,
        data_timeout=data_timeout,
        shard_cache=shard_cache,
        shard_cache_bytes=parse_size(shard_cache_size, "--shard-cache-size"),
        resume=resume,
        init=init,
    )
    lines = TrainingLines()

    def start(prepared: Prepared) -> None:
        lines.steps = prepared.train.steps
        counts, step = prepared.settings["samples"], prepared.train
        typer.echo(
            f"{run}: {student}, target {target}{' (teacher online)' if teacher_online else ''}, {counts['train']} samples to "
            f"train on, {counts['held_out']} held out; {step.steps} steps of {step.batch_size} in {step.accumulate} parts, "
            f"lr {step.lr:.3g}, {step.warmup_steps} to warm up",
            err=True,
        )

    last = stage(config, lines, start)
    if not is_first_process():
        return
    text = f"{run}: {lines.steps} steps in {duration(last['seconds'])}, loss {last['loss']:.4f}"
    if "heldout_cosine" in last:
        text += f"; held out: loss {last['heldout_loss']:.4f}, cosine {last['heldout_cosine']:.4f}"
    typer.echo(text)
    typer.echo(f"Next: sami-cache export {run}, sami-cache report {run}, or look: tensorboard --logdir {run}/tensorboard")


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The file. Default: RUN/<timm name>.safetensors; promptable: RUN/<family>_<student>.pt.")
    ] = None,
) -> None:
    """Write a run's encoder or classifier as safetensors that load strictly into stock timm; of other models, all of it.

    Family efficientsam is written in the layout of the released EfficientSAM, family sam in Meta's.
    """
    from pipelines.export import export as stage
    from pipelines.export import (
        export_classifier,
        export_promptable,
        export_task_model,
        is_classifier,
        is_promptable,
        is_task_model,
    )

    if is_classifier(run):
        model = export_classifier(run, out)
        classes = model.options["num_classes"]
        typer.echo(f"{model.path}: {size(model.bytes)}, {classes} classes, step {model.step} of {model.steps}.")
        typer.echo(f"Loads strictly into stock timm:\n  {model.load_line}")
        return
    if is_task_model(run):
        path, written = export_task_model(run, out)
        typer.echo(f"{path}: {size(path.stat().st_size)}, {len(written.state)} tensors, {written.source}.")
        return
    if is_promptable(run):
        whole = export_promptable(run, out)
        typer.echo(
            f"{whole.path}: {size(whole.bytes)}, {whole.tensors} tensors, family {whole.family}, {whole.encoder} at "
            f"{whole.image_size} px."
        )
        return
    result = stage(run, out)
    typer.echo(f"{result.path}: {size(result.path.stat().st_size)}, the encoder of step {result.step} of {result.steps}.")
    typer.echo(f"Loads strictly into stock timm (the head is untrained):\n  {result.load_line}")


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    cache: Annotated[Path | None, typer.Option(help="The cache. Default: the one the run was trained from.", **PLACE)] = None,
    data: Annotated[Path | None, typer.Option(help="The images, for caches without them.")] = None,
    images: Annotated[int, typer.Option(help="Held-out images to show.")] = 6,
    device: Device = "auto",
) -> None:
    """Draw a run: loss curve, held-out cosine, and image | teacher's features | student's reconstruction."""
    from pipelines.report import report as stage

    result = stage(run, cache=cache, data=data, images=images, device=device)
    typer.echo(result.text())


def demo(out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo")) -> None:
    """The whole way on photographs that Python packages ship: extract, verify, train, export, report. Needs no network."""
    from pipelines.demo import demo as stage

    stage(out, typer.echo)
