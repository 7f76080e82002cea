"""What pretraining is worth to detection and semantic segmentation that are learnt from 80 pictures: taught against scratch.

    python benchmarks/coco_transfer.py train semantic --data DIR --student RUN --work DIR [--seeds 3] [--steps N] [--lr X]
    python benchmarks/coco_transfer.py train detection --data DIR --student RUN --work DIR
    python benchmarks/coco_transfer.py report --work DIR [--plot FILE]

DIR is laid out as COCO128 with masks: `instances.json`, `images/ID.jpg`, `semantic/ID.png`, `semantic-classes.yaml`. The first
80 of the annotated pictures, by number, are trained on, the others held out. RUN is one of `sami-cache train`, or what
`sami-cache export` wrote.

Both arms run `sami-cache finetune detection | semantic` with the same settings. Within a seed they share the order of pictures
and their changes, and differ in the encoder's start alone (and in what is drawn after it: the heads). Every run is judged after
its last step, on the 80 (has it learnt them?) and on the 20. A run that is finished is not made again, one that was stopped
goes on.

Of COCO's classes most occur in one part only, so that the mean over all of them is mostly zeros. Beside COCO's AP and mIoU over
all classes that occur in what is judged, therefore: "frequent", the mean over those of them that the 80 show often
(`FREQUENT`: objects of a category, pictures of a class); and for detection "any class", where category is not asked for
(duplicates of other categories removed by NMS at 0.5).

The margin, set before anything was run: the taught student is ahead on the 20 if it leads by at least 2 points in `JUDGED`:
"box AP50, any class" for detection, "mIoU, frequent" for semantic segmentation. With three seeds or more the 95 % interval of
the paired difference must lie above 0 as well.
"""

import argparse
import json
import math
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student_t
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, nms

from pipelines.finetune_detection import DetectionTrainingConfig, evaluate_detection, finetune_detection
from pipelines.finetune_semantic import SemanticTrainingConfig, finetune_semantic
from pipelines.semantic import evaluate_semantic
from sami_cache.data.annotations import CocoAnnotations
from sami_cache.data.class_masks import MaskedPictures
from sami_cache.inference.average_precision import Truth, average_precision
from sami_cache.models.detector import Detector
from sami_cache.models.pyramid import SimpleFeaturePyramid
from sami_cache.models.semantic import Mask2FormerShape
from sami_cache.models.students import create_encoder
from sami_cache.tasks.detection import JitterConfig
from sami_cache.tasks.semantic import SemanticAugment

TRAINED_ON = 80
PARTS = ("train", "heldout")
ARMS = {"taught": "pretrained student", "scratch": "the same student from scratch"}
TASKS = ("detection", "semantic")
FREQUENT = {"detection": 10, "semantic": 5}
JUDGED = {"detection": "box AP50, any class", "semantic": "mIoU, frequent"}
MARGIN = 2.0
CURVES = {"detection": ("heldout_box_AP50", "box AP50"), "semantic": ("heldout_miou", "mIoU")}
DEFAULTS: dict[str, dict[str, Any]] = {
    "detection": {"image_size": 160, "steps": 1000, "batch_size": 4, "lr": 1e-3},
    "semantic": {"image_size": 128, "steps": 1000, "batch_size": 4, "lr": 2e-3},
}
OWN = {"detection": "regions", "semantic": "backbone_lr"}
"""The option of `train` that only this task has."""
UNLABELLED = 0
"""The index of pixels that belong to no segment."""


def split(data: Path, work: Path) -> dict[str, Path]:
    """A folder a part, with `instances.json`, `images/` and `masks/` of its pictures; the two last of links."""
    content = json.loads((data / "instances.json").read_text())
    images = sorted(content["images"], key=lambda image: image["id"])
    parts = {}
    for name, some in zip(PARTS, (images[:TRAINED_ON], images[TRAINED_ON:]), strict=True):
        parts[name] = part = work / name
        chosen = {image["id"] for image in some}
        for folder in ("images", "masks"):
            shutil.rmtree(part / folder, ignore_errors=True)
            (part / folder).mkdir(parents=True)
        kept = [one for one in content["annotations"] if one["image_id"] in chosen]
        (part / "instances.json").write_text(json.dumps({**content, "images": some, "annotations": kept}))
        for image in some:
            picture = Path(image["file_name"])
            (part / "images" / picture.name).symlink_to((data / "images" / picture).resolve())
            mask = f"{picture.stem}.png"
            (part / "masks" / mask).symlink_to((data / "semantic" / mask).resolve())
    return parts


def train(given: argparse.Namespace) -> None:
    """Train and judge every arm and seed of a task; a file in WORK for each."""
    given.work.mkdir(parents=True, exist_ok=True)
    parts, work = split(given.data, given.work), given.work
    recipe = {name: getattr(given, name) or default for name, default in DEFAULTS[given.task].items()}
    recipe |= {name: getattr(given, name) for name in ("channels", "precision", OWN[given.task])}
    for seed in range(given.first_seed, given.seeds):
        for arm in given.arms:
            name = f"{given.task}-{arm}-{seed}"
            if (work / f"{name}.json").exists():
                continue
            if arm == "taught" and given.student is None:
                raise SystemExit("--student: expected a run of `sami-cache train`, or an export, for the arm taught")
            run = work / name
            shared = {
                "run": run,
                "init": str(given.student) if arm == "taught" else None,
                "student": given.encoder,
                "seed": seed,
                "micro_batch": recipe["batch_size"],
                "warmup_steps": recipe["steps"] // 20,
                "evaluate_every": max(1, recipe["steps"] // 4),
                "checkpoint_every": max(1, recipe["steps"] // 4),
                "log_every": max(1, recipe["steps"] // 60),
                "clip_grad": 1.0,
                "window": None,
                "resume": (run / "config.json").exists(),
                **recipe,
            }
            start = LEARN[given.task](shared, parts, given.data)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            measured = {part: MEASURE[given.task](run, parts, part) for part in PARTS}
            result = {"recipe": recipe, "seconds": start["seconds"], "figures": measured, "curve": lines}
            (work / f"{name}.json").write_text(json.dumps(result, indent=1))
            print(name, {part: _short(found) for part, found in measured.items()}, flush=True)


def learn_detection(shared: dict[str, Any], parts: dict[str, Path], data: Path) -> dict[str, Any]:
    config = DetectionTrainingConfig(
        data=parts["train"] / "instances.json",
        images=parts["train"] / "images",
        val=parts["heldout"] / "instances.json",
        val_images=parts["heldout"] / "images",
        jitter=JitterConfig(smallest=0.8, largest=1.4),
        **shared,
    )
    return finetune_detection(config, lambda line: print(shared["run"].name, _short(line), flush=True))


def learn_semantic(shared: dict[str, Any], parts: dict[str, Path], data: Path) -> dict[str, Any]:
    config = SemanticTrainingConfig(
        data=parts["train"] / "images",
        masks=parts["train"] / "masks",
        val=parts["heldout"] / "images",
        val_masks=parts["heldout"] / "masks",
        classes=data / "semantic-classes.yaml",
        ignore_index=UNLABELLED,
        mask2former=Mask2FormerShape(
            queries=40, encoder_layers=2, decoder_layers=3, encoder_feedforward=256, feedforward=256, points=1024
        ),
        augment=SemanticAugment(smallest=0.8, largest=1.4, colour=False),
        **shared,
    )
    return finetune_semantic(config, lambda line: print(shared["run"].name, _short(line), flush=True))


def measure_detection(run: Path, parts: dict[str, Path], part: str) -> dict[str, float]:
    """COCO's AP in percent: over all categories of the part, over the frequent ones, and with one category for all."""
    file, out = parts[part] / "instances.json", run / f"{part}.json"
    out.unlink(missing_ok=True)
    found = evaluate_detection(run, file, parts[part] / "images", out=out)
    results = json.loads(out.read_text())
    annotations = CocoAnnotations(file, parts[part] / "images")
    truth = Truth(annotations).dataset(range(len(annotations)))
    seen = Counter(one["category_id"] for one in json.loads((parts["train"] / "instances.json").read_text())["annotations"])
    frequent = {category for category, count in seen.items() if count >= FREQUENT["detection"]}
    figures: dict[str, float] = {}
    kinds: tuple[tuple[str, Literal["bbox", "segm"]], ...] = (("box", "bbox"), ("mask", "segm"))
    for kind, theirs in kinds:
        figures |= {f"{kind} {name}": 100 * found[f"heldout_{kind}_{name}"] for name in ("AP", "AP50")}
        for name, (dataset, some) in {
            "frequent": only(truth, results, frequent),
            "any class": any_class(truth, results),
        }.items():
            values = average_precision(dataset, some, style="coco", kind=theirs) if some else {}
            figures |= {f"{kind} {metric}, {name}": 100 * values.get(metric, 0.0) for metric in ("AP", "AP50")}
    occur = {one["category_id"] for one in truth["annotations"]}
    return figures | {"classes": len(occur), "frequent classes": len(occur & frequent)}


def only(truth: dict[str, Any], results: list[dict[str, Any]], categories: set[int]) -> tuple[dict[str, Any], list[dict]]:
    """The objects and detections of these categories alone."""
    kept = {
        "categories": [one for one in truth["categories"] if one["id"] in categories],
        "annotations": [one for one in truth["annotations"] if one["category_id"] in categories],
    }
    return {**truth, **kept}, [one for one in results if one["category_id"] in categories]


def any_class(truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict]]:
    """All objects and detections as of one category; of detections that overlap by 0.5 or more the surest is kept."""
    first = truth["categories"][0]
    objects = [{**one, "category_id": first["id"]} for one in truth["annotations"]]
    kept = []
    for image in truth["images"]:
        own = [one for one in results if one["image_id"] == image["id"]]
        x, y, width, height = torch.tensor([one["bbox"] for one in own], dtype=torch.float32).view(-1, 4).unbind(1)
        boxes = torch.stack([x, y, x + width, y + height], dim=1)
        surest = nms(boxes, torch.tensor([float(one["score"]) for one in own]), 0.5)
        kept += [{**own[number], "category_id": first["id"]} for number in surest.tolist()]
    return {**truth, "categories": [first], "annotations": objects}, kept


def within_reach(file: Path, size: int) -> float:
    """Share of the objects in a COCO-format file that some anchor of the detector overlaps by 0.5, at `size` pixels.

    The RPN takes what no anchor overlaps by 0.3 for background, but for each object's best anchor.
    """
    content = json.loads(file.read_text())
    scales = {image["id"]: size / max(image["width"], image["height"]) for image in content["images"]}
    corners = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in content["annotations"])]
    boxes = torch.tensor(corners) * torch.tensor([[scales[one["image_id"]]] for one in content["annotations"]])
    generator: Any = Detector(
        SimpleFeaturePyramid(create_encoder("vit_t"), channels=32), 1, image_size=size
    ).rpn.anchor_generator
    maps = [torch.zeros(1, 1, math.ceil(size / stride), math.ceil(size / stride)) for stride in (4, 8, 16, 32, 64)]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, size, size), [(size, size)]), maps)
    best = torch.cat([box_iou(some, anchors).amax(1) for some in boxes.split(32)])
    return (best >= 0.5).float().mean().item()


def measure_semantic(run: Path, parts: dict[str, Path], part: str) -> dict[str, float]:
    """mIoU and pixel accuracy in percent: over all classes of the part, and over the frequent ones."""
    found = evaluate_semantic(run, parts[part] / "images", parts[part] / "masks")
    names = json.loads((run / "config.json").read_text())["config"]["semantic"]
    pictures = MaskedPictures(parts["train"] / "images", parts["train"] / "masks")
    seen = Counter(index for number in range(len(pictures)) for index in np.unique(pictures.mask(number)).tolist())
    frequent = {
        name for index, name in zip(names["indices"], names["class_names"], strict=True) if seen[index] >= FREQUENT["semantic"]
    }
    values = [iou for name, iou in found["iou"].items() if name in frequent]
    return {
        "mIoU": 100 * found["miou"],
        "mIoU, frequent": 100 * statistics.mean(values) if values else 0.0,
        "pixel accuracy": 100 * found["pixel_accuracy"],
        "classes": len(found["iou"]),
        "frequent classes": len(values),
    }


LEARN = {"detection": learn_detection, "semantic": learn_semantic}
MEASURE = {"detection": measure_detection, "semantic": measure_semantic}


def _short(line: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, int | float))


def report(given: argparse.Namespace) -> None:
    """Print a table and a verdict a task; draw the curves where `--plot` says."""
    found = {task: finished(given.work, task) for task in TASKS}
    for task, arms in found.items():
        if any(arms.values()):
            print("\n".join(table(task, arms)))
            if task == "detection":
                size = next(run for runs in arms.values() for run in runs.values())["recipe"]["image_size"]
                share = within_reach(given.work / "train" / "instances.json", size)
                print(f"At {size} px {100 * share:.0f} % of the objects to learn overlap an anchor by 0.5 or more.")
            print()
    if given.plot:
        draw({task: arms for task, arms in found.items() if any(arms.values())}, given.plot)


def finished(work: Path, task: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by arm and seed."""
    files = {arm: sorted(work.glob(f"{task}-{arm}-*.json")) for arm in ARMS}
    return {arm: {int(path.stem.rpartition("-")[2]): json.loads(path.read_text()) for path in files[arm]} for arm in ARMS}


def table(task: str, arms: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Lines of Markdown: the settings, the table, the verdict."""
    some = next(run for runs in arms.values() for run in runs.values())
    names = [name for name in some["figures"]["heldout"] if not name.endswith("classes")]
    lines = [f"## {task}", f"{some['recipe']}", ""]
    for part in PARTS:
        counts = some["figures"][part]
        lines.append(f"{part}: {counts['classes']} classes occur, {counts['frequent classes']} of them frequent.")
    lines += ["", "| percent | pictures | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for part in PARTS:
        for arm, runs in arms.items():
            if runs:
                cells = [spread([run["figures"][part][name] for run in runs.values()]) for name in names]
                lines.append(f"| {ARMS[arm]}, {len(runs)} seeds | {part} | " + " | ".join(cells) + " |")
    pairs = sorted(set(arms["taught"]) & set(arms["scratch"]))
    if pairs:
        for part in PARTS:
            cells = [spread(differences(arms, pairs, part, name), sign="+") for name in names]
            lines.append(f"| difference, paired by seed | {part} | " + " | ".join(cells) + " |")
        lines += ["", verdict(JUDGED[task], differences(arms, pairs, "heldout", JUDGED[task]))]
    for arm, runs in arms.items():
        if runs:
            lines.append(f"{arm}: {spread([run['seconds'] / 60 for run in runs.values()])} minutes a run.")
    return lines


def differences(arms: dict[str, dict[int, dict[str, Any]]], seeds: list[int], part: str, name: str) -> list[float]:
    """Taught less scratch, of each seed."""
    taught, scratch = ([arms[arm][seed]["figures"][part][name] for seed in seeds] for arm in ("taught", "scratch"))
    return [one - other for one, other in zip(taught, scratch, strict=True)]


def verdict(name: str, values: list[float]) -> str:
    """Is the margin kept? One sentence."""
    mean, half = statistics.mean(values), half_interval(values)
    kept = mean >= MARGIN and (len(values) < 3 or mean - half > 0)
    told = "ahead by the margin" if kept else "not ahead by the margin"
    return f"{name}, held out: {spread(values, sign='+')} points, {len(values)} seeds: {told} of {MARGIN:g}."


def half_interval(values: list[float]) -> float:
    """Half the 95 % interval of the mean (Student's t); not a number with fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: list[float], sign: str = "") -> str:
    """Mean, and with several values ± half the 95 % interval."""
    half = half_interval(values)
    return f"{statistics.mean(values):{sign}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def draw(found: dict[str, dict[str, dict[int, dict[str, Any]]]], path: Path) -> None:
    """A row a task: training loss, and a held-out figure, by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(found)), dpi=110, layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    colours = {"taught": "#0072B2", "scratch": "#D55E00"}
    for row, (task, arms) in zip(panels, found.items(), strict=True):
        key, name = CURVES[task]
        for panel, (what, factor) in zip(row, (("loss", 1), (key, 100)), strict=True):
            for arm, runs in arms.items():
                for number, run in enumerate(runs.values()):
                    points = [(line["step"], factor * line[what]) for line in run["curve"] if what in line]
                    panel.plot(*zip(*points, strict=True), color=colours[arm], label=None if number else ARMS[arm])
            panel.set_xlabel("optimizer step")
            panel.grid(alpha=0.3)
        row[0].set_title(f"{task}: training loss")
        row[1].set_title(f"{task}: {name} on the held-out pictures, percent")
        row[0].legend(frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(run=train)
    training.add_argument("task", choices=TASKS)
    training.add_argument("--data", type=Path, required=True, help="laid out as COCO128, at least 81 annotated pictures")
    training.add_argument("--student", type=Path, help="of the arm taught")
    training.add_argument("--encoder", default="vit_t", help="what RUN is")
    training.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--first-seed", type=int, default=0)
    training.add_argument("--steps", type=int, help=f"default: {_defaults('steps')}")
    training.add_argument("--image-size", type=int, help=f"default: {_defaults('image_size')}")
    training.add_argument("--batch-size", type=int, help=f"default: {_defaults('batch_size')}")
    training.add_argument("--lr", type=float, help=f"default: {_defaults('lr')}")
    training.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    training.add_argument("--channels", type=int, default=64, help="of pyramid and heads")
    training.add_argument(
        "--regions", type=int, default=32, help="of a picture, that the detector's heads learn from in a step"
    )
    training.add_argument("--backbone-lr", type=float, default=0.3, help="of semantic: times the rate, for the encoder")
    reporting = commands.add_parser("report")
    reporting.set_defaults(run=report)
    reporting.add_argument("--plot", type=Path)
    for command in (training, reporting):
        command.add_argument("--work", type=Path, required=True)
    given = parser.parse_args(arguments)
    given.run(given)


def _defaults(name: str) -> str:
    return ", ".join(f"{DEFAULTS[task][name]} ({task})" for task in TASKS)


if __name__ == "__main__":
    main()
