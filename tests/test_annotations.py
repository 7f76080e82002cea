"""COCO-format and SA-1B annotations, against pycocotools, on files that the tests write."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as oracle
from pycocotools.coco import COCO

from sami_cache.data.annotations import open_annotations
from sami_cache.errors import SamiCacheError

WIDTH, HEIGHT = 61, 47


def blob(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (x - rng.integers(10, 50)) ** 2 / 90 + (y - rng.integers(10, 40)) ** 2 / 60 < rng.uniform(0.5, 2)


def plain_counts(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F").astype(np.int8)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return runs if not flat[0] else [0, *runs]


def compressed(mask: np.ndarray) -> dict:
    rle = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def entry(number: int, segmentation, **more) -> dict:
    return {"id": number, "image_id": 7, "category_id": 3, "segmentation": segmentation, **more}


def coco_file(folder, annotations: list[dict]):
    (folder / "images").mkdir(exist_ok=True)
    images = [
        {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "b.png", "width": 8, "height": 6},
    ]
    rng = np.random.default_rng(0)
    for image in images:
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}))
    return path


POLYGONS = [
    [[3.2, 4.1, 40.7, 6.3, 33.0, 30.5, 5.5, 44.9]],
    [[1, 1, 20, 2, 15, 18], [30.0, 30.0, 60.9, 33.3, 44.4, 46.9, 31.2, 40.1]],
    [[-5.0, -3.0, 70.0, 10.0, 20.0, 60.0]],
]


def test_masks_are_pycocotools_masks(tmp_path):
    segmentations = [*POLYGONS, compressed(blob(1)), {"size": [HEIGHT, WIDTH], "counts": plain_counts(blob(2))}]
    boxes = {"bbox": [1.5, 2.0, 30.0, 20.25], "area": 312.6}
    path = coco_file(tmp_path, [entry(n, s, iscrowd=int(n == 4), **boxes) for n, s in enumerate(segmentations)])
    annotations = open_annotations(path, tmp_path / "images")
    assert annotations.keys == ["a.png", "b.png"]
    assert len(annotations) == 2
    theirs = COCO(str(path))
    for mine, annotation in zip(annotations.objects(0), theirs.anns.values(), strict=True):
        want = theirs.annToMask(annotation).astype(bool)
        assert mine.mask().dtype == bool
        assert np.array_equal(mine.mask(), want)
        assert want.any()
    mine = annotations.objects(0)[4]
    assert (mine.crowd, mine.category, mine.annotation_id, mine.image_id, mine.area) == (True, 3, 4, 7, 313)
    assert mine.box == (1.5, 2.0, 31.5, 22.25)
    assert np.array_equal(mine.mask(), blob(2))
    assert [one.crowd for one in annotations.objects(0)] == [False] * 4 + [True]
    assert annotations.objects(1) == []
    assert annotations.read_image(1).shape == (6, 8, 3)
    assert np.array_equal(annotations.read_image(0), np.array(Image.open(tmp_path / "images" / "a.png")))


def test_what_the_file_does_not_say_is_counted(tmp_path):
    path = coco_file(tmp_path, [{"id": 1, "image_id": 7, "segmentation": compressed(blob(3))}])
    (found,) = open_annotations(path, tmp_path / "images").objects(0)
    rows, columns = np.nonzero(blob(3))
    assert found.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert found.area == blob(3).sum()
    assert found.category is None
    assert not found.crowd


def test_sa1b(tmp_path):
    for number in (12, 3):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(tmp_path / f"sa_{number}.jpg")
        image = {"image_id": number, "width": WIDTH, "height": HEIGHT, "file_name": f"sa_{number}.jpg"}
        objects = [
            {
                "id": 500 + number,
                "segmentation": compressed(blob(number)),
                "bbox": [1.0, 2.0, 3.0, 4.0],
                "area": int(blob(number).sum()),
                "predicted_iou": 0.9,
                "stability_score": 0.97,
                "crop_box": [0, 0, WIDTH, HEIGHT],
                "point_coords": [[5.0, 5.0]],
            }
        ]
        (tmp_path / f"sa_{number}.json").write_text(json.dumps({"image": image, "annotations": objects}))
    annotations = open_annotations(tmp_path)
    assert annotations.keys == ["sa_12", "sa_3"]
    (found,) = annotations.objects(1)
    assert np.array_equal(found.mask(), blob(3))
    assert (found.image_id, found.annotation_id, found.category, found.crowd) == (3, 503, None, False)
    assert annotations.read_image(0)[0, 0, 0] > annotations.read_image(1)[0, 0, 0]


BROKEN = {
    "nan": ([[1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]], "expected polygons"),
    "odd": ([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], "expected polygons"),
    "two points": ([[1.0, 2.0, 3.0, 4.0]], "expected polygons"),
    "text": ([["a", 2, 3, 4, 5, 6]], "expected polygons"),
    "far away": ([[1.0, 2.0, 1e9, 4.0, 5.0, 6.0]], "far outside"),
    "size": ({"size": [WIDTH, HEIGHT], "counts": plain_counts(blob(1))}, r"expected run lengths of size \[47, 61\]"),
    "sum": ({"size": [HEIGHT, WIDTH], "counts": [5, 6]}, "add up to 47 x 61 pixels, found 11"),
    "negative": ({"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]}, "found -5"),
    "short": ({"size": [HEIGHT, WIDTH], "counts": compressed(blob(1))["counts"][:-3]}, "damaged segmentation"),
    "garbage": ({"size": [HEIGHT, WIDTH], "counts": "zzzzzzzz"}, "damaged segmentation"),
    "not ascii": ({"size": [HEIGHT, WIDTH], "counts": "\u20ac"}, "damaged segmentation"),
    "neither": ({"size": [HEIGHT, WIDTH]}, "expected run lengths as a list or a text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_segmentation_is_named(tmp_path, name):
    segmentation, message = BROKEN[name]
    path = coco_file(tmp_path, [entry(41, segmentation, bbox=[0, 0, 1, 1], area=1)])
    (found,) = open_annotations(path, tmp_path / "images").objects(0)
    with pytest.raises(SamiCacheError, match=f"instances.json: annotation 41: .*{message}"):
        found.mask()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": None}, "annotation 41: expected a segmentation"),
        ({"bbox": [1, 2, 3]}, r"annotation 41: expected bbox \[x, y, width, height\]"),
        ({"area": "big"}, "annotation 41: expected area"),
        ({"image_id": 8}, "annotation 41: image_id 8 is none of the file's 2 images"),
        ({"id": "x"}, "annotation x: expected a whole number as id"),
    ],
)
def test_a_bad_annotation_is_named(tmp_path, change, message):
    good = entry(41, compressed(blob(1)), bbox=[0, 0, 1, 1], area=1)
    path = coco_file(tmp_path, [good | change])
    with pytest.raises(SamiCacheError, match=message):
        open_annotations(path, tmp_path / "images").objects(0)


def test_bad_files(tmp_path):
    path = coco_file(tmp_path, [])
    with pytest.raises(SamiCacheError, match="give its pictures with --images"):
        open_annotations(path)
    with pytest.raises(SamiCacheError, match="holds no sa_"):
        open_annotations(tmp_path)
    with pytest.raises(SamiCacheError, match="does not exist: expected a COCO-format JSON"):
        open_annotations(tmp_path / "none.json", tmp_path)
    annotations = open_annotations(path, tmp_path / "images")
    Image.new("RGB", (5, 6)).save(tmp_path / "images" / "a.png")
    with pytest.raises(SamiCacheError, match=r"a\.png: its annotations are for 61x47 pixels, found 5x6"):
        annotations.read_image(0)
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(SamiCacheError, match=r"a\.png: not an image"):
        annotations.read_image(0)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(SamiCacheError, match=r"a\.png: annotated, but not there"):
        annotations.read_image(0)
    for text, message in (
        ("[1]", "expected an object"),
        ("{", "not JSON"),
        ('{"images": 3}', "a list of objects under 'images'"),
    ):
        path.write_text(text)
        with pytest.raises(SamiCacheError, match=message):
            open_annotations(path, tmp_path / "images")
    outside = {"id": 1, "file_name": "../a.png", "width": 5, "height": 5}
    path.write_text(json.dumps({"images": [outside], "annotations": []}))
    with pytest.raises(SamiCacheError, match="expected a file_name inside the folder"):
        open_annotations(path, tmp_path / "images")
