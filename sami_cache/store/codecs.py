"""From float embeddings to the numbers that are stored, and back.

Every codec decodes by one formula, embedding = mean + basis^T (W (step * codes)), W the inverse of a block DCT, so that a
reader needs none of this module (docs/format.md has the lines, docs/codec.md the method and what was measured):

- `pca` (default): transform coding. The embeddings' channels are correlated, so they are rotated onto the eigenvectors of
  their covariance (PCA, the Karhunen-Loeve transform). Neighbouring cells are correlated, so each rotated channel is cut into
  blocks and each block transformed by the discrete cosine transform (DCT-II, orthonormal). The coefficients are quantised
  with one uniform step; those whose variance lies below the noise of the step are not stored (reverse water-filling, Cover &
  Thomas, Elements of Information Theory, section 10.3), the others in the order of falling variance, so that an entropy
  coder that adapts to what it just saw meets coefficients of one kind at a time. The step is found by bisection for the
  relative squared error that was asked for. Rotation and DCT are orthonormal: squared error between codes, times step^2, is
  squared error between embeddings.
- `int8`: each channel by itself, its largest magnitude in the sample mapped to 127.
- `float16`: less its mean, otherwise as it is.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sami_cache.errors import SamiCacheError

CODECS = ("pca", "int8", "float16")
DIGIT = 255
"""A coefficient too wide for int8 is stored as two or three rows: its digits in base 255, each from -127 to 127."""
# Rounding up only from here makes more zeros, which cost least: the step must be smaller for the same error, and at 1 % on
# photographs 0.7 % of the bytes are saved all the same (docs/codec.md).
ROUND_UP_FROM = 0.55
# Up to this side of a block, both directions of its DCT as one matrix product are faster than one after the other.
_ONE_PRODUCT = 16


@dataclass(frozen=True)
class Codec:
    """A fitted codec. `basis`, `dct`, `index`, `mean` and `step` are stored as arrays of the cache, the rest in its head."""

    name: str
    error: float | None
    """The relative squared error that was asked for (`pca`), else None."""
    dtype: str
    """Of the codes: int8 or float16."""
    basis: np.ndarray
    """float32 [directions, C], orthonormal rows."""
    dct: np.ndarray
    """float32 [block, block], orthonormal rows, one a frequency; [[1]] for codecs that leave space alone."""
    index: np.ndarray
    """int32 [kept]: the coefficient that a row of codes is of, in [directions, block, block] (direction, vertical and
    horizontal frequency) in C order. A coefficient has no row, one, or several, which are added up."""
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
    def directions(self) -> int:
        return self.basis.shape[0]

    @property
    def block(self) -> int:
        """Cells along each side of a block."""
        return self.dct.shape[0]

    @property
    def kept(self) -> int:
        """Rows of codes."""
        return len(self.index)

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows sorted by coefficient and step; where each stored coefficient's begin; how many it has."""
        order = np.lexsort((self.step, self.index))
        first = np.flatnonzero(np.diff(self.index[order], prepend=-1))
        return order, first, np.diff(first, append=self.kept)

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """The rows of codes by digit, in the order of `index`: every stored coefficient's finest, then the next of those ..."""
        order, first, digits = self._digits
        return [order[first[digits > digit] + digit] for digit in range(digits.max(initial=0))]

    @cached_property
    def _rotated_mean(self) -> np.ndarray:
        return self.basis @ self.mean

    def sample_shape(self, grid: int) -> tuple[int, int, int]:
        """Of one embedding's codes: (kept, grid / block, grid / block)."""
        return self.kept, grid // self.block, grid // self.block

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 [n, C, h, w] -> codes [n, kept, h / block, w / block]. Values out of range are clipped (float16: refused)."""
        n, _, height, width = embeddings.shape
        codes = np.empty((n, self.kept, height // self.block, width // self.block), self.dtype)
        for part in parts(embeddings):
            flat = embeddings[part].reshape(-1, self.channels, height * width)
            rotated = (self.basis @ flat - self._rotated_mean[:, None]).reshape(-1, self.directions, height, width)
            rows = codes[part].reshape(-1, self.kept, codes[0, 0].size)
            if self.dtype == "int8":
                self._quantise(block_dct(rotated, self.dct), rows)
            elif np.abs(rotated).max(initial=0) > np.finfo(np.float16).max:
                raise SamiCacheError(
                    f"an embedding lies {np.abs(rotated).max():.4g} from the mean, float16 ends at 65504: choose --codec pca "
                    "or int8."
                )
            else:
                rows[:] = block_dct(rotated, self.dct)[:, self.index]
        return codes

    def _quantise(self, values: np.ndarray, codes: np.ndarray) -> None:
        """All coefficients [n, directions * block * block, blocks] -> int8 [n, kept, blocks], written in place."""
        digits = self._digits[2]
        finest = self.rows[0]
        whole = values[:, self.index[finest]] / self.step[finest][:, None]
        up = np.float32(1 - (ROUND_UP_FROM if self.name == "pca" else 0.5))
        whole = np.copysign(np.floor(np.abs(whole) + up), whole)
        limit = ((DIGIT**digits - 1) // 2).astype(np.float32)[:, None]
        whole = np.clip(whole, -limit, limit, out=whole)
        for digit, rows in enumerate(self.rows):
            whole = whole[:, digits > digit]
            digits = digits[digits > digit]
            higher = np.rint(whole / DIGIT)
            codes[:, rows] = whole - DIGIT * higher
            whole = higher

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes [n, kept, h / block, w / block] -> float32 [n, C, h, w]."""
        n, _, height, width = codes.shape
        out = np.empty((n, self.channels, height * self.block, width * self.block), np.float32)
        for part in parts(out):
            rows = codes[part].reshape(-1, self.kept, height * width)
            values = np.zeros((len(rows), self.directions * self.block**2, height * width), np.float32)
            for chosen in self.rows:
                values[:, self.index[chosen]] += rows[:, chosen] * self.step[chosen][:, None]
            rotated = inverse_block_dct(values, self.dct, (height, width))
            flat = self.basis.T @ rotated.reshape(len(rows), self.directions, -1) + self.mean[:, None]
            out[part] = flat.reshape(out[part].shape)
        return out

    def distortion(self, embeddings: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the codes lost, per sample: (error, energy), both float64 [n].

        error = sum of squared differences / sum of (embedding - mean)^2 of the sample; energy = the latter's mean over
        channels and positions, relative to `variance`. A set's error is sum(error * energy) / sum(energy).
        """
        lost, energy = np.empty(len(codes)), np.empty(len(codes))
        for part in parts(embeddings):
            lost[part] = np.square(embeddings[part] - self.decode(codes[part]), dtype=np.float64).mean((1, 2, 3))
            energy[part] = np.square(embeddings[part] - self.mean[:, None, None], dtype=np.float64).mean((1, 2, 3))
        floor = np.finfo(np.float64).tiny
        return lost / np.maximum(energy, floor), energy / max(self.variance, floor)

    def clipped(self, codes: np.ndarray) -> np.ndarray:
        """How many coefficients of each sample lie at the end of their range: int64 [n]."""
        if self.dtype != "int8":
            return np.zeros(len(codes), np.int64)
        order, first, digits = self._digits
        coarsest = codes if len(self.rows) == 1 else codes[:, order[first + digits - 1]]
        return ((coarsest == 127) | (coarsest == -127)).sum((1, 2, 3), dtype=np.int64)

    def parameters(self) -> dict[str, Any]:
        """What the cache's head keeps beside the arrays."""
        return {
            "name": self.name,
            "error": self.error,
            "dtype": self.dtype,
            "channels": self.channels,
            "directions": self.directions,
            "block": self.block,
            "kept": self.kept,
            "variance": self.variance,
            "spectrum": list(self.spectrum),
            "fit_samples": self.fit_samples,
        }


def parts(embeddings: np.ndarray) -> list[slice]:
    """Samples by a megabyte: what is computed on the way stays in the processor's cache, a shard's would be mapped anew."""
    size = max(1, (1 << 20) // max(1, embeddings[:1].nbytes))
    return [slice(start, start + size) for start in range(0, len(embeddings), size)]


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II: float32 [size, size], a row a frequency (Ahmed, Natarajan & Rao, 1974)."""
    frequency, cell = np.mgrid[:size, :size]
    matrix = np.cos(np.pi * frequency * (2 * cell + 1) / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def block_dct(values: np.ndarray, dct: np.ndarray) -> np.ndarray:
    """float32 [n, D, h, w] -> [n, D * b * b, blocks]: coefficients by direction and frequency, blocks in C order."""
    n, directions, height, width = values.shape
    b = len(dct)
    cells = values.reshape(n, directions, height // b, b, width // b, b)
    if b > _ONE_PRODUCT:
        found = np.einsum("ui,vj,ndyixj->nduvyx", dct, dct, cells, optimize=True)
    else:  # a single product of two large matrices: many small ones would have BLAS's threads wait for each other
        found = cells.transpose(0, 1, 2, 4, 3, 5).reshape(-1, b * b) @ np.kron(dct, dct).T
        found = found.reshape(n, directions, -1, b * b).transpose(0, 1, 3, 2)
    return found.reshape(n, directions * b * b, -1)


def inverse_block_dct(values: np.ndarray, dct: np.ndarray, blocks: tuple[int, int]) -> np.ndarray:
    """What `block_dct` turned into `values`, `blocks` down and across: float32 [n, D, h, w]."""
    n, b = len(values), len(dct)
    if b > _ONE_PRODUCT:
        cells = np.einsum("ui,vj,nduvyx->ndyixj", dct, dct, values.reshape(n, -1, b, b, *blocks), optimize=True)
    else:
        cells = values.reshape(n, -1, b * b, values.shape[2]).transpose(0, 1, 3, 2).reshape(-1, b * b) @ np.kron(dct, dct)
        cells = cells.reshape(n, -1, *blocks, b, b).transpose(0, 1, 2, 4, 3, 5)
    return cells.reshape(n, cells.shape[1], blocks[0] * b, blocks[1] * b)
