"""Commands that write a promptable model for other programs: export-onnx."""

import os
import platform
from pathlib import Path
from typing import Annotated

import typer

from cli.output import size, table


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command(
        "export-onnx",
        epilog="Examples: `sami-cache export-onnx runs/promptable --out onnx`; the official checkpoint, smaller encoders too: "
        "`sami-cache export-onnx efficient_sam_vitt.pt --out onnx --fp16 --int8`",
    )(export_onnx)


def export_onnx(
    model: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run of `finetune promptable`, or a checkpoint's file.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for encoder.onnx and decoder.onnx.")] = Path("onnx"),
    fp16: Annotated[bool, typer.Option("--fp16", help="Also encoder_fp16.onnx, half the size.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also encoder_int8.onnx, smaller and faster on CPUs.")] = False,
    single_mask: Annotated[
        bool, typer.Option("--single-mask", help="The decoder gives the one mask of token 0 instead of three.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Photographs to compare on, the first 20 of a folder. Default: five that scikit-image ships."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Of each file; the median is printed.")] = 10,
) -> None:
    """Write a promptable model as two ONNX files with the official EfficientSAM's names, compared with torch first.

    Needs the extra `onnx`: pip install 'sami-cache[onnx]'.
    """
    from pipelines.export_onnx import ExportOnnxConfig
    from pipelines.export_onnx import export_onnx as stage

    config = ExportOnnxConfig(model=model, out=out, fp16=fp16, int8=int8, single_mask=single_mask, images=images, runs=runs)
    result = stage(config, lambda text: typer.echo(text, err=True))
    rows = []
    for file in result.files:
        text = f"{size(file.bytes)}, {file.milliseconds:.0f} ms"
        if file.agreement:
            same = file.agreement
            text += f", IoU of {same.masks} masks with the float32 encoder's: mean {same.mean:.4f}, lowest {same.lowest:.4f}"
        rows.append((str(file.path), text))
    typer.echo(table(rows))
    cpus = f"{len(os.sched_getaffinity(0))}-core {platform.machine()}"
    typer.echo(
        f"onnxruntime and torch on {result.photographs} photographs: logits differ by at most {result.logit_difference:.2g} "
        f"(largest logit {result.largest_logit:.3g}), embeddings by {result.embedding_difference:.2g}, "
        f"and relatively by {result.resizing_difference:.2g} where the graph resizes the photographs. Times: median of "
        f"{runs} on {cpus}, one picture, one click; torch's encoder: {result.milliseconds_torch:.0f} ms."
    )
