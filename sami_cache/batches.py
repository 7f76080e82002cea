"""What a loader hands out, and its way to the device."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one micro-batch."""

    samples: np.ndarray
    """int64 [B], sample numbers."""
    keys: list[str]
    pixels: Tensor | None
    """uint8 [B, 3, S, S], the box of the view, RGB, not mirrored yet."""
    codes: Tensor | None
    """[B, kept, m, m], as the cache stores them."""
    whole: bool
    """Whether the codes are of whole images, so that the view is still to be cut from them, or of the views."""
    boxes: Tensor
    """float32 [B, 4], the views' boxes: (x0, y0, x1, y1) in [0, 1]."""
    flips: Tensor
    """bool [B], whether the view is mirrored."""
    ids_shuffle: Tensor
    """int64 [B, tokens], a random order of the tokens: the first are kept, the others masked."""
    teacher_pixels: Tensor | None
    """uint8 [B, 3, T, T], the view as an online teacher sees it, mirrored."""
    encoded: list[bytes] | None
    """The images' files, where no pixels were asked for."""

    def to(self, device: torch.device) -> "Batch":
        """A copy whose tensors are on `device`; from pinned memory it is made while the processor goes on."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`. On CUDA each is copied on a stream of its own, while the step before is being computed."""
    with closing(batches):  # type: ignore[type-var]
        if device.type != "cuda":
            yield from batches
            return
        copies, steps = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        for batch in batches:
            with torch.cuda.stream(copies):
                there = batch.to(device)
            steps.wait_stream(copies)
            for value in vars(there).values():
                if isinstance(value, Tensor):
                    value.record_stream(steps)
            yield there
