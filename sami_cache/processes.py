"""What reaches a training process from outside: the other ranks, and signals."""

import ctypes
import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sami_cache.errors import Interrupted, SamiCacheError
from sami_cache.peers import Peers, under_torchrun

T = TypeVar("T")
GRACE = 20.0
"""Seconds to finish what is in hand after a signal: schedulers send SIGKILL 30 seconds after SIGTERM, if not later."""


def choose_device(name: str = "auto") -> torch.device:
    """The device of this name; `auto`: CUDA where there is one, else the CPU."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def distributed(device: str = "auto") -> Iterator[torch.device]:
    """The device to train on; under torchrun also the process group (nccl on CUDA, gloo on the CPU) while the block runs.

    Where several processes run, what ends the block on one of them becomes a `PeerError` on the others, silent on all but one
    of the ranks (see peers.py). Leave such a process with `peers.leave`.
    """
    keep_freed_memory()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = chosen if chosen.index is not None else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if chosen.index >= torch.cuda.device_count():
            raise SamiCacheError(f"{chosen} asked for, {torch.cuda.device_count()} CUDA devices found: start fewer or use cpu")
        torch.cuda.set_device(chosen)
    if not under_torchrun():
        yield chosen
        return
    store, rank, world = next(rendezvous("env://"))
    peers = Peers(store, rank, world)
    failed = True
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
        yield chosen
        dist.barrier()  # without it gloo aborts, every other time, in the rank whose peer has already left
        failed = False
    except BaseException as error:
        ending = peers.ended(error)
        if ending is error:
            raise
        raise ending from error
    finally:
        # nccl would wait here for the peer that is gone.
        if dist.is_initialized() and not (failed and chosen.type == "cuda"):
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """(0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def largest(value: int, device: torch.device) -> int:
    """The largest `value` of all ranks; every rank must ask. Waits for the device only where there are several."""
    if rank_and_world()[1] == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def average(metrics: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Scalars averaged over the ranks, in one transfer from the device; every rank must ask, with the same names."""
    stacked = torch.stack([value.detach().to(device, torch.float32) for value in metrics.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(metrics, stacked.tolist(), strict=True))


def totals(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sums over the ranks, in float64; every rank must ask, with the same names."""
    if rank_and_world()[1] == 1:
        return dict(values)
    shared = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return dict(zip(values, shared.tolist(), strict=True))


def from_first_rank(ask: Callable[[], T], device: torch.device) -> T:
    """What `ask` returns on rank 0, on every rank; a `SamiCacheError` of rank 0 is raised on all."""
    if not dist.is_initialized():
        return ask()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = ask()
        except SamiCacheError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=device)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


class StopSignal:
    """While the block runs, SIGTERM and SIGINT end it with `Interrupted`, once what is in hand is finished.

    Where nothing is in hand (`holding` is False) the first signal raises at once. Else it is noted in `number`, and whoever
    holds something finishes it and stops; when `grace` seconds have passed, or at a second signal, `Interrupted` is raised
    wherever the program is. A further signal ends the process even if it is stuck. Outside the main thread, where Python
    allows no handlers, nothing is noted.
    """

    def __init__(self, describe: Callable[[], str], grace: float = GRACE):
        """
        Args:
            describe: what the user is told when something is abandoned.
            grace: seconds.
        """
        self.number = 0
        self.holding = False
        self._describe, self._grace, self._deadline = describe, grace, math.inf
        self._previous: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def seconds_left(self) -> float:
        """Of the grace; infinite as long as there was no signal."""
        return self._deadline - time.monotonic()

    def check(self) -> None:
        """Raise `Interrupted` if there was a signal."""
        if self.number:
            raise Interrupted(self._describe(), self.number)

    def _handle(self, number: int, frame: object) -> None:
        if not self.number and self.holding and self._grace > 0:
            self.number, self._deadline = number, time.monotonic() + self._grace
            # The end of the grace is one more signal. (Not the alarm, of which a process has one, and others use it.)
            self._timer = threading.Timer(self._grace, self._expire)
            self._timer.daemon = True
            self._timer.start()
            return
        self.number = number
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(self._describe(), number)

    def _expire(self) -> None:
        if signal.getsignal(self.number) == self._handle:
            signal.pthread_kill(threading.main_thread().ident or 0, self.number)


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0 under torchrun, also before and after the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation instead of giving it back to the kernel. Linux with glibc only.

    A large activation is otherwise mapped, zeroed page by page, and unmapped again by every operation: EfficientNet-Lite0 at
    512 px, batch 8, on two cores spent 0.19 of 0.42 CPU seconds an image on that, and none with this.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def objects_kept() -> Iterator[None]:
    """What exists now is passed over by the garbage collector while the block runs: libraries, models, lists of keys.

    It cannot become garbage meanwhile, and walking through half a million such objects, again and again, in the thread that
    trains was a quarter of all that the loader did in Python.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
