"""Commands that show a model at work: demo-web."""

from pathlib import Path
from typing import Annotated

import typer

from cli.cache_commands import Device


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command(epilog="Examples: `sami-cache demo-web runs/promptable`, `sami-cache demo-web efficient_sam_vitt.pt --port 0`")(
        demo_web
    )


def demo_web(
    run_or_checkpoint: Annotated[
        Path,
        typer.Argument(help="A run of `finetune promptable`, or a checkpoint: EfficientSAM's, Meta's, Hugging Face's, ours."),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Anything but this machine's own lets others in: there is no password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    device: Device = "auto",
) -> None:
    """Try a promptable model in the browser: click, drag a box, find everything, download the mask. Ctrl-C ends it.

    Nothing leaves this machine; the page needs no network.
    """
    from pipelines.demo_web import demo_web as stage

    stage(run_or_checkpoint, host=host, port=port, open_page=open_page, device=device, say=typer.echo)
