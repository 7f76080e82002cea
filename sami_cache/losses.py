"""What the student is asked to match."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sami_cache.errors import SamiCacheError

Kind = Literal["mse", "cosine"]
Tokens = Literal["all", "masked"]


def feature_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, *, kind: Kind = "mse", tokens: Tokens = "all"
) -> dict[str, Tensor]:
    """How far predicted features are from the teacher's; float32 scalars on the prediction's device, also under autocast.

    `prediction`, `target`: [B, N, C]; `mask`: bool [B, N], True = masked.
    `kind`: "mse", the mean squared difference over tokens and channels, or "cosine", the mean over tokens of 1 - cosine.
    `tokens`: which of them are averaged; SAMI reconstructs "all", MAE the "masked".
    Published ablation (arXiv 2312.00863, ImageNet-1K top-1): mse 76.8, cosine 76.1 (Ti); 82.7, 82.3 (S).

    Returns `loss`, and detached `loss_visible` and `loss_masked`, the same mean over those tokens alone.
    """
    if prediction.shape != target.shape or mask.shape != target.shape[:2]:
        raise SamiCacheError(
            f"shapes do not fit: prediction {tuple(prediction.shape)}, target {tuple(target.shape)}, mask {tuple(mask.shape)}; "
            "expected [B, N, C], [B, N, C], [B, N]: the target must be resampled to the student's grid"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.float()
        if kind == "mse":
            per_token = (prediction - target).square().mean(dim=-1)
        elif kind == "cosine":
            per_token = 1 - F.cosine_similarity(prediction, target, dim=-1)
        else:
            raise SamiCacheError(f"loss kind is {kind!r}: expected 'mse' or 'cosine'")
        masked, visible = _mean_where(per_token, mask), _mean_where(per_token, ~mask)
        if tokens not in ("all", "masked"):
            raise SamiCacheError(f"loss tokens is {tokens!r}: expected 'all' or 'masked'")
        loss = per_token.mean() if tokens == "all" else masked
        return {"loss": loss, "loss_visible": visible.detach(), "loss_masked": masked.detach()}


def _mean_where(per_token: Tensor, chosen: Tensor) -> Tensor:
    return (per_token * chosen).sum() / chosen.sum().clamp(min=1)
