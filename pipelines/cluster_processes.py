"""Where the workers of an extraction come from: a process a device of this machine, SLURM, or whoever joins a scheduler."""

import asyncio
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from sami_cache.errors import Interrupted, SamiCacheError

PATIENCE = "30s"
"""For a scheduler to answer."""
ASK_AGAIN = 30.0
"""Seconds after which SLURM is asked again for jobs that have ended."""
THREADS = 2
"""Of a worker process, for tasks: one shard is with the teacher, the next one or the last one is not."""
DEVICE, SHARE = "SAMI_CACHE_DEVICE", "SAMI_CACHE_PROCESSES"
"""Environment of a worker process: its device, and how many such processes share the machine."""
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Who extracts; one of the three."""

    devices: str | None = None
    """Of this machine: `auto` (all GPUs, else the CPU), `0,2` (these GPUs), `cpu`, or `cpu:N`: N processes on the CPU."""
    scheduler: str | None = None
    """Address of a Dask scheduler whose workers do it: tcp://HOST:PORT."""
    slurm: int | None = None
    """Jobs to ask SLURM for."""
    sbatch: Sequence[str] = ()
    """Their options, as `sbatch` has them."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.devices, self.scheduler, self.slurm)) != 1:
            raise SamiCacheError("give one of --devices, --scheduler and --slurm")
        if self.slurm is not None and self.slurm < 1:
            raise SamiCacheError(f"--slurm {self.slurm}: expected a number of jobs, at least 1")
        if self.sbatch and self.slurm is None:
            raise SamiCacheError("--sbatch says what jobs are to be like: give --slurm JOBS with it")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Workers, reached through a scheduler."""

    client: Any
    """Dask's."""
    note: str
    """What the user is told of it."""
    keep_up: Callable[[], None] = lambda: None
    """Called now and then: replaces what does not come back by itself."""


def parse_devices(text: str) -> list[str]:
    """`cuda:N` or `cpu` for every process to be started. Raises SamiCacheError."""
    kind, _, number = text.partition(":")
    if kind == "cpu" and (not number or (number.isdecimal() and int(number) > 0)):
        return ["cpu"] * int(number or 1)
    import torch  # which takes seconds, and a process that only starts others does not need

    count = torch.cuda.device_count()
    if text == "auto":
        return [f"cuda:{index}" for index in range(count)] or ["cpu"]
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise SamiCacheError(f"--devices {text}: expected auto, numbers of GPUs such as 0,1, cpu, or cpu:N for N processes")
    if missing := [part for part in parts if int(part) >= count]:
        raise SamiCacheError(f"--devices {text}: there is no GPU {missing[0]}; torch sees {count}")
    return [f"cuda:{int(part)}" for part in parts]


def connect(config: ClusterConfig) -> AbstractContextManager[Connection]:
    """A context in which workers are there, or come."""
    need_dask()
    if config.scheduler is not None:
        return _remote(config.scheduler)
    if config.slurm is not None:
        return _slurm(config.slurm, config.sbatch)
    return _local(parse_devices(config.devices or "auto"))


def need_dask(module: str = "distributed") -> None:
    """Raise SamiCacheError where the optional packages are missing."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise SamiCacheError(f"several processes need {module}, which is not installed: pip install 'sami-cache[cluster]'")


def worker_options(devices: Sequence[str], name: str = "") -> list[dict[str, Any]]:
    """What the nannies of workers on these devices of a machine are made with."""
    # Numbers of GPUs are those that torch sees, which may be a part of what the machine has.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    options = []
    for number, device in enumerate(devices):
        kind, _, index = device.partition(":")
        env = {DEVICE: kind, SHARE: len(devices)}
        if kind == "cuda":
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index
        # The first one has the name that SLURM's job is known by.
        named = {"name": f"{name}.{number}" if number else name} if name else {}
        preload = {"preload": ["pipelines.cluster_worker"]}
        options.append({"nthreads": THREADS, "memory_limit": 0, "env": env, **preload, **named})
    return options


@contextmanager
def _dask_settings(processes: int) -> Iterator[None]:
    """How Dask is to start workers; it writes some of that into our environment, which is put back."""
    import dask.config
    import distributed  # noqa: F401 - its own settings must be there, or they vanish together with those set below

    # Its own setting is one thread: codes are made by matrix products, on the CPU all else too.
    threads = dict.fromkeys(THREAD_SETTINGS, max(1, (os.cpu_count() or 1) // processes))
    before = dict(os.environ)
    settings = {
        "distributed.nanny.pre-spawn-environ": threads,
        # What a worker does not need to be busy stays with the scheduler, for those who join late.
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.comm.timeouts.connect": "60s",
    }
    try:
        with dask.config.set(settings):
            yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _local(devices: Sequence[str]) -> Iterator[Connection]:
    from distributed import Client, Nanny, Scheduler, SpecCluster

    address = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:8787"}
    alike = {"silence_logs": logging.CRITICAL, "host": "127.0.0.1"}
    workers = {number: {"cls": Nanny, "options": options | alike} for number, options in enumerate(worker_options(devices))}
    cluster = {"workers": workers, "scheduler": {"cls": Scheduler, "options": address}}
    with (
        _dask_settings(len(devices)),
        _no_warnings(),
        SpecCluster(**cluster, silence_logs=logging.CRITICAL) as entered,  # pyright: ignore[reportArgumentType]
        Client(entered) as client,
    ):
        yield Connection(client=client, note=f"dashboard: {client.dashboard_link}")


@contextmanager
def _remote(address: str) -> Iterator[Connection]:
    from distributed import Client

    try:
        client = Client(address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise SamiCacheError(
            f"no scheduler at {address} ({error}). Start one with `dask scheduler`, and give its address."
        ) from None
    with client:
        yield Connection(client=client, note=_where(client, address))


@contextmanager
def _slurm(jobs: int, sbatch: Sequence[str]) -> Iterator[Connection]:
    need_dask("dask_jobqueue")
    from dask_jobqueue.slurm import SLURMCluster
    from distributed import Client

    # The user's sbatch options are all there is to say of a job; that it is one process is for those who count.
    given: dict[str, Any] = {
        "job_cls": _job_class(),
        "cores": THREADS,
        "memory": "1GB",
        "processes": 1,
        "job_directives_skip": ["-n 1", "--cpus-per-task", "--mem=", "-t "],
        "job_extra_directives": [option for text in sbatch for option in _directives(text)],
        "worker_command": "cli.main worker",
        "death_timeout": 600,
        "job_name": "sami-cache",
        "python": shlex.quote(sys.executable),
    }
    with _dask_settings(1), _no_warnings(), SLURMCluster(**given) as entered, Client(entered) as client:
        cluster: Any = entered
        asked = -math.inf

        def keep_up() -> None:
            """Jobs that have ended, and those that SLURM did not take, are asked for again."""
            nonlocal asked
            refused = {name: job for name, job in list(cluster.workers.items()) if job.refused}
            if refused and not client.nthreads():
                text = next(iter(refused.values())).refused
                raise SamiCacheError(f"SLURM took no job: {text}\nThe script was:\n{cluster.job_script()}")
            if time.monotonic() - asked >= ASK_AGAIN:
                for name in refused:
                    del cluster.workers[name]
                cluster.scale(jobs=jobs)
                asked = time.monotonic()

        yield Connection(client=client, note=_where(client, cluster.scheduler_address), keep_up=keep_up)


def _job_class() -> type:
    """A job of dask-jobqueue's that remembers why it could not be submitted, where theirs is an error that nobody sees."""
    from dask_jobqueue.slurm import SLURMJob
    from distributed.core import Status

    class Job(SLURMJob):
        refused = ""

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, OSError, ValueError) as error:
                self.refused, self.status = str(error), Status.failed

    return Job


def _where(client: Any, address: str) -> str:
    return f"dashboard: {client.dashboard_link}; more workers join with: sami-cache worker {address}"


def _directives(text: str) -> list[str]:
    """`-p gpu --time=1:00:00` as one directive an option."""
    found: list[str] = []
    for word in shlex.split(text):
        if word.startswith("-") or not found:
            found.append(word)
        else:
            found[-1] += f" {shlex.quote(word)}"
    return found


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Dask warns of a dashboard's port that is in use, and takes another."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        yield


def work(address: str, devices: Sequence[str], *, name: str = "", grace: float = 20.0, patience: float | None = None) -> None:
    """Join a scheduler with one process a device of this machine, until the scheduler ends or a signal comes.

    A process that dies is started again. On SIGTERM or SIGINT the shards in hand are finished if that fits into `grace`
    seconds, then the processes leave; at a second signal at once.

    Args:
        patience: seconds to wait for the scheduler; None for ever.

    Raises:
        Interrupted: after a signal.
        SamiCacheError: the scheduler was not found in time.
    """
    need_dask()
    with _dask_settings(len(devices)):
        number = asyncio.run(_work(address, devices, name, grace, patience))
    if number:
        raise Interrupted(f"left {address}; what is committed stays, and others do the rest.", number)


async def _work(address: str, devices: Sequence[str], name: str, grace: float, patience: float | None) -> int:
    from distributed import Nanny

    nannies = [Nanny(address, death_timeout=patience, **options) for options in worker_options(devices, name)]
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)

    async def live() -> None:
        await asyncio.gather(*nannies)
        await asyncio.gather(*(nanny.finished() for nanny in nannies))

    living, first = asyncio.create_task(live()), asyncio.create_task(signals.get())
    await asyncio.wait([living, first], return_when=asyncio.FIRST_COMPLETED)
    if not first.done():
        first.cancel()
        try:
            await living
        except (OSError, TimeoutError) as error:
            raise SamiCacheError(f"no scheduler at {address} ({error or 'waited in vain'})") from None
        return 0
    second = asyncio.create_task(signals.get())
    leaving = asyncio.gather(*(_leave(nanny, grace) for nanny in nannies), return_exceptions=True)
    await asyncio.wait([leaving, second], return_when=asyncio.FIRST_COMPLETED, timeout=grace)
    await asyncio.gather(*(nanny.close(timeout=2) for nanny in nannies), return_exceptions=True)
    living.cancel()
    return first.result()


async def _leave(nanny: Any, seconds: float) -> None:
    from distributed.core import rpc
    from distributed.protocol.pickle import dumps

    from pipelines.cluster_worker import leave

    if nanny.worker_address is not None:
        async with rpc(nanny.worker_address) as worker:
            await worker.run(function=dumps(leave), args=dumps((seconds,)), wait=True)
