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
from typing import Any


def run_cli(
    arguments: list[str],
    log: str | None = None,
    die: tuple[int, float] | None = None,
    stderr: str = os.devnull,
    prepare: Callable[[], None] | None = None,
) -> None:
    """In a child process: the command line, noting in `log` each shard that it writes, and whether it was committed before.

    `die`: kill -9 itself so many seconds after it began to write its n-th shard. (From outside, a busy machine is too slow
    to meet such a moment.)

    `stderr`: a file that takes what the command says. `prepare`: a picklable function to call first.
    """
    import torch

    import cli.main
    import pipelines.extract

    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    if log:
        real, begun = pipelines.extract.write_shard, itertools.count(1)

        def noted(cache, shard, *rest):
            with open(log, "a") as file:
                file.write(json.dumps([shard, cache.record_path(shard).exists()]) + "\n")
            if die and next(begun) == die[0]:
                threading.Timer(die[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            return real(cache, shard, *rest)

        pipelines.extract.write_shard = noted
    if prepare:
        prepare()
    sys.argv = ["sami-cache", *arguments]
    cli.main.main()


def make_spawn() -> Callable[..., BaseProcess]:
    """Start child processes in milliseconds: they are forked from a server that has torch imported and idle."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["cli.main", "pipelines.extract", "pipelines.train", "timm", "children", "pytest"])

    def start(*arguments: str, **options: Any) -> BaseProcess:
        process = context.Process(target=run_cli, args=(list(arguments),), kwargs=options)
        process.start()
        return process

    start("--version").join(60)  # the server has imported everything once this child is through
    return start
