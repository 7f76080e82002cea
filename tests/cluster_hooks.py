"""Loaded into the workers of tests: they note what they commit, and wait, fail or die where a file says so.

The folder $CLUSTER_HOOKS holds the files: `log` gets a line "pid shard" a commit; where there are as many as `hold` says, the
next ones wait until it is gone or says more; `full`, `broken` and `deadly` hold the shard that meets a full disk, a device
that fails, or the end of the process.
"""

import os
import time
from pathlib import Path
from typing import Any

from sami_cache.errors import DiskFullError


def text(name: str) -> str:
    path = Path(os.environ["CLUSTER_HOOKS"], name)
    return path.read_text() if path.exists() else ""


def load_hooks(hooks: Path, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of a nanny, for a worker that loads this file."""
    hooks.mkdir(exist_ok=True)
    options["env"] |= {"CLUSTER_HOOKS": str(hooks), "OMP_NUM_THREADS": "1"}
    return options | {"preload": [*options["preload"], "cluster_hooks"]}


def hook_command(hooks: Path) -> None:
    """In a process that is about to be `sami-cache worker`: its workers load this file, and are forked, to save the imports."""
    import dask.config

    from pipelines import cluster_processes

    dask.config.set({"distributed.worker.multiprocessing-method": "fork"})

    real = cluster_processes.worker_options
    cluster_processes.worker_options = lambda *given: [load_hooks(hooks, options) for options in real(*given)]


def dask_setup(worker: Any) -> None:
    from pipelines import cluster_worker

    os.chdir(os.environ.get("CLUSTER_CWD", "."))
    real = cluster_worker.commit_shard

    def commit_shard(cache, shard, parts):
        while (most := text("hold")) and len(text("log").splitlines()) >= int(most):
            time.sleep(0.02)
        if text("full") == str(shard):
            raise DiskFullError(f"{cache.path}: no space left while writing shard {shard}, which was not committed")
        if text("broken") == str(shard):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if text("deadly") == str(shard):
            os._exit(1)
        committed = real(cache, shard, parts)
        with open(Path(os.environ["CLUSTER_HOOKS"], "log"), "a") as log:
            log.write(f"{os.getpid()} {shard}\n")
        return committed

    cluster_worker.commit_shard = commit_shard
