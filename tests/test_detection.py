"""`sami-cache finetune detection`: what is shown, what is learnt, and how it is measured, against pycocotools."""

import json

import numpy as np
import pytest
import torch
from photos import picture
from PIL import Image
from test_promptable import write_pictures
from typer.testing import CliRunner

from cli.main import app
from pipelines.finetune_detection import DetectionTrainingConfig, evaluate_detection, finetune_detection, open_detector, prepare
from sami_cache.data.annotations import open_annotations
from sami_cache.errors import IdentityError, SamiCacheError
from sami_cache.models.detector import Detections
from sami_cache.tasks.detection import JitterConfig, choose_place, examples, to_results

CPU = torch.device("cpu")
SHAPE = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def config(run, folder, **changes) -> DetectionTrainingConfig:
    fields = {
        "run": run,
        "data": folder / "instances.json",
        "images": folder,
        "shape": SHAPE,
        "image_size": 64,
        "global_blocks": 1,
        "window": 2,
        "channels": 32,
        "regions": 32,
        "detections": 20,
        "jitter": JitterConfig(smallest=1.0, largest=1.0),
        "steps": 2,
        "warmup_steps": 0,
        "batch_size": 2,
        "device": "cpu",
        "workers": 1,
        "precision": "float32",
        "log_every": 1,
    }
    return DetectionTrainingConfig(**(fields | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures with objects of two categories, whose ids leave gaps; the last one has none."""
    folder = tmp_path_factory.mktemp("detection")
    path = write_pictures(folder, 4, whole=False)
    content = json.loads(path.read_text())
    for number, entry in enumerate(content["annotations"]):
        entry["category_id"] = (7, 90)[number % 2]
    content["categories"] = [{"id": 90, "name": "far"}, {"id": 7, "name": "near"}]
    last = content["images"][-1]["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != last]
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("jitter", [None, JitterConfig(), JitterConfig(smallest=1.5, largest=2.0)])
def test_pictures_and_masks_go_to_the_same_place(jitter):
    image = np.array(picture("coffee").resize((140, 90)))
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[20:70, 30:110] = 1
    image[mask > 0] = 255
    image[mask == 0] //= 2
    for seed in range(12):
        place = choose_place(*mask.shape, 64, jitter, np.random.default_rng(seed))
        shown, inside = place(image, Image.Resampling.BILINEAR), place(mask, Image.Resampling.NEAREST) > 0
        assert shown.shape == (64, 64, 3)
        bright = shown.min(2) > 191
        assert (bright != inside).mean() < 0.06  # the edge, in halves of pixels
        if jitter is None:
            assert inside.sum() == pytest.approx(mask.sum() * (64 / 140) ** 2, rel=0.1)
            assert shown[: round(90 * 64 / 140)].any((1, 2)).all()
            assert not shown[round(90 * 64 / 140) :].any()


def test_examples_follow_seed_epoch_and_picture(data):
    annotations = open_annotations(data / "instances.json", data)
    make = examples(annotations, {7: 1, 90: 2}, 64, JitterConfig(), 0)
    one, again, other = make(0, 0), make(0, 0), make(1, 0)
    assert torch.equal(one.pixels, again.pixels)
    assert one.seed == again.seed != other.seed
    assert not torch.equal(one.pixels, other.pixels)
    assert make(0, 3).targets.masks.shape == (0, 64, 64)
    whole = examples(annotations, {7: 1, 90: 2}, 64, None, 0)(0, 0).targets
    assert set(whole.labels.tolist()) <= {1, 2}
    for box, mask in zip(whole.boxes.tolist(), whole.masks, strict=True):
        rows, columns = np.nonzero(mask.numpy())
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_detections_come_back_to_the_picture():
    """A box that fills half of what was shown, all of it mask: half of the picture, in its own pixels."""
    found = Detections(
        torch.tensor([[0.0, 0.0, 32.0, 40.0], [-5.0, -5.0, 90.0, 90.0]]),
        torch.tensor([2, 1]),
        torch.tensor([0.9, 0.5]),
        torch.ones(2, 1, 28, 28),
    )
    half, all_of_it = to_results(found, 17, (80, 128), 64, [7, 90])
    assert half["bbox"] == [0, 0, 64, 80]
    assert (half["image_id"], half["category_id"], round(half["score"], 3)) == (17, 90, 0.9)
    assert all_of_it["bbox"] == [0, 0, 128, 80]
    from pycocotools import mask as coco_mask

    assert float(coco_mask.area(half["segmentation"])) == pytest.approx(64 * 80, rel=0.05)
    assert float(coco_mask.area(all_of_it["segmentation"])) == pytest.approx(128 * 80, rel=0.05)


def test_a_step_may_be_cut_into_any_parts(data, tmp_path):
    gradients = []
    for parts in (1, 2, 4):
        prepared = prepare(config(tmp_path / str(parts), data, batch_size=4, micro_batch=4 // parts), CPU)
        assert prepared.train.accumulate == parts
        batches = prepared.task.batches(0)
        for _ in range(parts):
            values = prepared.task.loss(prepared.task.model, next(batches), CPU)
            (values["loss"] / parts).backward()
        batches.close()
        named = prepared.task.model.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named if parameter.requires_grad})
        # Also of a picture without objects: several processes would wait for it.
        assert [name for name, value in gradients[-1].items() if value is None] == []
    for cut in gradients[1:]:
        for name, value in gradients[0].items():
            assert float((value - cut[name]).norm()) <= 2e-3 * float(value.norm()) + 1e-6, name


def test_a_resumed_run_is_the_run_that_never_stopped(data, tmp_path):
    finetune_detection(config(tmp_path / "whole", data, steps=3, checkpoint_every=1))

    def pull_the_plug(line):
        if line["step"] == 2:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        finetune_detection(config(tmp_path / "part", data, steps=3, checkpoint_every=1), pull_the_plug)
    finetune_detection(config(tmp_path / "part", data, steps=3, checkpoint_every=1, resume=True))
    whole, part = (open_detector(tmp_path / name)[0].state_dict() for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())
    with pytest.raises(IdentityError, match=r"detector\.window: 2 in the run, None now"):
        finetune_detection(config(tmp_path / "part", data, steps=3, window=None, resume=True))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    changes = {"steps": 60, "lr": 3e-3, "batch_size": 4, "log_every": 10, "val": data / "instances.json", "evaluate_every": 60}
    lines = []
    finetune_detection(config(run, data, **changes), lines.append)
    return run, lines


def test_a_few_pictures_are_learnt_and_measured_as_pycocotools_does(data, trained, tmp_path):
    run, lines = trained
    logged = [line for line in lines if "loss" in line]
    assert logged[-1]["loss"] < 0.6 * logged[0]["loss"]
    assert lines[0]["heldout_box_AP50"] < 0.05
    assert lines[-1]["heldout_box_AP50"] > 0.1
    found = evaluate_detection(run, data / "instances.json", data, out=tmp_path / "results.json", device="cpu")
    assert found == {name: value for name, value in lines[-1].items() if name.startswith("heldout_")}
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools takes the number 0 for "not found", and areas from the file.
    content = json.loads((data / "instances.json").read_text())
    annotations = open_annotations(data / "instances.json", data)
    objects = [one for number in range(len(annotations)) for one in annotations.objects(number)]
    content["annotations"] = [
        {
            "id": place,
            "image_id": one.image_id,
            "category_id": one.category,
            "area": one.area,
            "iscrowd": int(one.crowd),
            "bbox": [one.box[0], one.box[1], one.box[2] - one.box[0], one.box[3] - one.box[1]],
            "segmentation": one.rle(),
        }
        for place, one in enumerate(objects, 1)
    ]
    (tmp_path / "truth.json").write_text(
        json.dumps(content, default=lambda value: value.decode() if isinstance(value, bytes) else value)
    )
    truth = COCO(str(tmp_path / "truth.json"))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        results = json.loads((tmp_path / "results.json").read_text())
        other = "segmentation" if kind == "bbox" else "bbox"
        theirs = COCOeval(truth, truth.loadRes([{k: v for k, v in one.items() if k != other} for one in results]), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        for place, metric in ((0, "AP"), (1, "AP50")):
            assert found[f"heldout_{name}_{metric}"] == pytest.approx(theirs.stats[place], abs=1e-9)


def test_the_commands(data, trained, tmp_path):
    run, _ = trained
    arguments = ["evaluate", "detection", str(run), "--data", str(data / "instances.json"), "--images", str(data)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "boxes.json"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "box AP50" in result.output
    # Its boxes are what a promptable model can be asked with.
    chain = ["evaluate", "promptable", "--baseline", "box", "--data", str(data / "instances.json"), "--images", str(data)]
    result = CliRunner().invoke(app, [*chain, "--boxes", str(tmp_path / "boxes.json"), "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.json").read_text())["ap"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "boxes.json"), "--device", "cpu"])
    assert "nothing was overwritten" in str(result.exception)
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "detector.safetensors")])
    assert result.exit_code == 0, result.output
    (model, settings), (again, same) = open_detector(run), open_detector(tmp_path / "detector.safetensors")
    assert settings == same
    assert settings["categories"] == {"7": "near", "90": "far"}
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    start = [
        "finetune",
        "detection",
        "--data",
        str(data / "instances.json"),
        "--images",
        str(data),
        "--run",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, [*start, "--image-size", "100"])
    assert "expected a multiple of 32" in str(result.exception)
    result = CliRunner().invoke(app, [*start, "--init", str(tmp_path / "nothing")])
    assert isinstance(result.exception, SamiCacheError)


def test_data_without_categories_is_refused(data, tmp_path):
    content = json.loads((data / "instances.json").read_text())
    (tmp_path / "none.json").write_text(json.dumps({**content, "categories": []}))
    with pytest.raises(SamiCacheError, match="names no categories"):
        prepare(config(tmp_path / "run", data, data=tmp_path / "none.json"), CPU)
    content["annotations"][0]["category_id"] = 5
    (tmp_path / "unknown.json").write_text(json.dumps(content))
    with pytest.raises(SamiCacheError, match="has objects of category 5, which"):
        prepare(config(tmp_path / "run", data, val=tmp_path / "unknown.json"), CPU)
