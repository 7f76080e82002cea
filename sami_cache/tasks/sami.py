"""SAMI pretraining: data, model, target and metric put together (EfficientSAM, arXiv 2312.00863, section 3.2).

The target is the teacher's features from a cache (SAMI), the image's own pixels (MAE), or a teacher that runs along; all
three share every other line.

Targets are the teacher's features less their mean, divided by one number, the square root of their mean variance, in the
cache's rotated basis. None of that changes which student is best (the rotation is orthonormal, the rest is one offset
and one scale), but a loss of 1 then means "predicts the mean" for every teacher, and learning rates carry over.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sami_cache.batches import Batch, on_device
from sami_cache.data.views import crop_embeddings, mirror, valid_region
from sami_cache.errors import SamiCacheError
from sami_cache.loader import Loader
from sami_cache.losses import Kind, Tokens, feature_loss
from sami_cache.models.students import SAMI, count_kept, count_reconstructed, patch_targets
from sami_cache.models.teachers import Teacher
from sami_cache.processes import totals
from sami_cache.store.codecs import Codec

Target = Literal["teacher", "pixels"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class SAMIConfig:
    """What is predicted and how it is scored."""

    mask_ratio: float = 0.75
    """Share of tokens removed from the encoder's input."""
    loss: Kind = "mse"
    tokens: Tokens = "all"
    """Scored tokens; MAE scores the masked ones."""
    reconstruct: float = 1.0
    """Share of the masked tokens that training decodes and scores (CrossMAE, arXiv 2401.14391); evaluation takes all."""


class Targets(Protocol):
    """What the student is to predict for every token of a batch."""

    channels: int

    def __call__(self, batch: Batch, pixels: Tensor, grid: int) -> Tensor:
        """float32 [B, grid * grid, channels] on the device of `pixels` ([B, 3, S, S], normalised)."""
        ...

    def features(self, values: Tensor) -> Tensor:
        """Predictions or targets [B, N, channels] as features in the teacher's own channels, [B, N, C]."""
        ...


class CacheTargets(nn.Module):
    """The teacher's features from a cache's codes: cut, mirrored, resampled and scaled on the training device."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.channels = codec.directions
        self.scale = float(np.sqrt(codec.variance))
        for name in ("basis", "mean", "dct"):
            self.register_buffer(name, torch.from_numpy(getattr(codec, name).copy()))
        self.register_buffer("step", torch.from_numpy(codec.step / self.scale))
        self.register_buffer("box", torch.tensor([0.0, 0.0, 1.0, 1.0]))
        self._rows = len(codec.rows)
        for digit, rows in enumerate(codec.rows):
            self.register_buffer(f"rows_{digit}", torch.from_numpy(rows))
            self.register_buffer(f"index_{digit}", torch.from_numpy(codec.index[rows].astype(np.int64)))

    def forward(self, batch: Batch, pixels: Tensor, grid: int) -> Tensor:
        if batch.codes is None:
            raise SamiCacheError("these samples come without a teacher's features: give a cache, or --teacher-online.")
        device = pixels.device
        boxes, flips = batch.boxes.to(device, non_blocking=True), batch.flips.to(device, non_blocking=True)
        if not batch.whole:  # what the teacher saw was the view
            boxes, flips = self.get_buffer("box").expand_as(boxes), torch.zeros_like(flips)
        coefficients = self._coefficients(batch.codes.to(device, non_blocking=True))
        blocks = torch.eye(batch.codes.shape[-1], device=device)
        synthesis = torch.kron(blocks, self.get_buffer("dct").T.contiguous())
        return crop_embeddings(coefficients, boxes, flips, grid, synthesis=synthesis).flatten(2).transpose(1, 2)

    def _coefficients(self, codes: Tensor) -> Tensor:
        """Codes [B, kept, m, m] as coefficients, divided by `scale`, each block in its place: [B, directions, grid, grid]."""
        block = len(self.get_buffer("dct"))
        values = codes.new_zeros(len(codes), self.channels * block * block, *codes.shape[2:], dtype=torch.float32)
        step = self.get_buffer("step")
        for digit in range(self._rows):
            rows = self.get_buffer(f"rows_{digit}")
            # Each digit's coefficients are distinct, so that this gives the same bits on every device.
            values[:, self.get_buffer(f"index_{digit}")] += codes[:, rows].float() * step[rows, None, None]
        values = values.unflatten(1, (self.channels, block, block)).permute(0, 1, 4, 2, 5, 3)
        return values.reshape(len(codes), self.channels, block * codes.shape[2], block * codes.shape[3])

    def features(self, values: Tensor) -> Tensor:
        return (values * self.scale) @ self.get_buffer("basis") + self.get_buffer("mean")


class PixelTargets(nn.Module):
    """The image itself, patch by patch (MAE, arXiv 2111.06377, `norm_pix_loss`)."""

    def __init__(self, patch: int = 16) -> None:
        super().__init__()
        self.patch, self.channels = patch, 3 * patch * patch

    def forward(self, batch: Batch, pixels: Tensor, grid: int) -> Tensor:
        if pixels.shape[-1] != grid * self.patch:
            raise SamiCacheError(f"{pixels.shape[-1]} pixels are not {grid} patches of {self.patch}")
        return patch_targets(pixels, self.patch)

    def features(self, values: Tensor) -> Tensor:
        return values


class OnlineTargets(nn.Module):
    """The teacher itself, run on every view: what a cache replaces."""

    def __init__(self, teacher: Teacher, *, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.teacher, self.precision = teacher, precision
        self.channels = teacher.info.channels
        self.register_buffer("mean", torch.zeros(self.channels))
        self.scale = 1.0

    @torch.no_grad()
    def calibrate(self, batches: Iterator[Batch], count: int, device: torch.device, grid: int = 14) -> None:
        """Measure mean and variance, which a cache knows from its extraction, on about `count` samples.

        `grid`: the student's; between other grids the variance differs by what resampling smooths away.
        """
        total, squares, positions, seen = torch.zeros(self.channels).double(), 0.0, 0, 0
        with closing(batches):  # type: ignore[type-var]
            for batch in batches:
                features = self._embed(batch, device, grid).cpu().double()
                total += features.sum((0, 1))
                squares += float(features.square().sum())
                positions += features.shape[0] * features.shape[1]
                seen += len(batch.keys)
                if seen >= count:
                    break
        mean = total / positions
        self.scale = float((squares / positions - mean.square().sum()) / self.channels) ** 0.5
        self.mean = mean.float().to(device)

    def _embed(self, batch: Batch, device: torch.device, grid: int) -> Tensor:
        if batch.teacher_pixels is None:
            raise SamiCacheError("these samples come without the teacher's view of the image: give the loader teacher_size.")
        pixels = self.teacher.normalise(batch.teacher_pixels.to(device, non_blocking=True))
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            maps = self.teacher(pixels).float()
        whole = maps.new_full((len(maps), 2), maps.shape[-1])  # views are square, so are their maps
        return valid_region(maps, whole, grid).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def forward(self, batch: Batch, pixels: Tensor, grid: int) -> Tensor:
        return (self._embed(batch, pixels.device, grid) - self.mean) / self.scale

    def features(self, values: Tensor) -> Tensor:
        return values * self.scale + self.mean


class SAMITask:
    """Implements `training.Task`."""

    def __init__(
        self, model: SAMI, targets: nn.Module, train: Loader, held_out: Loader | None, config: SAMIConfig, device: torch.device
    ) -> None:
        """`targets`: one of the `Targets` of this file. `held_out`: this process's share of those images, None for none."""
        self.model: nn.Module = model
        self.train, self.held_out, self.config = train, held_out, config
        self.targets = targets.to(device)
        self.device = device
        self.steps_per_epoch: float | None = train.steps_per_epoch
        rows, columns = model.grid_size
        if rows != columns:
            raise SamiCacheError(f"the student's grid is {rows} x {columns}: only square ones are supported")
        self.grid = rows
        # Asked here, so that a share that cannot be had is refused before anything is written.
        count_reconstructed(rows**2 - count_kept(rows**2, config.mask_ratio), config.reconstruct)
        self._mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None] * 255
        self._std = torch.tensor(IMAGENET_STD, device=device)[:, None, None] * 255

    def batches(self, start_step: int) -> Iterator[Batch]:
        return on_device(self.train.batches(start_step), self.device)

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        prediction, target, mask = self.predict(model, batch, self.config.reconstruct)
        if self.config.loss == "cosine":  # an angle depends on the origin: it is taken between features as they are
            prediction, target = self.targets.features(prediction.float()), self.targets.features(target)  # type: ignore[operator]
        return feature_loss(prediction, target, mask, kind=self.config.loss, tokens=self.config.tokens)

    def predict(self, model: nn.Module, batch: Batch, reconstruct: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(prediction, target, mask) of a batch: [B, P, channels] twice, and bool [B, P], True = masked; in image order.

        P: the visible tokens and the share `reconstruct` of the masked ones, by default all N.
        """
        assert batch.pixels is not None
        pixels, flips = (value.to(self.device, non_blocking=True) for value in (batch.pixels, batch.flips))
        pixels = (mirror(pixels, flips).float() - self._mean) / self._std
        ids = batch.ids_shuffle.to(self.device, non_blocking=True)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            target = self.targets(batch, pixels, self.grid)
        prediction, mask, chosen = model(pixels, ids, self.config.mask_ratio, reconstruct)
        return prediction, target.gather(1, chosen[..., None].expand(-1, -1, target.shape[2])), mask

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On the held-out images, whole, with fixed masks.

        `heldout_loss`: the mean squared error of all tokens; `heldout_loss_of_mean`: that of predicting the targets' mean, 1
        but for what resampling to the student's grid smooths away (0.78 from 16 to 14 cells). `heldout_cosine`: mean over
        tokens of the cosine between predicted and true features, both less their mean (which alone makes any two features
        look alike); also over visible and masked tokens, and `heldout_cosine_raw` with the mean left in.
        """
        names = ("loss", "of_mean", "raw", "visible", "masked")
        sums: dict[str, Tensor] = {name: torch.zeros((), device=self.device) for name in names}
        tokens = {"visible": 0, "masked": 0}
        # Every process has a share of the images, which may be none.
        for batch in self.held_out.evaluation(32) if self.held_out else ():
            prediction, target, mask = self.predict(model, batch)
            prediction = prediction.float()
            centred = F.cosine_similarity(prediction, target, dim=-1)
            features = self.targets.features  # type: ignore[assignment]
            raw = F.cosine_similarity(features(prediction), features(target), dim=-1)  # type: ignore[operator]
            parts = {
                "loss": (prediction - target).square().mean(-1).sum(),
                "of_mean": target.square().mean(-1).sum(),
                "raw": raw.sum(),
                "visible": (centred * ~mask).sum(),
                "masked": (centred * mask).sum(),
            }
            sums = {name: sums[name] + value for name, value in parts.items()}
            tokens["masked"] += int(mask.sum())
            tokens["visible"] += int((~mask).sum())
        counted = {f"{name} tokens": float(count) for name, count in tokens.items()}
        total = totals({name: float(value) for name, value in sums.items()} | counted, self.device)
        visible, masked = total["visible tokens"], total["masked tokens"]
        if not visible + masked:
            return {}
        return {
            "heldout_loss": total["loss"] / (visible + masked),
            "heldout_loss_of_mean": total["of_mean"] / (visible + masked),
            "heldout_cosine": (total["visible"] + total["masked"]) / (visible + masked),
            "heldout_cosine_visible": total["visible"] / visible,
            "heldout_cosine_masked": total["masked"] / masked,
            "heldout_cosine_raw": total["raw"] / (visible + masked),
        }
