"""What pretraining is worth to a promptable model that is fine-tuned on few pictures: a pretrained student against scratch.

    python benchmarks/promptable.py train --annotations FILE --images DIR --student RUN --work DIR [--seeds 3] [--steps 4000]
    python benchmarks/promptable.py report --work DIR [--plot FILE]

The first 80 of the annotated pictures, by number, are trained on, the others held out. RUN is one of `sami-cache train`, or
what `sami-cache export` wrote.

At 224 px a mask's cell is 4 px of the input, 11 of a photo 640 wide: the true masks themselves, drawn in such cells, have 14 %
IoU with COCO's small objects (below 32 x 32 pixels; their boxes 54 %). So objects below --min-area are neither learnt nor in
the curves; the table has a column for all objects beside, and a row for the true masks drawn in such cells.

A decoder from scratch answers "nothing" for hundreds of steps before it knows what a prompt is. So that 80 pictures are not
spent on that, each arm first learns prompts from drawn shapes with its own encoder; there is no photograph among them. (A
decoder that had learnt them with another encoder began 15 points below the box and was still there after 1,100 steps.)

Both arms run `sami-cache finetune promptable` with the same settings; within a seed they share the decoder's initialisation,
the order of pictures and the first prompts, and differ in the encoder's start alone. The baseline needs no model: the box
itself as the mask. A run that is finished is not made again, one that was stopped goes on.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from pipelines.evaluate import EvaluationConfig, evaluate
from pipelines.finetune_promptable import PromptableTrainingConfig, finetune_promptable
from sami_cache.data.annotations import Annotations, open_annotations
from sami_cache.inference.protocols import PROTOCOLS
from sami_cache.mask_losses import mask_iou
from sami_cache.prompts import PromptConfig

TRAINED_ON = 80
ARMS = {"taught": "pretrained student", "scratch": "the same student from scratch"}
CURVES = {"heldout_box_miou": "box", "heldout_click_miou": "1 click"}
EVALUATED_ON = {"heldout": "", "all": " (all)"}
"""Parts of `split`, and what their columns' names end in."""
EVALUATED = {"single": ("box", "1", "3"), "efficientsam": ("box",)}


def split(annotations: Path, work: Path, min_area: int) -> dict[str, Path]:
    """COCO-format JSON of the pictures to train on, of those held out, and of the latter with `all` their objects."""
    data = json.loads(annotations.read_text())
    images = sorted(data["images"], key=lambda image: image["id"])
    parts = {}
    for name, some in {"train": images[:TRAINED_ON], "heldout": images[TRAINED_ON:], "all": images[TRAINED_ON:]}.items():
        chosen = {image["id"] for image in some}
        least = 0 if name == "all" else min_area
        kept = [one for one in data["annotations"] if one["image_id"] in chosen and one["area"] >= least]
        parts[name] = work / f"{name}.json"
        parts[name].write_text(json.dumps({**data, "images": some, "annotations": kept}))
        print(f"{name}: {len(some)} pictures, {len(kept)} objects", flush=True)
    return parts


def train(given: argparse.Namespace) -> None:
    """Train and evaluate every arm and seed; a file in WORK for each, so that several may run at once (`--arms`)."""
    given.work.mkdir(parents=True, exist_ok=True)
    parts = split(given.annotations, given.work, given.min_area)
    drawn = draw_shapes(given.work / "drawn", given.image_size)
    recipe = {
        "image_size": given.image_size,
        "batch_size": given.batch_size,
        "lr": given.lr,
        "clip_grad": 1.0,
        "precision": given.precision,
        "error_points": given.error_points,
        "mask_rounds": given.mask_rounds,
    }
    prompts = PromptConfig(max_objects=given.max_objects, flip=True, crop=given.crop, box_share=given.box_share)

    def measure(model: Path | None, out: str) -> dict[str, float]:
        found = {}
        for part, suffix in EVALUATED_ON.items():
            for protocol, asked in EVALUATED.items():
                config = EvaluationConfig(
                    model=model,
                    data=parts[part],
                    images=given.images,
                    protocol=PROTOCOLS[protocol],
                    prompts=asked if model else ("box",),
                    out=given.work / f"{out}-{part}-{protocol}.json",
                    overwrite=True,
                )
                for row in evaluate(config)["miou"]:
                    found[f"{protocol}/{row['prompt']}{suffix}"] = row["miou"]
        return found

    _write(given.work / "box.json", measure(None, "box-itself"))
    ceiling = {
        f"single/box{suffix}": drawn_coarsely(open_annotations(parts[part], given.images), given.image_size)
        for part, suffix in EVALUATED_ON.items()
    }
    _write(given.work / "ceiling.json", ceiling)
    for seed in range(given.seeds):
        for arm in given.arms:
            run, result = given.work / f"{arm}-{seed}", given.work / f"{arm}-{seed}.json"
            if result.exists():
                continue
            shapes = given.work / f"{arm}-{seed}-shapes"
            learn(
                shapes,
                given.shape_steps,
                data=drawn,
                images=drawn.parent,
                init=given.student if arm == "taught" else None,
                student=given.encoder,
                prompts=PromptConfig(max_objects=given.max_objects, flip=True),
                seed=seed,
                **recipe | {"lr": given.shape_lr, "batch_size": given.shape_batch},
            )
            last = learn(
                run,
                given.steps,
                data=parts["train"],
                images=given.images,
                val=parts["heldout"],
                init=shapes,
                prompts=prompts,
                seed=seed,
                **recipe,
            )
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            curve = [line for line in lines if "heldout_box_miou" in line]
            found = {"recipe": recipe | asdict(prompts), "final": measure(run, run.name), "curve": curve}
            found["recipe"] |= {name: getattr(given, name) for name in ("steps", "shape_steps", "shape_lr", "shape_batch")}
            _write(result, found | {"seconds": last["seconds"]})
    report(given)


def learn(run: Path, steps: int, **settings: Any) -> dict[str, Any]:
    """Train for `steps` or go on; the last line of its log."""
    config = PromptableTrainingConfig(
        run=run,
        steps=steps,
        warmup_steps=steps // 12,
        micro_batch=settings["batch_size"],
        log_every=20,
        checkpoint_every=steps // 16,
        evaluate_every=steps // 16 if "val" in settings else None,
        resume=(run / "config.json").exists(),
        **settings,
    )
    return finetune_promptable(config, lambda line: print(run.name, _short(line), flush=True))


def drawn_coarsely(annotations: Annotations, image_size: int) -> float:
    """mIoU of the true masks with themselves, averaged over the cells of a mask at `image_size` and enlarged again."""
    ious = []
    for number in range(len(annotations)):
        for found in annotations.objects(number):
            mask = torch.from_numpy(found.mask())[None, None]
            if found.crowd or not mask.any():
                continue
            size = mask.shape[-2:]
            scale = image_size / max(size) / 4
            cells = F.interpolate(mask.float(), [round(side * scale) for side in size], mode="area")
            again = F.interpolate(cells, size, mode="bilinear", align_corners=False) > 0.5
            ious.append(mask_iou(mask, again).item())
    return statistics.mean(ious)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def draw_shapes(folder: Path, size: int, count: int = 800) -> Path:
    """COCO-format JSON of `count` drawn scenes: ellipses, rectangles and blobs in plain colours with noise, one over another.

    In every other picture what is annotated is not what is seen: there a prompt's place is all there is to go by, and the best
    guess at a box is what usually fills one.
    """
    file = folder / "instances.json"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(count):
        pixels = np.zeros((size, size, 3)) + rng.uniform(0, 255, 3)
        masks: list[np.ndarray] = []
        for _ in range(rng.integers(3, 10)):
            canvas = Image.new("1", (size, size))
            draw_shape(ImageDraw.Draw(canvas), size, rng)
            mask = np.asarray(canvas)
            masks = [one & ~mask for one in masks] + [mask]
            pixels[np.rot90(mask, 2 * (number % 2))] = rng.uniform(0, 255, 3)
        noisy = pixels + rng.normal(0, rng.uniform(2, 25), pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": size, "height": size})
        for mask in masks:
            if mask.sum() >= 64:
                # Run lengths in columns, zeros first.
                flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(np.int8)
                edges = np.flatnonzero(np.diff(flat))
                counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": number,
                        "segmentation": {"size": [size, size], "counts": counts},
                    }
                )
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def draw_shape(draw: ImageDraw.ImageDraw, size: int, rng: np.random.Generator) -> None:
    """One shape at a random place, of a fifteenth to half of the picture's side."""
    middle, radii = rng.uniform(0.1, 0.9, 2) * size, np.exp(rng.uniform(np.log(0.03), np.log(0.3), 2)) * size
    kind = rng.integers(3)
    if kind < 2:
        corners = [*(middle - radii), *(middle + radii)]
        (draw.ellipse if kind else draw.rectangle)(corners, fill=1)
        return
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    lengths = rng.uniform(0.4, 1.3, 9)
    points = middle + (radii * lengths[:, None]) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    draw.polygon([(float(x), float(y)) for x, y in points], fill=1)


def _short(line: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, int | float))


def report(given: argparse.Namespace) -> None:
    """Print the table; draw the curves where `--plot` says."""
    baseline, ceiling = (json.loads((given.work / name).read_text()) for name in ("box.json", "ceiling.json"))
    arms = {arm: [json.loads(path.read_text()) for path in sorted(given.work.glob(f"{arm}-[0-9].json"))] for arm in ARMS}
    if not arms["taught"]:
        raise SystemExit(f"{given.work}: no run is finished yet")
    names = list(arms["taught"][0]["final"])
    print(f"{arms['taught'][0]['recipe']}\n")
    print("| held-out mIoU, percent | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row, values in {"the box itself": baseline, "the true mask in such cells": ceiling}.items():
        print(f"| {row} | " + " | ".join(f"{100 * values[name]:.1f}" if name in values else "-" for name in names) + " |")
    for arm, runs in arms.items():
        if not runs:
            continue
        cells = [_spread([100 * run["final"][name] for run in runs]) for name in names]
        print(f"| {ARMS[arm]}, {len(runs)} seeds | " + " | ".join(cells) + " |")
    pairs = list(zip(arms["taught"], arms["scratch"], strict=False))
    if pairs:
        cells = [
            _spread([100 * (taught["final"][name] - scratch["final"][name]) for taught, scratch in pairs]) for name in names
        ]
        print("| difference, paired by seed | " + " | ".join(cells) + " |")
    for arm, runs in arms.items():
        print(f"{arm}: {len(runs)} seeds, {_spread([run['seconds'] / 60 for run in runs])} minutes a run")
    if given.plot:
        _draw(baseline, arms, given.plot)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}" if values else "-"


def _draw(baseline: dict[str, float], arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {"taught": "#0072B2", "scratch": "#D55E00"}
    for panel, (key, name) in zip(axes, CURVES.items(), strict=True):
        for arm, runs in arms.items():
            for number, run in enumerate(runs):
                steps, values = [line["step"] for line in run["curve"]], [100 * line[key] for line in run["curve"]]
                panel.plot(steps, values, color=colours[arm], marker="o", markersize=3, label=ARMS[arm] if not number else None)
        if name == "box":
            panel.axhline(100 * baseline["single/box"], color="black", linestyle=":", label="the box itself")
        panel.set_title(f"prompt: {name}")
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("mIoU over the held-out objects, percent")
    axes[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(run=train)
    training.add_argument("--annotations", type=Path, required=True, help="COCO-format JSON of at least 81 pictures")
    training.add_argument("--images", type=Path, required=True)
    training.add_argument("--student", type=Path, required=True)
    training.add_argument("--encoder", default="vit_t", help="what RUN is")
    training.add_argument("--shape-steps", type=int, default=3000)
    training.add_argument("--shape-lr", type=float, default=6e-4)
    training.add_argument("--shape-batch", type=int, default=16)
    training.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--steps", type=int, default=4000)
    training.add_argument("--batch-size", type=int, default=8)
    training.add_argument("--min-area", type=int, default=32**2, help="pixels; smaller objects are left out")
    training.add_argument("--lr", type=float, default=1e-4)
    training.add_argument("--crop", type=float, default=0.5)
    training.add_argument("--box-share", type=float, default=0.5, help="of the prompts for photographs; the others are clicks")
    training.add_argument("--precision", default="float32")
    training.add_argument("--image-size", type=int, default=224)
    training.add_argument("--error-points", type=int, default=0)
    training.add_argument("--mask-rounds", type=int, default=0)
    training.add_argument("--max-objects", type=int, default=16)
    reporting = commands.add_parser("report")
    reporting.set_defaults(run=report)
    for command in (training, reporting):
        command.add_argument("--work", type=Path, required=True)
        command.add_argument("--plot", type=Path)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
