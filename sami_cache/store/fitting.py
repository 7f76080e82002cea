"""Fitting a codec to a sample of a teacher's embeddings. `codecs.py` says what comes of it, docs/codec.md why."""

from typing import Any

import numpy as np

from sami_cache.errors import SamiCacheError
from sami_cache.store.codecs import CODECS, DIGIT, ROUND_UP_FROM, Codec, block_dct, dct_matrix, parts

MAX_DIGITS = 3
HEADROOM = 2
"""How far a coefficient may reach before it is clipped, at least: so many times its largest magnitude in the sample."""
# In units of step^2. To store a coefficient of less variance takes more bytes than a smaller step for the others: at 1 % on
# photographs 0.4 % more than from 1 / 12, the noise of the step (docs/codec.md).
KEEP_FROM = 0.16
_JUDGED_VALUES, _JUDGED_BLOCKS = 1 << 22, 16
_PRIOR = 4


def choose_block(grid: int) -> int:
    """Cells along each side of a DCT block: the divisor of the grid from 4 to 16 that is nearest to 8, else the whole grid.

    At 32 cells blocks of 8, 16 and 32 take the same bytes within 0.5 % (docs/codec.md); small ones have the smaller tables.
    """
    divisors = [block for block in range(4, 17) if grid % block == 0]
    return min(divisors, key=lambda block: abs(np.log2(block / 8)), default=grid)


def fit_codec(name: str, embeddings: np.ndarray, *, error: float = 0.01, block: int | None = None) -> Codec:
    """Fit a codec on a sample of embeddings.

    Args:
        name: one of CODECS.
        embeddings: float32 [n, C, grid, grid], finite, a sample drawn at random. For `pca` a quarter of them chooses the step
            and the others the rotation, so that the step is not fooled by a rotation fitted to itself.
        error: relative squared error to aim at (`pca`): sum of squared differences / sum of (embedding - mean)^2.
        block: side of the DCT's blocks in cells (`pca`), a divisor of the grid. Default: `choose_block`.

    Raises SamiCacheError for an unknown name, an error outside (0, 1) or out of reach, or embeddings that carry nothing.
    """
    if name not in CODECS:
        raise SamiCacheError(f"codec {name!r} is unknown; choose one of {', '.join(CODECS)}.")
    if not 0 < error < 1:
        raise SamiCacheError(f"--error {error:g}: the relative squared error lies between 0 and 1, such as 0.01.")
    mean, covariance = _moments(embeddings)
    variance = float(np.trace(covariance)) / len(mean)
    if not variance > 0:
        raise SamiCacheError("the teacher's embeddings are the same everywhere: there is nothing to store. Check its weights.")
    common: dict[str, Any] = {"variance": variance, "fit_samples": len(embeddings)}
    if name == "pca":
        return _fit_pca(embeddings, mean, covariance, error, block or choose_block(embeddings.shape[2]), common)
    step = np.ones_like(mean)
    if name == "int8":
        largest = np.abs(embeddings - mean[:, None, None]).max((0, 2, 3))
        step = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    index = np.arange(len(mean), dtype=np.int32)
    return Codec(name, None, name, np.eye(len(mean), dtype=np.float32), dct_matrix(1), index, mean, step, **common)


def _moments(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean float32 [C] and covariance float64 [C, C] over samples and positions."""
    mean = embeddings.mean((0, 2, 3), dtype=np.float64).astype(np.float32)
    covariance = np.zeros((len(mean), len(mean)))
    for part in parts(embeddings):
        centred = np.moveaxis(embeddings[part] - mean[:, None, None], 1, 0).reshape(len(mean), -1).astype(np.float64)
        covariance += centred @ centred.T
    return mean, covariance / (embeddings.size / len(mean))


def _fit_pca(
    embeddings: np.ndarray, mean: np.ndarray, covariance: np.ndarray, error: float, block: int, common: dict[str, Any]
) -> Codec:
    judging = np.ones(len(embeddings), bool)
    if len(embeddings) >= 8:
        judging[np.random.default_rng(0).permutation(len(embeddings))[len(embeddings) // 4 :]] = False
        mean, covariance = _moments(embeddings[~judging])
    eigenvalues, vectors = np.linalg.eigh(covariance)
    basis = vectors.T[::-1]
    # An eigenvector's sign is arbitrary: fix it, so that the same sample always gives the same basis.
    signs = np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])
    basis = (basis * signs[:, None]).astype(np.float32)
    dct = dct_matrix(block)
    power, largest, judged = _coefficients(embeddings, judging, basis, mean, dct)
    step = _find_step(power, judged, common["variance"] * len(mean) * block**2, error)
    stored = np.flatnonzero(power > KEEP_FROM * step**2)
    wide = np.ones(len(stored), np.int64)
    for digits in range(1, MAX_DIGITS + 1):
        wide += largest[stored] * HEADROOM > (DIGIT**digits // 2) * step
    if wide.max() > MAX_DIGITS:
        raise SamiCacheError(f"--error {error:g} is out of reach of 24-bit codes: ask for a larger one, or --codec float16.")
    index = np.concatenate([stored[wide > digit] for digit in range(MAX_DIGITS)])
    steps = np.concatenate([np.full((wide > digit).sum(), step * DIGIT**digit) for digit in range(MAX_DIGITS)])
    # Rows of codes of one spread lie side by side, whatever digit they are.
    order = np.argsort(-np.minimum(power[index] / steps**2, DIGIT**2 / 12), kind="stable")
    return Codec(
        "pca",
        error,
        "int8",
        np.ascontiguousarray(basis[: stored.max() // block**2 + 1]),
        dct,
        index[order].astype(np.int32),
        mean,
        steps[order].astype(np.float32),
        spectrum=tuple(float(f"{max(value, 0.0):.6g}") for value in eigenvalues[::-1]),
        **common,
    )


def _coefficients(
    embeddings: np.ndarray, judging: np.ndarray, basis: np.ndarray, mean: np.ndarray, dct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every coefficient: mean square and largest magnitude [count], and values of judging samples [count, some blocks]."""
    count = len(mean) * len(dct) ** 2
    blocks = embeddings[0].size // count
    power, largest, judged = np.zeros(count), np.zeros(count, np.float32), []
    # Blocks enough to place the step to a fraction of a percent.
    there = np.flatnonzero(np.repeat(judging, blocks))
    wanted = max(_JUDGED_BLOCKS, _JUDGED_VALUES // count)
    drawn = np.zeros(len(embeddings) * blocks, bool)
    drawn[np.random.default_rng(0).permutation(there)[:wanted]] = True
    drawn = drawn.reshape(-1, blocks)
    for part in parts(embeddings):
        piece = embeddings[part]
        rotated = basis @ (piece.reshape(len(piece), len(mean), -1) - mean[:, None])
        values = block_dct(rotated.reshape(piece.shape), dct)
        power += np.square(values, dtype=np.float64).sum((0, 2))
        np.maximum(largest, np.abs(values).max((0, 2)), out=largest)
        judged.append(values.transpose(1, 0, 2)[:, drawn[part]])
    seen = len(embeddings) * blocks
    power = (power / seen).reshape(len(mean), -1)
    # Seen a few times only, a coefficient may look negligible by chance: what direction and frequency say counts as well.
    expected = power.mean(1, keepdims=True) * power.mean(0) / power.mean()
    power = (seen * power + _PRIOR * expected) / (seen + _PRIOR)
    return power.ravel(), largest, np.concatenate(judged, 1)


def _find_step(power: np.ndarray, judged: np.ndarray, total: float, error: float) -> float:
    """The largest step, a float32, that loses at most `error` of `total`, the sum of all coefficients' variances."""
    # Measured on the judging samples, and brought to the energy that all samples have, coefficient by coefficient: where the
    # step is fine the loss does not depend on it, where it is coarse the loss is the energy.
    whole = np.square(judged, dtype=np.float64).mean(1)
    magnitude = np.abs(judged)

    def lost(step: float) -> float:
        stored = power > KEEP_FROM * step**2
        values = magnitude[stored] / np.float32(step)
        codes = np.floor(values + np.float32(1 - ROUND_UP_FROM))
        measured = np.square(values - codes, dtype=np.float64).mean(1).sum() * step**2 + whole[~stored].sum()
        water = step**2 / 12
        seen = np.minimum(whole, water).sum()
        return float(measured * np.minimum(power, water).sum() / seen / total) if seen else 0.0

    high = 0.999 * float(np.sqrt(power.max() / KEEP_FROM))  # the largest coefficient is always stored
    low = high * 2.0**-32
    for _ in range(26):
        step = float(np.sqrt(low * high))
        low, high = (step, high) if lost(step) <= error else (low, step)
    return float(np.float32(low))
