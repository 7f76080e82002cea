"""What every training command shares: the options of a run, the sizes of its steps, and starting it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sami_cache.errors import SamiCacheError
from sami_cache.processes import GRACE, StopSignal, distributed, objects_kept, rank_and_world
from sami_cache.training import Task, TrainConfig, Trainer

# They say where things are and how fast they go, not what is computed.
FREE_FIELDS = ("places",)
CHECKPOINT_STEPS = 2000
"""A run keeps a checkpoint at least so often: an epoch of a large set is more than anyone wants to lose."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a fine-tuning is run. A task's own configuration inherits this and gives its recipe's numbers as defaults."""

    run: Path
    epochs: float
    steps: int | None = None
    """Instead of epochs."""
    warmup_epochs: float = 0
    warmup_steps: int | None = None
    """Instead of epochs of warm-up."""
    batch_size: int
    """Pictures a step. Where there are fewer pictures: all of them."""
    micro_batch: int | None = None
    """Pictures a process sees at once, an upper limit; None: what suits the device."""
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float | None = None
    """Largest norm of the gradient; None does not clip."""
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    workers: int | None = None
    """Threads that prepare pictures; None: one a core, at most 16."""
    log_every: int | None = None
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    grace: float = GRACE
    """Seconds that the step in hand and its checkpoint may take after SIGTERM or SIGINT."""
    data_timeout: float = 60.0
    """Seconds without a picture after which the run stops with an error."""
    resume: bool = False
    """Continue the run in `run`."""


@dataclass(kw_only=True)
class Prepared:
    """A run that is ready to start."""

    task: Task
    train: TrainConfig
    settings: dict[str, Any]
    """What is saved with the run, `train` left out."""
    lr_scale: Callable[[str], float] = lambda name: 1.0
    """What a parameter's learning rate is multiplied with."""
    begin: Callable[[], None] = lambda: None
    """Called where there is no checkpoint to go on from: takes the weights that the run starts with."""


def run_task(
    options: Any,
    prepare: Callable[[torch.device], Prepared],
    on_log: Callable[[dict[str, Any]], None] = lambda line: None,
    on_start: Callable[[Any], None] = lambda prepared: None,
) -> dict[str, Any]:
    """Run or continue what `prepare` makes on the device; returns the last line of its log.

    `options` has `run`, `device`, `grace` and `resume`, as `RunOptions` has. `on_start` is called in the first process alone.
    Raises what `prepare` and `Trainer` raise.
    """
    nothing_yet = "interrupted outside of training; the same command starts, or with --resume goes on."
    with StopSignal(lambda: nothing_yet), distributed(options.device) as device:
        prepared = prepare(device)
        trainer = Trainer(
            prepared.task,
            prepared.train,
            options.run,
            device,
            resume=options.resume,
            settings=prepared.settings,
            free_fields=FREE_FIELDS,
            on_log=on_log,
            grace=options.grace,
            lr_scale=prepared.lr_scale,
        )
        if trainer.step == 0:
            prepared.begin()
        if rank_and_world()[0] == 0:
            on_start(prepared)
        with objects_kept():
            return trainer.fit()


def train_config(
    options: RunOptions,
    count: int,
    device: torch.device,
    *,
    micro_batch: Mapping[str, int],
    evaluates: bool,
    schedule: Literal["cosine", "linear", "poly"] = "cosine",
) -> TrainConfig:
    """The steps of a run over `count` pictures. `micro_batch`: by type of device, where the options do not say."""
    world = rank_and_world()[1]
    batch_size = options.batch_size
    if batch_size > count:
        batch_size = max(1, count // world) * world
    limit = options.micro_batch or micro_batch.get(device.type, micro_batch["cpu"])
    steps_per_epoch = max(1, count // batch_size)
    steps = options.steps or max(1, round(options.epochs * steps_per_epoch))
    warmup = round(options.warmup_epochs * steps_per_epoch) if options.warmup_steps is None else options.warmup_steps
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        lr=options.lr,
        seed=options.seed,
        warmup_steps=min(warmup, steps),
        schedule=schedule,
        accumulate=micro_batches(batch_size, world, limit),
        weight_decay=options.weight_decay,
        betas=options.betas,
        clip_grad=options.clip_grad,
        precision=options.precision,
        **cadence(options, steps, steps_per_epoch, evaluates=evaluates),
    )


def cadence(options: Any, steps: int, steps_per_epoch: float, *, evaluates: bool) -> dict[str, Any]:
    """`log_every`, `checkpoint_every` and `evaluate_every`: what the options say, else about once an epoch."""
    epoch = max(round(steps_per_epoch), min(200, steps))
    return {
        "log_every": options.log_every or max(1, min(20, steps // 50)),
        "checkpoint_every": options.checkpoint_every or min(epoch, CHECKPOINT_STEPS),
        "evaluate_every": (options.evaluate_every or max(1, min(epoch, steps // 2))) if evaluates else None,
    }


def micro_batches(batch_size: int, world: int, limit: int) -> int:
    """The fewest micro-batches that keep a process's share within `limit` images and cut it evenly."""
    if batch_size < 1 or limit < 1:
        raise SamiCacheError(f"--batch-size {batch_size}, --micro-batch {limit}: expected 1 or more")
    if batch_size % world:
        raise SamiCacheError(f"--batch-size {batch_size} is no multiple of the {world} processes.")
    share = batch_size // world
    return next(parts for parts in range(math.ceil(share / limit), share + 1) if share % parts == 0)


def step_options(options: RunOptions, train: TrainConfig) -> dict[str, Any]:
    """Of `PictureSteps`, for this process."""
    rank, world = rank_and_world()
    return {
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "seed": options.seed,
        "rank": rank,
        "world": world,
        "threads": options.workers,
        "timeout": options.data_timeout,
    }
