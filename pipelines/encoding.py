"""The teacher on its device: packed batches of bytes in, embeddings out, and whoever launches a batch waits for none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sami_cache.data.views import valid_region
from sami_cache.models.fast_attention import allow_recompiling
from sami_cache.models.teachers import Teacher

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Packed:
    """A batch of pictures in host memory, pinned where the device is a GPU, so that it is copied while the GPU computes."""

    pixels: Tensor
    """uint8 [B, S, S, 3], each picture in the upper left corner. What lies outside of `sizes` is never looked at."""
    sizes: Tensor
    """int32 [B, 2], height and width in pixels; zeros where there is no picture."""

    def put(self, place: int, picture: np.ndarray) -> None:
        """Pack a picture, uint8 [h, w, 3]. Threads may fill places of a batch at the same time."""
        height, width = picture.shape[:2]
        self.pixels[place].numpy()[:height, :width] = picture
        self.sizes[place].numpy()[:] = height, width


@dataclass(kw_only=True)
class Pending:
    """Embeddings on their way to the host."""

    values: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> np.ndarray:
        """float32 [B, C, grid, grid], once it is there."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.numpy()


class Encoder:
    """A teacher, and what turns its maps of padded pictures into embeddings of `grid` x `grid` cells.

    On a GPU pixels arrive on one stream and embeddings leave on another, so that the one between has nothing but the teacher.
    """

    ahead = 0
    """Batches to launch beyond the one that is waited for, so that a GPU has the next when it has done one."""

    def __init__(
        self, teacher: Teacher, *, grid: int, precision: str, device: torch.device, compiled: str | None = None
    ) -> None:
        """`compiled`: a mode of torch.compile for the teacher, None to run it as it is. The teacher is moved to `device`."""
        self.teacher, self.grid, self.device = teacher.to(device), grid, device
        self.dtype = PRECISIONS[precision]
        if self.dtype != torch.float32:
            cast_once(teacher, self.dtype)
        self.maps = compile_teacher(teacher, self._maps, compiled) if compiled else self._maps
        on_gpu = device.type == "cuda"
        if on_gpu:
            self.ahead = 2
        self.arriving, self.leaving = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))

    def empty(self, batch_size: int) -> Packed:
        """Room for a batch. torch keeps pinned memory for the next one, and not before what is copied from it has arrived."""
        size, pinned = self.teacher.info.image_size, self.device.type == "cuda"
        return Packed(
            pixels=torch.empty(batch_size, size, size, 3, dtype=torch.uint8, pin_memory=pinned),
            sizes=torch.zeros(batch_size, 2, dtype=torch.int32, pin_memory=pinned),
        )

    @torch.inference_mode()
    def launch(self, batch: Packed) -> Pending:
        """Have a batch encoded. On a GPU this returns before anything is computed, on the CPU afterwards."""
        if self.arriving is None or self.leaving is None:
            return Pending(values=self.encode(batch.pixels, batch.sizes), event=None)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.arriving):
            pixels, sizes = (part.to(self.device, non_blocking=True) for part in (batch.pixels, batch.sizes))
        with torch.cuda.stream(computing):
            computing.wait_stream(self.arriving)
            for part in (pixels, sizes):
                part.record_stream(computing)
            embeddings = self.encode(pixels, sizes)
        with torch.cuda.stream(self.leaving):
            self.leaving.wait_stream(computing)
            embeddings.record_stream(self.leaving)
            values = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
            values.copy_(embeddings, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record(self.leaving)
        return Pending(values=values, event=event)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """What `Packed` holds, on the device -> float32 [B, C, grid, grid]; nothing of use where there is no picture."""
        maps = self.maps(pixels, sizes)
        side = self.teacher.info.image_size
        cells = torch.where(sizes > 0, sizes, side) / self.teacher.info.stride
        # Outside of what may be a CUDA graph, whose output the next batch overwrites: this makes a new tensor of it.
        return valid_region(maps.float(), cells, self.grid)

    def _maps(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.teacher(normalise_and_pad(self.teacher, pixels, sizes))


def compile_teacher(
    teacher: Teacher, maps: Callable[[Tensor, Tensor], Tensor], mode: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """`maps`, or the blocks of the teacher within it, through torch.compile for one shape.

    A transformer's blocks are compiled by themselves: those of a SAM make three graphs, of the first, the windowed and the
    global ones, where the whole of ViT-H is 32 of them in one, which takes many times as long. Only a CUDA graph is made of
    the whole, because what it saves is launching.
    """
    allow_recompiling()
    blocks = getattr(teacher.encoder, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or mode == "reduce-overhead":
        return torch.compile(maps, mode=mode, dynamic=False, fullgraph=True)
    for block in blocks:
        block.compile(mode=mode, dynamic=False, fullgraph=True)
    return maps


def normalise_and_pad(teacher: Teacher, pixels: Tensor, sizes: Tensor) -> Tensor:
    """What `Packed` holds -> float32 [B, 3, S, S]: normalised, zeros right of and below each picture, as SAM pads it."""
    places = torch.arange(pixels.shape[1], device=pixels.device)
    below, right = (places >= sizes[:, side, None] for side in (0, 1))
    outside = below[:, None, :, None] | right[:, None, None, :]
    return teacher.normalise(pixels.permute(0, 3, 1, 2).contiguous()).masked_fill(outside, 0.0)


def cast_once(teacher: nn.Module, dtype: torch.dtype) -> None:
    """Keep in `dtype` the weights that autocast would cast in every batch; what is computed stays the same bit for bit.

    Those of SAM's ViT-H are read and written in a millisecond of an H200, a batch of 32 at 224 pixels takes some twenty.
    """
    kinds: Any = (nn.Linear, nn.Conv2d)
    for module in teacher.modules():
        if type(module) in kinds:  # what is derived from them may do more with its weights
            module.to(dtype)
