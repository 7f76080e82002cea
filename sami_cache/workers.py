"""The threads that read and decode for a loader: what they are at is known, and one that is stuck holds nobody up for ever.

`concurrent.futures` waits for its threads wherever the program ends, so that one read that never returns (a network file
system that is gone, a dying disk) would turn every error into a hang.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sami_cache.errors import SamiCacheError

T = TypeVar("T")
_Task = tuple[Future[Any], str, Callable[..., Any], tuple[Any, ...]]


class LoaderError(SamiCacheError):
    """A worker of the loader failed, or has been at something for too long; the message names both."""


class Workers:
    """`count` daemon threads that take tasks in order."""

    def __init__(self, count: int, name: str) -> None:
        self.last_sign = time.monotonic()
        """When a thread last began or finished something, or said with `sign` that it goes on."""
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._busy: dict[str, tuple[str, float]] = {}
        self._count = count
        self._closed = False
        for number in range(count):
            threading.Thread(target=self._work, args=(f"{name}-{number}",), name=f"{name}-{number}", daemon=True).start()

    def submit(self, what: str, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have `call(*arguments)` done; `what` says in an error what it was. Whatever it raises comes as a SamiCacheError."""
        future: Future[T] = Future()
        self._tasks.put((future, what, call, arguments))
        return future

    def sign(self) -> None:
        """Called by a task that takes long, whenever a part of it is done."""
        self.last_sign = time.monotonic()

    def at_work(self) -> list[str]:
        """What each busy thread is at, the one that began first in front."""
        now = time.monotonic()
        busy = sorted(self._busy.items(), key=lambda item: item[1][1])
        return [f"{name} at {what} for {now - since:.1f} s" for name, (what, since) in busy]

    def close(self) -> None:
        """Begin nothing more. Does not wait for what is being done."""
        self._closed = True
        for _ in range(self._count):
            self._tasks.put(None)

    def _work(self, name: str) -> None:
        while (task := self._tasks.get()) is not None:
            future, what, call, arguments = task
            del task
            if self._closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            self._busy[name] = what, time.monotonic()
            self.sign()
            try:
                future.set_result(call(*arguments))
            except SamiCacheError as error:
                future.set_exception(error)
            except MemoryError as error:
                future.set_exception(_failure(f"worker {name} ran out of memory at {what}. Use fewer --workers", error))
            except BaseException as error:
                # SystemExit too: in a thread it would end nothing but the thread, and nobody would be told.
                future.set_exception(_failure(f"worker {name} failed at {what} ({type(error).__name__}: {error})", error))
            finally:
                del self._busy[name]
                self.sign()
                del future, call, arguments


def _failure(message: str, cause: BaseException) -> LoaderError:
    error = LoaderError(f"{message}. No step was made with it; a training goes on from its last checkpoint with --resume.")
    error.__cause__ = cause
    return error
