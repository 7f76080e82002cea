"""`sami-cache finetune semantic`: what is shown, what is learnt, and how it is measured, against scikit-learn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from sklearn.metrics import confusion_matrix as reference_confusion
from typer.testing import CliRunner

from cli.main import app
from pipelines.finetune_detection import open_detector
from pipelines.finetune_semantic import (
    SemanticTrainingConfig,
    evaluate_semantic,
    find_classes,
    finetune_semantic,
    open_segmenter,
    prepare,
)
from sami_cache.data.semantic import IGNORED, SegmentedPictures
from sami_cache.errors import IdentityError, SamiCacheError
from sami_cache.models.semantic import to_classes
from sami_cache.tasks.semantic import SemanticAugmentation, choose_crop, confusion_matrix, examples, scores

CPU = torch.device("cpu")
SHAPE = {"depth": 2, "embed_dim": 32, "num_heads": 2}
COLOURS = {3: (220, 60, 40), 7: (40, 200, 80), 200: (50, 70, 230)}


def write_scene(folder, count=4, seed=0):
    """Pictures in three colours with noise, whose classes are 3, 7 and 200; a border is 0, which is no class."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = (72, 96) if number % 2 else (80, 64)
        values = np.full((height, width), (3, 7, 200)[number % 3], np.uint8)
        for value in (3, 7, 200):
            top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
            values[top : top + height // 2, left : left + width // 2] = value
        pixels = np.array([COLOURS[value] for value in values.ravel()]).reshape(height, width, 3)
        values[:2] = 0
        noisy = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        for part in ("images", "masks"):
            (folder / part / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(folder / "images" / "a" / f"{number}.jpg", quality=95)
        Image.fromarray(values).save(folder / "masks" / "a" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("semantic"))


def config(run, folder, **changes) -> SemanticTrainingConfig:
    fields = {
        "run": run,
        "data": folder / "images",
        "masks": folder / "masks",
        "shape": SHAPE,
        "image_size": 64,
        "global_blocks": 1,
        "channels": 32,
        "queries": 8,
        "decoder_layers": 3,
        "steps": 2,
        "batch_size": 2,
        "device": "cpu",
        "workers": 1,
        "precision": "float32",
        "log_every": 1,
    }
    return SemanticTrainingConfig(**(fields | changes))


def test_classes_are_those_of_the_masks_or_of_a_file(data, tmp_path):
    pictures = SegmentedPictures(data / "images", data / "masks")
    assert pictures.keys == [f"a/{number}" for number in range(4)]
    assert find_classes([pictures], None, frozenset({0})) == {3: "3", 7: "7", 200: "200"}
    (tmp_path / "classes.txt").write_text("0 nothing\n200 sky at night\n7 grass\n")
    assert find_classes([pictures], tmp_path / "classes.txt", frozenset({0})) == {7: "grass", 200: "sky at night"}
    place = {7: 0, 200: 1}
    with pytest.raises(SamiCacheError, match=r"masks/a/0\.png: the value 3 is no class: expected one of 2, or an ignored one"):
        pictures.labels(0, place, frozenset({0}), (80, 64))
    labels = pictures.labels(0, place, frozenset({0, 3}), (80, 64))
    assert set(np.unique(labels)) <= {0, 1, IGNORED}
    assert np.array_equal(labels == 1, pictures.values(0) == 200)
    with pytest.raises(SamiCacheError, match="64x80 pixels, its picture 10x10"):
        pictures.labels(0, place, frozenset({0, 3}), (10, 10))


def test_what_does_not_fit_is_refused(data, tmp_path):
    with pytest.raises(SamiCacheError, match="is no folder"):
        SegmentedPictures(data / "images", tmp_path / "none")
    (tmp_path / "masks").mkdir()
    with pytest.raises(SamiCacheError, match="holds no PNG"):
        SegmentedPictures(data / "images", tmp_path / "masks")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "masks" / "x.png")
    with pytest.raises(SamiCacheError, match=r"x\.png has no picture in .*1 of 1 have none"):
        SegmentedPictures(data / "images", tmp_path / "masks")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(SamiCacheError, match="expected one class number a pixel"):
        SegmentedPictures(tmp_path, tmp_path / "masks").values(0)
    with pytest.raises(SamiCacheError, match="go together"):
        prepare(config(tmp_path / "run", data, val=data / "images"), CPU)
    with pytest.raises(SamiCacheError, match="multiple of 32"):
        prepare(config(tmp_path / "run", data, image_size=100), CPU)


def test_examples_follow_seed_epoch_and_picture(data):
    pictures = SegmentedPictures(data / "images", data / "masks")
    place, ignored = {3: 0, 7: 1, 200: 2}, frozenset({0})
    make = examples(pictures, place, ignored, 64, SemanticAugmentation(), 0)
    one, again, other = make(0, 1), make(0, 1), make(1, 1)
    assert torch.equal(one.pixels, again.pixels)
    assert torch.equal(one.labels, again.labels)
    assert one.seed == again.seed != other.seed
    assert not torch.equal(one.pixels, other.pixels)
    # Colours and classes went the same way: without changes of colour a class has its own.
    plain = examples(pictures, place, ignored, 64, SemanticAugmentation(colours=False), 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for epoch in range(6):
        shown = plain(epoch, 2)
        for label, colour in enumerate(COLOURS.values()):
            inside = shown.labels == label
            if inside.sum() > 50:
                found = (shown.pixels[:, inside].T * std + mean).median(0).values * 255
                assert (found - torch.tensor(colour)).abs().max() < 25


def test_no_class_fills_a_crop_where_another_would_do():
    labels = np.zeros((100, 100), np.uint8)
    labels[60:, 60:] = 1
    shares = []
    for seed in range(30):
        top, left = choose_crop(labels, 40, 0.75, np.random.default_rng(seed))
        part = labels[top : top + 40, left : left + 40]
        shares.append((part == 0).mean())
    assert np.mean(np.array(shares) <= 0.75) > 0.6  # of crops drawn once, a sixth


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 5, (40, 50)).astype(np.uint8), rng.integers(0, 5, (40, 50)).astype(np.uint8)
    truth[:4] = IGNORED
    known = truth != IGNORED
    confusion = confusion_matrix(truth, predicted, 5)
    assert np.array_equal(confusion, reference_confusion(truth[known], predicted[known], labels=range(5)))
    found = scores(confusion)
    assert found["heldout_miou"] == pytest.approx(jaccard_score(truth[known], predicted[known], average="macro"))
    assert found["heldout_accuracy"] == pytest.approx(accuracy_score(truth[known], predicted[known]))
    assert found["heldout_class_accuracy"] == pytest.approx(balanced_accuracy_score(truth[known], predicted[known]))
    # A class that neither occurs nor is predicted has no say.
    assert scores(np.pad(confusion, (0, 1)))["heldout_miou"] == pytest.approx(found["heldout_miou"])


def test_classes_come_back_at_the_pictures_own_size():
    wanted = torch.zeros(1, 2, 16, 16)
    wanted[:, 0] = 2.5
    wanted[:, 1, :, 4:] = 5  # right of a quarter of the input
    found = to_classes(wanted, (48, 64), 96, 128)
    assert found.shape == (96, 128)
    assert found[:, :28].max() == 0
    assert found[:, 36:].min() == 1


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_may_be_cut_into_any_parts(data, tmp_path, parts):
    gradients = []
    for count in (1, parts):
        prepared = prepare(config(tmp_path / str(count), data, batch_size=4, micro_batch=4 // count), CPU)
        batches = prepared.task.batches(0)
        for _ in range(count):
            (prepared.task.loss(prepared.task.model, next(batches), CPU)["loss"] / count).backward()
        batches.close()
        named = prepared.task.model.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named if parameter.requires_grad})
        assert [name for name, value in gradients[-1].items() if value is None] == []
    whole, cut = gradients
    total = sum(float(value.square().sum()) for value in whole.values()) ** 0.5
    for name, value in whole.items():
        assert float((value - cut[name]).norm()) <= 1e-2 * float(value.norm()) + 1e-5 * total, name


def test_a_picture_of_which_nothing_is_known_gives_no_gradient(data, tmp_path):
    prepared = prepare(config(tmp_path / "run", data), CPU)
    pixels = torch.randn(1, 3, 64, 64)
    loss = prepared.task.model(pixels, [torch.full((64, 64), IGNORED, dtype=torch.uint8)], [1])["loss"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in prepared.task.model.parameters() if p.grad is not None)


def test_the_encoder_learns_more_slowly_and_the_rest_is_transformers(data, tmp_path):
    prepared = prepare(config(tmp_path / "run", data), CPU)
    names = [name for name, parameter in prepared.task.model.named_parameters() if parameter.requires_grad]
    slow = [name for name in names if prepared.lr_scale(name) == 0.1]
    assert slow
    assert all(".pyramid.encoder." in name for name in slow)
    assert {"blocks", "patch_embed", "pos_embed"} == {name.split(".pyramid.encoder.")[1].split(".")[0] for name in slow}
    assert {prepared.lr_scale(name) for name in set(names) - set(slow)} == {1.0}


def test_a_resumed_run_is_the_run_that_never_stopped(data, tmp_path):
    finetune_semantic(config(tmp_path / "whole", data, steps=3, checkpoint_every=1))

    def pull_the_plug(line):
        if line["step"] == 2:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        finetune_semantic(config(tmp_path / "part", data, steps=3, checkpoint_every=1), pull_the_plug)
    finetune_semantic(config(tmp_path / "part", data, steps=3, checkpoint_every=1, resume=True))
    whole, part = (open_segmenter(tmp_path / name)[0].state_dict() for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())
    with pytest.raises(IdentityError, match=r"semantic\.queries: 8 in the run, 9 now"):
        finetune_semantic(config(tmp_path / "part", data, steps=3, queries=9, resume=True))


def test_a_few_pictures_are_learnt_measured_and_predicted(data, tmp_path):
    lines = []
    held_out = {"val": data / "images", "val_masks": data / "masks", "evaluate_every": 60}
    quick = {"lr": 2e-3, "encoder_lr_scale": 1.0, "clip_grad": None}
    finetune_semantic(config(tmp_path / "run", data, steps=60, batch_size=4, log_every=10, **held_out, **quick), lines.append)
    assert lines[-1]["heldout_miou"] > 0.5 > lines[0]["heldout_miou"]
    arguments = ["evaluate", "semantic", str(tmp_path / "run"), "--data", str(data / "images"), "--masks", str(data / "masks")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--json", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["heldout_miou"] == pytest.approx(lines[-1]["heldout_miou"])
    # The PNGs hold the data's own numbers, and score the same.
    truth = np.concatenate([np.array(Image.open(path)).ravel() for path in sorted((data / "masks").rglob("*.png"))])
    predicted = np.concatenate([np.array(Image.open(path)).ravel() for path in sorted((tmp_path / "out").rglob("*.png"))])
    known = truth != 0
    assert jaccard_score(truth[known], predicted[known], average="macro") == pytest.approx(found["heldout_miou"])
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    model, settings = open_segmenter(tmp_path / "run" / "semantic_vit_t.safetensors")
    assert settings["classes"] == {"3": "3", "7": "7", "200": "200"}
    of_run = open_segmenter(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(value, of_run[name]) for name, value in model.state_dict().items())
    with pytest.raises(SamiCacheError, match="expected an export of a `finetune detection` run"):
        open_detector(tmp_path / "run" / "semantic_vit_t.safetensors")
    with pytest.raises(SamiCacheError, match="nothing was overwritten"):
        evaluate_semantic(tmp_path / "run", data / "images", data / "masks", out=tmp_path / "out", device="cpu")
