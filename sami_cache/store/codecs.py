"""From float embeddings to the numbers that are stored, and back.

Every codec decodes by one formula, embedding = mean + basis^T (step * codes), so that a reader needs none of this module:

- `pca` (default): the embeddings' channels are correlated, so they are rotated onto the eigenvectors of their covariance
  (PCA, the Karhunen-Loeve transform) and quantised with one uniform step; channels whose variance lies below the noise of
  the step are not stored (reverse water-filling, Cover & Thomas, Elements of Information Theory, section 10.3). The step is
  found by bisection for the relative squared error that was asked for. The rotation is orthonormal: squared error between
  codes, times step^2, is squared error between embeddings.
- `int8`: each channel by itself, its largest magnitude in the sample mapped to 127.
- `float16`: less its mean, otherwise as it is.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sami_cache.errors import SamiCacheError

CODECS = ("pca", "int8", "float16")
_LIMITS = {"int8": 127, "int16": 32767}


@dataclass(frozen=True)
class Codec:
    """A fitted codec. `basis`, `mean` and `step` are stored as arrays of the cache, the rest in its attributes."""

    name: str
    error: float | None
    """The relative squared error that was asked for (`pca`), else None."""
    dtype: str
    """Of the codes: int8, int16 (when 8 bits cannot hold the range at this error) or float16."""
    basis: np.ndarray
    """float32 [kept, C], orthonormal rows."""
    mean: np.ndarray
    """float32 [C]."""
    step: np.ndarray
    """float32 [kept]."""
    variance: float
    """Of the sample the codec was fitted on: mean of (embedding - mean)^2 over channels and positions."""
    spectrum: tuple[float, ...] = ()
    """Variance along each principal direction, largest first (`pca`)."""
    fit_samples: int = 0

    @property
    def channels(self) -> int:
        return self.basis.shape[1]

    @property
    def kept(self) -> int:
        return self.basis.shape[0]

    @cached_property
    def _rotated_mean(self) -> np.ndarray:
        return self.basis @ self.mean

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 [n, C, h, w] -> codes [n, kept, h, w]. Values out of the code's range are clipped (float16: refused)."""
        n, _, height, width = embeddings.shape
        codes = np.empty((n, self.kept, height, width), self.dtype)
        for part in _parts(embeddings):
            flat = embeddings[part].reshape(-1, self.channels, height * width)
            flat = (self.basis @ flat - self._rotated_mean[:, None]) / self.step[:, None]
            if self.dtype in _LIMITS:
                limit = _LIMITS[self.dtype]
                flat = np.clip(np.rint(flat, out=flat), -limit, limit, out=flat)
            elif np.abs(flat).max(initial=0) > np.finfo(np.float16).max:
                raise SamiCacheError(
                    f"an embedding lies {np.abs(flat).max():.4g} from the mean, float16 ends at 65504: choose --codec pca or "
                    "int8."
                )
            codes[part] = flat.reshape(-1, self.kept, height, width)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes [n, kept, h, w] -> float32 [n, C, h, w]: mean + basis^T (step * codes)."""
        n, kept, height, width = codes.shape
        scaled = codes.reshape(n, kept, height * width).astype(np.float32) * self.step[:, None]
        return (self.basis.T @ scaled + self.mean[:, None]).reshape(n, self.channels, height, width)

    def distortion(self, embeddings: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the codes lost, per sample: (error, energy), both float64 [n].

        error = sum of squared differences / sum of (embedding - mean)^2 of the sample; energy = the latter's mean over
        channels and positions, relative to `variance`. A set's error is sum(error * energy) / sum(energy).
        """
        lost, energy = np.empty(len(codes)), np.empty(len(codes))
        for part in _parts(embeddings):
            lost[part] = np.square(embeddings[part] - self.decode(codes[part]), dtype=np.float64).mean((1, 2, 3))
            energy[part] = np.square(embeddings[part] - self.mean[:, None, None], dtype=np.float64).mean((1, 2, 3))
        floor = np.finfo(np.float64).tiny
        return lost / np.maximum(energy, floor), energy / max(self.variance, floor)

    def clipped(self, codes: np.ndarray) -> np.ndarray:
        """How many codes of each sample lie at the end of the range: int64 [n]."""
        if self.dtype not in _LIMITS:
            return np.zeros(len(codes), np.int64)
        limit = _LIMITS[self.dtype]
        return ((codes == limit) | (codes == -limit)).sum((1, 2, 3), dtype=np.int64)

    def parameters(self) -> dict[str, Any]:
        """What the cache's attributes keep beside the arrays."""
        return {
            "name": self.name,
            "error": self.error,
            "dtype": self.dtype,
            "channels": self.channels,
            "kept": self.kept,
            "variance": self.variance,
            "spectrum": list(self.spectrum),
            "fit_samples": self.fit_samples,
        }


def _parts(embeddings: np.ndarray) -> list[slice]:
    """Samples by a megabyte: what is computed on the way stays in the processor's cache, a shard's would be mapped anew."""
    size = max(1, (1 << 20) // max(1, embeddings[:1].nbytes))
    return [slice(start, start + size) for start in range(0, len(embeddings), size)]


def fit_codec(name: str, embeddings: np.ndarray, *, error: float = 0.01) -> Codec:
    """Fit a codec on a sample of embeddings.

    Args:
        name: one of CODECS.
        embeddings: float32 [n, C, h, w], finite, a sample drawn at random. For `pca` every fourth one chooses the step and
            the kept channels, the others the rotation, so that the step is not fooled by a rotation fitted to itself.
        error: relative squared error to aim at (`pca`): sum of squared differences / sum of (embedding - mean)^2.

    Raises SamiCacheError for an unknown name, an error outside (0, 1), or embeddings that carry nothing.
    """
    if name not in CODECS:
        raise SamiCacheError(f"codec {name!r} is unknown; choose one of {', '.join(CODECS)}.")
    if not 0 < error < 1:
        raise SamiCacheError(f"--error {error:g}: the relative squared error lies between 0 and 1, such as 0.01.")
    rows = np.moveaxis(embeddings, 1, -1).reshape(-1, embeddings.shape[1])
    mean, covariance = _moments(rows)
    variance = float(np.trace(covariance)) / len(mean)
    if not variance > 0:
        raise SamiCacheError("the teacher's embeddings are the same everywhere: there is nothing to store. Check its weights.")
    identity = np.eye(len(mean), dtype=np.float32)
    common = {"variance": variance, "fit_samples": len(embeddings)}
    if name == "float16":
        return Codec(name, None, "float16", identity, mean, np.ones_like(mean), **common)
    if name == "int8":
        step = np.abs(rows - mean).max(0) / _LIMITS["int8"]
        return Codec(name, None, "int8", identity, mean, np.where(step > 0, step, 1).astype(np.float32), **common)
    return _fit_pca(embeddings, mean, covariance, error, common)


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean float32 [C] and covariance float64 [C, C] of float32 [n, C], in blocks so that memory stays small."""
    mean = rows.mean(0, dtype=np.float64).astype(np.float32)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, len(rows), 65536):
        centred = (rows[start : start + 65536] - mean).astype(np.float64)
        covariance += centred.T @ centred
    return mean, covariance / len(rows)


def _fit_pca(embeddings: np.ndarray, mean: np.ndarray, covariance: np.ndarray, error: float, common: dict[str, Any]) -> Codec:
    held_out = np.arange(len(embeddings)) % 4 == 3
    if held_out.sum() >= 2:
        rows = np.moveaxis(embeddings[~held_out], 1, -1).reshape(-1, len(mean))
        mean, covariance = _moments(rows)
        judge = embeddings[held_out]
    else:
        judge = embeddings
    eigenvalues, vectors = np.linalg.eigh(covariance)
    basis = vectors.T[::-1]
    # An eigenvector's sign is arbitrary: fix it, so that the same sample always gives the same basis.
    signs = np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])
    basis = (basis * signs[:, None]).astype(np.float32)
    z = basis @ (np.moveaxis(judge, 1, 0).reshape(len(mean), -1) - mean[:, None])
    if z.shape[1] > 2**16:  # positions enough to place the step to a fraction of a percent
        z = z[:, np.random.default_rng(0).choice(z.shape[1], 2**16, replace=False)]
    power = np.square(z, dtype=np.float64).mean(1)
    # What is lost hardly differs between images, the variance does: it is taken over all of them.
    total = common["variance"] * len(mean)

    def distortion(step: float, limit: float = np.inf) -> tuple[float, np.ndarray]:
        kept = power > step * step / 12
        codes = np.clip(np.rint(z[kept] / np.float32(step)), -limit, limit)
        lost = np.square(z[kept] - codes * np.float32(step), dtype=np.float64).mean(1).sum()
        return float((lost + power[~kept].sum()) / total), kept

    low, high = 0.0, float(np.sqrt(12 * power.max()))
    for _ in range(40):
        step = (low + high) / 2
        low, high = (step, high) if distortion(step)[0] < error else (low, step)
    step = low or high
    kept = distortion(step)[1]
    for dtype, limit in _LIMITS.items():
        if distortion(step, limit)[0] <= 1.02 * error:
            return Codec(
                "pca",
                error,
                dtype,
                np.ascontiguousarray(basis[kept]),
                mean,
                np.full(int(kept.sum()), step, np.float32),
                spectrum=tuple(float(f"{max(value, 0.0):.6g}") for value in eigenvalues[::-1]),
                **common,
            )
    raise SamiCacheError(f"--error {error:g} cannot be reached with 16-bit codes: ask for a larger error, or --codec float16.")
