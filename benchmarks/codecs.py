"""Rate-distortion curves of the codec `pca` and of its peers, at equal error, with entropies, Gaussian bounds and speeds.

    OMP_NUM_THREADS=1 python benchmarks/codecs.py --data DIR [--out benchmarks/results/codecs-HARDWARE-DATE.md]

Half of the images is what a codec is fitted on, the other half what it is judged by. A method turns embeddings into codes (and
loses something), a coder turns codes into bytes (and loses nothing); both work on pieces of about 0.8 MB of codes, a
cache's chunk. Bits are those of the bytes for each float32 of the embeddings. One thread.

Peers that are not dependencies of sami-cache: pip install faiss-cpu constriction pcodec blosc2
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from codec_methods import (
    OURS,
    STORED,
    ChannelPCA,
    Coder,
    Float16,
    Method,
    coders,
    families,
    few_values,
    fit_codec,
    installed,
    say,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rate_distortion import (
    Features,
    Setting,
    add_arguments,
    class_entropy,
    entropy,
    load_features,
    markdown,
    setting_of,
    spectra,
    water_filling,
)

TARGETS = (0.001, 0.01, 0.03, 0.1)
PIECE_BYTES = 800_000
TIMED_SAMPLES, ROUNDS = 64, 5
# Stages of efficientnet_lite0: 24 channels at stride 4, 40 at 8, 112 at 16, 320 at 32; averaged down to the grid.
SETTINGS = (
    Setting(layer="1", image_size=224, grid=14),
    Setting(layer="1", image_size=512, grid=32),
    Setting(layer="2", image_size=224, grid=14),
    Setting(layer="2", image_size=512, grid=32),
    Setting(layer="3", image_size=224, grid=14),
    Setting(layer="3", image_size=512, grid=32),
    Setting(layer="4", image_size=448, grid=14),
    Setting(layer="4", image_size=1024, grid=32),
)


# Measuring.


@dataclass(kw_only=True)
class Point:
    """A method with one value of its parameter, on the held-out half."""

    parameter: Any
    error: float
    entropy: float
    """Bits a value, one histogram for all codes."""
    class_entropy: float
    bits: dict[str, float]
    """Of each coder."""
    method: Method
    codes: np.ndarray


@dataclass(kw_only=True)
class Speed:
    """Seconds for the timed samples, the best of the rounds."""

    quantise: float = np.inf
    pack: dict[str, float] = field(default_factory=dict)
    unpack: dict[str, float] = field(default_factory=dict)
    restore: dict[str, float] = field(default_factory=dict)
    """Unpack and decode to float32."""


def encode_parts(method: Method, embeddings: np.ndarray) -> np.ndarray:
    return np.concatenate([method.encode(embeddings[start : start + 8]) for start in range(0, len(embeddings), 8)])


def pieces(codes: np.ndarray) -> Iterator[slice]:
    """Samples of about PIECE_BYTES of codes, a power of two of them, as a cache's chunk."""
    size = int(min(64, 2 ** max(0, round(np.log2(PIECE_BYTES / codes[:1].nbytes)))))
    return (slice(start, min(start + size, len(codes))) for start in range(0, len(codes), size))


def judge(name: str, parameter: Any, method: Method, features: Features, only: tuple[str, ...] | None = None) -> Point:
    """Error, entropies and the size under every coder (or `only` some); that they give back what they got is checked."""
    held_out = features.held_out
    codes = encode_parts(method, held_out)
    lost = sum(float(np.square(held_out[part] - method.decode(codes[part]), dtype=np.float64).sum()) for part in pieces(codes))
    ratio = codes.size / held_out.size
    overall = entropy(codes) * ratio
    by_class = class_entropy(codes) * ratio if few_values(codes) else overall
    packed = {}
    for coder_name, coder in coders(name, encode_parts(method, features.fit[:TIMED_SAMPLES]), codes).items():
        if only and coder_name not in only:
            continue
        total = 0
        for number, part in enumerate(pieces(codes)):
            data = coder.pack(codes[part])
            total += len(data)
            if number == 0:
                out = np.empty_like(codes[part])
                coder.unpack(data, out)
                if not np.array_equal(out.view(np.uint8), codes[part].view(np.uint8)):
                    raise AssertionError(f"{coder_name} does not give back the codes of {name}")
        packed[coder_name] = 8 * total / held_out.size
    error = lost / held_out.size / features.energy
    best = min(packed, key=lambda coder: packed[coder])
    say(f"  {name} {parameter}: error {error:.3g}, {packed[best]:.2f} bits with {best}")
    return Point(
        parameter=parameter,
        error=error,
        entropy=overall,
        class_entropy=by_class,
        bits=packed,
        method=method,
        codes=codes,
    )


def measure_curves(features: Features) -> dict[str, list[Point]]:
    curves = {}
    for name, parameters in families(features).items():
        points = [judge(name, parameter, make(), features) for parameter, make in parameters.items()]
        curves[name] = sorted(points, key=lambda point: point.error)
    return curves


def at_error(points: list[Point], value: Callable[[Point], float], error: float) -> float | None:
    """`value` at an error between two points, linear in log(error); None where the curve does not reach."""
    for left, right in pairwise(points):
        if left.error <= error <= right.error:
            share = np.log(error / left.error) / np.log(right.error / left.error)
            return float(value(left) * (1 - share) + value(right) * share)
    return None


def measure_speeds(curves: dict[str, list[Point]], features: Features) -> dict[str, Speed]:
    """Of each method at the parameter nearest to 1 %, all of them in turn, so that a busy moment hits them alike."""
    chosen = {name: min(points, key=lambda point: abs(np.log(point.error / 0.01))) for name, points in curves.items()}
    packers = {
        name: coders(name, encode_parts(point.method, features.fit[:TIMED_SAMPLES]), point.codes)
        for name, point in chosen.items()
    }
    speeds = {name: Speed() for name in chosen}
    for number in range(ROUNDS):
        say(f"  round {number + 1} of {ROUNDS}")
        for name, point in chosen.items():
            speed, codes, values = speeds[name], point.codes[:TIMED_SAMPLES], features.held_out[:TIMED_SAMPLES]
            speed.quantise = min(speed.quantise, _seconds(lambda p=point, c=codes, v=values: _quantise(p.method, c, v)))
            for coder_name, coder in packers[name].items():
                if number and speed.pack[coder_name] > 2:
                    continue  # slow enough that one round tells
                packed: list[bytes] = []
                seconds = _seconds(lambda c=coder, k=codes, p=packed: p.extend(c.pack(k[part]) for part in pieces(k)))
                _least(speed.pack, coder_name, seconds)
                for store, method in ((speed.unpack, None), (speed.restore, point.method)):
                    _least(store, coder_name, _seconds(lambda c=coder, k=codes, p=packed, m=method: _unpack(c, k, p, m)))
    return speeds


def _quantise(method: Method, codes: np.ndarray, values: np.ndarray) -> None:
    for part in pieces(codes):
        method.encode(values[part])


def _unpack(coder: Coder, codes: np.ndarray, packed: list[bytes], method: Method | None) -> None:
    parts = list(pieces(codes))
    room = np.empty_like(codes[parts[0]])  # a loader reuses its buffers
    for part, data in zip(parts, packed, strict=True):
        out = room[: part.stop - part.start]
        coder.unpack(data, out)
        if method is not None:
            method.decode(out)


def _least(store: dict[str, float], name: str, seconds: float) -> None:
    store[name] = min(seconds, store.get(name, np.inf))


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# Reporting.


def bounds(features: Features, errors: tuple[float, ...] | np.ndarray = TARGETS) -> dict[str, list[float]]:
    """Bits a value of the two Gaussian bounds at each error, from the held-out images' own spectra."""
    flat, spatial = spectra(features.held_out, features.mean)
    return {
        "Gaussian bound, PCA spectrum": [water_filling(flat, error * features.energy) for error in errors],
        "Gaussian bound, PCA x 2-D DCT spectrum": [water_filling(spatial, error * features.energy) for error in errors],
    }


def table(curves: dict[str, list[Point]], speeds: dict[str, Speed], features: Features) -> str:
    """All methods and coders, sorted by bits at 1 % (or at their own error, in brackets)."""
    ours = at_error(curves[OURS], lambda point: point.bits[STORED], 0.01) or np.nan
    megabytes = features.held_out[:TIMED_SAMPLES].nbytes / 1e6
    rows, idle = [], []
    for name, points in curves.items():
        speed, codes = speeds[name], min(points, key=lambda point: abs(np.log(point.error / 0.01))).codes[:TIMED_SAMPLES]
        for coder in points[0].bits:
            if (
                coder != "none"
                and "none" in points[0].bits
                and all(point.bits[coder] > 0.99 * point.bits["none"] for point in points)
            ):
                idle.append(f"{coder} on {name}")
                continue

            def cells(value: Callable[[Point], float], points: list[Point] = points) -> list[str]:
                if len(points) == 1:
                    return ["", f"({value(points[0]):.2f})", "", ""]
                return [_number(at_error(points, value, error)) for error in TARGETS]

            def bits(point: Point, coder: str = coder) -> float:
                return point.bits[coder]

            at_one = bits(points[0]) if len(points) == 1 else at_error(points, bits, 0.01)
            rows.append(
                (
                    at_one if at_one is not None else np.inf,
                    [
                        f"{name} (error {points[0].error:.1e})" if len(points) == 1 else name,
                        coder,
                        *cells(bits),
                        _number(at_one / ours if at_one is not None else None),
                        cells(lambda point: point.class_entropy)[1],
                        cells(lambda point: point.entropy)[1],
                        f"{megabytes / (speed.quantise + speed.pack[coder]):.0f}",
                        f"{codes.nbytes / 1e9 / speed.unpack[coder]:.2f}",
                        f"{megabytes / 1e3 / speed.restore[coder]:.2f}",
                    ],
                )
            )
    for name, values in bounds(features).items():
        rows.append((values[1], [name, "", *map(_number, values), _number(values[1] / ours), *[""] * 5]))
    rows.sort(key=lambda row: row[0])
    head = ["method", "coder", *(f"{error:.1%}" for error in TARGETS), "x ours", "entropy by class", "entropy"]
    head += ["encode MB/s", "codes GB/s", "float32 GB/s"]
    note = f"\n\nLeft out, because they save less than 1 %: {'; '.join(idle)}." if idle else ""
    return markdown(head, [cells for _, cells in rows]) + note


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(curves: dict[str, list[Point]], features: Features, title: str) -> Figure:
    """Bits against error: every method with the coder that stock Zarr reads and that is smallest at 1 %."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        readable = [coder for coder in points[0].bits if coder == STORED or coder.startswith(("zstd", "blosc "))]
        near = min(points, key=lambda point: abs(np.log(point.error / 0.01)))
        coder = STORED if name == OURS else min(readable, key=lambda coder: near.bits[coder])
        values = [point.bits[coder] for point in points]
        thick = 2.5 if name == OURS else 1.2
        axes.plot([point.error for point in points], values, "o-", ms=4, lw=thick, label=f"{name}, {coder}")
    errors = np.geomspace(3e-8, 0.4, 60)
    for (name, values), style in zip(bounds(features, errors).items(), ("k--", "k:"), strict=True):
        axes.plot(errors, values, style, lw=1.2, label=name)
    axes.set(
        xscale="log",
        xlim=(3e-8, 0.6),
        ylim=(0, 18),
        xlabel="relative squared error, held-out images",
        title=title.replace(": ", "\n"),
    )
    axes.set_ylabel("bits a value, as stored")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def at_one_percent(point: Point, coder: str, features: Features) -> float:
    """Bits of a method that missed 1 % by little: every code costs log2(step) bits, the error grows with step^2."""
    codes = point.codes.size / features.held_out.size
    return point.bits[coder] + 0.5 * float(np.log2(point.error / 0.01)) * codes


def stages(given: argparse.Namespace, settings: tuple[Setting, ...]) -> str:
    """Bits at 1 % for several stages and resolutions."""
    rows, limit = [], min(given.limit, 128)
    for setting in settings:
        features = load_features(given.data, given.teacher, given.weights, setting, limit=limit, folder=given.features)
        channels = features.fit.shape[1]
        point = judge(OURS, 0.01, fit_codec("pca", features.fit, error=0.01), features, (STORED,))
        only = judge("PCA only", 0.01, ChannelPCA(features, 0.01), features, ("zstd 1", "zstd 1, 16 KB window"))
        half = judge("float16", "", Float16(), features, ("zstd 3",))
        bound = [values[0] for values in bounds(features, (0.01,)).values()]

        cells = [at_one_percent(point, STORED, features)]
        cells += [at_one_percent(only, coder, features) for coder in ("zstd 1", "zstd 1, 16 KB window")]
        cells.append(half.bits["zstd 3"])
        rows.append(
            [f"{setting}, {channels} channels", *map(_number, cells), f"{cells[0] / cells[1]:.2f}", *map(_number, bound)]
        )
    head = [
        "embeddings",
        OURS,
        "PCA only, zstd 1",
        "PCA only, zstd 1, 16 KB window",
        "float16, zstd 3",
        "ours / PCA only, zstd 1",
    ]
    return markdown([*head, "bound, PCA", "bound, PCA x DCT"], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--no-stages", action="store_true", help="leave out the other stages of efficientnet_lite0")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    started = time.perf_counter()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        say("speeds are not per core: set OMP_NUM_THREADS=1")
    for module in ("constriction", "pcodec", "blosc2"):
        installed(module, module)
    setting = setting_of(given)
    features = load_features(given.data, given.teacher, given.weights, setting, limit=given.limit, folder=given.features)
    count = f"{len(features.held_out)} held-out images, fitted on {len(features.fit)} others"
    title = f"{given.teacher}, {setting}, {features.fit.shape[1]} channels: {count}"
    say(title)
    curves = measure_curves(features)
    text = [title + ".\n", table(curves, measure_speeds(curves, features), features)]
    if not given.no_stages and given.teacher == "efficientnet_lite0":
        settings = tuple(replace(each, grid=min(each.grid, given.grid)) for each in SETTINGS)
        text += ["\n## Stages and resolutions\n\nBits a value at 1 %.\n", stages(given, settings)]
    teacher = "without" if given.features else "with"
    text.append(f"\n{time.perf_counter() - started:.0f} s, {teacher} the teacher's time for embeddings that were kept.")
    print("\n".join(text))
    if given.out:
        given.out.with_suffix(".md").write_text("\n".join(text) + "\n")
        plot(curves, features, title).savefig(given.out.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
