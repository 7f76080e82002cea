"""Options that all fine-tuning commands share, and how a run of them is announced."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.running import Prepared

Run = Annotated[Path, typer.Option("--run", "--run-dir", help="Where the run is written; torchrun takes --run for its own.")]
Init = Annotated[
    str | None,
    typer.Option(
        help="Start from a run of `train`, a file of `export`, a plain ViT's weights, or timm:NAME. Default: scratch."
    ),
]
Student = Annotated[
    str | None, typer.Option(help="vit_t, vit_s, vit_b, or one of timm's plain ViTs. Default: of --init, else vit_t.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")]
Epochs = Annotated[float, typer.Option(help="The default is the published one, with its data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures a step; all, where there are fewer.")]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Pictures a process sees at once. Default: what suits the device.")]
LearningRate = Annotated[float, typer.Option(help="The highest of the schedule.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's.")]
ClipGrad = Annotated[float | None, typer.Option(help="Largest norm of the gradient. Default: no clipping.")]
WarmupEpochs = Annotated[float, typer.Option(help="Of linear warm-up.")]
WarmupSteps = Annotated[int | None, typer.Option(min=0, help="Of linear warm-up, instead of epochs.")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, order, and everything drawn.")]
Precision = Annotated[str, typer.Option(help="auto (bfloat16 where the device has it), float32 or bfloat16.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --run.")]
Every = Annotated[int | None, typer.Option(min=1, help="Steps.")]
DataTimeout = Annotated[float, typer.Option(min=0.1, max=86400, help="Seconds without a picture after which the run stops.")]


def announce(run: Path, what: str, prepared: "Prepared") -> None:
    """Say on standard error what is about to be trained."""
    counts, step = prepared.settings["pictures"], prepared.train
    typer.echo(
        f"{run}: {what}; {counts['train']} pictures to train on, {counts['held_out']} held out; {step.steps} steps of "
        f"{step.batch_size} in {step.accumulate} parts, lr {step.lr:.3g}, {step.warmup_steps} to warm up",
        err=True,
    )
