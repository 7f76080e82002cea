"""docs/scale.md holds what benchmarks/plan_scale.py computes, and that is right where it can be known otherwise."""

from pathlib import Path

import pytest
from conftest import full_cache
from test_benchmarks import load


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest):
    return load(request.config.rootpath / "benchmarks", "plan_scale")


def test_the_page_holds_what_the_script_computes(script) -> None:
    page = script.PAGE.read_text()
    assert script.filled(page) == page, "run `python benchmarks/plan_scale.py --write`"


def test_a_figure_that_is_not_there_once_is_refused(script) -> None:
    for pattern in (r"(\d+) bits of nothing", r"(\d+)"):
        with pytest.raises(ValueError, match=r"docs/codec\.md: .* expected one figure"):
            script.figure("docs/codec.md", pattern)


def test_a_page_without_a_marker_is_refused(script) -> None:
    with pytest.raises(ValueError, match="end of space"):
        script.filled(script.PAGE.read_text().replace("<!-- end of space -->", ""))


def test_files_are_those_of_a_cache(script, tmp_path: Path) -> None:
    cache = full_cache(tmp_path / "c.zarr")
    there = [path for path in cache.path.rglob("*") if path.is_file() and path.parent.name != "tmp"]
    assert script.files(cache.shards) == len(there)


def test_a_sample_takes_its_bits_and_the_rest(script) -> None:
    assert script.code_bytes(16) == 2 * 256 * 32 * 32
    rest = script.sample_bytes(8) - 256 * 32 * 32
    assert 1e3 * script.measured("jpeg") + script.measured("records") < rest < 1e3 * script.measured("jpeg") + 500


def test_the_teachers_cost_is_the_published_one(script) -> None:
    """2.97e12 at 1024 px; counters differ in what they make of the relative positions."""
    assert script.multiplications(1024) == pytest.approx(2.97e12, rel=0.005)


@pytest.mark.parametrize(
    ("extraction", "online", "late"), [(1.0, 1.0, 0.0), (3.0, 0.13, 0.0), (3.0, 0.13, 0.02), (0.5, 0.9, 0.1)]
)
def test_break_even_is_where_the_sums_cross(script, extraction: float, online: float, late: float) -> None:
    step, epoch = 0.01, 1
    while extraction + epoch * (step + late) > epoch * (step + online):
        epoch += 1
    assert epoch - 1 < script.break_even(extraction, online, late) <= epoch


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.04 s"), (90, "90 s"), (150, "2.5 min"), (7200, "2 h"), (86_400, "24 h"), (864_000, "10 days")],
)
def test_spans_are_said_in_their_unit(script, seconds: float, text: str) -> None:
    assert script.span(seconds) == text


def test_sizes_are_said_in_their_unit(script) -> None:
    assert [script.size(value) for value in (500, 5e4, 2.5e6, 1.5e9, 3e12, 4e15)] == [
        *("0.5 KB", "50 KB", "2.5 MB", "1.5 GB", "3 TB", "4 PB")
    ]
