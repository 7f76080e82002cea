"""Commands that make caches of caches: merge, subset."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cache_commands import PLACE, AsJson, CachePath, Grace
from cli.output import ProgressLine, duration, size, table

if TYPE_CHECKING:
    from pipelines.joining import Joined

Out = Annotated[Path, typer.Option("--out", help="The cache to make. Interrupted, the same command goes on with it.", **PLACE)]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command(epilog="Example: `sami-cache merge monday.zarr tuesday.zarr --out both.zarr`")(merge)
    app.command(epilog="Example: `sami-cache subset --cache all.zarr --match 'n02*' --count 1000 --out dogs.zarr`")(subset)


def merge(
    caches: Annotated[list[Path], typer.Argument(help="Sealed caches, extracted with the same settings.", **PLACE)],
    out: Out,
    recode: Annotated[
        bool, typer.Option("--recode", help="Where codecs differ: decode, and encode again under the first cache's codec.")
    ] = False,
    grace: Grace = 20.0,
    as_json: AsJson = False,
) -> None:
    """Join caches of the same settings into one. No teacher is needed, and whole shards are linked, not copied.

    For sets extracted apart: give the second extraction `--codec-from` the first cache, or codes have to be made again.
    """
    from pipelines.joining import merge as stage

    with ProgressLine(quiet=as_json) as line:
        result = stage(caches, out, recode=recode, grace=grace, on_progress=line.extraction)
    _print(result, as_json)


def subset(
    out: Out,
    cache: CachePath = Path("cache.zarr"),
    match: Annotated[list[str] | None, typer.Option(help="Shell pattern of keys, such as 'n01*/*'; may be repeated.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A text file with a key a line.")] = None,
    data: Annotated[Path | None, typer.Option(help="Keep the images that are still here.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="So many of what is left, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(help="Of --count.")] = 0,
    grace: Grace = 20.0,
    as_json: AsJson = False,
) -> None:
    """Make a cache of some of a cache's images: those that meet every condition given."""
    from pipelines.joining import subset as stage

    with ProgressLine(quiet=as_json) as line:
        result = stage(
            cache,
            out,
            match=match or (),
            keys=keys,
            data=data,
            count=count,
            seed=seed,
            grace=grace,
            on_progress=line.extraction,
        )
    _print(result, as_json)


def _print(result: "Joined", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(result), default=str, indent=2))
        return
    root = result.root
    typer.echo(f"{result.cache}: {root['ok']} of {root['samples']} samples in {root['shards']} shards, sealed.")
    rows = [
        ("bytes", size(result.bytes)),
        ("root", root["root"]),
        ("shards", f"{result.linked} linked, {result.written} written"),
        ("time", duration(result.seconds)),
    ]
    if result.twice:
        rows.append(("twice", f"{result.twice} images were in several caches; one of each was taken"))
    if result.recoded:
        rows.append(("encoded again", f"{result.recoded} samples, under the first cache's codec"))
    typer.echo(table(rows))
    typer.echo(f"Next: sami-cache verify --cache {result.cache}")
