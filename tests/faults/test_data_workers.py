"""A worker of the data loader that dies, stands still, or runs out of memory: training ends with a typed error, in seconds.

A small SAMI training through the real command line; at a random sample or chunk one of the loader's threads ends itself
(SystemExit, which ends a thread and tells nobody), stands still (a read that never returns, as on a network drive that is
gone), or asks for more memory than there is. The error must name the worker and the sample or chunk it was at, the process
must be gone within the time-out and some slack, without a traceback; no step may be counted that did not have its samples;
and `--resume` must end at the weights of the undisturbed run, bit for bit.
"""

import json
import random
import re
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_training import arguments, bits, make_cache, shrink_student

from sami_cache.checkpoints import load_newest

SEED = 20261123
STEPS = 12
TIMEOUT = 1.5
SLACK = 12.0
KINDS = ("killed", "stopped", "out of memory")
SAYS = {
    "killed": r"worker \S+ failed at .*SystemExit",
    "stopped": r"did not come, nor anything else for [1-9]\d?\.\d s .* at ",
    "out of memory": r"worker \S+ ran out of memory at ",
}
PLACES = {"sample": 4 * STEPS, "chunk": 6}
"""Where it happens, and the most times that a worker comes there before."""


def break_worker(kind: str, place: str, when: int) -> None:
    """In the child: have the worker that comes `when`-th to `place` fail."""
    from sami_cache import loader, samples

    shrink_student()
    owner, name = (samples._CacheShard, "read_codes") if place == "chunk" else (loader, "crop_pixels")
    real, lock, counted = getattr(owner, name), threading.Lock(), iter(range(1, 1 << 30))

    def broken(*given):
        with lock:
            number = next(counted)
        if number == when:
            if kind == "killed":
                raise SystemExit(1)
            if kind == "stopped":
                threading.Event().wait()
            np.empty(1 << 62, np.uint8)
        return real(*given)

    setattr(owner, name, broken)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("workers"))


def given(cache: Path, run: Path) -> list[str]:
    return arguments(cache, run, STEPS, workers=2, data_timeout=TIMEOUT, log_every=1, checkpoint_every=3)


def final(run: Path) -> dict[str, bytes]:
    checkpoint = load_newest(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    return bits(checkpoint)


def campaign_of(spawn, cache: Path, folder: Path, count: int) -> Counter:
    rng = random.Random(SEED)
    calm = spawn(*given(cache, folder / "calm"), prepare=shrink_student)
    calm.join(120)
    assert calm.exitcode == 0
    expected, seen = final(folder / "calm"), Counter()
    for number in range(count):
        kind, place = KINDS[number % 3], rng.choice(list(PLACES))
        run, stderr = folder / f"run{number}", folder / f"stderr{number}"
        prepare = partial(break_worker, kind, place, rng.randint(1, PLACES[place]))
        started = time.monotonic()
        child = spawn(*given(cache, run), stderr=str(stderr), prepare=prepare)
        child.join(60)
        child.kill()  # nothing, if it is gone
        seconds, said = time.monotonic() - started, stderr.read_text()
        assert child.exitcode == 2, (kind, place, child.exitcode, said)
        assert seconds < TIMEOUT + SLACK, (kind, place, seconds)
        assert "Traceback" not in said
        assert re.search(r"\bloader-\d", said), said
        assert re.search(SAYS[kind], said), said
        at = r"sample '[a-z]+/\d{4}\.jpg'"
        assert re.search(at if place == "sample" or kind == "stopped" else rf"chunk \d+ of shard \d|{at}", said), said
        assert "goes on from its last checkpoint with --resume" in said
        newest = load_newest(run / "checkpoints") if (run / "checkpoints").exists() else None
        logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert logged == list(range(len(logged)))  # every step that was counted, once
        assert len(logged) <= STEPS
        assert newest is None or newest.step < len(logged)
        again = spawn(*given(cache, run), prepare=shrink_student)
        again.join(120)
        assert again.exitcode == 0
        assert final(run) == expected
        seen[f"{kind}, at a {place}"] += 1
    return seen


def test_a_worker_of_each_kind(spawn, cache, tmp_path):
    campaign_of(spawn, cache, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_workers(spawn, cache, tmp_path, campaign):
    seen = campaign_of(spawn, cache, tmp_path, 60)
    rest = {"wrong exits, hangs, steps counted without samples, weights that differ after --resume": 0}
    campaign("data-workers", seed=SEED, figures={**dict(sorted(seen.items())), **rest})
