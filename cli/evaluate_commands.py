"""Commands that measure models: evaluate promptable."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cache_commands import AsJson, Device
from cli.output import ProgressLine, duration
from sami_cache.errors import SamiCacheError

if TYPE_CHECKING:
    from pipelines.evaluate import Moment

evaluate_app = typer.Typer(help="Measure models.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    evaluate_app.command(
        epilog="Examples: `sami-cache evaluate promptable runs/sam_vit_t --data instances_val2017.json --images val2017 "
        "--protocol efficientsam`; AP: add `--boxes vitdet.json`; the baseline: `sami-cache evaluate promptable --baseline box "
        "--data instances.json --images photos`"
    )(promptable)
    app.add_typer(evaluate_app, name="evaluate")


def promptable(
    model: Annotated[
        Path | None, typer.Argument(help="A run's folder, or a checkpoint: ours, EfficientSAM's, SAM's.", show_default=False)
    ] = None,
    data: Annotated[Path, typer.Option(help="COCO-format or LVIS JSON, or a folder of SA-1B.")] = Path("instances.json"),
    images: Annotated[Path | None, typer.Option(help="The folder of the JSON's pictures.")] = None,
    protocol: Annotated[
        str, typer.Option(help="efficientsam, sam, oracle, single or box-iou: see docs/evaluate.md.")
    ] = "efficientsam",
    prompts: Annotated[str, typer.Option(help="box, and numbers of clicks; empty for AP alone.")] = "box,1,3,5",
    boxes: Annotated[
        Path | None, typer.Option(help="A detector's COCO results (image_id, category_id, bbox, score): measure AP too.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Of AP: coco, lvis, or auto, which looks at the data.")] = "auto",
    baseline: Annotated[str | None, typer.Option(help="box: no model, the box itself is the mask.")] = None,
    mask: Annotated[
        str | None,
        typer.Option(help="Instead of the protocol's: confident, single or oracle; of boxes also box or tight-box."),
    ] = None,
    first_point: Annotated[str | None, typer.Option(help="Instead of the protocol's: uniform or farthest.")] = None,
    next_points: Annotated[
        str | None, typer.Option(help="Instead of the protocol's: uniform, error-farthest or error-centre.")
    ] = None,
    target_boxes: Annotated[str | None, typer.Option(help="Boxes of objects: tight (around the mask) or annotated.")] = None,
    crowd: Annotated[bool | None, typer.Option("--crowd/--no-crowd", help="Keep crowd annotations in mIoU.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of uniform points.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N pictures alone.")] = None,
    out: Annotated[Path, typer.Option(help="The result as JSON; of AP the masks, in COCO's format, in OUT.masks.json.")] = Path(
        "evaluation.json"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a promptable model: mIoU from boxes and clicks, and AP from a detector's boxes.

    Papers differ in which prompts an object gets and which mask counts: every number is printed with its protocol, and
    published ones stand in a block of their own. The files appear whole at the end; Ctrl-C leaves none.
    """
    from pipelines.evaluate import EvaluationConfig
    from pipelines.evaluate import evaluate as stage
    from pipelines.evaluation_text import evaluation_text
    from sami_cache.inference.protocols import change_protocol, find_protocol

    if baseline not in (None, "box") or (model is None) == (baseline is None):
        raise SamiCacheError("give a MODEL (a run's folder or a checkpoint), or --baseline box instead.")
    changes = {
        "first_point": first_point,
        "next_points": next_points,
        "boxes": target_boxes,
        "crowd": crowd,
        "seed": seed,
    }
    chosen = change_protocol(find_protocol(protocol), mask=mask, **changes)
    config = EvaluationConfig(
        model=model,
        data=data,
        images=images,
        protocol=chosen,
        prompts=tuple(dict.fromkeys(prompt.strip() for prompt in prompts.split(",") if prompt.strip())),
        boxes=boxes,
        metric=metric,
        limit=limit,
        out=out,
        overwrite=overwrite,
        device=device,
    )
    with ProgressLine() as line:
        result = stage(config, lambda moment: _show(line, moment))
    typer.echo(json.dumps(result, indent=2) if as_json else evaluation_text(result))
    typer.echo(f"Written: {out}" + (f", {config.masks_out}" if boxes else ""), err=True)


def _show(line: ProgressLine, moment: "Moment") -> None:
    rate = moment.done / moment.seconds
    left = (moment.total - moment.done) / rate
    text = f"evaluating picture {moment.done}/{moment.total}, {moment.objects} masks, {rate:.2f} pictures/s"
    last = moment.done == moment.total
    line.show(text if last else f"{text}, {duration(left)} left", stage="evaluate", last=last)
