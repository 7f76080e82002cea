"""Training a promptable model as Segment Anything was trained (arXiv 2304.02643, appendix A).

A first prompt, then further rounds: each takes the last answer's logits as a prompt (family `sam`), and most add a point from
where that answer is wrong. The first round is scored by the best of the three masks, so that an ambiguous prompt may be
answered in three ways; further ones by the mask for prompts that leave no doubt (token 0). A box leaves hardly any, and people
ask with one box and no clicks: it trains token 0 in the first round too, which Segment Anything does not say it did.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sami_cache.data.annotations import Annotations, Object
from sami_cache.errors import SamiCacheError
from sami_cache.mask_losses import FOCAL_WEIGHT, iou_loss, mask_iou, mask_loss
from sami_cache.models.segment_anything import EFFICIENTSAM_POINTS, Family, Masks, SegmentAnything
from sami_cache.processes import totals
from sami_cache.prompts import Prompted, clicks_of, collate, tight_box
from sami_cache.steps import PictureSteps, prepared

_PIXELS_AT_ONCE = 1 << 25
"""Of masks at a picture's resolution, in evaluation."""


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """What follows the first prompt. As published: 8 rounds with a point and 2 without, 11 in all."""

    error_points: int = 8
    """Rounds that add a point from the error region."""
    mask_rounds: int = 2
    """Rounds that add nothing but the last answer: the last one, and others anywhere among those with a point."""
    recompute: bool = True
    """Keep no activations of a round but compute them again for its gradient; less memory, the same numbers."""

    def check(self, family: Family) -> None:
        """Raise SamiCacheError where a family's decoder cannot be trained so."""
        if min(self.error_points, self.mask_rounds) < 0:
            raise SamiCacheError(f"error_points is {self.error_points}, mask_rounds {self.mask_rounds}: expected 0 or more")
        if family == "efficientsam" and (self.mask_rounds or self.error_points > EFFICIENTSAM_POINTS - 2):
            raise SamiCacheError(
                f"{self.error_points} points from the error region and {self.mask_rounds} rounds with the mask only: expected "
                f"up to {EFFICIENTSAM_POINTS - 2} and 0, since a decoder of family efficientsam takes no mask as a prompt, and "
                f"{EFFICIENTSAM_POINTS} points at most, two of which are a box's"
            )

    def draw(self, rng: np.random.Generator) -> list[bool]:
        """Whether each round after the first adds a point."""
        rounds = [True] * self.error_points
        for _ in range(self.mask_rounds - 1):
            rounds.insert(int(rng.integers(len(rounds) + 1)), False)
        return rounds + [False] * min(1, self.mask_rounds)


class TrainedSegmentAnything(SegmentAnything):
    """The same model under the same names, with all rounds of a batch as its `forward`, where wrappers look for it."""

    def forward(
        self, batch: Prompted, rounds: list[bool], recompute: bool, focal_weight: float = FOCAL_WEIGHT
    ) -> dict[str, Tensor]:
        """The training losses of a batch on the model's device; `rounds` as `RoundsConfig.draw` gives them.

        Objects are averaged within their picture, then pictures, so that it does not matter how a batch is cut.
        """
        embeddings = self.encode(batch.pixels)
        points, labels, answer = batch.points, batch.labels, None
        share = batch.real / (batch.real.sum(1, keepdim=True).clamp(min=1) * len(batch.real))
        draws, means = iter(batch.draws.unbind(-1)), []
        for number, adds_point in enumerate([False, *rounds]):
            if adds_point and answer is not None:
                point, label = error_points(answer[:, :, 0], batch.targets, batch.inside[:, None], next(draws))
                points, labels = torch.cat([points, point], 2), torch.cat([labels, label], 2)
            asked = (points, labels) if self.config.family == "sam" else self.complete_prompts(points, labels)
            given = answer if self.config.family == "sam" else None
            arguments = (embeddings, *asked, given, batch, number == 0, focal_weight)
            if recompute and rounds and torch.is_grad_enabled():
                loss, iou, answer = checkpoint(self._round, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
            else:
                loss, iou, answer = self._round(*arguments)
            means.append(((loss * share).sum(), (iou * share).sum()))
        losses, ious = zip(*means, strict=True)
        return {
            "loss": torch.stack(losses).mean(),
            "loss_first": losses[0].detach(),
            "loss_last": losses[-1].detach(),
            "iou_first": ious[0],
            "iou_last": ious[-1],
        }

    def _round(
        self,
        embeddings: Tensor,
        points: Tensor,
        labels: Tensor,
        given: Tensor | None,
        batch: Prompted,
        first: bool,
        focal_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [B, Q], IoU of the mask shown [B, Q], and its logits [B, Q, 1, h, w] for the next round."""
        masks = self.decode(embeddings, points, labels, given)
        masks = masks if first else masks.single
        inside = batch.inside[:, None]
        with torch.autocast(embeddings.device.type, enabled=False):
            logits = masks.logits.float()
            scores = mask_loss(logits, batch.targets, inside, focal_weight)
            estimates = iou_loss(masks.iou, logits, batch.targets, inside)
            loss = single = scores[..., 0] + estimates[..., 0]
            shown = torch.zeros_like(labels[..., :1])
            if first:
                # Of all three the estimate is trained: they are ranked by it.
                best = scores[..., 1:].amin(-1) + estimates[..., 1:].mean(-1)
                loss = torch.where(labels[..., 0] == 2, (best + single) / 2, best)
                shown = 1 + masks.iou[..., 1:].argmax(-1, keepdim=True)
            answer = logits.detach().gather(2, shown[..., None, None].expand(-1, -1, -1, *logits.shape[-2:]))
            iou = mask_iou((answer[:, :, 0] > 0) & inside, batch.targets & inside)
        return loss, iou, answer

    # Sines of coordinates times large numbers: bfloat16's eight bits would move a point by pixels.
    def embed_prompts(self, points: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(points.device.type, enabled=False):
            return super().embed_prompts(points, labels)

    def _image_positions(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return super()._image_positions(embeddings)


def trained(model: SegmentAnything) -> TrainedSegmentAnything:
    """`model` as one that can be trained; the weights are copied."""
    copy = TrainedSegmentAnything(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def error_points(answer: Tensor, targets: Tensor, inside: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A point for every query, uniform where the answer is wrong: points [B, Q, 1, 2] in pixels of the input, labels [B, Q, 1].

    1 where the object was missed, 0 where the answer is too large. Where nothing is wrong: anywhere in the picture.

    Args:
        answer: logits [B, Q, h, w]; targets: bool [B, Q, h, w]; inside: bool, broadcast to that, the cells of the picture.
        draws: float [B, Q] in 0..1, the share of the wrong cells, in reading order, that lie before the one to point at.
    """
    wrong = ((answer > 0) != targets) & inside
    wrong = torch.where(wrong.flatten(2).any(-1)[..., None, None], wrong, inside)
    counted = wrong.flatten(2).cumsum(-1, dtype=torch.int32)
    count = counted[..., -1:]
    wanted = torch.minimum((draws[..., None] * count).to(torch.int32) + 1, count)
    cells = torch.searchsorted(counted, wanted)
    width = targets.shape[-1]
    # The middle of a cell of four pixels, whose own middle is half a pixel further.
    points = torch.stack([cells % width, cells // width], -1) * 4 + 1.5
    return points.to(torch.float32), targets.flatten(2).gather(2, cells).long()


class PromptableTask:
    """Implements `training.Task`."""

    def __init__(
        self,
        model: TrainedSegmentAnything,
        steps: PictureSteps[Prompted],
        config: RoundsConfig,
        *,
        held_out: Annotations | None = None,
        numbers: range | list[int] = range(0),
        focal_weight: float = FOCAL_WEIGHT,
        device: torch.device,
    ) -> None:
        """`held_out`: what is evaluated on, of it the pictures `numbers`: this process's share.

        `focal_weight`: see `mask_loss`.
        """
        config.check(model.config.family)
        self.model: nn.Module = model
        self.steps, self.config, self.device = steps, config, device
        self.held_out, self.numbers, self.focal_weight = held_out, numbers, focal_weight
        self.steps_per_epoch: float | None = steps.steps_per_epoch
        if model.config.family == "sam" and not config.error_points + config.mask_rounds:
            model.get_submodule("prompt_encoder.mask_downscaling").requires_grad_(False)  # nothing would use it

    def batches(self, start_step: int) -> Iterator[tuple[Prompted, list[bool]]]:
        """Prompts and rounds; a step has the same rounds in all its parts and processes."""
        with closing(self.steps.batches(start_step)) as pictures:
            for number, some in enumerate(pictures):
                step = start_step + number // self.steps.accumulate
                yield collate(some), self.config.draw(np.random.default_rng((self.steps.seed, step)))

    def loss(self, model: nn.Module, batch: tuple[Prompted, list[bool]], device: torch.device) -> dict[str, Tensor]:
        prompted, rounds = batch
        there = Prompted(*(value.to(device) for value in prompted))
        return model(there, rounds, self.config.recompute, self.focal_weight)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean IoU over the held-out objects, crowds left out, at the pictures' own resolution.

        `heldout_box_miou`: asked with the true box, token 0's mask; `heldout_box_three_miou`: the same, of the three the one
        that the decoder rates highest. `heldout_click_miou`: one point, uniform in the mask, the highest
        rated of the three: points and rule of `evaluate promptable`'s "1 click" under its protocol `efficientsam`.
        `heldout_box_itself_miou`: the box taken as the mask.
        """
        sums: dict[str, float] = dict.fromkeys(("box", "box_three", "click", "box_itself", "objects"), 0.0)
        if self.held_out is not None:
            jobs = ((number,) for number in self.numbers)
            for question in prepared(self._question, jobs, threads=self.steps.threads, timeout=self.steps.timeout):
                self._ask(model, question, sums)
        total = totals(sums, self.device)
        count = total.pop("objects")
        return {f"heldout_{name}_miou": value / count for name, value in total.items()} if count else {}

    def _question(self, number: int) -> "_Question":
        assert self.held_out is not None
        image = self.held_out.read_image(number)
        return _Question(
            pixels=self.model.preprocess(image),  # type: ignore[operator]
            size=(image.shape[0], image.shape[1]),
            objects=[found for found in self.held_out.objects(number) if not found.crowd],
        )

    def _ask(self, model: Any, question: "_Question", sums: dict[str, float]) -> None:
        """Add what the model answers about one picture."""
        height, width = question.size
        # Masks are decoded where they are needed: a hundred of a large picture take more memory than the model.
        at_once = max(1, _PIXELS_AT_ONCE // max(height * width, model.config.image_size**2))
        embeddings = model.encode(question.pixels[None].to(self.device)) if question.objects else None

        def ask(points: list[Any], labels: list[int]) -> Masks:
            places = torch.from_numpy(np.array(points, np.float32)).view(1, len(points), len(labels), 2)
            places = model.to_input(places, height, width).to(self.device)
            some = torch.tensor(labels, device=self.device).expand(1, len(points), -1)
            return model.decode(embeddings, *model.complete_prompts(places, some))

        def add(name: str, logits: Tensor, true: Tensor) -> None:
            pictures = model.to_picture(logits.float(), height, width)[:, 0] > 0
            sums[name] += float(mask_iou(pictures, true).sum())

        for start in range(0, len(question.objects), at_once):
            shown = [(found, found.mask()) for found in question.objects[start : start + at_once]]
            shown = [(found, mask) for found, mask in shown if mask.any()]
            if not shown:
                continue
            masks = [mask for _, mask in shown]
            true = torch.from_numpy(np.stack(masks)).to(self.device)
            box, click = (
                ask([tight_box(mask) for mask in masks], [2, 3]),
                ask([clicks_of(found, mask, 1, seed=0) for found, mask in shown], [1]),
            )
            add("box", box.single.logits[0], true)
            add("box_three", _highest_rated(box), true)
            add("click", _highest_rated(click), true)
            sums["box_itself"] += sum(map(_filled, masks))
            sums["objects"] += len(masks)


@dataclass(frozen=True, kw_only=True)
class _Question:
    pixels: Tensor  # float32 [3, S, S]
    size: tuple[int, int]  # of the picture, height and width
    objects: list[Object]


def _highest_rated(masks: Masks) -> Tensor:
    """Of the three for one picture: logits [Q, 1, h, w]."""
    best = masks.three.iou[0].argmax(-1)
    return masks.three.logits[0, torch.arange(len(best)), best][:, None]


def _filled(mask: np.ndarray) -> float:
    """IoU of a mask with its own box."""
    x0, y0, x1, y1 = tight_box(mask)
    return float(mask.sum()) / ((x1 - x0) * (y1 - y0))
