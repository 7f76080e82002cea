"""The paper's tables in miniature: what pretraining towards a teacher's features is worth, on CIFAR-10, in hours on two cores.

    make miniature CIFAR=DIR PHOTOS=DIR [WORK=miniature BUDGET=3h SEEDS=3 ARMS="scratch mae"]
    python benchmarks/miniature.py --cifar DIR --photos DIR --work DIR [--budget 3h] [--seeds 3] [--arms ...] [--report]

CIFAR holds `train.parquet` and `test.parquet` (Hugging Face layout), PHOTOS any pictures. The teacher is EfficientNet-Lite0 at
128 pixels, whose map of stride 16 is the student's 8 x 8; the student a ViT of width 128 and depth 4 on 64 x 64 pixels; at the
end vit_t on 128. Every arm is pretrained for the same steps (scratch: none), probed (k-NN, linear) and fine-tuned on CIFAR-10.

What is finished is not made again and what was begun goes on: run the same command until nothing is missing. The order is that
of importance, the main arms with all their seeds first. When --budget (h, m or s) is over, trainings write a checkpoint, all
stops, and what is missing is printed. --tune judges on the last 5000 training images instead of the test set: with --lr and
--fine-lr, and a WORK for each, settings are chosen so.
"""

import argparse
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from miniature_report import write_report
from miniature_stages import Arm, Place, Recipe, make, result_path

from sami_cache.errors import Interrupted
from sami_cache.processes import GRACE

MAIN = ("scratch", "sami", "mae", "online")
TEACHER = "teacher"
Arms = dict[str, Arm | None]
ARMS: Arms = {
    TEACHER: None,
    "scratch": Arm(target="none"),
    "sami": Arm(),
    "mae": Arm(target="pixels"),
    "online": Arm(target="online"),
    "cosine": Arm(loss="cosine"),
    "all-token": Arm(decoder="all-token"),
    "visible": Arm(keys_values="visible"),
    "mask50": Arm(mask_ratio=0.5),
    "mask85": Arm(mask_ratio=0.85),
    "mae-all-token": Arm(target="pixels", decoder="all-token"),
    "error10": Arm(cache="whole-0.1"),
    "error30": Arm(cache="whole-0.3"),
    "photos-dense": Arm(cache="photos", crops=True),
    "photos-replay": Arm(cache="photo-views"),
    "crops-dense": Arm(crops=True),
    "crops-replay": Arm(cache="views"),
    "vit_t-scratch": Arm(target="none", student="vit_t"),
    "vit_t-sami": Arm(student="vit_t"),
    "vit_t-mae": Arm(target="pixels", student="vit_t"),
}
"""The teacher itself is only probed: the ceiling."""
POLL = 0.2


@dataclass(frozen=True)
class Job:
    """A stage of an arm and a seed; of a cache, whose name `arm` then is."""

    arm: str
    seed: int
    stage: str

    def __str__(self) -> str:
        return f"{self.stage} {self.arm}" + ("" if self.stage == "cache" else f" seed {self.seed}")


def needs(job: Job, arms: Arms) -> list[Job]:
    arm = arms.get(job.arm)
    if job.stage == "cache" or arm is None or arm.target == "none":
        return []
    if job.stage == "pretrain":
        return [Job(arm.cache, 0, "cache")]
    return [Job(job.arm, job.seed, "pretrain")]


def plan(arms: Arms, seeds: int) -> list[Job]:
    """All jobs, most important first: main arms seed by seed, the others' probes, their fine-tuning, the larger student."""
    large = [name for name in arms if name.startswith("vit_t")]
    others = [name for name in arms if name not in (TEACHER, *MAIN, *large)]
    all_stages = ("pretrain", "probe", "finetune")

    def wanted() -> Iterator[Job]:
        main = [name for name in MAIN if name in arms]
        for seed in range(seeds):
            yield from (Job(name, seed, stage) for name in main for stage in all_stages)
            if seed == 0 and TEACHER in arms:
                yield Job(TEACHER, 0, "probe")
        for stages in (("pretrain", "probe"), ("finetune",)):
            yield from (Job(name, seed, stage) for name in others for seed in range(seeds) for stage in stages)
        yield from (Job(name, seed, stage) for seed in range(seeds) for name in large for stage in all_stages)

    jobs: list[Job] = []
    for job in wanted():
        arm = arms[job.arm]
        if job.stage == "pretrain" and arm is not None and arm.target == "none":
            continue
        jobs += [need for need in needs(job, arms) if need.stage == "cache" and need not in jobs]
        jobs.append(job)
    return jobs


def work_off(place: Place, arms: Arms, seeds: int, *, processes: int, seconds: float) -> list[Job]:
    """Do what is not done, `processes` at a time (0: in this process), for so many seconds; returns what is missing then."""
    deadline = time.monotonic() + seconds
    jobs = plan(arms, seeds)

    def done(job: Job) -> bool:
        return result_path(place, job.arm, job.seed, job.stage).exists()

    running: dict[Job, BaseProcess] = {}
    failed: set[Job] = set()
    try:
        while time.monotonic() < deadline:
            left = [job for job in jobs if not done(job) and job not in running and job not in failed]
            ready = [job for job in left if all(done(need) for need in needs(job, arms))]
            if not ready and not running:
                break
            for job in ready[: max(1, processes) - len(running)]:
                if processes == 0:
                    start(place, arms, job, in_this_process=True)
                else:
                    running[job] = spawn(place, arms, job)
            time.sleep(POLL if running else 0)
            failed |= reap(running)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        for process in running.values():
            process.terminate()  # a training writes a checkpoint first
        for process in running.values():
            process.join(GRACE + 10)
            process.kill()
        reap(running)
    return [job for job in jobs if not done(job)]


def spawn(place: Place, arms: Arms, job: Job) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=start, args=(place, arms, job))
    process.start()
    return process


def reap(running: dict[Job, BaseProcess]) -> set[Job]:
    """Forget the processes that have ended; the jobs of those that ended in an error of their own."""
    ended = {job: process for job, process in running.items() if not process.is_alive()}
    for job in ended:
        del running[job]
    return {job for job, process in ended.items() if process.exitcode and process.exitcode > 0}


def start(place: Place, arms: Arms, job: Job, *, in_this_process: bool = False) -> None:
    if not in_this_process:
        os.setpgrp()  # Ctrl-C reaches the parent alone, which asks each child once: asked twice, a training gives up at once
        torch.set_num_threads(place.threads)
    began = time.perf_counter()
    try:
        found = make(place, job.arm, arms.get(job.arm), job.seed, job.stage)
    except Interrupted:
        if in_this_process:
            raise
        print(f"{time.strftime('%H:%M:%S')} {job}: stopped, to be continued", flush=True)
        # As a process that a signal ended, which is no failure.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        return
    shown = ", ".join(f"{name} {found[name]:.4f}" for name in ("loss", "knn", "linear", "accuracy", "error") if name in found)
    print(f"{time.strftime('%H:%M:%S')} {job}: {shown}, {time.perf_counter() - began:.0f} s", flush=True)


def seconds_of(text: str) -> float:
    """ "3h", "90m" or "600s" in seconds."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([hms])", text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and h, m or s, such as 3h")
    return float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2]]


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing is missing, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--work", type=Path, required=True, help="caches, runs and results go here: 3 GB")
    parser.add_argument("--budget", type=seconds_of, default="100h", help="such as 3h or 90m (default: until all is done)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--processes", type=int, help="stages at a time (default: one a core, on CUDA one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of pretraining")
    parser.add_argument("--fine-steps", type=int, default=Recipe.fine_steps)
    parser.add_argument("--lr", type=float, help="of pretraining, for every target (default: as chosen)")
    parser.add_argument("--fine-lr", type=float, default=Recipe.fine_lr)
    parser.add_argument("--tune", action="store_true", help="judge on a held-out part of the training set")
    parser.add_argument("--report", action="store_true", help="write tables and plots of what there is, and train nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where --report writes")
    given = parser.parse_args(arguments)
    rates = {} if given.lr is None else {"lr_teacher": given.lr, "lr_pixels": given.lr}
    recipe = Recipe(steps=given.steps, fine_steps=given.fine_steps, fine_lr=given.fine_lr, **rates)
    on_gpu, cores = torch.device(given.device).type == "cuda", os.cpu_count() or 1
    processes = given.processes or (1 if on_gpu else cores)
    place = Place(
        cifar=given.cifar.resolve(),
        photos=given.photos.resolve(),
        work=given.work.resolve(),
        recipe=recipe,
        judge="heldout" if given.tune else "test",
        device=given.device,
        threads=max(1, cores // processes),
    )
    arms = {name: arm for name, arm in ARMS.items() if name in given.arms}
    if given.report:
        print(write_report(place, ARMS, given.out))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the children are to stop too
    missing = work_off(place, arms, given.seeds, processes=processes, seconds=given.budget)
    if missing:
        print(f"missing ({len(missing)}): {'; '.join(map(str, missing))}\nThe same command goes on from here.")
    print(f"A report of what there is: add --report. Results are in {place.work}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
