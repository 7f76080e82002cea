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


def small_features(students, work: Path) -> None:
    """What `prepare` leaves, with noise for photographs."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(students.CHANNELS, 8)).astype(np.float32)
    maps = np.einsum("ck,nkyx->ncyx", mixing, rng.normal(size=(160, 8, 16, 16)).astype(np.float32))
    folder = work / "cifar" / "16"
    folder.mkdir(parents=True)
    np.save(folder / "maps.npy", maps)
    rows = []
    for number in range(160):
        jpeg = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(jpeg, "JPEG")
        fields = {"key": f"{'test' if number >= 128 else 'train'}/{number}", "label": number % 10, "width": 32, "height": 32}
        rows.append(fields | {"view": None, "jpeg": jpeg.getvalue(), "usable": True})
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")


def test_the_targets_alone_differ_between_arms(students, tmp_path: Path):
    small_features(students, tmp_path)
    runs = {arm: students.run_errors(tmp_path, arm, 0, 2) for arm in ("float32", "0.001", "0.3")}

    exact, fine, coarse = (run["exact"] for run in runs.values())
    assert exact["heldout_loss_of_mean"] == fine["heldout_loss_of_mean"] == coarse["heldout_loss_of_mean"]
    first = [run["curve"][0] for run in runs.values()]
    assert first[1] == pytest.approx(first[0], rel=0.002)
    assert abs(first[2] - first[0]) > 0.01 * first[0]
    assert all(0 <= run[name] <= 1 for run in runs.values() for name in ("knn", "linear"))


def test_the_arms_of_the_decoder_differ_by_their_options_alone(students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_features(students, tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import decoder_options as script

    published = {"keys_values": "visible+mask", "decoder_depth": 8, "decoder_width": 512, "decoder_heads": 16}
    assert script.options_of("as published") == (published, 1.0)
    assert script.options_of("width 256") == (published | {"decoder_width": 256, "decoder_heads": 8}, 1.0)
    assert script.options_of("1 block", script.NARROWER)[0]["decoder_width"] == 96
    arms = ("as published", "visible only, reconstruct 0.25")
    for arm in arms:
        script.keep(tmp_path, "learn", {f"{arm}/0": script.learn(tmp_path, 2, arm, 0) | {"steps": 2}})
    ours, theirs = (script.read_results(tmp_path)["learn"][f"{arm}/0"] for arm in arms)
    assert ours["heldout_loss_of_mean"] == theirs["heldout_loss_of_mean"]
    assert ours["heldout_loss"] != theirs["heldout_loss"]
    # 12 of 48 masked tokens, which do not see each other: a sample of the same errors.
    assert theirs["masked_0.25"] == pytest.approx(theirs["masked_1"], rel=0.1)
    script.keep(tmp_path, "speed", {"vit_t": dict.fromkeys(script.ARMS, 2.0) | {"as published": 4.0}, "how": {"batch": 1}})
    text = "\n".join(script.page(tmp_path))
    assert "| 1 block | 0.50 (2) |" in text
    losses = [run["heldout_loss"] / run["heldout_loss_of_mean"] for run in (ours, theirs)]
    assert f"| {arms[1]} | 1 | {losses[1]:.4f} | {losses[1] - losses[0]:+.4f} |" in text
    step = script.Step("vit_t", "reconstruct 0.25", 1, script.CPU)
    before = step.model.head.weight.detach().clone()
    step()
    assert (step.model.head.weight != before).any()
