"""The predictor: photo and prompts to masks as segment-anything and transformers do it; and prompts that cannot be meant."""

import numpy as np
import pytest
import torch
from photos import picture
from promptable import Trio, trio

from sami_cache.errors import SamiCacheError
from sami_cache.inference.predictor import SamPredictor
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig

SIZE = 256
PROMPTS = {
    "a point": {"point_coords": [[300, 200]], "point_labels": [1]},
    "points": {"point_coords": [[300, 200], [10.5, 399], [0, 0]], "point_labels": [1, 0, 1]},
    "a box": {"box": [100, 50, 420.5, 300]},
    "a box and points": {"point_coords": [[300, 200], [150, 60]], "point_labels": [1, 0], "box": [100, 50, 420, 300]},
}


@pytest.fixture(scope="module")
def models() -> Trio:
    return trio(SIZE)


def photo(name: str, *, tall: bool = False) -> np.ndarray:
    pixels = np.asarray(picture(name))
    return np.ascontiguousarray(pixels.transpose(1, 0, 2)) if tall else pixels


def reference(models: Trio, pixels: np.ndarray):
    from segment_anything import SamPredictor as Reference

    predictor = Reference(models.meta)
    predictor.set_image(pixels)
    return predictor


def assert_close(ours: tuple, theirs: tuple) -> None:
    """Masks as logits, predicted IoU and low-resolution logits within 1e-3, as are trained models' own; and the same order."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == np.float32
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=1e-3, rtol=0)
    assert np.array_equal(np.argsort(ours[1], axis=-1), np.argsort(theirs[1], axis=-1))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("multimask", [True, False], ids=["three masks", "one"])
def test_a_photo_and_a_prompt_give_the_masks_of_segment_anything(models: Trio, prompt: str, multimask: bool) -> None:
    pixels = photo("coffee")
    ours = SamPredictor(models.ours)
    ours.set_image(pixels)
    asked = {name: np.array(value) for name, value in PROMPTS[prompt].items()} | {"multimask_output": multimask}
    theirs = reference(models, pixels)
    expected = theirs.predict(**asked, return_logits=True)
    assert expected[2].std() > 1  # logits of a size at which a thousandth is little
    assert_close(ours.predict(**asked, return_logits=True), expected)
    masks = ours.predict(**asked)[0]
    assert masks.dtype == bool
    assert (masks != theirs.predict(**asked)[0]).mean() < 1e-4


def test_an_answer_is_a_prompt_again_with_and_without_others(models: Trio) -> None:
    pixels = photo("astronaut")
    ours, theirs = SamPredictor(models.ours), reference(models, pixels)
    ours.set_image(pixels)
    first = ours.predict([[100, 100]], [1])[2][:1]
    for asked in (
        {},
        {"box": np.array([10, 10, 300, 300])},
        {"point_coords": np.array([[5, 5]]), "point_labels": np.array([0])},
    ):
        expected = theirs.predict(**asked, mask_input=first, return_logits=True)
        assert_close(ours.predict(**asked, mask_input=first, return_logits=True), expected)
        without = theirs.predict(**asked, return_logits=True) if asked else expected
        assert not asked or abs(expected[0] - without[0]).max() > 0.01


@pytest.mark.parametrize(("name", "tall"), [("astronaut", False), ("chelsea", True)], ids=["square", "tall"])
def test_a_photo_and_prompts_give_the_masks_of_transformers(models: Trio, name: str, tall: bool) -> None:
    from transformers import SamImageProcessorPil, SamProcessor

    sides = {"size": {"longest_edge": SIZE}, "pad_size": {"height": SIZE, "width": SIZE}}
    processor = SamProcessor(SamImageProcessorPil(**sides))
    processor.target_size = SIZE  # it takes the points to this side, whatever the pictures' is
    pixels = photo(name, tall=tall)
    points = [[[50, 70], [200, 150]], [[120.5, 290], [30, 31]]]
    inputs = processor(pixels, input_points=[points], input_labels=[[[1, 0], [1, 1]]], return_tensors="pt")
    inputs["input_points"] = inputs["input_points"].float()
    with torch.no_grad():
        answer = models.hugging_face(**inputs)
    masks = processor.image_processor.post_process_masks(
        answer.pred_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        binarize=False,
        pad_size={"height": SIZE, "width": SIZE},
    )[0]
    ours = SamPredictor(models.ours)
    ours.set_image(pixels)
    mine = ours.predict_batch(points, [[1, 0], [1, 1]], return_logits=True)
    assert_close(mine, (masks.numpy(), answer.iou_scores[0].numpy(), answer.pred_masks[0].numpy()))


@pytest.mark.parametrize("family", ["sam", "efficientsam"])
def test_many_queries_in_parts_of_any_size_answer_as_one_by_one(family: str) -> None:
    torch.manual_seed(1)
    model = SegmentAnything(SegmentAnythingConfig(family=family, encoder="vit_t", depth=1, image_size=64)).eval()
    points = np.random.default_rng(0).uniform(0, 300, (7, 2, 2))
    labels = np.array([[1, 0]] * 6 + [[1, -1]])
    boxes = np.array([[10, 20, 200 + index, 240] for index in range(7)])
    predictors = [SamPredictor(model, queries_at_once=count) for count in (1, 3, 16)]
    for predictor in predictors:
        predictor.set_image(photo("chelsea")[:, :320])
    for given in ((points, labels), (None, None, boxes), (points, labels, boxes)):
        answers = [predictor.predict_batch(*given, multimask_output=False, return_logits=True) for predictor in predictors]
        assert answers[0][0].shape == (7, 1, 300, 320)
        assert np.ptp(answers[0][0], axis=0).max() > 1e-3  # the queries differ
        for answer in answers[1:]:
            for one, other in zip(answers[0], answer, strict=True):
                np.testing.assert_allclose(other, one, atol=1e-5)
    single = predictors[0].predict(points[2], labels[2], boxes[2], multimask_output=False, return_logits=True)
    np.testing.assert_allclose(single[0], answers[0][0][2], atol=1e-6)


def test_the_picture_is_encoded_once_and_forgotten_when_asked(models: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = models.ours.encode
    monkeypatch.setattr(models.ours, "encode", lambda pixels: encoded.append(1) or encode(pixels))
    predictor = SamPredictor(models.ours)
    with pytest.raises(SamiCacheError, match=r"no picture is set: call set_image"):
        predictor.predict([[1, 1]], [1])
    predictor.set_image(photo("astronaut"))
    for _ in range(3):
        predictor.predict([[1, 1]], [1])
    assert len(encoded) == 1
    assert predictor.original_size == (512, 512)
    assert not predictor.get_image_embedding().requires_grad
    predictor.reset_image()
    assert not predictor.is_image_set
    with pytest.raises(SamiCacheError, match="no picture is set"):
        predictor.predict([[1, 1]], [1])
    with pytest.raises(SamiCacheError, match=r"uint8 \[H, W, 3\], got float64"):
        predictor.set_image(photo("astronaut") / 255)


@pytest.fixture
def asked(models: Trio) -> SamPredictor:
    predictor = SamPredictor(models.ours)
    predictor.set_image(photo("coffee"))
    return predictor


BAD = {
    "none": ({}, "no prompt at all: expected points"),
    "points without labels": ({"point_coords": [[1, 1]]}, "points and labels go together"),
    "labels without points": ({"point_labels": [1], "box": [1, 1, 5, 5]}, "points and labels go together"),
    "outside": (
        {"point_coords": [[1, 1], [600, 5]], "point_labels": [1, 1]},
        r"^point 1: \(600, 5\) lies outside .* 600 x 400",
    ),
    "above": ({"point_coords": [[1, -0.5]], "point_labels": [1]}, r"point 0: \(1, -0.5\) lies outside"),
    "NaN": ({"point_coords": [[float("nan"), 1]], "point_labels": [1]}, r"point 0: \(nan, 1\) is no place"),
    "endless": ({"point_coords": [[1, float("inf")]], "point_labels": [1]}, r"\(1, inf\) is no place"),
    "label": ({"point_coords": [[1, 1]], "point_labels": [2]}, r"point 0: label 2: expected 1 \(inside\), 0"),
    "NaN label": ({"point_coords": [[1, 1]], "point_labels": [float("nan")]}, "label nan: expected 1"),
    "half a label": ({"point_coords": [[1, 1]], "point_labels": [0.5]}, "label 0.5: expected 1"),
    "text": ({"point_coords": [["a", 1]], "point_labels": [1]}, "points: expected numbers"),
    "a flat point": ({"point_coords": [1, 1], "point_labels": [1]}, r"points: expected \[queries, points, 2\]"),
    "ragged": ({"point_coords": [[1, 1], [1]], "point_labels": [1, 1]}, "points: expected numbers"),
    "labels of others": ({"point_coords": [[1, 1]], "point_labels": [1, 0]}, r"labels: expected one for each of \[1, 1\]"),
    "empty box": ({"box": [10, 10, 10, 50]}, r"^box \(10, 10, 10, 50\) is empty: expected x0 y0 x1 y1"),
    "turned box": ({"box": [10, 50, 20, 10]}, "is empty"),
    "NaN box": ({"box": [10, 10, float("nan"), 50]}, "is no box: expected finite"),
    "far box": ({"box": [10, 10, 602, 50]}, r"leaves the picture, which is 600 x 400 .*x from 0 to 600"),
    "short box": ({"box": [10, 10, 60]}, r"boxes: expected \[queries, 4\]"),
    "nothing but padding": ({"point_coords": [[0, 0]], "point_labels": [-1]}, "every label is -1"),
    "no points": ({"point_coords": np.zeros((0, 2)), "point_labels": []}, "no prompt at all"),
    "another mask": ({"mask_input": np.zeros((1, 32, 32))}, r"mask_input: expected .*\[1, 64, 64\] a query, found"),
    "NaN mask": ({"mask_input": np.full((1, 64, 64), np.nan)}, "finite logits"),
}


@pytest.mark.parametrize("case", BAD)
def test_prompts_that_cannot_be_meant_are_refused_with_the_reason(asked: SamPredictor, case: str) -> None:
    prompts, reason = BAD[case]
    with pytest.raises(SamiCacheError, match=reason):
        asked.predict(**prompts)


def test_of_many_queries_the_wrong_one_is_named(asked: SamPredictor) -> None:
    points = np.full((3, 2, 2), 5.0)
    points[2, 1] = [5, 400]
    with pytest.raises(SamiCacheError, match=r"^query 2, point 1: \(5, 400\) lies outside"):
        asked.predict_batch(points, np.ones((3, 2)))
    with pytest.raises(SamiCacheError, match=r"^query 1, box \(5, 5, 5, 6\) is empty"):
        asked.predict_batch(boxes=[[1, 1, 2, 2], [5, 5, 5, 6]])
    with pytest.raises(SamiCacheError, match="2 boxes for 3 queries"):
        asked.predict_batch(np.ones((3, 1, 2)), np.ones((3, 1)), [[1, 1, 2, 2]] * 2)
    with pytest.raises(SamiCacheError, match="there are no queries"):
        asked.predict_batch(np.zeros((0, 1, 2)), np.zeros((0, 1)))
    with pytest.raises(SamiCacheError, match="mask_inputs: 2 for 1 queries"):
        asked.predict_batch([[[1, 1]]], [[1]], mask_inputs=np.zeros((2, 1, 64, 64)))


def test_edges_count_as_inside_and_boxes_may_leave_by_rounding(asked: SamPredictor) -> None:
    asked.predict([[0, 0], [599.9, 399.9]], [1, True], box=[0, 0, 600.4, 400])
    # What no point is does not matter.
    unused = asked.predict([[5, 5], [-7, np.nan]], [1, -1], return_logits=True)[0]
    np.testing.assert_array_equal(unused, asked.predict([[5, 5], [0, 0]], [1, -1], return_logits=True)[0])


def test_calls_of_segment_anythings_examples(asked: SamPredictor) -> None:
    box = np.array([10, 20, 300, 310])
    np.testing.assert_array_equal(asked.predict(box=box[None, :])[0], asked.predict(box=box)[0])
    image = photo("chelsea")
    predictors = [SamPredictor(asked.model) for _ in range(2)]
    predictors[0].set_image(image)
    predictors[1].set_image(image[..., ::-1], "BGR")
    np.testing.assert_array_equal(*(each.get_image_embedding().numpy() for each in predictors))
    with pytest.raises(SamiCacheError, match="image_format is 'GRB'"):
        asked.set_image(image, "GRB")  # type: ignore[arg-type]
    asked.set_image(photo("coffee"))


def test_efficientsam_takes_six_points_and_no_mask() -> None:
    model = SegmentAnything(SegmentAnythingConfig(family="efficientsam", encoder="vit_t", depth=1, image_size=64)).eval()
    predictor = SamPredictor(model)
    predictor.set_image(photo("chelsea"))
    masks, iou, low_res = predictor.predict([[5, 5]] * 4, [1] * 4, box=[0, 0, 50, 60])
    assert (masks.shape, iou.shape, low_res.shape) == ((3, 300, 451), (3,), (3, 16, 16))
    # What is no point has no place, wherever it is said to be; fewer than six are filled up with just that.
    alone = predictor.predict([[5, 5]], [1], return_logits=True)[0]
    for nowhere in ([0, 0], [400, 200], [np.nan, 3]):
        np.testing.assert_array_equal(predictor.predict([[5, 5], nowhere], [1, -1], return_logits=True)[0], alone)
    with pytest.raises(SamiCacheError, match="7 points in a query"):
        predictor.predict([[5, 5]] * 5, [1] * 5, box=[0, 0, 50, 60])
    with pytest.raises(SamiCacheError, match="family efficientsam takes no mask"):
        predictor.predict([[5, 5]], [1], mask_input=np.zeros((1, 16, 16)))
