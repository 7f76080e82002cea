"""The same samples served in shuffled order by our loader and by its peers, page cache warm and cold, with and without JPEGs.

    python benchmarks/loader.py --data DIR --work DIR [--peer-python PYTHON] [--out FILE]

`--data` is a folder of photographs; caches and the peers' files are made in `--work` (about 8 GB). Every contestant is a
process of its own, run by `--peer-python` (an environment with the peers; ours and the references always by this one). It is
tried in each way it can be read (layout on disk, order, threads or DataLoader workers), every way is checked sample by sample,
and the fastest takes turns with the others' for some rounds. What counts are ratios: medians over the rounds.

Peers that are not dependencies of sami-cache: pip install zarrs tensorstore h5py hdf5plugin lmdb webdataset litdata zstd
mosaicml-streaming pylance safetensors (LitData and MosaicML Streaming change torch: use another environment).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import loader_data
import loader_ours
from loader_contestants import OURS, PEERS, SHARED_FILES, STILL_CACHED
from loader_report import Entry, Section, page
from loader_samples import BATCH

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0))
STATES = ("warm", "cold")


class Child:
    """A contestant's process, which does one thing at a time and answers."""

    def __init__(self, name: str, python: str, log: Path, **where: Any) -> None:
        self.name, self.log = name, log
        path = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "LITDATA_DISABLE_VERSION_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self.given = json.dumps({"name": name, "cores": CORES, **{key: str(value) for key, value in where.items()}})
        self.python, self.environment = python, environment
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [self.python, str(HERE / "loader_child.py"), self.given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Raises RuntimeError with the contestant's own words."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or '{"error": "its process ended"}')
        except BrokenPipeError:
            answer = {"error": "its process ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.close()
            self.process.wait(20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure(kind: str, images: str, given: argparse.Namespace) -> list[Section]:
    """One cache, with or without images, in both states of the page cache."""
    cache, plain = loader_data.make_cache(
        kind, given.data, given.work, samples=given.samples, shard_samples=given.shard_samples, code_bytes=given.code_bytes
    )
    files = given.work / f"{kind}-{images}-peers"
    shutil.rmtree(files, ignore_errors=True)
    contestants = [OURS, *(PEERS if images != "pixels" else ())]
    references = {"warm": loader_ours.WARM[images], "cold": loader_ours.COLD[images]}
    sections, children = [], {}
    with ExitStack() as stack:
        for name in [*contestants, *references["warm"], *references["cold"]]:
            if given.only and name in contestants and name not in given.only:
                continue
            where = {"images": images, "plain": plain, "cache": cache, "folder": files / SHARED_FILES.get(name, name)}
            python = given.peer_python if name in PEERS else sys.executable
            children[name] = child = Child(name, python, given.work / "log.txt", **where)
            stack.callback(child.close)
        stack.callback(shutil.rmtree, files, ignore_errors=True)
        known: dict[str, Entry] = {}
        for name, child in children.items():
            known[name] = Entry(name)
            prepare(known[name], child)
        for state in STATES:
            if images == "pixels" and state == "cold":
                continue
            chosen = {name: child for name, child in children.items() if name in contestants or name in references[state]}
            entries = {name: Entry(name, problem=known[name].problem, checks=known[name].checks) for name in chosen}
            sections.append(Section(kind, images, state, entries))
            race(sections[-1], chosen, known, given)
    return sections


def prepare(entry: Entry, child: Child) -> None:
    """Write the contestant's files and check every way it is read in; `facts` and `tried` are kept by way."""
    try:
        if missing := child.ask("missing"):
            entry.problem = f"not installed: {', '.join(missing)}"
            return
        say(f"{child.name}: writing")
        entry.checks = child.ask("write").get("checks", "")
        ways = child.ask("ways")
    except RuntimeError as error:
        entry.problem = f"failed: {error}"
        return
    for way in ways:
        say(f"{child.name}: checking {way}")
        try:
            entry.facts[way] = child.ask("check", way=way)
        except RuntimeError as error:
            entry.tried[way] = f"failed: {error}"
    if not entry.facts:
        entry.problem = "; ".join(entry.tried.values())


def race(section: Section, children: dict[str, Child], known: dict[str, Entry], given: argparse.Namespace) -> None:
    """Try every way once, then let everybody's fastest take turns."""
    running = {}
    for name, entry in section.entries.items():
        entry.tried = dict(known[name].tried)
        speeds = {}
        for way in known[name].facts:
            say(f"{section.title()}: trying {name} {way}")
            try:
                speeds[way] = once(section.state, children[name], way, given.seconds / 2, 0)["speed"]
                entry.tried[way] = f"{speeds[way]:.0f}"
            except RuntimeError as error:
                entry.tried[way] = f"failed: {error}"
        if speeds:
            entry.way = max(speeds, key=lambda way: speeds[way])
            entry.facts = known[name].facts[entry.way]
            running[name] = entry
        entry.problem = entry.problem or ("" if speeds else "; ".join(entry.tried.values()))
    for number in range(given.rounds):
        say(f"{section.title()}: round {number + 1} of {given.rounds}")
        for name, entry in list(running.items()):
            try:
                entry.rounds.append(once(section.state, children[name], entry.way, given.seconds, 100 * number + 1))
            except RuntimeError as error:
                entry.problem, entry.rounds = f"failed in round {number + 1}: {error}", []
                del running[name]


def once(state: str, child: Child, way: str, seconds: float, seed: int) -> dict[str, float]:
    if state == "warm":
        return child.ask(state, way=way, seconds=seconds)
    try:
        return child.ask(state, way=way, seconds=seconds, seed=seed)
    except RuntimeError as error:
        if STILL_CACHED.partition(" ")[2] not in str(error):
            raise
        # A library keeps its memory maps: only a new process begins without them.
        child.close()
        child.start()
        return child.ask(state, way=way, seconds=seconds, seed=seed)


def without_places(words: list[str]) -> list[str]:
    """A command line with names in the place of this machine's paths."""
    named = {"--data": "DIR", "--work": "DIR", "--peer-python": "PYTHON", "--out": "FILE"}
    return [named.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def heading(given: argparse.Namespace, started: float) -> list[str]:
    peers = subprocess.run(
        [given.peer_python, "-c", "import torch, numpy; print(torch.__version__, numpy.__version__)"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    return [
        "# Loading: ours and its peers",
        "",
        f"Command: `{' '.join(['python', 'benchmarks/loader.py', *without_places(given.command)])}`. Hardware: {CORES} cores, "
        f"{platform.machine()}; Python {platform.python_version()}; torch and numpy of the peers: {' and '.join(peers)}. Date: "
        f"{time.strftime('%Y%m%d')}. Duration: {time.monotonic() - started:.0f} s.",
        "",
        f"{given.samples} samples in shards of {given.shard_samples}, batches of {BATCH}; medians of {given.rounds} "
        f"rounds of {given.seconds:g} s, all contestants in turn (smallest and largest in brackets). Everybody has {CORES} "
        f"cores: {CORES} threads in one process or {CORES} DataLoader workers. Warm: an endless stream after its first second, "
        "all files read before. Cold: whole epochs, the files dropped from the page cache once they are open and workers wait. "
        "CPU: user and system time of the process and its descendants, the consumer's share included. Memory: the largest "
        "proportional set size of these in one epoch, less what the process had before (anonymous and shared; in brackets "
        "mapped files, which the system takes back at will). Every sample served was once compared with what went in.",
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument(
        "--work", type=Path, required=True, help="where caches are kept for the next run, and peers' files made"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter of the peers' environment")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--shard-samples", type=int, default=512)
    parser.add_argument("--code-bytes", type=int, default=loader_data.CODE_BYTES, help="of a sample, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round (default %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(loader_data.KINDS), default=list(loader_data.KINDS))
    parser.add_argument("--images", nargs="+", choices=["none", "encoded", "pixels"], default=["none", "encoded", "pixels"])
    parser.add_argument("--only", nargs="+", choices=[OURS, *PEERS], help="these contestants; default: all")
    parser.add_argument("--out", type=Path, help="write the page to this file too, after every part")
    given = parser.parse_args(arguments)
    given.command = arguments if arguments is not None else sys.argv[1:]
    return given


def main(arguments: list[str] | None = None) -> list[Section]:
    given, started = parse(arguments), time.monotonic()
    given.work.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    # Pixels cost the same whatever the codes are: once will do.
    parts = [(kind, images) for kind in given.kinds for images in given.images if images != "pixels" or kind == given.kinds[0]]
    for kind, images in parts:
        sections += measure(kind, images, given)
        text = page(sections, heading(given, started))
        if given.out:
            given.out.write_text(text)
    print(text)
    return sections


if __name__ == "__main__":
    main()
