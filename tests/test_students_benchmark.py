"""The study of students runs: one arm, two steps, on features of the shapes that `prepare` leaves."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "students.py"


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("students", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "students", module)
    spec.loader.exec_module(module)
    return module


def test_the_targets_alone_differ_between_arms(students, tmp_path: Path):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(students.CHANNELS, 8)).astype(np.float32)
    maps = np.einsum("ck,nkyx->ncyx", mixing, rng.normal(size=(160, 8, 16, 16)).astype(np.float32))
    folder = tmp_path / "cifar" / "16"
    folder.mkdir(parents=True)
    np.save(folder / "maps.npy", maps)
    rows = []
    for number in range(160):
        jpeg = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(jpeg, "JPEG")
        fields = {"key": f"{'test' if number >= 128 else 'train'}/{number}", "label": number % 10, "width": 32, "height": 32}
        rows.append(fields | {"view": None, "jpeg": jpeg.getvalue(), "usable": True})
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")

    runs = {arm: students.run_errors(tmp_path, arm, 0, 2) for arm in ("float32", "0.001", "0.3")}

    exact, fine, coarse = (run["exact"] for run in runs.values())
    assert exact["heldout_loss_of_mean"] == fine["heldout_loss_of_mean"] == coarse["heldout_loss_of_mean"]
    first = [run["curve"][0] for run in runs.values()]
    assert first[1] == pytest.approx(first[0], rel=0.002)
    assert abs(first[2] - first[0]) > 0.01 * first[0]
    assert all(0 <= run[name] <= 1 for run in runs.values() for name in ("knn", "linear"))
