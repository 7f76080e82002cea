"""Images a second of the training step, and what the cache is worth.

    python benchmarks/train.py [--students vit_s] [--online 1024 224] [--data DIR] [--work DIR] [--out FILE]

Three contestants take turns in one process, each for a few whole steps of `Trainer` (forward, backward, clip, AdamW):

- synthetic: SAMI on one batch that lies on the device; what the device can do, whoever feeds it.
- cache: SAMI on the batches of `Loader` from a cache, JPEG and codes decoded on the host, targets made on the device. It is
  made of photographs in --data (EfficientNet-Lite0), or of generated ones: 8192 JPEGs of about 30 KB, 256 channels on 32 x 32.
- MAE: what others do: a masked autoencoder whose decoder attends from every token to every token, pixels as the target, on
  the batch that lies on the device. Same encoder, same width and depth of the decoder, same trainer.

With --online also SAM's ViT-H (random weights, which take as long), which training without a cache runs on every view: its time
is added to the synthetic step's, because both want the same device; its images are taken as if they came for nothing.
Extraction is one pass at 1024 pixels: from that, the epoch after which the cache has paid for itself.

On CUDA the batch of each model is doubled until images/s rises by less than 3 %. FLOPs are those of the model's matrix
products, forward and backward, without recomputation.
"""

import argparse
import io
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from targets import smooth_embeddings
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from sami_cache.batches import Batch, on_device
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.models.students import SAMI, Output, count_kept, create_encoder, sincos_positions
from sami_cache.models.teachers import load_teacher
from sami_cache.processes import keep_freed_memory
from sami_cache.samples import CacheSamples
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import Sample
from sami_cache.store.creation import create_cache
from sami_cache.store.fitting import fit_codec
from sami_cache.store.writing import seal_cache, write_shard
from sami_cache.tasks.sami import CacheTargets, PixelTargets, SAMIConfig, SAMITask
from sami_cache.training import TrainConfig, Trainer

SAMPLES, SHARD, DISTINCT = 8192, 512, 256
# The loader works ahead while others have their turn: what it has ready must be used up before the clock starts.
READY_BATCHES = 6
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bfloat16, dense, as NVIDIA states them
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense", "aten::nonzero")


class MAE(nn.Module):
    """Masked autoencoder as published (arXiv 2111.06377): all tokens, in image order, through a decoder of plain blocks."""

    def __init__(self, encoder: VisionTransformer, *, width: int = 512, depth: int = 8, heads: int = 16) -> None:
        super().__init__()
        self.encoder, self.grid_size = encoder, encoder.patch_embed.grid_size
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3 * 16 * 16)
        self.register_buffer("positions", sincos_positions(width, self.grid_size)[None])

    def forward(self, pixels: Tensor, ids_shuffle: Tensor, mask_ratio: float, reconstruct: float = 1.0) -> Output:
        kept, restore = count_kept(ids_shuffle.shape[1], mask_ratio), ids_shuffle.argsort(dim=1)
        tokens = self.encoder._pos_embed(self.encoder.patch_embed(pixels))
        visible = gather(tokens[:, 1:], ids_shuffle[:, :kept])
        encoded = self.embed(self.encoder.norm(self.encoder.blocks(torch.cat([tokens[:, :1], visible], dim=1))))
        hidden = self.mask_token.to(encoded.dtype).expand(len(pixels), ids_shuffle.shape[1] - kept, -1)
        tokens = gather(torch.cat([encoded[:, 1:], hidden], dim=1), restore) + self.get_buffer("positions")
        decoded = self.blocks(torch.cat([encoded[:, :1], tokens], dim=1))
        ids = torch.arange(restore.shape[1], device=restore.device).expand_as(restore)
        return Output(self.head(self.norm(decoded))[:, 1:], restore >= kept, ids)


def gather(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def generated_jpegs(count: int) -> list[bytes]:
    """Pictures of 256 x 341 pixels that weigh what photographs of this size do, about 30 KB: smooth shapes and some noise."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((341, 256), Image.Resampling.BICUBIC)
        noisy = np.array(small) + rng.normal(0, 7, (256, 341, 1))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def generated_cache(path: Path, samples: int = SAMPLES) -> Cache:
    """A cache of the size that SAM's features have, 256 channels on 32 x 32."""
    embeddings = smooth_embeddings(256)
    codec = fit_codec("pca", embeddings)
    keys = [f"{index:06d}.jpg" for index in range(samples)]
    cache = create_cache(
        path,
        identity={"grid": 32, "view": {"mode": "dense"}, "images": {"short_side": 256, "quality": 90}, "codec": {}},
        codec=codec,
        layout=choose_layout(codec, 32, samples, SHARD),
        keys=keys,
        labels=[None] * samples,
        class_names=None,
        provenance={},
    )
    jpegs = generated_jpegs(min(samples, DISTINCT))
    for shard in range(cache.shards):
        numbers = cache.shard_samples(shard)
        rows = [Sample(key=keys[number], source=f"{number:064x}", width=341, height=256) for number in numbers]
        values = embeddings[np.array(numbers) % len(embeddings)]
        write_shard(cache, shard, values, rows, [jpegs[number % len(jpegs)] for number in numbers])
    seal_cache(cache)
    return cache


def open_or_make_cache(work: Path, data: Path | None, samples: int) -> Cache:
    """Under `work`, made unless it is there; under another name until it is complete."""
    path = work / f"{'generated' if data is None else data.name}-{samples if data is None else 'lite0'}.zarr"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        if data is None:
            generated_cache(unfinished, samples)
        else:
            extract(ExtractConfig(data=data, cache=unfinished, teacher="efficientnet_lite0", grid=32, device="cpu"))
        unfinished.rename(path)
    return Cache(path)


def resized(batch: Batch, size: int) -> Batch:
    """`size` samples, those of `batch` over and over."""
    rows = np.arange(size) % len(batch.keys)
    changed = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            changed[field.name] = value[torch.from_numpy(rows).to(value.device)]
        elif isinstance(value, np.ndarray):
            changed[field.name] = value[rows]
        elif isinstance(value, list):
            changed[field.name] = [value[row] for row in rows]
    return replace(batch, **changed)


class Contestant:
    """A trainer whose steps are driven one at a time."""

    def __init__(self, task: SAMITask, compiled: bool) -> None:
        config = TrainConfig(steps=1_000_000, batch_size=1, lr=1e-5, seed=0, clip_grad=1.0, compile=compiled)
        self.trainer = Trainer(task, config, Path(tempfile.mkdtemp()) / "run", task.device)
        self.model = self.trainer._wrap()
        self.model.train()

    def steps(self, batches: Iterator[Batch], count: int) -> tuple[float, float]:
        """(seconds of `count` steps, seconds of them in which the host waited for data)."""
        device, waited = self.trainer.device, 0.0
        synchronise(device)
        began = time.perf_counter()
        for _ in range(count):
            waited += self.trainer._train_step(self.model, batches, 1e-5)[1]
            self.trainer.step += 1
        synchronise(device)
        return time.perf_counter() - began, waited

    def fill(self, batch: Batch, limit: int) -> int:
        """How many images a step fill the device."""

        def rate_at(size: int) -> float:
            repeated = repeat(resized(batch, size))
            self.steps(repeated, 3)
            return 5 * size / self.steps(repeated, 5)[0]

        return fill(rate_at, 64, limit)[0]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fill(rate_at: Callable[[int], float], start: int, limit: int) -> tuple[int, float]:
    """(size, images/s): `start`, doubled as long as that brings 3 % more, fits, and stays within `limit`."""
    size, best = start, rate_at(start)
    while 2 * size <= limit:
        try:
            rate = rate_at(2 * size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if rate < 1.03 * best:
            break
        size, best = 2 * size, rate
    return size, best


def model_flops(model: nn.Module, tokens: int = 196) -> float:
    """Of one image, forward and backward, as matrix products; elementwise operations are not counted."""
    device = next(model.parameters()).device
    pixels, ids = torch.zeros(2, 3, 224, 224, device=device), torch.arange(tokens, device=device).expand(2, -1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pixels, ids, 0.75)[0].sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Of the device in the precision of the step, and where the number is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, value in PEAK.items():
            if known in name:
                return value, f"{known}'s {value / 1e12:.0f} TFLOP/s in bfloat16"
    dtype, size = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        synchronise(device)
        began = time.perf_counter()
        left @ right
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    value = 2 * size**3 / min(seconds)
    return value, f"{value / 1e12:.3g} TFLOP/s that a product of two {size} x {size} matrices reached here"


def host_waits(contestant: Contestant, batch: Batch) -> dict[str, int]:
    """How often the host waited for a GPU in two steps, by the profiler, which itself synchronises when it stops."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(2):
            with torch.profiler.record_function("step"):
                contestant.trainer._train_step(contestant.model, repeat(batch), 1e-5)
    spans = [event.time_range for event in profile.events() if event.name == "step" and event.device_type.name == "CPU"]
    inside = [
        event.name
        for event in profile.events()
        if event.name in WAITS and any(span.start <= event.time_range.start <= span.end for span in spans)
    ]
    return {name: inside.count(name) for name in sorted(set(inside))}


def race(
    student: str, cache: Cache, device: torch.device, batch: int | None, steps: int, rounds: int, compiled: bool
) -> tuple[list[str], float, float]:
    """Lines of Markdown, and the seconds an image takes with synthetic data and from the cache."""
    samples, limit = CacheSamples(cache), 4096
    limit = min(limit, int(samples.usable.sum()))

    def task_of(model: nn.Module, targets: nn.Module, config: SAMIConfig) -> SAMITask:
        loader = Loader(samples, samples.usable, LoaderConfig(batch_size=batch or 16))
        return SAMITask(model.to(device), targets, loader, None, config, device)  # type: ignore[arg-type]

    torch.manual_seed(0)
    targets = CacheTargets(cache.codec)
    sami = task_of(SAMI(create_encoder(student), target_channels=targets.channels), targets, SAMIConfig())
    mae = task_of(MAE(create_encoder(student)), PixelTargets(), SAMIConfig(tokens="masked"))
    flops = {"SAMI": model_flops(sami.model), "MAE": model_flops(mae.model)}
    with closing(sami.train.batches(0)) as few:  # type: ignore[type-var]
        there = next(few).to(device)
    ours, theirs = Contestant(sami, compiled), Contestant(mae, compiled)
    sizes = {name: batch or one.fill(there, limit) for name, one in (("SAMI", ours), ("MAE", theirs))}
    own = resized(there, sizes["SAMI"])
    loader = Loader(samples, samples.usable, LoaderConfig(batch_size=sizes["SAMI"], pin_memory=device.type == "cuda"))
    served = on_device(loader.batches(0), device)
    turns: dict[str, tuple[Contestant, Iterator[Batch], int, int]] = {
        "synthetic": (ours, repeat(own), sizes["SAMI"], 1),
        "cache": (ours, served, sizes["SAMI"], READY_BATCHES),
        "MAE": (theirs, repeat(resized(there, sizes["MAE"])), sizes["MAE"], 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    waited: dict[str, list[float]] = {name: [] for name in turns}
    memory: dict[str, float] = {}
    for number in range(rounds):
        for name, (contestant, batches, size, ahead) in turns.items():
            contestant.steps(batches, ahead if number else max(3, ahead))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken, wait = contestant.steps(batches, steps)
            seconds[name].append(taken / steps / size)
            waited[name].append(wait / taken)
            memory[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    served.close()  # type: ignore[attr-defined]
    peak, source = peak_flops(device)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [f"## {student}, {sizes['SAMI']} images a step (MAE: {sizes['MAE']})", ""]
    lines += ["| | images/s | GFLOP an image | FLOP utilisation | data_wait | memory |", "|---|---|---|---|---|---|"]
    for name, value in middle.items():
        work = flops["MAE" if name == "MAE" else "SAMI"]
        used = f"{memory[name] / 2**30:.1f} GiB" if memory[name] else ""
        wait = f"{100 * statistics.median(waited[name]):.1f} %"
        lines.append(f"| {name} | {1 / value:.4g} | {work / 1e9:.1f} | {work / value / peak:.1%} | {wait} | {used} |")
    spread = sorted(a / b for a, b in zip(seconds["synthetic"], seconds["cache"], strict=True))
    ratios = f"{statistics.median(spread):.3f} ({spread[0]:.3f} to {spread[-1]:.3f} in {rounds} rounds)"
    faster = statistics.median(a / b for a, b in zip(seconds["MAE"], seconds["synthetic"], strict=True))
    lines += ["", f"cache / synthetic: **{ratios}**. SAMI's step / MAE's, in images/s: {faster:.2f}."]
    lines += [f"Utilisation is of {source}."]
    if device.type == "cuda":
        lines += [f"Waits of the host for the device in two steps, by the profiler: {host_waits(ours, own) or 'none'}."]
    lines += [""]
    return lines, middle["synthetic"], middle["cache"]


def teacher_seconds(image_size: int, device: torch.device) -> tuple[float, int]:
    """(seconds an image, batch) of SAM's ViT-H."""
    teacher = load_teacher("vit_h", weights="random", image_size=image_size).to(device)

    def rate_at(size: int) -> float:
        pixels = torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, device=device)
        on_gpu = device.type == "cuda"
        rounds = 3 if on_gpu else 1
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            if on_gpu or image_size < 1024:
                teacher(teacher.normalise(pixels))
            synchronise(device)
            began = time.perf_counter()
            for _ in range(rounds):
                teacher(teacher.normalise(pixels))
            synchronise(device)
        return size * rounds / (time.perf_counter() - began)

    size, rate = fill(rate_at, 1, 256 if device.type == "cuda" else 1)
    return 1 / rate, size


def online_lines(steps: dict[str, list[float]], teachers: dict[int, tuple[float, int]]) -> list[str]:
    """`steps`: by student, seconds an image with synthetic data and from the cache. `teachers`: by pixels, what ViT-H takes."""
    lines = ["## The teacher online", "", "| ViT-H at | images/s | batch |", "|---|---|---|"]
    lines += [f"| {pixels} | {1 / seconds:.4g} | {size} |" for pixels, (seconds, size) in teachers.items()]
    lines += ["", "| student | teacher online at | images/s | cache / online | the cache has paid for itself after |"]
    lines += ["|---|---|---|---|---|"]
    extraction = teachers.get(1024, (float("nan"), 0))[0]
    for student, (step, cached) in steps.items():
        for pixels, (seconds, _) in teachers.items():
            online = seconds + step
            epochs = paid_after(extraction, cached, online)
            lines.append(f"| {student} | {pixels} | {1 / online:.4g} | **{online / cached:.3g}** | {epochs} |")
    single = ", of one image alone" if all(size == 1 for _, size in teachers.values()) else ""
    lines += ["", "Extraction: one pass at 1024 pixels over every image; online: a pass over every view in every epoch."]
    return [*lines, f"Seconds of a view: ViT-H's{single}, and the synthetic step's, one after the other.", ""]


def paid_after(extraction: float, cached: float, online: float) -> str:
    """The first whole epoch n with extraction + n x cached < n x online, all in seconds an image (nan: not measured)."""
    if np.isnan(extraction):
        return ""
    if online <= cached:
        return "never"
    epochs = int(extraction / (online - cached)) + 1
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["vit_s", "vit_t", "vit_b"])
    parser.add_argument("--online", nargs="*", type=int, default=[], help="pixels of the online teacher's input")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images a step; default on CUDA: what fills the device, on the CPU 16")
    parser.add_argument("--steps", type=int, help="timed, a turn; default 30 on CUDA, 4 on the CPU")
    parser.add_argument("--rounds", type=int, help="default 5 on CUDA, 3 on the CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--data", type=Path, help="photographs to make the cache of; default: generated ones")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="generated ones")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "sami-cache-benchmark", help="of the cache")
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    given = parser.parse_args()
    keep_freed_memory()
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"
    given.work.mkdir(parents=True, exist_ok=True)
    cache = open_or_make_cache(given.work, given.data, given.samples)
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads, {platform.machine()}"
    where = ("out", "work", "data", "device")
    chosen = {name: value for name, value in vars(given).items() if value and name not in where}
    words = [f"--{name} {' '.join(map(str, np.atleast_1d(value)))}".removesuffix(" True") for name, value in chosen.items()]
    page = [
        "# The training step: synthetic data, the cache, the teacher online",
        "",
        f"Command: `python benchmarks/train.py {' '.join(words)}`. Hardware: {name}, {os.cpu_count()} cores; torch "
        f"{torch.__version__}. Date: {time.strftime('%Y%m%d')}.",
        f"Students at 224 pixels in {'bfloat16' if on_gpu else 'float32'}, decoder as published (8 blocks of 512).",
        f"Cache: {cache.samples} {'photographs' if given.data else 'generated pictures'}, {cache.codec.channels} channels.",
        "",
    ]
    steps: dict[str, list[float]] = {}
    batch, count = given.batch or (None if on_gpu else 16), given.steps or (30 if on_gpu else 4)
    rounds = given.rounds or (5 if on_gpu else 3)
    for student in given.students:
        lines, *steps[student] = race(student, cache, device, batch, count, rounds, given.compile)
        print("\n".join(lines), flush=True)
        page += lines
    if given.online:
        lines = online_lines(steps, {pixels: teacher_seconds(pixels, device) for pixels in given.online})
        print("\n".join(lines), flush=True)
        page += lines
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    page.append(f"Largest resident memory of the process: {resident:.1f} GiB.")
    if given.out:
        given.out.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
