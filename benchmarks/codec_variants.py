"""What was tried for the codec `pca`: transforms, orders, quantisers, zstd's settings, each judged at the same error.

    OMP_NUM_THREADS=1 python benchmarks/codec_variants.py --data DIR [--layer L --image-size S --grid G] [--out FILE.md]

All but the group `coder` stays what stock Zarr v3 with zstd reads and linear numpy decodes. A variant differs from the recipe
in one thing, and its step is chosen so that the held-out images lose exactly 1 %: channels rotated by PCA, a DCT of blocks
(8 x 8, or 7 x 7 where 8 does not divide the grid), one step, rounding up from 0.55, coefficients with a variance above
step^2 / 6 in the order of falling variance, [samples, kept, blocks], zstd level 1 with a window of 16 KB. "Samples side by
side" is [kept, samples, blocks] in a chunk, which Zarr v3's codec `transpose` undoes.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from codec_methods import Coder, Lzma, Pcodec, Zstd, installed
from rate_distortion import (
    Features,
    add_arguments,
    class_entropy,
    dct_matrix,
    entropy,
    load_features,
    markdown,
    principal,
    setting_of,
    water_filling,
)

ERROR = 0.01
BANDS = {2: [1], 3: [1, 3], 4: [1, 2, 4], 6: [1, 2, 3, 5, 8]}
"""Sums of the two frequencies at which a band begins, the first at 0."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A recipe; the defaults are ours."""

    transform: str = "dct 8"
    order: str = "variance"
    drop: float = 1 / 6
    """Coefficients whose variance lies below this share of step^2 are not stored."""
    round_up: float = 0.55
    widen: float = 0.0
    """Added to `round_up`: this x step / standard deviation, 0.75 at most: rare coefficients get a wider dead zone."""
    gain: bool = False
    """Decode with a step of its own for each coefficient, the least-squares one, instead of one step."""
    samples: int = 8
    """In a chunk."""
    together: bool = False
    """A coefficient of all samples of the chunk side by side."""
    zstd: dict[str, int] = field(default_factory=lambda: {"level": 1, "window_log": 14, "min_match": 7, "hash_log": 6})
    coder: str = "zstd"
    """Or `lzma`, or `pcodec N` with N groups of coefficients."""


@dataclass(kw_only=True)
class Coefficients:
    """Of both halves, float32 [samples, coefficients, blocks], by falling variance on the fitted half."""

    fit: np.ndarray
    held_out: np.ndarray
    power: np.ndarray
    """Variance on the fitted half, float64 [coefficients]."""
    channel: np.ndarray
    frequency: np.ndarray
    """Of each coefficient: the rank of its channel; the sum of its two frequencies, 0 without a transform in space."""


def haar(size: int) -> np.ndarray:
    """The orthonormal Haar wavelet, float64 [coefficient, position]."""
    if size == 1:
        return np.ones((1, 1))
    return np.concatenate([np.kron(haar(size // 2), [1, 1]), np.kron(np.eye(size // 2), [1, -1])]) / np.sqrt(2)


def blocks_of(maps: np.ndarray, block: int) -> np.ndarray:
    """[n, C, g, g] -> [n, C, block * block, blocks]."""
    n, channels, grid, _ = maps.shape
    cut = maps.reshape(n, channels, grid // block, block, grid // block, block)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(n, channels, block * block, -1)


def rotate(basis: np.ndarray, maps: np.ndarray) -> np.ndarray:
    return (basis @ maps.reshape(*maps.shape[:2], -1)).reshape(len(maps), len(basis), *maps.shape[2:])


def transform(name: str, features: Features) -> Coefficients:
    """Every name with a block B but the first, which transforms the channels alone.

    `none`, `dct B`, `haar B`, `klt B` (one learned transform of a block for all channels), `klt per channel B`, `dct B, no
    PCA`, `dct B, PCA per frequency` (each frequency of a block has a rotation of its own), `dct B, PCA per N bands`
    (frequencies whose sums are alike share one), `dct B, dct of neighbours` (the four lowest frequencies again, over the
    blocks).
    """
    kind, _, rest = name.partition(" ")
    block = int(next((word for word in name.replace(",", "").split() if word.isdigit()), 1))
    _, basis = principal(features.fit, features.mean)
    if name.endswith(("no PCA", "PCA per frequency", "bands")):
        basis = np.eye(len(basis), dtype=np.float32)
    halves = [blocks_of(rotate(basis, half - features.mean), block) for half in (features.fit, features.held_out)]
    if kind == "klt":
        # [n, C, p, blocks]: the covariance of the positions of a block, of all channels or of each one.
        axes = "ncpb,ncqb->cpq" if "per channel" in rest else "ncpb,ncqb->pq"
        matrix = np.linalg.eigh(np.einsum(axes, halves[0], halves[0], optimize=True))[1]
        matrix = np.swapaxes(matrix, -1, -2)[..., ::-1, :].astype(np.float32)
    elif kind == "none":
        matrix = np.ones((1, 1), np.float32)
    else:
        line = (haar if kind == "haar" else dct_matrix)(block)
        matrix = np.kron(line, line).astype(np.float32)
    halves = [matrix @ half for half in halves]  # [n, C, frequency, blocks]
    if name.endswith(("PCA per frequency", "bands")):
        rank = np.add.outer(np.arange(block), np.arange(block)).ravel()
        band = np.arange(block * block) if name.endswith("frequency") else np.digitize(rank, BANDS[int(name.split()[-2])])
        for number in range(band.max() + 1):
            inside = band == number
            part = halves[0][:, :, inside]
            _, basis = principal(part, np.zeros((len(basis), 1, 1), np.float32))
            for half in halves:
                half[:, :, inside] = rotate(basis, half[:, :, inside])
    frequency = np.add.outer(np.arange(block), np.arange(block)).ravel()
    channel = np.repeat(np.arange(halves[0].shape[1]), block * block)
    frequency = np.tile(frequency, halves[0].shape[1])
    if name.endswith("dct of neighbours"):
        again = dct_matrix(int(np.sqrt(halves[0].shape[3])))
        low = [0, 1, block, block + 1]
        for half in halves:
            half[:, :, low] = half[:, :, low] @ np.kron(again, again).T.astype(np.float32)
    fit, held_out = (half.reshape(len(half), -1, half.shape[3]) for half in halves)
    power = np.square(fit, dtype=np.float32).mean((0, 2), dtype=np.float64)
    order = np.argsort(-power, kind="stable")
    return Coefficients(
        fit=fit[: min(len(fit), 64), order],
        held_out=held_out[:, order],
        power=power[order],
        channel=channel[order],
        frequency=frequency[order],
    )


@dataclass(kw_only=True)
class Outcome:
    bits: float
    entropy: float
    """With a frozen histogram for each of 64 groups of coefficients."""
    block_entropy: float
    """With a histogram for each 16 KB of codes that costs nothing: zstd's Huffman coder pays for its tables on top."""
    kept: int
    step: float
    decode: float
    """GB/s of codes."""


def quantise(values: np.ndarray, power: np.ndarray, step: float, variant: Variant) -> np.ndarray:
    ratio = step / np.sqrt(np.maximum(power, 1e-30))
    round_up = np.minimum(variant.round_up + variant.widen * ratio, max(0.75, variant.round_up)).astype(np.float32)
    codes = np.floor(np.abs(values) * np.float32(1 / step) + (1 - round_up)[:, None])
    return np.copysign(codes, values, out=codes)


def as_digits(codes: np.ndarray) -> np.ndarray:
    """int8 [n, rows, blocks]: a coefficient that is ever wider than int8 as two rows, 255 x the first + the second."""
    wide = (np.abs(codes) > 127).any((0, 2))
    high = np.rint(codes[:, wide] / 255)
    codes[:, wide] -= 255 * high
    return np.concatenate([high, codes], 1).astype(np.int8)


def gains(values: np.ndarray, codes: np.ndarray, step: float) -> np.ndarray:
    """The least-squares step of each coefficient."""
    squares = np.square(codes).sum((0, 2))
    return np.where(squares > 0, (values * codes).sum((0, 2)) / np.maximum(squares, 1), step).astype(np.float32)


def judge(variant: Variant, coefficients: Coefficients) -> Outcome:
    """Bits at exactly ERROR on the held-out half, by the secant method on log(error) against log(step)."""
    power, total = coefficients.power, float(np.square(coefficients.held_out, dtype=np.float64).sum())

    def at(step: float) -> tuple[float, np.ndarray, np.ndarray]:
        kept = np.flatnonzero(power > variant.drop * step * step)
        values = coefficients.held_out[:, kept]
        codes = quantise(values, power[kept], step, variant)
        steps: np.ndarray | np.float32 = np.float32(step)
        if variant.gain:
            fit = coefficients.fit[:, kept]
            steps = gains(fit, quantise(fit, power[kept], step, variant), step)[:, None]
        saved = np.square(values, dtype=np.float64).sum() - np.square(values - codes * steps, dtype=np.float64).sum()
        return float(1 - saved / total), codes, kept

    step = float(np.sqrt(12 * ERROR * power.mean()))
    error, codes, kept = at(step)
    slope = 1.4
    for _ in range(8):
        if abs(error / ERROR - 1) < 2e-4:
            break
        before = np.log(step), np.log(error)
        step *= (ERROR / error) ** (1 / slope)
        error, codes, kept = at(step)
        slope = float(np.clip((np.log(error) - before[1]) / (np.log(step) - before[0]), 0.5, 2.5))
    values = coefficients.held_out.size
    order = arrange(variant.order, coefficients, kept)
    codes = as_digits(codes[:, order])
    chunks = [codes[start : start + variant.samples] for start in range(0, len(codes), variant.samples)]
    chunks = [np.ascontiguousarray(chunk.swapaxes(0, 1) if variant.together else chunk) for chunk in chunks]
    coder = make_coder(variant, chunks[0])
    packed = [coder.pack(chunk) for chunk in chunks]
    room = np.empty_like(chunks[0])
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for chunk, data in zip(chunks, packed, strict=True):
            coder.unpack(data, room[: len(chunk)])
        seconds.append(time.perf_counter() - started)
    raw = [chunk.tobytes() for chunk in chunks]
    in_blocks = sum(
        entropy(np.frombuffer(chunk[start : start + 16384], np.int8)) * len(chunk[start : start + 16384])
        for chunk in raw
        for start in range(0, len(chunk), 16384)
    )
    return Outcome(
        bits=8 * sum(map(len, packed)) / values,
        entropy=class_entropy(codes) * codes.size / values,
        block_entropy=in_blocks / values,
        kept=len(kept),
        step=step,
        decode=sum(map(len, raw)) / min(seconds) / 1e9,
    )


def make_coder(variant: Variant, codes: np.ndarray) -> Coder:
    kind, _, count = variant.coder.partition(" ")
    if kind == "pcodec":
        return Pcodec(codes, int(count))
    return Lzma() if kind == "lzma" else Zstd(**variant.zstd)


def arrange(order: str, coefficients: Coefficients, kept: np.ndarray) -> np.ndarray:
    channel, frequency = coefficients.channel[kept], coefficients.frequency[kept]
    magnitude = np.abs(coefficients.fit[:, kept]).mean((0, 2))
    zeros = (np.abs(coefficients.fit[:, kept]) < 0.5 * np.sqrt(coefficients.power[kept])[:, None]).mean((0, 2))
    keys = {
        "variance": (np.arange(len(kept)),),
        "magnitude": (-magnitude,),
        "peakedness": (zeros, np.arange(len(kept)) // 512),
        "frequency, channel": (channel, frequency),
        "channel, frequency": (frequency, channel),
    }
    return np.lexsort(keys[order])


SMALL = {"level": 1, "window_log": 14, "min_match": 7, "hash_log": 6}


def recipe(grid: int) -> Variant:
    return Variant(transform=f"dct {next(block for block in (8, 7, 4, 2, 1) if grid % block == 0)}")


def trials(ours: Variant, grid: int) -> dict[str, list[tuple[str, Variant]]]:
    """Groups of variants, each with its name."""

    def zstd(**changes: int) -> Variant:
        return replace(ours, zstd={**SMALL, **changes})

    counts = (1, 16, 64) if installed("pcodec", "pcodec") else ()
    own = ours.transform
    block = int(own.split()[1])
    divisors = [size for size in (2, 4, 7, 8, 14, 16, 32) if grid % size == 0]
    spatial = ["none", *(f"dct {size}" for size in divisors if size != block), f"dct {block}, no PCA"]
    spatial += [f"haar {size}" for size in (8,) if size in divisors]
    spatial += [f"{kind} {size}" for kind in ("klt", "klt per channel") for size in divisors if size <= 8]
    spatial += [f"dct {size}, PCA per frequency" for size in divisors if size <= 8]
    spatial += [*(f"{own}, PCA per {bands} bands" for bands in BANDS), f"{own}, dct of neighbours"]
    bands = f"{own}, PCA per 6 bands"
    side = replace(ours, together=True, samples=16)
    fine = replace(side, order="peakedness", round_up=0.5, widen=0.1)
    return {
        "transform": [(name, replace(ours, transform=name)) for name in spatial],
        "order": [
            *((f"by {name}", replace(ours, order=name)) for name in ("magnitude", "peakedness")),
            *((f"by {name}", replace(ours, order=name)) for name in ("frequency, channel", "channel, frequency")),
            *((f"{count} samples side by side", replace(ours, together=True, samples=count)) for count in (8, 16, 32)),
        ],
        "quantiser": [
            *((f"rounding up from {value}", replace(ours, round_up=value)) for value in (0.5, 0.6, 0.65)),
            *(
                (f"rounding up from 0.5 + {value} step / deviation", replace(ours, round_up=0.5, widen=value))
                for value in (0.05, 0.1)
            ),
            *((f"kept above {value:.3g} step^2", replace(ours, drop=value)) for value in (1 / 12, 0.25, 0.35, 0.5)),
            ("a least-squares step for each coefficient", replace(ours, gain=True)),
            ("the same, rounding up from 0.6", replace(ours, gain=True, round_up=0.6)),
            ("the same, rounding up from 0.65", replace(ours, gain=True, round_up=0.65)),
        ],
        "zstd": [
            ("level 1, untouched", replace(ours, zstd={"level": 1})),
            ("level 3, untouched", replace(ours, zstd={"level": 3})),
            ("level 9, untouched", replace(ours, zstd={"level": 9})),
            ("level 19, untouched", replace(ours, zstd={"level": 19})),
            *((f"window of {2**log // 1024} KB", zstd(window_log=log)) for log in (12, 13, 15, 16, 17)),
            *((f"matches from {length} bytes", zstd(min_match=length)) for length in (4, 5, 6)),
            ("hash of 2^12", zstd(hash_log=12)),
            ("level 9, 16 KB window", zstd(level=9)),
        ],
        "chunk": [(f"{count} samples", replace(ours, samples=count)) for count in (1, 4, 16, 32)],
        "coder": [
            ("LZMA", replace(ours, coder="lzma")),
            *((f"pcodec, {count} groups", replace(ours, coder=f"pcodec {count}")) for count in counts),
        ],
        "several": [
            ("16 samples side by side, 6 bands", replace(side, transform=bands)),
            ("the same, by peakedness, rounding up from 0.5 + 0.1 step / deviation", replace(fine, transform=bands)),
            *(
                (f"6 bands, pcodec, {count} groups", replace(ours, transform=bands, coder=f"pcodec {count}"))
                for count in counts[1:2]
            ),
        ],
    }


def main(arguments: list[str] | None = None, report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", nargs="*", help="groups of variants")
    given = parser.parse_args(arguments)
    setting = setting_of(given)
    features = load_features(given.data, given.teacher, given.weights, setting, limit=given.limit, folder=given.features)
    ours = recipe(given.grid)
    made: dict[str, Coefficients] = {}
    rows: list[list[str]] = []
    base = 0.0
    for group, variants in {"recipe": [("ours", ours)], **trials(ours, given.grid)}.items():
        if given.only and group not in (*given.only, "recipe"):
            continue
        for name, variant in variants:
            if variant.transform not in made:
                made = {key: value for key, value in made.items() if key == ours.transform}  # room for one more
                made[variant.transform] = transform(variant.transform, features)
            coefficients = made[variant.transform]
            outcome = judge(variant, coefficients)
            base = base or outcome.bits
            bound = water_filling(coefficients.power, ERROR * coefficients.power.mean())
            row = [group, name, f"{outcome.bits:.3f}", f"{outcome.bits / base - 1:+.1%}", f"{outcome.entropy:.3f}"]
            row += [f"{outcome.block_entropy:.3f}", f"{bound:.3f}", str(outcome.kept), f"{outcome.decode:.2f}"]
            rows.append(row)
            report(" | ".join(row))
    head = [
        "group",
        "variant",
        "bits",
        "to ours",
        "entropy by class",
        "entropy by 16 KB",
        "Gaussian bound",
        "kept",
        "codes GB/s",
    ]
    text = f"{given.teacher}, {setting}: {len(features.held_out)} held-out images, fitted on {len(features.fit)} others.\n\n"
    text += markdown(head, rows)
    report(f"\n{text}")
    if given.out:
        given.out.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
