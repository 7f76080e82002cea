"""The loader's threads: their failures have a name, and one that is stuck holds nobody up."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sami_cache.errors import ImageError
from sami_cache.workers import LoaderError, Workers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workers():
    workers = Workers(2, "sample")
    yield workers
    workers.close()


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (SystemExit(3), r"worker sample-\d failed at sample 'a' \(SystemExit: 3\)\. No step was made with it"),
        (KeyError("x"), r"worker sample-\d failed at sample 'a' \(KeyError: 'x'\)"),
        (MemoryError(), r"worker sample-\d ran out of memory at sample 'a'\. Use fewer --workers"),
    ],
)
def test_whatever_ends_a_task_has_a_name(workers, error, says):
    with pytest.raises(LoaderError, match=says) as caught:
        workers.submit("sample 'a'", fail, error).result(5)
    assert caught.value.__cause__ is error
    assert workers.submit("sample 'b'", int, "7").result(5) == 7  # the thread goes on


def test_our_own_errors_pass_as_they_are(workers):
    with pytest.raises(ImageError, match=r"^truncated$"):
        workers.submit("sample 'a'", fail, ImageError("truncated")).result(5)


def test_what_is_being_done_is_known_and_signs_of_life_are_dated(workers):
    hold, before = threading.Event(), workers.last_sign
    future = workers.submit("shard 3", hold.wait)
    while not workers.at_work():
        time.sleep(0.001)
    (line,) = workers.at_work()
    assert line.startswith("sample-")
    assert " at shard 3 for 0." in line
    began = workers.last_sign
    assert began > before
    workers.submit("shard 4", lambda: workers.sign("sample 'b'")).result(5)
    assert workers.last_sign > began
    hold.set()
    assert future.result(5)
    while workers.at_work():
        time.sleep(0.001)


def test_closing_cancels_what_waits_and_waits_for_nothing():
    workers, hold = Workers(1, "sample"), threading.Event()
    workers.submit("shard 0", hold.wait)
    waiting = workers.submit("shard 1", int, "1")
    started = time.monotonic()
    workers.close()
    assert time.monotonic() - started < 1
    hold.set()
    while not waiting.done():
        time.sleep(0.001)
    assert waiting.cancelled()


def test_a_stuck_worker_does_not_keep_the_program_from_ending():
    script = (
        "import threading, time; from sami_cache.workers import Workers; "
        "w = Workers(1, 'sample'); w.submit('shard 0', threading.Event().wait)\n"
        "while not w.at_work(): time.sleep(0.01)\n"
        "raise SystemExit(5)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=20, check=False).returncode == 5
