"""Caches in an object store behind a network that drops, delays, truncates and repeats, and processes killed at any request.

A proxy stands between the commands and an S3 server (moto's). To a share of the requests it does one of seven things: it
hangs up before it has passed the request on, or afterwards, so that it was carried out and nobody heard of it; passes a put on
after it has hung up, when the client has long tried again; waits; cuts the answer in the middle; passes the request on twice;
answers 503. Behind it caches are written, verified and read by a loader. Elsewhere the real command line is killed right
before or right after a request, whichever it is, and the same command goes on. Lost: a committed shard that was computed again.
"""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import fill_shard, full_cache, new_cache
from object_server import BUCKET, FAULTS, hostile_proxy, s3_server, use_server
from photos import photo_folder
from quick_cli import command_line, pooled_teacher
from tiny_training import arguments as training
from tiny_training import shrink_student, untimed
from watched import start

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from sami_cache.checkpoints import load_newest
from sami_cache.errors import SamiCacheError, StoreError
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.samples import CacheSamples
from sami_cache.store import objects, remote_file
from sami_cache.store.cache import Cache
from sami_cache.store.files import read_file, sizes_below
from sami_cache.store.integrity import verify_cache
from sami_cache.store.places import RemotePath

SEED = 20261129
SHARE = 0.2


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def remote(server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RemotePath:
    use_server(monkeypatch, server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return RemotePath("s3", BUCKET, f"{tmp_path.name}/cache.zarr")


def served(cache: Cache) -> list[tuple[list[str], bytes, list[bytes] | None]]:
    """What a training of two epochs is given."""
    samples = CacheSamples(cache)
    config = LoaderConfig(batch_size=8, images="encoded", open_shards=1, threads=4)
    batches = Loader(samples, samples.usable, config).batches()
    taken = [(batch.keys, batch.codes.numpy().tobytes(), batch.encoded) for batch, _ in zip(batches, range(8), strict=False)]  # type: ignore[union-attr]
    batches.close()  # type: ignore[attr-defined]
    return taken


def hostile_rounds(
    remote: RemotePath, server: int, patch: pytest.MonkeyPatch, folder: Path, rounds: int, seed: int
) -> Counter[str]:
    """Write, verify and read caches behind the proxy; returns what was done to requests, and what came of it."""
    local = full_cache(folder / "local.zarr")
    root, expected, met = local.root(), served(local), Counter[str]()
    for number in range(rounds):
        place = remote / f"round {number}"
        patch.setenv("XDG_CACHE_HOME", str(folder / f"copies {number}"))
        with hostile_proxy(server, seed=seed + number, share=SHARE) as proxy:
            use_server(patch, proxy.server_port)
            cache = new_cache(place)
            commits = [fill_shard(cache, shard, bad=(3,) if shard == 1 else ()) for shard in range(cache.shards)]
            met["commits taken for another's"] += sum(not commit.won for commit in commits)
            full_cache(place)  # again, as a second extractor would: it finds all of it committed, and seals
            report = verify_cache(place, level="deep")
            met["false alarms"] += len(report.findings)
            met["other roots"] += report.root != (root or {})["root"] or Cache(place).root() != root
            met["wrong reads"] += served(Cache(place)) != expected
            for fault, count in proxy.met.items():
                met[fault] += count
        use_server(patch, server)
        met["other files"] += {name: read_file(place / name) for name in sizes_below(place)} != {
            name: (local.path / name).read_bytes() for name in sizes_below(local.path)
        }
    return met


RESULTS = ("commits taken for another's", "false alarms", "other roots", "wrong reads", "other files")


def test_a_hostile_network_changes_nothing(
    remote: RemotePath, server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    met = hostile_rounds(remote, server, monkeypatch, tmp_path, rounds=1, seed=SEED)
    assert {name: met[name] for name in RESULTS} == dict.fromkeys(RESULTS, 0)
    assert sum(met[fault] > 0 for fault in FAULTS) >= 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hostile_network_changes_nothing_in_many_rounds(
    remote: RemotePath, server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, campaign
) -> None:
    met = hostile_rounds(remote, server, monkeypatch, tmp_path, rounds=40, seed=SEED)
    figures = {"caches written, verified and read": 40, "requests": sum(met[name] for name in (*FAULTS, "none"))}
    figures |= {f"of these: {name}": met[name] for name in FAULTS} | {name: met[name] for name in RESULTS}
    campaign("object-store-network", seed=SEED, figures=figures)
    assert {name: met[name] for name in RESULTS} == dict.fromkeys(RESULTS, 0)


# Killed at any request


def extract_arguments(photos: Path, cache: object) -> list[str]:
    given = {"data": photos, "cache": cache, "teacher": "pooled", "grid": 4, "shard-samples": 8, "device": "cpu", "workers": 1}
    return ["extract", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def run_killed(arguments: list[str], log: str, environment: dict[str, str], at: int | None, after: bool, requests: str) -> None:
    """In a child: the command line, killed right before or right after its request number `at`."""
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{log}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    real, made = objects._interruptibly, [0]

    def counted(request):
        made[0] += 1
        if made[0] == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(request)
        if made[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        Path(requests).write_text(str(made[0]))
        return result

    objects._interruptibly = counted
    command_line(arguments, log)


def killed_rounds(spawn, remote: RemotePath, port: int, folder: Path, points: int) -> Counter[str]:
    photos = photo_folder(folder / "photos", 24)
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}

    def run(place: object, log: Path, at: int | None = None, after: bool = False) -> int | None:
        process = start(
            run_killed, extract_arguments(photos, place), str(log), environment, at, after, str(folder / "requests")
        )
        process.join(300)
        return process.exitcode

    assert run(folder / "local.zarr", folder / "local.log") == 0
    assert run(remote / "calm", folder / "calm.log") == 0
    requests = int((folder / "requests").read_text())
    root, rng, found = Cache(folder / "local.zarr").root(), random.Random(SEED), Counter[str](requests=requests)
    for number in range(points):
        at, after = rng.randrange(1, requests + 1), rng.random() < 0.5
        place, log = remote / f"killed {number}", folder / f"{number}.log"
        found["killed"] += run(place, log, at, after) == -signal.SIGKILL
        found["did not go on"] += run(place, log) != 0
        found["lost"] += sum(json.loads(line)[1] for line in log.read_text().splitlines())
        found["other roots"] += Cache(place).root() != root
        found["damaged"] += len(verify_cache(place, level="deep").findings)
    return found


def test_killed_at_a_request_the_same_command_goes_on(spawn, remote: RemotePath, server: int, tmp_path: Path) -> None:
    found = killed_rounds(spawn, remote, server, tmp_path, points=3)
    assert found["killed"] == 3
    assert {name: found[name] for name in KILL_RESULTS} == dict.fromkeys(KILL_RESULTS, 0)


KILL_RESULTS = ("did not go on", "lost", "other roots", "damaged")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_many_requests_the_same_command_goes_on(
    spawn, remote: RemotePath, server: int, tmp_path: Path, campaign
) -> None:
    found = killed_rounds(spawn, remote, server, tmp_path, points=40)
    figures = {"requests of an extraction": found["requests"], "killed before or after one": found["killed"]}
    campaign("object-store-kills", seed=SEED, figures=figures | {name: found[name] for name in KILL_RESULTS})
    assert {name: found[name] for name in KILL_RESULTS} == dict.fromkeys(KILL_RESULTS, 0)


# The whole way


def test_the_whole_way_behind_a_hostile_network(
    remote: RemotePath, server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Extract, verify, audit, train, resume, repair, by the command line's own functions, as on a disk."""
    import cli.main
    import pipelines.jobs
    import pipelines.train

    monkeypatch.setattr(pipelines.jobs, "load_teacher", pooled_teacher)
    monkeypatch.setattr(pipelines.train, "create_encoder", pipelines.train.create_encoder)
    shrink_student()
    photos = photo_folder(tmp_path / "photos", 32)
    options = {"data": photos, "teacher": "pooled", "grid": 4, "shard_samples": 8, "device": "cpu", "workers": 1}
    local = extract(ExtractConfig(cache=tmp_path / "local.zarr", **options))

    def command(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["sami-cache", *arguments])
        return cli.main.app(standalone_mode=False) or 0

    with hostile_proxy(server, seed=SEED, share=0.1) as proxy:
        use_server(monkeypatch, proxy.server_port)
        assert extract(ExtractConfig(cache=remote, **options)).root == local.root
        assert command("verify", "--deep", "--audit", "4", "--cache", str(remote)) == 0
        reads, real = [], remote_file.read_copy

        def fails_late(*arguments):
            reads.append(arguments)
            if len(reads) < 30:
                return real(*arguments)
            proxy.share, proxy.faults = 1.0, ("busy",)  # the local copy has made way, and the store is gone
            return None

        again = training(remote, tmp_path / "run", 12, checkpoint_every=1)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(remote_file, "read_copy", fails_late)
            patch.setattr(objects, "PATIENCE", 1.0)
            with pytest.raises(StoreError, match=f"{remote}/.*did not answer in"):
                command(*again)
        assert 0 < load_newest(tmp_path / "run" / "checkpoints").step < 12
        proxy.share, proxy.faults = 0.1, FAULTS
        assert command(*again) == 0
        assert command(*training(tmp_path / "local.zarr", tmp_path / "run-local", 12, checkpoint_every=1)) == 0
        lines = [
            [untimed(json.loads(line)) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("run", "run-local")
        ]
        assert lines[0] == lines[1]
        name = Cache(remote).shard_files(2)[0]
        proxy.share = 0.0
        objects._store("s3", BUCKET, 20, os.getpid()).put((remote / name).key, b"something else")
        proxy.share = 0.1
        assert command("verify", "--cache", str(remote)) == 1
        with pytest.raises(SamiCacheError, match=f"{remote / name}: 14 bytes"):
            command(*training(remote, tmp_path / "another", 6))  # type: ignore[arg-type]
        assert command("verify", "--repair", "--cache", str(remote)) == 0
        assert Cache(remote).root() == Cache(tmp_path / "local.zarr").root()
        assert [size for place, size in sizes_below(remote).items() if place.startswith("quarantine/codes")] == [14]
        assert sum(proxy.met.values()) > 100
