"""What benchmarks/cluster.py makes of what its workers wrote down, and what it says was to be expected."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import load


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    folder = request.config.rootpath / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    return load(folder, "cluster")


@pytest.mark.parametrize("deaths", [0.05, 0.2, 1.0])
def test_the_expected_loss_is_that_of_many_shards_begun_anew(script, deaths: float) -> None:
    """Deaths at a rate, a shard begun anew after each, drawn until all are done."""
    rng, sleep, shards = np.random.default_rng(0), 3.0, 4000
    shares, slept = [], 0.0
    for _ in range(200):
        left, lost, slept = shards, 0.0, shards * sleep
        while left:
            waits = rng.exponential(sleep / deaths, left)
            died = waits[waits < sleep]
            left, lost, slept = len(died), lost + died.sum(), slept + died.sum()
        shares.append(lost / slept)
    share, deviation = script.expected_loss(deaths, slept, sleep)
    assert np.mean(shares) == pytest.approx(share, rel=0.03)
    # The deviation is that of small rates: of the sum alone, which is also a part of the whole.
    assert np.std(shares) == pytest.approx(deviation, rel=0.2 if deaths < 0.5 else 0.6)


def test_without_deaths_nothing_is_expected_to_be_lost(script) -> None:
    assert script.expected_loss(0.0, 100.0, 5.0) == (0.0, 0.0)


def test_what_was_slept_for_nothing_is_counted(script, tmp_path: Path) -> None:
    done = {"pid": 1, "shard": 0, "start": 100.0, "slept": 5.0}
    killed = {"pid": 2, "shard": 1, "start": 100.0}
    taken_for_dead = {"pid": 3, "shard": 2, "start": 100.0}
    for number, line in enumerate((done, killed, taken_for_dead)):
        (tmp_path / str(number)).write_text(json.dumps(line))
    (tmp_path / "torn").write_text('{"pid": 4, "sha')
    lines = {line["pid"]: line for line in script.read_log(tmp_path, {2: 103.5}, 5.0)}
    assert {pid: line["slept"] for pid, line in lines.items()} == {1: 5.0, 2: 3.5, 3: 5.0}
    assert [pid for pid, line in lines.items() if line["done"]] == [1]
    assert [pid for pid, line in lines.items() if line.get("given_up")] == [3]


def test_work_is_left_until_the_last_shard_is_handed_out(script) -> None:
    """Two workers, four shards of 5 s; one worker dies 2 s into its second, which is begun anew at once."""
    times = [(0, 0.0, 5.0), (1, 0.0, 5.0), (2, 5.0, 2.0), (2, 7.0, 5.0), (3, 5.0, 5.0)]
    lines = [{"shard": shard, "start": start, "slept": slept, "done": slept == 5.0} for shard, start, slept in times]
    assert script.busy(lines, 2, 0.0) == 1.0
    # A fifth shard, handed out at 10: until then 5 + 5 + 3 + 5 of 20 seconds were of use.
    lines.append({"shard": 4, "start": 10.0, "slept": 5.0, "done": True})
    assert script.busy(lines, 2, 0.0) == pytest.approx(18 / 20)
