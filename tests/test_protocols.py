"""Evaluation protocols on masks made by hand: where the clicks go, which mask counts, what a number says of itself."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from sami_cache.errors import SamiCacheError
from sami_cache.inference.protocols import (
    PROTOCOLS,
    box_iou,
    box_to_mask,
    centre_point,
    change_protocol,
    choose_mask,
    farthest_point,
    find_protocol,
    mask_iou,
    next_click,
)
from sami_cache.prompts import tight_box, uniform_points


def two_squares() -> np.ndarray:
    """9 x 9 pixels in the middle left, 4 x 4 at the right."""
    mask = np.zeros((30, 40), bool)
    mask[10:19, 5:14] = True
    mask[2:6, 30:34] = True
    return mask


def test_points_of_a_mask():
    mask = two_squares()
    assert farthest_point(mask) == (9, 14)
    assert farthest_point(np.ones((5, 7), bool)) == (2, 2)  # the picture's edge is boundary too: not (0, 0), nor all alike
    assert farthest_point(np.pad([[True]], ((3, 0), (0, 4)))) == (0, 3)
    ring = np.ones((9, 9), bool)
    ring[1:8, 1:8] = False
    x, y = centre_point(ring)
    assert ring[y, x]
    assert centre_point(mask[8:21, :20]) == (9, 6)
    points = uniform_points(mask, 4000, np.random.default_rng(0))
    assert mask[points[:, 1], points[:, 0]].all()
    counts = np.zeros(mask.shape)
    np.add.at(counts, (points[:, 1], points[:, 0]), 1)
    assert counts[mask].min() > 15
    assert counts[mask].max() < 80
    np.testing.assert_array_equal(points[:3], uniform_points(mask, 3, np.random.default_rng(0)))


def test_farthest_point_is_as_far_as_any():
    rng = np.random.default_rng(1)
    for _ in range(30):
        canvas = Image.new("1", (50, 40))
        ImageDraw.Draw(canvas).polygon(rng.uniform(-5, 45, 8).tolist(), fill=1)
        mask = np.array(canvas)
        mask[20, 20] = True
        distance = np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]
        x, y = farthest_point(mask)
        assert distance[y, x] == distance.max()


def test_the_next_click_mends_the_largest_error():
    truth = two_squares()
    assert next_click("error-farthest", np.zeros_like(truth), truth) == ((9, 14), 1)
    assert next_click("error-centre", np.zeros_like(truth), truth) == ((9, 14), 1)
    # The large square found: the small one is missing, and one pixel is too much.
    found = truth.copy()
    found[2:6, 30:34] = False
    found[0, 0] = True
    (x, y), label = next_click("error-farthest", found, truth)
    assert label == 1
    assert 30 <= x < 34
    assert 2 <= y < 6
    # Far too much: a negative click in it.
    found[20:30] = True
    (x, y), label = next_click("error-centre", found, truth)
    assert label == 0
    assert x in (19, 20)
    assert y in (24, 25)
    # Nothing wrong: the object.
    assert next_click("error-farthest", truth, truth) == ((9, 14), 1)
    # Many small errors together are no large one.
    speckled = truth.copy()
    speckled[::2, 16:29:2] = True
    speckled[2:6, 30:34] = False
    assert next_click("error-farthest", speckled, truth)[1] == 1


def test_boxes_and_overlaps():
    mask = two_squares()
    assert tight_box(mask) == (5, 2, 34, 19)
    assert tight_box(np.zeros((3, 3), bool)) == (0, 0, 0, 0)
    assert box_to_mask((5, 10, 14, 19), 30, 40).sum() == 81
    assert box_to_mask((4.6, 9.5, 13.4, 19.2), 30, 40)[10, 5]
    assert not box_to_mask((4.6, 9.51, 13.4, 19.2), 30, 40)[9, 5]
    assert box_to_mask((-5, -5, 3, 2), 30, 40).sum() == 6
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0
    assert mask_iou(mask, mask) == 1
    assert mask_iou(mask, ~mask) == 0
    assert mask_iou(mask & False, mask & False) == 0
    assert mask_iou(mask, box_to_mask((5, 10, 14, 19), 30, 40)) == pytest.approx(81 / 97)


def test_which_mask_counts():
    truth = two_squares()
    square, small = box_to_mask((5, 10, 14, 19), 30, 40), box_to_mask((30, 2, 34, 6), 30, 40)
    diagonal = np.zeros_like(truth)
    diagonal[np.arange(2, 19), np.linspace(5, 33, 17).astype(int)] = True
    masks = [np.ones_like(truth), small, square, diagonal]
    predicted, box = np.array([0.99, 0.7, 0.2, 0.3]), tight_box(truth)
    asked: list[int] = []

    def decode(token: int) -> np.ndarray:
        asked.append(token)
        return masks[token]

    assert choose_mask("single", predicted, decode)[0] == 0
    assert choose_mask("confident", predicted, decode)[0] == 1
    assert asked == [0, 1]  # and no mask more
    assert choose_mask("oracle", predicted, decode, truth=truth)[0] == 2
    assert choose_mask("box", predicted, decode, box=box)[0] == 2  # the most of the box's pixels
    token, mask = choose_mask("tight-box", predicted, decode, box=box)  # a thin thing that spans the box
    assert token == 3
    assert mask is diagonal
    for rule in ("oracle", "box", "tight-box"):
        with pytest.raises(ValueError, match="needs"):
            choose_mask(rule, predicted, decode)


def test_protocols_say_what_a_number_is_under():
    assert find_protocol("efficientsam").settings("box") == "mask confident, boxes tight, crowd dropped"
    assert find_protocol("efficientsam").settings("3") == (
        "mask confident, first point uniform, next uniform, seed 0, crowd dropped"
    )
    assert find_protocol("sam").settings("1") == "mask confident, first point farthest, crowd dropped"
    assert find_protocol("sam").settings("5") == (
        "mask single, first point farthest, next error-farthest, previous mask prompted, crowd dropped"
    )
    changed = change_protocol(PROTOCOLS["sam"], mask="oracle", crowd=True, seed=None)
    assert changed.name == "sam with mask oracle, crowd True"
    assert (changed.box_mask, changed.clicks_mask, changed.detection_mask) == ("oracle", "oracle", "confident")
    boxes = change_protocol(PROTOCOLS["sam"], mask="tight-box")
    assert (boxes.box_mask, boxes.detection_mask, boxes.click_mask) == ("tight-box", "tight-box", "confident")
    assert change_protocol(PROTOCOLS["sam"], mask=None, seed=None) is PROTOCOLS["sam"]
    with pytest.raises(SamiCacheError, match="protocol 'paper' is unknown: expected one of efficientsam, sam"):
        find_protocol("paper")
    with pytest.raises(SamiCacheError, match="first_point is 'middle': expected one of uniform, farthest"):
        change_protocol(PROTOCOLS["sam"], mask=None, first_point="middle")
    with pytest.raises(SamiCacheError, match="click_mask is box: a click comes with no box"):
        replace(PROTOCOLS["sam"], click_mask="box")
    with pytest.raises(SamiCacheError, match="detection_mask is oracle"):
        replace(PROTOCOLS["sam"], detection_mask="oracle")
