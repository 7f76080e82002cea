"""Figures of a cache: its bytes, the codec's error, its spectrum, and samples before and after compression."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sami_cache.report import new_figure, shorten

# Okabe and Ito's colours, as in the report of a run.
_BLUE, _ORANGE, _RED, _GREY = "#0072B2", "#E69F00", "#D55E00", "#555555"


@dataclass(frozen=True, kw_only=True)
class GalleryRow:
    """One sample of `gallery_figure`; what is None is drawn as a grey field."""

    name: str
    note: str
    """Why it is shown, and its error."""
    image: np.ndarray | None
    """uint8 [h, w, 3]; features are drawn in its shape, for their cells are parts of it."""
    teacher: np.ndarray | None
    """uint8 [grid, grid, 3]."""
    decoded: np.ndarray
    """uint8 [grid, grid, 3]."""
    lost: np.ndarray | None
    """float [grid, grid]: each cell's squared error, relative to the mean over cells of the embedding's square about `mean`."""


def bytes_figure(bars: Sequence[tuple[str, float, str]]) -> Figure:
    """Horizontal bars of (label, bytes, the same as text), the first on top."""
    figure = new_figure(8.0, 0.45 * len(bars) + 0.75)
    axes = figure.add_subplot()
    colours = [_GREY, _BLUE, _ORANGE, _RED]
    drawn = axes.barh([label for label, _, _ in bars], [value for _, value, _ in bars], color=colours[: len(bars)], height=0.65)
    axes.bar_label(drawn, [text for _, _, text in bars], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(value for _, value, _ in bars))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}")
    axes.set_xlabel("KB")
    _plain(axes)
    return figure


def error_figure(edges: Sequence[float], counts: Sequence[int], marks: Mapping[str, float]) -> Figure:
    """How many samples have which relative squared error (log axis), with labelled marks."""
    figure = new_figure(8.0, 3.6)
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color="#56B4E9")
    axes.set_ylim(0, 1.05 * max(1, *counts))
    styles = zip((_BLUE, _ORANGE, _RED, "black"), ("-", "--", "-.", ":"), strict=True)
    for (label, value), (colour, style) in zip(marks.items(), styles, strict=False):
        axes.axvline(value, color=colour, linestyle=style, linewidth=1.5, label=f"{label} {value:.3%}")
    axes.set_xlabel("relative squared error of a sample")
    axes.set_ylabel("samples")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=max(1, len(marks)), frameon=False, fontsize=9)
    _percent_axis(axes, edges[0], edges[-1])
    _plain(axes)
    return figure


def spectrum_figure(variance: Sequence[float], noise: float, marks: Mapping[int, str]) -> Figure:
    """Variance along each principal direction (log axis), the codec's rounding noise, and marked numbers of directions."""
    figure = new_figure(8.0, 3.6)
    axes = figure.add_subplot()
    values = np.array(variance, dtype=np.float64)
    floor = min(noise, float(values.max(initial=noise))) * 1e-4  # what is zero has no logarithm
    axes.plot(np.arange(1, len(values) + 1), np.maximum(values, floor), color=_BLUE, linewidth=1.6, label="variance")
    axes.axhline(noise, color=_RED, linestyle="--", linewidth=1.2, label="rounding noise, step² / 12")
    for (number, text), style in zip(marks.items(), (":", "-."), strict=False):
        axes.axvline(number, color=_GREY, linestyle=style, linewidth=1.2, label=text)
    axes.set_yscale("log")
    axes.set_xlim(0, len(values) + 1)
    axes.set_xlabel("principal direction")
    axes.set_ylabel("variance")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)
    _plain(axes)
    return figure


def gallery_figure(rows: Sequence[GalleryRow]) -> Figure:
    """A row a sample: image | teacher's features | decoded features | what compression lost, the last on one scale for all.

    Where no row has the teacher's features, only image | decoded features.
    """
    compared = any(row.teacher is not None for row in rows)
    titles = ("image", "teacher's features", "decoded features", "what compression lost")
    columns = (0, 1, 2, 3) if compared else (0, 2)
    side, margin, top, bar = 2.1, 0.45, 0.35, 0.75 if compared else 0.05
    shapes = [row.image.shape[:2] if row.image is not None else (1, 1) for row in rows]
    # No row lower than its name is long, none higher than a square.
    heights = [side * min(1.0, max(0.75, height / width)) for height, width in shapes]
    figure = new_figure(len(columns) * side + margin, 1.04 * sum(heights) + top + bar, layout=None)
    width, height = figure.get_size_inches()
    edges = {"left": margin / width, "right": 0.995, "bottom": bar / height, "top": 1 - top / height}
    grid = figure.add_gridspec(len(rows), len(columns), height_ratios=heights, wspace=0.04, hspace=0.05, **edges)
    lost = [row.lost for row in rows if row.lost is not None]
    # A few cells are many times worse than the others; past the 99.5th percentile the colour no longer changes.
    scale = Normalize(0, max(float(np.percentile(np.stack(lost), 99.5)) if lost else 0.0, 1e-12), clip=True)
    for number, row in enumerate(rows):
        for place, column in enumerate(columns):
            axes = figure.add_subplot(grid[number, place])
            middle = axes.get_position().y0 + axes.get_position().height / 2
            shown = (row.image, row.teacher, row.decoded, row.lost)[column]
            _cell(axes, shown, shapes[number], scale if column == 3 else None)
            if number == 0:
                axes.set_title(titles[column], fontsize=10)
            if place == 0:
                label = f"{shorten(row.name)}\n{row.note}"
                figure.text(
                    0.06 / width, middle, label, fontsize=7.5, rotation=90, va="center", ha="left", multialignment="center"
                )
    if compared:
        axes = figure.add_axes((margin / width + 0.25, 0.47 / height, 0.5, 0.11 / height))
        figure.colorbar(ScalarMappable(scale, "magma"), cax=axes, orientation="horizontal", extend="max")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.tick_params(labelsize=8)
        axes.set_xlabel("squared error of a cell / mean square of the sample's cells about the mean embedding", fontsize=8)
    return figure


def _cell(axes: Axes, picture: np.ndarray | None, shape: tuple[int, int], scale: Normalize | None) -> None:
    """A picture stretched to `shape`, its cells sharp: one cell of the features is one colour."""
    height, width = shape
    extent = (0.0, width, height, 0.0)
    if picture is None:
        picture, scale = np.full((1, 1, 3), 230, np.uint8), None
        axes.text(width / 2, height / 2, "not to be had", ha="center", va="center", fontsize=8, color=_GREY)
    axes.imshow(picture, interpolation="nearest", extent=extent, cmap="magma", norm=scale)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _percent_axis(axes: Axes, low: float, high: float) -> None:
    """A log axis of shares with at least three labels, which matplotlib's own do not give to less than a decade."""
    span = np.log10(high / low)
    digits = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if span < 0.8 else (1, 2, 5) if span < 3 else (1,)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    axes.set_xscale("log")
    axes.set_xlim(low / (high / low) ** 0.03, high * (high / low) ** 0.03)
    ticks = [tick for power in decades for digit in digits if low <= (tick := digit * 10.0**power) <= high]
    axes.set_xticks(ticks if len(ticks) > 1 else [low, high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.xaxis.set_minor_locator(NullLocator())


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
