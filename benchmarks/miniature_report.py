"""Tables and plots of the miniature: one of each a question, with the published figure beside it."""

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from miniature_stages import Place, Recipe
from students_report import STUDENT_T

mpl.use("Agg")
import matplotlib.pyplot as plt

MEASURES = {"knn": ("probe", "k-NN %"), "linear": ("probe", "linear probe %"), "accuracy": ("finetune", "fine-tuned %")}
Values = dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Arms to compare."""

    topic: str
    """In the plot's name."""
    title: str
    base: str
    """What the others are compared with, seed by seed."""
    arms: tuple[str, ...]
    published: str
    """What the papers say, at their scale."""


QUESTIONS = (
    Question(
        topic="table-1",
        title="What is pretraining worth, towards features and towards pixels?",
        base="mae",
        arms=("scratch", "mae", "mae-all-token", "sami"),
        published="SAMI > MAE > scratch: ImageNet-1K top-1 of ViT-Ti 76.8, 75.2, 74.5 (DeiT, scratch) [EfficientSAM].",
    ),
    Question(
        topic="online",
        title="Is a cache as good as the teacher online?",
        base="online",
        arms=("online", "sami"),
        published="The paper runs its teacher online; a cache is to give the same within noise.",
    ),
    Question(
        topic="loss",
        title="Mean squared error or cosine?",
        base="sami",
        arms=("sami", "cosine"),
        published="MSE 76.8, cosine 76.1 (Ti); 82.7, 82.3 (S) [EfficientSAM].",
    ),
    Question(
        topic="mask",
        title="How much is to be masked?",
        base="sami",
        arms=("mask50", "sami", "mask85"),
        published="84.6 at 50 %, 84.8 at 75 %, 84.7 at 85 % (B) [EfficientSAM].",
    ),
    Question(
        topic="decoder",
        title="Cross-attention or all tokens, and what do the queries see?",
        base="sami",
        arms=("sami", "all-token", "visible"),
        published="Cross-attention 3 points over decoding all tokens (Ti) [EfficientSAM]; "
        "visible keys alone 83.3 against 83.0 for all [CrossMAE].",
    ),
    Question(
        topic="errors",
        title="What does the codec's error cost?",
        base="sami",
        arms=("sami", "error10", "error30"),
        published="Nothing is published: the cache and its codec are ours.",
    ),
    Question(
        topic="views",
        title="Crops of stored features, or features of recorded crops?",
        base="crops-dense",
        arms=("sami", "crops-dense", "crops-replay"),
        published="The paper's teacher sees the student's own view, which is what a replay cache records.",
    ),
    Question(
        topic="photos",
        title="The same, pretraining on the photographs",
        base="photos-dense",
        arms=("photos-dense", "photos-replay"),
        published="As above.",
    ),
    Question(
        topic="vit_t",
        title="The same for vit_t",
        base="vit_t-mae",
        arms=("vit_t-scratch", "vit_t-mae", "vit_t-sami"),
        published="As for the first question.",
    ),
)
NAMES = {
    "scratch": "scratch",
    "sami": "SAMI, cache (MSE, mask 75 %, cross-attention, error 1 %)",
    "mae": "MAE (pixels)",
    "mae-all-token": "MAE, all-token decoder (as MAE has it)",
    "online": "SAMI, teacher online",
    "cosine": "cosine loss",
    "all-token": "all-token decoder",
    "visible": "keys and values: visible tokens alone",
    "mask50": "mask 50 %",
    "mask85": "mask 85 %",
    "error10": "error 10 %",
    "error30": "error 30 %",
    "crops-dense": "CIFAR-10, random crops, dense",
    "crops-replay": "CIFAR-10, random crops, replay",
    "photos-dense": "photographs, dense (16 x 16)",
    "photos-replay": "photographs, replay",
    "vit_t-scratch": "vit_t scratch",
    "vit_t-sami": "vit_t SAMI, cache",
    "vit_t-mae": "vit_t MAE (pixels)",
}


def results_of(place: Place) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """By arm, stage and seed."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for path in sorted(place.work.glob(f"{place.judge}/*/*/*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["arm"], {}).setdefault(result["stage"], {})[result["seed"]] = result
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN of one value."""
    count = len(values)
    if count < 2:
        return values[0], math.nan
    t = STUDENT_T.get(count - 1, STUDENT_T[max(STUDENT_T)])
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(count)


def with_interval(values: list[float], sign: str = "") -> str:
    """Bold: a difference whose interval leaves out zero."""
    if not values:
        return ""
    mean, half = interval(values)
    text = f"{mean:{sign}.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")
    return f"**{text}**" if sign and abs(mean) > half else text


def values_of(results: dict[str, Any], arm: str, measure: str) -> Values:
    """In percent, by seed."""
    runs = results.get(arm, {}).get(MEASURES[measure][0], {})
    return {seed: 100 * run[measure] for seed, run in runs.items()}


def table(results: dict[str, Any], question: Question) -> list[str]:
    heads = [cell for _, name in MEASURES.values() for cell in (name, f"less {question.base}")]
    lines = [f"| | seeds | {' | '.join(heads)} | pretraining, min |", "|---" * (len(heads) + 3) + "|"]
    for arm in question.arms:
        cells: list[str] = []
        for measure in MEASURES:
            values, base = values_of(results, arm, measure), values_of(results, question.base, measure)
            both = sorted(values.keys() & base.keys()) if arm != question.base else []
            cells += [with_interval(list(values.values())), with_interval([values[s] - base[s] for s in both], "+")]
        taken = [run["seconds"] / 60 for run in results.get(arm, {}).get("pretrain", {}).values()]
        seeds = "/".join(dict.fromkeys(str(len(values_of(results, arm, measure))) for measure in MEASURES))
        lines.append(f"| {NAMES[arm]} | {seeds} | {' | '.join(cells)} | {statistics.mean(taken) if taken else 0:.1f} |")
    return lines


def plot(results: dict[str, Any], question: Question, path: Path) -> None:
    """Every seed a dot, the mean with its interval a bar."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.9 + 0.45 * len(question.arms)), sharey=True, constrained_layout=True)
    for axis, measure in zip(axes, MEASURES, strict=True):
        for row, arm in enumerate(reversed(question.arms)):
            if values := list(values_of(results, arm, measure).values()):
                mean, half = interval(values)
                axis.errorbar(mean, row, xerr=None if math.isnan(half) else half, fmt="s", color="C0", capsize=4)
                axis.plot(values, [row] * len(values), ".", color="C1")
        if ceiling := values_of(results, "teacher", measure):
            axis.axvline(ceiling[0], color="0.6", linestyle="--", label="teacher")
            axis.legend(fontsize=8)
        axis.set_xlabel(MEASURES[measure][1])
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(question.arms)), [NAMES[arm].split(" (")[0] for arm in reversed(question.arms)])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def hardware_name() -> tuple[str, str]:
    """For the file's name, and in words."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), name
    cores = os.cpu_count()
    return f"{cores}cpu-{platform.machine()}", f"{cores} CPU cores, {platform.machine()}"


def write_report(place: Place, arms: Iterable[str], out: Path) -> Path:
    """The page and its plots, in `out`."""
    results = results_of(place)
    short, words = hardware_name()
    page = out / f"miniature-{short}-{time.strftime('%Y%m%d')}.md"
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# The paper's tables in miniature", "", *introduction(place, results, words), ""]
    if teacher := results.get("teacher", {}).get("probe", {}).get(0):
        lines += [
            f"The ceiling, the teacher's own pooled features: k-NN {100 * teacher['knn']:.2f} %, "
            f"linear probe {100 * teacher['linear']:.2f} %.",
            "",
        ]
    for asked in QUESTIONS:
        question = replace(asked, arms=tuple(arm for arm in asked.arms if arm in results))
        if len(question.arms) < 2:
            continue
        picture = page.with_name(f"{page.stem}-{question.topic}.png")
        plot(results, question, picture)
        lines += [f"## {question.title}", "", f"Published: {question.published}", ""]
        lines += [*table(results, question), "", f"![{question.title}]({picture.name})", ""]
    missing = [arm for arm in arms if arm not in results]
    lines += [f"Not run: {', '.join(missing)}."] if missing else []
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def introduction(place: Place, results: dict[str, Any], words: str) -> list[str]:
    runs = [run for stages in results.values() for by_seed in stages.values() for run in by_seed.values()]
    recipe = Recipe(**runs[0]["recipe"]) if runs else place.recipe
    seconds = sum(run["seconds"] for run in runs)
    images, fine_images = recipe.steps * recipe.batch_size, recipe.fine_steps * recipe.batch_size
    extraction = sum(json.loads(path.read_text())["seconds"] for path in place.work.glob("caches/*.json"))
    judged = "its 10,000 test images" if place.judge == "test" else f"the last {recipe.heldout} training images"
    return f"""\
    make miniature CIFAR=DIR PHOTOS=DIR
    python benchmarks/miniature.py --cifar DIR --photos DIR --work DIR --report

Hardware: {words}; Python {platform.python_version()}, torch {torch.__version__}. Date: {time.strftime("%Y%m%d")}.
Duration: {len(runs)} stages, {seconds / 3600:.2f} hours one after the other, and {extraction / 60:.0f} minutes of
extraction; on CPUs every stage has one core.

Teacher: {recipe.teacher}, 128 pixels, 8 x 8. Students: a ViT of width 128 and depth 4, 64 pixels in patches of 8; vit_t, 128
pixels in patches of 16. Pretraining: CIFAR-10's training images, whole and mirrored at random, {images:,} seen
({recipe.steps} steps of {recipe.batch_size}); AdamW, learning rate {recipe.lr_teacher:g} towards features and
{recipe.lr_pixels:g} towards pixels; decoder of {recipe.decoder_depth} blocks of {recipe.decoder_width}.
Fine-tuning: {fine_images:,} labelled images seen, learning rate {recipe.fine_lr:g}, for all.
Judged on {judged}, of which no cache holds any (checked by pixels and by keys). Rates were chosen on
held-out training images, the same search for features and pixels. k-NN: 20 neighbours by cosine, all training images.

± is half the 95 % interval over seeds (Student's t). "less X" is paired: the same seed, hence the same initialisation of the
encoder, order, flips and masks (recorded views and photographs come in an order of their own); bold where zero lies outside the
interval. Seeds as k/n: probed, fine-tuned.
""".splitlines()
