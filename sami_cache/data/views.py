"""Views: what the student sees of an image, and the same cut from a feature map.

A view is a crop box in relative image coordinates and a flip. A feature map of the whole image has the same relative
coordinates (cell j of n covers [j / n, (j + 1) / n)), so one view cuts pixels and features alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VIEW_DRAWS = 41
"""Random numbers a view takes."""
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How random views are drawn: RandomResizedCrop as MAE has it (arXiv 2111.06377, appendix A.1), then a flip."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the crop as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop, in pixels of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class View:
    """A crop box (x0, y0, x1, y1) in [0, 1] of the image's width and height, and whether the crop is mirrored."""

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False


def random_view(draws: Sequence[float], width: int, height: int, config: ViewConfig | None = None) -> View:
    """A random view of an image of `width` x `height` pixels; the draw is torchvision's RandomResizedCrop's.

    Ten tries for a box that fits, then the largest central box of an allowed ratio.

    Args:
        draws: `VIEW_DRAWS` numbers, uniform in [0, 1). Always as many, so that views drawn in turn from one generator do
            not depend on the image sizes before them.
    """
    config = config or ViewConfig()
    flip = draws[-1] < config.flip
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    for start in range(0, VIEW_DRAWS - 1, 4):
        area_draw, ratio_draw, x_draw, y_draw = draws[start : start + 4]
        area = width * height * (config.scale[0] + (config.scale[1] - config.scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
            return View((x / width, y / height, (x + w) / width, (y + h) / height), flip)
    w = min(width, max(1, round(height * config.ratio[1])))
    h = min(height, max(1, round(width / config.ratio[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return View((x / width, y / height, (x + w) / width, (y + h) / height), flip)


def crop_image(image: Image.Image, view: View, size: int, *, interpolation: str = "bicubic") -> np.ndarray:
    """The view of `image` as uint8 [size, size, 3], resized with antialias (`interpolation`: bilinear or bicubic)."""
    x0, y0, x1, y1 = view.box
    box = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
    pixels = np.array(image.resize((size, size), RESAMPLING[interpolation], box=box))
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels


def crop_pixels(pixels: np.ndarray, view: View, out: Tensor) -> None:
    """The box of a view, unmirrored, resized to `out`: uint8 [h, w, 3] -> [3, S, S] (bicubic, antialias).

    Cut at whole pixels, which is exact for views that were drawn for this size. torch's kernel takes a fifth of Pillow's time
    and differs from it by 0.3 of 255 on average. `out` may be of any memory layout; channels last is the fastest.
    """
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = view.box
    left, top = min(width - 1, round(x0 * width)), min(height - 1, round(y0 * height))
    cut = pixels[top : max(top + 1, round(y1 * height)), left : max(left + 1, round(x1 * width))]
    # Made contiguous here because torch would do it with threads of its own, a set of them for each of the loader's.
    batch = torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bicubic2d_aa.out(batch, out.shape[1:], False, out=out[None])


def mirror(pixels: Tensor, flips: Tensor) -> Tensor:
    """[B, 3, h, w] with the images mirrored whose `flips` [B] is true."""
    return torch.where(flips[:, None, None, None], pixels.flip(3), pixels)


def letterbox(image: Image.Image, size: int, *, interpolation: str = "bilinear") -> np.ndarray:
    """The whole image as uint8 [h, w, 3] with max(h, w) == size: SAM's ResizeLongestSide (int(x + 0.5) rounding).

    Padding to [size, size] is the caller's, with zeros after normalisation, as SAM does it.
    """
    scale = size / max(image.width, image.height)
    width, height = (max(1, int(side * scale + 0.5)) for side in (image.width, image.height))
    return np.array(image.resize((width, height), RESAMPLING[interpolation]))


def resample_weights(start: Tensor, stop: Tensor, size_in: int, size_out: int, cells: Tensor | None = None) -> Tensor:
    """Weights [B, size_out, size_in] that resample the interval [start, stop) of a row of `size_in` cells.

    Args:
        start, stop: [B], in cells (cell j covers [j, j + 1)).
        cells: [B], how many leading cells may be read; all of them by default.

    Area averaging when shrinking, linear interpolation when enlarging (the same formula: the overlap of two boxes, the
    larger at least one cell wide). The weights are then tilted so that each output's centre of mass is exactly its
    centre: linear functions come out exact, half a cell beyond the outermost centres included, where plain clamping would
    shift features by up to half a cell. Positions are what a feature map is for.
    """
    count = torch.full_like(start, float(size_in)) if cells is None else cells.to(start.dtype)
    scale = ((stop - start) / size_out)[:, None]
    centre = start[:, None] + scale * (torch.arange(size_out, device=start.device, dtype=start.dtype) + 0.5)
    position = torch.arange(size_in, device=start.device, dtype=start.dtype) + 0.5
    half = scale.clamp(min=1.0) / 2
    # At the border the kernel is held where it reaches two cells, so that the tilt below has a slope to work with.
    reach = half.clamp(min=1.0)
    kernel = torch.minimum(torch.maximum(centre, reach), count[:, None] - reach)[..., None]
    upper = torch.minimum(position + 0.5, kernel + half[..., None])
    lower = torch.maximum(position - 0.5, kernel - half[..., None])
    weights = (upper - lower).clamp(min=0) * (position < count[:, None, None])
    offset = position - centre[..., None]
    s0, s1, s2 = (torch.sum(weights * offset**power, -1, keepdim=True) for power in range(3))
    determinant = s0 * s2 - s1 * s1
    tilted = weights * (s2 - s1 * offset) / determinant.clamp(min=1e-6)
    return torch.where(determinant > 1e-6, tilted, weights / s0)


def valid_region(embeddings: Tensor, valid: Tensor, size: int) -> Tensor:
    """Resample the valid part of letterboxed maps to `size` x `size`, so that grid coordinates are image coordinates.

    Args:
        embeddings: [B, C, h, w], the encoder's maps of padded images.
        valid: [B, 2], height and width of the image inside the padding, in cells (fractions included).

    Returns: [B, C, size, size].
    """
    zero = torch.zeros_like(valid[:, 0])
    rows = resample_weights(zero, valid[:, 0], embeddings.shape[2], size, valid[:, 0].ceil())
    columns = resample_weights(zero, valid[:, 1], embeddings.shape[3], size, valid[:, 1].ceil())
    return _separable(embeddings, rows, columns)


def crop_embeddings(embeddings: Tensor, boxes: Tensor, flips: Tensor, size: int, *, synthesis: Tensor | None = None) -> Tensor:
    """Cut views from whole-image maps: [B, C, h, w] -> [B, C, size, size].

    Args:
        boxes: [B, 4], (x0, y0, x1, y1) in [0, 1].
        flips: [B] bool.
        synthesis: [h, h] of square maps that come transformed, the maps being synthesis @ embeddings @ synthesis^T. It is
            folded into the resampling, which is linear too.
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    height, width = embeddings.shape[2:]
    rows = resample_weights(y0 * height, y1 * height, height, size)
    columns = resample_weights(x0 * width, x1 * width, width, size)
    if synthesis is not None:
        rows, columns = rows @ synthesis, columns @ synthesis
    return _separable(embeddings, rows, torch.where(flips[:, None, None], columns.flip(1), columns))


def _separable(embeddings: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    rows, columns = rows.to(embeddings.dtype), columns.to(embeddings.dtype)
    return rows[:, None] @ embeddings @ columns[:, None].transpose(-1, -2)
