"""What it costs a training step to turn codes into targets: dequantise, undo the DCT, cut the view, resample.

    python benchmarks/targets.py [--device cuda] [--batch 256] [--out FILE]

Against the same with a codec without the transform in space (one matrix product less), and against the step the targets are
for: SAMI with a ViT-Ti, S and B, forward and backward. All in turn, in one process; the ratios count. The targets are also
compared with what the codec's own numpy decoder gives, cut and rotated the plain way.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sami_cache.batches import Batch
from sami_cache.data.views import crop_embeddings
from sami_cache.losses import feature_loss
from sami_cache.models.students import SAMI, create_encoder
from sami_cache.store.codecs import Codec
from sami_cache.store.fitting import fit_codec
from sami_cache.tasks.sami import CacheTargets

GRID, TOKENS = 32, 14
STUDENTS = ("vit_t", "vit_s", "vit_b")


def smooth_embeddings(channels: int, samples: int = 64) -> np.ndarray:
    """float32 [samples, channels, 32, 32]: correlated channels, smooth in space."""
    rng = np.random.default_rng(0)
    mixing = (rng.normal(size=(channels, channels)) * 0.97 ** np.arange(channels)).astype(np.float32)
    noise = rng.normal(size=(samples, channels, GRID, GRID)).astype(np.float32)
    noise += np.roll(noise, 1, 2) + np.roll(noise, 1, 3)
    return np.einsum("ij,njyx->niyx", mixing, noise, optimize=True)


def make_batch(codec: Codec, embeddings: np.ndarray, size: int) -> Batch:
    rng = np.random.default_rng(1)
    corners = np.sort(rng.random((size, 2, 2)), 1) * [0.5, 0.5] + [[0, 0], [0.5, 0.5]]
    codes = codec.encode(embeddings)
    return Batch(
        samples=np.arange(size),
        keys=[""] * size,
        pixels=torch.zeros(size, 3, 224, 224, dtype=torch.uint8),
        codes=torch.from_numpy(codes[np.arange(size) % len(codes)]),
        boxes=torch.from_numpy(corners.reshape(size, 4).astype(np.float32)),
        flips=torch.from_numpy(rng.random(size) < 0.5),
        ids_shuffle=torch.from_numpy(np.stack([rng.permutation(TOKENS**2) for _ in range(size)])),
        teacher_pixels=None,
        whole=True,
        encoded=None,
    )


def largest_difference(codec: Codec, targets: CacheTargets, batch: Batch, device: torch.device) -> float:
    """Of the targets on the device from decode -> crop -> rotate on the CPU, relative to the largest target."""
    assert batch.codes is not None
    count = min(16, len(batch.keys))
    few = replace(batch, codes=batch.codes[:count], boxes=batch.boxes[:count], flips=batch.flips[:count])
    assert few.codes is not None
    maps = torch.from_numpy(codec.decode(few.codes.numpy()) - codec.mean[:, None, None])
    plain = crop_embeddings(maps, few.boxes, few.flips, TOKENS).flatten(2).transpose(1, 2) @ torch.from_numpy(codec.basis).T
    found = targets(few, torch.zeros(1, device=device), TOKENS).cpu() * targets.scale
    return float((found - plain).abs().max() / plain.abs().max())


def seconds_of(acts: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, the first round left out."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds + 1):
        for name, act in acts.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            act()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def run(device: torch.device, size: int, channels: int, rounds: int, students: tuple[str, ...] = STUDENTS) -> list[str]:
    """Lines of a Markdown table."""
    embeddings = smooth_embeddings(channels)
    acts: dict[str, Callable[[], object]] = {}
    kept, difference = {}, 0.0
    anywhere = torch.zeros(1, device=device)
    for name, block in (("targets", 8), ("targets without DCT", 1)):
        codec = fit_codec("pca", embeddings, block=block)
        batch = make_batch(codec, embeddings, size)
        targets = CacheTargets(codec).to(device)
        difference = max(difference, largest_difference(codec, targets, batch, device))
        there = batch.to(device)
        acts[name] = lambda targets=targets, there=there: targets(there, anywhere, TOKENS)
        kept[name] = (targets, there)
    targets, there = kept["targets"]
    pixels = torch.randn(size, 3, 224, 224, device=device)
    goal = targets(there, anywhere, TOKENS)
    for student in students:
        model = SAMI(create_encoder(student), target_channels=targets.channels).to(device)

        def step(model: SAMI = model) -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                prediction, mask, _ = model(pixels, there.ids_shuffle, 0.75)
            feature_loss(prediction.float(), goal, mask, kind="mse", tokens="all")["loss"].backward()

        acts[student] = step
    seconds = seconds_of(acts, device, rounds)
    lines = ["| | ms a sample | targets' share of step and targets |", "|---|---|---|"]
    for name, value in seconds.items():
        share = f"{seconds['targets'] / (seconds['targets'] + value):.2%}" if name in students else ""
        lines.append(f"| {name}{' step' if name in students else ''} | {1000 * value / size:.4f} | {share} |")
    ratio = seconds["targets"] / seconds["targets without DCT"]
    lines += ["", f"The transform in space makes targets {ratio:.2f} times as dear."]
    lines.append(f"Largest difference from decoding in numpy, cutting and rotating: {difference:.1e} of the largest target.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="samples; default 256 on CUDA, 16 on the CPU")
    parser.add_argument("--channels", type=int, default=256, help="of the teacher; SAM's neck has 256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    size = arguments.batch or (256 if device.type == "cuda" else 16)
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads, {platform.machine()}"
    command = f"python benchmarks/targets.py --device {device.type} --batch {size} --channels {arguments.channels}"
    head = [
        "# Targets from codes, on the training device",
        "",
        f"Command: `{command}`. Hardware: {hardware}; torch {torch.__version__}. Date: {time.strftime('%Y%m%d')}.",
        f"{arguments.channels} channels, {GRID} x {GRID}, cut to {TOKENS} x {TOKENS}; students in "
        f"{'bfloat16' if on_gpu else 'float32'}, decoder as published.",
        "",
    ]
    text = "\n".join([*head, *run(device, size, arguments.channels, arguments.rounds)]) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
