"""Faults at system calls, without root and without other programs: seccomp's user notification (Linux 5.5 and later).

A filtered child stops at each call that writes, flushes or names a file, in any of its threads and children. The supervisor
in this process looks at what the call concerns, counts it if that lies in the watched folder, and then lets it happen, fails
it, or kills the child before it happens. Paths are taken as they are spelt: the watched folder must not lie behind a link.
"""

import ctypes
import errno
import fcntl
import os
import platform
import re
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

# Name: number on x86_64 and aarch64, and where the call names files: (argument with a descriptor, None for the working
# directory; argument with a path, None for the descriptor's own file).
_FILE, _PATH, _AT = ((0, None),), ((None, 0),), ((0, 1),)
_CALLS: dict[str, tuple[int, int | None, tuple[tuple[int | None, int | None], ...]]] = {
    "write": (1, 64, _FILE),
    "pwrite64": (18, 68, _FILE),
    "fsync": (74, 82, _FILE),
    "fdatasync": (75, 83, _FILE),
    "ftruncate": (77, 46, _FILE),
    "fallocate": (285, 47, _FILE),
    "rename": (82, None, ((None, 0), (None, 1))),
    "renameat": (264, 38, ((0, 1), (2, 3))),
    "renameat2": (316, 276, ((0, 1), (2, 3))),
    "link": (86, None, ((None, 0), (None, 1))),
    "linkat": (265, 37, ((0, 1), (2, 3))),
    "unlink": (87, None, _PATH),
    "unlinkat": (263, 35, _AT),
    "rmdir": (84, None, _PATH),
    "mkdir": (83, None, _PATH),
    "mkdirat": (258, 34, _AT),
    "openat": (257, 56, _AT),
}
_MACHINES = {"x86_64": (0, 317, 0xC000003E), "aarch64": (1, 277, 0xC00000B7)}  # column above, seccomp(2), audit's name
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls; the structs have 80 and 24 bytes
_CONTINUE = 1
_RANDOM_HEX = re.compile(r"\.(?:[0-9a-f]{16}|[0-9a-f]{8})(?=/|$)")
# What a full disk does not refuse.
FREES = ("unlink", "unlinkat", "rmdir")
# multiprocessing forgets to expect that two threads start and collect children at once.
_starting = threading.Lock()


@dataclass
class Outcome:
    """What became of a child."""

    points: list[str] = field(default_factory=list)
    """Each call that concerned the watched folder, in order: "fsync tmp/0.0.0.0"."""
    exit_code: int | None = None
    """Minus the signal's number if it was killed."""
    stderr: str = ""
    seconds: float = 0.0
    hung: bool = False
    """It took longer than it was given, and was killed for that."""


def run(
    target: Callable[..., object],
    arguments: tuple = (),
    *,
    watch: Path,
    at: int | None = None,
    do: str | int | Callable[[], object] = "kill",
    stays: bool = False,
    before: Callable[[], object] | None = None,
    after: float | None = None,
    patience: float = 120.0,
) -> Outcome:
    """Call `target` in a child forked from multiprocessing's server, in a process group of its own, and watch it.

    Args:
        at: the point, counted from 1, at which to `do` it: "kill" the group before the call, fail the call with this errno, or
            call this while the child waits, and let the call happen then.
        stays: fail all later calls as well; of ENOSPC those that free space are spared.
        before: call this just before the fault.
        after: kill the group so many seconds after the start, wherever it is.
        patience: seconds after which the child counts as hung.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as stderr:
        process = get_context("forkserver").Process(target=_filtered, args=(theirs, target, arguments))
        with _starting:
            process.start()
        theirs.close()
        socket.send_fds(ours, [b"e"], [stderr.fileno()])
        reason, listeners, *_ = socket.recv_fds(ours, 200, 1)
        outcome, started = Outcome(), time.monotonic()
        if listeners:
            supervision = _Supervision(outcome, os.path.realpath(watch), process.pid, at, do, stays, before)
            try:
                supervision.until_the_end(listeners[0], process.sentinel, started, after, patience)
            finally:
                os.close(listeners[0])
        with _starting:
            process.join()
        if not listeners:
            raise OSError(reason.decode() or "the child died before it was filtered")
        stderr.seek(0)
        outcome.stderr = stderr.read().decode(errors="replace")
    outcome.exit_code, outcome.seconds = process.exitcode, time.monotonic() - started
    return outcome


@cache
def unavailable() -> str | None:
    """Why calls cannot be watched here, None if they can."""
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        return f"no system call numbers for {platform.system()} {platform.machine()}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = run(os.mkdir, (f"{folder}/x",), watch=Path(folder))
        except OSError as error:
            return f"seccomp user notification: {error}"
    return None if len(outcome.points) == 1 else f"seccomp user notification: cannot read what a child names ({outcome})"


class _Supervision:
    def __init__(self, outcome: Outcome, watch: str, group: int, at: int | None, do, stays: bool, before) -> None:
        self.outcome, self.watch, self.group = outcome, watch, group
        self.at, self.do, self.stays, self.before = at, do, stays, before
        column = _MACHINES[platform.machine()][0]
        self.calls = {call[column]: (name, call[2]) for name, call in _CALLS.items()}

    def until_the_end(self, listener: int, sentinel: int, started: float, after: float | None, patience: float) -> None:
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        poller.register(sentinel, select.POLLIN)
        killed = False
        while True:
            limit = started + (patience if after is None else min(after, patience))
            ready = dict(poller.poll(None if killed else max(0, limit - time.monotonic()) * 1000))
            if ready.get(listener, 0) & select.POLLIN:
                self._answer(listener)
            elif sentinel in ready:
                return
            elif listener in ready:
                poller.unregister(listener)
            if not killed and time.monotonic() >= limit:
                self._kill()
                killed, self.outcome.hung = True, after is None

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)

    def _answer(self, listener: int) -> None:
        notification = bytearray(80)
        with suppress(FileNotFoundError):  # killed meanwhile
            fcntl.ioctl(listener, _RECEIVE, notification)
            identity, thread, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", notification)
            refused = self._judge(thread, number, arguments)
            if refused is not None:
                fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", identity, 0, -refused, 0 if refused else _CONTINUE))

    def _judge(self, thread: int, number: int, arguments: list[int]) -> int | None:
        """What the call is to fail with, 0 if it is to happen, None if nothing is left to answer."""
        name, places = self.calls[number]
        paths = [path for place in places if (path := self._path(thread, arguments, *place)) is not None]
        inside = [os.path.relpath(path, self.watch) for path in paths if f"{path}/".startswith(f"{self.watch}/")]
        if not inside:
            return 0
        points = self.outcome.points
        points.append(f"{name} {' -> '.join(_RANDOM_HEX.sub('', path) for path in inside)}")
        if self.at is None or len(points) < self.at or (len(points) > self.at and not self.stays):
            return 0
        if self.before is not None and len(points) == self.at:
            self.before()
        if self.do == "kill":
            self._kill()
            return None
        if callable(self.do):
            self.do()
            return 0
        return 0 if self.do == errno.ENOSPC and name in FREES else int(self.do)

    def _path(self, thread: int, arguments: list[int], descriptor: int | None, path: int | None) -> str | None:
        with suppress(OSError):
            number = -100 if descriptor is None else ctypes.c_int(arguments[descriptor] & 0xFFFFFFFF).value
            base = os.readlink(f"/proc/{thread}/cwd" if number == -100 else f"/proc/{thread}/fd/{number}")
            if path is None:
                return base
            with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
                text = os.pread(memory.fileno(), 4096, arguments[path]).split(b"\0")[0]
            return os.path.normpath(os.path.join(base, os.fsdecode(text)))
        return None


def _filtered(supervisor: socket.socket, target: Callable[..., object], arguments: tuple) -> None:
    """In the child. Nothing here may write once the filter is there and before the supervisor has the listener."""
    os.setsid()
    _, (stderr,), *_ = socket.recv_fds(supervisor, 1, 1)
    devnull = os.open(os.devnull, os.O_RDWR)
    for number, descriptor in enumerate((devnull, devnull, stderr)):
        os.dup2(descriptor, number)
    try:
        listener = _install_filter()
    except OSError as error:
        supervisor.send(str(error).encode())
        return
    socket.send_fds(supervisor, [b"l"], [listener])
    os.close(listener)
    supervisor.close()
    target(*arguments)


def _install_filter() -> int:
    """Have the kernel ask before each of `_CALLS`, in this thread and all that it starts; returns the listener."""
    column, seccomp, machine = _MACHINES[platform.machine()]
    creating = _CALLS["openat"][column]
    others = [call[column] for name, call in _CALLS.items() if call[column] is not None and name != "openat"]
    load, equal, set_, give = 0x20, 0x15, 0x45, 0x06
    count = len(others)
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, count + 4, machine),
        (load, 0, 0, 0),  # the number
        *((equal, count + 3 - index, 0, number) for index, number in enumerate(others)),
        (equal, 0, 2, creating),
        (load, 0, 0, 32),  # openat's flags
        (set_, 1, 0, os.O_CREAT),
        (give, 0, 0, _ALLOW),
        (give, 0, 0, _NOTIFY),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    described = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, mode_filter, new_listener = 38, 1, 8
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0:
        listener = libc.syscall(ctypes.c_long(seccomp), mode_filter, new_listener, described)
        if listener >= 0:
            return listener
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
