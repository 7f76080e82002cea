"""The tables and the plot of `benchmarks/students.py`.

    python benchmarks/students_report.py WORK [--plot FILE]

Mean ± standard deviation are over seeds. A paired difference is that of two arms with the same seed, hence the same
initialisation, samples, views and masks: its mean ± the standard error of that mean.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Runs = dict[int, dict[str, Any]]
# Two-sided 95 % of Student's t with this many degrees of freedom.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def arms_of(results: dict[str, Any], kind: str) -> dict[str, Runs]:
    """Runs by arm and seed."""
    arms: dict[str, Runs] = {}
    for name, found in results.items():
        parts = name.split("/")
        if parts[0] == kind and len(parts) == 3:
            arms.setdefault(parts[1], {})[int(parts[2])] = found
    return arms


def spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired(arm: Runs, base: Runs, value: Callable[[dict[str, Any]], float]) -> tuple[float, float, int]:
    """Mean difference to `base` over the seeds both have, its standard error, and how many seeds these are."""
    seeds = sorted(arm.keys() & base.keys())
    mean, deviation = spread([value(arm[seed]) - value(base[seed]) for seed in seeds])
    return mean, deviation / math.sqrt(len(seeds)), len(seeds)


def loss(run: dict[str, Any]) -> float:
    """Held-out loss against uncompressed features, 1 for predicting the mean."""
    return run["exact"]["heldout_loss"] / run["exact"]["heldout_loss_of_mean"]


def knn(run: dict[str, Any]) -> float:
    return 100 * run["knn"]


def linear(run: dict[str, Any]) -> float:
    return 100 * run["linear"]


def cosine(run: dict[str, Any]) -> float:
    return run["exact"]["heldout_cosine"]


def shown(runs: Runs, value: Callable[[dict[str, Any]], float], digits: int) -> str:
    mean, deviation = spread([value(run) for run in runs.values()])
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}" if len(runs) > 1 else f"{mean:.{digits}f}"


def difference(arm: Runs, base: Runs, value: Callable[[dict[str, Any]], float], digits: int) -> str:
    """Bold where zero lies outside its 95 % interval, from three seeds on."""
    mean, error, count = paired(arm, base, value)
    if count < 2:
        return f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    return f"**{text}**" if count > 2 and abs(mean) > STUDENT_T[count - 1] * error else text


def table(arms: dict[str, Runs], base: str, names: dict[str, str], first: dict[str, list[str]] | None = None) -> None:
    noise = spread([loss(run) for run in arms[base].values()])[1]
    extra = (first or {}).get("", [])
    print(
        "| "
        + " | ".join(
            [names[""], *extra, "seeds", "held-out loss", "less " + names[base], "in seed sd", "cosine", "k-NN %", "less "]
        )
        + names[base]
        + " | linear % | less "
        + names[base]
        + " |"
    )
    print("|" + "---|" * (10 + len(extra)))
    for arm, name in names.items():
        if arm not in arms:
            continue
        runs = arms[arm]
        cells = [name, *(first or {}).get(arm, [""] * len(extra)), str(len(runs)), shown(runs, loss, 4)]
        other = arm not in (base, "untrained")
        cells += [difference(runs, arms[base], loss, 5) if other else ""]
        cells += [f"{paired(runs, arms[base], loss)[0] / noise:+.2f}" if other and len(arms[base]) > 1 else ""]
        cells += [shown(runs, cosine, 3)]
        for value in (knn, linear):
            cells += [shown(runs, value, 1), difference(runs, arms[base], value, 2) if other else ""]
        print("| " + " | ".join(cells) + " |")
    print()


def report_errors(results: dict[str, Any]) -> None:
    arms, codecs = arms_of(results, "errors"), results["codecs"]
    errors = sorted((arm for arm in arms if arm[0].isdigit()), key=float)
    names = {"": "targets", "float32": "float32", **{e: f"{100 * float(e):g} %" for e in errors}, "untrained": "untrained"}
    first = {"": ["bits a value", "error left after the cut"], "float32": ["32", "0"], "untrained": ["", ""]}
    first |= {e: [f"{codecs['cifar/' + e]['bits']:.2f}", f"{100 * codecs['cifar/' + e]['error_cut']:.3g} %"] for e in errors}
    print("## Errors\n")
    table(arms, "float32", names, first)
    print(
        "| error asked for | CIFAR-10, 16 x 16: bits a value | error | after the cut | photographs, 32 x 32: bits a value |",
        end="",
    )
    print(" error | after the cut | teacher's own k-NN % | linear % |\n|" + "---|" * 9)
    for e in errors:
        cells = [names[e]]
        for kind in ("cifar", "photos"):
            c = codecs[f"{kind}/{e}"]
            cells += [f"{c['bits']:.2f}", f"{100 * c['error']:.3g} %", f"{100 * c['error_cut']:.3g} %"]
        print("| " + " | ".join(cells) + "".join(f" | {100 * codecs['teacher'][e][n]:.1f}" for n in ("knn", "linear")) + " |")
    exact = codecs["teacher"]["float32"]
    print(f"\nThe teacher's features in float32: k-NN {100 * exact['knn']:.1f} %, linear {100 * exact['linear']:.1f} %.")
    if "cache" in arms and "memory" in arms:
        pairs = list(zip(arms["cache"][0]["curve"], arms["memory"][0]["curve"], strict=True))
        apart = max(abs(a - b) / b for a, b in pairs)
        print(
            f"Through the extracted cache and in memory: training losses agree within {apart:.1e}; last {pairs[-1][0]:.6f}.\n"
        )


def report_crops(results: dict[str, Any], kind: str, title: str, distances: dict[str, Any]) -> None:
    print(f"## {title}\n\nCrop of the features against features of the crop: cosine about the mean (relative squared error).\n")
    bins = list(next(iter(distances.values())))
    print("| teacher's pixels / stored grid | " + " | ".join(f"area {b}" for b in bins) + " |\n|" + "---|" * (1 + len(bins)))
    for name, values in distances.items():
        print(f"| {name} | " + " | ".join(f"{values[b][0]:.3f} ({values[b][1]:.2f})" for b in bins) + " |")
    print()
    arms = arms_of(results, kind)
    grids = sorted((arm for arm in arms if arm.isdigit()), key=int)
    names = {"": "trained from", "replay": "replay", **{g: f"dense {g}" for g in grids}}
    if "replay" in arms:
        table(arms, "replay", names)
        if grids:
            own = {
                g: spread([r["own"]["heldout_loss"] / r["own"]["heldout_loss_of_mean"] for r in arms[g].values()])
                for g in grids
            }
            print("Against targets of its own kind: " + ", ".join(f"dense {g} {m:.4f}" for g, (m, _) in own.items()) + ".\n")
        errors = sorted((arm for arm in arms if "." in arm), key=float)
        if errors:
            print("Replay at the student's own grid, compressed (nothing averages the error away):\n")
            table(arms, "replay", {"": "targets", "replay": "float32", **{e: f"{100 * float(e):g} %" for e in errors}})


def plot(results: dict[str, Any], path: Path) -> None:
    arms = arms_of(results, "errors")
    errors = sorted((arm for arm in arms if arm[0].isdigit()), key=float)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    at = [100 * float(e) for e in errors]
    labels = ("held-out loss against float32 (1: the mean)", "k-NN, %", "linear probe, %")
    for axis, value, label in zip(axes, (loss, knn, linear), labels, strict=True):
        mean, deviation = spread([value(run) for run in arms["float32"].values()])
        axis.axhspan(mean - deviation, mean + deviation, color="0.87", label="float32, mean ± sd of seeds")
        axis.axhline(mean, color="0.5", linewidth=1)
        off = [paired(arms[e], arms["float32"], value) for e in errors]
        axis.errorbar(
            at,
            [mean + m for m, _, _ in off],
            [s for _, s, _ in off],
            marker="o",
            capsize=3,
            label="paired difference ± its error",
        )
        axis.set(xscale="log", xlabel="relative squared error of the cache, %", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    results = json.loads((given.work / "results.json").read_text())
    if arms_of(results, "errors"):
        report_errors(results)
    for kind, title in (("photos", "Photographs, dense against replay"), ("few", "CIFAR-10, dense against replay")):
        if (given.work / kind / "distances.json").exists():
            report_crops(results, kind, title, json.loads((given.work / kind / "distances.json").read_text()))
    seconds = sum(run.get("seconds", 0) for name, run in results.items() if name != "codecs")
    print(f"{sum(name != 'codecs' for name in results)} runs, {seconds / 3600:.2f} thread hours.")
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
