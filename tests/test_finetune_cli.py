"""`sami-cache finetune promptable`, from a student, a checkpoint, a cache; opened again; and what is refused."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch
from photos import pieces
from PIL import Image
from test_promptable import write_pictures
from typer.testing import CliRunner

from cli.main import app
from pipelines.finetune_promptable import PromptableTrainingConfig, finetune_promptable, prepare, start_model
from pipelines.promptable import open_promptable
from sami_cache.checkpoints import save_checkpoint
from sami_cache.data.images import decode_image, encode_jpeg
from sami_cache.data.sources import open_source
from sami_cache.errors import IdentityError, SamiCacheError
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import load_segment_anything, save_segment_anything
from sami_cache.models.students import create_encoder
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.commits import OK, Sample
from sami_cache.store.creation import create_cache
from sami_cache.store.files import digest
from sami_cache.store.fitting import fit_codec
from sami_cache.store.writing import seal_cache, write_shard
from sami_cache.tasks.neck import NeckTask

CPU = torch.device("cpu")
SMALL = {"image_size": 64, "depth": 1, "steps": 2, "batch_size": 2, "device": "cpu", "workers": 1, "precision": "float32"}


def config(run, annotated=None, **changes) -> PromptableTrainingConfig:
    rounds = {} if "from_cache" in changes else {"error_points": 1, "mask_rounds": 1}
    fields = SMALL | {"run": run} | rounds
    if annotated is not None:
        fields |= {"data": annotated / "instances.json", "images": annotated}
    return PromptableTrainingConfig(**(fields | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "data"
    write_pictures(folder, 3)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Six photographs with embeddings that a SAM might have given, 256 channels, 4 x 4: square, wide, and as they come."""
    folder = tmp_path_factory.mktemp("neck")
    return neck_cache(folder / "cache.zarr", write_photos(folder / "photos", 0)), folder / "photos"


def write_photos(folder, seed):
    folder.mkdir()
    for number, photo in enumerate(pieces(6, seed)):
        size = {0: (96, 96), 1: (128, 64)}.get(number, photo.size)
        photo.resize(size).save(folder / f"{number}.png")
    return open_source(folder)


def neck_cache(path, source, **teacher) -> Cache:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(256, 6))
    embeddings = np.einsum("ck,nkyx->ncyx", mixing, rng.normal(size=(6, 6, 4, 4))).astype(np.float32)
    identity = {
        "teacher": {"name": "vit_b", "layer": "neck", "channels": 256, "stride": 16, "weights_sha256": "0" * 64} | teacher,
        "precision": "float32",
        "grid": 4,
        "view": {"mode": "dense"},
        "codec": {"name": "pca", "error": 0.01},
        "images": {"short_side": 256, "quality": 90},
        "source_kind": "folder",
    }
    codec = fit_codec("pca", embeddings, error=0.01)
    made = create_cache(
        path,
        identity=identity,
        codec=codec,
        layout=choose_layout(codec, 4, 6, 4),
        keys=source.keys,
        labels=source.labels,
        class_names=source.class_names,
        provenance={"note": "made by the tests"},
    )
    for shard in range(made.shards):
        numbers = made.shard_samples(shard)
        images = [decode_image(source.read(number)) for number in numbers]
        samples = [
            Sample(
                key=source.keys[number],
                label=source.labels[number],
                source=digest(source.read(number)),
                width=image.width,
                height=image.height,
                status=OK,
            )
            for number, image in zip(numbers, images, strict=True)
        ]
        jpegs = [encode_jpeg(image) for image in images]
        write_shard(made, shard, embeddings[numbers.start : numbers.stop], samples, jpegs)
    seal_cache(made)
    return made


def test_the_command_trains_and_its_run_opens(data, tmp_path):
    run = tmp_path / "run"
    arguments = [
        "finetune",
        "promptable",
        "--data",
        data / "instances.json",
        "--images",
        data,
        "--val",
        data / "instances.json",
    ]
    arguments += ["--run", run, "--image-size", 64, "--steps", 2, "--batch-size", 2, "--error-points", 1, "--mask-rounds", 0]
    arguments += ["--device", "cpu", "--workers", 1, "--family", "efficientsam"]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    assert "vit_t at 64 px, family efficientsam; 3 pictures to train on, 3 held out; 2 steps of 2" in done.output
    assert "held-out mIoU: box 0." in done.output
    assert "(the box itself: 0." in done.output
    settings = json.loads((run / "config.json").read_text())["config"]
    assert settings["train"]["schedule"] == "linear"
    assert (settings["train"]["weight_decay"], settings["train"]["betas"], settings["train"]["lr"]) == (0.1, [0.9, 0.999], 4e-4)
    model = open_promptable(run)
    assert model.config == SegmentAnythingConfig(family="efficientsam", encoder="vit_t", image_size=64)
    again = start_model(config(tmp_path / "none", data, init=run, depth=None))
    assert again.config.family == "efficientsam"
    assert all(torch.equal(*pair) for pair in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    other = start_model(config(tmp_path / "none", data, init=run, family="sam"))
    assert other.config.family == "sam"
    assert torch.equal(other.image_encoder.state_dict()["neck.0.weight"], model.image_encoder.state_dict()["neck.0.weight"])


@pytest.mark.parametrize("kind", ["prompts", "cache"])
def test_a_run_resumes_to_the_same_weights(data, cache, tmp_path, kind):
    from_what = {"from_cache": cache[0].path} if kind == "cache" else {"annotated": data}
    options = {"steps": 3, "checkpoint_every": 1, "log_every": 1, **from_what}
    finetune_promptable(config(tmp_path / "whole", **options))

    def pull_the_plug(line):
        if line["step"] == 2:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        finetune_promptable(config(tmp_path / "part", **options), pull_the_plug)
    steps = []
    finetune_promptable(config(tmp_path / "part", **options, resume=True), lambda line: steps.append(line["step"]))
    assert steps == [2, 3]
    whole, part = (open_promptable(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_a_run_is_exported_and_read_back(data, tmp_path):
    options = {"family": "efficientsam", "mask_rounds": 0}
    finetune_promptable(config(tmp_path / "run", data, steps=1, image_size=96, **options))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    path = tmp_path / "run" / "efficientsam_vit_t.pt"
    assert f"{path}: " in result.output.replace("\n", "")
    model, run = load_segment_anything(path), open_promptable(tmp_path / "run")
    assert model.config == run.config
    assert model.config.image_size == 96
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in run.state_dict().items())
    assert start_model(config(tmp_path / "none", init=tmp_path / "run", image_size=None, **options)).config.image_size == 96
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "nothing was overwritten" in str(result.exception)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", "x.bin"])
    assert "ends in .pt or .pth" in str(result.exception)


def test_other_settings_do_not_resume(data, tmp_path):
    finetune_promptable(config(tmp_path / "run", data, steps=1))
    with pytest.raises(IdentityError, match=r"rounds\.error_points: 1 in the run, 2 now"):
        finetune_promptable(config(tmp_path / "run", data, steps=1, error_points=2, resume=True))
    write_pictures(tmp_path / "other", 3, whole=False)
    with pytest.raises(IdentityError, match=r"annotations\.train: "):
        finetune_promptable(config(tmp_path / "run", tmp_path / "other", steps=1, resume=True))


def test_the_published_recipe_is_the_default(data, tmp_path):
    chosen = {"error_points": None, "mask_rounds": None, "steps": None, "batch_size": 128}
    prepared = prepare(config(tmp_path / "run", data, **chosen), CPU)
    assert prepared.settings["rounds"] == {"error_points": 8, "mask_rounds": 2}
    assert (prepared.train.steps, prepared.train.batch_size) == (5, 3)  # five epochs of all there is
    assert prepared.settings["prompts"]["max_objects"] == 64
    prepared = prepare(config(tmp_path / "run", data, **chosen, family="efficientsam"), CPU)
    assert prepared.settings["rounds"] == {"error_points": 4, "mask_rounds": 0}
    assert prepared.settings["focal_weight"] == 20


def test_the_focal_loss_counts_as_much_as_asked(data, tmp_path):
    losses = []
    for weight in (0.0, 10.0, 20.0):
        task = prepare(config(tmp_path / "run", data, focal_weight=weight), CPU).task
        with closing(task.batches(0)) as batches:
            losses.append(float(task.loss(task.model, next(batches), CPU)["loss"].detach()))
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SamiCacheError, match=r"focal_weight is .* expected 0 or more"):
            prepare(config(tmp_path / "run", data, focal_weight=bad), CPU)


def test_a_frozen_decoder_stays_as_it_was_loaded(data, tmp_path):
    torch.manual_seed(9)
    file = tmp_path / "decoder.pth"
    source = SegmentAnything(SegmentAnythingConfig(encoder="vit_t", depth=1, image_size=64))
    save_segment_anything(source, file)
    finetune_promptable(config(tmp_path / "run", data, decoder=file, freeze_decoder=True))
    model = open_promptable(tmp_path / "run")
    for name, value in source.state_dict().items():
        same = torch.equal(value, model.state_dict()[name])
        assert same != name.startswith("image_encoder.") or (same and name.endswith("bias")), name
    with pytest.raises(SamiCacheError, match="is not of family efficientsam"):
        start_model(config(tmp_path / "run", data, decoder=file, family="efficientsam"))


def test_a_pretrained_student_is_taken_over(data, tmp_path):
    torch.manual_seed(4)
    encoder = create_encoder("vit_t", depth=2)
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    (tmp_path / "sami").mkdir()
    settings = {"student": "vit_t", "decoder": {}, "train": {}}
    (tmp_path / "sami" / "config.json").write_text(json.dumps({"config": settings}))
    save_checkpoint(tmp_path / "sami" / "checkpoints", 7, model=weights, optimizer={}, config=settings, progress={}, keep=1)
    model = start_model(config(tmp_path / "run", data, init=tmp_path / "sami"))
    assert model.config.depth == 2
    assert torch.equal(
        model.image_encoder.state_dict()["blocks.1.attn.qkv.weight"], encoder.state_dict()["blocks.1.attn.qkv.weight"]
    )
    with pytest.raises(SamiCacheError, match=r"--student vit_s: .* is a vit_t"):
        start_model(config(tmp_path / "run", data, init=tmp_path / "sami", student="vit_s"))


def test_a_cache_of_necks_teaches_the_encoder_alone(cache, tmp_path):
    made, _ = cache
    options = {"from_cache": made.path, "holdout": 0.3, "steps": 25, "lr": 2e-3, "log_every": 1, "evaluate_every": 25}
    last = finetune_promptable(config(tmp_path / "run", **options))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert last["loss"] < 0.9 * logged[1]["loss"]
    assert "heldout_cosine" in last
    model = open_promptable(tmp_path / "run")
    torch.manual_seed(0)
    start = start_model(config(tmp_path / "none"))
    changed = {
        name.split(".")[0] for name, value in start.state_dict().items() if not torch.equal(value, model.state_dict()[name])
    }
    assert changed == {"image_encoder"}
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert settings["from_cache"]["cache_id"] == made.cache_id


def test_what_is_matched_is_the_cache_where_the_picture_is(cache, tmp_path):
    made, photos = cache
    for data in (None, photos):
        prepared = prepare(config(tmp_path / "run", from_cache=made.path, holdout=0.0, data=data), CPU)
        task = prepared.task
        assert isinstance(task, NeckTask)
        keys = made.table()["key"].to_pylist()
        for name, (rows, columns) in {"0.png": (64, 64), "1.png": (32, 64)}.items():
            number = keys.index(name)
            taught = task.steps.make(0, number)
            assert taught.covered.tolist() == [rows / 16, columns / 16]
            assert np.array_equal(taught.target.numpy(), made.read_embedding(number))
            picture = prepared.task.model.preprocess(np.array(Image.open(photos / name).resize((columns, rows))))
            assert float((taught.pixels - picture).abs().mean()) < (0.25 if data is None else 0.1)
            assert taught.pixels[:, rows:].abs().sum() == 0
            batch = type(taught)(*(value[None] for value in taught))
            answer = torch.randn(1, 256, 4, 4)
            if rows == columns:
                answer[:] = batch.target
                assert float(task.loss(lambda pixels, answer=answer: answer, batch, CPU)["loss"]) < 1e-9
            before = float(task.loss(lambda pixels, answer=answer: answer, batch, CPU)["loss"])
            answer[:, :, rows // 16 :] += 9  # the padding
            assert float(task.loss(lambda pixels, answer=answer: answer, batch, CPU)["loss"]) == before
            answer[:, :, :1] += 9
            assert float(task.loss(lambda pixels, answer=answer: answer, batch, CPU)["loss"]) > before + 1


def test_other_caches_are_refused(cache, tmp_path):
    made, photos = cache
    for number, (change, found) in enumerate(
        [
            ({"layer": "trunk"}, "vit_b, layer trunk, 256 channels, dense"),
            ({"name": "efficientnet_lite0", "layer": "2"}, "efficientnet_lite0, layer 2"),
        ]
    ):
        other = neck_cache(tmp_path / f"{number}.zarr", open_source(photos), **change)
        with pytest.raises(SamiCacheError, match=f"holds other features than SAM's decoder reads: .*found {found}"):
            prepare(config(tmp_path / "run", from_cache=other.path), CPU)
    write_photos(tmp_path / "others", 3)
    prepared = prepare(config(tmp_path / "run", from_cache=made.path, data=tmp_path / "others", holdout=0.0), CPU)
    with pytest.raises(IdentityError, match="is not the one the cache was made from"):
        prepared.task.steps.make(0, 0)


def test_what_cannot_be_done_is_said(data, tmp_path):
    with pytest.raises(SamiCacheError, match="there is nothing to train on: give --data"):
        prepare(config(tmp_path / "run"), CPU)
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "annotations": []}))
    empty = config(tmp_path / "run", tmp_path)
    with pytest.raises(SamiCacheError, match="has no object to learn"):
        prepare(empty, CPU)
    with pytest.raises(SamiCacheError, match="since a decoder of family efficientsam takes no mask"):
        prepare(config(tmp_path / "run", data, family="efficientsam"), CPU)
