"""The threads that read and decode for a loader: what they are at is known, and one that is stuck holds nobody up for ever.

`concurrent.futures` waits for its threads wherever the program ends, so that one read that never returns (a network file
system that is gone, a dying disk) would turn every error into a hang.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sami_cache.errors import SamiCacheError

T = TypeVar("T")
_Task = tuple[Future[Any], str, Callable[..., Any], tuple[Any, ...]]
_CLOSE = 1 << 62


class LoaderError(SamiCacheError):
    """A worker of the loader failed, or has been at something for too long; the message names both."""


class Workers:
    """`count` daemon threads that take the most urgent task, of equally urgent ones the first."""

    def __init__(self, count: int, name: str) -> None:
        self.last_sign = time.monotonic()
        """When a thread last began or finished something, or said with `sign` that it goes on."""
        self._tasks: queue.PriorityQueue[tuple[int, int, _Task | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._busy: dict[str, tuple[str, float]] = {}
        self._closed = False
        names = [f"{name}-{number}" for number in range(count)]
        self._threads = [threading.Thread(target=self._work, args=(each,), name=each, daemon=True) for each in names]
        for thread in self._threads:
            thread.start()

    def submit(self, what: str, call: Callable[..., T], *arguments: Any, urgency: int = 0) -> Future[T]:
        """Have `call(*arguments)` done, the lower `urgency` first; `what` says in an error what it was.

        Whatever it raises comes as a SamiCacheError.
        """
        future: Future[T] = Future()
        self._tasks.put((urgency, next(self._numbers), (future, what, call, arguments)))
        return future

    def sign(self, what: str) -> None:
        """Called by a task of many parts at the beginning of each: `what` it is at now."""
        self.last_sign = time.monotonic()
        self._busy[threading.current_thread().name] = what, self.last_sign

    def at_work(self) -> list[str]:
        """What each busy thread is at, the one that began first in front."""
        now = time.monotonic()
        busy = sorted(self._busy.items(), key=lambda item: item[1][1])
        return [f"{name} at {what} for {now - since:.1f} s" for name, (what, since) in busy]

    def close(self) -> None:
        """Begin nothing more, and wait half a second for what is being done.

        A thread that is inside torch when the interpreter ends aborts the process. One that takes longer is left: it waits for
        a file, which does no harm.
        """
        self._closed, deadline = True, time.monotonic() + 0.5
        for _ in self._threads:
            self._tasks.put((_CLOSE, next(self._numbers), None))
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, name: str) -> None:
        while (task := self._tasks.get()[2]) is not None:
            future, what, call, arguments = task
            del task
            if self._closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            self.sign(what)
            try:
                future.set_result(call(*arguments))
            except SamiCacheError as error:
                future.set_exception(error)
            except MemoryError as error:
                future.set_exception(
                    _failure(f"worker {name} ran out of memory at {self._busy[name][0]}. Use fewer --workers", error)
                )
            except BaseException as error:
                # SystemExit too: in a thread it would end nothing but the thread, and nobody would be told.
                future.set_exception(
                    _failure(f"worker {name} failed at {self._busy[name][0]} ({type(error).__name__}: {error})", error)
                )
            finally:
                del self._busy[name]
                self.last_sign = time.monotonic()
                del future, call, arguments


def _failure(message: str, cause: BaseException) -> LoaderError:
    error = LoaderError(f"{message}. No step was made with it; a training goes on from its last checkpoint with --resume.")
    error.__cause__ = cause
    return error
