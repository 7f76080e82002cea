"""Evaluation of promptable models: protocols by hand-made masks, AP against pycocotools, the command as a whole."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from typer.testing import CliRunner

from cli.main import app
from pipelines.evaluate import BOX_BASELINE, EvaluationConfig, evaluate
from pipelines.evaluation_text import evaluation_text
from pipelines.published import PUBLISHED_AP, PUBLISHED_MIOU
from sami_cache.data.annotations import open_annotations
from sami_cache.errors import SamiCacheError
from sami_cache.inference.average_precision import Truth, average_precision, best_boxes
from sami_cache.inference.measuring import Answers, BoxItself, ModelSegmenter, Segmenter, measure_objects, segment_boxes
from sami_cache.inference.protocols import (
    PROTOCOLS,
    box_to_mask,
    farthest_point,
    mask_iou,
    next_click,
)
from sami_cache.inference.rle import encode_mask
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import save_segment_anything
from sami_cache.prompts import tight_box

SIZES = [(90, 120), (150, 100), (128, 128), (60, 140), (300, 320), (64, 64)]
"""Height and width of the pictures."""
CATEGORIES = [{"id": 2, "name": "disc"}, {"id": 7, "name": "bar"}, {"id": 90, "name": "blob"}]
COCO_NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def shape(rng: np.random.Generator, height: int, width: int, largest: float) -> np.ndarray:
    """A disc, a bar or a triangle somewhere in the picture, cut off by its edge at times."""
    canvas = Image.new("1", (width, height))
    draw, kind = ImageDraw.Draw(canvas), rng.integers(3)
    x, y, w, h = rng.uniform(0, width), rng.uniform(0, height), *rng.uniform(4, largest, 2)
    if kind == 0:
        draw.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=1)
    elif kind == 1:
        draw.rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=1)
    else:
        draw.polygon([(x, y), (x + w, y + h / 2), (x - w / 3, y + h)], fill=1)
    return np.array(canvas)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures and `instances.json`: several categories, small and large, crowds, polygons, and a picture of nothing."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)
    images, annotations = [], []
    for number, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": height, "width": width})
        for _ in range({3: 0, 4: 40}.get(number, 9)):
            mask = shape(rng, height, width, 260 if number == 4 else 90)
            if not mask.any():
                continue
            x0, y0, x1, y1 = tight_box(mask)
            crowd = int(rng.random() < 0.15)
            segmentation: object = encode_mask(mask)
            if crowd:
                runs = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel().astype(int), 2]) != 0)
                segmentation = {"size": [height, width], "counts": np.diff(np.r_[0, runs]).tolist()}
            elif rng.random() < 0.3:
                segmentation = [[x0, y0, x1, y0, x1, y1, x0 + 0.4, y1]]
            annotations.append(
                {
                    "id": len(annotations),  # from 0, as many files in the wild
                    "image_id": 100 + number,
                    "category_id": CATEGORIES[rng.integers(3)]["id"],
                    "segmentation": segmentation,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(mask.sum()) + (0.3 if rng.random() < 0.5 else 0),
                    "iscrowd": crowd,
                }
            )
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return folder


@pytest.fixture(scope="module")
def detector(photos) -> Path:
    """A detector's results on `photos`: about right, twice, in the wrong category, over the edge, of equal scores."""
    rng, data = np.random.default_rng(6), json.loads((photos / "instances.json").read_text())
    boxes = []
    for one in data["annotations"]:
        for _ in range(rng.integers(0, 4)):
            box = np.array(one["bbox"]) + rng.normal(0, 2, 4)
            category = one["category_id"] if rng.random() < 0.8 else CATEGORIES[rng.integers(3)]["id"]
            boxes.append(
                {
                    "image_id": one["image_id"],
                    "category_id": category,
                    "bbox": [*box[:2].tolist(), *np.maximum(box[2:], 0).tolist()],
                    "score": round(float(rng.random()), 1),
                }
            )
    boxes.append({"image_id": 103, "category_id": 2, "bbox": [-20, -20, 10, 10], "score": 0.9})  # outside of the picture
    path = photos / "boxes.json"
    path.write_text(json.dumps(boxes))
    return path


def config(photos: Path, folder: Path, **changes) -> EvaluationConfig:
    made = EvaluationConfig(
        model=None,
        data=photos / "instances.json",
        images=photos,
        protocol=PROTOCOLS["efficientsam"],
        out=folder / "result.json",
        device="cpu",
    )
    return replace(made, **changes)


def theirs(truth: dict, results: list[dict], kind: str = "segm") -> np.ndarray:
    """pycocotools' twelve numbers. Annotations numbered from 1: its 0 means "not matched"."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = [{**one, "id": number} for number, one in enumerate(truth["annotations"], 1)]
        ground = COCO()
        ground.dataset = {**truth, "annotations": annotations}
        ground.createIndex()
        evaluation = COCOeval(ground, ground.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


# What is asked of a model


class Recorder(Segmenter):
    """Answers each click with a square around it, the smaller the token the smaller; keeps what it is asked."""

    takes_points, takes_masks = True, True

    def __init__(self) -> None:
        self.images, self.asked = 0, []

    def set_image(self, image):
        self.images, self.size = self.images + 1, image.shape[:2]

    def answer(self, points, labels, previous=None):
        self.asked.append((points.copy(), labels.copy(), previous))
        return Squares(points, self.size)


class Squares(Answers):
    def __init__(self, points, size):
        self.points, self.size = points, size
        self.predicted = np.tile([0.1, 0.2, 0.9, 0.3], (len(points), 1))

    def mask(self, query, token):
        x, y = self.points[query, 0]
        return box_to_mask((x - 12 * token, y - 12 * token, x + 12 * token, y + 12 * token), *self.size)

    def low_resolution(self, tokens):
        return torch.tensor(tokens)


def test_clicks_come_one_at_a_time_where_the_answer_matters(photos):
    annotations = open_annotations(photos / "instances.json", photos)
    objects = [one for one in annotations.objects(0) if not one.crowd]
    truths = [one.mask() for one in objects]
    recorder = Recorder()
    recorder.set_image(annotations.read_image(0))
    found = measure_objects(recorder, objects, PROTOCOLS["sam"], ("box", "1", "3"), chunk=4)
    assert {prompt: len(values) for prompt, values in found.items()} == dict.fromkeys(("box", "1", "3"), len(objects))
    first = recorder.asked[:4]  # one chunk: the box, then one, two, three clicks
    assert [points.shape for points, _, _ in first] == [(4, 2, 2), (4, 1, 2), (4, 2, 2), (4, 3, 2)]
    assert (first[0][1] == [2, 3]).all()
    np.testing.assert_array_equal(first[0][0].reshape(4, 4), [tight_box(truth) for truth in truths[:4]])
    for query, truth in enumerate(truths[:4]):
        click = farthest_point(truth)
        assert tuple(first[1][0][query, 0]) == click
        mask = box_to_mask((click[0] - 24, click[1] - 24, click[0] + 24, click[1] + 24), *truth.shape)  # token 2: confident
        assert found["1"][query] == mask_iou(mask, truth)
        point, label = next_click("error-farthest", mask, truth)
        assert tuple(first[2][0][query, 1]) == point
        assert first[2][1][query, 1] == label
        single = box_to_mask((click[0], click[1], click[0], click[1]), *truth.shape)  # token 0: single, from two clicks on
        assert found["3"][query] == mask_iou(single, truth)
    assert set(first[3][1].ravel()) == {0, 1}  # some are too much
    assert [previous is None for *_, previous in first] == [True, True, False, False]
    assert first[2][2].tolist() == [2] * 4
    assert first[3][2].tolist() == [0] * 4


def test_uniform_clicks_are_the_objects_own(photos):
    annotations = open_annotations(photos / "instances.json", photos)
    objects = [one for one in annotations.objects(4) if not one.crowd]
    recorders = [Recorder(), Recorder(), Recorder()]
    protocol = PROTOCOLS["efficientsam"]
    for recorder, chosen in zip(recorders, (protocol, protocol, replace(protocol, seed=1)), strict=True):
        recorder.set_image(annotations.read_image(4))
        part = objects if recorder is recorders[0] else objects[::-1]
        measure_objects(recorder, part, chosen, ("1", "5"), chunk=100)
    assert [points.shape[1] for points, *_ in recorders[0].asked] == [1, 5]  # those in between are nobody's business
    five, reverse, other = (recorder.asked[1] for recorder in recorders)
    np.testing.assert_array_equal(five[0], reverse[0][::-1])  # whatever the order
    np.testing.assert_array_equal(five[0][:, :1], recorders[0].asked[0][0])
    assert (five[1] == 1).all()
    assert five[2] is None
    assert not (other[0] == reverse[0]).all()
    for points, one in zip(five[0], objects, strict=True):
        assert one.mask()[points[:, 1], points[:, 0]].all()


def test_objects_of_one_shape_have_points_of_their_own(photos):
    annotations = open_annotations(photos / "instances.json", photos)
    one, recorder = annotations.objects(4)[0], Recorder()
    recorder.set_image(annotations.read_image(4))
    same = [one, replace(one, annotation_id=one.annotation_id + 1), replace(one, image_id=one.image_id + 1)]
    measure_objects(recorder, same, PROTOCOLS["efficientsam"], ("5",))
    assert len(np.unique(recorder.asked[0][0], axis=0)) == 3


def test_boxes_as_annotated(photos):
    annotations = open_annotations(photos / "instances.json", photos)
    moved = [replace(one, box=(1.0, 2.0, 30.0, 40.0)) for one in annotations.objects(0)]
    recorder = Recorder()
    recorder.set_image(annotations.read_image(0))
    measure_objects(recorder, moved, replace(PROTOCOLS["sam"], boxes="annotated"), ("box",))
    assert (recorder.asked[0][0].reshape(-1, 4) == (1, 2, 30, 40)).all()


@pytest.mark.parametrize("family", ["sam", "efficientsam"])
def test_a_model_answers_in_chunks_as_one_by_one(photos, family):
    torch.manual_seed(1)
    model = SegmentAnything(SegmentAnythingConfig(family=family, depth=1, image_size=64)).eval()
    annotations = open_annotations(photos / "instances.json", photos)
    image, objects = annotations.read_image(1), annotations.objects(1)
    segmenter = ModelSegmenter(model)
    segmenter.set_image(image)
    boxes = np.array([one.box for one in objects])
    masks = list(segment_boxes(segmenter, boxes, PROTOCOLS["single"], chunk=4))
    with torch.inference_mode():
        embedding = model.encode(model.preprocess(image)[None])
        for box, mask in zip(boxes, masks, strict=True):
            corners = model.to_input(torch.tensor(box, dtype=torch.float32).view(1, 1, 2, 2), *image.shape[:2])
            answer = model.decode(embedding, *model.complete_prompts(corners, torch.tensor([[[2, 3]]]))).single
            expected = model.to_picture(answer.logits[0], *image.shape[:2])[0, 0] > 0
            assert mask.shape == image.shape[:2]
            assert (mask != expected.numpy()).mean() < 1e-3
    if family == "sam":  # the mask so far is a prompt, and is heard
        points, labels = boxes[:, None, :2], np.ones((len(boxes), 1), np.int64)
        answers = segmenter.answer(points, labels)
        low = answers.low_resolution([query % 4 for query in range(len(boxes))])
        assert low is not None
        for query in range(len(boxes)):
            mask = model.to_picture(low[:, query], *image.shape[:2])[0, 0] > 0
            np.testing.assert_array_equal(mask, answers.mask(query, query % 4))
        again = segmenter.answer(points, labels, answers.low_resolution([1] * len(boxes)))
        assert np.abs(again.predicted - answers.predicted).max() > 1e-4


# AP


def detections_of(photos: Path, detector: Path) -> tuple[dict, list[dict]]:
    """The truth as it is in the file, and masks somewhat like it."""
    truth, rng = json.loads((photos / "instances.json").read_text()), np.random.default_rng(8)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    found = []
    for one in json.loads(detector.read_text()):
        x, y, w, h = one["bbox"]
        mask = box_to_mask((x, y, x + w, y + h), *sizes[one["image_id"]])
        if rng.random() < 0.3:
            mask = ndimage.binary_erosion(mask)
        found.append({key: one[key] for key in ("image_id", "category_id", "score")} | {"segmentation": encode_mask(mask)})
    return truth, found


def test_coco_numbers_are_those_of_pycocotools(photos, detector):
    truth, found = detections_of(photos, detector)
    annotations = open_annotations(photos / "instances.json", photos)
    dataset = Truth(annotations).dataset(range(len(annotations)))
    ours = average_precision(dataset, found, style="coco")
    assert list(ours) == COCO_NUMBERS
    expected = theirs(truth, [dict(one) for one in found])
    np.testing.assert_allclose(list(ours.values()), expected, atol=1e-12)
    assert len(set(expected.round(6))) > 8
    assert min(expected) > 0
    boxes = json.loads(detector.read_text())
    ours = average_precision(dataset, boxes, style="coco", kind="bbox")
    np.testing.assert_allclose(list(ours.values()), theirs(truth, boxes, "bbox"), atol=1e-12)


def test_a_fraction_of_a_pixel_decides_what_is_small(photos, tmp_path):
    data = json.loads((photos / "instances.json").read_text())
    data["annotations"][0]["area"] = 32**2 + 0.4
    (tmp_path / "instances.json").write_text(json.dumps(data))
    truth = Truth(open_annotations(tmp_path / "instances.json", photos))
    assert [one["area"] for one in truth.dataset(range(6))["annotations"]] == [one["area"] for one in data["annotations"]]


def test_detected_boxes_are_cut_to_the_picture(photos, detector, tmp_path, monkeypatch):
    seen = []

    def keep(segmenter, boxes, protocol):
        seen.append(boxes)
        return segment_boxes(segmenter, boxes, protocol)

    monkeypatch.setattr("pipelines.evaluate.segment_boxes", keep)
    evaluate(config(photos, tmp_path, boxes=detector))
    given = json.loads(detector.read_text())
    for (height, width), index, boxes in zip(SIZES, range(6), seen, strict=True):
        raw = np.array([one["bbox"] for one in given if one["image_id"] == 100 + index])
        corners = np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], axis=1)
        assert index == 4 or (corners < 0).any() or (corners > [width, height] * 2).any()
        np.testing.assert_allclose(boxes, np.minimum(np.maximum(corners, 0), [width, height] * 2))


def test_more_detections_than_count(photos):
    """COCO counts 100 an image and category; beyond them even the best score is lost."""
    annotations = open_annotations(photos / "instances.json", photos)
    dataset, rng = Truth(annotations).dataset([4]), np.random.default_rng(2)
    found = [
        {
            "image_id": 104,
            "category_id": 2 + 5 * int(n % 2),
            "segmentation": encode_mask(shape(rng, *SIZES[4], 90)),
            "score": n / 400,
        }
        for n in range(260)
    ]
    found += [
        {"image_id": 104, "category_id": one["category_id"], "segmentation": one["segmentation"], "score": 0.2}
        for one in dataset["annotations"]
    ]
    for one in found:
        if isinstance(one["segmentation"]["counts"], bytes):
            one["segmentation"] = {**one["segmentation"], "counts": one["segmentation"]["counts"].decode()}
    truth = json.loads((photos / "instances.json").read_text())
    truth["images"] = truth["images"][4:5]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] == 104]
    ours = average_precision(dataset, found, style="coco")
    np.testing.assert_allclose(list(ours.values()), theirs(truth, [dict(one) for one in found]), atol=1e-12)


def test_no_detection_at_all_scores_nothing(photos):
    annotations = open_annotations(photos / "instances.json", photos)
    numbers = average_precision(Truth(annotations).dataset(range(6)), [], style="coco")
    assert set(numbers.values()) == {0.0}


def lvis_file(photos: Path, folder: Path) -> Path:
    """The same as LVIS has it: named by address, frequencies, categories known to be absent or not all annotated."""
    data = json.loads((photos / "instances.json").read_text())
    for image in data["images"]:
        image["coco_url"] = f"http://images.example/{photos.name}/{image.pop('file_name')}"
        image |= {"neg_category_ids": [2] if image["id"] == 103 else [], "not_exhaustive_category_ids": [90]}
    for category, frequency in zip(data["categories"], "rcf", strict=True):
        category["frequency"] = frequency
    data["annotations"] = [one | {"id": one["id"] + 1} for one in data["annotations"] if not one["iscrowd"]]
    path = folder / "lvis.json"
    path.write_text(json.dumps(data))
    return path


def test_lvis_asks_about_what_was_looked_for_alone(photos, tmp_path):
    annotations = open_annotations(lvis_file(photos, tmp_path), photos.parent)
    assert annotations.read_image(0).shape == (*SIZES[0], 3)
    truth = Truth(annotations)
    assert truth.style == "lvis"
    dataset = truth.dataset(range(6))
    perfect = [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "score": 0.9,
            "segmentation": dict(one["segmentation"]),
        }
        for one in dataset["annotations"]
    ]
    for one in perfect:
        one["segmentation"]["counts"] = one["segmentation"]["counts"].decode()
    numbers = average_precision(dataset, perfect, style="lvis")
    assert numbers["AP"] == numbers["APr"] == numbers["APc"] == numbers["APf"] == numbers["AR300"] == pytest.approx(1)
    picture = encode_mask(np.ones(SIZES[3], bool))
    # Nobody looked for bars in the picture of nothing: finding one there is not wrong. Discs are known to be absent.
    unknown = [{"image_id": 103, "category_id": 7, "segmentation": picture, "score": 0.99}]
    assert average_precision(dataset, perfect + unknown, style="lvis") == numbers
    absent = [{"image_id": 103, "category_id": 2, "segmentation": picture, "score": 0.99}]
    assert average_precision(dataset, perfect + absent, style="lvis")["APr"] < 0.99
    coco = average_precision(dataset, perfect + unknown, style="coco")
    assert coco["AP"] < numbers["AP"]


def test_lvis_counts_the_best_300_of_an_image():
    boxes = [{"score": score, "category_id": score % 5} for score in range(500)]
    assert {box["score"] for box in best_boxes(boxes, "lvis")} == set(range(200, 500))
    assert best_boxes(boxes, "coco") == boxes


# The stage and the command


def test_the_box_itself_as_the_mask(photos, tmp_path):
    result = evaluate(config(photos, tmp_path))
    data = json.loads((photos / "instances.json").read_text())
    annotations = open_annotations(photos / "instances.json", photos)
    objects = [one for index in range(6) for one in annotations.objects(index) if not one.crowd]
    expected = []
    for one in objects:
        mask = one.mask()
        filled = np.zeros_like(mask)
        x0, y0, x1, y1 = map(int, tight_box(mask))
        filled[y0:y1, x0:x1] = True
        expected.append(mask.sum() / filled.sum())
    (row,) = result["miou"]  # no clicks: a box has none
    assert row["miou"] == pytest.approx(np.mean(expected))
    assert row["objects"] == len(objects)
    assert row["settings"] == "mask the box itself, boxes tight, crowd dropped"
    crowds = sum(one["iscrowd"] for one in data["annotations"])
    assert crowds
    assert result["data"]["crowd_dropped"] == crowds
    assert result["model"]["name"] == BOX_BASELINE
    kept = evaluate(config(photos, tmp_path, protocol=replace(PROTOCOLS["sam"], crowd=True), overwrite=True))
    assert kept["miou"][0]["objects"] == len(objects) + crowds


def test_detected_boxes_become_masks_that_anyone_can_score(photos, detector, tmp_path):
    torch.manual_seed(3)
    path = tmp_path / "model.pt"
    model = SegmentAnything(SegmentAnythingConfig(depth=1, image_size=64))
    moments = []
    made = config(photos, tmp_path, boxes=detector, model=path, prompts=("box", "1"))
    result = evaluate(made, moments.append, model=model)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == json.loads(json.dumps(result))
    masks = json.loads((tmp_path / "result.masks.json").read_text())
    boxes = json.loads(detector.read_text())
    assert len(masks) == len(boxes)
    assert set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    truth = json.loads((photos / "instances.json").read_text())
    np.testing.assert_allclose(list(result["ap"]["masks"].values()), theirs(truth, masks), atol=1e-12)
    outside = next(mask for mask in masks if mask["image_id"] == 103)
    assert outside["segmentation"]["size"] == list(SIZES[3])
    assert [moment.done for moment in moments] == list(range(1, 7))
    assert moments[-1].total == 6
    text = evaluation_text(result)
    ours, _, others = text.partition("Published by others")
    assert "protocol efficientsam" in ours
    assert "maxDets 100 (an image and category)" in ours
    assert "boxes.json" in ours
    assert "COCO AP  COCO APs" in others
    assert "LVIS 1 click  LVIS 3 clicks" in others
    for table in (PUBLISHED_MIOU, PUBLISHED_AP):
        for method in table.rows:
            assert method in others
            assert method not in ours
    assert "not measured here" in others
    assert "ViTDet-H" in others
    assert {row["prompt"]: row["settings"] for row in result["miou"]}["1"].startswith("mask confident, first point uniform")


def test_lvis_by_itself(photos, detector, tmp_path):
    data = lvis_file(photos, tmp_path)
    result = evaluate(config(photos, tmp_path, data=data, images=photos.parent, boxes=detector, prompts=()))
    assert result["ap"]["metric"] == "lvis"
    assert result["miou"] == []
    assert "APr" in result["ap"]["masks"]
    assert "maxDets 300 (an image), crowd as LVIS has it" in result["ap"]["settings"]


def test_the_first_pictures_alone(photos, detector, tmp_path):
    result = evaluate(config(photos, tmp_path, boxes=detector, limit=2))
    truth = json.loads((photos / "instances.json").read_text())
    truth["images"] = truth["images"][:2]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in (100, 101)]
    masks = json.loads((tmp_path / "result.masks.json").read_text())
    assert {mask["image_id"] for mask in masks} == {100, 101}
    np.testing.assert_allclose(list(result["ap"]["masks"].values()), theirs(truth, masks), atol=1e-12)
    assert "2 pictures (of 6)" in evaluation_text(result)


def test_the_published_figures_are_the_papers():
    """Every row of arXiv 2312.00863's tables of zero-shot mIoU and AP, typed again from the paper."""
    miou = """
        SAM 78.4 55.6 74.1 78.9 59.8 75.2
        MobileSAM 74.2 43.7 59.7 73.8 51.0 54.4
        SAM-MAE-Ti 74.7 43.3 65.8 73.8 50.6 65.3
        EfficientSAM-Ti 75.7 45.5 67.2 74.3 52.7 66.8
        EfficientSAM-S 76.9 50.0 69.8 75.4 56.2 68.7"""
    ap = """
        SAM 46.5 30.8 51.0 61.7 44.7 32.5 57.6 65.5
        MobileSAM 38.7 23.7 42.2 54.3 34.4 23.8 44.9 53.7
        FastSAM 37.9 23.9 43.4 50.0 34.5 24.6 46.2 50.8
        EfficientSAM-Ti 42.3 26.7 46.2 57.4 39.9 28.9 51.0 59.9
        EfficientSAM-S 44.4 28.4 48.3 60.1 42.3 30.8 54.0 62.3"""
    for table, printed in ((PUBLISHED_MIOU, miou), (PUBLISHED_AP, ap)):
        width = len(table.columns)
        rows = {line.split()[0]: tuple(map(float, line.split()[1:])) for line in printed.strip().splitlines()}
        assert table.rows == {name: {"COCO": row[:width], "LVIS": row[width:]} for name, row in rows.items()}


def change(detector: Path, folder: Path, **changes) -> Path:
    boxes = json.loads(detector.read_text())
    boxes[3] |= changes
    path = folder / "changed.json"
    path.write_text(json.dumps(boxes))
    return path


def test_what_is_wrong_is_said_before_anything_is_measured(photos, detector, tmp_path):
    def fails(match: str, **changes) -> None:
        with pytest.raises(SamiCacheError, match=match):
            evaluate(config(photos, tmp_path, **changes), lambda moment: pytest.fail("measured"))

    fails("prompt '0': expected box, or a number of clicks from 1 to 32", prompts=("box", "0"))
    fails("nothing to measure: give --prompts, or a detector's --boxes", prompts=())
    fails("answers no clicks: add box to --prompts", prompts=("1", "3"))
    fails("there is no folder", out=tmp_path / "none" / "x.json")
    fails("box 3: image_id 5 is none of the 6 images", boxes=change(detector, tmp_path, image_id=5))
    fails("category_id 0 is none of the 3 categories of .*, 2 to 90", boxes=change(detector, tmp_path, category_id=0))
    fails(r"expected bbox \[x, y, width, height\]", boxes=change(detector, tmp_path, bbox=[1, 2, math.nan, 4]))
    fails("expected a number as score", boxes=change(detector, tmp_path, score=None))
    fails("expected a list of boxes", boxes=photos / "instances.json")
    fails("not JSON", boxes=photos / "0.png")
    fails("needs the frequency", boxes=detector, metric="lvis")
    fails("metric is 'voc'", boxes=detector, metric="voc")
    (tmp_path / "result.masks.json").write_text("mine")
    fails("result.masks.json is there already: name another file with --out, or replace it with --overwrite", boxes=detector)
    assert (tmp_path / "result.masks.json").read_text() == "mine"


def test_the_command(photos, tmp_path):
    torch.manual_seed(4)
    checkpoint, out = tmp_path / "model.pt", tmp_path / "result.json"
    save_segment_anything(SegmentAnything(SegmentAnythingConfig(family="efficientsam", depth=1)), checkpoint)
    arguments = ["evaluate", "promptable", "--data", str(photos / "instances.json"), "--images", str(photos), "--out", str(out)]
    done = CliRunner().invoke(
        app, [*arguments, str(checkpoint), "--limit", "1", "--protocol", "sam", "--prompts", "box,1,1, 2", "--seed", "3"]
    )
    assert done.exit_code == 0, done.output
    assert "vit_t, family efficientsam, 1024 px" in done.stdout
    assert "Published by others" in done.stdout
    result = json.loads(out.read_text())
    assert [row["prompt"] for row in result["miou"]] == ["box", "1", "2"]
    assert result["protocol"]["name"] == "sam with seed 3"
    assert result["protocol"]["previous_mask"] is False
    assert "previous mask not prompted" in result["miou"][2]["settings"]  # a decoder of this family takes none
    assert len(result["model"]["weights_blake3"]) == 64
    done = CliRunner().invoke(app, [*arguments, "--baseline", "box", "--json", "--overwrite"])
    assert json.loads(done.stdout)["model"]["name"] == BOX_BASELINE
    for wrong in ([str(checkpoint), "--baseline", "box"], [], ["--baseline", "mean"]):
        failed = CliRunner().invoke(app, [*arguments, *wrong])
        assert isinstance(failed.exception, SamiCacheError)
        assert "or --baseline box" in str(failed.exception)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_leaves_nothing(photos, tmp_path, number, code):
    wait = (
        "import sys, time, pipelines.evaluate as stage, cli.main\n"
        "stage.measure_objects = lambda *_: (print('here', flush=True), time.sleep(60))\n"
        "cli.main.main()"
    )
    command = [sys.executable, "-c", wait, "evaluate", "promptable", "--baseline", "box", "--data", photos / "instances.json"]
    child = subprocess.Popen(
        [*map(str, command), "--images", str(photos), "--out", str(tmp_path / "result.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    time.sleep(0.1)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code
    assert "interrupted" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_answers_boxes_alone():
    box = BoxItself()
    box.set_image(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="boxes only"):
        box.answer(np.zeros((1, 1, 2)), np.ones((1, 1), np.int64))
