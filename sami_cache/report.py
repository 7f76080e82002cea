"""Figures of a training run: matplotlib `Figure`s without pyplot, that is, without a window or global state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DPI = 110
# Okabe and Ito's colours, told apart by everyone; what is trained on is thin, what is held out has dots.
_LOSSES = {
    "loss": ("training loss", {"color": "#0072B2", "linewidth": 1.6}),
    "loss_visible": ("visible tokens", {"color": "#56B4E9", "linewidth": 0.9}),
    "loss_masked": ("masked tokens", {"color": "#CC79A7", "linewidth": 0.9}),
    "heldout_loss": ("held-out loss", {"color": "black", "linewidth": 1.2, "marker": "o", "markersize": 4}),
}
_COSINE = ("held-out cosine", {"color": "#D55E00", "linewidth": 1.6, "marker": "s", "markersize": 4})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of `reconstruction_figure`; pictures are uint8 [h, w, 3] of any size, squares look best."""

    name: str
    image: np.ndarray
    masked: np.ndarray
    """The image with the masked patches blanked, as the student saw it."""
    target: np.ndarray
    prediction: np.ndarray
    cosine: float


def loss_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses (left axis) and held-out cosine (right axis) against the optimizer step; `lines` as in RUN/metrics.jsonl.

    A line need not hold every value, and values that are null are left out. Training losses are drawn as running means over a
    tenth of the curve; behind them, pale, the loss as logged.
    """
    figure = new_figure(8.0, 4.5)
    left = figure.add_subplot()
    drawn = []
    for key, (label, style) in _LOSSES.items():
        if not _has(lines, key):
            continue
        steps, values = _series(lines, key)
        if key == "loss":  # one batch's loss says as much about the batch as about the student
            left.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.35)
        drawn.append(left.plot(steps, values if key == "heldout_loss" else _running_mean(values), label=label, **style)[0])
    left.set_xlabel("optimizer step")
    left.set_ylabel("loss")
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    left.spines["top"].set_visible(False)
    if _has(lines, "heldout_cosine"):
        label, style = _COSINE
        right = left.twinx()
        steps, values = _series(lines, "heldout_cosine")
        drawn.append(right.plot(steps, values, label=label, **style)[0])
        right.set_ylabel("cosine to the target", color=style["color"])
        right.tick_params(axis="y", colors=style["color"])
        right.set_ylim(min(0.0, *values), 1)
        right.spines["top"].set_visible(False)
    # Above the axes, where no curve can run under it.
    left.legend(handles=drawn, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(drawn) or 1, frameon=False, fontsize=9)
    return figure


def pca_rgb(features: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Features [..., C] as colours: uint8 [..., 3], their first three principal components as red, green and blue.

    Basis and range come from `like` [..., C], by default the features themselves: pictures made with the same `like` have
    the same colours for the same features. The range is from the 2nd to the 98th percentile; beyond it colours are clipped.
    """
    reference = (features if like is None else like).reshape(-1, features.shape[-1]).astype(np.float64)
    mean = reference.mean(0)
    basis = np.linalg.svd(reference - mean, full_matrices=False)[2][:3].T
    basis *= np.sign(basis[np.abs(basis).argmax(0), range(basis.shape[1])])  # an eigenvector's sign is nobody's choice
    low, high = np.percentile((reference - mean) @ basis, (2, 98), axis=0)
    colours = ((features - mean) @ basis - low) / np.maximum(high - low, 1e-12)
    rgb = np.zeros((*features.shape[:-1], 3), np.uint8)  # with fewer than three channels the rest stays dark
    rgb[..., : basis.shape[1]] = (colours.clip(0, 1) * 255).round()
    return rgb


def reconstruction_figure(rows: Sequence[Row], titles: tuple[str, str, str, str], caption: str = "") -> Figure:
    """A row for every image: image | as the student saw it | target | prediction, with the row's cosine beside it."""
    side, margin, top, bottom = 2.0, 0.45, 0.4, 0.35 if caption else 0.05
    figure = new_figure(4 * side + margin, len(rows) * side + top + bottom, layout=None)
    width, height = figure.get_size_inches()
    grid = figure.add_gridspec(
        len(rows), 4, left=margin / width, right=0.995, bottom=bottom / height, top=1 - top / height, wspace=0.03, hspace=0.03
    )
    for number, row in enumerate(rows):
        for column, picture in enumerate((row.image, row.masked, row.target, row.prediction)):
            axes = figure.add_subplot(grid[number, column])
            show_picture(axes, picture)
            if number == 0:
                axes.set_title(titles[column], fontsize=10)
            if column == 0:
                axes.set_ylabel(shorten(row.name), fontsize=8)
            if column == 3:
                box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2}
                axes.text(0.96, 0.05, f"cosine {row.cosine:.2f}", transform=axes.transAxes, ha="right", fontsize=9, bbox=box)
    if caption:
        figure.text(0.5, 0.1 / height, caption, ha="center", fontsize=8.5, color="#444444")
    return figure


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """A figure of `width` x `height` inches that draws without a window."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def _has(lines: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(line.get(key) is not None for line in lines)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: list[float]) -> np.ndarray:
    """Each value's mean with those before it, over at most a tenth of them all."""
    window = max(1, len(values) // 10)
    sums = np.cumsum([0.0, *values])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - window)
    return (sums[last] - sums[first]) / (last - first)


def show_picture(axes: Axes, picture: np.ndarray) -> None:
    """Fill the axes with uint8 [h, w, 3] and nothing else."""
    # Not smoothed: a cell of the features is one colour, and there are as many as there are.
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def shorten(name: str, length: int = 26) -> str:
    """The end of a long key as matplotlib shows it: to it, what stands between two dollars is a formula."""
    shown = "".join(char if char.isprintable() else "?" for char in name[-length - 1 :])
    return (shown if len(shown) <= length else "…" + shown[1 - length :]).replace("$", r"\$")
