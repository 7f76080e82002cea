"""Caches in an object store, against moto's S3 server; a hostile network is in faults/test_object_store.py."""

import contextlib
import http.client
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import embeddings_of, fill_all, fill_shard, full_cache, keys_of, make_samples, new_cache, teacher_like, tree
from object_server import BUCKET, hostile_proxy, s3_server, use_server
from typer.testing import CliRunner

from cli.main import app
from pipelines.joining import merge, subset
from sami_cache.errors import DamageError, IdentityError, SamiCacheError, StoreError
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.samples import CacheSamples
from sami_cache.store import creation, local_copies, objects
from sami_cache.store.cache import Cache
from sami_cache.store.files import make_hold, move_aside, publish, read_file, sizes_below
from sami_cache.store.integrity import verify_cache
from sami_cache.store.local_copies import LocalCopies
from sami_cache.store.places import RemotePath, parse_place
from sami_cache.store.repair import quarantine_shard, restore_static
from sami_cache.store.writing import seal_cache, write_shard


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def remote(server: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RemotePath:
    """A prefix of its own for each test; local copies and patience are the test's too."""
    use_server(monkeypatch, server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(objects, "PATIENCE", 20.0)
    return RemotePath("s3", BUCKET, f"some where/{tmp_path.name}/cache.zarr")


def stored(path: RemotePath) -> dict[str, bytes]:
    return {name: read_file(path / name) for name in sizes_below(path)}


def overwrite(path: RemotePath, data: bytes) -> None:
    """What no command of ours does."""
    objects._store(path.scheme, path.bucket, 20, objects.os.getpid()).put(path.key, data)


def erase(path: RemotePath) -> None:
    objects._store(path.scheme, path.bucket, 20, objects.os.getpid()).delete(path.key)


def test_the_servers_conditions_are_those_of_s3(server: int) -> None:
    def put(data: bytes, **conditions: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server)
        headers = {name.replace("_", "-"): value for name, value in conditions.items()}
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20261129/us-east-1/s3/aws4_request"}
        connection.request("PUT", f"/{BUCKET}/conditions", data, headers | signed)
        answer = connection.getresponse()
        tags.append(answer.getheader("ETag") or "")
        return answer.status

    tags: list[str] = []
    assert [put(b"1", If_None_Match="*"), put(b"2", If_None_Match="*")] == [200, 412]
    assert [put(b"3", If_Match=tags[0]), put(b"4", If_Match=tags[0])] == [200, 412]


def test_a_place_is_a_url() -> None:
    place = parse_place("s3://bucket/a//b/")
    assert isinstance(place, RemotePath)
    assert str(place / "codes" / "3.0.0.0") == str(place / "codes/3.0.0.0") == "s3://bucket/a/b/codes/3.0.0.0"
    assert ((place / "x").name, (place / "x").parent) == ("x", place)
    assert str(RemotePath("gs", "bucket")) == "gs://bucket"
    assert pickle.loads(pickle.dumps(place)) == place == place.resolve()
    assert hash(place) == hash(parse_place("s3://bucket/a/b"))
    assert parse_place("a/b") == parse_place(Path("a/b")) == Path("a/b")
    for wrong, text in {
        "memory://x/y": r"memory://x/y: caches lie in folders, or at s3://, gs:// or az://BUCKET/PREFIX",
        "s3://": r"s3://: expected s3://BUCKET/PREFIX",
        "s3://b/../c": r"s3://b/\.\./c: expected s3://BUCKET/PREFIX, without parts that are \. or \.\.",
    }.items():
        with pytest.raises(SamiCacheError, match=text):
            parse_place(wrong)


def test_without_the_library_the_extra_is_named(remote: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    objects._library.cache_clear()
    objects._store.cache_clear()
    try:
        with pytest.raises(SamiCacheError, match=r"the extra `objects`: pip install 'sami-cache\[objects\]'"):
            Cache(remote)
    finally:
        objects._library.cache_clear()


def test_the_cache_is_the_one_that_a_folder_would_hold(remote: RemotePath, tmp_path: Path) -> None:
    """Byte by byte, so that copying it in either direction needs no tool of ours."""
    local, there = full_cache(tmp_path / "c.zarr"), full_cache(remote)
    assert stored(remote) == tree(local.path)
    assert there.root() == local.root() == Cache(str(remote)).root()
    report = verify_cache(remote, level="deep", expected_root=local.root()["root"])
    assert (report.findings, report.notes) == ([], [])
    assert there.size_on_disk() == local.size_on_disk()
    assert there.committed() == [0, 1, 2]
    np.testing.assert_array_equal(there.read_embedding(17), local.read_embedding(17))
    assert there.read_jpegs(2) == local.read_jpegs(2)


def test_the_first_record_wins(remote: RemotePath) -> None:
    cache = new_cache(remote)
    assert fill_shard(cache, 0).won
    before = stored(remote)
    again = fill_shard(Cache(remote), 0)
    assert (again.won, again.same) == (False, True)
    other = write_shard(Cache(remote), 0, teacher_like(16, seed=9), make_samples(keys_of(cache, 0)), [b"other"] * 16)
    assert (other.won, other.same, other.record) == (False, False, again.record)
    assert stored(remote) == before


@pytest.mark.parametrize("left", ["whole", "other embeddings", "no shard"])
def test_what_a_killed_writer_left_is_adopted_or_makes_way(remote: RemotePath, tmp_path: Path, left: str) -> None:
    cache, other = new_cache(remote), new_cache(tmp_path / "other.zarr")
    fill_shard(cache, 0)
    there, name = stored(remote), cache.shard_files(0)[0]
    erase(cache.record_path(0))
    if left != "whole":
        write_shard(other, 0, teacher_like(16, seed=9), make_samples(keys_of(cache, 0)), [b"other"] * 16)
        overwrite(remote / name, there[name][:-9] if left == "no shard" else read_file(other.path / name))
    found = read_file(remote / name)
    assert fill_shard(Cache(remote), 0).won
    assert {name: data for name, data in stored(remote).items() if name in there} == there
    assert list(stored(remote / "quarantine").values()) == ([] if left == "whole" else [found])


def test_writers_that_disagree_leave_one_writers_bytes(remote: RemotePath) -> None:
    new_cache(remote)
    start = threading.Barrier(4)
    found = []

    def write(number: int) -> None:
        cache = Cache(remote)
        shaken = np.random.default_rng(number).normal(size=embeddings_of(cache, 0).shape) * 0.1 * cache.codec.step[0]
        jpegs = [f"{number} of {key}".encode() for key in keys_of(cache, 0)]
        samples, mine = make_samples(keys_of(cache, 0)), embeddings_of(cache, 0) + shaken.astype(np.float32)
        start.wait()
        found.append(write_shard(cache, 0, mine, samples, jpegs))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(commit.won for commit in found) == [False, False, False, True]
    assert len({commit.record.digest for commit in found}) == 1
    cache = Cache(remote)
    assert len({jpeg[:1] for jpeg in cache.read_jpegs(0) if jpeg}) == 1
    fill_shard(cache, 1)
    fill_shard(cache, 2)
    seal_cache(cache)
    assert verify_cache(remote, level="deep").findings == []


def test_a_creation_that_was_killed_is_finished_by_the_next(remote: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the codec of the first, even where the second has fitted another."""
    real, calls = make_hold, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(creation, "make_hold", killed)
        with pytest.raises(KeyboardInterrupt):
            new_cache(remote)
    left = stored(remote)
    assert {"spare.tar", "basis/0.0"} <= left.keys()
    assert "zarr.json" not in left
    with pytest.raises(SamiCacheError, match="there is no cache here"):
        Cache(remote)
    with pytest.raises(IdentityError, match="grid"):  # the first one's settings count, and the cache is whole now
        new_cache(remote, error=0.02, grid=4)
    assert {name: data for name, data in stored(remote).items() if name in left} == left
    cache = new_cache(remote)
    fill_all(cache)
    seal_cache(cache)
    assert verify_cache(remote).findings == []


def test_where_other_objects_are_no_cache_is_made(remote: RemotePath) -> None:
    overwrite(remote / "notes.txt", b"of somebody")
    with pytest.raises(SamiCacheError, match="objects are there that are no cache"):
        new_cache(remote)
    assert stored(remote) == {"notes.txt": b"of somebody"}


def test_of_two_creators_the_first_decides(remote: RemotePath) -> None:
    first = new_cache(remote)
    second = new_cache(remote, samples=40, shard_samples=32)  # another layout, which is no setting
    assert second.layout == first.layout
    with pytest.raises(IdentityError, match="precision: the cache has 'float32', you ask for 'bfloat16'"):
        new_cache(remote, precision="bfloat16")


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("kind", ["flipped", "cut", "gone"])
def test_damage_is_found_named_and_mended_to_the_same_root(remote: RemotePath, kind: str) -> None:
    cache = full_cache(remote)
    before, root = stored(remote), cache.root()
    static = ["basis/0.0", "zarr.json", "spare.tar"]
    for name in [*cache.shard_files(1), cache.record_name(2), *static, "manifest.parquet", "ROOT.json"]:
        if kind == "gone":
            erase(remote / name)
        else:
            overwrite(remote / name, flipped(before[name]) if kind == "flipped" else before[name][:-1])
        report = verify_cache(remote)
        assert name in {finding.path for finding in report.findings}
        if name in static:
            restore_static(remote)
        for shard in report.damaged_shards:
            quarantine_shard(Cache(remote), shard)
            fill_shard(Cache(remote), shard, bad=(3,) if shard == 1 else ())
        seal_cache(Cache(remote))
    assert verify_cache(remote, level="deep").findings == []
    assert {name: data for name, data in stored(remote).items() if not name.startswith("quarantine/")} == before
    assert Cache(remote).root() == root


def test_a_put_knows_itself_again_and_nothing_is_overwritten(
    remote: RemotePath, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every answer lost once, and every request sent twice, what we made is ours, and what others made is not."""
    for fault in ("answer lost", "twice", "late"):
        with hostile_proxy(server, seed=3, share=0.5, faults=(fault,)) as proxy:
            use_server(monkeypatch, proxy.server_port)
            assert all(publish(remote / f"{fault} {number}", b"mine", remote) for number in range(6))
            path = remote / fault
            assert publish(path, b"mine", remote)
            assert not publish(path, b"mine", remote)
            assert not publish(path, b"other", remote)
            assert read_file(path) == b"mine"
            moved = make_hold(path, b"other", remote)
            assert moved is not None
            assert [read_file(place) for place in moved] == [b"mine"]
            assert make_hold(path, b"other", remote) is None
            aside = move_aside(path, remote / "quarantine")
            assert read_file(aside) == b"other"
            with pytest.raises(FileNotFoundError):
                move_aside(path, remote / "quarantine")
            with pytest.raises(DamageError, match="missing"):
                read_file(path)
            assert proxy.met[fault] > 3


def test_an_object_is_replaced_only_as_the_version_that_was_seen(remote: RemotePath) -> None:
    path = remote / "x"
    overwrite(path, b"first")
    _, seen = objects.head(path)
    overwrite(path, b"second")
    assert not objects.put(path, b"third", seen)
    assert read_file(path) == b"second"
    assert objects.put(path, b"third", objects.head(path)[1])
    erase(path)
    assert not objects.put(path, b"fourth", seen)


def test_a_signal_interrupts_a_request_that_is_not_answered(remote: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_server(monkeypatch, silent.getsockname()[1])
        monkeypatch.setattr(objects, "READ_SECONDS", 4)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have us ignore it
        threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                Cache(remote)
        finally:
            signal.signal(signal.SIGINT, before)
        assert objects._in_flight, "the request came first to its end"
        while objects._in_flight:
            time.sleep(0.05)


def test_large_objects_come_in_pieces_of_one_version(remote: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PIECE", 1000)
    old, new = b"1" * 2500, b"2" * 2500
    overwrite(remote / "x", old)
    assert read_file(remote / "x") == old
    with pytest.raises(DamageError, match="2500 bytes, at most 2499 expected"):
        read_file(remote / "x", at_most=2499)
    real = objects._range

    def replaced(path, start, *rest):
        if start == 1000:
            overwrite(remote / "x", new)
        return real(path, start, *rest)

    monkeypatch.setattr(objects, "_range", replaced)
    assert read_file(remote / "x") == new
    overwrite(remote / "empty", b"")
    assert read_file(remote / "empty") == b""


def test_a_store_that_is_silent_or_refuses_is_an_error_and_no_damage(
    remote: RemotePath, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = full_cache(remote)
    monkeypatch.setattr(objects, "PATIENCE", 0.3)
    with hostile_proxy(server, seed=1, share=1.0, faults=("busy",)) as proxy:
        use_server(monkeypatch, proxy.server_port)
        for ask in (
            lambda: Cache(remote),
            lambda: verify_cache(remote),
            lambda: fill_shard(cache, 0),
            lambda: new_cache(remote / "b"),
        ):
            with pytest.raises(
                StoreError, match=r"s3://.*: the object store did not answer in \d+ s and \d+ attempts at .* 503 .*goes on"
            ):
                ask()
        assert proxy.met["busy"] > 8
    with pytest.raises(StoreError, match="did not answer"):
        Cache(remote)  # there is nobody at that port now
    use_server(monkeypatch, server)
    with pytest.raises(StoreError, match="NoSuchBucket"):
        Cache("s3://another/c.zarr")
    with pytest.raises(StoreError, match="there is no bucket 'another'"):
        publish(RemotePath("s3", "another", "x"), b"", remote)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    objects._store.cache_clear()
    with pytest.raises(StoreError, match="needs AWS_ALLOW_HTTP=true"):
        Cache(remote)


# Training


def batches(cache: Cache, count: int = 12, **changes) -> list[tuple[list[str], np.ndarray | None, list[bytes] | None]]:
    samples = CacheSamples(cache)
    config = {"batch_size": 4, "images": "encoded", "open_shards": 2, "threads": 4} | changes
    with_all = Loader(samples, samples.usable, LoaderConfig(**config)).batches()
    taken = [
        (batch.keys, None if batch.codes is None else batch.codes.numpy(), batch.encoded)
        for batch, _ in zip(with_all, range(count), strict=False)
    ]
    with_all.close()  # type: ignore[attr-defined]
    return taken


def same(a: list, b: list) -> None:
    for (keys_a, codes_a, encoded_a), (keys_b, codes_b, encoded_b) in zip(a, b, strict=True):
        assert (keys_a, encoded_a) == (keys_b, encoded_b)
        np.testing.assert_array_equal(codes_a, codes_b)


def size_if_there(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # a part that has just been given its name
        return path.stat().st_size
    return 0


def test_a_training_reads_the_same_through_a_bounded_folder_of_local_copies(
    remote: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, there = full_cache(tmp_path / "c.zarr", samples=128), full_cache(remote, samples=128)
    largest = max(there.record(shard).files[name].size for shard in range(there.shards) for name in there.shard_files(shard))
    copies = LocalCopies(tmp_path / "copies", 9 * largest)  # of 16 files
    seen, real = [], LocalCopies._make_room

    def watched(self, *args):
        made = real(self, *args)
        with local_copies._locked(copies.folder / local_copies._LOCK):  # or copies would make way while they are counted
            # A part that gets its name meanwhile may be met twice.
            sizes = {file.name.removesuffix(local_copies._PART): size_if_there(file) for file in copies.folder.iterdir()}
            seen.append(sum(sizes.values()))
        return made

    monkeypatch.setattr(LocalCopies, "_make_room", watched)
    there.path = RemotePath(remote.scheme, remote.bucket, remote.key, copies)
    same(batches(there, 90, open_shards=1), batches(local, 90, open_shards=1))
    assert len(seen) > 16, "some were needed again after they had made way"
    assert max(seen) <= 9 * largest
    left = [path for path in copies.folder.iterdir() if path.name != "lock"]
    assert all(path.stat().st_size == int(path.name.rpartition("-")[2]) for path in left)


def test_local_copies_are_checked_shared_and_fetched_again(
    remote: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = full_cache(remote)
    name = cache.shard_files(0)[0]
    entry = cache.record(0).files[name]
    copies, whole = LocalCopies(tmp_path / "copies"), read_file(remote / name)
    asked = []
    real = objects.pieces
    monkeypatch.setattr(objects, "pieces", lambda path: asked.append(path) or real(path))
    threads = [threading.Thread(target=copies.fetch, args=(remote / name, entry.size, entry.xxh3_128)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place = copies.fetch(remote / name, entry.size, entry.xxh3_128)
    assert place is not None
    assert (place.read_bytes(), len(asked)) == (whole, 1)
    for damaged in (flipped(whole), whole[:-3], b""):
        place.write_bytes(damaged)
        assert copies.fetch(remote / name, entry.size, entry.xxh3_128) == place
        assert place.read_bytes() == whole
    assert len(asked) == 4
    place.unlink()
    overwrite(remote / name, flipped(whole))
    with pytest.raises(DamageError, match=f"{remote / name}: {entry.size} bytes of XXH3 .* came, its commit record says"):
        copies.fetch(remote / name, entry.size, entry.xxh3_128)
    assert {path.name for path in copies.folder.iterdir()} == {"lock"}
    overwrite(remote / name, whole)
    assert copies.fetch(remote / name, entry.size, entry.xxh3_128) == place
    assert {path.name for path in copies.folder.iterdir()} == {place.name, "lock"}
    assert LocalCopies(tmp_path / "small", entry.size - 1).fetch(remote / name, entry.size, entry.xxh3_128) is None


def test_a_process_that_died_while_fetching_leaves_nothing_that_counts(remote: RemotePath, tmp_path: Path) -> None:
    cache = full_cache(remote)
    (name, *_), size = cache.shard_files(0), cache.record(0).files[cache.shard_files(0)[0]].size
    copies = LocalCopies(tmp_path, size + 10)
    (tmp_path / "dead-1000.part").write_bytes(b"x" * 1000)
    place = copies.fetch(remote / name, size, cache.record(0).files[name].xxh3_128)
    assert place is not None
    assert {path.name for path in tmp_path.iterdir()} == {place.name, "lock"}


@pytest.mark.parametrize("kind", ["flipped", "cut", "gone", "another"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_training_refuses_wrong_bytes(remote: RemotePath, kind: str, which: int) -> None:
    cache = full_cache(remote)
    path = remote / cache.shard_files(1)[which]
    data = read_file(path)
    if kind == "gone":
        erase(path)
    else:
        changed = {"flipped": flipped(data), "cut": data[:-1], "another": read_file(remote / cache.shard_files(0)[which])}
        overwrite(path, changed[kind])
    for wanted in ({}, {"batch_size": 1}):
        with pytest.raises(DamageError, match=str(path)):
            batches(cache, 39, **wanted)


def test_few_samples_of_a_shard_are_read_by_ranges(remote: RemotePath, tmp_path: Path) -> None:
    cache = full_cache(remote)
    samples = CacheSamples(cache)
    chosen = np.isin(np.arange(40), [2, 18, 33])
    loader = Loader(samples, chosen, LoaderConfig(batch_size=1, images="encoded", threads=2))
    assert sorted(batch.keys[0] for batch in loader.evaluation(1)) == [samples.keys[number] for number in (2, 18, 33)]
    assert not (tmp_path / "user-cache").exists()


def test_local_copies_that_three_windows_do_not_fit_into_are_refused(remote: RemotePath, tmp_path: Path) -> None:
    cache = full_cache(remote)
    arguments = [
        "train",
        "--cache",
        str(remote),
        "--run",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--shard-cache-size",
        "1KB",
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SamiCacheError)
    text = str(result.exception)
    assert text.startswith("--shard-cache-size: 0.0 MB for local copies in ")
    assert "but 3 shards of up to 0.0 MB are in use at a time, three windows. Give at least" in text
    for size, text in {
        "50 apples": "expected a number of bytes, such as 800MB or 50GB",
        "-1GB": "expected a number of bytes",
    }.items():
        result = CliRunner().invoke(app, [*arguments[:-1], size])
        assert text in str(result.exception)
    assert cache.shards == 3


# The command line


def test_commands_take_urls(remote: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = full_cache(remote).root()
    full_cache(tmp_path / "c.zarr")
    verified = CliRunner().invoke(app, ["verify", "--deep", "--cache", str(remote)])
    assert (verified.exit_code, f"{remote}: clean (40 samples in 3 shards" in verified.output) == (0, True), verified.output
    assert root is not None
    assert root["root"] in verified.output
    monkeypatch.setenv("SAMI_CACHE", str(remote))
    assert CliRunner().invoke(app, ["verify", "--quick"]).output.count(str(remote)) == 1
    assert CliRunner().invoke(app, ["diff", str(remote), str(tmp_path / "c.zarr")]).output == "the same: equal roots.\n"
    assert "sealed" in CliRunner().invoke(app, ["inspect", "--json"]).output


def test_what_needs_links_is_refused(remote: RemotePath, tmp_path: Path) -> None:
    full_cache(remote)
    full_cache(tmp_path / "c.zarr")
    expected = r"s3://.*: to join caches links files, which an object store cannot. Copy the cache to a local disk first"
    for call in (
        lambda: merge([tmp_path / "c.zarr", remote], tmp_path / "both.zarr"),  # type: ignore[list-item]
        lambda: merge([tmp_path / "c.zarr"], remote / "both.zarr"),  # type: ignore[arg-type]
        lambda: subset(remote, tmp_path / "some.zarr", count=3),  # type: ignore[arg-type]
    ):
        with pytest.raises(SamiCacheError, match=expected):
            call()
