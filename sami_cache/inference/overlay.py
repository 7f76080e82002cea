"""Masks drawn over their picture."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from sami_cache.inference.checked_prompts import Prompts

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_INSIDE, _OUTSIDE, _BOX = (0, 200, 0), (220, 0, 0), (255, 255, 255)


def draw_masks(image: np.ndarray, masks: Iterable[np.ndarray]) -> np.ndarray:
    """A picture, uint8 [H, W, 3], with masks, bool [H, W], laid over it half transparent, and their edges full."""
    drawn = image.copy()
    width = 1 + max(image.shape[:2]) // 600
    for index, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            continue
        # Within its box: a photo of twelve megapixels has hundreds of masks.
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part, colour = mask[box], np.array(COLOURS[index % len(COLOURS)], np.uint8)
        target = drawn[box]
        target[part] = target[part] // 2 + colour // 2
        inner = np.asarray(binary_erosion(part, iterations=width), dtype=bool)
        target[part & ~inner] = colour
    return drawn


def draw_prompts(image: np.ndarray, prompts: Prompts) -> np.ndarray:
    """A picture with the points (green inside, red outside) and boxes of queries about it."""
    page = Image.fromarray(image)
    pen = ImageDraw.Draw(page)
    radius = 3 + max(image.shape[:2]) // 200
    for points, labels in zip(prompts.points, prompts.labels, strict=True):
        corners: list[Any] = [tuple(point) for point, label in zip(points, labels, strict=True) if label in (2, 3)]
        if corners:
            pen.rectangle(corners, outline=_BOX, width=1 + radius // 3)
        for (x, y), label in zip(points, labels, strict=True):
            if label in (0, 1):
                place = (x - radius, y - radius, x + radius, y + radius)
                pen.ellipse(place, fill=_INSIDE if label else _OUTSIDE, outline=_BOX)
    return np.asarray(page)
