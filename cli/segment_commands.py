"""The command that segments one picture: segment."""

from pathlib import Path
from typing import Annotated

import typer

from cli.cache_commands import Device
from sami_cache.errors import SamiCacheError

SHOWN = 10


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command(
        epilog="Examples: `sami-cache segment dog.jpg --model runs/promptable --point 320,200 --negative 40,40`; "
        "`... --box 10,20,300,400 --box 320,20,600,400`; `... --everything --out dog_masks`"
    )(segment)


def segment(
    image: Annotated[Path, typer.Argument(help="The picture: JPEG, PNG, WebP, BMP or TIFF.")],
    model: Annotated[
        Path, typer.Option(help="A run of `finetune promptable`, or a file: ours, EfficientSAM's, Meta's, Hugging Face's.")
    ],
    point: Annotated[list[str] | None, typer.Option(metavar="X,Y", help="A point of what is wanted; again for more.")] = None,
    negative: Annotated[list[str] | None, typer.Option(metavar="X,Y", help="A point of what is not; again for more.")] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="A box around what is wanted; several are a query each.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Masks of all that a grid of points finds.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results. Default: IMAGE_masks, in the working directory.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    all_masks: Annotated[bool, typer.Option("--all-masks", help="Of a query all three masks, not the best alone.")] = False,
    points_per_side: Annotated[int, typer.Option(help="Of the grid; --everything only, as are those below.")] = 32,
    pred_iou_thresh: Annotated[float, typer.Option(help="Keep masks of a higher predicted IoU.")] = 0.88,
    stability_score_thresh: Annotated[float, typer.Option(help="Keep masks whose edge is as sure.")] = 0.95,
    crop_layers: Annotated[int, typer.Option(help="Ask again in crops of the picture: finds small things, takes longer.")] = 0,
    min_area: Annotated[int, typer.Option(help="Pixels; smaller holes are filled and smaller islands removed.")] = 0,
    device: Device = "auto",
) -> None:
    """Segment a picture: by points, by boxes, or everything in it.

    Places are pixels of the upright picture, from its top left corner. Writes a PNG a mask, `masks.json` (COCO RLE, laid out
    as SA-1B's files) and `overlay.jpg`.
    """
    prompts = {
        "positive": tuple(_numbers("--point", text, ("x", "y")) for text in point or ()),
        "negative": tuple(_numbers("--negative", text, ("x", "y")) for text in negative or ()),
        "boxes": tuple(_numbers("--box", text, ("x0", "y0", "x1", "y1")) for text in box or ()),
    }
    from pipelines.segment import SegmentConfig
    from pipelines.segment import segment as stage
    from sami_cache.inference.mask_generator import MaskGeneratorConfig

    grid = MaskGeneratorConfig(
        points_per_side=points_per_side,
        pred_iou_thresh=pred_iou_thresh,
        stability_score_thresh=stability_score_thresh,
        crop_n_layers=crop_layers,
        min_mask_region_area=min_area,
    )
    result = stage(
        SegmentConfig(
            image=image,
            model=model,
            out=out or Path(f"{image.stem}_masks"),
            all_masks=all_masks,
            everything=grid if everything else None,
            overwrite=overwrite,
            device=device,
            **prompts,  # type: ignore[arg-type]
        )
    )
    for mask in result.annotations[:SHOWN]:
        x, y, width, height = mask["bbox"]
        typer.echo(
            f"{mask['file_name']}: {mask['area']} pixels in x {x} to {x + width}, y {y} to {y + height}; predicted IoU "
            f"{mask['predicted_iou']:.3f}"
        )
    if len(result.annotations) > SHOWN:
        typer.echo(f"... and {len(result.annotations) - SHOWN} more")
    typer.echo(f"{len(result.annotations)} masks: {result.masks}; look: {result.overlay}")


def _numbers(option: str, text: str, names: tuple[str, ...]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != len(names):
        raise SamiCacheError(
            f"{option} {text!r}: expected {','.join(names)} in pixels, {len(names)} numbers with commas between."
        )
    return numbers
