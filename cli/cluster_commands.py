"""Extraction by several processes: the options that say by which, and the command that joins."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.cluster_processes import ClusterConfig

Devices = Annotated[
    str | None,
    typer.Option(help="A process a device of this machine: auto (all GPUs), numbers such as 0,2, or cpu:N for N on the CPU."),
]
Scheduler = Annotated[
    str | None, typer.Option(help="By the workers of this Dask scheduler, tcp://HOST:PORT; they join by `sami-cache worker`.")
]
Slurm = Annotated[
    int | None, typer.Option(metavar="JOBS", help="By so many SLURM jobs, each a worker on all GPUs it is given.")
]
Sbatch = Annotated[
    list[str] | None, typer.Option(help="Options of these jobs, as sbatch takes them: '-p gpu --gres=gpu:1'. May be repeated.")
]


def register(app: typer.Typer) -> None:
    """Add the command of this file to `app`."""
    app.command(
        epilog="Example: `dask scheduler` on one machine, then on each of the others `sami-cache worker tcp://one:8786`"
    )(worker)


def workers_asked_for(
    devices: str | None, scheduler: str | None, slurm: int | None, sbatch: list[str] | None, *, plan: bool
) -> "ClusterConfig | None":
    """None where this process alone is to extract."""
    if not (devices is not None or scheduler is not None or slurm is not None or sbatch):
        return None
    from pipelines.cluster_processes import ClusterConfig
    from sami_cache.errors import SamiCacheError

    config = ClusterConfig(devices=devices, scheduler=scheduler, slurm=slurm, sbatch=sbatch or ())
    if plan:
        raise SamiCacheError("--plan measures one device of this machine (--device): leave the workers out, and divide.")
    return config


def worker(
    scheduler: Annotated[str, typer.Argument(help="Address of the scheduler: tcp://HOST:PORT.")],
    devices: Annotated[str, typer.Option(help="A process each: auto (all GPUs, else the CPU), 0,2, cpu or cpu:N.")] = "auto",
    grace: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds to finish the shards in hand after SIGTERM or Ctrl-C.")
    ] = 20.0,
    name: Annotated[str, typer.Option(help="As the dashboard is to show it.")] = "",
    death_timeout: Annotated[
        float | None, typer.Option(help="Give up when the scheduler has not been there for so many seconds. Default: never.")
    ] = None,
    nthreads: Annotated[int, typer.Option(hidden=True, help="dask-jobqueue passes it; there is one teacher a process.")] = 0,
    memory_limit: Annotated[str, typer.Option(hidden=True, help="dask-jobqueue passes it; SLURM sees to that.")] = "",
) -> None:
    """Take part in extractions: shards come from a scheduler, until it ends.

    The cache, the images and the weights must be at the same paths here as where `sami-cache extract --scheduler` runs.
    Processes that die are started again. Ctrl-C or SIGTERM: the shards in hand are finished, the others go to other workers.
    """
    from pipelines.cluster_processes import parse_devices, work

    work(scheduler, parse_devices(devices), name=name, grace=grace, patience=death_timeout)
