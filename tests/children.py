"""Child processes of the tests: the real command line, started in milliseconds, to be killed, stopped and watched."""

import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess


def run_cli(arguments: list[str], log: str | None = None, die: tuple[int, float] | None = None) -> None:
    """In a child process: the command line, noting in `log` each shard that it writes, and whether it was committed before.

    `die`: kill -9 itself so many seconds after it began to write its n-th shard. (From outside, a busy machine is too slow
    to meet such a moment.)
    """
    import torch

    import cli.main
    import pipelines.extract

    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    if log:
        real, begun = pipelines.extract.write_shard, itertools.count(1)

        def noted(cache, shard, *rest):
            with open(log, "a") as file:
                file.write(json.dumps([shard, cache.record_path(shard).exists()]) + "\n")
            if die and next(begun) == die[0]:
                threading.Timer(die[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            return real(cache, shard, *rest)

        pipelines.extract.write_shard = noted
    sys.argv = ["sami-cache", *arguments]
    cli.main.main()


def make_spawn() -> Callable[..., BaseProcess]:
    """Start child processes in milliseconds: they are forked from a server that has torch imported and idle."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["cli.main", "pipelines.extract", "pipelines.train", "timm", "children"])

    def start(*arguments: str, log: str | None = None, die: tuple[int, float] | None = None):
        process = context.Process(target=run_cli, args=(list(arguments), log, die))
        process.start()
        return process

    start("--version").join(60)  # the server has imported everything once this child is through
    return start
