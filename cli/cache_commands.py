"""Commands that make and check caches: extract, verify, diff."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.cluster_commands import Devices, Sbatch, Scheduler, Slurm, workers_asked_for
from cli.output import ProgressLine, duration, size, table
from sami_cache.store.places import parse_place

if TYPE_CHECKING:
    from pipelines.extract import Summary
    from pipelines.plan import Plan

Data = Annotated[Path, typer.Option(envvar="SAMI_DATA", help="Images: a folder, tar shards (webdataset), or Parquet.")]
# typer knows no unions: what the parser returns may be a place in an object store too.
PLACE: dict[str, Any] = {"parser": parse_place, "metavar": "PATH|URL"}
CachePath = Annotated[
    Path,
    typer.Option("--cache", envvar="SAMI_CACHE", help="The cache: a folder, or s3://BUCKET/PREFIX.", **PLACE),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Workers = Annotated[int | None, typer.Option(help="Threads that read and decode images. Default: one a core, at most 16.")]
Grace = Annotated[
    float,
    typer.Option(min=0, max=86400, help="Seconds to finish what is in hand after SIGTERM or Ctrl-C (0: none)."),
]
WeightsDigest = Annotated[
    str | None, typer.Option("--weights-sha256", help="SHA-256 that the --weights file must have; checked before it is read.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SHOWN = 10


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command(
        epilog="Examples: `sami-cache extract --teacher vit_h --weights sam_vit_h_4b8939.pth --data photos/`; on all GPUs of "
        "this machine: `... --devices auto`; by 16 SLURM jobs: `... --slurm 16 --sbatch '-p gpu --gres=gpu:1 --time=12:00:00'`"
    )(extract)
    app.command(epilog="Example: `sami-cache verify --deep && sami-cache verify --audit 16`")(verify)
    app.command(epilog="Example: `sami-cache diff monday.zarr tuesday.zarr`")(diff)


def extract(
    teacher: Annotated[str, typer.Option(help="vit_h, vit_l, vit_b (SAM), efficientnet_lite0, or a timm model's name.")],
    data: Data = Path("data"),
    cache: CachePath = Path("cache.zarr"),
    weights: Annotated[
        str | None,
        typer.Option(help="The teacher's checkpoint: Meta's, Hugging Face's or timm's file; or `random`, explicitly."),
    ] = None,
    weights_sha256: WeightsDigest = None,
    layer: Annotated[
        str | None, typer.Option(help="SAM: neck (256 channels, default) or trunk. Others: a stage's index.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Longest side of the teacher's input. Default: 1024 for SAM (its views: 224), else grid x stride."),
    ] = None,
    grid: Annotated[int | None, typer.Option(help="Stored cells a side. Default: 32 dense, 14 with --views.")] = None,
    views: Annotated[
        int | None, typer.Option(help="Store K random views an image, the paper's exact targets, instead of one dense map.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="pca (default), int8 or float16.")] = None,
    error: Annotated[float | None, typer.Option(help="Relative squared error of the pca codec. Default 0.01.")] = None,
    fit_images: Annotated[
        int | None, typer.Option(min=1, help="Images that the codec is fitted on, drawn at random. Default 256, or 512 MiB.")
    ] = None,
    codec_from: Annotated[
        Path | None, typer.Option(help="Another cache, to take the codec and the settings left out from: for `merge`.", **PLACE)
    ] = None,
    images: Annotated[
        bool | None,
        typer.Option("--images/--no-images", help="Keep a JPEG of each image, so that training needs the cache alone."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: bfloat16 on CUDA.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random views, and of random weights.")] = None,
    batch_size: Annotated[
        str, typer.Option(help="Images the teacher sees at once. auto: 8 on the CPU; on CUDA measured, then kept for going on.")
    ] = "auto",
    shard_samples: Annotated[int | None, typer.Option(help="Samples a shard, a power of two. Default: 17 to 34 MB.")] = None,
    source_kind: Annotated[str | None, typer.Option(help="folder, tar or parquet, where --data holds several.")] = None,
    device: Device = "auto",
    devices: Devices = None,
    scheduler: Scheduler = None,
    slurm: Slurm = None,
    sbatch: Sbatch = None,
    attention: Annotated[
        str,
        typer.Option(help="How a SAM attends, the same but for rounding: timm, folded or flex. auto: on CUDA the fastest."),
    ] = "auto",
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile the teacher: takes minutes, and rounds otherwise."),
    ] = None,
    workers: Workers = None,
    grace: Grace = 20.0,
    trust_images: Annotated[
        bool, typer.Option("--trust-images", help="Going on: do not read committed images again to see whether they changed.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it takes (bytes, hours, disk), measured on a sample; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a teacher once over a set of images and store its embeddings.

    Interrupt it as you like: the same command goes on where it stopped. Where images were added, it does the new ones only.
    Settings that you leave out are the cache's own, or the defaults. Images that cannot be used are recorded with the reason,
    and the run goes on.
    """
    from pipelines import extract as stage
    from pipelines import plan as planning
    from pipelines.jobs import ExtractConfig

    config = ExtractConfig(
        data=data,
        cache=cache,
        teacher=teacher,
        weights=weights,
        layer=layer,
        image_size=image_size,
        grid=grid,
        precision=precision,
        views=views,
        seed=seed,
        codec=codec,
        error=error,
        fit_images=fit_images,
        codec_from=codec_from,
        images=images,
        shard_samples=shard_samples,
        batch_size=_batch_size(batch_size),
        device=device,
        attention=None if attention == "auto" else attention,
        compile=compiled,
        workers=workers,
        source_kind=source_kind,
        grace=grace,
        trust_images=trust_images,
        weights_sha256=weights_sha256,
    )
    several = workers_asked_for(devices, scheduler, slurm, sbatch, plan=plan)
    with ProgressLine(quiet=as_json) as line:
        outlook = planning.plan(config, line.extraction) if plan else None
        if several is not None:
            from pipelines.cluster import extract_on

            summary = extract_on(several, config, line.extraction)
        else:
            summary = stage.extract(config, line.extraction) if outlook is None else None
    if outlook is not None:
        _print_plan(outlook, as_json)
    elif summary is not None:
        _print_summary(summary, as_json)


def _batch_size(given: str) -> int | None:
    if given == "auto":
        return None
    try:
        return int(given)
    except ValueError:
        raise typer.BadParameter(f"{given!r}: expected a number of images, or auto.", param_hint="--batch-size") from None


def _print_summary(summary: "Summary", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(summary), default=str, indent=2))
        return
    root, cache = summary.root, summary.cache
    typer.echo(f"{cache}: {root['ok']} of {root['samples']} samples in {root['shards']} shards, sealed.")
    rows = [
        ("bytes", f"{size(summary.bytes)}, {size(summary.bytes / max(1, root['ok']))} a sample"),
        ("root", root["root"]),
        ("time", f"{duration(summary.seconds)}, {summary.samples_done} samples by this run"),
    ]
    if summary.error is not None:
        asked = f" (asked for {summary.asked:.2%})" if summary.asked else ""
        rows.insert(1, ("error", f"{summary.error:.3%} of the variance{asked}{_clipped(summary)}"))
    if summary.other_writers:
        text = f"{summary.other_writers} shards were committed by another process first"
        if summary.differences:
            text += f"; {len(summary.differences)} of them differ from ours (shards {summary.differences[:SHOWN]})"
        rows.append(("other writers", text))
    if summary.before is not None:
        rows.append(
            ("as it was", f"{summary.before}, which shares its files with the grown cache; delete it when nothing reads it")
        )
    typer.echo(table(rows))
    if summary.error and summary.asked and summary.error > 1.1 * summary.asked:
        mend = ": a larger --fit-images, into a new --cache, comes nearer" if summary.fit_samples >= summary.fit_images else ""
        typer.echo(f"The codec was fitted on {summary.fit_samples} samples, which say too little about the others{mend}.")
    if summary.failures:
        typer.echo(f"{len(summary.failures)} samples have no embedding:")
        for key, reason in summary.failures[:SHOWN]:
            typer.echo(f"  {key}: {reason}")
        if len(summary.failures) > SHOWN:
            typer.echo(f"  ... and {len(summary.failures) - SHOWN} more: sami-cache inspect {cache} --json")
    where = "" if str(cache) == "cache.zarr" else f" --cache {cache}"
    typer.echo(f"Next: sami-cache verify{where}, then sami-cache train{where} --student vit_s")


def _clipped(summary: "Summary") -> str:
    count, samples = summary.clipped
    return f"; {count} coefficients clipped in {samples} samples (`sami-cache inspect` names the worst)" if count else ""


def _print_plan(outlook: "Plan", as_json: bool) -> None:
    if as_json:
        values = {
            "images": outlook.images,
            "samples": outlook.samples,
            "remaining": outlook.remaining,
            "bytes": round(outlook.total_bytes),
            "bytes_per_sample": outlook.bytes_per_sample,
            "free_bytes": outlook.free_bytes if math.isfinite(outlook.free_bytes) else None,
            "fits": outlook.free_bytes > outlook.remaining_bytes,
            "seconds_per_sample": outlook.seconds_per_sample,
            "hours": outlook.hours,
            "identity": outlook.identity,
        }
        typer.echo(json.dumps(values, indent=2))
        return
    codec = outlook.codec
    rows = [
        ("images", f"{outlook.images} ({outlook.samples} samples, {outlook.remaining} not extracted yet)"),
        (
            "bytes",
            f"{size(outlook.total_bytes)}: {size(outlook.bytes_per_sample)} a sample (codes {size(outlook.code_bytes)}, image "
            f"{size(outlook.image_bytes)}; {codec.kept} of {codec.channels * codec.block**2} coefficients kept, {codec.dtype})",
        ),
        ("disk", _room(outlook)),
        ("teacher", f"{outlook.seconds_per_sample:.3f} s a sample on this machine, measured"),
        ("time", duration(outlook.hours * 3600)),
    ]
    typer.echo(table(rows))


def _room(outlook: "Plan") -> str:
    room = outlook.free_bytes - outlook.remaining_bytes
    if math.isinf(room):
        return "an object store, which has no end"
    return f"{size(outlook.free_bytes)} free, {size(room)} afterwards" if room > 0 else f"{size(-room)} too little"


def verify(
    cache: CachePath = Path("cache.zarr"),
    quick: Annotated[bool, typer.Option("--quick", help="Presence, sizes and records only.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode everything too: finite, per-sample checksums, content root.")
    ] = False,
    audit: Annotated[int, typer.Option(help="Run the teacher again on N samples and compare.")] = 0,
    tolerance: Annotated[float, typer.Option(help="How far below 1 - (codec error) an audited cosine may lie.")] = 0.005,
    sources: Annotated[bool, typer.Option("--sources", help="Hash the source images again.")] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Put back what has a copy and extract damaged shards again; what was there goes to quarantine/."
        ),
    ] = False,
    root: Annotated[
        str | None, typer.Option(help="The root that the cache must have, noted elsewhere: finds tampering too.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Where the images are now. Default: where they were.")] = None,
    weights: Annotated[str | None, typer.Option(help="The teacher's checkpoint. Default: the one used at extraction.")] = None,
    weights_sha256: WeightsDigest = None,
    device: Device = "auto",
    workers: Workers = None,
    grace: Grace = 20.0,
    as_json: AsJson = False,
) -> None:
    """Check that every byte of a cache is the one that was committed.

    Exits with 0 if it is, 1 if not (every damaged file is named, and the samples in it), 2 if it could not be checked.
    """
    from pipelines.verify import VerifyConfig
    from pipelines.verify import verify as stage
    from sami_cache.errors import SamiCacheError

    if quick and deep:
        raise SamiCacheError("--quick and --deep exclude each other.")
    config = VerifyConfig(
        cache=cache,
        level="quick" if quick else "deep" if deep else "default",
        root=root,
        sources=sources,
        audit=audit,
        tolerance=tolerance,
        repair=repair,
        data=data,
        weights=weights,
        weights_sha256=weights_sha256,
        device=device,
        workers=workers,
        grace=grace,
    )
    with ProgressLine(quiet=as_json) as line:
        result = stage(config, line.verification, line.extraction)
    report = result.report
    if as_json:
        typer.echo(json.dumps(asdict(result) | {"clean": report.clean}, indent=2))
        raise typer.Exit(0 if report.clean else 1)
    if result.restored:
        typer.echo(f"put back from its copy: {', '.join(result.restored)}")
    if result.repaired:
        typer.echo(f"extracted again: {len(result.repaired)} shards {result.repaired[:SHOWN]}")
    if result.moved:
        typer.echo(f"moved to {cache}/quarantine: {len(result.moved)} files")
    for finding in report.findings:
        typer.echo(f"{finding.path}: {finding.what}")
        if finding.samples:
            more = f" and {len(finding.samples) - SHOWN} more" if len(finding.samples) > SHOWN else ""
            typer.echo(f"    samples: {', '.join(finding.samples[:SHOWN])}{more}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    if result.audit:
        audited = result.audit
        typer.echo(
            f"audit: {audited.samples} samples, cosine to the teacher's fresh answer median {audited.median:.5f}, worst "
            f"{audited.worst:.5f}"
        )
    typer.echo(f"not checked: {'; '.join(report.not_checked) or 'nothing'}")
    counts = f"{report.samples} samples in {report.shards} shards, {size(report.bytes_read)} read"
    if report.clean:
        typer.echo(f"{cache}: clean ({counts}). Root {report.root}")
        return
    typer.echo(f"{cache}: {len(report.findings)} things are not as they were committed ({counts}).")
    if not repair:
        typer.echo(
            "`sami-cache verify --repair` moves what is damaged aside, puts back what it has a copy of, and extracts exactly "
            "the damaged shards again."
        )
    raise typer.Exit(1)


def diff(
    a: Annotated[Path, typer.Argument(help="One cache.", **PLACE)],
    b: Annotated[Path, typer.Argument(help="The other.", **PLACE)],
    as_json: AsJson = False,
) -> None:
    """Compare two caches: settings, samples, embeddings. Exits with 0 if they hold the same, else 1."""
    from pipelines.diff import diff_caches

    found = diff_caches(a, b)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"same": found.same}, indent=2))
    elif found.same:
        typer.echo(f"the same: {'equal roots' if found.same_root else f'{found.compared} samples with equal codes'}.")
    else:
        for line in found.settings:
            typer.echo(line)
        for name, keys in (("only in A", found.only_a), ("only in B", found.only_b), ("different", found.changed)):
            if keys:
                typer.echo(f"{name}: {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
        if found.worst is not None:
            typer.echo(f"largest squared difference between embeddings, relative to their variance: {found.worst:.3g}")
    raise typer.Exit(0 if found.same else 1)
