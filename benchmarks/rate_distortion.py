"""What the codec benchmarks share: features of a teacher, the entropy of codes, and the Gaussian rate-distortion bound."""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.demo import cut_photos
from pipelines.jobs import ExtractConfig, prepare_job
from sami_cache.processes import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the teacher is asked for; None: its default."""

    layer: str | None = None
    image_size: int | None = None
    grid: int = 32

    def __str__(self) -> str:
        return f"layer {self.layer or 'default'}, {self.image_size or 'default'} px, grid {self.grid}"


@dataclass(frozen=True, kw_only=True)
class Features:
    """Embeddings of two disjoint sets of images, drawn at random."""

    fit: np.ndarray
    """float32 [n, C, grid, grid]: all that a codec may learn from."""
    held_out: np.ndarray
    """float32 [n, C, grid, grid]: where it is judged."""

    @property
    def mean(self) -> np.ndarray:
        """float32 [C, 1, 1], of the fitted half."""
        return self.fit.mean((0, 2, 3), dtype=np.float64).astype(np.float32)[:, None, None]

    @property
    def energy(self) -> float:
        """Mean of (held-out embedding - mean)^2: what a relative squared error is relative to."""
        return float(np.square(self.held_out - self.mean, dtype=np.float64).mean())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="a folder of photographs; default: the ones that packages ship")
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--weights")
    parser.add_argument("--layer")
    parser.add_argument("--grid", type=int, default=32)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--limit", type=int, default=192, help="images, half of them to fit on (default %(default)s)")
    parser.add_argument("--features", type=Path, help="a folder that keeps the embeddings for the next run")
    parser.add_argument("--out", type=Path, help="write FILE.md (and a plot FILE.png) beside printing")


def setting_of(given: argparse.Namespace) -> Setting:
    return Setting(layer=given.layer, image_size=given.image_size, grid=given.grid)


def load_features(
    data: Path | None, teacher: str, weights: str | None, setting: Setting, *, limit: int, folder: Path | None = None
) -> Features:
    """Embeddings of `limit` random images, half to fit on and half to judge by; the same ones every time.

    Args:
        data: a folder of photographs; None: tiles of the ones that packages ship, as `sami-cache demo` uses them.
        folder: where the embeddings are kept for the next run, None for nowhere.
    """
    name = "-".join(str(part) for part in (Path(teacher).name, setting.layer, setting.image_size, setting.grid, limit))
    file = folder / f"{name}.npy" if folder else None
    if file and file.exists():
        embeddings = np.load(file)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            if data is None:
                data = Path(temporary) / "photos"
                cut_photos(data)
            embeddings = _embed(data, teacher, weights, setting, limit)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, embeddings)
    return Features(fit=embeddings[: len(embeddings) // 2], held_out=embeddings[len(embeddings) // 2 :])


def _embed(data: Path, teacher: str, weights: str | None, setting: Setting, limit: int) -> np.ndarray:
    job = prepare_job(
        ExtractConfig(
            data=data,
            cache=data / "no cache",
            teacher=teacher,
            weights=weights,
            layer=setting.layer,
            image_size=setting.image_size,
            grid=setting.grid,
            images=False,
            precision="float32",
        )
    )
    keep_freed_memory()
    torch.set_num_threads(os.cpu_count() or 1)  # the teacher is not what is timed
    chosen = np.random.default_rng(0).permutation(len(job.embedder))[:limit]
    batches = [[int(number) for number in chosen[start : start + 8]] for start in range(0, len(chosen), 8)]
    parts = list(job.embedder.embed(batches))
    ok = np.array([sample.status == "ok" for part in parts for sample in part.samples])
    return np.concatenate([part.embeddings for part in parts])[ok]


def entropy(codes: np.ndarray) -> float:
    """Zero-order entropy of integer codes, bits a code: what an ideal coder spends that knows their histogram."""
    if codes.dtype.kind == "f":
        codes = codes.view(f"u{codes.itemsize}")
    if codes.dtype.itemsize > 2:
        codes = np.unique(codes, return_inverse=True)[1]
    codes = codes.astype(np.int64).ravel()
    shares = np.bincount(codes - codes.min()) / codes.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def groups(classes: int, most: int = 64) -> list[np.ndarray]:
    """Classes that follow each other, joined into at most `most` groups of about the same size."""
    return np.array_split(np.arange(classes), min(classes, most))


def class_entropy(codes: np.ndarray, most: int = 64) -> float:
    """The same with a histogram for each group of classes, along axis 1: bits a code."""
    return sum(entropy(codes[:, group]) * len(group) for group in groups(codes.shape[1], most)) / codes.shape[1]


def water_filling(variances: np.ndarray, distortion: float) -> float:
    """Rate of independent Gaussians at a mean squared error, bits a value: reverse water-filling.

    Cover & Thomas, Elements of Information Theory, theorem 10.3.3.

    Args:
        variances: one a component, each as frequent as the others.
        distortion: mean over the components.
    """
    low, high = 0.0, float(variances.max())
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(variances, level).mean() < distortion else (low, level)
    return float(0.5 * np.log2(np.maximum(variances / high, 1)).mean())


def dct_matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II, float64 [frequency, position]."""
    frequency, position = np.mgrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * position + 1) * frequency / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


def principal(embeddings: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances, largest first, float64 [C], and directions, float32 [C, C] rows, around `mean` [C, 1, 1]."""
    channels = embeddings.shape[1]
    covariance = np.zeros((channels, channels))
    for sample in embeddings:
        centred = (sample - mean).reshape(channels, -1).astype(np.float64)
        covariance += centred @ centred.T
    variances, vectors = np.linalg.eigh(covariance / (embeddings[:, 0].size))
    return variances[::-1].clip(0), np.ascontiguousarray(vectors.T[::-1], np.float32)


def spectra(embeddings: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances in the basis of the channels' PCA, [C], and of PCA and a 2-D DCT over the whole grid, [C * grid * grid]."""
    variances, basis = principal(embeddings, mean)
    _, channels, height, width = embeddings.shape
    rows, columns = dct_matrix(height).astype(np.float32), dct_matrix(width).astype(np.float32)
    power = np.zeros((channels, height, width))
    for sample in embeddings:
        rotated = (basis @ (sample - mean).reshape(channels, -1)).reshape(channels, height, width)
        power += np.square(rows @ rotated @ columns.T, dtype=np.float64)
    return variances, (power / len(embeddings)).ravel()


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
