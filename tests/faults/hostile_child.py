"""In a child process: what a user does with a hostile file, and a log of what is being tried."""

import json
import os
import re
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from training_reads import shard_read

import pipelines.jobs
from pipelines.diff import diff_caches
from pipelines.embedding import Embedder
from pipelines.extract import extract
from pipelines.inspect import inspect_cache
from pipelines.jobs import ExtractConfig
from pipelines.verify import VerifyConfig, verify
from sami_cache.checkpoints import load_checkpoint, load_weights, save_checkpoint
from sami_cache.data.sources import open_source
from sami_cache.errors import ImageError, SamiCacheError
from sami_cache.models.teachers import load_teacher
from sami_cache.models.weights import read_state
from sami_cache.runs import open_run
from sami_cache.samples import CacheSamples
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK

TEACHER = "test_resnet"
ADDRESS_SPACE = 4 << 30
"""Room that a child may still claim: what would ask for more is stopped before the machine suffers."""
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff]")


class Log:
    """Lines of JSON, each written before what it announces."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, **line: Any) -> None:
        line |= {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}
        os.write(self.descriptor, json.dumps(line).encode() + b"\n")

    def tried(self, name: str, act: Callable[[], Any]) -> Any:
        """Do it; anything but a result or an error on purpose has escaped."""
        self.write(trying=name)
        try:
            result = act()
        except SamiCacheError as error:
            text = str(error)
            if not text or len(text) > 10_000:
                self.write(escape=name, what=f"message of {len(text)} characters: {text[:200]!r}")
            elif _UNPRINTABLE.search(text):
                self.write(refused=name, odd=text[:200])
            else:
                self.write(refused=name)
            return None
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hostile_child" not in frame.filename]
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if re.search("sami_cache/|pipelines/", f.filename)]
            self.write(escape=name, what=f"{type(error).__name__}: {str(error)[:150]} at {', '.join(ours[-2:])}")
            return None
        self.write(accepted=name)
        return result


def settings(data: Path, cache: Path) -> ExtractConfig:
    """The fastest extraction there is: a toy teacher on 64 x 64 pixels. One thread decodes, so that its last word counts."""
    return ExtractConfig(
        data=data,
        cache=cache,
        teacher=TEACHER,
        weights="random",
        grid=4,
        fit_images=8,
        shard_samples=8,
        device="cpu",
        workers=1,
    )


def make_good(folder: Path) -> None:
    """In a child process: a sealed cache of the pictures in folder/photos, and a training run's checkpoint."""
    extract(settings(folder / "photos", folder / "cache.zarr"))
    model = torch.nn.Linear(3, 2)
    config = {"student": "x", "train": {"steps": 9}}
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps({"config": config}))
    options: dict[str, Any] = {"config": config, "progress": {"seconds": 1.0}, "keep": 2}
    save_checkpoint(folder / "run" / "checkpoints", 3, model=model.state_dict(), optimizer=model.state_dict(), **options)


def attempt(log_path: str, home: str, good: str, tasks: list[tuple[int, str, str, str]]) -> None:
    """Try `tasks` (number, kind, path, cache to write) in turn."""
    os.environ |= {"HOME": home, "TMPDIR": home, "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = None
    for descriptor in (1, 2):  # libtiff writes to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # durability is not what is tried here
    pipelines.jobs.load_teacher = lru_cache(pipelines.jobs.load_teacher)
    log = Log(log_path)
    _watch_pictures(log)
    verify(VerifyConfig(cache=Path(good) / "cache.zarr", level="deep"))
    pipelines.jobs.load_teacher(TEACHER, weights="random", grid=4)
    with open("/proc/self/statm") as file:
        claimed = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (claimed + ADDRESS_SPACE,) * 2)
    log.write(baseline=True)
    for number, kind, path, cache in tasks:
        log.write(task=number)
        TRIES[kind](log, Path(path), Path(cache), Path(good))
    log.write(done=True)


def _watch_pictures(log: Log) -> None:
    prepare = Embedder._prepare

    def noted(self: Embedder, image: int, *rest: Any) -> Any:
        key, began = self.source.keys[image], time.monotonic()
        log.write(trying=key)
        try:
            made = prepare(self, image, *rest)
        except Exception as error:
            log.write(escape=key, what=f"{type(error).__name__}: {str(error)[:200]}")
            raise
        status = made[0][0].status
        seconds = round(time.monotonic() - began, 1)
        if status.startswith("not enough memory"):
            log.write(escape=key, what=f"asked for more than {ADDRESS_SPACE >> 30} GiB: {status}")
        log.write(**{"accepted" if status == OK else "refused": key}, picture=True, seconds=seconds)
        return made

    Embedder._prepare = noted


def _source(log: Log, path: Path, cache: Path, good: Path) -> None:
    if log.tried(f"extract {path.name}", lambda: extract(settings(path, cache))) is None:
        log.tried(f"read {path.name}", lambda: _read_all(path))
        return
    found = log.tried(f"verify {path.name}", lambda: verify(VerifyConfig(cache=cache, level="deep")))
    if found is None or found.report.findings:
        log.write(escape=path.name, what="the cache that was made of it is damaged")


def _read_all(path: Path) -> None:
    """Without a teacher, whose remarks on a single picture end an extraction."""
    source = open_source(path)
    for index in range(min(len(source), 50)):
        try:
            source.read(index)
        except ImageError:
            continue


def _cache(log: Log, path: Path, cache: Path, good: Path) -> None:
    name = path.name
    opened = log.tried(f"open {name}", lambda: Cache(path))
    if opened is not None:
        log.tried(f"listing {name}", lambda: opened.listing)
        log.tried(f"read {name}", lambda: opened.read_embedding(0))
        log.tried(f"train on {name}", lambda: _load_all(opened))
    log.tried(f"inspect {name}", lambda: inspect_cache(path))
    log.tried(f"diff {name}", lambda: diff_caches(path, good / "cache.zarr"))
    for level in ("quick", "default", "deep"):
        log.tried(f"verify {name} {level}", lambda level=level: verify(VerifyConfig(cache=path, level=level)))
    log.tried(f"resume {name}", lambda: extract(settings(good / "photos", path)))
    log.tried(f"sources {name}", lambda: verify(VerifyConfig(cache=path, level="quick", sources=True)))
    log.tried(f"repair {name}", lambda: verify(VerifyConfig(cache=path, repair=True, data=good / "photos")))


def _load_all(cache: Cache) -> None:
    samples = CacheSamples(cache)
    for shard in range(min(cache.shards, 4)):
        shard_read(samples, shard)


def _weights(log: Log, path: Path, cache: Path, good: Path) -> None:
    name = f"{path.parent.name}/{path.name}"
    log.tried(f"state {name}", lambda: read_state(path))
    log.tried(f"teacher {name}", lambda: load_teacher(TEACHER, weights=path, grid=4))
    log.tried(f"init {name}", lambda: load_weights(torch.nn.Linear(3, 2), path))


def _run(log: Log, path: Path, cache: Path, good: Path) -> None:
    for folder in sorted((path / "checkpoints").iterdir()):
        log.tried(f"checkpoint {path.name}", lambda folder=folder: load_checkpoint(folder))
    log.tried(f"init {path.name}", lambda: load_weights(torch.nn.Linear(3, 2), path))
    saved = json.loads((good / "run" / "config.json").read_bytes())["config"]
    checkpoint = log.tried(f"resume {path.name}", lambda: open_run(path, saved, {}, resume=True, free_fields=()))
    if checkpoint is not None:
        checkpoint[1].close()


TRIES: dict[str, Callable[[Log, Path, Path, Path], None]] = {
    "source": _source,
    "cache": _cache,
    "weights": _weights,
    "run": _run,
}
