"""Everything mode: the masks of segment-anything's generator and of transformers' pipeline, at a bounded size."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from photos import picture
from promptable import Trio, trio

from sami_cache.errors import ImageError, SamiCacheError
from sami_cache.inference import mask_generator
from sami_cache.inference.mask_generation import MaskGenerationPipeline
from sami_cache.inference.mask_generator import MaskGenerator, MaskGeneratorConfig
from sami_cache.inference.predictor import SamPredictor
from sami_cache.inference.regions import remove_small_regions
from sami_cache.inference.rle import decode_mask
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig

SIZE = 128
# Random masks are ragged: the usual thresholds would leave none.
SETTINGS: dict[str, Any] = {
    "points_per_side": 5,
    "pred_iou_thresh": 0.5,
    "stability_score_thresh": 0.5,
    "stability_score_offset": 0.2,
    "box_nms_thresh": 0.9,
    "crop_nms_thresh": 0.9,
}


@pytest.fixture(scope="module")
def models() -> Trio:
    return trio(SIZE)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.asarray(picture("chelsea").resize((360, 240)))


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function of OpenCV that segment-anything uses, by scikit-image."""
    from skimage.measure import label

    def components(mask: np.ndarray, connectivity: int):
        regions, count = label(mask, connectivity=connectivity // 4, return_num=True)
        stats = np.zeros((count + 1, 5), np.int32)
        stats[:, -1] = np.bincount(regions.ravel(), minlength=count + 1)
        return count + 1, regions, stats, None

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(connectedComponentsWithStats=components))


def both(models: Trio, photo: np.ndarray, **changes: Any) -> tuple[list[dict], list[dict]]:
    from segment_anything import SamAutomaticMaskGenerator

    settings = SETTINGS | {"output_mode": "binary_mask"} | changes
    ours = MaskGenerator(SamPredictor(models.ours, queries_at_once=7), MaskGeneratorConfig(**settings))
    return ours.generate(photo), SamAutomaticMaskGenerator(models.meta, **settings).generate(photo)


def assert_equal(ours: list[dict], theirs: list[dict]) -> None:
    assert [list(mask) for mask in ours] == [list(mask) for mask in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine["segmentation"], other["segmentation"])
        for exact in ("area", "bbox", "point_coords", "crop_box"):
            assert mine[exact] == other[exact]
        assert mine["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
        assert mine["stability_score"] == pytest.approx(np.nan_to_num(other["stability_score"]), abs=1e-6)  # NaN for no pixel


CASES = {
    "filters": {},
    "the usual overlap": {"box_nms_thresh": 0.7},
    "stability alone": {"pred_iou_thresh": 0.0, "stability_score_offset": 0.2},
    "estimates alone": {"stability_score_thresh": 0.0},
    "nothing is good enough": {"pred_iou_thresh": 1.0, "stability_score_thresh": 1.0},
    "crops": {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_masks_are_those_of_segment_anything(models: Trio, photo: np.ndarray, case: str) -> None:
    ours, theirs = both(models, photo, **CASES[case])
    assert_equal(ours, theirs)
    assert (len(theirs) > 4) == (case != "nothing is good enough")
    if case == "crops":
        assert len({tuple(mask["crop_box"]) for mask in theirs}) > 1


def test_small_regions_go_as_in_segment_anything(models: Trio, photo: np.ndarray, opencv: None) -> None:
    ours, theirs = both(models, photo, min_mask_region_area=40)
    assert_equal(ours, theirs)
    as_they_were = both(models, photo)[0]
    assert [mask["area"] for mask in ours] != [mask["area"] for mask in as_they_were]


def test_regions_are_mended_as_by_opencv(opencv: None) -> None:
    from segment_anything.utils.amg import remove_small_regions as theirs

    noise = np.random.default_rng(0).normal(size=(5, 60, 70))
    smooth = sum(np.roll(noise, (y, x), (1, 2)) for y in range(3) for x in range(3))
    masks = [*(smooth > 0), np.zeros((60, 70), bool), np.ones((60, 70), bool), np.eye(30, dtype=bool)]
    for mask in masks:
        for area in (1, 12, 100, 10_000):
            filled, one = theirs(mask, area, "holes")
            expected, other = theirs(filled, area, "islands")
            found, changed = remove_small_regions(mask, area)
            assert np.array_equal(found, expected)
            assert changed == (one or other)


def test_output_modes_hold_the_same_masks(models: Trio, photo: np.ndarray) -> None:
    import pycocotools.mask

    by_mode = {
        mode: MaskGenerator(SamPredictor(models.ours), MaskGeneratorConfig(**SETTINGS, output_mode=mode)).generate(photo)
        for mode in ("coco_rle", "uncompressed_rle", "binary_mask")
    }
    json.dumps([by_mode["coco_rle"], by_mode["uncompressed_rle"]])
    for coco, runs, mask in zip(*by_mode.values(), strict=True):
        pixels = mask["segmentation"]
        assert np.array_equal(pycocotools.mask.decode(coco["segmentation"]), pixels)
        assert np.array_equal(decode_mask(coco["segmentation"]), pixels)
        assert (
            pycocotools.mask.frPyObjects(runs["segmentation"], *pixels.shape)["counts"].decode()
            == coco["segmentation"]["counts"]
        )
        assert mask["area"] == pixels.sum()


def test_only_a_few_masks_are_enlarged_at_once_and_no_bad_ones(
    models: Trio, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = {"stability_score_offset": 2.0, "stability_score_thresh": 0.01}
    expected = both(models, photo, **cut)[0]
    enlarged = []
    to_picture = models.ours.to_picture
    monkeypatch.setattr(
        models.ours, "to_picture", lambda logits, *size: enlarged.append(len(logits)) or to_picture(logits, *size)
    )
    monkeypatch.setattr(mask_generator, "VALUES_AT_ONCE", 2 * photo.shape[0] * photo.shape[1])
    assert_equal(both(models, photo, **cut)[0], expected)
    assert max(enlarged) == 2
    enlarged.clear()
    monkeypatch.setattr(mask_generator, "VALUES_AT_ONCE", 1)  # less than one mask
    assert_equal(both(models, photo, **cut)[0], expected)
    assert max(enlarged) == 1
    # 25 queries have 75 masks; those of a low estimate are left out, and those that stay below the cut.
    count = sum(enlarged)
    assert count == sum(estimate > 0.5 and peak > 2 for estimate, peak in answers(models, photo))
    assert 10 < count < 70


def answers(models: Trio, photo: np.ndarray) -> list[tuple[float, float]]:
    """Of every mask that the grid's points give: predicted IoU and highest logit."""
    predictor = SamPredictor(models.ours)
    predictor.set_image(photo)
    y, x = (np.mgrid[:5, :5] + 0.5) / 5 * np.array(photo.shape[:2])[:, None, None]
    _, iou, low_res = predictor.predict_batch(np.stack([x, y], -1).reshape(25, 1, 2), np.ones((25, 1)))
    return list(zip(iou.ravel(), low_res.max(axis=(2, 3)).ravel(), strict=True))


def test_masks_that_stay_below_the_cut_are_never_enlarged(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SegmentAnything(
        SegmentAnythingConfig(family="sam", encoder="vit_t", depth=1, image_size=64)
    ).eval()  # logits near 0

    def refuse(*_: Any) -> None:
        raise AssertionError("enlarged")

    monkeypatch.setattr(model, "to_picture", refuse)
    config = MaskGeneratorConfig(points_per_side=2, pred_iou_thresh=0)
    assert MaskGenerator(SamPredictor(model), config).generate(photo) == []
    with pytest.raises(AssertionError, match="enlarged"):
        MaskGenerator(SamPredictor(model), replace(config, stability_score_thresh=0)).generate(photo)


def test_efficientsam_has_an_everything_mode_too(photo: np.ndarray) -> None:
    torch.manual_seed(0)
    model = SegmentAnything(SegmentAnythingConfig(family="efficientsam", encoder="vit_t", depth=1, image_size=64)).eval()
    config = MaskGeneratorConfig(points_per_side=3, pred_iou_thresh=0, stability_score_thresh=0, output_mode="binary_mask")
    predictor = SamPredictor(model)
    found = MaskGenerator(predictor, config).generate(photo)
    assert found
    assert not predictor.is_image_set
    predictor.set_image(photo)
    best = found[0]
    masks, iou, _ = predictor.predict(best["point_coords"], [1])
    index = int(np.argmin(abs(iou - best["predicted_iou"])))
    assert np.array_equal(masks[index], best["segmentation"])


def test_the_pipeline_gives_the_masks_of_transformers(models: Trio, photo: np.ndarray, tmp_path) -> None:
    from PIL import Image
    from transformers import MaskGenerationPipeline as Reference
    from transformers import SamImageProcessorPil

    sides = {"size": {"longest_edge": SIZE}, "pad_size": {"height": SIZE, "width": SIZE}}
    theirs = Reference(model=models.hugging_face, image_processor=SamImageProcessorPil(**sides))
    settings = {name: SETTINGS[name] for name in ("pred_iou_thresh", "stability_score_thresh", "stability_score_offset")}
    expected = theirs(Image.fromarray(photo), points_per_batch=64, points_per_crop=5, **settings, crops_nms_thresh=0.9)
    generator = MaskGenerationPipeline(models.ours, points_per_side=5, box_nms_thresh=0.9, **settings)
    Image.fromarray(photo).save(tmp_path / "cat.png")
    of_path, of_array = generator([tmp_path / "cat.png", photo])
    under_their_names = MaskGenerationPipeline(models.ours, crops_nms_thresh=0.9, **settings)(photo, points_per_crop=5)
    for found in (generator(Image.fromarray(photo), points_per_batch=64), of_path, of_array, under_their_names):
        assert sorted(found) == ["masks", "scores"]
        torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-5, rtol=0)
        assert len(found["masks"]) == len(expected["masks"]) > 5
        for mine, other in zip(found["masks"], expected["masks"], strict=True):
            assert mine.dtype == bool
            assert np.array_equal(mine, np.asarray(other))
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ImageError, match="not an image"):
        generator(tmp_path / "text.jpg")
    with pytest.raises(
        SamiCacheError, match=r"points_per_row is no setting of mask generation: expected one of .*points_per_crop"
    ):
        generator(photo, points_per_row=5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"points_per_side": 0}, "points_per_side is 0: expected 1 or more"),
        ({"pred_iou_thresh": 1.5}, "pred_iou_thresh is 1.5: expected 0 to 1"),
        ({"stability_score_thresh": float("nan")}, "stability_score_thresh is nan"),
        ({"stability_score_offset": -1}, "stability_score_offset is -1"),
        ({"crop_n_layers": -1}, "crop_n_layers is -1"),
        ({"points_per_side": 4, "crop_n_layers": 3, "crop_n_points_downscale_factor": 2}, "no point is left in layer 3"),
        ({"output_mode": "png"}, "expected coco_rle, uncompressed_rle or binary_mask"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(SamiCacheError, match=reason):
        MaskGeneratorConfig(**settings)


def test_what_is_no_picture_is_refused(models: Trio) -> None:
    for wrong in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(SamiCacheError, match=r"expected a picture as uint8 \[H, W, 3\]"):
            MaskGenerator(SamPredictor(models.ours)).generate(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sam", "efficientsam"])
def test_everything_in_twelve_megapixels_stays_under_three_gigabytes(family: str) -> None:
    """Libraries and model included, every mask enlarged; what the kernel says of the child that did it."""
    script = Path(__file__).parent.parent / "benchmarks" / "everything_memory.py"
    with subprocess.Popen([sys.executable, script, "--family", family, "--points-per-side", "4"]) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert 1 << 19 < used.ru_maxrss < 3 * 10**9 / 1024  # KiB; less than half a GiB would not have been the child's
