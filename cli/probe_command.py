"""The command probe."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.cache_commands import AsJson, Device, Workers
from cli.output import ProgressLine, duration, table
from sami_cache.errors import SamiCacheError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        epilog="Examples: `sami-cache probe runs/vit_t --train cifar10/train.parquet --test cifar10/test.parquet`; the "
        "ceiling: `sami-cache probe --teacher efficientnet_lite0 --train train/ --test test/`; the floor: `--student vit_t`; "
        "others: `sami-cache probe timm:vit_small_patch16_224.dino --train imagenet/train --test imagenet/val --k 10,20`"
    )(probe)


def probe(
    weights: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN_OR_WEIGHTS", help="A run of `train`, a file of `export`, or timm:NAME.", show_default=False
        ),
    ] = None,
    train: Annotated[Path, typer.Option(help="Labelled pictures: a folder for each class, tars, Parquet.")] = Path("train"),
    test: Annotated[Path, typer.Option(help="The same, with the same classes.")] = Path("test"),
    teacher: Annotated[str | None, typer.Option(help="Probe a teacher instead: the mean over its map.")] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="The teacher's, where they are not the published ones.")] = None,
    layer: Annotated[str | None, typer.Option(help="Of the teacher.")] = None,
    student: Annotated[str | None, typer.Option(help="Probe a student that knows nothing: random weights.")] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Of the square input, pixels.")] = 224,
    crop_ratio: Annotated[
        float, typer.Option(help="The short side is resized to --image-size / this, and the middle cut out.")
    ] = 0.875,
    pool: Annotated[
        str, typer.Option(help="patches: the mean of the patch tokens; class: the class token; both: one after the other.")
    ] = "both",
    k: Annotated[str, typer.Option(help="Of the nearest neighbours; several: 10,20.")] = "20",
    temperature: Annotated[float, typer.Option(min=1e-3, help="Of their votes.")] = 0.07,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, of the tenth held out, of the intervals.")] = 0,
    features: Annotated[Path, typer.Option(help="Where features are kept, and looked for.")] = Path("features"),
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 64,
    device: Device = "auto",
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Measure frozen features: k nearest neighbours as DINO does, and a linear probe.

    Nothing is trained but the probe, whose penalty is chosen on a tenth of --train. Features are computed once and kept.
    """
    from pipelines.probe import POOLS, ProbeConfig
    from pipelines.probe import probe as stage

    try:
        ks = tuple(dict.fromkeys(int(each) for each in k.split(",")))
    except ValueError as error:
        raise SamiCacheError(f"--k {k}: expected a number, or several with commas between: 10,20") from error
    config = ProbeConfig(
        weights=weights,
        train=train,
        test=test,
        teacher=teacher,
        teacher_weights=teacher_weights,
        layer=layer,
        student=student,
        image_size=image_size,
        crop_ratio=crop_ratio,
        pools=POOLS if pool == "both" else (pool,),
        ks=ks,
        temperature=temperature,
        seed=seed,
        features=features,
        batch_size=batch_size,
        device=device,
        workers=workers,
    )
    with ProgressLine() as line:
        found = stage(config, lambda text: line.show(text, stage="probe"))
    typer.echo(json.dumps(found, indent=2) if as_json else _text(found))


def _text(found: dict[str, Any]) -> str:
    def share(value: dict[str, Any]) -> str:
        return f"{100 * value['accuracy']:.2f} % ({100 * value['low']:.2f} to {100 * value['high']:.2f})"

    rows: list[tuple[str, str]] = []
    for pool, values in found["pools"].items():
        name = f"{pool}, {values['dimensions']} numbers"
        rows += [(f"{name}, {k}-NN", share(value)) for k, value in values["knn"].items()]
        rows.append((f"{name}, linear", f"{share(values['linear'])}, penalty {values['linear']['penalty']:g}"))
    model, train, test = found["model"], found["train"], found["test"]
    heading = (
        f"{model['name']} ({model['source']}) at {found['image_size']} px; {train['pictures']} pictures of {found['classes']} "
        f"classes to learn from, {test['pictures']} to test; top-1 with 95 % intervals"
    )
    lines = [heading, table(rows)]
    if found["test_pictures_in_train"]:
        lines.append(
            f"Beware: {found['test_pictures_in_train']} of the test pictures are among those to learn from, byte by byte."
        )
    lines.append(f"{duration(found['seconds'])}; features {'from before' if found['features_reused'] else 'computed and kept'}")
    return "\n".join(lines)
