"""The transfer benchmark: who is trained on, what is counted, when the margin is kept; both tasks run on six pictures."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sami_cache.inference.average_precision import average_precision

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "coco_transfer.py"


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("coco_transfer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "coco_transfer", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TRAINED_ON", 4)
    monkeypatch.setattr(module, "FREQUENT", {"detection": 4, "semantic": 4})
    return module


def write_data(folder: Path) -> None:
    """Six pictures, in no order: a square of category 7 in each; in the last, which is held out, one of category 9 too."""
    for name in ("images", "semantic"):
        (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for number in (5, 0, 3, 2, 4, 1):
        pixels, mask = np.full((64, 64, 3), 40, np.uint8), np.zeros((64, 64), np.uint8)
        for category, left in ((7, 4), (9, 40))[: 1 + (number == 5)]:
            pixels[10:34, left : left + 20], mask[10:34, left : left + 20] = 20 * category, category
            corners = [left, 10, left + 20, 10, left + 20, 34, left, 34]
            annotations.append({"id": len(annotations) + 1, "image_id": 10 * number, "category_id": category, "iscrowd": 0})
            annotations[-1] |= {"segmentation": [corners], "area": 480, "bbox": [left, 10, 20, 24]}
        mask[50:] = 12
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        Image.fromarray(mask).save(folder / "semantic" / f"{number}.png")
        images.append({"id": 10 * number, "file_name": f"{number}.jpg", "width": 64, "height": 64})
    categories = [{"id": 7, "name": "seven"}, {"id": 9, "name": "nine"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "semantic-classes.yaml").write_text("classes: {0: unlabeled, 7: seven, 9: nine, 12: ground}")


def test_the_first_by_number_are_trained_on_and_nothing_is_in_both_parts(transfer, tmp_path: Path):
    write_data(tmp_path / "data")
    transfer.split(tmp_path / "data", tmp_path / "work")
    parts = transfer.split(tmp_path / "data", tmp_path / "work")  # over what an earlier run left
    told = {part: json.loads((folder / "instances.json").read_text()) for part, folder in parts.items()}
    assert [one["id"] for one in told["train"]["images"]] == [0, 10, 20, 30]
    assert [one["id"] for one in told["heldout"]["images"]] == [40, 50]
    assert [one["category_id"] for one in told["heldout"]["annotations"]].count(9) == 1
    for part, numbers in {"train": "0123", "heldout": "45"}.items():
        for folder, ending, source in (("images", "jpg", "images"), ("masks", "png", "semantic")):
            files = sorted((parts[part] / folder).iterdir())
            assert [file.name for file in files] == [f"{number}.{ending}" for number in numbers]
            assert all(file.read_bytes() == (tmp_path / "data" / source / file.name).read_bytes() for file in files)


def truth_and_results() -> tuple[dict, list[dict]]:
    """Two objects of categories 1 and 2 in picture 5; both found, one under another name, one twice."""
    boxes = {1: [10, 10, 30, 30], 2: [60, 60, 20, 20]}
    objects = [
        {"id": category, "image_id": 5, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for category, box in boxes.items()
    ]
    images = [{"id": 5, "width": 100, "height": 100}, {"id": 6, "width": 100, "height": 100}]
    truth = {"images": images, "categories": [{"id": n, "name": str(n)} for n in (1, 2, 3)], "annotations": objects}
    found = [(1, boxes[1], 0.9), (3, [11, 10, 30, 30], 0.8), (3, boxes[2], 0.7)]
    return truth, [{"image_id": 5, "category_id": n, "bbox": box, "score": score} for n, box, score in found]


def test_where_no_category_is_asked_for_a_duplicate_under_another_name_is_one_detection(transfer):
    truth, results = truth_and_results()
    dataset, kept = transfer.any_class(truth, results)
    assert [one["score"] for one in kept] == [0.9, 0.7]
    assert {one["category_id"] for one in kept + dataset["annotations"]} == {1}
    assert average_precision(dataset, kept, style="coco", kind="bbox")["AP"] == pytest.approx(1.0)
    # Asked for, one of two is found; what was given is as it was.
    assert average_precision(truth, results, style="coco", kind="bbox")["AP"] == pytest.approx(0.5)
    assert [one["category_id"] for one in results] == [1, 3, 3]


def test_the_mean_over_some_categories_knows_no_others(transfer):
    dataset, kept = transfer.only(*truth_and_results(), {1, 3})
    assert [one["category_id"] for one in dataset["annotations"]] == [1]
    assert [one["score"] for one in kept] == [0.9, 0.8, 0.7]
    assert average_precision(dataset, kept, style="coco", kind="bbox")["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([2.0], "+2.0 points, 1 seeds: ahead"),
        ([1.9], "+1.9 points, 1 seeds: not ahead"),
        ([2.0, 3.0, 4.0], "+3.0 ± 2.5 points, 3 seeds: ahead"),
        ([1.0, 2.5, 4.0], "+2.5 ± 3.7 points, 3 seeds: not ahead"),
        ([0.9, 1.0, 1.1], "+1.0 ± 0.2 points, 3 seeds: not ahead"),
    ],
)
def test_the_margin_is_kept_by_the_mean_and_the_interval(transfer, values, told):
    # 4.303 is Student's t of two degrees of freedom.
    assert told in transfer.verdict("mIoU", values)


def test_differences_are_paired_by_seed(transfer, tmp_path: Path, capsys):
    for arm, by_seed in {"taught": {0: 20.0, 2: 40.0}, "scratch": {0: 19.0, 1: 90.0, 2: 36.0}}.items():
        for seed, value in by_seed.items():
            figures = {"mIoU, frequent": value, "classes": 3, "frequent classes": 2}
            result = {"recipe": {}, "seconds": 60.0, "figures": dict.fromkeys(("train", "heldout"), figures), "curve": []}
            (tmp_path / f"semantic-{arm}-{seed}.json").write_text(json.dumps(result))
    transfer.main(["report", "--work", str(tmp_path)])
    text = capsys.readouterr().out
    assert "| difference, paired by seed | heldout | +2.5 ± 19.1 |" in text
    assert "the same student from scratch, 3 seeds | heldout | 48.3" in text


@pytest.mark.parametrize(
    ("task", "classes", "extra"),
    [
        ("detection", {"train": (1, 1), "heldout": (2, 1)}, ["--regions", "8"]),
        ("semantic", {"train": (2, 2), "heldout": (3, 2)}, []),
    ],
)
def test_a_task_runs_is_judged_on_both_parts_and_goes_on(transfer, task, classes, extra, tmp_path: Path, capsys, monkeypatch):
    write_data(tmp_path / "data")
    asked = [task, "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--arms", "scratch", "--seeds", "1"]
    settings = ["--steps", "2", "--image-size", "64", "--channels", "32", *extra]
    transfer.main(["train", *asked, *settings])
    file = tmp_path / "work" / f"{task}-scratch-0.json"
    found = json.loads(file.read_text())
    for part, (all_of_them, frequent) in classes.items():
        figures = found["figures"][part]
        assert (figures["classes"], figures["frequent classes"]) == (all_of_them, frequent)
        assert 0 <= figures[transfer.JUDGED[task]] <= 100
    assert [line["step"] for line in found["curve"]] == [0, 1, 2]
    # What is finished is left alone; without its file the run goes on from its last checkpoint, to the same figures.
    with monkeypatch.context() as patch:
        patch.setitem(transfer.LEARN, task, None)
        transfer.main(["train", *asked, *settings])
    file.unlink()
    transfer.main(["train", *asked, *settings])
    assert json.loads(file.read_text())["figures"] == found["figures"]
    plot = tmp_path / "curves.png"
    transfer.main(["report", "--work", str(tmp_path / "work"), "--plot", str(plot)])
    assert "+" not in capsys.readouterr().out.split(f"## {task}")[1]  # nothing to compare with
    assert plot.stat().st_size > 10_000


def test_objects_are_within_reach_where_they_are_as_large_as_an_anchor(transfer, tmp_path: Path):
    write_data(tmp_path / "data")  # squares of 20 x 24 in 64 x 64; the smallest anchors are 32 x 32
    assert transfer.within_reach(tmp_path / "data" / "instances.json", 64) == 0
    assert transfer.within_reach(tmp_path / "data" / "instances.json", 128) == 1


def test_the_taught_arm_needs_a_student(transfer, tmp_path: Path):
    write_data(tmp_path / "data")
    with pytest.raises(SystemExit, match="--student: expected"):
        transfer.main(["train", "semantic", "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work")])
