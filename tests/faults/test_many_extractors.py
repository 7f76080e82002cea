"""Two to eight extractors on one cache, started together; one of them is stopped at a random moment and goes on last.

Each makes the cache if it is not there, writes all shards in an order of its own, and seals. In half of the rounds they
disagree slightly, as other devices and batch sizes do: embeddings differ by a fraction of the codec's step, images by a byte.
Every shard must have one winner, one record, and the codes and images of one writer; all must see one root.
"""

import random
import shutil
import time
from collections import Counter
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import keys_of, make_samples, new_cache, teacher_like
from photos import photo_folder
from watched import extract_arguments, go_on, noted, run_watched, start, stop

from sami_cache.store.cache import Cache
from sami_cache.store.files import digest
from sami_cache.store.integrity import verify_cache
from sami_cache.store.writing import seal_cache, write_shard

SEED = 20261123
SAMPLES = 96
NOISE = 0.02
"""Of the codec's step: about one code in fifty is another."""


class Job(NamedTuple):
    path: Path
    at: float
    """When all begin, of the monotonic clock."""
    seed: int
    marker: bytes
    """What this writer's images end with."""
    noise: float


class Written(NamedTuple):
    shard: int
    won: bool
    record: str
    """Digest of the record that the writer saw in the end."""
    content: str
    """What this writer would have stored."""


def write_cache(job: Job) -> tuple[list[Written], str]:
    """What one extractor does; returns what came of each shard, and the root."""
    rng = random.Random(job.seed)
    embeddings = teacher_like(SAMPLES)
    while time.monotonic() < job.at:
        pass
    cache = new_cache(job.path, samples=SAMPLES)
    noise = np.random.default_rng(job.seed).normal(size=embeddings.shape)
    embeddings += (job.noise * cache.codec.step[0] * noise).astype(np.float32)
    written = []
    for shard in rng.sample(range(cache.shards), cache.shards):
        numbers, keys = cache.shard_samples(shard), keys_of(cache, shard)
        mine = embeddings[numbers.start : numbers.stop]
        commit = write_shard(cache, shard, mine, make_samples(keys), [key.encode() * 5 + job.marker for key in keys])
        content = digest(np.ascontiguousarray(cache.codec.encode(mine), cache.layout.stored_dtype).data.cast("B"))
        written.append(Written(shard, commit.won, commit.record.digest, content))
    return written, seal_cache(cache)["root"]


def work(connection: Connection) -> None:
    """In a child process: one job after another, until there is none."""
    while job := connection.recv():
        try:
            connection.send(write_cache(job))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


class Writers:
    """Child processes that stay, so that a round costs no imports."""

    def __init__(self, count: int, stack: ExitStack):
        self.ends, self.processes = [], []
        for _ in range(count):
            ours, theirs = Pipe()
            process = start(work, theirs)
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.kill)
            self.ends.append(ours)
            self.processes.append(process)

    def results(self, numbers: list[int]) -> list[tuple[list[Written], str]]:
        found = []
        for number in numbers:
            assert self.ends[number].poll(60), f"writer {number} does not end"
            result = self.ends[number].recv()
            assert not isinstance(result, str), f"writer {number}: {result}"
            found.append(result)
        return found


def check_round(path: Path, results: list[tuple[list[Written], str]], markers: list[bytes]) -> Counter:
    cache, met = Cache(path), Counter(rounds=1)
    for shard in range(cache.shards):
        theirs = [next(entry for entry in written if entry.shard == shard) for written, _ in results]
        assert sum(entry.won for entry in theirs) == 1, f"shard {shard}: {sum(entry.won for entry in theirs)} winners"
        record = cache.record(shard)
        assert {entry.record for entry in theirs} == {record.digest}, f"shard {shard}: writers saw several records"
        content = digest(cache.read_codes(shard).data.cast("B"))
        assert content == record.content
        assert content in {entry.content for entry in theirs}, f"shard {shard}: these are no writer's codes"
        whole = [[key.encode() * 5 + marker for key in keys_of(cache, shard)] for marker in markers]
        assert cache.read_jpegs(shard) in whole, f"shard {shard}: these are no writer's images"
        met["shards"] += 1
        met["shards on which writers differed"] += len({entry.content for entry in theirs}) > 1
        winner = next(entry for entry in theirs if entry.won)
        met["shards committed with another's codes"] += winner.content != content
    sealed = cache.root()
    assert sealed is not None
    assert {root for _, root in results} == {sealed["root"]}
    check_folder(path, met)
    return met


def check_folder(path: Path, met: Counter) -> None:
    """Clean, nothing doubled, nothing left over."""
    cache = Cache(path)
    assert verify_cache(path, level="deep").findings == []
    assert len(list((path / "commits").iterdir())) == cache.shards
    assert list((path / "tmp").iterdir()) == []
    assert [other.name for other in path.parent.iterdir() if other.name.startswith(f".{path.name}.")] == []
    met["files in quarantine"] += len(list(path.glob("quarantine/*")))


def play(tmp_path: Path, rounds: int, most: int) -> Counter:
    rng, met = random.Random(SEED), Counter()
    alone = write_cache(Job(tmp_path / "alone.zarr", 0, 0, b"", 0))[1]
    with ExitStack() as stack:
        writers = Writers(most, stack)
        everybody = list(range(most))
        for number in everybody:  # imports over, before the first round
            writers.ends[number].send(Job(tmp_path / f"warm{number}.zarr", 0, 0, b"", 0))
        writers.results(everybody)
        for number in range(rounds):
            disagree, stopping = number % 2 == 1, number // 2 % 2 == 0
            taking_part = everybody[: rng.randint(2, most)]
            path = tmp_path / f"{number}.zarr"
            begin = time.monotonic() + 0.02
            jobs = [Job(path, begin, rng.getrandbits(32), b"!" * writer * disagree, NOISE * disagree) for writer in taking_part]
            for writer, job in zip(taking_part, jobs, strict=True):
                writers.ends[writer].send(job)
            late = rng.choice(taking_part)
            moment = begin + rng.uniform(0, 0.02 * len(taking_part))
            if stopping:
                time.sleep(max(0.0, moment - time.monotonic()))
                assert stop(writers.processes[late])
                met["stopped in the middle"] += not writers.ends[late].poll()
            others = [writer for writer in taking_part if writer != late]
            results = writers.results(others)
            go_on(writers.processes[late])
            results += writers.results([late])
            try:
                met += check_round(path, results, sorted({job.marker for job in jobs}))
                if not disagree:
                    assert Cache(path).root()["root"] == alone
            except AssertionError as error:
                raise AssertionError(f"round {number}, {len(jobs)} writers, disagree {disagree}: {error}") from error
            met["rounds of writers that disagree"] += disagree
            met[f"rounds of {len(jobs)} writers"] += 1
            shutil.rmtree(path)
    return met


def play_command(tmp_path: Path, rounds: int, count: int) -> Counter:
    """The same with the real command line, in other batch sizes where the extractors disagree."""
    rng, met = random.Random(SEED), Counter()
    photos = photo_folder(tmp_path / "photos", count)
    calm = tmp_path / "calm.zarr"
    started = time.monotonic()
    process = start(run_watched, extract_arguments(photos, calm), str(tmp_path / "calm"))
    process.join(120)
    assert process.exitcode == 0
    seconds = time.monotonic() - started
    for number in range(rounds):
        disagree, writers = number % 2 == 1, rng.randint(2, 4)
        path, report = tmp_path / f"c{number}.zarr", tmp_path / f"report{number}"
        sizes = [str(rng.choice((3, 5, 8, 16)) if disagree else 8) for _ in range(writers)]
        processes = [start(run_watched, extract_arguments(photos, path, "--batch-size", size), str(report)) for size in sizes]
        time.sleep(rng.uniform(0.3, 0.5 * writers) * seconds)
        late = rng.choice(processes)
        met["command line: stopped in the middle"] += stop(late)
        for process in processes:
            if process is not late:
                process.join(120)
        go_on(late)
        late.join(120)
        assert [process.exitcode for process in processes] == [0] * writers
        events = noted(report)
        won = sorted(event[2] for event in events if event[1] == "committed" and event[3])
        assert won == list(range(Cache(path).shards)), f"command line, round {number}: winners of {won}"
        roots = {event[2] for event in events if event[1] == "sealed"}
        assert roots == {Cache(path).root()["root"]}
        assert disagree or roots == {Cache(calm).root()["root"]}
        check_folder(path, met)
        met["command line: rounds"] += 1
        met["command line: shards that two computed"] += sum(event[1] == "committed" and not event[3] for event in events)
    return met


def test_a_few_rounds_of_writers_started_together(spawn, tmp_path):
    met = play(tmp_path, rounds=6, most=3)
    assert met["rounds"] == 6


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_200_rounds_of_extractors_started_together(spawn, tmp_path, campaign):
    met = play(tmp_path, rounds=190, most=8)
    met += play_command(tmp_path, rounds=10, count=80)
    assert met["rounds"] + met["command line: rounds"] == 200
    assert met["stopped in the middle"] > 30
    assert met["shards on which writers differed"] > 100
    campaign("many-extractors", seed=SEED, figures={**dict(sorted(met.items())), "mixed shards": 0, "doubled shards": 0})
