"""`sami-cache finetune classification`: it learns, its figures are a library's, it resumes, and stock timm loads its export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import log_loss, top_k_accuracy_score
from typer.testing import CliRunner

from cli.main import app
from pipelines.export import export_classifier
from pipelines.finetune_classification import (
    ClassificationTrainingConfig,
    finetune_classification,
    open_classifier,
    prepare,
)
from pipelines.starts import open_start, start_constants, start_encoder
from sami_cache.augmentation import AugmentConfig
from sami_cache.checkpoints import load_newest
from sami_cache.data.labelled import LabelledPictures
from sami_cache.data.sources import open_source
from sami_cache.errors import IdentityError, ImageError, SamiCacheError
from sami_cache.models.students import create_encoder, export_encoder
from sami_cache.tasks.classification import Classifier
from sami_cache.tasks.sami import IMAGENET_MEAN

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
COUNT = 8
"""Pictures of a class."""


def write_pictures(folder: Path, seed: int = 0, count: int = COUNT, colours: dict = COLOURS) -> Path:
    """A folder for each class; what is on a picture is noise of the class's colour."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(rng.normal(colour, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    write_pictures(folder / "train")
    write_pictures(folder / "val", 1, 5)
    return folder


def config(run, data, **changes) -> ClassificationTrainingConfig:
    fields = {"run": run, "data": data / "train", "val": data / "val", "shape": SHAPE, "image_size": 32, "batch_size": 8}
    fields |= {"steps": 3, "warmup_steps": 0, "device": "cpu", "workers": 2, "precision": "float32", "log_every": 1}
    return ClassificationTrainingConfig(**(fields | changes))


def weights_of(run):
    return load_newest(run / "checkpoints").model


def test_it_learns_and_its_figures_are_scikit_learns(data, tmp_path):
    run = tmp_path / "run"
    last = finetune_classification(config(run, data, steps=30, evaluate_every=30))
    assert last["heldout_top1"] > 0.9
    assert "heldout_top5" not in last  # three classes
    model, checkpoint = open_classifier(run)
    task = prepare(config(tmp_path / "none", data), CPU).task
    pictures = LabelledPictures(open_source(data / "val"))
    with torch.no_grad():
        pixels = torch.stack([task.view(pictures.image(number)) for number in range(len(pictures))]).float() / 255
        mean, std = (torch.tensor(checkpoint.config["classification"][name])[:, None, None] for name in ("mean", "std"))
        scores = model((pixels - mean) / std).double().softmax(1).numpy()
    assert last["heldout_top1"] == pytest.approx(top_k_accuracy_score(pictures.labels, scores, k=1))
    assert last["heldout_loss"] == pytest.approx(log_loss(pictures.labels, scores), rel=1e-4)


def test_top_five_of_many_classes(data, tmp_path):
    """Twelve classes, told apart by nothing: any five are right five times of twelve."""
    write_pictures(tmp_path / "train", 2, 2, {f"{number:02d}": (90, 90, 90) for number in range(12)})
    write_pictures(tmp_path / "val", 3, 3, {f"{number:02d}": (90, 90, 90) for number in range(12)})
    task = prepare(config(tmp_path / "run", tmp_path, micro_batch=7), CPU).task
    torch.nn.init.normal_(task.model.encoder.head.weight)
    task.model.eval()
    pictures = LabelledPictures(open_source(tmp_path / "val"))
    with torch.no_grad():
        found = task.evaluate(task.model)
        pixels = torch.stack([task.view(pictures.image(number)) for number in range(len(pictures))])
        scores = task.model(task._normalise(pixels)).double().numpy()
    for k in (1, 5):
        assert found[f"heldout_top{k}"] == pytest.approx(top_k_accuracy_score(pictures.labels, scores, k=k))
    assert 0 < found["heldout_top5"] < 1


def test_a_run_resumes_to_the_same_weights(data, tmp_path):
    options = {"steps": 4, "checkpoint_every": 1, "drop_path": 0.5}
    finetune_classification(config(tmp_path / "whole", data, **options))

    def pull_the_plug(line):
        if line["step"] == 2:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        finetune_classification(config(tmp_path / "part", data, **options), pull_the_plug)
    steps = []
    finetune_classification(config(tmp_path / "part", data, **options, resume=True), lambda line: steps.append(line["step"]))
    assert steps[0] in (2, 3)
    assert steps[-1] == 4
    whole, part = weights_of(tmp_path / "whole"), weights_of(tmp_path / "part")
    assert all(torch.equal(value, part[name]) for name, value in whole.items())
    with pytest.raises(IdentityError, match=r"augment\.mixup: 0\.8 in the run, 0 now"):
        finetune_classification(config(tmp_path / "part", data, **options, augment=AugmentConfig(mixup=0), resume=True))


def test_how_a_step_is_cut_changes_nothing(data, tmp_path):
    """In other parts, with other threads; with drop path, whose draws are the step's, it would be another sample of it."""
    for name, changes in {"whole": {}, "cut": {"micro_batch": 3, "workers": 1}}.items():
        finetune_classification(config(tmp_path / name, data, batch_size=12, **changes, drop_path=0.0))
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert (
        json.loads((tmp_path / "cut" / "config.json").read_text())["config"]["train"]["accumulate"] == 6
    )  # pairs stay together
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=2e-5)
    task = prepare(config(tmp_path / "none", data), CPU).task
    start, batch = task.model.state_dict(), next(task.batches(0))
    torch.nn.init.normal_(task.model.encoder.head.weight)
    losses = {float(task.loss(task.model.eval(), batch._replace(step=step), CPU)["loss"].detach()) for step in (0, 1, 0)}
    assert len(losses) == 2  # mixed anew in every step
    assert max(float((value - start[name]).abs().max()) for name, value in whole.items()) > 1e-3


def test_two_processes_equal_one(data, tmp_path):
    arguments = ["finetune", "classification", "--data", data / "train", "--val", data / "val", "--image-size", 32]
    arguments += ["--steps", 2, "--warmup-steps", 0, "--batch-size", 8, "--drop-path", 0, "--device", "cpu", "--workers", 1]
    arguments += ["--log-every", 1, "--evaluate-every", 2]
    done = CliRunner().invoke(app, [*map(str, arguments), "--run", str(tmp_path / "one")], catch_exceptions=False)
    assert (done.exit_code, done.stdout.count("2 steps in")) == (0, 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli.main"]
    done = subprocess.run(
        [*torchrun, *map(str, arguments), "--run-dir", str(tmp_path / "two")],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps in") == 1
    assert "held-out top-1" in done.stdout
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    for found, expected in zip(two, one, strict=True):
        shared = {key for key in expected if key.startswith(("loss", "heldout", "step", "lr"))}
        assert {key: found[key] for key in shared} == pytest.approx({key: expected[key] for key in shared}, rel=1e-3)
    found, expected = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_stock_timm_loads_what_is_exported(data, tmp_path, pool):
    finetune_classification(config(tmp_path / "run", data, steps=1, pool=pool))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "3 classes, step 1 of 1" in done.output
    result = export_classifier(tmp_path / "run")
    assert not result.written  # it is there already
    assert result.options == {"num_classes": 3, "global_pool": pool, "img_size": 32, **SHAPE}
    model = eval(result.load_line, {"timm": timm}).eval()
    assert model.pretrained_cfg["mean"] == IMAGENET_MEAN
    ours, _ = open_classifier(tmp_path / "run")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(pixels), ours(pixels))
    with safe_open(result.path, "pt") as file:
        about = file.metadata()
    assert json.loads(about["class_names"]) == ["blue", "green", "red"]
    assert json.loads(about["options"]) == result.options
    assert about["timm"] == "vit_tiny_patch16_224"


def test_a_student_is_taken_over_and_all_of_it_trained(data, tmp_path):
    torch.manual_seed(5)
    encoder = create_encoder("vit_t", img_size=64, patch_size=8, depth=2)
    torch.nn.init.constant_(encoder.norm.weight, 3)
    torch.save(export_encoder(encoder, head=False), tmp_path / "student.pth")
    shape = {"patch_size": 8, "depth": 2}
    given = config(tmp_path / "run", data, init=tmp_path / "student.pth", shape=shape, steps=1)
    prepared = prepare(given, CPU)
    model, own = prepared.task.model, encoder.state_dict()
    assert isinstance(model, Classifier)
    assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, own["blocks.1.attn.qkv.weight"])
    assert model.encoder.pos_embed.shape[1] == 17  # 4 x 4 and the class token: resampled from 8 x 8
    assert {name.split(".")[1] for name in model.state_dict()} >= {"fc_norm", "head"}
    assert not any(name.startswith("encoder.norm.") for name in model.state_dict())
    assert float(model.encoder.fc_norm.weight.detach().max()) == 1  # as MAE begins
    assert float(model.encoder.head.weight.detach().abs().max()) < 1e-4
    prepared.task.loss(model, next(prepared.task.batches(0)), CPU)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(SamiCacheError, match=r"--student vit_s: .*student\.pth is a vit_t"):
        prepare(config(tmp_path / "run", data, init=tmp_path / "student.pth", shape=shape, student="vit_s"), CPU)


def test_layers_decay_as_the_recipe_says(data, tmp_path):
    def decay(**changes):
        prepared = prepare(config(tmp_path / "run", data, shape={}, **changes), CPU)
        assert prepared.settings["layer_decay"] == prepared.lr_scale("encoder.blocks.11.attn.qkv.weight")
        assert prepared.lr_scale("encoder.head.weight") == prepared.lr_scale("encoder.fc_norm.weight") == 1
        return prepared.lr_scale("encoder.patch_embed.proj.weight")

    torch.save(export_encoder(create_encoder("vit_s")), tmp_path / "s.pth")
    assert decay(init=tmp_path / "s.pth") == pytest.approx(0.75**13)
    assert decay(student="vit_s") == 1  # from scratch
    assert decay(init=tmp_path / "s.pth", layer_decay=0.5) == pytest.approx(0.5**13)
    torch.save(export_encoder(create_encoder("vit_t")), tmp_path / "t.pth")
    assert decay(init=tmp_path / "t.pth") == 1


def test_the_published_recipe_is_the_default(data, tmp_path):
    given = ClassificationTrainingConfig(run=tmp_path, data=data / "train", shape=SHAPE, image_size=32)
    prepared = prepare(given, CPU)
    train = prepared.train
    assert (train.batch_size, train.steps, train.warmup_steps) == (24, 100, 5)  # all there is, one step an epoch
    assert (given.batch_size, train.lr, train.weight_decay, train.betas) == (1024, 1e-3, 0.05, (0.9, 0.999))
    assert (train.schedule, prepared.settings["drop_path"]) == ("cosine", 0.1)
    expected = {"randaugment": "rand-m9-mstd0.5-inc1", "crop": 0.08, "flip": 0.5, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
    assert prepared.settings["augment"] == expected


def test_a_run_is_a_start_for_another(data, tmp_path):
    finetune_classification(config(tmp_path / "run", data, steps=1))
    start = open_start(tmp_path / "run")
    assert start.student == "vit_t"
    encoder, _, source = start_encoder(tmp_path / "run", None, image_size=32, **SHAPE)
    assert source.endswith("step 1")
    trained = weights_of(tmp_path / "run")
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, trained["encoder.blocks.0.mlp.fc1.weight"])
    assert torch.equal(encoder.norm.weight, trained["encoder.fc_norm.weight"])
    assert start_constants(tmp_path / "run")[0] == IMAGENET_MEAN
    assert start_constants("timm:vit_tiny_patch16_224")[0] == (0.5, 0.5, 0.5)


def test_classes_are_matched_by_name(data, tmp_path):
    write_pictures(tmp_path / "some", 4, 2, {name: COLOURS[name] for name in ("red", "green")})
    train = LabelledPictures(open_source(data / "train"))
    some = LabelledPictures(open_source(tmp_path / "some"), train)
    assert (some.classes, some.class_names) == (3, ["blue", "green", "red"])
    assert {some.key(number).split("/")[0]: int(some.labels[number]) for number in range(4)} == {"green": 1, "red": 2}
    with pytest.raises(SamiCacheError, match=r"other classes than .*: 1 of its 3 are unknown there \(blue\), which has green"):
        LabelledPictures(open_source(data / "train"), LabelledPictures(open_source(tmp_path / "some")))


def test_what_cannot_be_used_is_said(data, tmp_path):
    png = (data / "train" / "red" / "0.png").read_bytes()
    rows = {"image": [{"bytes": png, "path": None}] * 3 + [{"bytes": b"\x89PNG\r\n\x1a\nrest", "path": None}]}
    pq.write_table(pa.table(rows | {"label": [7, -1, 0, 0]}), tmp_path / "few.parquet")
    few = LabelledPictures(open_source(tmp_path / "few.parquet"))
    assert (len(few), few.unlabelled, few.classes, few.class_names) == (3, 1, 8, None)
    with pytest.raises(ImageError, match=r"few\.parquet: few\.parquet/000000003: .*Mend the picture, or move it away"):
        few.image(2)
    train = LabelledPictures(open_source(data / "train"))
    with pytest.raises(SamiCacheError, match="label 7 here, 0 to 2 there"):
        LabelledPictures(open_source(tmp_path / "few.parquet"), train)
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    (tmp_path / "flat").mkdir()
    (tmp_path / "alone.png").rename(tmp_path / "flat" / "alone.png")
    with pytest.raises(SamiCacheError, match=r"no picture at .*flat has a label: expected a folder for each class"):
        LabelledPictures(open_source(tmp_path / "flat"))
    with pytest.raises(SamiCacheError, match="--batch-size 7 is no multiple of 2: mixup and cutmix mix pairs"):
        prepare(config(tmp_path / "run", data, batch_size=7), CPU)
    with pytest.raises(SamiCacheError, match="--layer-decay 0: expected a factor"):
        prepare(config(tmp_path / "run", data, layer_decay=0), CPU)
    with pytest.raises(SamiCacheError, match="--pool mean: expected avg or token"):
        prepare(config(tmp_path / "run", data, pool="mean"), CPU)
    with pytest.raises(SamiCacheError, match=r"flat: the run has no checkpoint yet"):
        open_classifier(tmp_path / "flat")
