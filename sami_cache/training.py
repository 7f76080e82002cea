"""The one training loop. What is trained (data, model, loss, metric) is a `Task`; this file never looks inside it.

A run's directory holds `config.json`, `metrics.jsonl`, `tensorboard/` and `checkpoints/`. A resumed run is bit-equal to one
that was never stopped, on the CPU and with the same number of threads and ranks: batches start at the step they are asked for,
and torch's generator is seeded anew at every step from (seed, step, rank), so that neither evaluating, nor logging, nor a
crash can shift it.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sami_cache.checkpoints import (
    Checkpoint,
    NotFiniteError,
    checkpoint_path,
    load_checkpoint,
    put_weights,
    save_checkpoint,
)
from sami_cache.errors import SamiCacheError
from sami_cache.optimizer import NamedAdamW
from sami_cache.processes import GRACE, Interrupted, StopSignal, average, from_first_rank, largest, rank_and_world
from sami_cache.runs import RunLog, open_run, surroundings

# They change what is watched and kept, and into how many parts a step is cut (which goes with the number of processes), never
# what is computed.
FREE_FIELDS = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.accumulate",
)


class Task(Protocol):
    """What is trained. Every rank has its own; a task that draws random numbers in `loss` takes torch's global generator."""

    model: nn.Module
    steps_per_epoch: float | None
    """Optimizer steps, for the log's `epoch`; None leaves it out."""

    def batches(self, start_step: int) -> Iterator[Any]:
        """This rank's micro-batches, on the CPU, `accumulate` for every optimizer step, from `start_step` (0-based) on."""
        ...

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """`loss`, a scalar to minimise: the mean over the micro-batch. Other scalars are logged. `model` may be wrapped."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out metrics, in eval mode without gradients. Every rank is asked, perhaps for a share; rank 0's is logged."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the run is optimised. Saved with it; only `FREE_FIELDS` may change when it is resumed."""

    steps: int
    """Optimizer steps in all."""
    batch_size: int
    """Images a step, over all ranks and micro-batches."""
    lr: float
    """Peak learning rate, after any scaling by the batch (SAMI: 1.5e-4 x batch_size / 256)."""
    seed: int
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    min_lr: float = 0.0
    """What the schedule ends at."""
    schedule: Literal["cosine", "linear", "poly"] = "cosine"
    """How the learning rate falls after the warm-up; poly: with the power 0.9 of what is left."""
    accumulate: int = 1
    """Micro-batches a step; same gradient, less memory."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    """Largest norm of the whole gradient; None does not clip."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the autocast; weights stay float32. auto: bfloat16 on CUDA devices that have it, else float32."""
    compile: bool = False
    log_every: int = 10
    """Steps."""
    checkpoint_every: int = 1000
    """Steps; the last step is always saved, and every step that is evaluated."""
    keep_checkpoints: int = 2
    """Two, so that there is one to fall back to when the newest is damaged."""
    evaluate_every: int | None = None
    """Steps; also before the first and after the last. None: never."""

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "evaluate_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SamiCacheError(f"{name} is {value}: expected 1 or more")
        if not 0 <= self.warmup_steps <= self.steps:
            raise SamiCacheError(f"warmup_steps is {self.warmup_steps} of {self.steps} steps: shorten it or train longer")
        if not (self.lr > 0 and 0 <= self.min_lr <= self.lr):
            raise SamiCacheError(f"lr is {self.lr} and min_lr {self.min_lr}: expected 0 <= min_lr <= lr, and lr above 0")
        if self.seed < 0:
            raise SamiCacheError(f"seed is {self.seed}: expected 0 or more")
        if self.schedule not in ("cosine", "linear", "poly"):
            raise SamiCacheError(f"schedule is {self.schedule!r}: expected 'cosine', 'linear' or 'poly'")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise SamiCacheError(f"precision is {self.precision!r}: expected 'auto', 'float32' or 'bfloat16'")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the step with this 0-based number: linear from lr / warmup_steps up to lr, then down to min_lr at `steps`.

    Down by half a cosine, linearly, or by the power 0.9 of the steps left.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = (1 - done) ** (0.9 if config.schedule == "poly" else 1)
    return config.min_lr + (config.lr - config.min_lr) * left


class Trainer:
    """Trains `task` into `run_dir`.

    `resume=False` starts a run and refuses a directory that is not empty. `resume=True` goes on from the newest intact
    checkpoint, or starts where there is none. `settings` is the caller's resolved configuration: like JSON, everything that
    changes the numbers. With `config`, under "train", it is saved, and a resumed run must bring the same but for
    `free_fields`: dotted names such as "loader.workers"; "loader" frees all below it. `on_log` gets every line of
    `metrics.jsonl`, on rank 0. `grace`: seconds that the step in hand and its checkpoint may take after a signal.
    `lr_scale(name)`: what a parameter's learning rate is multiplied with, such as layer-wise decay.

    Raises `IdentityError` listing the fields that differ, `DamageError` where no checkpoint is intact, else `SamiCacheError`.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        run_dir: Path,
        device: torch.device,
        *,
        resume: bool = False,
        settings: Mapping[str, Any] | None = None,
        free_fields: tuple[str, ...] = (),
        on_log: Callable[[dict[str, Any]], None] = lambda line: None,
        grace: float = GRACE,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ):
        self.task, self.config, self.run_dir, self.device, self.on_log = task, config, Path(run_dir), device, on_log
        self.rank, self.world = rank_and_world()
        if config.batch_size % (self.world * config.accumulate):
            raise SamiCacheError(
                f"batch_size {config.batch_size} is no multiple of {self.world} processes x {config.accumulate} micro-batches"
            )
        train = asdict(config)
        if config.schedule == "cosine":  # as all were before there was a choice, and they are to be continued
            del train["schedule"]
        # Through JSON, so that what is compared on resume has the types of what was saved.
        self.settings = json.loads(json.dumps({**(settings or {}), "train": train}))
        self._lock: IO[str] | None = None
        self._ddp: DistributedDataParallel | None = None
        self._stop = StopSignal(self._describe_abandoned, grace)
        checkpoint = self._open_run(resume, (*FREE_FIELDS, *free_fields))
        self.step = checkpoint.step if checkpoint else 0
        self._seconds = checkpoint.progress["seconds"] if checkpoint else 0.0
        self._saved_step = self.step if checkpoint else -1
        self._grace = grace
        self._owed: dict[str, float] = checkpoint.progress.get("owed") or {} if checkpoint else {}

        wants_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self._bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and wants_bfloat16)
        task.model.to(device)
        self.optimizer = NamedAdamW(
            task.model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, lr_scale=lr_scale
        )
        if checkpoint:
            put_weights(task.model, checkpoint.model, f"the checkpoint of step {checkpoint.step}")
            self.optimizer.load_named_state(checkpoint.optimizer)
        # The first step whose loss was not finite: kept on the device, because asking for it would make the CPU wait.
        self._poisoned = torch.full((), -1, dtype=torch.int64, device=device)

    def fit(self) -> dict[str, Any]:
        """Train to the last step and return the last line logged.

        On the first SIGTERM or SIGINT: finishes the step in hand, writes a checkpoint, raises `Interrupted`; on the second, or
        when the grace has passed: raises it at once. Raises `NotFiniteError` with the step where the loss was not finite;
        nothing is saved from then on.
        """
        with ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.close)
            stack.enter_context(self._stop)
            self._run_log = stack.enter_context(closing(RunLog(self.run_dir, self.step))) if self.rank == 0 else None
            self._last_line = self._run_log.last if self._run_log else {}
            self._started = time.perf_counter()
            self.task.model.train()
            if self._owes_a_line():
                self._record(self._owed | self._evaluate())
            self._owed = {}
            self._stop.holding = True
            if self.step < self.config.steps:
                batches = self.task.batches(self.step)
                stack.callback(_close, batches)
                try:
                    self._loop(self._wrap(), batches)
                except Exception as error:
                    if self.world > 1 and not isinstance(error, NotFiniteError):  # which says where to go from there
                        error.add_note(self._describe_abandoned())
                    raise
        return self._last_line

    def _loop(self, model: nn.Module, batches: Iterator[Any]) -> None:
        config, waited, since, began = self.config, 0.0, self.step, time.perf_counter()
        met_at, met, meets_at = self.step, began, self.step + 1
        while self.step < config.steps:
            lr = learning_rate(self.step, config)
            metrics, wait = self._train_step(model, batches, lr)
            self.step += 1
            waited += wait
            last, logs = self.step == config.steps, self.step % config.log_every == 0
            stop = 0
            if self.world == 1 or self.step >= meets_at:
                # Ranks must stop at the same step. Agreeing costs a collective, so several meet only four times in a grace.
                stop, now = largest(self._stop.number, self.device), time.perf_counter()
                step_ms = largest(round(1000 * (now - met) / (self.step - met_at)), self.device)
                met_at, met = self.step, now
                meets_at = self.step + max(1, min(config.log_every, int(250 * self._grace) // max(1, step_ms)))
            evaluates = config.evaluate_every and (last or self.step % config.evaluate_every == 0)
            saves = last or stop or evaluates or self.step % config.checkpoint_every == 0
            if logs or evaluates or saves or (self.device.type == "cpu" and self.world == 1):
                self._check_finite()
            if logs or evaluates or last:
                line = average(metrics, self.device)  # waits for the device: the clock is read after it
                elapsed = time.perf_counter() - began
                line |= {"lr": lr, "images_per_s": config.batch_size * (self.step - since) / elapsed}
                line |= {"data_wait_percent": 100 * waited / elapsed}
                if evaluates:
                    # It may take long, and a signal is not to lose the steps before it: they are kept first, with the line
                    # that is still to be written. Then nothing is in hand.
                    self._save(owed=line)
                    self._stop.holding = False
                    self._stop.check()
                    line |= self._evaluate()
                    self._stop.holding = True
                self._record(line)
            if saves:
                self._save()
            if stop and not last:
                raise Interrupted(
                    f"stopped by {signal.Signals(stop).name} after step {self.step} of {config.steps}, checkpoint written to "
                    f"{self.run_dir / 'checkpoints'}: the same command with --resume goes on from here",
                    stop,
                )
            if logs or evaluates or saves:
                waited, since, began = 0.0, self.step, time.perf_counter()

    def _train_step(self, model: nn.Module, batches: Iterator[Any], lr: float) -> tuple[dict[str, Tensor], float]:
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, self.step, self.rank)).generate_state(1, np.uint64)[0]))
        metrics: dict[str, Tensor] = {}
        waited, accumulate = 0.0, self.config.accumulate
        for micro in range(accumulate):
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                raise SamiCacheError(f"the task's batches ended at step {self.step} of {self.config.steps}") from None
            waited += time.perf_counter() - began
            with self._ddp.no_sync() if self._ddp is not None and micro < accumulate - 1 else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
                    values = self.task.loss(model, batch, self.device)
                (values["loss"] / accumulate).backward()
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0) + value.detach() / accumulate
        if self.config.clip_grad is not None:
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.task.model.parameters(), self.config.clip_grad)
        healthy = torch.isfinite(metrics["loss"]) | (self._poisoned >= 0)
        self._poisoned = torch.where(healthy, self._poisoned, self.step)
        self.optimizer.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics, waited

    def _check_finite(self) -> None:
        poisoned = largest(int(self._poisoned), self.device)
        if poisoned >= 0:
            raise NotFiniteError(
                f"the loss of step {poisoned} (counted from 0) is not finite; the weights since are lost, the last checkpoint "
                f"is of step {max(0, self._saved_step)}. Start a new run with a lower lr, a longer warm-up or clip_grad"
            )

    def _evaluate(self) -> dict[str, float]:
        self.task.model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            values = self.task.evaluate(self.task.model)
        self.task.model.train()
        return values

    def _record(self, values: Mapping[str, float]) -> None:
        if self._run_log is None:
            return
        line: dict[str, Any] = {"step": self.step}
        if self.task.steps_per_epoch:
            line["epoch"] = self.step / self.task.steps_per_epoch
        line |= values
        line["seconds"] = self._elapsed()
        self._last_line = line
        self._run_log.write(line)
        self.on_log(line)

    def _owes_a_line(self) -> bool:
        """Whether the evaluation of the step we are at is still to be made; every rank gets the same answer."""
        if not self.config.evaluate_every:
            return False
        return from_first_rank(
            lambda: self._last_line.get("step", -1) < self.step if self._owed else self.step == 0, self.device
        )

    def _save(self, owed: Mapping[str, float] | None = None) -> None:
        if self.rank == 0 and self._saved_step != self.step and self._run_log is not None:
            self._run_log.sync()
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.step,
                model=self.task.model.state_dict(),
                optimizer=self.optimizer.named_state(),
                config=self.settings,
                progress={"seconds": self._elapsed(), "owed": owed},
                keep=self.config.keep_checkpoints,
            )
        # A rank that left now would have torchrun stop rank 0 in the middle of writing.
        largest(0, self.device)
        self._saved_step = self.step

    def _wrap(self) -> nn.Module:
        if self.world > 1:
            places = [self.device] if self.device.type == "cuda" else None
            # Gradients lie where they are summed, instead of being copied there. Buffers are not sent round at every step: rank
            # 0's are the ones that are saved. (The option's name is torch 2.15's, before that it was the other.)
            known = signature(DistributedDataParallel).parameters
            buffers: dict[str, Any] = {
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
            }
            self._ddp = DistributedDataParallel(self.task.model, device_ids=places, gradient_as_bucket_view=True, **buffers)
        model = self._ddp or self.task.model
        return torch.compile(model) if self.config.compile else model  # type: ignore[return-value]

    def _open_run(self, resume: bool, free_fields: tuple[str, ...]) -> Checkpoint | None:
        read: list[Checkpoint] = []

        def open_it() -> int | None:
            around = surroundings(self.device, self.world)
            checkpoint, self._lock = open_run(self.run_dir, self.settings, around, resume=resume, free_fields=free_fields)
            read.extend([checkpoint] if checkpoint else [])
            return checkpoint.step if checkpoint else None

        # Rank 0 decides alone, so that no rank mistakes what it has just written for an old run.
        step = from_first_rank(open_it, self.device)
        if step is None:
            return None
        return read[0] if read else load_checkpoint(checkpoint_path(self.run_dir / "checkpoints", step))

    def _describe_abandoned(self) -> str:
        saved = f"step {self._saved_step}" if self._saved_step >= 0 else "none yet"
        return f"stopped at step {self.step}; last checkpoint: {saved}. The same command with --resume goes on from there"

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._started


def _close(batches: Iterator[Any]) -> None:
    """A generator's clean-up runs when the loop is left, however it is left, not when it happens to be collected."""
    if close := getattr(batches, "close", None):
        close()
