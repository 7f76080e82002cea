"""The protections, each taken away in a copy of the repository: the tests that are to notice must fail.

A campaign that cannot fail proves nothing. The list is in `tests/faults/mutants.py`; each mutant is given to the small versions
of the campaigns and to the unit tests named beside it, and counts as killed if one of them fails (or does not come to an end).
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
FOLDERS = ("sami_cache", "pipelines", "cli", "tests", "docs")
LIMIT = 400


def copy_of_the_repository(folder: Path) -> Path:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def failure_of(folder: Path, tests: tuple[str, ...]) -> str:
    """What they say if they fail, else nothing. A program that does not end is a failure like another."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", str(LIMIT - 20), *tests]
    command += ["--basetemp", str(folder / "temporary")]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return f"not at an end after {LIMIT} s"
    said = done.stdout.decode()[-3000:] + done.stderr.decode()[-1000:]
    assert done.returncode in (0, 1), said
    return said if done.returncode else ""


def mutate(folder: Path, mutant: Mutant) -> None:
    path = folder / mutant.file
    source = path.read_text()
    assert source.count(mutant.text) == 1, (mutant.what, source.count(mutant.text))
    changed = source.replace(mutant.text, mutant.instead)
    compile(changed, str(path), "exec")
    path.write_text(changed)


def killed_by(mutant: Mutant, folder: Path) -> str | None:
    """The tests that fail, None if the mutant survives."""
    mutate(copy_of_the_repository(folder), mutant)
    found = next((test for test in mutant.tests if failure_of(folder, (test,))), None)
    shutil.rmtree(folder)
    return found


def test_every_mutant_is_one_of_the_code_as_it_is(tmp_path):
    folder = copy_of_the_repository(tmp_path / "copy")
    for mutant in MUTANTS:
        mutate(folder, mutant)
        shutil.copy(ROOT / mutant.file, folder / mutant.file)
        assert all((ROOT / test).is_file() for test in mutant.tests), mutant.what


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_mutant_is_killed(tmp_path, campaign):
    # With nothing taken away they pass, or their failing would say nothing.
    healthy = copy_of_the_repository(tmp_path / "healthy")
    assert failure_of(healthy, tuple(sorted({test for mutant in MUTANTS for test in mutant.tests}))) == ""
    with ThreadPoolExecutor(2) as pool:
        killers = list(pool.map(lambda pair: killed_by(pair[1], tmp_path / f"mutant{pair[0]}"), enumerate(MUTANTS)))
    rows = {
        f"{mutant.what} (`{mutant.file}`)": f"killed by `{killer}`" if killer else "SURVIVES"
        for mutant, killer in zip(MUTANTS, killers, strict=True)
    }
    campaign("mutants", seed="of the campaigns", figures={"mutants": len(rows), "killed": sum(map(bool, killers)), **rows})
    assert all(killers), [mutant.what for mutant, killer in zip(MUTANTS, killers, strict=True) if not killer]
