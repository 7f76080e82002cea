"""Small holes and islands of a mask."""

import numpy as np
from scipy.ndimage import label

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def remove_small_regions(mask: np.ndarray, area: float) -> tuple[np.ndarray, bool]:
    """A mask with holes of less than `area` pixels filled, then without islands of less, and whether that changed it.

    Mask and result: bool [H, W]. Regions touch by corners too. If all islands are small, the largest stays. What
    `remove_small_regions` of segment-anything does by OpenCV.
    """
    regions, sizes = _regions(~mask)
    small = np.flatnonzero(sizes < area) + 1
    filled = mask | np.isin(regions, small) if len(small) else mask
    regions, sizes = _regions(filled)
    small = np.flatnonzero(sizes < area) + 1
    if not len(small):
        return filled, filled is not mask
    if len(small) == len(sizes):
        small = np.delete(small, sizes.argmax())
    return filled & ~np.isin(regions, small), True


def _regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regions as int32 [H, W], 0 outside of them, and the area of each in pixels."""
    regions = np.empty(mask.shape, np.int32)
    label(mask, structure=_EIGHT_NEIGHBOURS, output=regions)
    return regions, np.bincount(regions.ravel())[1:]
