"""Extraction by several processes: the same cache as by one, whatever happens to them."""

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import dask.config
import distributed  # noqa: F401 - its settings must be there before any are changed
import pytest
from cluster_hooks import hook_command, load_hooks
from photos import photo_folder

import pipelines.cluster
import pipelines.cluster_processes
import pipelines.tally
from pipelines import cluster_worker
from pipelines.cluster import extract_on
from pipelines.cluster_processes import ClusterConfig, parse_devices, worker_options
from pipelines.jobs import ExtractConfig, Progress
from sami_cache.errors import DiskFullError, IdentityError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache

SETTINGS = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 4, "workers": 1}
SHARDS = 12


def arguments(data: Path, cache: Path) -> list[str]:
    given = ["--teacher", "efficientnet_lite0", "--grid", "4", "--shard-samples", "4", "--workers", "1"]
    return ["extract", *given, "--data", str(data), "--cache", str(cache)]


@pytest.fixture(scope="module")
def home(tmp_path_factory, spawn):
    """A folder with photos, and in alone.zarr what one process makes of them."""
    home = tmp_path_factory.mktemp("cluster")
    photo_folder(home / "photos", 4 * SHARDS)
    process = spawn(*arguments(home / "photos", home / "alone.zarr"))
    process.join(120)
    assert process.exitcode == 0
    return home


@pytest.fixture(scope="module")
def alone(home):
    return Cache(home / "alone.zarr").root()["root"]


def commits(hooks: Path) -> list[tuple[int, int]]:
    """(pid, shard), in order."""
    log = hooks / "log"
    pairs = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(pid), int(shard)) for pid, shard in pairs]


class Workers:
    """A scheduler with two workers, as `sami-cache worker` starts them, but forked, which takes no seconds of imports."""

    def __init__(self, home: Path):
        from distributed import Nanny, Scheduler, SpecCluster

        self.home, self.hooks = home, home / "hooks"
        self.quiet = {"silence_logs": logging.CRITICAL, "host": "127.0.0.1"}
        scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
        workers = {number: {"cls": Nanny, "options": self.options()} for number in range(2)}
        self.cluster = SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL)

    def options(self, folder: Path | None = None) -> dict:
        options = load_hooks(self.hooks, worker_options(["cpu"])[0] | self.quiet)
        options["env"]["CLUSTER_CWD"] = str(folder or self.home)
        return options

    @property
    def config(self) -> ClusterConfig:
        return ClusterConfig(scheduler=self.cluster.scheduler_address)

    def add(self, folder: Path) -> None:
        """One worker more, in another current folder."""
        from distributed import Nanny

        async def start() -> None:
            await Nanny(self.cluster.scheduler_address, **self.options(folder))

        self.cluster.sync(start)

    def pids(self) -> list[int]:
        return [nanny.pid for nanny in self.cluster.workers.values()]

    def commits(self) -> list[tuple[int, int]]:
        return commits(self.hooks)


@pytest.fixture(scope="module")
def standing(home):
    settings = {"distributed.worker.multiprocessing-method": "forkserver", "distributed.scheduler.worker-saturation": 1.0}
    with dask.config.set(settings):
        workers = Workers(home)
        with workers.cluster:
            yield workers


@pytest.fixture
def workers(standing):
    yield standing
    for file in standing.hooks.iterdir():
        file.unlink()


@pytest.fixture
def config(home, tmp_path):
    return ExtractConfig(data=home / "photos", cache=tmp_path / "cache.zarr", **SETTINGS)  # type: ignore[arg-type]


def test_the_same_cache_and_what_the_line_says_is_what_dask_says(workers, config, alone):
    from distributed import Client

    seen: list[Progress] = []
    counts: list[tuple[int, int]] = []

    def dasks_count(dask_scheduler) -> int:
        return sum(group.states["memory"] for name, group in dask_scheduler.task_groups.items() if name.startswith("shard-"))

    def look(progress: Progress) -> None:
        seen.append(replace(progress))
        if progress.stage == "extract" and not progress.note:
            counts.append((progress.done // 4, Client.current().run_on_scheduler(dasks_count)))

    summary = extract_on(workers.config, config, look)
    assert summary.root["root"] == alone
    assert summary.samples_done == 4 * SHARDS
    assert verify_cache(config.cache, level="deep").findings == []
    assert len({pid for pid, _ in workers.commits()}) == 2
    assert sorted(shard for _, shard in workers.commits()) == list(range(SHARDS))
    assert "dashboard: http://" in seen[0].note
    assert {"wait", "fit", "extract", "seal"} <= {progress.stage for progress in seen}
    assert all(ours <= dasks for ours, dasks in counts)
    assert counts[-1] == (SHARDS, SHARDS)
    again = extract_on(workers.config, config)
    assert (again.samples_done, again.root) == (0, summary.root)


def test_a_killed_workers_shards_are_done_by_others(workers, config, alone):
    """They have two each in hand as one of them is killed, twice."""
    (workers.hooks / "hold").write_text("3")
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if len(killed) < 2 and progress.done >= 4 * (3 + 3 * len(killed)):
            killed.append(workers.commits()[-1][0])
            os.kill(killed[-1], signal.SIGKILL)
            (workers.hooks / "hold").write_text("6" if len(killed) == 1 else str(SHARDS))

    summary = extract_on(workers.config, config, kill)
    assert len(killed) == 2
    assert summary.root["root"] == alone
    assert verify_cache(config.cache, level="deep").findings == []
    assert Counter(shard for _, shard in workers.commits()).most_common(1)[0][1] == 1


def test_a_worker_that_sees_other_images_is_left_out(workers, home, config, alone, tmp_path, monkeypatch):
    """The path is the same, what is there is not: it leads through each process's current folder."""
    shutil.copytree(home / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "coffee" / "0002.jpg").unlink()
    monkeypatch.chdir(home)
    (workers.hooks / "hold").write_text("2")
    notes: list[str] = []

    def join(progress: Progress) -> None:
        if progress.note:
            notes.append(progress.note)
        if progress.stage == "extract" and len(notes) == 1:
            notes.append("joined")
            workers.add(tmp_path)
        if progress.note.startswith("left out"):
            (workers.hooks / "hold").unlink()

    summary = extract_on(workers.config, replace(config, data=Path("/proc/self/cwd/photos")), join)
    assert summary.root["root"] == alone
    assert {pid for pid, _ in workers.commits()} <= set(workers.pids())
    assert any("left out: worker" in note and "1 removed: coffee/0002.jpg" in note for note in notes), notes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("cache", "there is no cache here. All workers must see it, and the images, at the same path"),
        ("other cache", "expected aaaaaaaaaaaa: another disk?"),
        ("added", "has 1 images that .* was not made for: new.jpg"),
        ("label", "1 with another label: coffee/0002.jpg"),
        ("weights", "teacher.weights_sha256: the cache has"),
    ],
)
def test_what_a_worker_must_see_is_named(home, tmp_path, change, says):
    config = ExtractConfig(data=tmp_path / "photos", cache=home / "alone.zarr", device="cpu", **SETTINGS)  # type: ignore[arg-type]
    shutil.copytree(home / "photos", tmp_path / "photos")
    run = cluster_worker.Run(name="a", host="here", config=config, cache_id=Cache(config.cache).cache_id)
    photo = tmp_path / "photos" / "coffee" / "0002.jpg"
    if change == "cache":
        run = replace(run, config=replace(config, cache=tmp_path / "none.zarr"))
    elif change == "other cache":
        run = replace(run, cache_id="a" * 64)
    elif change == "added":
        shutil.copy(photo, tmp_path / "photos" / "new.jpg")
    elif change == "label":
        (tmp_path / "photos" / "chelsea" / "0001.jpg").rename(tmp_path / "photos" / "coffee" / "0001.jpg")
        photo.rename(tmp_path / "photos" / "chelsea" / "0001.jpg")
        says = "removed: coffee/0002.jpg"
    else:
        run = replace(run, config=replace(config, weights="random"))
    with pytest.raises(IdentityError, match=says):
        cluster_worker._prepare(run)


def test_ctrl_c_finishes_what_is_in_hand_and_the_same_command_goes_on(workers, config, alone, spawn, tmp_path):
    (workers.hooks / "hold").write_text("3")
    command = [*arguments(config.data, config.cache), "--grace", "60", "--scheduler", workers.config.scheduler]
    process = spawn(*command, stderr=str(tmp_path / "said"))
    wait_until(lambda: len(workers.commits()) >= 3, process)
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: "stopping after the shard in hand" in (tmp_path / "said").read_text(), process)
    (workers.hooks / "hold").unlink()
    process.join(60)
    assert process.exitcode == 130
    said = (tmp_path / "said").read_text()
    assert said.endswith(f"interrupted: what was committed to {config.cache} stays; run the same command again to go on.\n")
    before = workers.commits()
    assert 3 < len(before) < SHARDS  # those in hand are finished, no other is begun
    assert len(Cache(config.cache).committed()) == len(before)
    assert extract_on(workers.config, config).root["root"] == alone
    assert Counter(shard for _, shard in workers.commits()).most_common(1)[0][1] == 1


def test_a_full_disk_stops_the_run(workers, config, alone, monkeypatch):
    (workers.hooks / "full").write_text("5")
    with pytest.raises(DiskFullError, match="no space left while writing shard 5"):
        extract_on(workers.config, config)
    (workers.hooks / "full").unlink()
    monkeypatch.setattr(pipelines.tally, "free_space", lambda path: 1_000_000)
    with pytest.raises(DiskFullError, match=r"Stopped before the disk is full; .* Make room, then run the same"):
        extract_on(workers.config, config)
    monkeypatch.undo()
    assert extract_on(workers.config, config).root["root"] == alone


def test_a_shard_that_kills_or_fails_again_and_again_is_named(workers, config, alone, monkeypatch):
    monkeypatch.setattr(pipelines.cluster, "TRIES", 2)
    monkeypatch.setattr(workers.cluster.scheduler, "allowed_failures", 0)
    (workers.hooks / "deadly").write_text("5")
    with pytest.raises(
        SamiCacheError, match=r"shard \d+ \(samples \d+ to \d+\) was in hand whenever a worker died.*the same co"
    ):
        extract_on(workers.config, config)
    (workers.hooks / "deadly").unlink()
    (workers.hooks / "broken").write_text("5")
    notes: list[str] = []
    with pytest.raises(SamiCacheError, match=r"shard 5 \(samples 20 to 23\) failed with RuntimeError: CUDA error: an illegal"):
        extract_on(workers.config, config, lambda progress: notes.append(progress.note))
    assert sum("shard 5" in note and note.endswith("handed out again") for note in notes) == 1
    (workers.hooks / "broken").unlink()
    assert extract_on(workers.config, config).root["root"] == alone


def test_a_cache_grows(workers, home, config, tmp_path, spawn):
    shutil.copytree(home / "photos", tmp_path / "photos")
    shutil.copytree(home / "alone.zarr", config.cache)
    shutil.copytree(home / "alone.zarr", tmp_path / "one.zarr")
    photo_folder(tmp_path / "new", 14, seed=5)
    for path in (tmp_path / "new").rglob("*.jpg"):
        shutil.move(path, tmp_path / "photos" / path.parent.name / f"new-{path.name}")
    summary = extract_on(workers.config, replace(config, data=tmp_path / "photos"))
    assert summary.before is not None
    assert summary.samples_done == 14
    process = spawn(*arguments(tmp_path / "photos", tmp_path / "one.zarr"))
    process.join(120)
    assert Cache(tmp_path / "one.zarr").root()["root"] == summary.root["root"] == Cache(config.cache).root()["root"]


def wait_until(condition: Callable[[], bool], process: BaseProcess | None = None) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process is None or process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children() -> set[int]:
    """Processes that descend from this one."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def test_a_process_a_device_and_none_is_left(home, config, alone, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, environment = children(), dict(os.environ)
    most = 0

    def look(progress: Progress) -> None:
        nonlocal most
        most = max(most, progress.workers or 0)

    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        summary = extract_on(ClusterConfig(devices="cpu:2"), config, look)
    assert summary.root["root"] == alone
    assert children() <= before
    assert dict(os.environ) == environment


def test_a_worker_joins_late_by_the_command_and_leaves_at_a_signal(home, config, alone, spawn, tmp_path, monkeypatch):
    """A scheduler without workers; then one comes, and is to go in the middle of shards; then another does the rest."""
    from distributed import Scheduler, SpecCluster

    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    started: list[BaseProcess] = []
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "hold").write_text("2")

    def start(hooks: Path) -> None:
        command = ["worker", address, "--devices", "cpu", "--grace", "100", "--death-timeout", "100"]
        started.append(spawn(*command, stderr=str(tmp_path / "said"), prepare=partial(hook_command, hooks)))

    def look(progress: Progress) -> None:
        if progress.stage == "wait" and not started:
            start(first)
        if progress.stage == "extract" and len(commits(first)) >= 2 and len(started) == 1:
            os.kill(started[0].pid, signal.SIGTERM)
            start(second)
        if len(commits(second)) >= 2:
            (first / "hold").unlink(missing_ok=True)

    with SpecCluster(scheduler={"cls": Scheduler, "options": options}, silence_logs=logging.CRITICAL) as cluster:
        address = cluster.scheduler_address
        summary = extract_on(ClusterConfig(scheduler=address), config, look)
    for process in started:
        process.join(30)
    assert summary.root["root"] == alone
    assert [process.exitcode for process in started] == [143, 0], (tmp_path / "said").read_text()
    assert 2 < len(commits(first)) < SHARDS - 2  # those in hand are finished
    assert sorted(shard for _, shard in commits(first) + commits(second)) == list(range(SHARDS))


FAKE = """#!{python}
import os, signal, subprocess, sys
folder = {folder!r}
if os.path.basename(sys.argv[0]) == "sbatch":
    number, text = 77, open(sys.argv[1]).read()
    script = os.path.join(folder, "job.sh")
    open(script + ".new", "w").write(text)
    os.rename(script + ".new", script)
    if {runs}:
        log = open(os.path.join(folder, "job.log"), "w")
        number = subprocess.Popen(["bash", script], stdout=log, stderr=log, start_new_session=True).pid
    print(f"Submitted batch job {{number}}")
else:
    open(os.path.join(folder, "cancelled"), "a").write(sys.argv[1])
    if {runs}:
        os.killpg(int(sys.argv[1]), signal.SIGTERM)
"""


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, *, runs: bool) -> Path:
    """A folder on PATH with an sbatch that keeps the script of a job, and may run it, and a scancel."""
    folder.mkdir()
    for name in ("sbatch", "scancel"):
        (folder / name).write_text(FAKE.format(python=sys.executable, folder=str(folder), runs=runs))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


SBATCH = ("-p gpu --gres=gpu:1", "--time=1:00:00 --account 'a b'")
OPTIONS = ["-J sami-cache", "-p gpu", "--gres=gpu:1", "--time=1:00:00", "--account 'a b'"]


def test_slurm_is_asked_for_jobs_that_extract(home, config, alone, spawn, tmp_path, monkeypatch):
    """What the script runs is started here, forked, which takes no seconds of imports."""
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch, runs=False)
    jobs: list[BaseProcess] = []

    def start(progress: Progress) -> None:
        if progress.stage == "wait" and not jobs:
            wait_until((slurm / "job.sh").exists)
            python, *module, command = shlex.split((slurm / "job.sh").read_text().splitlines()[-1])[:4]
            assert [python, *module, command] == [sys.executable, "-m", "cli.main", "worker"]
            given = shlex.split((slurm / "job.sh").read_text().splitlines()[-1])[4:]
            jobs.append(
                spawn(command, *given, stderr=str(tmp_path / "said"), prepare=partial(hook_command, tmp_path / "hooks"))
            )

    summary = extract_on(ClusterConfig(slurm=1, sbatch=SBATCH), config, start)
    jobs[0].join(60)
    assert summary.root["root"] == alone
    script = (slurm / "job.sh").read_text().splitlines()
    assert [line for line in script if line.startswith("#SBATCH")] == [f"#SBATCH {text}" for text in OPTIONS]
    assert (slurm / "cancelled").read_text() == "77"
    assert len(commits(tmp_path / "hooks")) == SHARDS


@pytest.mark.slow
def test_the_script_of_a_slurm_job_runs_as_it_is(home, config, alone, tmp_path, monkeypatch):
    before = children()
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch, runs=True)
    assert extract_on(ClusterConfig(slurm=2, sbatch=SBATCH), config).root["root"] == alone
    wait_until(lambda: children() <= before)
    assert (slurm / "job.log").exists()


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_reaches_all_processes_and_ends_them_in_time(home, config, alone, tmp_path):
    """As typed: the main process and its workers, started anew and not forked, are one group of processes."""
    command = [sys.executable, "-m", "cli.main", *arguments(config.data, config.cache), "--devices", "cpu:2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stderr=said, env=environment, start_new_session=True)
    wait_until(lambda: config.cache.exists() and len(list((config.cache / "commits").iterdir())) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) in (130, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert extract_on(ClusterConfig(devices="cpu"), config).root["root"] == alone


def test_slurm_that_takes_no_job_is_told(config, tmp_path, monkeypatch):
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch, runs=False)
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(SamiCacheError, match=r"SLURM took no job(.|\n)*invalid partition(.|\n)*#SBATCH -p gpu"):
        extract_on(ClusterConfig(slurm=1, sbatch=["-p gpu"]), config)


def test_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-b,7")
    assert parse_devices("auto") == ["cuda:0", "cuda:1", "cuda:2"]
    assert parse_devices("2,0") == ["cuda:2", "cuda:0"]
    assert parse_devices("cpu:2") == ["cpu", "cpu"]
    environments = [options["env"] for options in worker_options(parse_devices("2,1"))]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["7", "GPU-b"]
    assert {(env["SAMI_CACHE_DEVICE"], env["SAMI_CACHE_PROCESSES"]) for env in environments} == {("cuda", 2)}
    assert [options["name"] for options in worker_options(["cuda:0", "cuda:1"], "job")] == ["job", "job.1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert worker_options(["cuda:1"])[0]["env"]["CUDA_VISIBLE_DEVICES"] == "1"
    for text in ("0,0", "gpu", "cpu:0", "1,", "cuda:1"):
        with pytest.raises(SamiCacheError, match="expected auto, numbers of GPUs"):
            parse_devices(text)
    with pytest.raises(SamiCacheError, match="there is no GPU 3; torch sees 3"):
        parse_devices("1,3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parse_devices("auto") == ["cpu"]


def test_one_device_needs_no_dask(config, alone, monkeypatch):
    monkeypatch.setattr(pipelines.cluster, "connect", lambda *_: pytest.fail("no other process is needed"))
    calls = []
    monkeypatch.setattr(pipelines.cluster, "extract", lambda config, on_progress: calls.append(config.device))
    extract_on(ClusterConfig(devices="cpu"), config)
    assert calls == ["cpu"]


def test_what_is_missing_or_contradicts_is_told(config, monkeypatch):
    for given in ({}, {"devices": "auto", "slurm": 2}, {"slurm": 0}, {"devices": "cpu", "sbatch": ["-p gpu"]}):
        with pytest.raises(SamiCacheError, match="--"):
            ClusterConfig(**given)
    monkeypatch.setattr(pipelines.cluster_processes, "PATIENCE", "1s")
    with pytest.raises(SamiCacheError, match=r"no scheduler at tcp://127.0.0.1:1 .*dask scheduler"):
        extract_on(ClusterConfig(scheduler="tcp://127.0.0.1:1"), config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SamiCacheError, match=r"distributed, which is not installed: pip install 'sami-cache\[cluster\]'"):
        extract_on(ClusterConfig(devices="cpu:2"), config)
