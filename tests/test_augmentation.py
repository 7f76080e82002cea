"""RandAugment, mixup and cutmix are timm's, and depend on neither threads nor how a step is cut."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from photos import pieces
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from torchvision.transforms import functional

from sami_cache import augmentation
from sami_cache.augmentation import Augment, AugmentConfig, Mixing, evaluation_view
from sami_cache.errors import SamiCacheError

MEAN = (0.485, 0.456, 0.406)


@pytest.fixture(scope="module")
def photos():
    return pieces(6)


def test_an_augmentation_is_a_function_of_seed_epoch_and_number(photos):
    augment = Augment(48, AugmentConfig(), MEAN, seed=3)
    jobs = [(photos[number % 6], epoch, number) for epoch in range(2) for number in range(24)]
    expected = [augment(*job) for job in jobs]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: augment(*job), reversed(jobs)))[::-1]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert expected[0].shape == (3, 48, 48)
    assert expected[0].dtype == torch.uint8
    assert not torch.equal(augment(photos[0], 0, 0), augment(photos[0], 1, 0))
    assert not torch.equal(augment(photos[0], 0, 0), augment(photos[0], 0, 1))
    assert not torch.equal(augment(photos[0], 0, 0), Augment(48, AugmentConfig(), MEAN, seed=4)(photos[0], 0, 0))


def test_the_operations_are_timms(photos):
    """With Python's generator seeded alike, timm's own RandAugment gives the same pixels."""
    config = "rand-m9-mstd0.5-inc1"
    hparams = {"translate_const": 21, "img_mean": (124, 116, 104), "interpolation": 3}
    theirs = rand_augment_transform(config, hparams)
    augment = Augment(48, AugmentConfig(randaugment=config, crop=1.0, flip=0.0), MEAN, seed=0)
    plain = Augment(48, AugmentConfig(randaugment="", crop=1.0, flip=0.0), MEAN, seed=0)
    changed, used = 0, set()
    for number in range(40):
        cut = plain(photos[number % 6], 0, number)
        rng = np.random.default_rng((0, 0, number))
        rng.random(augmentation.VIEW_DRAWS)
        random.seed(int(rng.integers(1 << 62)))
        picture = functional.to_pil_image(cut)
        for operation in random.choices(theirs.ops, k=theirs.num_layers):
            picture = operation(picture)
            used.add(operation.name)
        expected = functional.pil_to_tensor(picture)
        assert torch.equal(augment(photos[number % 6], 0, number), expected)
        changed += not torch.equal(expected, cut)
    assert changed > 15
    assert len(used) > 10


def test_the_highest_magnitude_is_possible(photos):
    """Posterize then keeps no bit, which Pillow 13 refuses; before, it gave black."""
    augment = Augment(32, AugmentConfig(randaugment="rand-m10-n15-p1-inc1"), MEAN, seed=0)
    names = {operation.name for operation in augment._randaugment.ops}
    assert "PosterizeIncreasing" in names
    for number in range(30):
        assert augment(photos[0], 0, number).shape == (3, 32, 32)
    (only,) = (operation for operation in augment._randaugment.ops if operation.name == "PosterizeIncreasing")
    assert not np.array(only(photos[0])).any()


def test_a_step_is_mixed_alike_however_it_is_cut():
    pixels, labels = torch.randn(8, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    mixing = Mixing(5, AugmentConfig(), seed=7)
    state = np.random.get_state()[1].tolist()
    kinds = set()
    for step in range(12):
        whole = sort(*mixing(pixels.clone(), labels, step))
        parts = [mixing(pixels[at : at + 2].clone(), labels[at : at + 2], step) for at in range(0, 8, 2)]
        cut = sort(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
        torch.testing.assert_close(whole, cut)
        torch.testing.assert_close(whole[1].sum(1), torch.ones(8))
        kinds.add("cutmix" if torch.isin(whole[0], pixels).all() else "mixup")
    assert kinds == {"cutmix", "mixup"}
    first, again = (mixing(pixels.clone(), labels, 0)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, mixing(pixels.clone(), labels, 1)[0])
    assert np.random.get_state()[1].tolist() == state


def sort(pixels, targets):
    order = pixels.sum((1, 2, 3)).argsort()
    return pixels[order], targets[order]


def test_mixtures_are_timms():
    pixels, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    mixing = Mixing(5, AugmentConfig(mixup=0.8, cutmix=1.0, smoothing=0.1), seed=2)
    theirs = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    order = [0, 2, 4, 5, 3, 1]  # neighbours first and last, as timm pairs
    for step in range(8):
        np.random.seed(np.random.SeedSequence((2, step)).generate_state(4))
        expected = theirs(pixels[order].clone(), labels[order])
        found = mixing(pixels.clone(), labels, step)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_without_mixing_labels_are_only_smoothed():
    pixels, labels = torch.randn(3, 3, 8, 8), torch.tensor([2, 0, 1])
    same, targets = Mixing(4, AugmentConfig(mixup=0, cutmix=0, smoothing=0.2), seed=0)(pixels, labels, 5)
    assert torch.equal(same, pixels)
    torch.testing.assert_close(targets, torch.eye(4)[labels] * 0.8 + 0.05)


def test_evaluation_sees_what_timm_shows(photos):
    view = evaluation_view(64, 0.875)
    theirs = create_transform((3, 64, 64), crop_pct=0.875, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    for photo in photos:
        assert torch.equal(view(photo).float() / 255, theirs(photo))
    assert evaluation_view(64, 1.0)(photos[0]).shape == (3, 64, 64)


def test_what_timm_does_not_understand_is_said():
    with pytest.raises(SamiCacheError, match="--randaugment rand-x9: timm does not understand it"):
        Augment(32, AugmentConfig(randaugment="rand-x9"), MEAN, 0)
    with pytest.raises(SamiCacheError, match="--randaugment strong: timm does not"):
        Augment(32, AugmentConfig(randaugment="strong"), MEAN, 0)
    with pytest.raises(SamiCacheError, match=r"--crop 0: expected 0\.0001 to 1"):
        AugmentConfig(crop=0)
    with pytest.raises(SamiCacheError, match="--crop-ratio 0: expected a share above 0"):
        evaluation_view(32, 0)
