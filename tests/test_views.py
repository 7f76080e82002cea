"""Views cut pixels and features alike: the geometry is checked against coordinates, not against itself."""

import numpy as np
import pytest
import torch
from photos import picture
from PIL import Image

from sami_cache.data.views import (
    VIEW_DRAWS,
    View,
    ViewConfig,
    crop_embeddings,
    crop_image,
    crop_pixels,
    letterbox,
    random_view,
    resample_weights,
    valid_region,
)

SHAPES = [(640, 480), (480, 640), (1200, 200), (90, 1400), (300, 300), (333, 77), (3000, 100)]


def coordinate_map(cells_y: int, cells_x: int) -> torch.Tensor:
    """[2, h, w]: the (y, x) of every cell's centre, in cells."""
    y, x = torch.meshgrid(torch.arange(cells_y) + 0.5, torch.arange(cells_x) + 0.5, indexing="ij")
    return torch.stack([y, x]).double()


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("grid", [14, 16, 32, 64])
def test_dense_targets_are_where_they_say(width, height, grid):
    """Features that are coordinates, resampled to the grid and cut by random views, are the views' coordinates.

    Wide and tall images, views of every size, flips: within a tenth of a cell of the student's 14 x 14.
    """
    size, stride, tokens = 1024, 16, 14
    pixels = letterbox(Image.new("RGB", (width, height)), size)
    valid = torch.tensor([[pixels.shape[0] / stride, pixels.shape[1] / stride]], dtype=torch.float64)
    maps = coordinate_map(size // stride, size // stride)[None] / valid[0, :, None, None]  # in [0, 1] of the image
    dense = valid_region(maps, valid, grid)
    rng = np.random.default_rng(width * 10_000 + height)
    worst = 0.0
    for _ in range(20):
        view = random_view(rng.random(VIEW_DRAWS), width, height)
        crop = crop_embeddings(dense, torch.tensor([view.box]).double(), torch.tensor([view.flip]), tokens)[0]
        x0, y0, x1, y1 = view.box
        steps = (np.arange(tokens) + 0.5) / tokens
        want_y, want_x = y0 + (y1 - y0) * steps, x0 + (x1 - x0) * steps
        if view.flip:
            want_x = want_x[::-1]
        cell_y, cell_x = (y1 - y0) / tokens, (x1 - x0) / tokens
        error_y = np.abs(crop[0].numpy() - want_y[:, None]).max() / cell_y
        error_x = np.abs(crop[1].numpy() - want_x[None, :].copy()).max() / cell_x
        worst = max(worst, error_y, error_x)
    # A side of the image shorter than one teacher cell carries no position: its only cell is its own centre.
    if valid.min() >= 2:
        assert worst < 0.1
    else:
        assert np.isfinite(worst)


def test_features_move_with_the_pixels():
    """The same view of an image and of its 'features' (the image itself, as a map) shows the same thing."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    )
    image = Image.fromarray(smooth)
    maps = torch.from_numpy(smooth.copy()).permute(2, 0, 1)[None].float()
    dense = valid_region(maps, torch.tensor([[240.0, 320.0]]), 32)
    for flip in (False, True):
        view = View((0.25, 0.1, 0.85, 0.7), flip)
        pixels = torch.from_numpy(crop_image(image, view, 14, interpolation="bilinear").copy()).permute(2, 0, 1).float()
        features = crop_embeddings(dense, torch.tensor([view.box]), torch.tensor([flip]), 14)[0]
        mirrored = crop_embeddings(dense, torch.tensor([view.box]), torch.tensor([not flip]), 14)[0]
        assert (pixels - features).abs().mean() < 4
        assert (pixels - mirrored).abs().mean() > 15


def test_weights_identity_sum_and_area():
    whole = resample_weights(torch.zeros(1), torch.full((1,), 32.0), 32, 32)[0]
    assert torch.allclose(whole, torch.eye(32), atol=1e-6)
    halves = resample_weights(torch.zeros(1), torch.full((1,), 64.0), 64, 32)[0]
    assert torch.allclose(halves[3, 6:8], torch.tensor([0.5, 0.5]))
    assert torch.allclose(halves.sum(1), torch.ones(32))
    start, stop = torch.rand(50) * 10, 11 + torch.rand(50) * 21
    weights = resample_weights(start, stop, 32, 14)
    assert torch.allclose(weights.sum(-1), torch.ones(50, 14), atol=1e-5)
    assert weights.abs().max() < 1.6  # half a cell of extrapolation at the most


def test_cells_beyond_the_valid_part_are_never_read():
    maps = torch.zeros(1, 1, 64, 64)
    maps[:, :, 37:] = torch.nan
    maps[:, :, :, 50:] = torch.nan
    out = valid_region(torch.nan_to_num(maps, nan=1e6), torch.tensor([[36.4, 49.9]]), 32)
    assert out.abs().max() == 0


def test_random_views_follow_torchvision():
    """Same distribution as torchvision's RandomResizedCrop: area, ratio and position moments of 20,000 draws."""
    from torchvision.transforms import RandomResizedCrop

    rng, config = np.random.default_rng(0), ViewConfig()
    width, height, draws = 500, 375, 20_000
    ours = np.array([random_view(rng.random(VIEW_DRAWS), width, height, config).box for _ in range(draws)])
    blank = torch.zeros(1, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(config.scale), list(config.ratio)) for _ in range(draws)])
    y, x, h, w = theirs.T
    theirs = np.stack([x / width, y / height, (x + w) / width, (y + h) / height], 1)
    for moment in (np.mean, np.std):
        assert np.abs(moment(ours, 0) - moment(theirs, 0)).max() < 0.01
    flips = sum(random_view(rng.random(VIEW_DRAWS), width, height).flip for _ in range(4000))
    assert 1850 < flips < 2150


@pytest.mark.parametrize(("width", "height"), [*SHAPES, (1, 1), (1, 5000)])
def test_random_views_stay_inside(width, height):
    rng = np.random.default_rng(1)
    for _ in range(200):
        x0, y0, x1, y1 = random_view(rng.random(VIEW_DRAWS), width, height).box
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1


def test_views_do_not_depend_on_the_images_before():
    """The draw uses a fixed count of random numbers, so a changed image changes its own views only."""
    rng_a, rng_b = np.random.default_rng(7), np.random.default_rng(7)
    random_view(rng_a.random(VIEW_DRAWS), 5000, 10)
    random_view(rng_b.random(VIEW_DRAWS), 200, 200)
    assert random_view(rng_a.random(VIEW_DRAWS), 640, 480) == random_view(rng_b.random(VIEW_DRAWS), 640, 480)


def test_letterbox_rounds_as_sam_does():
    from segment_anything.utils.transforms import ResizeLongestSide

    for width, height in SHAPES:
        expected = ResizeLongestSide.get_preprocess_shape(height, width, 1024)
        assert letterbox(Image.new("RGB", (width, height)), 1024).shape[:2] == expected


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 1.0, 1.0), (0.25, 0.125, 0.75, 0.875), (0.0, 0.0, 0.001, 0.001), (0.999, 0.999, 1.0, 1.0)]
)
def test_pixels_are_cut_as_pillow_cuts_them(box):
    image = picture("chelsea").convert("RGB").resize((320, 256))
    pixels, out = np.array(image), torch.zeros(224, 224, 3, dtype=torch.uint8).permute(2, 0, 1)
    crop_pixels(pixels, View(box, flip=True), out)
    x0, y0 = min(319, round(box[0] * 320)), min(255, round(box[1] * 256))
    x1, y1 = max(x0 + 1, round(box[2] * 320)), max(y0 + 1, round(box[3] * 256))
    expected = np.asarray(image.crop((x0, y0, x1, y1)).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(out.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.mean() < 0.5  # not mirrored: that is for the device
    assert difference.max() < 16
