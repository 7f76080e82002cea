"""Kills and failing disks at every system call that changes a cache, while it is extracted and while it is repaired.

The children run the real command line with a teacher that costs nothing; `injection` stops them at each call that writes,
flushes or names something in the folder of the cache. There the process group is killed before the call happens, or the call
fails with EIO or ENOSPC (once, or from then on), or the whole work is done by another process while the first one waits
("overtaken"). More runs have their process group killed at random moments. Afterwards the same command runs undisturbed.
Lost: a committed shard that is gone, moved, rewritten or does not verify. Recomputed: a shard computed although it was
committed. An exit after an error is clean with code 2 (3 for a full disk) and one message that gives the reason, or with
code 0 where the call that failed was to make a folder that was there.
"""

import errno
import json
import os
import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from injection import FREES, Outcome, run, unavailable
from photos import photo_folder
from quick_cli import command_line

from sami_cache.errors import DamageError
from sami_cache.store.cache import Cache
from sami_cache.store.files import digest, read_file
from sami_cache.store.integrity import verify_cache

SEED = 20261123
FAULTS = {
    "SIGKILL": ("kill", False),
    "EIO": (errno.EIO, False),
    "EIO that stays": (errno.EIO, True),
    "ENOSPC": (errno.ENOSPC, False),
    "ENOSPC that stays": (errno.ENOSPC, True),
}
OVERTAKEN, ANY_TIME = "overtaken", "SIGKILL at a random moment"
PROBLEMS = ("lost", "recomputed", "other root", "unclean exit")
CACHE = "new/cache.zarr"  # whose folder is made too
DAMAGED = 2


@dataclass(frozen=True)
class Trial:
    command: str
    """`extract` or `repair`."""
    fault: str
    at: int | None = None
    """The point; None: `after` so many seconds."""
    after: float | None = None


@dataclass
class Result:
    trial: Trial
    point: str = "none"
    exit_code: int | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Which of PROBLEMS, and what was seen."""


class Scene:
    """Photographs, the cache that an undisturbed run makes of them, a damaged copy, and the points of both commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.photos = folder, photo_folder(folder / "photos", 48)
        self.calm: dict[str, Outcome] = {}
        self._numbers = iter(range(1 << 30))
        reference = self.room("extract")
        self.calm["extract"] = self.run("extract", reference)
        assert self.calm["extract"].exit_code == 0, self.calm["extract"].stderr
        self.root = Cache(reference / CACHE).root()
        self.damaged = folder / "damaged.zarr"
        shutil.copytree(reference / CACHE, self.damaged)
        codes = self.damaged / Cache(self.damaged).shard_files(DAMAGED)[0]
        codes.write_bytes(codes.read_bytes()[:-1])
        (self.damaged / "ROOT.json").write_bytes(b"{}\n")
        self.calm["repair"] = self.run("repair", self.room("repair"))
        assert self.calm["repair"].exit_code == 0, self.calm["repair"].stderr

    def room(self, command: str) -> Path:
        """A fresh folder, watched as a whole, with what the command finds in it."""
        room = self.folder / f"room{next(self._numbers)}" / "watched"
        room.mkdir(parents=True)
        if command == "repair":
            shutil.copytree(self.damaged, room / CACHE)
        return room

    def run(self, command: str, room: Path, log: str = "log", **fault) -> Outcome:
        cache = ["--cache", str(room / CACHE), "--device", "cpu", "--workers", "1"]
        given = ["--data", str(self.photos), "--teacher", "efficientnet_lite0", "--grid", "4", "--shard-samples", "8"]
        arguments = ["extract", *cache, *given] if command == "extract" else ["verify", "--repair", *cache]
        return run(command_line, (arguments, str(room.parent / log)), watch=room, **fault)


@pytest.fixture(scope="module")
def scene(spawn, tmp_path_factory):
    if unavailable():
        pytest.skip(f"system calls cannot be watched here: {unavailable()}")
    return Scene(Path(os.path.realpath(tmp_path_factory.mktemp("kills"))))


def committed(path: Path) -> tuple[dict[int, dict[str, tuple]], list[str]]:
    """Inode, time and digest of the files of each committed shard, which never change again; and of which shards they lie."""
    found, lies = {}, []
    if not (path / "zarr.json").exists():
        return found, lies
    cache = Cache(path)
    for shard in cache.committed():
        try:
            record = cache.record(shard)
            files = {}
            for name in (f"commits/{shard:06d}.json", *record.files):
                stat, data = (path / name).lstat(), read_file(path / name)
                files[name] = (stat.st_ino, stat.st_mtime_ns, digest(data))
                if name in record.files and digest(data) != record.files[name].blake3:
                    raise DamageError(f"{name}: is not what its record says")
            if digest(cache.read_codes(shard).data.cast("B")) != record.content:
                raise DamageError(f"{shard}: its codes are not what its record says")
            found[shard] = files
        except (DamageError, FileNotFoundError) as error:
            lies.append(f"shard {shard}: {error}")
    return found, lies


def attempt(scene: Scene, trial: Trial) -> Result:
    room, result = scene.room(trial.command), Result(trial)
    path, before = room / CACHE, {}

    def note() -> None:
        before.update(committed(path)[0])

    def overtake() -> None:
        scene.run(trial.command, room, log="overtaker")
        note()

    if trial.fault == OVERTAKEN:
        outcome = scene.run(trial.command, room, at=trial.at, do=overtake)
    elif trial.at is None:
        outcome = scene.run(trial.command, room, after=trial.after)
    else:
        do, stays = FAULTS[trial.fault]
        outcome = scene.run(trial.command, room, at=trial.at, do=do, stays=stays, before=note)
    result.exit_code = outcome.exit_code
    if trial.at is not None:
        result.point = outcome.points[trial.at - 1] if len(outcome.points) >= trial.at else "none"
        assert result.point == scene.calm[trial.command].points[trial.at - 1], f"{trial}: another order of calls than calmly"
    if wrong := unclean(trial, result.point, outcome):
        result.problems.append(("unclean exit", f"{wrong}: {outcome.exit_code} {outcome.stderr[-800:]}"))

    after, lies = committed(path)
    result.problems += [("lost", lie) for lie in lies if trial.command == "extract" or f"shard {DAMAGED}:" not in lie]
    result.problems += compare("by the fault", before, after)
    again = scene.run(trial.command, room, log="again")
    if again.exit_code != 0:
        result.problems.append(("other root", f"the same command again: {again.exit_code} {again.stderr[-800:]}"))
    final, lies = committed(path)
    result.problems += [("lost", lie) for lie in lies] + compare("by the run after it", after, final)
    log = room.parent / "again"
    begun = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    result.problems += [("recomputed", f"shard {shard}") for shard, there in begun if there or shard in after]
    if not (path / "zarr.json").exists() or Cache(path).root() != scene.root:
        result.problems.append(("other root", "not the root of the calm run"))
    else:
        findings = verify_cache(path, level="deep").findings
        result.problems += [("other root", f"verify --deep: {finding.path}: {finding.what}") for finding in findings]
    if not result.problems:
        shutil.rmtree(room.parent)
    return result


def compare(when: str, before: dict, after: dict) -> list[tuple[str, str]]:
    return [("lost", f"shard {shard} {when}") for shard, files in before.items() if after.get(shard) != files]


def unclean(trial: Trial, point: str, outcome: Outcome) -> str | None:
    """What is wrong about how the disturbed run ended."""
    if outcome.hung or "Traceback" in outcome.stderr or "bug in sami-cache" in outcome.stderr:
        return "hung" if outcome.hung else "crashed"
    fault = FAULTS.get(trial.fault, (0,))[0]
    if not isinstance(fault, int) or fault == 0:
        expected = {OVERTAKEN: (0,), ANY_TIME: (0, -9)}.get(trial.fault, (-9,))
        return None if outcome.exit_code in expected else "unexpected exit code"
    if outcome.exit_code == 0 and point.startswith("mkdir"):
        return None  # of a folder that was there
    if outcome.exit_code != (3 if fault == errno.ENOSPC else 2):
        return "unexpected exit code"
    messages = [line for line in outcome.stderr.splitlines() if line.startswith("sami-cache: ")]
    reasons = (os.strerror(fault), "disk is full")
    said = [any(reason in line for reason in reasons) and "is not a cache" not in line for line in messages]
    return None if said == [True] else "not one message with the reason"


def attack(scene: Scene, trials: list[Trial]) -> list[Result]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda trial: attempt(scene, trial), trials))


def complaints(results: list[Result]) -> list[str]:
    return [f"{kind}: {r.trial} {r.point}: {what}" for r in results for kind, what in r.problems]


def possible(fault: str, point: str) -> bool:
    """A full disk does not refuse what frees space."""
    return "ENOSPC" not in fault or point.split(maxsplit=1)[0] not in FREES


def random_kills(scene: Scene, rng: random.Random, count: int) -> list[Trial]:
    return [Trial("extract", ANY_TIME, after=rng.uniform(0, 1) * scene.calm["extract"].seconds) for _ in range(count)]


def test_a_sample_of_the_points(scene):
    """Of every kind of call one point, each with another fault; four moments that matter; and two kills at random ones."""
    rng = random.Random(SEED)
    kinds: dict[str, list[int]] = {}
    points = scene.calm["extract"].points
    for number, point in enumerate(points, 1):
        kinds.setdefault(point.split()[0], []).append(number)
    assert {"write", "fsync", "link", "rename", "mkdir"} <= kinds.keys()
    record = next(number for number, point in enumerate(points, 1) if point.startswith("link") and "commits/000003" in point)
    faults = [*FAULTS, OVERTAKEN]
    trials = []
    for index, (kind, numbers) in enumerate(kinds.items()):
        fault = faults[index % len(faults)]
        trials.append(Trial("extract", fault if possible(fault, kind) else "EIO", rng.choice(numbers)))
    trials += [Trial("extract", "SIGKILL", record + 1), Trial("extract", OVERTAKEN, record)]
    trials += [Trial("extract", "SIGKILL", rng.randrange(3, kinds["rename"][0] // 2))]  # while the cache is made
    moves = [number for number, point in enumerate(scene.calm["repair"].points, 1) if point.startswith("rename")]
    trials += [Trial("repair", "SIGKILL", rng.choice(moves))]
    results = attack(scene, trials + random_kills(scene, rng, 2))
    assert not complaints(results), "\n".join(complaints(results))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_point(scene, campaign):
    rng = random.Random(SEED)
    trials = [
        Trial(command, fault, at)
        for command in ("extract", "repair")
        for fault in (*FAULTS, OVERTAKEN)
        if (command, fault) != ("repair", OVERTAKEN)  # two writers need no lock; two repairs at once are promised nowhere
        for at, point in enumerate(scene.calm[command].points, 1)
        if possible(fault, point)
    ]
    results = attack(scene, trials + random_kills(scene, rng, 130))
    publish(campaign, results)
    assert sum(struck(result) for result in results) >= 500
    assert not complaints(results), "\n".join(complaints(results))


def struck(result: Result) -> bool:
    """Whether the fault happened: a run may end before its random moment."""
    return result.trial.at is not None or result.exit_code == -9


def publish(campaign, results: list[Result]) -> None:
    hit = [result for result in results if struck(result)]
    figures: dict[str, object] = {"points": len(hit), "shards a cache": 6}
    for fault in (*FAULTS, OVERTAKEN, ANY_TIME):
        figures[f"points: {fault}"] = sum(result.trial.fault == fault for result in hit)
    for command in ("extract", "repair"):
        figures[f"points: in {command}"] = sum(result.trial.command == command for result in hit)
    for call, count in Counter(result.point.split()[0] for result in hit if result.trial.at).most_common():
        figures[f"points: at {call}"] = count
    for code, count in sorted(Counter(str(result.exit_code) for result in hit).items()):
        figures[f"exit code {code} of the disturbed run"] = count
    for kind in PROBLEMS:
        figures[f"points with: {kind}"] = sum(kind in dict(result.problems) for result in hit)
    campaign("kills", seed=SEED, figures=figures)
