"""Child processes that tell what they have made durable, and small file systems to cut, fill and enlarge under them."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest


def note(report: str, *event: object) -> None:
    """Append an event to the file `report` in one write, so that a stopped process has noted it whole or not at all."""
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, json.dumps(event).encode() + b"\n")
    os.close(descriptor)


def noted(report: Path) -> list[list[Any]]:
    return [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []


def run_watched(
    arguments: list[str],
    report: str,
    output: str = os.devnull,
    strike: tuple[str, int] | None = None,
    act: Callable[[], None] = lambda: None,
) -> None:
    """In a child process: the real command line, noting what has returned: the creation, each commit, the sealing.

    `strike`: call `act` just before the n-th call of one of the three, where a test from outside would come too late.
    """
    import torch

    import cli.main
    import pipelines.extract

    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    name = Path(arguments[arguments.index("--cache") + 1]).name
    calls = dict.fromkeys(("create_cache", "write_shard", "seal_cache"), 0)

    def watch(function: str, tell: Callable[[Any], tuple[object, ...]]) -> None:
        real = getattr(pipelines.extract, function)

        @functools.wraps(real)
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls[function] += 1
            if strike == (function, calls[function]):
                act()
            result = real(*args, **kwargs)
            note(report, name, *tell(result))
            return result

        setattr(pipelines.extract, function, watched)

    watch("create_cache", lambda _: ("created", None))
    watch("write_shard", lambda commit: ("committed", commit.record.shard, commit.won, commit.same))
    watch("seal_cache", lambda root: ("sealed", root["root"]))
    sys.argv = ["sami-cache", *arguments]
    cli.main.main()


def start(function: Callable[..., object], *args: object, **kwargs: object) -> BaseProcess:
    """Run `function` in a child of the fork server that the fixture `spawn` has started."""
    process = get_context("forkserver").Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def extract_arguments(photos: Path, cache: Path, *more: str) -> list[str]:
    given = ["--data", str(photos), "--cache", str(cache), "--teacher", "efficientnet_lite0", "--grid", "4"]
    return ["extract", *given, "--shard-samples", "16", "--device", "cpu", "--workers", "1", *more]


def stop(process: BaseProcess) -> bool:
    """SIGSTOP, and wait until every thread stands still (a system call in flight ends first). False if it has ended."""
    assert process.pid is not None
    try:
        os.kill(process.pid, signal.SIGSTOP)
        while True:
            states = {_state(thread) for thread in Path(f"/proc/{process.pid}/task").iterdir()}
            if states <= {"T", "t"}:
                return True
            if "Z" in states or "X" in states:
                return False
            time.sleep(0.0002)
    except (FileNotFoundError, ProcessLookupError):
        return False


def go_on(process: BaseProcess) -> None:
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)


def _state(thread: Path) -> str:
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def mounted(what: Path | str, folder: Path, *, kind: str = "", options: str = "") -> Iterator[Path]:
    """`what` mounted at `folder`; the mount is gone afterwards, and its loop device with it."""
    folder.mkdir(exist_ok=True)
    given = [*(["-t", kind] if kind else []), *(["-o", options] if options else [])]
    subprocess.run(["mount", *given, str(what), str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        for _ in range(50):  # a child that was just killed may hold it for a moment
            if subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        else:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@functools.cache
def why_no_mount(tool: str, kind: str) -> str | None:
    """Why no file system can be mounted here, None if it can."""
    if os.geteuid() != 0:
        return "needs root, to mount a file system"
    for name in ("mount", "umount", tool):
        if shutil.which(name) is None:
            return f"needs {name}"
    if kind == "ext4" and not Path("/dev/loop-control").exists():
        return "needs loop devices (/dev/loop-control)"
    return None


def skip_without_mount(tool: str = "mount", kind: str = "tmpfs") -> None:
    if reason := why_no_mount(tool, kind):
        pytest.skip(reason)


@contextlib.contextmanager
def or_skip() -> Iterator[None]:
    """Skip where mounting is refused although we are root, as in most containers."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot mount here: {error.stderr.decode().strip()}")
