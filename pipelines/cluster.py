"""Extraction by several processes: Dask hands out the shards, the commit records say what is done.

A worker begins the extraction (checks, fits, creates, grows), so that the process the user started needs no GPU. Then there is
one task a missing shard. Whatever happens to a task, its shard is committed or it is not: a lost worker's shards are done by
others, and a task that comes too late finds the record and does nothing.
"""

import contextlib
import queue
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.cluster_processes import THREADS, ClusterConfig, Connection, connect, parse_devices
from pipelines.cluster_worker import RefusedError, Run, begin_run, extract_shard, stop_run
from pipelines.extract import Summary, extract, finish, missing_shards
from pipelines.jobs import ExtractConfig, Progress, how_to_go_on
from pipelines.tally import Committed, Tally
from sami_cache.errors import SamiCacheError
from sami_cache.processes import StopSignal
from sami_cache.store.cache import Cache
from sami_cache.store.places import AnyPath

TRIES = 3
"""Times that a shard is handed out: again where Dask gives up on it, because workers die, and where one fails."""


def extract_on(
    workers: ClusterConfig, config: ExtractConfig, on_progress: Callable[[Progress], None] = lambda _: None
) -> Summary:
    """`extract` by the workers named; the cache is the same. Where that is one device of this machine, this process does it.

    Raises what `extract` raises, and SamiCacheError naming the shard whose workers die or fail again and again.
    """
    if workers.devices is not None and len(found := parse_devices(workers.devices)) == 1:
        return extract(replace(config, device=found[0]), on_progress)
    started = time.perf_counter()
    with StopSignal(lambda: how_to_go_on(config.cache), config.grace) as stop, connect(workers) as connection:
        run = Run(name=f"sami-cache-{secrets.token_hex(4)}", host=socket.gethostname(), config=_absolute(config))
        path, grown = _begin(connection, run, on_progress)
        cache = Cache(path)
        missing = missing_shards(cache)
        run = replace(run, config=replace(run.config, cache=path, codec_from=None), cache_id=cache.cache_id)
        commits = _Shards(connection, run, cache, missing, on_progress, stop).extract() if missing else []
        return finish(config.cache, cache, commits, grown, started, on_progress)


def _absolute(config: ExtractConfig) -> ExtractConfig:
    """The settings with paths that mean the same to a process with another current folder."""
    paths: dict[str, Any] = {"data": config.data.absolute(), "cache": config.cache.absolute()}
    if config.codec_from is not None:
        paths["codec_from"] = config.codec_from.absolute()
    if config.weights is not None and Path(config.weights).exists():
        paths["weights"] = str(Path(config.weights).absolute())
    return replace(config, **paths)


def _begin(connection: Connection, run: Run, on_progress: Callable[[Progress], None]) -> tuple[AnyPath, int]:
    """The path of the cache that shards are missing of, made by a worker, and how many samples it did on the way."""
    client = connection.client
    connection.keep_up()
    on_progress(Progress(stage="wait", note=connection.note))
    client.subscribe_topic(run.name, lambda event: on_progress(Progress(**event[1]["progress"])))
    future = client.submit(begin_run, run, key=(f"begin-{run.name}", 0), pure=False)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    future.add_done_callback(done.put)
    try:
        while True:
            connection.keep_up()
            with contextlib.suppress(queue.Empty):
                done.get(timeout=1)
                break
        error = _error(future)
        if error is None:
            return future.result()
        raise error if isinstance(error, SamiCacheError) else SamiCacheError(f"no worker could begin: {error}") from error
    finally:
        client.unsubscribe_topic(run.name)


class _Shards:
    """The shards of one run, handed out and waited for."""

    def __init__(
        self,
        connection: Connection,
        run: Run,
        cache: Cache,
        missing: list[int],
        on_progress: Callable[[Progress], None],
        stop: StopSignal,
    ):
        self.connection, self.client, self.run, self.cache, self.stop = connection, connection.client, run, cache, stop
        self.missing, self.tries = missing, Counter[int]()
        self.tally = Tally(cache, missing, on_progress)
        self.say = on_progress
        self.pending: dict[Any, Any] = {}
        self.done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._looked = 0.0

    def extract(self) -> list[Committed]:
        name = f"shard-{self.run.name}"
        keys = [(name, shard) for shard in self.missing]
        futures = self.client.map(extract_shard, self.missing, run=self.run, key=keys, pure=False)
        self.pending = {future.key: future for future in futures}
        self.stop.holding = True
        for future in futures:
            future.add_done_callback(self.done.put)
        while self.pending:
            with contextlib.suppress(queue.Empty):
                self._settle(self.done.get(timeout=0.5))
            self._look_after()
        self.stop.check()
        self.stop.holding = False
        del futures  # not before: what is let go of vanishes from the dashboard
        return self.tally.commits

    def _settle(self, future: Any) -> None:
        """Count what was committed; see what can be done about an error."""
        if self.pending.pop(future.key, None) is None:
            return
        error = _error(future)
        if error is None:
            committed = future.result()
            if committed is not None:
                self.tally.add(committed)
                self.tally.check_room(THREADS * self.workers() * self.cache.layout.shard_samples)
            return
        if isinstance(error, RefusedError):
            self._leave_out(error)
        elif isinstance(error, SamiCacheError):
            raise error
        else:
            self._try_again(future.key[1], error)
        self.client.retry([future])
        self.pending[future.key] = future
        future.add_done_callback(self.done.put)

    def _leave_out(self, refused: RefusedError) -> None:
        """Go on without a worker that sees something else, if there are others."""
        if self.client.nthreads(workers=[refused.worker]).get(refused.worker):
            self.client.retire_workers([refused.worker], close_workers=True)
            self.tell(f"left out: {refused}")
        if not self.workers():
            raise refused

    def _try_again(self, shard: int, error: BaseException) -> None:
        """After the deaths of workers, or after an error that is none of ours: a device may be out of order."""
        from distributed.scheduler import KilledWorker

        if self.client.status != "running":
            raise SamiCacheError(f"the scheduler is gone. {how_to_go_on(self.cache.path)}")
        self.tries[shard] += 1
        numbers = self.cache.shard_samples(shard)
        which = f"shard {shard} (samples {numbers.start} to {numbers.stop - 1})"
        if isinstance(error, KilledWorker):
            what = f"{which} was in hand whenever a worker died, {error.allowed_failures + 1} times"
        else:
            what = f"{which} failed with {type(error).__name__}: {error}"
        if self.tries[shard] >= TRIES:
            raise SamiCacheError(
                f"{what}, and so each of the {TRIES} times that it was handed out. The logs of the workers say more. "
                f"{self.tally.progress.done} of {self.tally.progress.total} samples are committed; the same command goes on."
            )
        self.tell(f"{what}; handed out again")

    def _look_after(self) -> None:
        """Every second: how many workers there are, whether those that are lost come back, and whether to stop."""
        if time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        if self.stop.number:
            self._stop()
            return
        self.connection.keep_up()
        self.tally.progress.workers = self.workers()
        self.tally.show()

    def _stop(self) -> None:
        """Take back what no worker has begun; have workers finish what they can."""
        self.client.run(stop_run, self.run.name, self.stop.seconds_left(), on_error="ignore")
        begun = {key for keys in self.client.processing().values() for key in keys}
        waiting = [future for key, future in self.pending.items() if key not in begun and not future.done()]
        self.client.cancel(waiting)
        for future in waiting:
            del self.pending[future.key]
        self.tally.show("stop")

    def workers(self) -> int:
        return len(self.client.nthreads())

    def tell(self, note: str) -> None:
        self.say(replace(self.tally.progress, note=note))


def _error(future: Any) -> BaseException | None:
    """What a task that is done raised, or why it will not be done."""
    if future.cancelled():
        return SamiCacheError("the scheduler has let go of this run, or is gone; run the same command again to go on")
    return future.exception()
