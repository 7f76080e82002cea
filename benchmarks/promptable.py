"""What pretraining is worth to a promptable model that is fine-tuned on few pictures: a pretrained student against scratch.

    python benchmarks/promptable.py train --annotations FILE --images DIR --student RUN --work DIR [--seeds 3]
    python benchmarks/promptable.py report --work DIR [--plot FILE]

The first 80 of the annotated pictures, by number, are trained on, the others held out; the prompt is an object's true box.
RUN is one of `sami-cache train`, or what `sami-cache export` wrote.

A mask's cell is 4 px of the input: at 128 px, 20 of a photo 640 wide. Of objects as small as that it can say nothing, so
those below --min-area are left out; the table has columns with all of them, and a row for the true masks drawn in such cells.

A decoder from scratch answers "nothing" for many steps before it knows what a prompt is. So that 80 pictures are not spent on
that, each arm first learns prompts from drawn scenes (`drawn_scenes.py`) with its own encoder, once for all its seeds or
--scene-seeds times; there is no photograph among them. Both arms run `sami-cache finetune promptable` with the same settings;
within a seed they share the decoder's initialisation, the order of pictures and the prompts, and differ in the encoder's start
alone.

Two baselines need no model: the box itself as the mask, and the ellipse that fills it, which is what one would answer who knew
what objects look like but not this one. Intervals are of 95 %: over seeds Student's t; over the held-out pictures, which are
few, 10,000 bootstrap samples of them. A run that is finished is not made again, one that was stopped goes on.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from drawn_scenes import draw_scenes
from scipy import stats

from pipelines.finetune_promptable import PromptableTrainingConfig, finetune_promptable
from pipelines.promptable import open_promptable
from sami_cache.data.annotations import Annotations, Object, open_annotations
from sami_cache.inference.measuring import Answers, BoxItself, ModelSegmenter, Segmenter, measure_objects
from sami_cache.inference.protocols import PROTOCOLS, box_to_mask, mask_iou
from sami_cache.prompts import PromptConfig, tight_box

TRAINED_ON = 80
ARMS = {"taught": "pretrained student", "scratch": "the same student from scratch"}
CURVES = {"highest rated of three": "heldout_box_three_miou", "token 0": "heldout_box_miou"}
Ious = list[list[float]]
"""Of every object of every picture."""


class CutToBox(ModelSegmenter):
    """A model whose masks end where the box does that it was asked with."""

    def answer(self, points: np.ndarray, labels: np.ndarray, previous: torch.Tensor | None = None) -> Answers:
        return _CutMasks(super().answer(points, labels, previous), points.reshape(-1, 4), self._size)


class _CutMasks(Answers):
    def __init__(self, whole: Answers, boxes: np.ndarray, size: tuple[int, int]) -> None:
        self._whole, self._boxes, self._size = whole, boxes, size
        self.predicted = whole.predicted

    def mask(self, query: int, token: int) -> np.ndarray:
        return self._whole.mask(query, token) & box_to_mask(self._boxes[query], *self._size)

    def low_resolution(self, tokens: Sequence[int]) -> torch.Tensor | None:
        return self._whole.low_resolution(tokens)


RULES: dict[str, tuple[str, type[ModelSegmenter]]] = {
    "highest rated of three": ("efficientsam", ModelSegmenter),
    "token 0": ("single", ModelSegmenter),
    "highest rated, cut to the box": ("efficientsam", CutToBox),
}
"""Which mask counts: the protocol that says so, and what answers."""


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
    scenes = draw_scenes(given.work / "scenes", given.image_size, given.scenes, given.textures)
    asked = {"flip": True, "box_share": given.box_share, "box_noise": given.box_noise}
    stages = {
        "scenes": {"batch_size": given.scene_batch, "lr": given.scene_lr},
        "photographs": {
            "steps": given.steps,
            "batch_size": given.batch_size,
            "lr": given.lr,
            "focal_weight": given.focal_weight,
        },
    }
    prompts = {
        "scenes": PromptConfig(**asked, max_objects=given.scene_objects),
        "photographs": PromptConfig(**asked, max_objects=given.max_objects, crop=given.crop),
    }
    shared = {
        "image_size": given.image_size,
        "precision": given.precision,
        "clip_grad": 1.0,
        "error_points": 0,
        "mask_rounds": 0,
    }
    held_out = {part: open_annotations(parts[part], given.images) for part in ("heldout", "all")}

    baselines: dict[str, dict[str, Ious]] = {
        "the box itself as the mask": {part: measure(BoxItself(), some, "single") for part, some in held_out.items()},
        "the ellipse that fills the box": {part: each_object(some, ellipse_iou) for part, some in held_out.items()},
        "the true mask in cells of 4 px": {
            part: each_object(some, lambda found: cells_iou(found, given.image_size)) for part, some in held_out.items()
        },
    }
    _write(given.work / "baselines.json", baselines)
    for seed in range(given.seeds):
        for arm in given.arms:
            run, result = given.work / f"{arm}-{seed}", given.work / f"{arm}-{seed}.json"
            if result.exists():
                continue
            start = given.student if arm == "taught" else None
            scene_seconds, learnt = 0.0, {}
            for number, steps in enumerate(given.scene_steps):
                scene_run = given.work / f"{arm}-scenes-{number}-{seed % given.scene_seeds}"
                learnt = learn(
                    scene_run,
                    steps=steps,
                    data=scenes,
                    images=scenes.parent,
                    init=start,
                    student=given.encoder,
                    prompts=prompts["scenes"],
                    seed=100 * number + seed % given.scene_seeds,
                    **stages["scenes"],
                    **shared,
                )
                start, scene_seconds = scene_run, scene_seconds + learnt["seconds"]
            last = learn(
                run,
                data=parts["train"],
                images=given.images,
                val=parts["heldout"],
                init=start,
                prompts=prompts["photographs"],
                seed=seed,
                **stages["photographs"],
                **shared,
            )
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            model = open_promptable(run, torch.device("cpu"))
            found = {
                "recipe": {
                    **shared,
                    **asdict(prompts["photographs"]),
                    **stages,
                    "drawn": given.scenes,
                    "scene_steps": given.scene_steps,
                    "scene_seeds": given.scene_seeds,
                    "scene_objects": given.scene_objects,
                },
                "ious": {
                    part: {rule: measure(answers(model), some, protocol) for rule, (protocol, answers) in RULES.items()}
                    for part, some in held_out.items()
                },
                "curve": [line for line in lines if CURVES["token 0"] in line],
                "iou_training": statistics.mean(line["iou_first"] for line in lines[-10:] if "iou_first" in line),
                "iou_scenes": learnt["iou_first"],
                "seconds": {"scenes": scene_seconds, "photographs": last["seconds"]},
            }
            _write(result, found)
    report(given)


def learn(run: Path, *, steps: int, **settings: Any) -> dict[str, Any]:
    """Train for `steps` or go on; the last line of its log. A run that is finished is left as it is."""
    metrics = run / "metrics.jsonl"
    if metrics.exists() and (last := json.loads(metrics.read_text().splitlines()[-1]))["step"] == steps:
        return last
    config = PromptableTrainingConfig(
        run=run,
        steps=steps,
        warmup_steps=steps // 12,
        micro_batch=settings["batch_size"],
        log_every=20,
        checkpoint_every=max(1, steps // 8),
        evaluate_every=max(1, steps // 8) if "val" in settings else None,
        resume=(run / "config.json").exists(),
        **settings,
    )
    return finetune_promptable(config, lambda line: print(run.name, _short(line), flush=True))


def measure(segmenter: Segmenter, annotations: Annotations, protocol: str) -> Ious:
    """IoU of the mask for every object's true box, crowds left out."""
    ious = []
    for number in range(len(annotations)):
        objects = [found for found in annotations.objects(number) if not found.crowd]
        if objects:
            segmenter.set_image(annotations.read_image(number))
        ious.append(measure_objects(segmenter, objects, PROTOCOLS[protocol], ["box"])["box"])
    return ious


def each_object(annotations: Annotations, score: Callable[[np.ndarray], float]) -> Ious:
    """The same for masks that are made of the true ones."""

    def kept(objects: list[Object]) -> list[np.ndarray]:
        return [mask for found in objects if not found.crowd and (mask := found.mask()).any()]

    return [[score(mask) for mask in kept(annotations.objects(number))] for number in range(len(annotations))]


def ellipse_iou(truth: np.ndarray) -> float:
    x0, y0, x1, y1 = tight_box(truth)
    rows, columns = np.ogrid[: truth.shape[0], : truth.shape[1]]
    across, along = (2 * columns + 1 - x0 - x1) / (x1 - x0), (2 * rows + 1 - y0 - y1) / (y1 - y0)
    return mask_iou(across**2 + along**2 <= 1, truth)


def cells_iou(truth: np.ndarray, image_size: int) -> float:
    """Of a true mask with itself, averaged over the cells of a mask at `image_size` and enlarged again."""
    scale = image_size / max(truth.shape) / 4
    cells = F.interpolate(
        torch.from_numpy(truth)[None, None].float(), [round(side * scale) for side in truth.shape], mode="area"
    )
    again = F.interpolate(cells, truth.shape, mode="bilinear", align_corners=False)[0, 0] > 0.5
    return mask_iou(again.numpy(), truth)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def _short(line: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, int | float))


def report(given: argparse.Namespace) -> None:
    """Print the tables; draw the curves where `--plot` says."""
    baselines: dict[str, dict[str, Ious]] = json.loads((given.work / "baselines.json").read_text())
    arms = {arm: [json.loads(path.read_text()) for path in sorted(given.work.glob(f"{arm}-[0-9].json"))] for arm in ARMS}
    if not all(arms.values()):
        raise SystemExit(f"{given.work}: expected a finished run of every arm")
    print(f"{arms['taught'][0]['recipe']}\n")
    columns = [(part, rule) for part in ("heldout", "all") for rule in RULES]
    counts = {part: sum(map(len, ious)) for part, ious in baselines["the box itself as the mask"].items()}
    print("| box mIoU, percent | " + " | ".join(f"{rule}, {counts[part]} objects" for part, rule in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name, ious in baselines.items():
        print(f"| {name} | " + " | ".join(f"{_mean(ious[part]):.1f}" for part, _ in columns) + " |")
    for arm, runs in arms.items():
        cells = [
            f"{100 * statistics.mean(run['curve'][0][CURVES[rule]] for run in runs):.1f}"
            if part == "heldout" and rule in CURVES
            else "-"
            for part, rule in columns
        ]
        print(f"| {ARMS[arm]}, before it saw a photograph | " + " | ".join(cells) + " |")
    means = {
        arm: {(part, rule): [_mean(run["ious"][part][rule]) for run in runs] for part, rule in columns}
        for arm, runs in arms.items()
    }
    for arm, runs in arms.items():
        print(f"| {ARMS[arm]}, {len(runs)} seeds | " + " | ".join(_over_seeds(means[arm][column]) for column in columns) + " |")

    box, ellipse = list(baselines)[:2]
    print("\n| differences, percentage points | " + " | ".join(f"{rule}: over seeds | over pictures" for rule in RULES) + " |")
    print("|---|" + "---|---|" * len(RULES))
    others: dict[str, Callable[[str], list[Ious]]] = {
        "pretrained - scratch, paired by seed": lambda rule: [run["ious"]["heldout"][rule] for run in arms["scratch"]],
        "pretrained - the box": lambda rule: [baselines[box]["heldout"]] * len(arms["taught"]),
        "pretrained - the ellipse": lambda rule: [baselines[ellipse]["heldout"]] * len(arms["taught"]),
    }
    for name, other in others.items():
        cells = []
        for rule in RULES:
            pairs = list(zip([run["ious"]["heldout"][rule] for run in arms["taught"]], other(rule), strict=False))
            cells += [_over_seeds([_mean(ours) - _mean(theirs) for ours, theirs in pairs]), _over_pictures(pairs)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()
    for arm, runs in arms.items():
        minutes = {stage: statistics.mean(run["seconds"][stage] / 60 for run in runs) for stage in runs[0]["seconds"]}
        learnt = {name: statistics.mean(100 * run[f"iou_{name}"] for run in runs) for name in ("scenes", "training")}
        print(
            f"{arm}: {minutes['scenes']:.1f} minutes on the scenes, {minutes['photographs']:.1f} on the photographs; "
            f"IoU on what it was trained on at the end {learnt['scenes']:.1f} and {learnt['training']:.1f}"
        )
    if given.plot:
        _draw({name: _mean(baselines[name]["heldout"]) for name in (box, ellipse)}, arms, given.plot)


def _mean(ious: Ious) -> float:
    """Over the objects, percent."""
    return 100 * statistics.mean(iou for picture in ious for iou in picture)


def _over_seeds(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def _over_pictures(pairs: list[tuple[Ious, Ious]]) -> str:
    """Interval of the mean difference of `pairs`, one a seed, if the held-out pictures had been others."""
    sums = [[sum(ours) - sum(theirs) for ours, theirs in zip(*pair, strict=True)] for pair in pairs]
    counts = np.array([len(picture) for picture in pairs[0][0]])
    differences, counts = np.mean(sums, axis=0)[counts > 0], counts[counts > 0]
    drawn = np.random.default_rng(0).integers(len(counts), size=(10_000, len(counts)))
    low, high = np.percentile(100 * differences[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return f"{low:.1f} to {high:.1f}"


def _draw(baselines: dict[str, float], arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {"taught": "#0072B2", "scratch": "#D55E00"}
    for panel, (rule, key) in zip(axes, CURVES.items(), strict=True):
        for arm, runs in arms.items():
            for number, run in enumerate(runs):
                steps, values = [line["step"] for line in run["curve"]], [100 * line[key] for line in run["curve"]]
                panel.plot(steps, values, color=colours[arm], marker="o", markersize=3, label=ARMS[arm] if not number else None)
        for (name, value), style in zip(baselines.items(), (":", "--"), strict=True):
            panel.axhline(value, color="black", linestyle=style, label=name)
        panel.set_title(f"mask: {rule}")
        panel.set_xlabel("optimizer step on the photographs")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("box mIoU over the held-out objects, percent")
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
    training.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--scenes", type=int, default=1500, help="drawn ones, to learn prompts from")
    training.add_argument("--textures", type=Path, help="photographs without annotations, to draw the scenes with")
    training.add_argument("--scene-seeds", type=int, default=1, help="an arm's models of scenes, that its seeds take in turn")
    training.add_argument(
        "--scene-steps", type=int, nargs="+", default=[1300, 500], help="of one descent of the rate after another"
    )
    training.add_argument("--scene-lr", type=float, default=7e-4)
    training.add_argument("--scene-batch", type=int, default=8)
    training.add_argument("--scene-objects", type=int, default=8, help="of a scene in a step")
    training.add_argument("--steps", type=int, default=256, help="on the photographs")
    training.add_argument("--batch-size", type=int, default=8)
    training.add_argument("--lr", type=float, default=1.5e-4)
    training.add_argument("--focal-weight", type=float, default=4, help="on the photographs; on the scenes 20, as published")
    training.add_argument("--crop", type=float, default=0.7)
    training.add_argument("--min-area", type=int, default=32**2, help="pixels; smaller objects are left out")
    training.add_argument("--box-share", type=float, default=1.0, help="of the prompts of both stages; the others are clicks")
    training.add_argument("--box-noise", type=float, default=0.0, help="standard deviation of a box's sides, of their length")
    training.add_argument("--precision", default="bfloat16")
    training.add_argument("--image-size", type=int, default=128)
    training.add_argument("--max-objects", type=int, default=4, help="of a photograph in a step")
    reporting = commands.add_parser("report")
    reporting.set_defaults(run=report)
    for command in (training, reporting):
        command.add_argument("--work", type=Path, required=True)
        command.add_argument("--plot", type=Path)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
