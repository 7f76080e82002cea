"""A SAMI training of milliseconds a step through the real command line: what the campaigns on `train` share."""

from functools import partial
from pathlib import Path
from typing import Any

from photos import photo_folder

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from sami_cache.checkpoints import Checkpoint

TIMES = ("seconds", "images_per_s", "data_wait_percent")


def make_cache(folder: Path) -> Path:
    """48 photographs in six shards, so that an epoch is ten steps and samples are drawn across shards."""
    photo_folder(folder / "photos", 48)
    lite0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 8, "device": "cpu"}
    extract(ExtractConfig(data=folder / "photos", cache=folder / "cache.zarr", **lite0))
    return folder / "cache.zarr"


def arguments(cache: Path, run: Path, steps: int, **options: Any) -> list[str]:
    """Two micro-batches a step, and images held out. `--resume` also starts a run, so that every attempt can say it."""
    given = {"batch_size": 4, "micro_batch": 2, "holdout": 0.1, "base_lr": 0.02, "decoder_depth": 1, "decoder_width": 32}
    given |= {"cache": cache, "run": run, "student": "vit_t", "device": "cpu", "steps": steps} | options
    return [
        "train",
        "--resume",
        *(text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", f"{value}")),
    ]


def shrink_student() -> None:
    """In the child: two narrow blocks, and dropout, so that a step's numbers depend on torch's generator."""
    import pipelines.train

    small = {"depth": 2, "embed_dim": 24, "num_heads": 3, "proj_drop_rate": 0.1}
    pipelines.train.create_encoder = partial(pipelines.train.create_encoder, **small)  # type: ignore[assignment]


def bits(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every weight and every moment of the optimizer, to be compared bit for bit."""
    tensors = {**checkpoint.model, **{f"optimizer {name}": tensor for name, tensor in checkpoint.optimizer.items()}}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of `metrics.jsonl` without what the clock says."""
    return {name: value for name, value in line.items() if name not in TIMES}
