"""The command `inspect`: what a cache holds, as text, JSON or a page."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.cache_commands import PLACE, AsJson, Device
from cli.output import size, table
from sami_cache.errors import SamiCacheError, one_line

SHOWN = 5


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: `sami-cache inspect cache.zarr --report cache.html`")(inspect)


def inspect(
    cache: Annotated[Path, typer.Argument(envvar="SAMI_CACHE", help="The cache.", **PLACE)] = Path("cache.zarr"),
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page too: plots, and a gallery of what was lost.")
    ] = None,
    no_teacher: Annotated[
        bool,
        typer.Option(
            "--no-teacher", help="Page: do not run the teacher again on the gallery's images; what was lost is not shown."
        ),
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Where the images are now. Default: where they were.")] = None,
    weights: Annotated[str | None, typer.Option(help="The teacher's checkpoint. Default: the one used at extraction.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a cache holds: identity, counts, bytes, and what the codec lost.

    Reads the head, the manifest and the sizes of files, whatever the number of samples; `--report` also decodes a few. The
    codes themselves are checked by `sami-cache verify`.
    """
    from sami_cache.store.files import as_damage
    from sami_cache.store.head import HEAD

    if report is None:
        if data or weights or no_teacher:
            raise SamiCacheError("--data, --weights and --no-teacher are about the page: they go with --report FILE.html.")
        from pipelines.inspect import inspect_cache

        found = inspect_cache(cache)
    else:
        from pipelines.inspect_page import PageConfig, inspect_to_page

        found = inspect_to_page(
            PageConfig(cache=cache, page=report, data=data, weights=weights, device=device, teacher=not no_teacher)
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    with as_damage(cache / HEAD, "not the head of an extraction"):
        rows = _rows(found)
    typer.echo(str(cache))
    typer.echo(table(rows))
    if report is not None:
        gallery = found["report"]
        if gallery["without_teacher"]:
            typer.echo(gallery["without_teacher"])
        typer.echo(f"page: {report}, with {gallery['samples']} samples in its gallery")


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    identity, codes = found["identity"], found["codes"]
    teacher, view = identity.get("teacher", {}), identity["view"]
    state = f"sealed, root {found['root']}" if found["sealed"] else "not sealed: extraction has not finished"
    if found["bytes"]["missing_files"]:
        state += f"; {found['bytes']['missing_files']} files are missing: sami-cache verify"
    rows = [
        ("state", state),
        ("samples", _samples(found)),
        (
            "teacher",
            _text(
                f"{teacher.get('name')}, layer {teacher.get('layer')}, {teacher.get('image_size')} px, "
                f"{identity.get('precision')}"
            ),
        ),
        ("weights", _text(f"{teacher.get('weights')}, SHA-256 {teacher.get('weights_sha256')}")),
        (
            "views",
            "dense" if view["mode"] == "dense" else f"{view['views']} recorded views an image, seed {view.get('seed')}",
        ),
        ("codes", _codes(found["codes"])),
        *(("", line) for line in _spectrum(found["spectrum"], codes["channels"])),
        *zip(("bytes", "", ""), _bytes(found), strict=False),
        ("shards", f"{found['shards']} of {found['shard_samples']} samples, chunks of {found['chunk_samples']}"),
        *zip(("error", ""), _error(found["error"]), strict=False),
        ("clipped", _clipped(found["clipped"])),
    ]
    return rows + list(zip(["failed", *[""] * 99], _failures(found), strict=False))


def _text(text: object) -> str:
    """What others wrote, fit for a terminal."""
    return one_line(text)


def _sample(entry: dict[str, Any]) -> str:
    return _text(entry["key"]) + (f" (view {entry['view']})" if "view" in entry else "")


def _samples(found: dict[str, Any]) -> str:
    read, missing = found["read"], found["samples"] - found["committed"]
    counts = f"{found['usable']} usable, {found['failed']} failed"
    if read["records"] == read["of_records"] or found["sealed"]:
        return f"{counts}, {missing} missing"
    return (
        f"{found['committed']} committed, {missing} missing. Read: {read['records']} of {read['of_records']} commit records, "
        f"spread evenly, with {read['samples']} samples ({counts}); error, clipped and failed are of these"
    )


def _codes(codes: dict[str, Any]) -> str:
    block, grid = codes["block"], codes["grid"]
    if block == 1:
        return f"{codes['kept']} of {codes['channels']} channels kept, {grid} x {grid}, {codes['dtype']}"
    rows = f" in {codes['rows']} rows" if codes["rows"] != codes["kept"] else ""
    return (
        f"{codes['kept']} of {codes['coefficients']} coefficients kept ({codes['channels']} directions x {block} x {block} "
        f"frequencies), {codes['dtype']}{rows}, {grid} x {grid} cells in {grid // block} x {grid // block} blocks"
    )


def _spectrum(spectrum: dict[str, Any], channels: int) -> list[str]:
    lines = []
    if spectrum["directions_for_90"]:
        lines.append(
            f"{spectrum['directions_for_90']} of {channels} principal directions hold 90 % of the variance, "
            f"{spectrum['directions_for_99']} hold 99 %"
        )
    if dead := spectrum["dead_channels"]:
        named = ", ".join(map(str, dead[:SHOWN])) + (f" and {len(dead) - SHOWN} more" if len(dead) > SHOWN else "")
        lines.append(f"{len(dead)} of {channels} channels hardly vary, nothing of them is stored: {named}")
    return lines


def _bytes(found: dict[str, Any]) -> list[str]:
    count, unit = found["bytes"], "a view" if found["identity"]["view"]["mode"] == "replay" else "an image"
    lines = [
        f"{size(count['total'])}: codes {size(count['codes'])}, JPEG {size(count['jpeg'])}, records and manifest "
        f"{size(count['records'])}, head and copies {size(count['other'])}",
    ]
    if count["float16_to_codes"] is None:
        return lines
    lines.append(
        f"{unit}: codes {size(count['codes_per_sample'])} = {count['bits_per_value']:.2f} bits a value, "
        f"{count['float16_to_codes']:.1f} x smaller than float16 ({size(count['float16_per_sample'])})"
    )
    both = count["codes_per_sample"] + count["jpeg_per_sample"]
    if count["codes_to_jpeg"] is not None:
        lines.append(
            f"{unit}: with its JPEG ({size(count['jpeg_per_sample'])}) {size(both)}, "
            f"{count['float16_per_sample'] / both:.1f} x smaller than float16; codes {count['codes_to_jpeg']:.2f} x the JPEG"
        )
    return lines


def _error(lost: dict[str, Any]) -> list[str]:
    if lost["overall"] is None:
        return ["no sample has an embedding"]
    asked = f" (asked for {lost['asked']:.2%})" if lost["asked"] else ""
    worst = ", ".join(f"{_sample(entry)} {entry['error']:.3%}" for entry in lost["worst"])
    return [
        f"{lost['overall']:.3%} of the variance{asked}; a sample: median {lost['median']:.3%}, 1 % above {lost['p99']:.3%}, "
        f"worst {lost['max']:.3%}",
        f"worst: {worst}",
    ]


def _clipped(clipped: dict[str, Any]) -> str:
    if not clipped["possible"]:
        return "cannot happen: the codes are floats"
    if not clipped["codes"]:
        return "no code is at the end of its range"
    worst = ", ".join(f"{_sample(entry)} ({entry['codes']})" for entry in clipped["worst"])
    return f"{clipped['codes']} codes ({clipped['share']:.2g} of all) in {clipped['samples']} samples; most in {worst}"


def _failures(found: dict[str, Any]) -> list[str]:
    lines = []
    for reason in found["failure_reasons"]:
        more = ", ..." if reason["count"] > len(reason["keys"]) else ""
        lines.append(f"{reason['count']} x {_text(reason['reason'])}: {', '.join(map(_text, reason['keys']))}{more}")
    if found["failure_reasons_left_out"]:
        lines.append(f"... and {found['failure_reasons_left_out']} more reasons")
    if found["failed"] > sum(len(reason["keys"]) for reason in found["failure_reasons"]):
        left = f", {found['failures_left_out']} left out" if found["failures_left_out"] else ""
        lines.append(f"by sample: --json ({len(found['failures'])} listed{left})")
    return lines
