"""Fine-tuning a plain ViT to classify pictures, as MAE does (arXiv 2111.06377, appendix A.1)."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sami_cache.augmentation import Augment, Mixing
from sami_cache.data.labelled import LabelledPictures
from sami_cache.errors import SamiCacheError
from sami_cache.processes import totals
from sami_cache.steps import PictureSteps, prepared

Pool = Literal["avg", "token"]
RGB = tuple[float, float, float]


class Labelled(NamedTuple):
    """A micro-batch."""

    pixels: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    step: int  # 0-based, of the run


class Classifier(nn.Module):
    """A timm VisionTransformer with a head, called `encoder` as in all that is fine-tuned here.

    With the pool `avg` the patch tokens' mean is normalised (`fc_norm`, new) and classified, as in MAE's fine-tuning, and the
    norm of pretraining is dropped; with `token` it is the normalised class token. The head begins at almost zero, as MAE's.
    """

    def __init__(self, encoder: VisionTransformer, classes: int, pool: Pool) -> None:
        """The encoder is taken over and changed. Raises SamiCacheError where it cannot be pooled so."""
        super().__init__()
        if pool not in ("avg", "token"):
            raise SamiCacheError(f"--pool {pool}: expected avg or token")
        if encoder.attn_pool is not None or (pool == "token" and not encoder.has_class_token):
            kind = "pools by attention" if encoder.attn_pool is not None else "has no class token"
            raise SamiCacheError(f"--pool {pool}: this encoder {kind}; expected a plain ViT with a class token, or --pool avg")
        encoder.reset_classifier(classes, pool)
        used, other = ("fc_norm", "norm") if pool == "avg" else ("norm", "fc_norm")
        if isinstance(getattr(encoder, used), nn.Identity):
            fresh: Any = copy.deepcopy(getattr(encoder, other))
            if not isinstance(fresh, nn.Identity):
                fresh.reset_parameters()
            setattr(encoder, used, fresh)
        setattr(encoder, other, nn.Identity())
        assert isinstance(encoder.head, nn.Linear)
        nn.init.trunc_normal_(encoder.head.weight, std=2e-5)
        nn.init.zeros_(encoder.head.bias)
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised float [B, 3, S, S] -> logits [B, classes]."""
        return self.encoder(pixels)


class ClassificationTask:
    """Implements `training.Task`."""

    def __init__(
        self,
        model: Classifier,
        steps: PictureSteps[tuple[Tensor, int]],
        mixing: Mixing,
        *,
        mean: RGB,
        std: RGB,
        device: torch.device,
        held_out: LabelledPictures | None = None,
        numbers: Sequence[int] = (),
        view: Callable[[Any], Tensor] | None = None,
        evaluation_batch: int = 32,
    ) -> None:
        """
        Args:
            mean, std: of R, G, B in 0..1.
            held_out: what is evaluated on, of it the pictures `numbers` (this process's share), as `view` shows them.
        """
        self.model: nn.Module = model
        self.steps, self.mixing, self.device = steps, mixing, device
        self.held_out, self.numbers, self.view, self.evaluation_batch = held_out, numbers, view, evaluation_batch
        self.steps_per_epoch: float | None = steps.steps_per_epoch
        self._criterion = SoftTargetCrossEntropy()
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] * 255 for values in (mean, std))

    def batches(self, start_step: int) -> Iterator[Labelled]:
        with closing(self.steps.batches(start_step)) as batches:
            for number, batch in enumerate(batches):
                pixels, labels = zip(*batch, strict=True)
                yield Labelled(torch.stack(pixels), torch.tensor(labels), start_step + number // self.steps.accumulate)

    def loss(self, model: nn.Module, batch: Labelled, device: torch.device) -> dict[str, Tensor]:
        """`loss`: cross-entropy with the shares of classes that mixing and smoothing leave, mean over the pictures."""
        labels = batch.labels.to(device, non_blocking=True)
        pixels, targets = self.mixing(self._normalise(batch.pixels), labels, batch.step)
        return {"loss": self._criterion(model(pixels).float(), targets)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Of the held-out pictures, over all processes: `heldout_top1` and `heldout_top5`, shares in 0..1, and `heldout_loss`.

        The loss is the cross-entropy with the plain label, in nats. Where there are five classes or fewer, top-5 is left out.
        """
        sums = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "pictures": 0.0}
        some: list[tuple[Tensor, int]] = []
        for number, item in enumerate(self._held_out_items(), 1):
            some.append(item)
            if len(some) == self.evaluation_batch or number == len(self.numbers):
                pixels, labels = (torch.stack([each[0] for each in some]), torch.tensor([each[1] for each in some]))
                for name, value in count_right(model(self._normalise(pixels)).float(), labels.to(self.device)).items():
                    sums[name] += value
                some = []
        total = totals(sums, self.device)
        count = total.pop("pictures")
        if self.held_out is None or not count:
            return {}
        if self.held_out.classes <= 5:
            del total["top5"]
        return {f"heldout_{name}": value / count for name, value in total.items()}

    def _held_out_items(self) -> Iterator[tuple[Tensor, int]]:
        jobs = ((number,) for number in self.numbers)
        return prepared(self._held_out_item, jobs, threads=self.steps.threads, ahead=64, timeout=self.steps.timeout)

    def _held_out_item(self, number: int) -> tuple[Tensor, int]:
        assert self.held_out is not None
        assert self.view is not None
        return self.view(self.held_out.image(number)), int(self.held_out.labels[number])

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.device, non_blocking=True).float() - self._mean) / self._std


def count_right(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Of a batch: `top1` and `top5`, how many labels are the highest or among the five highest; sum of `loss`; `pictures`.

    `logits`: float [B, classes]; `labels`: int64 [B].
    """
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {
        "top1": float(found[:, 0].sum()),
        "top5": float(found.any(1).sum()),
        "loss": float(F.cross_entropy(logits, labels, reduction="sum")),
        "pictures": float(len(labels)),
    }


def training_items(pictures: LabelledPictures, augment: Augment, order: np.ndarray) -> Callable[[int, int], tuple[Tensor, int]]:
    """What `PictureSteps` asks: of (epoch, number) the picture `order[number]`, augmented, with its label."""

    def make(epoch: int, number: int) -> tuple[Tensor, int]:
        picture = int(order[number])
        return augment(pictures.image(picture), epoch, number), int(pictures.labels[picture])

    return make
