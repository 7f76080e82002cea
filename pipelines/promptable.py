"""Opening a promptable model: a run of ours, or a checkpoint of ours or of others."""

from pathlib import Path

import torch

from sami_cache.checkpoints import load_newest, put_weights
from sami_cache.errors import SamiCacheError
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import load_segment_anything


def open_promptable(run_or_checkpoint: Path, device: torch.device | str = "cpu") -> SegmentAnything:
    """The model of a `finetune promptable` run's newest intact checkpoint, or of a file as `load_segment_anything` reads it.

    In evaluation mode on `device`. Raises SamiCacheError where it is neither, DamageError where no checkpoint is intact.
    """
    path = run_or_checkpoint
    if not (path / "config.json").exists() or not (path / "checkpoints").exists():
        return load_segment_anything(path).to(device)
    checkpoint = load_newest(path / "checkpoints")
    if checkpoint is None:
        raise SamiCacheError(f"{path}: the run has no checkpoint yet. Let it reach its first, or continue it with --resume.")
    settings = checkpoint.config.get("segment_anything")
    if settings is None:
        raise SamiCacheError(
            f"{path}: this is no run of `sami-cache finetune promptable`. Make one from it: sami-cache finetune promptable "
            f"--init {path} --data DIR"
        )
    model = SegmentAnything(SegmentAnythingConfig(**settings))
    put_weights(model, checkpoint.model, f"the checkpoint of step {checkpoint.step} of {path}")
    return model.to(device).eval()
