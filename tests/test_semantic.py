"""`sami-cache finetune semantic`: what is shown, what is learnt (against transformers' whole model), how it is measured
(against scikit-learn), and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import picture, pieces
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from pipelines.class_names import read_class_names
from pipelines.finetune_detection import open_detector
from pipelines.finetune_semantic import SemanticTrainingConfig, finetune_semantic, prepare
from pipelines.semantic import evaluate_semantic, open_semantic
from sami_cache.data.class_masks import IGNORED, ClassLabels, MaskedPictures
from sami_cache.errors import IdentityError, SamiCacheError
from sami_cache.models.semantic import LOSSES, Mask2Former, Mask2FormerShape, class_scores
from sami_cache.tasks import semantic
from sami_cache.tasks.semantic import (
    Normalise,
    SemanticAugment,
    best_labels,
    change_colours,
    count_pairs,
    examples,
    figures,
    fitted,
    random_part,
    score,
)

CPU = torch.device("cpu")
SMALL = Mask2FormerShape(
    queries=8, encoder_layers=1, decoder_layers=2, heads=4, encoder_feedforward=32, feedforward=32, points=256
)
STILL = SemanticAugment(smallest=1, largest=1, category_ratio=1, flip=False, colour=False)
INDICES = (3, 7, 200)


def config(run, folder, **changes) -> SemanticTrainingConfig:
    fields = {
        "run": run,
        "data": folder / "images",
        "masks": folder / "masks",
        "shape": {"depth": 2, "embed_dim": 32, "num_heads": 2},
        "image_size": 64,
        "mask2former": SMALL,
        "channels": 32,
        "augment": STILL,
        "steps": 2,
        "warmup_steps": 0,
        "batch_size": 2,
        "clip_grad": None,
        "device": "cpu",
        "workers": 1,
        "precision": "float32",
        "log_every": 1,
    }
    return SemanticTrainingConfig(**(fields | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four photographs, tinted in two regions, with masks of three classes and some pixels that are ignored; one unlabelled."""
    folder = tmp_path_factory.mktemp("semantic")
    for part in ("images", "masks"):
        (folder / part / "deep").mkdir(parents=True)
    for number, photo in enumerate(pieces(5)):
        image = np.array(photo)
        mask = np.full(image.shape[:2], INDICES[0], np.uint8)
        rows, columns = mask.shape[0] // 2, mask.shape[1] // 2
        mask[:rows, :columns] = INDICES[1]
        mask[rows:, columns // (1 + number) :] = INDICES[2]
        for index, channel in ((INDICES[1], 0), (INDICES[2], 2)):
            image[mask == index] //= 4
            image[mask == index, channel] = 250
        mask[:4] = 255
        Image.fromarray(image).save(folder / "images" / "deep" / f"{number}.png")
        if number < 4:
            Image.fromarray(mask).save(folder / "masks" / "deep" / f"{number}.png")
    return folder


# --- the model ------------------------------------------------------------------------------------------------------


def test_logits_and_losses_are_those_of_transformers_whole_model(data, tmp_path):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

    mine = prepare(config(tmp_path / "run", data, image_size=96), CPU).task.model.eval()
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"])
    settings = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_queries=8,
        train_num_points=256,
    )
    settings.num_labels = 3
    whole = Mask2FormerForUniversalSegmentation(settings).eval()
    pixels = torch.randn(2, 3, 96, 64)
    level = whole.model.pixel_level_module
    del level.encoder
    level.encoder = lambda pixels: SimpleNamespace(feature_maps=list(mine.backbone(pixels).values()))
    level.decoder = Mask2FormerPixelDecoder(settings, feature_channels=[32] * 4)
    level.decoder.load_state_dict(mine.pixel_decoder.state_dict())
    whole.model.transformer_module.load_state_dict(mine.transformer.state_dict())
    whole.class_predictor.load_state_dict(mine.class_predictor.state_dict())

    labels = torch.randint(-1, 3, (2, 96, 64), dtype=torch.int32)
    labels[1][labels[1] == 1] = 0
    theirs = whole(pixel_values=pixels)
    classes, masks = mine(pixels)
    torch.testing.assert_close(classes, theirs.class_queries_logits)
    torch.testing.assert_close(masks, theirs.masks_queries_logits)
    losses = []
    for number, some in enumerate(([0, 1, 2], [0, 2])):
        torch.manual_seed(40 + number)
        true = torch.stack([labels[number] == one for one in some]).float()
        losses.append(whole(pixels[number][None], mask_labels=[true], class_labels=[torch.tensor(some)]).loss)
    torch.testing.assert_close(mine(pixels, labels, [40, 41])["loss"], torch.stack(losses).mean())


def test_scores_are_those_of_transformers_processor():
    from transformers import Mask2FormerImageProcessor

    classes, masks = torch.randn(1, 8, 4), torch.randn(1, 8, 24, 24)
    output = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    (theirs,) = Mask2FormerImageProcessor().post_process_semantic_segmentation(output, [(150, 90)])
    found = class_scores(classes, masks, (384, 384))[0]  # their size in between
    assert torch.equal(best_labels(found, (150, 90)), theirs)


def test_labels_of_many_classes_are_found_in_parts(monkeypatch):
    scores = torch.rand(7, 9, 11)
    expected = F.interpolate(scores[None], (30, 40), mode="bilinear")[0].argmax(0)
    monkeypatch.setattr(semantic, "_SCORES_AT_ONCE", 2 * 30 * 40)
    assert torch.equal(best_labels(scores, (30, 40)), expected)


class Painter(torch.nn.Module):
    """Every pixel's class is what its own colour says, so that it does not matter how a picture is cut."""

    def forward(self, pixels):
        masks = F.avg_pool2d(pixels, 4) * 50
        classes = torch.tensor([[20.0, 0, 0, 0], [0, 20, 0, 0], [0, 0, 20, 0]])
        return classes.expand(len(pixels), 3, 4), masks


@pytest.mark.parametrize("size", [(64, 64), (64, 160), (160, 64), (150, 71), (40, 100)])
def test_windows_see_what_the_whole_picture_shows(size):
    colours = F.one_hot(torch.randint(3, [(side + 15) // 16 for side in size]), 3).permute(2, 0, 1).float() * 2 - 1
    pixels = F.interpolate(colours[None], scale_factor=16)[0, :, : size[0], : size[1]]
    true = pixels.argmax(0)
    for viewing in ("whole", "sliding"):
        scores = score(Painter(), pixels, 64, viewing)
        assert scores.shape == (3, *size)
        assert (scores.argmax(0) == true).float().mean() > 0.93  # the masks' edges, in cells of four pixels
        assert float(scores.max()) <= 1.0001  # also where windows meet
    seen = [False] * 200
    for start in semantic._starts(200, 64):
        assert 0 <= start <= 136
        seen[start : start + 64] = [True] * 64
    assert all(seen)


# --- the pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [STILL, SemanticAugment(), SemanticAugment(smallest=0.3, largest=0.6)])
def test_pictures_and_labels_go_to_the_same_place(augment):
    image = np.array(picture("coffee").resize((140, 90)))
    labels = np.zeros(image.shape[:2], np.int32)
    labels[20:70, 30:110] = 1
    image[labels > 0] = 255
    image[labels == 0] //= 2
    for seed in range(12):
        shown, part = random_part(image, labels, 64, augment, np.random.default_rng(seed))
        assert shown.shape == (*part.shape, 3)
        assert max(part.shape) <= 64
        assert ((shown.min(2) > 191) != (part == 1)).mean() < 0.08  # the edge, in halves of pixels
        if augment is STILL:
            assert part.shape == (64, 64)


def test_parts_that_one_class_fills_are_drawn_again():
    labels = np.zeros((100, 400), np.int32)
    labels[:, 300:] = 1
    labels[:50] = IGNORED
    image = np.zeros((100, 400, 3), np.uint8)

    def filled(ratio):
        augment = SemanticAugment(smallest=1, largest=1, category_ratio=ratio)
        parts = [random_part(image, labels, 100, augment, np.random.default_rng(seed))[1] for seed in range(60)]
        return sum(max((part == label).sum() for label in (0, 1)) >= 0.75 * (part != IGNORED).sum() for part in parts)

    assert filled(1.0) > 40
    assert filled(0.75) < 20


def test_examples_follow_seed_epoch_and_picture(data):
    pictures = MaskedPictures(data / "images", data / "masks")
    classes = ClassLabels(dict.fromkeys(INDICES, ""), [255])
    normalise = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    make = examples(pictures, classes, 64, SemanticAugment(), normalise, 0)
    one, again, other = make(0, 0), make(0, 0), make(1, 0)
    assert all(torch.equal(*pair) for pair in zip(one[:2], again[:2], strict=True))
    assert one.seed == again.seed != other.seed
    assert not torch.equal(one.pixels, other.pixels)
    small = examples(pictures, classes, 64, SemanticAugment(smallest=0.4, largest=0.4), normalise, 0)(0, 0)
    assert (small.pixels.shape, small.labels.shape) == (one.pixels.shape, one.labels.shape) == ((3, 64, 64), (64, 64))
    reached = (small.pixels != 0).any(0)
    assert 0 < reached.float().mean() < 0.8
    assert (small.labels[~reached] == IGNORED).all()
    assert set(one.labels.unique().tolist()) <= {IGNORED, 0, 1, 2}
    image = pictures.read(0)[0]
    plain = normalise(image)[1, 0, 0]
    assert float(plain) == pytest.approx((image[0, 0, 1] / 255 - 0.4) / 0.3, rel=1e-5)


def test_colours_change_and_nothing_else_does():
    image = np.array(picture("chelsea").resize((60, 40)))
    changed = [change_colours(image, np.random.default_rng(seed)) for seed in range(16)]
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in changed)
    assert sum(np.array_equal(one, image) for one in changed) < 4
    grey = np.asarray(Image.fromarray(image).convert("L"), float).ravel()
    # What is dark stays dark beside what is light.
    assert all(np.corrcoef(grey, np.asarray(Image.fromarray(one).convert("L"), float).ravel())[0, 1] > 0.8 for one in changed)
    assert fitted(image, 20).shape == (20, 30, 3)
    assert fitted(np.zeros((10, 100, 3), np.uint8), 20).shape == (8, 80, 3)


# --- training -------------------------------------------------------------------------------------------------------


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
    for cut in gradients[1:]:
        for name, value in gradients[0].items():
            assert float((value - cut[name]).norm()) <= 2e-3 * float(value.norm()) + 1e-6, name


def test_bfloat16_learns_the_same(data, tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        last = finetune_semantic(config(tmp_path / precision, data, precision=precision))
        losses[precision] = last["loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_every_parameter_gets_a_gradient_also_where_nothing_is_labelled(data, tmp_path):
    """Several processes would wait for it."""
    task = prepare(config(tmp_path / "run", data), CPU).task
    (one, *_) = next(task.batches(0))
    values = task.loss(task.model, [one._replace(labels=torch.full_like(one.labels, IGNORED))], CPU)
    assert values["loss_mask"] == values["loss_dice"] == 0
    values["loss"].backward()
    named = task.model.named_parameters()
    assert [name for name, value in named if value.requires_grad and value.grad is None] == []


def test_the_encoder_learns_slower_and_the_recipe_is_the_default(data, tmp_path):
    names = ("run", "data", "masks")
    given = config(tmp_path / "run", data)
    prepared = prepare(SemanticTrainingConfig(**{name: getattr(given, name) for name in names}, device="cpu"), CPU)
    train = prepared.train
    assert (train.steps, train.lr, train.weight_decay, train.schedule) == (160_000, 2e-4, 0.05, "poly")
    assert (train.batch_size, train.warmup_steps, train.clip_grad) == (4, 0, 0.01)
    scales = {name: prepared.lr_scale(name) for name, _ in prepared.task.model.named_parameters()}
    assert {scale for name, scale in scales.items() if ".encoder.blocks." in name and name.startswith("backbone")} == {0.1}
    slow = [name for name, scale in scales.items() if scale != 1]
    assert all(name.startswith("backbone.encoder.") for name in slow)
    assert {"pixel_decoder.encoder.layers.0.fc1.weight", "backbone.p2.0.weight"} <= scales.keys() - set(slow)
    assert prepared.settings["semantic"]["mask2former"]["points"] == 12544
    assert prepare(config(tmp_path / "run", data, epochs=3), CPU).train.steps == 6


def test_a_resumed_run_is_the_run_that_never_stopped(data, tmp_path):
    changes = {"steps": 3, "checkpoint_every": 1, "augment": SemanticAugment()}
    finetune_semantic(config(tmp_path / "whole", data, **changes))

    def pull_the_plug(line):
        if line["step"] == 2:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        finetune_semantic(config(tmp_path / "part", data, **changes), pull_the_plug)
    finetune_semantic(config(tmp_path / "part", data, **changes, resume=True))
    whole, part = (open_semantic(tmp_path / name).model.state_dict() for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())
    with pytest.raises(IdentityError, match=r"semantic\.ignored: \[255\] in the run, \[0, 255\] now"):
        finetune_semantic(config(tmp_path / "part", data, **changes, resume=True, reduce_zero_label=True))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    held_out = {"val": data / "images", "val_masks": data / "masks", "evaluate_every": 80}
    lines = []
    finetune_semantic(config(run, data, steps=80, lr=3e-3, batch_size=4, backbone_lr=1, log_every=10, **held_out), lines.append)
    return run, lines


# --- figures --------------------------------------------------------------------------------------------------------


def test_a_few_pictures_are_learnt_and_measured_as_scikit_learn_does(data, trained, tmp_path):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

    run, lines = trained
    assert all(name in lines[-1] for name in ("loss", *LOSSES))
    assert lines[-1]["heldout_miou"] > lines[0]["heldout_miou"] + 0.2
    found = evaluate_semantic(run, data / "images", data / "masks", out=tmp_path / "out", device="cpu")
    assert {f"heldout_{name}": found[name] for name in ("miou", "mean_accuracy", "pixel_accuracy")} == {
        name: value for name, value in lines[-1].items() if name.startswith("heldout_")
    }
    true, said = [], []
    for number in range(4):
        mask, png = (np.array(Image.open(place / "deep" / f"{number}.png")) for place in (data / "masks", tmp_path / "out"))
        assert mask.shape == png.shape
        assert set(np.unique(png)) <= set(INDICES)
        true.append(mask[mask != 255])
        said.append(png[mask != 255])
    true, said = np.concatenate(true), np.concatenate(said)
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(true, said))
    assert found["mean_accuracy"] == pytest.approx(balanced_accuracy_score(true, said))
    theirs = jaccard_score(true, said, labels=INDICES, average=None)
    assert found["miou"] == pytest.approx(theirs.mean())
    assert list(found["iou"].values()) == pytest.approx(theirs.tolist())
    assert list(found["iou"]) == ["3", "7", "200"]
    pairs = count_pairs(torch.tensor([0, IGNORED, 1, 0]), torch.tensor([0, 2, 1, 2]), 3)
    assert pairs.tolist() == confusion_matrix([0, 1, 0], [0, 1, 2], labels=range(3)).tolist()


def test_classes_that_do_not_occur_are_not_averaged():
    from sklearn.metrics import jaccard_score

    true, found = torch.tensor([0, 0, 0, 2, 2, IGNORED]), torch.tensor([0, 1, 2, 2, 2, 1])
    values = figures(count_pairs(true, found, 5))
    assert values["miou"] == pytest.approx(jaccard_score(true[:5], found[:5], labels=[0, 2], average="macro"))
    assert values["pixel_accuracy"] == pytest.approx(3 / 5)
    assert figures(torch.zeros(5, 5, dtype=torch.int64)) == dict.fromkeys(("miou", "mean_accuracy", "pixel_accuracy"), 0.0)


def test_processes_share_the_pictures_and_sum_what_they_count(data, trained, monkeypatch):
    model = open_semantic(trained[0]).model
    pictures = MaskedPictures(data / "images", data / "masks")
    task = prepare(config(trained[0], data), CPU).task
    with torch.no_grad():
        whole = task.confusion(model, pictures)
        parts, shares, summed = [], [], []
        monkeypatch.setattr(semantic.dist, "all_reduce", summed.append)
        for rank in range(2):
            monkeypatch.setattr(semantic, "rank_and_world", lambda rank=rank: (rank, 2))
            parts.append(task.confusion(model, pictures, lambda number, labels: shares.append(number)))
    assert sorted(shares) == [0, 1, 2, 3]
    assert all(one is two for one, two in zip(summed, parts, strict=True))
    assert torch.equal(sum(parts), whole)
    assert int(whole.sum()) == sum(int((pictures.mask(number) != 255).sum()) for number in range(4))


# --- the commands and the files -------------------------------------------------------------------------------------


def test_the_commands(data, trained, tmp_path):
    run, lines = trained
    arguments = ["--data", str(data / "images"), "--masks", str(data / "masks"), "--device", "cpu"]
    result = CliRunner().invoke(app, ["export", str(run)])
    assert result.exit_code == 0, result.output
    path = run / "semantic_vit_t.safetensors"
    assert f"{path}: " in result.output.replace("\n", "")
    assert "the checkpoint of step 80" in result.output
    again = open_semantic(path)
    assert all(
        torch.equal(*pair)
        for pair in zip(*(open_semantic(one).model.state_dict().values() for one in (run, path)), strict=True)
    )
    assert again.classes.indices == list(INDICES)
    with pytest.raises(SamiCacheError, match="expected an export of a `finetune detection` run"):
        open_detector(path)
    result = CliRunner().invoke(app, ["export", str(run)])
    assert "nothing was overwritten" in str(result.exception)
    result = CliRunner().invoke(
        app, ["evaluate", "semantic", str(path), *arguments, "--by-class", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert f"mIoU            {100 * lines[-1]['heldout_miou']:.1f}" in result.output
    result = CliRunner().invoke(app, ["evaluate", "semantic", str(path), *arguments, "--out", str(tmp_path / "out")])
    assert "nothing was overwritten" in str(result.exception)
    result = CliRunner().invoke(app, ["evaluate", "semantic", str(run), *arguments, "--viewing", "sliding", "--json"])
    assert json.loads(result.output)["viewing"] == "sliding"
    result = CliRunner().invoke(app, ["evaluate", "semantic", str(run), *arguments, "--viewing", "sideways"])
    assert "expected whole or sliding" in str(result.exception)
    start = ["finetune", "semantic", *arguments, "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*start, "--image-size", "100"])
    assert "expected a multiple of 32" in str(result.exception)
    result = CliRunner().invoke(app, [*start, "--val", str(data)])
    assert "expected both, or neither" in str(result.exception)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {index}" for index in range(201)))
    few = [
        "--image-size",
        "32",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--points",
        "16",
        "--queries",
        "4",
        "--classes",
        str(names),
    ]
    result = CliRunner().invoke(app, [*start, *few, "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "vit_t at 32 px, 201 classes; 4 pictures to train on, 0 held out; 1 steps of 2" in result.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["pictures"]["unlabelled"] == 1


def test_class_names_are_read_from_what_people_have(tmp_path):
    def read(name, text, first=0):
        (tmp_path / name).write_text(text)
        return read_class_names(tmp_path / name, first)

    assert read("a.txt", "wall\nbuilding\r\n\nsky\n", 1) == {1: "wall", 2: "building", 3: "sky"}
    assert read("b.yaml", "train:\n  images: x\nclasses:\n  0: unlabeled\n  12: stop sign\n") == {
        0: "unlabeled",
        12: "stop sign",
    }
    assert read("c.json", '{"names": ["wall", "sky"]}', 1) == {1: "wall", 2: "sky"}
    assert read("d.json", '{"3": "three"}') == {3: "three"}
    for name, text in (("e.json", "{"), ("f.yml", "a: ["), ("g.json", "7"), ("h.yaml", "a: b")):
        with pytest.raises(SamiCacheError, match=rf"{name}.*expected a name a line"):
            read(name, text)


def test_ade20k_ignores_index_zero_and_others_need_not():
    ade = ClassLabels({index: f"class {index}" for index in range(151)}, [255, 0])
    assert len(ade) == 150
    assert ade.encode(np.array([[0, 1, 150, 255]], np.uint16), "x").tolist() == [[IGNORED, 0, 149, IGNORED]]
    assert ade.decode(np.array([0, 149])).tolist() == [1, 150]
    plain = ClassLabels({0: "a", 1: "b", 300: "c"})
    assert plain.encode(np.array([0, 300]), "x").tolist() == [0, 2]
    assert plain.decode(np.array([2])).dtype == np.uint16
    with pytest.raises(SamiCacheError, match="1 classes beside the ignored indices"):
        ClassLabels({0: "a", 1: "b"}, [0])


@pytest.fixture
def pair(tmp_path):
    """Folders with one picture and its mask, and a way to save another mask."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "one.jpg")

    def save(mask):
        Image.fromarray(mask).save(tmp_path / "masks" / "one.png")
        return MaskedPictures(tmp_path / "images", tmp_path / "masks")

    return save


def test_masks_are_indices_whatever_the_png(pair):
    values = np.arange(600).reshape(20, 30)
    assert (pair(values.astype(np.uint16)).read(0)[1] == values).all()
    palette = Image.fromarray((values % 7).astype(np.uint8))
    palette.putpalette(list(range(255, 0, -1)))
    pictures = pair(values.astype(np.uint8))
    palette.save(pictures._masks["one"])
    assert (pictures.mask(0) == values % 7).all()


def test_masks_that_do_not_fit_are_named(pair, tmp_path):
    with pytest.raises(
        SamiCacheError, match=r"masks/one\.png: expected a mask of 30x20 pixels, as .*one\.jpg has, found 20x30"
    ):
        pair(np.zeros((30, 20), np.uint8)).read(0)
    with pytest.raises(SamiCacheError, match=r"one\.png: expected a PNG of class indices, .* found colours \(RGB\)"):
        pair(np.zeros((20, 30, 3), np.uint8)).read(0)
    pictures = pair(np.full((20, 30), 9, np.uint8))
    with pytest.raises(SamiCacheError, match=r"masks/one\.png: index 9 is no class.*--ignore-index 9"):
        examples(pictures, ClassLabels({0: "a", 3: "b"}), 32, STILL, Normalise((0,) * 3, (1,) * 3), 0)(0, 0)
    (tmp_path / "masks" / "one.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    with pytest.raises(SamiCacheError, match=r"one\.png: damaged"):
        pictures.mask(0)
    Image.new("L", (3, 3)).save(tmp_path / "masks" / "two.png")
    with pytest.raises(SamiCacheError, match=r"1 of 2 masks have no picture, such as two\.png"):
        MaskedPictures(tmp_path / "images", tmp_path / "masks")
    Image.new("L", (3, 3)).save(tmp_path / "images" / "one.png")
    (tmp_path / "masks" / "two.png").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SamiCacheError, match="one is the name of more than one picture"):
        MaskedPictures(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(SamiCacheError, match="holds no PNGs of class indices"):
        MaskedPictures(tmp_path / "images", empty)


def test_what_needs_transformers_says_so(data, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SamiCacheError, match=r"pip install 'sami-cache\[semantic\]'"):
        prepare(config(tmp_path / "run", data), CPU)
    with pytest.raises(SamiCacheError, match="expected a multiple of 32"):
        Mask2Former(SimpleNamespace(out_channels=40), 3, SMALL)
