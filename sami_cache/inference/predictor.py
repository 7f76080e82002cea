"""One picture encoded once, asked often: shaped as `SamPredictor` of the package `segment-anything`."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sami_cache.errors import SamiCacheError
from sami_cache.inference.checked_prompts import Prompts, check_prompts
from sami_cache.models.segment_anything import Masks, SegmentAnything

QUERIES_AT_ONCE = 16
"""At 1024 px a query takes about 30 MB in SAM's decoder; on a CPU more at once is no faster."""


class SamPredictor:
    """Masks for prompts about one picture after another, from a model of either family.

    Not for several threads at once. The model is taken as it is: in evaluation mode, on its device.
    """

    def __init__(self, model: SegmentAnything, *, queries_at_once: int = QUERIES_AT_ONCE) -> None:
        """`queries_at_once`: queries that are decoded together, which bounds the memory; the answers do not depend on it."""
        if queries_at_once < 1:
            raise SamiCacheError(f"queries_at_once is {queries_at_once}: expected 1 or more")
        self.model, self.queries_at_once = model, queries_at_once
        self._embedding: Tensor | None = None
        self._size = (0, 0)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_image_set(self) -> bool:
        return self._embedding is not None

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width of the picture that is set."""
        self.get_image_embedding()
        return self._size

    @torch.no_grad()
    def set_image(self, image: np.ndarray, image_format: Literal["RGB", "BGR"] = "RGB") -> None:
        """Encode a picture: upright, uint8 [H, W, 3]. Raises SamiCacheError for anything else."""
        self.reset_image()
        if image_format not in ("RGB", "BGR"):
            raise SamiCacheError(f"set_image: image_format is {image_format!r}: expected 'RGB' or 'BGR'")
        try:
            pixels = self.model.preprocess(image if image_format == "RGB" else image[..., ::-1])
        except ValueError as error:
            raise SamiCacheError(f"set_image: {error}") from error
        self._embedding = self.model.encode(pixels[None].to(self.device))
        self._size = (int(image.shape[0]), int(image.shape[1]))

    def reset_image(self) -> None:
        """Forget the picture."""
        self._embedding = None

    def get_image_embedding(self) -> Tensor:
        """Of the picture that is set: [1, 256, S / 16, S / 16], on the model's device."""
        if self._embedding is None:
            raise SamiCacheError("no picture is set: call set_image(picture) before asking for masks.")
        return self._embedding

    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one query about the picture.

        Args:
            point_coords: [P, 2], (x, y) in pixels of the picture.
            point_labels: [P], 1 inside, 0 outside.
            box: [4], or [1, 4] as segment-anything's examples have it, x0 y0 x1 y1 in pixels of the picture.
            mask_input: float [1, S / 4, S / 4], low-resolution logits of an earlier answer; family `sam` only.
            multimask_output: three masks, for prompts that leave a doubt; else the one that is for those that leave none.
            return_logits: do not cut the masks at 0.

        Returns:
            Masks [M, H, W], bool or float32; the model's own estimates of their IoU, float32 [M]; and low-resolution logits,
            float32 [M, S / 4, S / 4].

        Raises SamiCacheError for prompts that cannot be meant: outside the picture, NaN, an empty box, another label, none.
        """
        if isinstance(box, np.ndarray) and box.shape == (1, 4):
            box = box[0]
        points, labels, boxes, mask_inputs = (
            None if value is None else _with_query(value) for value in (point_coords, point_labels, box, mask_input)
        )
        masks, iou, low_res = self.predict_batch(
            points, labels, boxes, mask_inputs, multimask_output=multimask_output, return_logits=return_logits
        )
        return masks[0], iou[0], low_res[0]

    def predict_batch(
        self,
        points: Any = None,
        labels: Any = None,
        boxes: Any = None,
        mask_inputs: Any = None,
        *,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for Q queries about the picture.

        Args:
            points: [Q, P, 2]; labels: [Q, P], -1 where a query has fewer points than others; boxes: [Q, 4];
            mask_inputs: [Q, 1, S / 4, S / 4]. Each as in `predict`.

        Returns:
            As `predict`, with Q in front: masks [Q, M, H, W], IoU [Q, M], low-resolution logits [Q, M, S / 4, S / 4]. The
            masks take Q x M x H x W bytes; for big pictures and many queries see `decode` and `MaskGenerator`.
        """
        found = []
        height, width = self.original_size
        for part in self.decode(points, labels, boxes, mask_inputs, multimask_output=multimask_output):
            for logits, iou in zip(part.logits, part.iou, strict=True):
                picture = self.model.to_picture(logits[None], height, width)[0]
                masks = picture if return_logits else picture > 0
                found.append(tuple(value.cpu().numpy() for value in (masks, iou.float(), logits.float())))
        masks, iou, low_res = (np.stack(values) for values in zip(*found, strict=True))
        return masks, iou, low_res

    def decode(
        self,
        points: Any = None,
        labels: Any = None,
        boxes: Any = None,
        mask_inputs: Any = None,
        *,
        multimask_output: bool = True,
    ) -> Iterator[Masks]:
        """As `predict_batch`, but low-resolution answers alone, a part of the queries after another.

        Yields `Masks` of q queries, q at most `queries_at_once`: logits [q, M, S / 4, S / 4] and IoU [q, M], on the model's
        device. All prompts are checked before this returns. `SegmentAnything.to_picture` enlarges the logits.
        """
        embedding = self.get_image_embedding()
        masks = None if mask_inputs is None else self._check_masks(mask_inputs)
        if masks is not None and points is None and labels is None and boxes is None:
            prompts = Prompts(np.zeros((len(masks), 0, 2)), np.zeros((len(masks), 0), np.int64))
        else:
            prompts = check_prompts(*self._size, points, labels, boxes)
        queries = len(prompts.labels)
        if not queries:
            raise SamiCacheError("no prompt at all: there are no queries.")
        if masks is not None and len(masks) != queries:
            raise SamiCacheError(f"mask_inputs: {len(masks)} for {queries} queries: expected one a query.")
        return self._decode(embedding, self._on_device(prompts), masks, multimask_output)

    def _on_device(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """[1, Q, P, 2] and [1, Q, P] in pixels of the input, with the points that the family adds."""
        height, width = self._size
        points = self.model.to_input(torch.from_numpy(prompts.points), height, width).float()[None].to(self.device)
        labels = torch.from_numpy(prompts.labels)[None].to(self.device)
        # segment-anything adds no point to a query that is a mask alone.
        return self.model.complete_prompts(points, labels) if labels.shape[2] else (points, labels)

    @torch.no_grad()
    def _decode(
        self, embedding: Tensor, prompts: tuple[Tensor, Tensor], masks: Tensor | None, multimask_output: bool
    ) -> Iterator[Masks]:
        points, labels = prompts
        for start in range(0, labels.shape[1], self.queries_at_once):
            part = slice(start, start + self.queries_at_once)
            given = None if masks is None else masks[None, part].to(self.device)
            answer = self.model.decode(embedding, points[:, part], labels[:, part], given)
            chosen = answer.three if multimask_output else answer.single
            yield Masks(chosen.logits[0], chosen.iou[0])

    def _check_masks(self, values: Any) -> Tensor:
        masks = torch.as_tensor(np.asarray(values), dtype=torch.float32)
        side = self.model.config.image_size // 4
        if masks.ndim != 4 or tuple(masks.shape[1:]) != (1, side, side) or not bool(masks.isfinite().all()):
            raise SamiCacheError(
                f"mask_input: expected an earlier answer's finite logits, [1, {side}, {side}] a query, found the shape "
                f"{list(masks.shape[1:])}."
            )
        if self.model.config.family != "sam":
            raise SamiCacheError(
                "mask_input: a model of family efficientsam takes no mask as a prompt; one of family sam does."
            )
        return masks


def _with_query(value: Any) -> Any:
    """A ragged list stays one, for the check that words its error."""
    try:
        return np.asarray(value)[None]
    except ValueError:
        return [value]
