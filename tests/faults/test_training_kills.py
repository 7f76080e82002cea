"""Training killed with SIGKILL at random steps and moments, and resumed with other numbers of workers: nothing may differ.

A small SAMI run (a narrow vit_t with dropout, 36 steps of two micro-batches over four epochs, images held out) goes once
undisturbed through the real command line. Then runs of the same settings are killed again and again: between steps, in the
loss, in an evaluation, at a file operation of a checkpoint, with half a tensor file or half a line of the log written, while
the run is opened and while its log is, and by the clock alone. Each goes on with 1 to 6 workers and other cadences of
checkpoints; every other run also logs and evaluates at other steps. Compared with the undisturbed run, bit for bit: the
samples, pixels, codes, views and masks of every micro-batch that reached the loss, the state of torch's generator there, all
that was logged, and the final weights and moments. A kill may damage no checkpoint, take none away, and lose no step that a
checkpoint holds. One thread, CPU.
"""

import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from tiny_training import arguments, bits, make_cache, shrink_student, untimed

from sami_cache.batches import Batch
from sami_cache.checkpoints import load_newest

SEED = 20261123
STEPS = 36
FEW_STEPS = 18
# Where a process dies, and the most times that it comes there before.
PLACES = {
    "step": 5,
    "loss": 10,
    "evaluation": 2,
    "checkpoint": 3,
    "checkpoint's files": 40,
    "half a tensor file": 5,
    "half a line of the log": 6,
    "opening the run": 8,
    "opening the log": 2,
    "clock": 1,
}
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@dataclass(frozen=True)
class Kill:
    """Die of SIGKILL `delay` seconds after coming to `place` for the `time`-th time."""

    place: str
    time: int
    delay: float


class Watched:
    """In the child: notes what reaches the loss, and kills the process."""

    def __init__(self, journal: str, kill: Kill | None):
        self.kill, self.times, self.step, self.opened = kill, 0, -1, ""
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def here(self, place: str) -> bool:
        """Whether this is the place and the time."""
        self.times += self.kill is not None and place == self.kill.place
        return self.kill is not None and place == self.kill.place and self.times == self.kill.time

    def come(self, place: str) -> None:
        if self.kill and self.here(place):
            if self.kill.delay:
                threading.Timer(self.kill.delay, die).start()
            else:
                die()

    def note(self, batch: Batch) -> None:
        """One write, so that a kill cannot tear the line."""
        parts = [getattr(batch, name) for name in ("pixels", "codes", "boxes", "flips", "ids_shuffle")]
        content = blake3(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        state = blake3(torch.get_rng_state().numpy().tobytes()).hexdigest()
        line = {"step": self.step, "samples": batch.samples.tolist(), "keys": batch.keys, "content": content, "rng": state}
        os.write(self.journal, json.dumps(line).encode() + b"\n")

    @contextmanager
    def files_of(self, place: str) -> Iterator[None]:
        self.opened = place
        yield
        self.opened = ""

    def audit(self, event: str, _: tuple) -> None:
        if self.opened and event in FILE_OPERATIONS and threading.current_thread() is threading.main_thread():
            self.come(self.opened)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(journal: str, kill: Kill | None) -> None:
    """In the child, before the command line starts."""
    import sys

    from sami_cache import checkpoints, runs, training
    from sami_cache.tasks.sami import SAMITask

    shrink_student()
    watched = Watched(journal, kill)
    sys.addaudithook(watched.audit)
    real_step, real_loss, real_evaluate = training.Trainer._train_step, SAMITask.loss, SAMITask.evaluate
    real_save, real_file, real_open = training.save_checkpoint, checkpoints.save_file, training.open_run
    real_log, real_write = runs.RunLog.__init__, runs.RunLog.write

    def step(self, *rest):
        watched.step = self.step
        watched.come("step")
        return real_step(self, *rest)

    def loss(self, model, batch, device):
        watched.note(batch)
        watched.come("loss")
        return real_loss(self, model, batch, device)

    def evaluate(self, model):
        watched.come("evaluation")
        torch.rand(7)  # as a metric might: no step may notice
        return real_evaluate(self, model)

    def save(*args, **options):
        watched.come("checkpoint")
        with watched.files_of("checkpoint's files"):
            return real_save(*args, **options)

    def tensors(content, path):
        real_file(content, path)
        if watched.here("half a tensor file"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    def open_run(*args, **options):
        with watched.files_of("opening the run"):
            return real_open(*args, **options)

    def open_log(self, *args):
        with watched.files_of("opening the log"):
            real_log(self, *args)

    def write(self, line):
        if watched.here("half a line of the log"):
            text = json.dumps(line)
            self._file.write(text[: len(text) // 2])
            self._file.flush()
            die()
        real_write(self, line)

    training.Trainer._train_step, SAMITask.loss, SAMITask.evaluate = step, loss, evaluate
    training.save_checkpoint, checkpoints.save_file, training.open_run = save, tensors, open_run
    runs.RunLog.__init__, runs.RunLog.write = open_log, write
    watched.come("clock")


class Runs:
    """The undisturbed run, and those that are killed and compared with it."""

    def __init__(self, spawn: Any, folder: Path, steps: int, rng: random.Random):
        self.spawn, self.folder, self.last, self.rng, self.cache = spawn, folder, steps, rng, make_cache(folder)
        self.killed: Counter[str] = Counter()
        self.attempts = self.finished = self.steps = self.repeated = 0
        calm = folder / "calm"
        assert self.attempt(calm, None, workers=2, log_every=1, checkpoint_every=steps, evaluate_every=3) == 0
        self.reference = self.read_journal()
        assert [line["step"] for line in self.reference] == [step for step in range(steps) for _ in range(2)]
        self.lines = {line["step"]: untimed(line) for line in read_lines(calm)}
        self.bits = bits(self.newest(calm))

    def attempt(self, run: Path, kill: Kill | None, **options: int) -> int | None:
        """Start or continue the run. Returns the exit code; whatever is not the kill asked for must be 0."""
        self.attempts += 1
        self.journal = self.folder / f"{self.attempts}.jsonl"
        self.said = self.folder / f"{self.attempts}.txt"
        given = arguments(self.cache, run, self.last, **options)
        process = self.spawn(*given, prepare=partial(watch, str(self.journal), kill), stderr=str(self.said))
        process.join(60)
        allowed = (0,) if kill is None else (0, -signal.SIGKILL)
        assert process.exitcode in allowed, f"{kill}, {options}: {process.exitcode}\n{self.said.read_text()}"
        assert "damaged" not in self.said.read_text()
        return process.exitcode

    def disturbed(self, run: Path, kill: Kill | None, frequent: bool) -> int | None:
        """One attempt, compared with the reference as far as it got."""
        before = self.newest(run)
        start = before.step if before else 0
        options = {"workers": self.rng.randint(1, 6), "checkpoint_every": self.rng.randint(2, 7)}
        free = {"log_every": self.rng.randint(1, 6), "evaluate_every": self.rng.randint(3, 9)}
        exit_code = self.attempt(run, kill, **options, **({"log_every": 1, "evaluate_every": 3} if frequent else free))
        found = self.read_journal()
        where = f"{run.name}, attempt {self.attempts}, {kill}, {options}"
        assert found == self.reference[2 * start :][: len(found)], where
        after = self.newest(run)
        assert (after.step if after else 0) >= start, f"{where}: a checkpoint is gone"
        self.steps += len(found) // 2
        self.repeated += start + len(found) // 2 - (after.step if after else 0)
        if exit_code and kill:
            self.killed[kill.place] += 1
        else:
            assert after, where
            assert after.step == self.last, where
            assert bits(after) == self.bits, where
            lines = [untimed(line) for line in read_lines(run)]
            steps = [line["step"] for line in lines]
            assert steps == (sorted(self.lines) if frequent else sorted(set(steps))), f"{where}: {steps}"
            for line in lines:
                shared = line.keys() & self.lines[line["step"]].keys() if not frequent else line.keys()
                assert {name: line[name] for name in shared} == {n: self.lines[line["step"]][n] for n in shared}, where
            self.finished += 1
        return exit_code

    def newest(self, run: Path):
        return load_newest(run / "checkpoints", on_damage=pytest.fail)

    def read_journal(self) -> list[dict]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []


def read_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw(rng: random.Random, place: str) -> Kill:
    """Places that are left at once are met on the spot, the others up to as long as what begins there takes."""
    delay = {"step": 0.03, "loss": 0.03, "evaluation": 0.05, "checkpoint": 0.03, "clock": 1.2}.get(place, 0.0)
    return Kill(place, rng.randint(1, PLACES[place]), rng.uniform(0, delay))


def kill_and_resume(spawn: Any, folder: Path, kills: int, steps: int, seed: int) -> Runs:
    rng = random.Random(seed)
    runs = Runs(spawn, folder, steps, rng)
    places: list[str] = []
    while runs.killed.total() < kills:
        run, frequent, ended = folder / f"killed-{runs.finished}", runs.finished % 2 == 0, False
        while not ended:
            places = places or rng.sample(sorted(PLACES), len(PLACES))
            kill = draw(rng, places.pop()) if runs.killed.total() < kills else None
            ended = runs.disturbed(run, kill, frequent) == 0
    return runs


def test_a_few_kills(spawn, tmp_path):
    runs = kill_and_resume(spawn, tmp_path, kills=6, steps=FEW_STEPS, seed=SEED)
    assert len(runs.killed) >= 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_hundreds_of_kills(spawn, tmp_path, campaign):
    runs = kill_and_resume(spawn, tmp_path, kills=300, steps=STEPS, seed=SEED + 1)
    assert runs.killed.keys() == PLACES.keys()
    figures: dict[str, object] = {"kills": runs.killed.total()}
    figures |= {f"kills: {place}": runs.killed[place] for place in PLACES}
    figures |= {
        "runs brought to their end": runs.finished,
        "steps taken": runs.steps,
        "of them repeated, because no checkpoint held them yet": runs.repeated,
        "micro-batches, generator states, logged values, weights or moments that differ": 0,
        "damaged or lost checkpoints": 0,
    }
    campaign("training-kills", seed=SEED + 1, figures=figures)
