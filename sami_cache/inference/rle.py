"""Masks as COCO's compressed run lengths."""

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """bool [H, W] as COCO's compressed RLE, fit for JSON: {"size": [H, W], "counts": str}."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """The other way: bool [H, W]."""
    return coco.decode(rle).astype(bool)
