"""Images a second of SAM's image encoders and how much of the device's arithmetic that is; then of the whole extraction.

    python benchmarks/extract.py [--teachers vit_h vit_l vit_b] [--sizes 1024 224] [--data DIR] [--out FILE]

Encoders: in turns, in one process, all with the same random weights in the official layout and positions that are not zero:
timm as it comes, segment-anything, segment-anything-fast where it is installed, and ours in every way of attending, compiled or
not. On CUDA each gets the batch that its images/s stop growing at (compiled ones that of the same way uncompiled). Ours start
from bytes and normalise and pad them, the others from pixels that are normalised already. Errors are of the maps, against
timm's plain model in float32 on the same device, in its standard deviations. FLOPs are those of the plain model, by
`torch.utils.flop_counter`, whatever a contestant computes instead.

Attention: that of one global block alone, in each kernel that torch has for it.

Extraction: `extract` as a user runs it, over JPEGs, from its first shard to its last, against the same encoder fed with a batch
that lies on the device, and against everything but the encoder (decoding, packing, compressing, writing).
"""

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count as count_up
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from extract_contestants import Contestant, NotHereError, Run, contestants, drawn_teacher, exact, model_flops
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.encoding import Encoder, Packed, Pending
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig, Job, Progress, prepare_job
from pipelines.tuning import MEMORY_SHARE, MOST, choose_batch, compile_mode, images_per_second
from sami_cache.models.fast_attention import ATTENTIONS, use_attention
from sami_cache.store.cache import Cache

PEAK = {"H200": 780.0}
"""TFLOP/s of dense bfloat16 products that were measured on such a card; NVIDIA states 989."""
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Of a call, the mean over at least `least` seconds after one call that is not counted."""
    run()
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    count = max(1, int(least / (time.perf_counter() - began)))
    began = time.perf_counter()
    for _ in range(count):
        run()
    synchronise(device)
    return (time.perf_counter() - began) / count


def peak_tflops(device: torch.device, given: float | None) -> tuple[float, str]:
    """Of the device, and where the number is from."""
    if given:
        return given, f"{given:g} TFLOP/s, as given"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, value in PEAK.items():
        if known in name:
            return value, f"{value:g} TFLOP/s, measured on an {known}"
    dtype, size = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    value = 2e-12 * size**3 / min(seconds_of(lambda: left @ right, device, 0.2) for _ in range(5))
    return value, f"{value:.3g} TFLOP/s that products of {size} x {size} matrices reached here"


def pictures(count: int, size: int, device: torch.device) -> Tensor:
    """uint8 [count, size, size, 3], smooth with some noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 12, 12, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().to(device)


class Racer:
    """A contestant that could be built, its batch, and what was measured."""

    def __init__(self, contestant: Contestant, bind: Callable[[Tensor], Run]) -> None:
        self.name, self.bind = contestant.name, bind
        self.batch, self.run, self.error = 1, None, (float("nan"), float("nan"))
        self.seconds: list[float] = []
        self.memory = 0.0

    def take(self, some: Tensor) -> None:
        """The batch to race with."""
        self.batch, self.run = len(some), self.bind(some)

    def turn(self, device: torch.device, least: float) -> None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        assert self.run
        self.seconds.append(seconds_of(self.run, device, least) / self.batch)
        self.memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def find_batch(bind: Callable[[Tensor], Run], some: Tensor, device: torch.device) -> int:
    """For a contestant on a GPU: `pipelines/tuning.py`."""

    def measure(size: int) -> tuple[float, float]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        rate = size / seconds_of(bind(some[:size]), device, 0.3)
        return rate, torch.cuda.max_memory_allocated(device) - before

    room = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    return choose_batch(measure, room=room, limit=len(some))


@torch.inference_mode()
def race(name: str, size: int, device: torch.device, given: argparse.Namespace) -> list[str]:
    """Lines of Markdown about one encoder at one size."""
    on_gpu = device.type == "cuda"
    flops = model_flops(name, size)
    some = pictures(given.batch or (min(MOST, 64 * 1024 // size) if on_gpu else 2), size, device)
    few, expected = some[:2], exact(name, size, device, some[:2])
    racers: dict[str, Racer] = {}
    absent: dict[str, str] = {}
    for contestant in contestants(name, size, device, given.precision, given.ways, given.modes):
        began = time.perf_counter()
        try:
            racer = Racer(contestant, contestant.make())
            batch = len(few) if given.batch is None and not on_gpu else given.batch
            if batch is None and contestant.batch_of in racers:
                batch = racers[contestant.batch_of].batch
            racer.take(some[: batch or find_batch(racer.bind, some, device)])
            off = racer.run()[:2].float() - expected if racer.batch > 1 else racer.bind(few)().float() - expected
            racer.error = tuple((value / expected.std()).item() for value in (off.square().mean().sqrt(), off.abs().max()))
            racers[contestant.name] = racer
        except NotHereError as error:
            absent[contestant.name] = str(error)
        except Exception as error:  # what fails on this device is said in the table, and the others go on
            absent[contestant.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        print(f"{name} {size} {contestant.name}: made in {time.perf_counter() - began:.0f} s", flush=True)
    for _ in range(given.rounds):
        for racer in racers.values():
            racer.turn(device, given.seconds)
    return [f"{flops / 2e12:.4g} TMAC an image.", "", *table(racers, absent, flops, given.peak), ""]


def table(racers: dict[str, Racer], absent: dict[str, str], flops: float, peak: float) -> list[str]:
    lines = ["| | batch | images/s (least to most) | TFLOP/s | utilisation | memory | error, rms | error, largest |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for racer in racers.values():
        rates = sorted(1 / value for value in racer.seconds)
        rate = statistics.median(rates)
        speed = rate * flops / 1e12
        used = f"{racer.memory:.1f} GiB" if racer.memory else ""
        errors = " | ".join(f"{value:.1e}" for value in racer.error)
        cells = f"{rate:.4g} ({rates[0]:.4g} to {rates[-1]:.4g}) | {speed:.3g} | {speed / peak:.1%} | {used} | {errors}"
        lines.append(f"| {racer.name} | {racer.batch} | {cells} |")
    return lines + [f"| {name} | | not run: {why} | | | | | |" for name, why in absent.items()]


@torch.inference_mode()
def attention_lines(name: str, size: int, device: torch.device, given: argparse.Namespace) -> list[str]:
    """A global block's attention without its projections, by way and kernel."""
    dtype = torch.bfloat16 if given.precision == "bfloat16" else torch.float32
    cells = size // 16
    encoder = drawn_teacher(name, size).to(device).encoder
    use_attention(encoder, "timm")
    attention = next(block.attn for block in encoder.blocks if not block.window_size).to(dtype)  # type: ignore[union-attr]
    heads, width, count = attention.num_heads, attention.head_dim, 4 if device.type == "cuda" else 1
    q, k, v = torch.randn(3, count, heads, cells * cells, width, device=device, dtype=dtype)
    work = count * heads * cells**4 * width * 4
    lines = ["| a global block's attention | kernel | ms an image | TFLOP/s of the two products |", "|---|---|---|---|"]

    def timm_way() -> Tensor:
        from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

        shape, flat = (cells, cells), q.flatten(0, 1)
        bias = get_decomposed_rel_pos_bias(flat, attention.rel_pos_h, attention.rel_pos_w, shape, shape)
        return torch.nn.functional.scaled_dot_product_attention(flat, k.flatten(0, 1), v.flatten(0, 1), attn_mask=bias)

    for way, kind in ATTENTIONS.items():
        if way not in given.ways:
            continue
        attention.__class__ = kind
        run = timm_way if way == "timm" else partial(attention.attend, q, k, v, cells, cells)
        for backend in BACKENDS if way != "flex" else (None,):
            label = backend.name.lower() if backend else "its own"
            try:
                with sdpa_kernel(backend or list(BACKENDS)):
                    seconds = seconds_of(run, device, given.seconds / 4)
                lines.append(f"| {way} | {label} | {1e3 * seconds / count:.3g} | {work / seconds / 1e12:.3g} |")
            except Exception as error:  # not every kernel takes every shape and mask
                lines.append(f"| {way} | {label} | not there ({type(error).__name__}) | |")
    return [*lines, ""]


def generated_photographs(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 pixels and about 100 KB, as ImageNet's are; 64 different ones."""
    folder.mkdir(parents=True)
    rng, different = np.random.default_rng(0), []
    for _ in range(min(64, count)):
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        Image.fromarray((small + rng.normal(0, 9, (375, 500, 1))).clip(0, 255).astype(np.uint8)).save(
            buffer, "JPEG", quality=92
        )
        different.append(buffer.getvalue())
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(different[number % len(different)])


def pipeline_lines(name: str, size: int, device: torch.device, given: argparse.Namespace) -> list[str]:
    """The whole extraction against its encoder alone and against everything else alone, images/s."""
    lines = [
        "| `extract`: attention, compiled, batch | images/s | of the encoder alone | encoder alone | all but the encoder |"
    ]
    lines += ["|---|---|---|---|---|"]
    best = [mode for mode in given.modes if mode]
    for compiled in [False, True] if best and given.compile_pipeline else [False]:
        with tempfile.TemporaryDirectory(prefix="sami-cache-extract-") as work:
            data = given.data
            if data is None:
                data = Path(work) / "photographs"
                generated_photographs(data, given.samples)
            grid = min(32, size // 16)
            config = ExtractConfig(
                data=data,
                cache=Path(work) / "cache.zarr",
                teacher=name,
                weights="random",
                image_size=size,
                grid=grid,
                precision=given.precision,
                device=str(device),
                batch_size=given.batch,
                compile=compiled,
                fit_images=64,
            )
            whole = rate_of(config)
            provenance = Cache(config.cache).attributes["provenance"]
            job = prepare_job(config)
            alone = images_per_second(job.embedder.encoder, job.embedder.batch_size, least_seconds=given.seconds)
            others = rate_of_others(config, job, Path(work) / "others.zarr")
        how = f"{provenance['attention']}, {provenance['compiled'] or 'no'}, {provenance['batch_size']}"
        lines.append(f"| {how} | {whole:.4g} | **{whole / alone:.0%}** | {alone:.4g} | {others:.4g} |")
    return [*lines, ""]


def rate_of(config: ExtractConfig) -> float:
    """Images a second of an extraction, from the start of its first shard to the commit of its last."""
    seen: list[Progress] = []
    extract(config, lambda progress: seen.append(progress) if progress.stage == "extract" else None)
    return seen[-1].per_second


def rate_of_others(config: ExtractConfig, job: Job, cache: Path) -> float:
    """The same, but the teacher says at once what it said of some batches before."""
    size, count = job.embedder.batch_size, min(64, len(job.embedder))
    before = [
        part.embeddings for part in job.embedder.embed([range(at, min(at + size, count)) for at in range(0, count, size)])
    ]
    said, turn = np.concatenate(before), count_up()

    def launch(self: Encoder, batch: Packed) -> Pending:
        places = [next(turn) % len(said) for _ in batch.pixels]
        return Pending(values=torch.from_numpy(said[places]), event=None)

    settings = {"batch_size": size, "attention": job.attention, "compile": False}
    with mock.patch.object(Encoder, "launch", launch):
        return rate_of(replace(config, cache=cache, **settings))


def shown(lines: list[str]) -> list[str]:
    print("\n".join(lines), flush=True)
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--teachers", nargs="+", default=["vit_h", "vit_l", "vit_b"] if on_gpu else ["vit_b"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 224] if on_gpu else [224])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--ways", nargs="+", default=list(ATTENTIONS), help="of ours to attend")
    parser.add_argument(
        "--modes", nargs="+", help="of torch.compile for ours; none: not compiled. Default: none, and the chosen"
    )
    parser.add_argument("--batch", type=int, help="default on CUDA: measured; on the CPU 2")
    parser.add_argument("--rounds", type=int, help="default 3 on CUDA, 1 on the CPU")
    parser.add_argument("--seconds", type=float, help="of a turn; default 2 on CUDA, 1 on the CPU")
    parser.add_argument("--peak-tflops", type=float, help="what utilisation is of; default: measured")
    parser.add_argument("--parts", nargs="+", default=["encoders", "attention", "pipeline"])
    parser.add_argument("--data", type=Path, help="photographs to extract; default: generated ones")
    parser.add_argument("--samples", type=int, default=2048 if on_gpu else 32, help="generated ones")
    parser.add_argument("--compile-pipeline", action="store_true", help="the whole extraction with --compile too")
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"
    words = [
        f"--{key.replace('_', '-')} {' '.join(map(str, np.atleast_1d(value)))}".removesuffix(" True")
        for key, value in vars(given).items()
        if value != parser.get_default(key) and key not in ("out", "data", "device")
    ]
    given.precision = given.precision or ("bfloat16" if on_gpu else "float32")
    given.rounds, given.seconds = given.rounds or (3 if on_gpu else 1), given.seconds or (2.0 if on_gpu else 1.0)
    given.peak, source = peak_tflops(device, given.peak_tflops)
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads, {platform.machine()}"
    page = [
        "# Extraction: SAM's image encoders, and what feeds them",
        "",
        f"Command: `{' '.join(['python benchmarks/extract.py', *words])}`. Hardware: {hardware}, {os.cpu_count()} cores; torch "
        f"{torch.__version__}. Date: {time.strftime('%Y%m%d')}.",
        f"{given.precision}, {given.rounds} rounds of {given.seconds:g} s. Utilisation is of {source}.",
        "",
    ]
    print("\n".join(page), flush=True)
    chosen = given.modes
    for name in given.teachers:
        for size in given.sizes:
            names = chosen or ["none", compile_mode(device, size)]
            given.modes = [None if mode == "none" else mode for mode in names]
            page += shown([f"## {name} at {size} pixels", ""])
            for part, measure in (("encoders", race), ("attention", attention_lines), ("pipeline", pipeline_lines)):
                if part in given.parts:
                    page += shown(measure(name, size, device, given))
    if given.out:
        given.out.write_text("\n".join(page).rstrip() + "\n")


if __name__ == "__main__":
    main()
