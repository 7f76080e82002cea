"""SIGTERM at random moments of `extract` and `train`, once and twice: the process ends in time, says so, and goes on later.

A child process of the real command line signals itself: some time after it began to listen, or as it comes to a function
(fitting, writing a shard, sealing; a step, a checkpoint, an evaluation), a random while later, and in half of the cases a
second time. It must end within its `--grace` and a slack (within the slack alone after a second signal), with exit code 143,
without a traceback, and say how to go on; 0 only where everything was already done. The same command is then signalled again
or left alone, and must end with the cache's root, or the weights and moments, of an undisturbed run. Two more tests look at
what a long grace and none at all leave of the shard or the step in hand.
"""

import importlib
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from photos import photo_folder
from tiny_training import arguments, bits, make_cache, shrink_student

from sami_cache.checkpoints import load_newest
from sami_cache.store.cache import Cache

SEED = 20261124
SLACK = 10.0
GRACE_ARGUMENTS = ["--grace", "{}"]
STEPS = 16
IMAGES, SHARD = 64, 8


@dataclass(frozen=True)
class Blow:
    """SIGTERM `delay` seconds after coming to `place` for the `time`-th time, and again `second` seconds later."""

    place: str
    time: int
    delay: float
    second: float | None


def strike(blow: Blow, log: str) -> None:
    """In the child, before the command line starts. `log` takes the moments of the signals, on the clock of all processes."""
    times = 0

    def send() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for pause in (blow.delay, blow.second):
            if pause is not None:
                time.sleep(pause)
                os.write(descriptor, f"{time.monotonic()}\n".encode())
                os.kill(os.getpid(), signal.SIGTERM)

    def come() -> None:
        nonlocal times
        times += 1
        if times == blow.time:
            threading.Thread(target=send, daemon=True).start()

    if blow.place == "listening":
        real_signal = signal.signal

        def listen(number, handler):
            before = real_signal(number, handler)
            if number == signal.SIGTERM:
                come()
            return before

        signal.signal = listen
        return
    module, *path, name = blow.place.split(":")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def struck(*args, **options):
        come()
        return real(*args, **options)

    setattr(owner, name, struck)


def strike_training(blow: Blow, log: str) -> None:
    shrink_student()
    strike(blow, log)


class Extraction:
    """`extract` of a few shards."""

    # Where, how often the process comes there at most, and about how long what begins there takes.
    places = (
        ("listening", 1, 1.5),
        ("pipelines.plan:fit_codec", 1, 0.1),
        ("pipelines.extract:create_cache", 1, 0.1),
        ("pipelines.extract:write_shard", IMAGES // SHARD, 0.2),
        ("pipelines.extract:seal_cache", 1, 0.03),
    )
    go_on = "again"
    strike, calm = staticmethod(strike), None

    def __init__(self, folder: Path):
        self.photos = photo_folder(folder / "photos", IMAGES)

    def command(self, target: Path) -> list[str]:
        given = ["--data", str(self.photos), "--cache", str(target), "--teacher", "efficientnet_lite0", "--grid", "4"]
        return ["extract", *given, "--shard-samples", str(SHARD), "--device", "cpu", "--workers", "1"]

    def finished(self, target: Path) -> bool:
        return (target / "ROOT.json").exists()

    def result(self, target: Path) -> object:
        return Cache(target).root()


class Training:
    """`train` of a few steps."""

    places = (
        ("listening", 1, 2.0),
        ("sami_cache.training:Trainer:_train_step", STEPS, 0.05),
        ("sami_cache.training:save_checkpoint", STEPS // 4, 0.03),
        ("sami_cache.tasks.sami:SAMITask:evaluate", STEPS // 5, 0.05),
        ("sami_cache.runs:RunLog:__init__", 1, 0.1),
    )
    go_on = "--resume"
    strike, calm = staticmethod(strike_training), staticmethod(shrink_student)

    def __init__(self, folder: Path):
        self.cache = make_cache(folder)

    def command(self, target: Path) -> list[str]:
        return arguments(self.cache, target, STEPS, workers=1, checkpoint_every=4, evaluate_every=5)

    def finished(self, target: Path) -> bool:
        newest = load_newest(target / "checkpoints", on_damage=pytest.fail)
        return newest is not None and newest.step == STEPS

    def result(self, target: Path) -> object:
        newest = load_newest(target / "checkpoints")
        assert newest is not None
        return newest.step, bits(newest)


class Stage:
    """One of the two commands: its undisturbed result, and what came of the signals."""

    def __init__(self, spawn: Any, stage: Extraction | Training, folder: Path, rng: random.Random):
        self.spawn, self.stage, self.folder, self.rng = spawn, stage, folder, rng
        self.figures: Counter[str] = Counter()
        self.slowest = 0.0
        self.attempts = 0
        self.finish(folder / "calm")
        self.expected = stage.result(folder / "calm")
        self.target = folder / "signalled-0"

    def finish(self, target: Path) -> None:
        said = self.folder / "undisturbed.txt"
        process = self.spawn(*self.stage.command(target), prepare=self.stage.calm, stderr=str(said))
        process.join(60)
        assert process.exitcode == 0, said.read_text()

    def case(self, twice: bool) -> None:
        """Signal the command, see how it ends, and then, at times, let it finish."""
        place, times, seconds = self.rng.choice(self.stage.places)
        second = self.rng.uniform(0.01, self.rng.choice((0.1, 0.5))) if twice else None
        blow = Blow(place, self.rng.randint(1, times), self.rng.uniform(0, seconds), second)
        grace = self.rng.choice((0, 0.5, 20))
        self.attempts += 1
        said, log = self.folder / f"{self.attempts}.txt", self.folder / f"{self.attempts}.log"
        command = [*self.stage.command(self.target), *grace_of(grace)]
        process = self.spawn(*command, prepare=partial(self.stage.strike, blow, str(log)), stderr=str(said))
        process.join(60 + grace)
        ended, text = time.monotonic(), said.read_text()
        where = f"{command[0]}, {blow}, --grace {grace}: {process.exitcode}\n{text}"
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"{where}\nstill running")
        sent = [float(line) for line in log.read_text().splitlines()] if log.exists() else []
        finished = self.stage.finished(self.target)
        assert "Traceback" not in text, where
        if sent:
            self.figures["processes signalled"] += 1
            self.figures["of them twice"] += len(sent) == 2
            taken = ended - sent[-1]
            assert taken < SLACK + (grace if len(sent) == 1 else 0), f"{where}\n{taken:.1f} s"
            self.slowest = max(self.slowest, taken)
        if process.exitcode == 143:
            assert sent, where
            assert self.stage.go_on in text, where
            self.figures["exit code 143"] += 1
        elif process.exitcode == -signal.SIGTERM:  # it was leaving, and the second signal ends that at once
            assert len(sent) == 2 or finished or self.stage.go_on in text, where
            self.figures["struck down while leaving (-15, in a shell 143)"] += 1
        else:
            assert process.exitcode == 0, where
            assert finished, where
            self.figures["exit code 0, since all was done"] += bool(sent)
        if finished or self.rng.random() < 0.4:
            self.finish(self.target)
            assert self.stage.result(self.target) == self.expected, where
            self.figures["finished and compared"] += 1
            self.target = self.folder / f"signalled-{self.attempts}"


def grace_of(seconds: float) -> list[str]:
    return [text.format(seconds) for text in GRACE_ARGUMENTS]


def signal_stages(spawn: Any, folder: Path, signalled: int, seed: int) -> dict[str, Stage]:
    """`signalled` processes in all, half of each command; the last ones are finished too."""
    rng = random.Random(seed)
    stages = {}
    for kind in (Extraction, Training):
        own = folder / kind.__name__.lower()
        own.mkdir()
        stage = stages[kind.__name__.lower()] = Stage(spawn, kind(own), own, rng)
        while stage.figures["processes signalled"] < signalled // 2:
            stage.case(twice=stage.attempts % 2 == 1)
        if stage.target.exists():
            stage.finish(stage.target)
            assert stage.stage.result(stage.target) == stage.expected
    return stages


def test_a_few_signals(spawn, tmp_path):
    signal_stages(spawn, tmp_path, signalled=6, seed=SEED)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_hundreds_of_signals(spawn, tmp_path, campaign):
    stages = signal_stages(spawn, tmp_path, signalled=300, seed=SEED + 1)
    figures: dict[str, object] = {}
    for name, stage in stages.items():
        figures |= {f"{name}: {what}": count for what, count in stage.figures.items()}
        figures[f"{name}: longest time from the last signal to the end, seconds"] = f"{stage.slowest:.2f}"
        assert stage.figures["exit code 143"] >= 100
    campaign("signals", seed=SEED + 1, figures=figures)


def slow_teacher(seconds: float, cache: Path, log: Path) -> None:
    """In the child: from the middle of the second shard on, batches are noted as they begin, and take so long."""
    from pipelines.embedding import Embedder

    real = Embedder.embed

    def slow(self, batches):
        parts = real(self, batches)
        for batch in batches:
            key = self.source.keys[batch[0]]
            if (cache / "zarr.json").exists() and Cache(cache).listing["key"].to_pylist().index(key) >= 1.5 * SHARD:
                note(log, key)
                time.sleep(seconds)
            yield next(parts)

    Embedder.embed = slow


def slow_step(seconds: float, log: Path) -> None:
    """In the child: from the third one on, steps are noted as they begin and take so long."""
    from sami_cache import training

    shrink_student()
    real = training.Trainer._train_step

    def slow(self, *rest):
        if self.step >= 2:
            note(log, str(self.step))
            time.sleep(seconds)
        return real(self, *rest)

    training.Trainer._train_step = slow


def note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(f"{line}\n")


def stop_at_first_line(process: Any, log: Path) -> None:
    """SIGTERM as soon as there is one, and the end."""
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join(SLACK)
    if process.exitcode is None:
        process.kill()
        pytest.fail("still running")


@pytest.mark.parametrize(("grace", "seconds", "committed"), [(30, 0.3, [0, 1]), (0, 60, [0])])
def test_the_shard_in_hand(spawn, tmp_path, grace, seconds, committed):
    """With a long grace it is committed, and none after it; with none it is left at once."""
    target, log, said = tmp_path / "cache.zarr", tmp_path / "log", tmp_path / "said.txt"
    command = [*Extraction(tmp_path).command(target), "--batch-size", "4", *grace_of(grace)]
    process = spawn(*command, prepare=partial(slow_teacher, seconds, target, log), stderr=str(said))
    stop_at_first_line(process, log)
    assert process.exitcode == 143, said.read_text()
    assert "again" in said.read_text()
    assert Cache(target).committed() == committed


@pytest.mark.parametrize(("grace", "seconds", "steps"), [(30, 1, 3), (0, 60, 2)])
def test_the_step_in_hand(spawn, tmp_path, grace, seconds, steps):
    """With a long grace it is taken and saved; with none it is left at once."""
    run, log, said = tmp_path / "run", tmp_path / "log", tmp_path / "said.txt"
    command = [*arguments(make_cache(tmp_path), run, STEPS, workers=1, checkpoint_every=1), *grace_of(grace)]
    process = spawn(*command, prepare=partial(slow_step, seconds, log), stderr=str(said))
    stop_at_first_line(process, log)
    assert process.exitcode == 143, said.read_text()
    assert "--resume" in said.read_text()
    newest = load_newest(run / "checkpoints", on_damage=pytest.fail)
    assert newest is not None
    assert newest.step == steps
