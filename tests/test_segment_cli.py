"""`sami-cache segment` as a user types it: the files it leaves, and what it says of prompts that cannot be meant."""

import json
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
from photos import picture
from PIL import Image

from cli.main import main
from sami_cache.inference.predictor import SamPredictor
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import load_segment_anything, save_segment_anything

SMALL = 128


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photo, the same photo as a phone held sideways stores it, and a model of each family."""
    home = tmp_path_factory.mktemp("segment")
    photo = picture("coffee").crop((0, 0, 300, 200))
    photo.save(home / "coffee.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    photo.transpose(Image.Transpose.ROTATE_90).save(home / "turned.png", exif=exif)
    for family in ("sam", "efficientsam"):
        torch.manual_seed(0)
        model = SegmentAnything(SegmentAnythingConfig(family=family, encoder="vit_t", depth=1))
        save_segment_anything(model, home / f"{family}.pt")
    return home


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights at SMALL pixels, which files do not tell and runs record."""
    monkeypatch.setattr("pipelines.segment.open_promptable", lambda path, device: load_segment_anything(path, image_size=SMALL))


@pytest.fixture
def segment(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["sami-cache", "segment", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def written(folder: Path) -> tuple[dict, list[np.ndarray], np.ndarray]:
    """masks.json, the PNGs it names (as bool), and the overlay. Both forms of a mask are the same one."""
    content = json.loads((folder / "masks.json").read_text())
    masks = []
    for annotation in content["annotations"]:
        pixels = np.asarray(Image.open(folder / annotation["file_name"]))
        assert set(np.unique(pixels)) <= {0, 255}
        masks.append(pixels == 255)
        assert np.array_equal(pycocotools.mask.decode(annotation["segmentation"]), masks[-1])
        assert annotation["area"] == masks[-1].sum()
        x, y, width, height = annotation["bbox"]
        assert [x, y, width + 1, height + 1] == pycocotools.mask.toBbox(annotation["segmentation"]).tolist()
    assert len(list(folder.glob("*.png"))) == len(masks)
    return content, masks, np.asarray(Image.open(folder / "overlay.jpg"))


def predictor(home: Path, family: str, image_size: int = SMALL) -> SamPredictor:
    found = SamPredictor(load_segment_anything(home / f"{family}.pt", image_size=image_size))
    found.set_image(np.asarray(Image.open(home / "coffee.png")))
    return found


def test_a_point_gives_the_mask_of_the_highest_estimate(home: Path, segment) -> None:
    code, out, err = segment("coffee.png", "--model", "sam.pt", "--point", "150,90.5")
    assert (code, err) == (0, "")
    assert "1 masks: coffee_masks/masks.json; look: coffee_masks/overlay.jpg" in out
    content, masks, overlay = written(home / "coffee_masks")
    assert content["image"] == {"image_id": 0, "file_name": "coffee.png", "height": 200, "width": 300}
    three, iou, _ = predictor(home, "sam", 1024).predict([[150, 90.5]], [1])
    assert np.array_equal(masks[0], three[iou.argmax()])
    assert content["annotations"][0]["predicted_iou"] == pytest.approx(iou.max())
    photo = np.asarray(Image.open(home / "coffee.png")).astype(int)
    changed = abs(overlay.astype(int) - photo).max(axis=2) > 60
    assert changed[85:96, 146:155].mean() > 0.5  # the point is drawn
    assert masks[0].any()


def test_points_that_leave_no_doubt_get_the_single_mask_and_all_three_on_request(home: Path, small: None, segment) -> None:
    asked = ("--point", "150,90", "--negative", "10,10", "--box", "20,30,250,180")
    given = {"point_coords": [[150, 90], [10, 10]], "point_labels": [1, 0], "box": [20, 30, 250, 180]}
    assert segment("coffee.png", "--model", "sam.pt", *asked, "--out", "one")[0] == 0
    assert np.array_equal(written(home / "one")[1][0], predictor(home, "sam").predict(**given, multimask_output=False)[0][0])
    for family in ("sam", "efficientsam"):
        assert segment("coffee.png", "--model", f"{family}.pt", *asked, "--all-masks", "--out", f"all_{family}")[0] == 0
        three, iou, _ = predictor(home, family).predict(**given)
        masks = written(home / f"all_{family}")[1]
        assert [mask.tolist() for mask in masks] == [three[index].tolist() for index in np.argsort(-iou)]


def test_several_boxes_are_a_query_each(home: Path, small: None, segment) -> None:
    boxes = [[10, 20, 100, 120], [50, 60, 300, 200]]
    options = [text for box in boxes for text in ("--box", ",".join(map(str, box)))]
    code, out, _ = segment("coffee.png", "--model", "efficientsam.pt", *options, "--out", "boxes")
    assert code == 0
    assert "2 masks" in out
    content, masks, _ = written(home / "boxes")
    assert [annotation["query"] for annotation in content["annotations"]] == [0, 1]
    for mask, box in zip(masks, boxes, strict=True):
        three, iou, _ = predictor(home, "efficientsam").predict(box=box)
        assert np.array_equal(mask, three[iou.argmax()])


def test_places_are_of_the_upright_picture(home: Path, small: None, segment) -> None:
    for name in ("coffee", "turned"):
        assert segment(f"{name}.png", "--model", "sam.pt", "--point", "290,10", "--out", f"{name}_up")[0] == 0
    upright, turned = written(home / "coffee_up"), written(home / "turned_up")
    assert turned[1][0].shape == (200, 300)
    assert np.array_equal(upright[1][0], turned[1][0])


def test_everything_is_written_as_sa_1b_has_it(home: Path, small: None, segment) -> None:
    options = ("--points-per-side", "2", "--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--out", "all")
    code, out, _ = segment("coffee.png", "--model", "efficientsam.pt", "--everything", *options)
    assert code == 0
    content, masks, _ = written(home / "all")
    assert masks
    assert set(content["annotations"][0]) >= {
        "id",
        "segmentation",
        "bbox",
        "area",
        "predicted_iou",
        "stability_score",
        "crop_box",
        "point_coords",
    }
    assert f"{len(masks)} masks" in out


def test_results_are_replaced_only_on_request(home: Path, small: None, segment) -> None:
    asked = ("coffee.png", "--model", "sam.pt", "--out", "again")
    assert segment(*asked, "--point", "5,5", "--all-masks")[0] == 0
    (home / "again" / "mask_of_mine.png").write_bytes(b"")
    code, _, err = segment(*asked, "--point", "5,5")
    assert code == 2
    assert "again holds masks.json of an earlier call: choose another --out, or replace it: --overwrite" in err
    assert segment(*asked, "--point", "5,5", "--overwrite")[0] == 0
    assert sorted(path.name for path in (home / "again").iterdir()) == [
        "mask_0000.png",
        "mask_of_mine.png",
        "masks.json",
        "overlay.jpg",
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "asked for nothing: give points or boxes"),
        (["--everything", "--point", "1,1"], "asked for both prompts and --everything"),
        (["--negative", "1,1"], "nothing but --negative points"),
        (["--point", "1,1", "--box", "1,1,5,5", "--box", "2,2,6,6"], "1 points and 2 boxes: several boxes are a query each"),
        (["--point", "300,5"], "point 0: (300, 5) lies outside the picture, which is 300 x 200 pixels"),
        (["--point", "-1,5"], "point 0: (-1, 5) lies outside the picture"),
        (["--point", "1,1", "--negative", "nan,5"], "point 1: (nan, 5) is no place: expected finite numbers"),
        (["--point", "1;5"], "--point '1;5': expected x,y in pixels, 2 numbers"),
        (["--negative", "1,5,1"], "--negative '1,5,1': expected x,y in pixels"),
        (["--box", "1,5,left,7"], "--box '1,5,left,7': expected x0,y0,x1,y1 in pixels"),
        (["--box", "10,10,10,20"], "box (10, 10, 10, 20) is empty"),
        (["--box", "10,10,20,20", "--box", "10,10,20,inf"], "query 1, box (10, 10, 20, inf) is no box"),
        (["--everything", "--points-per-side", "0"], "points_per_side is 0: expected 1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_prompts_are_told_before_the_model_is_opened(home: Path, segment, arguments: list[str], reason: str) -> None:
    code, _, err = segment("coffee.png", "--model", "none.pt", *arguments, "--out", "bad")
    assert code == 2
    assert err.startswith("sami-cache: ")
    assert reason in err
    assert err.count("\n") == 1
    assert not (home / "bad").exists()


def test_bad_pictures_and_models_are_told(home: Path, segment) -> None:
    (home / "text.jpg").write_text("no picture")
    torch.save({"weight": torch.zeros(3)}, home / "other.pt")
    for image, model, reason in (
        ("none.jpg", "sam.pt", "none.jpg: No such file or directory"),
        ("text.jpg", "sam.pt", "text.jpg: not an image: expected JPEG"),
        ("coffee.png", "none.pt", "no such file: none.pt"),
        ("coffee.png", "other.pt", "other.pt holds no whole promptable model"),
    ):
        code, _, err = segment(image, "--model", model, "--point", "1,1", "--out", "bad")
        assert code == 2
        assert reason in err
        assert not (home / "bad").exists()
