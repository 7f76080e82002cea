"""What the decoder's options cost and what they do to a student: keys and values, depth, width, partial reconstruction.

    python benchmarks/decoder_options.py learn --work WORK [--seeds 3] [--steps 240] [--processes 2]
    python benchmarks/decoder_options.py speed --work WORK [--device cpu] [--batch 16] [--rounds 5]
    python benchmarks/decoder_options.py page --work WORK [--out FILE]

One factor at a time, against the published decoder (keys and values visible + mask, 8 blocks, all masked tokens).

- speed: the step of a ViT-Ti, S (and, on CUDA, B) of 224 pixels to 256 channels: forward, loss, backward, clip, AdamW. All arms
  in turn, in one process; the ratios count.
- learn: the miniature of `students.py` (which prepares WORK/cifar/16): ViT of width 96 and depth 4 on 64 x 64 pixels, targets
  of EfficientNet-Lite0. The decoder is 3/16 as wide as published and its heads are 24 wide instead of 32; depth and shares
  are the real ones. Within a seed all arms share the encoder's initialisation, the order of samples, the views and the masks.

Held-out loss and cosine are over all tokens of uncompressed features, so a share below 1 is judged with more masked tokens in
the decoder than it was trained with: "masked loss" is therefore also given for as many as in training, a random sample of
them. k-NN and linear probe see the encoder alone.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from students import (
    CPU,
    FeatureSamples,
    FeatureTargets,
    labelled_images,
    loader_of,
    new_student,
    probe_encoder,
    scaling,
    start_worker,
    train_config,
)
from torch import nn

from sami_cache.loader import Loader
from sami_cache.losses import feature_loss
from sami_cache.models.students import SAMI, create_encoder
from sami_cache.optimizer import NamedAdamW
from sami_cache.tasks.sami import SAMIConfig, SAMITask
from sami_cache.training import Trainer

# Every option that an arm changes; widths as published, the miniature's are divided by `NARROWER`.
REFERENCE: dict[str, Any] = {"keys_values": "visible+mask", "decoder_depth": 8, "decoder_width": 512, "reconstruct": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "as published": {},
    "keys and values: visible only": {"keys_values": "visible"},
    "4 blocks": {"decoder_depth": 4},
    "2 blocks": {"decoder_depth": 2},
    "1 block": {"decoder_depth": 1},
    "width 256": {"decoder_width": 256},
    "reconstruct 0.5": {"reconstruct": 0.5},
    "reconstruct 0.25": {"reconstruct": 0.25},
    "visible only, reconstruct 0.25": {"keys_values": "visible", "reconstruct": 0.25},
}
NARROWER = 16 / 3  # 512 becomes 96


def options_of(arm: str, narrower: float = 1.0) -> tuple[dict[str, Any], float]:
    """What `SAMI` takes, and the share that is reconstructed."""
    options = REFERENCE | ARMS[arm]
    reconstruct = options.pop("reconstruct")
    width = round(options["decoder_width"] / narrower)
    return options | {"decoder_width": width, "decoder_heads": width // (32 if narrower == 1 else 24)}, reconstruct


def learn(work: Path, steps: int, arm: str, seed: int) -> dict[str, float]:
    """One run on one thread."""
    folder = work / "cifar" / "16"
    samples, targets = FeatureSamples(folder), FeatureTargets(*scaling(folder))
    chosen, held = samples.split()
    options, reconstruct = options_of(arm, NARROWER)
    model = new_student(targets.channels, seed, **options)
    task = SAMITask(model, targets, loader_of(samples, chosen, 64, seed), None, SAMIConfig(reconstruct=reconstruct), CPU)
    with tempfile.TemporaryDirectory() as run:
        trained = Trainer(task, train_config(steps, seed), Path(run) / "run", CPU).fit()
    model.eval()
    with torch.no_grad():
        task.held_out = loader_of(samples, held, 1)
        found = task.evaluate(model) | probe_encoder(model, labelled_images(work))
        found |= {f"masked_{share:g}": masked_loss(task, task.held_out, share) for share in sorted({1.0, reconstruct})}
    return found | {"seconds": trained["seconds"]}


def masked_loss(task: SAMITask, held_out: Loader, reconstruct: float) -> float:
    """Mean squared error over the masked tokens when this share of them is decoded."""
    total, count = 0.0, 0
    for batch in held_out.evaluation(64):
        prediction, target, mask = task.predict(task.model, batch, reconstruct)
        total += float(((prediction - target).square().mean(-1) * mask).sum())
        count += int(mask.sum())
    return total / count


def run_job(work: Path, steps: int, job: tuple[int, str]) -> tuple[str, dict[str, float]]:
    seed, arm = job
    return f"{arm}/{seed}", learn(work, steps, arm, seed)


def learn_all(work: Path, seeds: int, steps: int, processes: int) -> None:
    """The runs that the results lack, seed by seed, so that what is there when time runs out can be compared."""
    kept = read_results(work)["learn"]
    left = [(seed, arm) for seed in range(seeds) for arm in ARMS if f"{arm}/{seed}" not in kept]
    with multiprocessing.get_context("spawn").Pool(processes, start_worker) as pool:
        for name, found in pool.imap_unordered(partial(run_job, work, steps), left):
            keep(work, "learn", {name: found | {"steps": steps}})
            print(f"{name}: {found['heldout_loss']:.4f}, k-NN {found['knn']:.4f}, {found['seconds']:.0f} s", flush=True)


class Step:
    """Forward, loss, backward, clip, AdamW of one arm, on a batch that lies on the device."""

    def __init__(self, student: str, arm: str, batch: int, device: torch.device) -> None:
        options, self.reconstruct = options_of(arm)
        torch.manual_seed(0)
        self.model = SAMI(create_encoder(student), target_channels=256, **options).to(device)
        self.optimizer = NamedAdamW(self.model, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
        self.pixels = torch.randn(batch, 3, 224, 224, device=device)
        self.ids = torch.rand(batch, 196, device=device).argsort(dim=1)
        self.target = torch.randn(batch, 196, 256, device=device)

    def __call__(self) -> None:
        device = self.pixels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            prediction, mask, ids = self.model(self.pixels, self.ids, 0.75, self.reconstruct)
            target = self.target.gather(1, ids[..., None].expand(-1, -1, 256))
            loss = feature_loss(prediction, target, mask)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds_of(acts: dict[str, Step], device: torch.device, rounds: int) -> dict[str, float]:
    """Median of each, in turn, the first round left out: on CUDA of the clock, on the CPU of its own time over all threads,
    which other work on the machine does not stretch as far.
    """
    taken: dict[str, list[float]] = {name: [] for name in acts}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(rounds + 1):
        for name, act in acts.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            act()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def measure_speed(work: Path, device: torch.device, batch: int, rounds: int) -> None:
    for student in ("vit_t", "vit_s", *(("vit_b",) if device.type == "cuda" else ())):
        seconds = seconds_of({arm: Step(student, arm, batch, device) for arm in ARMS}, device, rounds)
        keep(work, "speed", {student: {arm: value / batch for arm, value in seconds.items()}})
        print(student, {arm: f"{1000 * value / batch:.1f} ms" for arm, value in seconds.items()}, flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    keep(work, "speed", {"how": {"batch": batch, "rounds": rounds, "device": device.type, "name": name}})


def read_results(work: Path) -> dict[str, dict[str, Any]]:
    path = work / "decoder-options.json"
    return json.loads(path.read_text()) if path.exists() else {"learn": {}, "speed": {}}


def keep(work: Path, part: str, found: dict[str, Any]) -> None:
    results, path = read_results(work), work / "decoder-options.json"
    results[part] |= found
    path.with_suffix(".new").write_text(json.dumps(results, indent=1))
    os.replace(path.with_suffix(".new"), path)


def mean_and_spread(values: list[float], scale: float = 1.0, digits: int = 4, sign: str = "") -> str:
    """Mean, and behind ± its standard error where there are several values."""
    values = [scale * value for value in values]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{statistics.mean(values):{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def page(work: Path) -> list[str]:
    results = read_results(work)
    learnt, speed = results["learn"], results["speed"]
    how = speed.pop("how", {})
    hardware = f"{how.get('name', '')}, {platform.machine()}; Python {platform.python_version()}, torch {torch.__version__}"
    seconds = sum(run["seconds"] for run in learnt.values())
    steps = sorted({run["steps"] for run in learnt.values()})
    lines = ["# The decoder's options: what they cost, what they do to the student", ""]
    batch, rounds = how.get("batch"), how.get("rounds")
    lines += [f"    python benchmarks/decoder_options.py speed --work WORK --batch {batch} --rounds {rounds}"]
    lines += [f"    python benchmarks/decoder_options.py learn --work WORK --steps {' '.join(map(str, steps))}", ""]
    lines += [f"Hardware: {hardware}. Date: {time.strftime('%Y%m%d')}."]
    lines += [f"Learning: {len(learnt)} runs of 64 images a step, {seconds / 3600:.2f} thread hours.", ""]
    lines += [
        "## Speed",
        "",
        "Time of a step over that of the published decoder; in brackets seconds an image (CPU: over all threads).",
        "",
    ]
    lines += [f"| | {' | '.join(speed)} |", "|---" * (1 + len(speed)) + "|"]
    for arm in ARMS:
        cells = [f"{values[arm] / values['as published']:.2f} ({values[arm]:.3g})" for values in speed.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "## Learning", "", "Losses over that of predicting the mean. ± is the standard error over seeds; paired by"]
    lines += ["seed where the published decoder's value is subtracted.", ""]
    names = ("seeds", "held-out loss", "less published", "cosine", "masked loss", "as many as in training")
    names += ("k-NN %", "less published", "linear %", "less published")
    lines += [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for arm in ARMS:
        runs = {name.rsplit("/", 1)[1]: run for name, run in learnt.items() if name.rsplit("/", 1)[0] == arm}
        base = {seed: learnt[f"as published/{seed}"] for seed in runs if f"as published/{seed}" in learnt}
        if runs:
            lines.append(f"| {arm} | {' | '.join(learning_cells(arm, runs, base))} |")
    return lines


def learning_cells(arm: str, runs: dict[str, dict[str, float]], base: dict[str, dict[str, float]]) -> list[str]:
    def of_mean(run: dict[str, float], name: str) -> float:
        return run[name] / run["heldout_loss_of_mean"]

    def paired(value: Callable[[dict[str, float]], float], scale: float, digits: int) -> str:
        if arm == "as published":
            return ""
        return mean_and_spread([value(runs[seed]) - value(base[seed]) for seed in base], scale, digits, "+")

    share = REFERENCE | ARMS[arm]
    return [
        str(len(runs)),
        mean_and_spread([of_mean(run, "heldout_loss") for run in runs.values()]),
        paired(lambda run: of_mean(run, "heldout_loss"), 1, 4),
        mean_and_spread([run["heldout_cosine"] for run in runs.values()], 1, 3),
        mean_and_spread([of_mean(run, "masked_1") for run in runs.values()]),
        mean_and_spread([of_mean(run, f"masked_{share['reconstruct']:g}") for run in runs.values()]),
        mean_and_spread([run["knn"] for run in runs.values()], 100, 1),
        paired(lambda run: run["knn"], 100, 1),
        mean_and_spread([run["linear"] for run in runs.values()], 100, 1),
        paired(lambda run: run["linear"], 100, 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("learn", "speed", "page"))
    parser.add_argument(
        "--work", type=Path, required=True, help="where students.py left its features; decoder-options.json goes here"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240, help="of every run, 64 images each")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images a step; default 256 on CUDA, 16 on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    given = parser.parse_args()
    if given.part == "learn":
        learn_all(given.work, given.seeds, given.steps, given.processes)
    elif given.part == "speed":
        device = torch.device(given.device)
        measure_speed(given.work, device, given.batch or (256 if device.type == "cuda" else 16), given.rounds)
    else:
        text = "\n".join(page(given.work))
        print(text)
        if given.out:
            given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
