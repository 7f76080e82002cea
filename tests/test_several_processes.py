"""torchrun for real: processes train as one, go on in another number, and end with one message when one of them dies."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from photos import photo_folder

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from sami_cache.checkpoints import load_newest

ROOT = Path(__file__).parents[1]
STEPS = 11
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Jobs:
    """Runs of the same settings; a step is 12 images, in as many micro-batches of at most 3 as the processes need."""

    def __init__(self, folder: Path):
        self.folder = folder
        photo_folder(folder / "photos", 48)
        lite0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 8, "device": "cpu"}
        extract(ExtractConfig(data=folder / "photos", cache=folder / "cache.zarr", **lite0))

    def run(self, name: str, processes: int, launcher: list[str] = TORCHRUN, more: Sequence[str] = (), **options: object):
        """Start or continue the run `name`; `options` for `rank.py`."""
        launcher = [*launcher, str(processes)] if processes > 1 else [sys.executable]
        given = {"batch-size": 12, "micro-batch": 3, "holdout": 0.15, "base-lr": 0.02, "decoder-depth": 1, "decoder-width": 32}
        given |= {"cache": self.folder / "cache.zarr", "run-dir": self.folder / name, "student": "vit_t", "device": "cpu"}
        given |= {"steps": STEPS, "log-every": 1, "checkpoint-every": 2, "evaluate-every": 5, "warmup-epochs": 0}
        arguments = [text for key, value in given.items() for text in (f"--{key}", str(value))]
        told = json.dumps({"journal": str(self.folder / f"{name}.jsonl"), **options})
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        return subprocess.run(
            [*launcher, str(ROOT / "tests" / "rank.py"), told, "train", "--resume", *arguments, *more],
            check=False,
            capture_output=True,
            text=True,
            timeout=100,
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def stop(self, name: str, processes: int, step: int) -> None:
        """Run until the last rank gets a signal in `step` (0-based); all stop after it."""
        done = self.run(name, processes, rank=processes - 1, step=step, how="SIGTERM")
        assert done.returncode != 0
        assert len(re.findall(f"stopped by SIGTERM after step {step + 1} of {STEPS}, checkpoint written", done.stderr)) == 1
        assert load_newest(self.folder / name / "checkpoints").step == step + 1

    def finish(self, name: str, processes: int) -> None:
        done = self.run(name, processes)
        assert done.returncode == 0, done.stderr

    def samples(self, name: str) -> dict[int, list[int]]:
        """Of every step, in whatever process."""
        steps: dict[int, list[int]] = {}
        for line in map(json.loads, (self.folder / f"{name}.jsonl").read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(line["samples"])
        return {step: sorted(samples) for step, samples in sorted(steps.items())}

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def config(self, name: str) -> dict:
        return json.loads((self.folder / name / "config.json").read_text())

    def assert_same(self, name: str, other: str) -> None:
        """The same samples in every step, and what came of them up to the order of sums."""
        assert self.samples(name) == self.samples(other)
        self.assert_same_end(name, other)

    def assert_same_end(self, name: str, other: str) -> None:
        for found, expected in zip(self.lines(name), self.lines(other), strict=True):
            shared = {key for key in expected if key == "lr" or key.startswith(("loss", "heldout", "step"))}
            assert {key: found[key] for key in shared} == pytest.approx({key: expected[key] for key in shared}, rel=1e-4)
        found, expected = (load_newest(self.folder / run / "checkpoints").model for run in (name, other))
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=TOLERANCE, rtol=0)


TOLERANCE = 1e-4
"""Of a weight: a tenth of what AdamW moves it by in one step (lr is 9.4e-4 at the start), after eleven of them."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("several"))
    jobs.finish("one", 1)
    return jobs


def test_one_process_sees_every_sample_once_an_epoch(jobs):
    samples, epoch = jobs.samples("one"), jobs.config("one")["config"]["steps_per_epoch"]
    assert list(samples) == list(range(STEPS))
    assert epoch == 3
    for first in range(0, STEPS, epoch):
        steps = range(first, min(first + epoch, STEPS))
        seen = [sample for step in steps for sample in samples[step]]
        assert len(seen) == len(set(seen)) == 12 * len(steps)
    weights = load_newest(jobs.folder / "one" / "checkpoints").model.values()
    assert max(float(weight.abs().max()) for weight in weights) > 100 * TOLERANCE


def test_two_processes_equal_one(jobs):
    jobs.finish("two", 2)
    jobs.assert_same("two", "one")
    assert jobs.config("one")["starts"] == [{"step": 0, "processes": 1, "accumulate": 4}]
    assert jobs.config("two")["starts"] == [{"step": 0, "processes": 2, "accumulate": 2}]


@pytest.mark.parametrize("numbers", [(1, 2, 1), (2, 3)])
def test_a_run_goes_on_in_another_number_of_processes(jobs, numbers):
    """Stopped in the middle of an epoch every time."""
    name = f"then{numbers}".replace(", ", "-")
    stops = [3, 7][: len(numbers) - 1]
    for processes, step in zip(numbers, stops, strict=False):
        jobs.stop(name, processes, step)
    jobs.finish(name, numbers[-1])
    jobs.assert_same(name, "one")
    parts = {1: 4, 2: 2, 3: 2}
    starts = zip([0, *(step + 1 for step in stops)], numbers, strict=True)
    assert jobs.config(name)["starts"] == [{"step": s, "processes": n, "accumulate": parts[n]} for s, n in starts]
    assert jobs.config(name)["config"]["train"]["accumulate"] == parts[numbers[-1]]


# --- a process dies -------------------------------------------------------------------------------------------------

GOES_ON = r"stopped at step 7; last checkpoint: step 6\. The same command with --resume goes on from there"
DEATHS = {
    "SIGKILL": (r"rank 1 of 2 \(pid \d+ on \S+\) died without a word, killed or out of memory.*\. " + GOES_ON, -9),
    "exit": (r"rank 1 of 2 \(pid \d+ on \S+\) died without a word, killed or out of memory.*\. " + GOES_ON, 7),
    "loader": (r"rank 1 of 2 \(pid \d+ on \S+\): sample 'photo-7' did not come\. " + GOES_ON, 2),
    "bug": (r"rank 1 of 2 \(pid \d+ on \S+\): ValueError: a bug of a step\. " + GOES_ON + ": this is a bug in sami-cache.*", 2),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_process_that_dies_ends_the_job_with_one_message(jobs, how):
    name = f"dies-of-{how}"
    ended = jobs.run(name, 2, rank=1, step=7, how=how)
    expected, code = DEATHS[how]
    ours, torchruns = split(ended.stderr)
    assert ended.returncode != 0
    messages = [line for line in ours if line.startswith("sami-cache: ")]
    assert len(messages) == 1, ended.stderr
    assert re.fullmatch(f"sami-cache: {expected}", messages[0])
    others = [line for line in ours if not re.match(r"step \d+/11 |/\S*: vit_t, |sami-cache: ", line)]
    if how == "bug":  # the one traceback is the culprit's, because we want to see it
        assert others[0].startswith("Traceback")
        assert others.count(others[0]) == 1
        assert "ValueError: a bug of a step" in others
    else:
        assert others == []
    assert "gloo" not in ended.stderr
    root = torchruns[torchruns.index("Root Cause") :]
    assert re.search(rf"rank +: 1 .*\n +exitcode +: {code} ", root), "torchrun takes the one that died for the cause"
    if how == "SIGKILL":
        jobs.finish(name, 3)
        jobs.assert_same_end(name, "one")


@pytest.mark.parametrize(("how", "code", "by"), [("SIGKILL", 137, "signal SIGKILL"), ("loader", 2, "exit code 2")])
def test_our_torchrun_adds_one_line(jobs, how, code, by):
    launcher = [sys.executable, "-m", "cli.torchrun", "--standalone", "--nproc-per-node"]
    ended = jobs.run(f"line-{how}", 2, launcher=launcher, rank=1, step=7, how=how)
    lines = [line for line in ended.stderr.splitlines() if not re.match(r"step \d+/11 |/\S*: vit_t, ", line)]
    assert len(lines) == 2, ended.stderr
    assert re.fullmatch(f"sami-cache: {DEATHS[how][0]}", lines[0])
    assert re.fullmatch(rf"torchrun: rank 1 \(pid \d+\) ended first, by {by}", lines[1])
    assert ended.returncode == code


def test_what_all_processes_find_wrong_is_said_once(jobs):
    refused = jobs.run("one", 2, more=["--mask-ratio", "0.5"])
    assert refused.returncode != 0
    messages = [line for line in split(refused.stderr)[0] if line.startswith("sami-cache: ")]
    assert len(messages) == 1
    assert "sami.mask_ratio: 0.75 in the run, 0.5 now" in messages[0]


def split(stderr: str) -> tuple[list[str], str]:
    """What our processes said, line by line, and torchrun's own report of the end."""
    # Its warning of the signal it sends may come before our last line, its report comes when all have left.
    found = re.search(r"^E\d+ ", stderr, re.MULTILINE)
    assert found, stderr
    ours = [line for line in stderr[: found.start()].splitlines() if not re.match(r"W\d+ ", line)]
    return ours, stderr[found.start() :]
