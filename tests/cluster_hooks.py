"""Loaded into the workers of tests: they note what they commit, and are slow, sick or deadly where a file says so.

The folder $CLUSTER_HOOKS holds the files: `log` gets a line "pid shard" a commit; `pause` holds seconds to sleep before one;
`full`, `broken` and `deadly` hold the shard that meets a full disk, a device that fails, or the end of the process.
"""

import os
import time
from pathlib import Path
from typing import Any

from pipelines import cluster_worker
from sami_cache.errors import DiskFullError


def text(name: str) -> str:
    path = Path(os.environ["CLUSTER_HOOKS"], name)
    return path.read_text() if path.exists() else ""


def dask_setup(worker: Any) -> None:
    os.chdir(os.environ["CLUSTER_CWD"])
    real = cluster_worker.commit_shard

    def commit_shard(cache, shard, parts):
        time.sleep(float(text("pause") or 0))
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
