"""Requests to an object store: each is repeated until it is answered, for a bounded time, and means the same when it is.

Nothing is ever overwritten blindly: an object is created if its name is free (`If-None-Match: *`), or replaced if it is still
the version that was looked at (`If-Match`). Either may be carried out and its answer lost; so every put bears a mark of its
own, by which a refusal is told from a success that was not heard of.
"""

import atexit
import contextlib
import errno
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import lru_cache
from itertools import zip_longest
from typing import Any, TypeVar

from sami_cache.errors import DamageError, SamiCacheError, StoreError, one_line
from sami_cache.store.places import RemotePath

T = TypeVar("T")
PATIENCE = 45.0
"""Seconds after which a request that was not answered is not repeated any more; less than the loader's patience."""
PIECE = 8 << 20
"""Bytes that are asked for at once: large enough for the speed of the line, small enough to be repeated."""
READ_SECONDS, WRITE_SECONDS = 20, 120
"""After which an attempt counts as not answered: a piece, a whole file."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 4.0
_MARK = "writer"
# Answers that no repetition changes. (Of 4xx the others say: wait, or again.)
_FINAL = re.compile(r"status code: (?:3\d\d|4(?!08|09|25|29)\d\d)|builder error|BadScheme")
_AGAIN = re.compile(r"RequestTimeout|SlowDown|InternalError")
Version = dict[str, str]
"""Of an object, as the store tells them apart."""


def put(path: RemotePath, data: bytes | memoryview, version: Version | None = None) -> bool:
    """Create the object, or replace exactly the version given. True if it is there by this call, False if another stood there.

    One request for all of it, so that it is there whole or not at all. Raises StoreError.
    """
    store = _store(path.scheme, path.bucket, WRITE_SECONDS, os.getpid())
    mark = secrets.token_hex(16)
    taken = _library().exceptions.AlreadyExistsError, _library().exceptions.PreconditionError
    mode: Any = "create" if version is None else version

    def request() -> bool:
        try:
            store.put(path.key, data, mode=mode, attributes={_MARK: mark}, use_multipart=False)
        except taken as error:
            try:
                found = store.get(path.key, options={"head": True}).attributes.get(_MARK)
            except FileNotFoundError:
                if version is None:  # two creators at the same moment, both refused: there is nothing yet
                    raise _Unsettled(str(error)) from None
                return False
            return found == mark
        return True

    return _ask(path, "writing it", request)


def read(path: RemotePath, at_most: int) -> tuple[bytes | None, int, Version]:
    """The object's bytes (None if there are more than `at_most`), its size and version.

    Raises FileNotFoundError, StoreError.
    """
    while True:
        data, size, version = _range(path, 0, PIECE, None)
        if size > at_most:
            return None, size, version
        with contextlib.suppress(_Replaced):
            rest = [_range(path, start, PIECE, version)[0] for start in range(PIECE, size, PIECE)]
            return b"".join([data, *rest]), size, version


def pieces(path: RemotePath) -> Iterator[bytes]:
    """The object from front to back, all of one version. Raises FileNotFoundError, also where it is replaced meanwhile."""
    data, size, version = _range(path, 0, PIECE, None)
    yield data
    try:
        for start in range(PIECE, size, PIECE):
            yield _range(path, start, PIECE, version)[0]
    except _Replaced:
        raise FileNotFoundError(errno.ENOENT, "replaced while it was read", str(path)) from None


def read_range(path: RemotePath, start: int, count: int) -> tuple[bytes, int]:
    """Up to `count` bytes from `start` on, as many as there are, and the size of the object.

    Raises FileNotFoundError, StoreError.
    """
    if count == 0:
        return b"", head(path)[0]
    data, size, _ = _range(path, start, count, None)
    return data, size


def head(path: RemotePath) -> tuple[int, Version]:
    """Size in bytes and version. Raises FileNotFoundError, StoreError."""
    store = _store(path.scheme, path.bucket, READ_SECONDS, os.getpid())
    meta = _ask(path, "looking it up", lambda: store.head(path.key))
    return meta["size"], _version(meta)


def _version(meta: Any) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def sizes_below(path: RemotePath) -> dict[str, int]:
    """The size of every object below `path`, by its name relative to it. Raises StoreError."""
    store = _store(path.scheme, path.bucket, READ_SECONDS, os.getpid())

    def request() -> list[Any]:
        return list(store.list(path.key or None, chunk_size=1000).collect())

    found = _ask(path, "listing it", request)
    prefix = f"{path.key}/" if path.key else ""
    return {meta["path"].removeprefix(prefix): meta["size"] for meta in found}


def copy(path: RemotePath, target: RemotePath) -> None:
    """Have the store copy an object to a name that nobody else uses. Raises FileNotFoundError, StoreError."""
    store = _store(path.scheme, path.bucket, WRITE_SECONDS, os.getpid())
    _ask(path, f"copying it to {target}", lambda: store.copy(path.key, target.key))


def delete(path: RemotePath) -> None:
    """Delete an object of which there is a copy. Raises StoreError."""
    store = _store(path.scheme, path.bucket, READ_SECONDS, os.getpid())
    with contextlib.suppress(FileNotFoundError):
        _ask(path, "deleting it", lambda: store.delete(path.key))


def move_aside(path: RemotePath, folder: RemotePath) -> RemotePath:
    """Copy an object into `folder`, compare the two, and delete the one at `path`; returns the copy's place.

    A delete takes no condition, so the version is looked at once more right before. Raises FileNotFoundError, StoreError.
    """
    while True:
        _, version = head(path)
        aside = _copy_aside(path, folder)
        if head(path)[1] == version:
            delete(path)
            return aside


def make_hold(path: RemotePath, data: bytes | memoryview, folder: RemotePath) -> list[RemotePath] | None:
    """Make an object hold `data`, in one step: there is no moment without it. What else it held is in `folder` then.

    Returns None if it held that already, else the copies of what it held. Raises StoreError.
    """
    moved: list[RemotePath] = []
    while not put(path, data):
        with contextlib.suppress(FileNotFoundError):
            found, _, version = read(path, len(data))
            if found == data:
                return moved or None
            moved.append(_copy_aside(path, folder))
            if put(path, data, version):
                break
    return moved


def _copy_aside(path: RemotePath, folder: RemotePath) -> RemotePath:
    for _ in range(3):  # another may replace it meanwhile
        aside = folder / f"{path.parent.name}.{path.name}.{secrets.token_hex(16)}"
        copy(path, aside)
        if all(a == b for a, b in zip_longest(pieces(path), pieces(aside))):
            return aside
    raise StoreError(f"{path}: copies of it in {folder} do not hold what it holds. Nothing was deleted; try again.")


def missing(path: RemotePath) -> DamageError:
    """What to tell of an object that should be there."""
    return DamageError(f"{path}: missing. `sami-cache verify --repair` mends what the images can mend.")


class _Unsettled(Exception):
    """The store has not made up its mind."""


class _Replaced(Exception):
    """The object is another version now."""


def _range(path: RemotePath, start: int, count: int, version: Version | None) -> tuple[bytes, int, Version]:
    """Up to `count` bytes from `start` on, the object's size and its version, which must be `version` if that is given."""
    store = _store(path.scheme, path.bucket, READ_SECONDS, os.getpid())
    exceptions = _library().exceptions
    options: Any = {"range": (start, start + count)}
    if version and "e_tag" in version:
        options["if_match"] = version["e_tag"]

    def request() -> tuple[bytes, int, Version]:
        try:
            answer = store.get(path.key, options=options)
        except exceptions.PreconditionError:
            raise _Replaced from None
        except exceptions.GenericError as error:
            if "status code: 416" not in str(error):
                raise
            meta = store.head(path.key)  # it ends before `start`; an empty object has no bytes to ask for
            return b"", meta["size"], _version(meta)
        data, meta = bytes(answer.bytes()), answer.meta
        if len(data) != max(0, min(start + count, meta["size"]) - start):
            raise _Unsettled(f"{len(data)} bytes came of {count} from {start} on")
        return data, meta["size"], _version(meta)

    return _ask(path, "reading it", request)


def _ask(path: RemotePath, doing: str, request: Callable[[], T]) -> T:
    """What `request` returns, which is made again while it is not answered, until PATIENCE is at its end.

    Raises FileNotFoundError where there is no such object, StoreError where the store refuses or stays silent.
    """
    exceptions, began, pause, attempts = _library().exceptions, time.monotonic(), _FIRST_PAUSE, 0
    while True:
        attempts += 1
        try:
            return _interruptibly(request)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(f"{path}: there is no bucket {path.bucket!r}. Make it first, or check the name.") from None
            raise FileNotFoundError(errno.ENOENT, "missing", str(path)) from None
        except (exceptions.BaseError, _Unsettled) as error:
            reason = one_line(str(error).partition("\n\nDebug source")[0])
            waited = time.monotonic() - began
            final = _FINAL.search(reason) and not _AGAIN.search(reason)
            if final or not isinstance(error, (exceptions.GenericError, _Unsettled)):
                hint = " (an http:// endpoint needs AWS_ALLOW_HTTP=true)" if "builder error" in reason else ""
                raise StoreError(f"{path}: the object store refused {doing}{hint}: {reason}") from None
            if waited + pause > PATIENCE or _ending.is_set():
                raise StoreError(
                    f"{path}: the object store did not answer in {waited:.0f} s and {attempts} attempts at {doing}. The last: "
                    f"{reason}. Check the network and the endpoint; what is committed stays, and the same command goes on "
                    "(train: with --resume)."
                ) from None
        _ending.wait(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, _LONGEST_PAUSE)


_ending = threading.Event()
_in_flight: set[int] = set()


def _interruptibly(request: Callable[[], T]) -> T:
    """Make a request so that a signal finds this thread in Python: the main thread waits for another that makes it."""
    if threading.current_thread() is not threading.main_thread():
        return _counted(request)
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(_counted(request))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="request", daemon=True).start()
    return answer.result()


def _counted(request: Callable[[], T]) -> T:
    thread = threading.get_ident()
    _in_flight.add(thread)
    try:
        return request()
    finally:
        _in_flight.discard(thread)


@atexit.register
def _drain() -> None:
    """A thread that comes back from the library into an interpreter that has ended aborts the process: wait for them."""
    _ending.set()
    deadline = time.monotonic() + READ_SECONDS
    while _in_flight and time.monotonic() < deadline:
        time.sleep(0.01)


@lru_cache
def _library() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise SamiCacheError(
            "a cache in an object store needs the library obstore, the extra `objects`: pip install 'sami-cache[objects]'"
        ) from error
    return obstore


@lru_cache
def _store(scheme: str, bucket: str, seconds: int, process: int) -> Any:
    """A client of one bucket, configured by the environment. We repeat requests ourselves: only so is it known what they did.

    `process` keeps one process's connections from another's after a fork.
    """
    options: dict[str, Any] = {"timeout": f"{seconds}s", "connect_timeout": "5s"}
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
        options["allow_http"] = True
    try:
        return _library().store.from_url(f"{scheme}://{bucket}", client_options=options, retry_config={"max_retries": 0})
    except (_library().exceptions.BaseError, ValueError) as error:
        raise StoreError(f"{scheme}://{bucket}: {one_line(error)}") from None
