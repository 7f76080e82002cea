"""How a job of several processes ends badly: one rank speaks, once, for all; the others are silent, and leave after it.

A rank that fails says so in the store that torchrun keeps for the job, and speaks. A rank whose collective failed knows only
that somebody is gone. It looks in the store: if a rank has failed there, that one speaks. If not, a rank was killed without a
word (SIGKILL, out of memory, `os._exit`), and one of those that are left finds out which, and speaks.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sami_cache.errors import Interrupted, SamiCacheError

if TYPE_CHECKING:  # the command line starts without torch
    from torch.distributed.distributed_c10d import Store

PATIENCE = 5.0
"""Seconds that a rank waits for others: to hear of them before it names one, and for the culprit to leave before it leaves."""


class PeerError(SamiCacheError):
    """Another process of the job has ended, and this one with it. What is to be said of it has been printed, by one rank."""

    exit_code = 4


class Peers:
    """What the ranks of a job know of each other's end."""

    def __init__(self, store: "Store", rank: int, world: int):
        from torch.distributed.distributed_c10d import PrefixStore

        self._store, self._rank, self._others = PrefixStore("sami-cache", store), rank, set(range(world)) - {rank}
        self._store.set(f"who/{rank}", f"{socket.gethostname()} {os.getpid()}")

    def ended(self, error: BaseException) -> BaseException:
        """What this rank is to raise instead of `error`, which ends it: the same, or a `PeerError`.

        From now on SIGTERM and SIGINT are ignored: torchrun sends them to whoever is left.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        lost = _failed_together(error)
        try:
            self._store.set(f"ended/{self._rank}", "lost" if lost else "itself")
            dead = self._dead(patience=PATIENCE if lost else 0.0)
            lost = lost or (isinstance(error, Interrupted) and bool(dead))  # the signal is torchrun's, who saw it first
            speaks = not (lost and self._endings("itself")) and self._store.add("speaker", 1) == 1
        except RuntimeError:  # the store is gone with the process that kept it: better said by every rank than by none
            dead, speaks = set(), True
        if not lost and speaks:
            _tell_torchrun()
            return error
        names = ", ".join(self._name(rank) for rank in sorted(dead)) or "another process of this job"
        message = f"{names} died without a word, killed or out of memory; torchrun says by which signal or exit code"
        message = ". ".join([message, *getattr(error, "__notes__", [])])
        if speaks:  # now, because torchrun may end us while we wait
            print(f"sami-cache: {message}", file=sys.stderr, flush=True)
        self._let_go_first(dead)
        return PeerError(message)

    def _dead(self, patience: float) -> set[int]:
        """Ranks that are gone without a word. Those of other machines count as gone when they are not heard of in time."""
        deadline = time.monotonic() + patience
        while True:
            unheard = {rank for rank in self._others if not self._store.check([f"ended/{rank}"])}
            dead = {rank for rank in unheard if not self._runs(rank)}
            late = time.monotonic() >= deadline
            if dead or not unheard or late or self._endings("itself"):
                return dead or (unheard if patience and late else set())
            time.sleep(0.05)

    def _endings(self, how: str) -> set[int]:
        keys = {rank: f"ended/{rank}" for rank in self._others}
        return {rank for rank, key in keys.items() if self._store.check([key]) and self._store.get(key).decode() == how}

    def _let_go_first(self, dead: set[int]) -> None:
        """Wait until the culprits have left, and torchrun has seen it: it takes the first that it sees for the cause."""
        deadline = time.monotonic() + PATIENCE
        with suppress(RuntimeError):
            culprits = dead or self._endings("itself")
            while time.monotonic() < deadline and any(self._runs(rank) for rank in culprits):
                time.sleep(0.05)
        time.sleep(1)  # torchrun looks ten times a second

    def _runs(self, rank: int) -> bool:
        """Whether the process runs; True where that cannot be seen from here."""
        host, pid = self._who(rank)
        if host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return True
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    def _who(self, rank: int) -> tuple[str, str]:
        if not self._store.check([f"who/{rank}"]):
            return "an unknown host", "?"
        host, pid = self._store.get(f"who/{rank}").decode().split()
        return host, pid

    def _name(self, rank: int) -> str:
        host, pid = self._who(rank)
        return f"rank {rank} of {len(self._others) + 1} (pid {pid} on {host})"


def this_rank() -> str:
    """'rank 1 of 2 (pid 4711 on node3)' under torchrun, else ''."""
    if not under_torchrun():
        return ""
    return f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} (pid {os.getpid()} on {socket.gethostname()})"


def under_torchrun() -> bool:
    """Whether a launcher has made this process a rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leave(code: int) -> NoReturn:
    """End a rank at once, after all of its files are closed: without taking Python down under gloo's threads.

    Such a thread drops the tensors of its last collective when it gets to it, and needs Python for that. If Python is being
    taken down by then, it unwinds the thread through C++ that forbids it: "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _failed_together(error: BaseException) -> bool:
    """Whether a collective failed, as it does when a peer is gone. gloo has no type of its own for that."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _tell_torchrun() -> None:
    """Its report says otherwise that there is no reason to be had."""
    text = "said above, in the line that begins with 'sami-cache:'"
    content = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}}
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(path).write_text(json.dumps(content))
