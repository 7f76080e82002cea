"""How far predicted masks are from the true ones, as Segment Anything scores them (arXiv 2304.02643, appendix A)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

FOCAL_WEIGHT = 20.0
DICE_WEIGHT = 1.0


def mask_loss(logits: Tensor, target: Tensor, inside: Tensor, focal_weight: float = FOCAL_WEIGHT) -> Tensor:
    """Focal loss (alpha 0.25, gamma 2) and dice loss, published 20 : 1; both are means over a mask's cells.

    Alpha 0.25 counts a cell inside a third of one outside: what a model is not sure of, it leaves out where focal loss decides.

    Args:
        logits: float32 [..., M, h, w], M masks for one object.
        target: bool [..., h, w].
        inside: bool, broadcast to `target`: cells of the picture. The padding around it does not count.

    Returns: float32 [..., M].
    """
    target, inside = target[..., None, :, :].expand_as(logits).float(), inside[..., None, :, :].expand_as(logits).float()
    focal = (sigmoid_focal_loss(logits, target) * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
    shares = logits.sigmoid() * inside
    overlap, both = (shares * target).sum((-2, -1)), (shares + target * inside).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (both + 1)  # 1: so that an empty mask of an empty object is right
    return focal_weight * focal + DICE_WEIGHT * dice


def mask_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of bool [..., h, w] and [..., h, w], broadcast: float32 [...]. 1 where both are empty."""
    overlap, union = (predicted & target).sum((-2, -1)), (predicted | target).sum((-2, -1))
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def iou_loss(estimate: Tensor, logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Squared error of a decoder's own estimate of its masks' IoU: float32 [..., M], shapes as in `mask_loss`."""
    shown = (logits > 0) & inside[..., None, :, :]
    true = mask_iou(shown, (target & inside)[..., None, :, :])
    return F.mse_loss(estimate.float(), true, reduction="none")
