"""Pretraining runs through the pipeline: SAMI, MAE and the online teacher on real photographs, stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from photos import photo_folder

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from pipelines.train import TrainingConfig, prepare, train
from sami_cache.checkpoints import load_newest
from sami_cache.errors import IdentityError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.tasks.sami import CacheTargets

LITE0 = {"teacher": "efficientnet_lite0", "grid": 14, "shard_samples": 16, "device": "cpu"}
SMALL = {"student": "vit_t", "decoder_depth": 1, "decoder_width": 64, "batch_size": 16, "device": "cpu", "holdout": 0.1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    photo_folder(folder / "photos", 64)
    extract(ExtractConfig(data=folder / "photos", cache=folder / "cache.zarr", **LITE0))
    return folder


def config(folder, run, **changes):
    return TrainingConfig(**{"run": run, "cache": folder / "cache.zarr", **SMALL, **changes})


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_says_how(folder, tmp_path):
    last = train(config(folder, tmp_path / "run", steps=20, log_every=1, base_lr=3e-3, batch_size=8))
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(21))
    assert logged[-1]["loss"] < 0.75 * logged[1]["loss"]
    assert last["heldout_loss"] < logged[0]["heldout_loss"]
    for line in logged[1:]:
        # All tokens weigh the same: 49 visible and 147 masked ones.
        assert line["loss"] == pytest.approx((49 * line["loss_visible"] + 147 * line["loss_masked"]) / 196, rel=1e-5)
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait_percent"] <= 100
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["cache"]["cache_id"] == Cache(folder / "cache.zarr").cache_id
    assert saved["config"]["train"]["lr"] == pytest.approx(3e-3 * 8 / 256)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_code_space_is_feature_space(folder):
    """The loss against codes equals the loss against decoded features, and targets decode to the cache's own embeddings."""
    cache = Cache(folder / "cache.zarr")
    prepared = prepare(config(folder, folder / "unused", holdout=0.0), CPU)
    batch = next(prepared.task.train.evaluation(8))
    targets = CacheTargets(cache.codec)
    values = targets(batch, torch.zeros(8, 3, 224, 224), 14)
    features = targets.features(values).transpose(1, 2).unflatten(2, (14, 14))
    for index, number in enumerate(batch.samples.tolist()):
        want = cache.read_embedding(number)
        assert np.abs(features[index].numpy() - want).max() < 1e-4 * np.abs(want).max()
    other = values + 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    in_codes = (other - values).square().sum() * cache.codec.variance
    in_features = (targets.features(other) - targets.features(values)).square().sum()
    assert float(in_codes) == pytest.approx(float(in_features), rel=1e-5)


def test_sami_mae_and_online_differ_by_one_flag(folder, tmp_path):
    runs = {
        "sami": config(folder, tmp_path / "sami", steps=2),
        "mae": config(folder, tmp_path / "mae", steps=2, target="pixels"),
        "online": config(folder, tmp_path / "online", steps=2, teacher_online=True),
    }
    prepared = {name: prepare(run, CPU) for name, run in runs.items()}
    batches = {name: next(one.task.batches(0)) for name, one in prepared.items()}
    for name in ("mae", "online"):  # the same images, views and masks
        assert batches[name].keys == batches["sami"].keys
        assert torch.equal(batches[name].pixels, batches["sami"].pixels)
        assert torch.equal(batches[name].ids_shuffle, batches["sami"].ids_shuffle)
    encoders = [one.task.model.encoder.state_dict() for one in prepared.values()]
    for other in encoders[1:]:  # from the same start
        assert all(torch.equal(encoders[0][key], other[key]) for key in other)
    assert prepared["mae"].task.config.tokens == "masked"
    assert prepared["mae"].task.targets.channels == 768
    for name, run in runs.items():
        assert train(run)["loss"] > 0, name


def test_cached_dense_targets_resemble_the_online_teachers(folder):
    """Crops of the features against features of the crops: not the same thing, but the same image in the same place."""
    cached = prepare(config(folder, folder / "a"), CPU).task
    online = prepare(config(folder, folder / "b", teacher_online=True), CPU).task
    batch_c, batch_o = next(cached.batches(0)), next(online.batches(0))
    pixels = torch.zeros(16, 3, 224, 224)
    a = cached.targets.features(cached.targets(batch_c, pixels, 14))
    b = online.targets.features(online.targets(batch_o, pixels, 14))
    mean = torch.from_numpy(Cache(folder / "cache.zarr").codec.mean)
    right = torch.nn.functional.cosine_similarity(a - mean, b - mean, dim=-1).mean()
    mirrored = b.unflatten(1, (14, 14)).flip(2).flatten(1, 2)
    wrong = torch.nn.functional.cosine_similarity(a - mean, mirrored - mean, dim=-1).mean()
    assert right > 0.25
    assert right > wrong + 0.1


def test_training_without_any_cache(folder, tmp_path):
    last = train(
        TrainingConfig(
            run=tmp_path / "run", data=folder / "photos", teacher="efficientnet_lite0", teacher_online=True, steps=2, **SMALL
        )
    )
    assert last["heldout_cosine"] > -1
    with pytest.raises(SamiCacheError, match="there is nothing to train from"):
        train(TrainingConfig(run=tmp_path / "other", **SMALL))


def test_killed_and_resumed_losses_are_bit_equal(folder, tmp_path, spawn):
    common = ["train", "--cache", str(folder / "cache.zarr"), "--student", "vit_t", "--decoder-depth", "1"]
    common += ["--decoder-width", "64", "--batch-size", "8", "--steps", "30", "--log-every", "1", "--checkpoint-every", "4"]
    common += ["--device", "cpu", "--evaluate-every", "30", "--holdout", "0.1"]

    calm = spawn(*common, "--run", str(tmp_path / "calm"))
    calm.join(120)
    assert calm.exitcode == 0
    process = spawn(*common, "--run", str(tmp_path / "killed"), "--workers", "2")
    wait_for_step(tmp_path / "killed", 6)
    process.kill()
    process.join()
    again = spawn(*common, "--run", str(tmp_path / "killed"), "--resume", "--workers", "1")
    again.join(120)
    assert again.exitcode == 0
    expected, found = lines(tmp_path / "calm"), lines(tmp_path / "killed")
    assert [line["step"] for line in found] == list(range(31))
    assert [line.get("loss") for line in found] == [line.get("loss") for line in expected]
    weights = [load_newest(tmp_path / name / "checkpoints").model for name in ("calm", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_signal_leaves_a_checkpoint(folder, tmp_path, spawn):
    run = tmp_path / "run"
    common = ["train", "--cache", str(folder / "cache.zarr"), "--student", "vit_t", "--decoder-depth", "1", "--device", "cpu"]
    process = spawn(*common, "--batch-size", "8", "--steps", "100000", "--log-every", "1", "--run", str(run))
    wait_for_step(run, 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert load_newest(run / "checkpoints").step >= 2


def wait_for_step(run, step):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in complete_lines(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within a minute")


def complete_lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]


def test_two_resume_verbs(folder, tmp_path):
    train(config(folder, tmp_path / "first", steps=2))
    with pytest.raises(SamiCacheError, match="is not empty: --resume continues the run in it, --run DIR starts one"):
        train(config(folder, tmp_path / "first", steps=2))
    with pytest.raises(IdentityError, match=r"train\.steps: 2 in the run, 4 now"):
        train(config(folder, tmp_path / "first", steps=4, resume=True))
    with pytest.raises(IdentityError, match=r"sami\.mask_ratio: 0\.75 in the run, 0\.5 now"):
        train(config(folder, tmp_path / "first", steps=2, mask_ratio=0.5, resume=True))
    train(config(folder, tmp_path / "second", steps=1, init=tmp_path / "first", base_lr=1e-12, warmup_epochs=0))
    first, second = (load_newest(tmp_path / name / "checkpoints").model for name in ("first", "second"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_partial_reconstruction_is_part_of_the_run(folder, tmp_path):
    """Half of the masked tokens are scored in training, all of them in evaluation; the share is saved and compared."""
    run = tmp_path / "run"
    some = {"steps": 1, "log_every": 1, "reconstruct": 0.5, "base_lr": 1e-12, "warmup_epochs": 0}
    task = prepare(config(folder, run, **some), CPU).task
    batch = next(task.batches(0))
    with torch.no_grad():
        _, every, _ = task.predict(task.model, batch)
        prediction, target, mask = task.predict(task.model, batch, 0.5)
    tokens = batch.ids_shuffle[:, : 49 + 73].sort(dim=1)[0]
    assert torch.equal(target, torch.stack([values[ids] for values, ids in zip(every, tokens, strict=True)]))
    assert prediction.shape == target.shape
    assert mask.sum(1).tolist() == [73] * 16
    train(config(folder, run, **some))
    before, line = lines(run)
    # 49 visible tokens and 73 of the 147 masked ones.
    assert line["loss"] == pytest.approx((49 * line["loss_visible"] + 73 * line["loss_masked"]) / 122, rel=1e-5)
    train(config(folder, tmp_path / "all", **(some | {"reconstruct": 1.0})))
    assert lines(tmp_path / "all")[0]["heldout_loss"] == before["heldout_loss"]
    with pytest.raises(IdentityError, match=r"sami\.reconstruct: 0\.5 in the run, 1\.0 now"):
        train(config(folder, run, **(some | {"reconstruct": 1.0, "resume": True})))
    with pytest.raises(SamiCacheError, match=r"reconstruct 1\.5 decodes 220 of 147 masked tokens: take a share between"):
        train(config(folder, tmp_path / "refused", reconstruct=1.5))
    assert not (tmp_path / "refused").exists()


def test_read_only_caches_train(folder, tmp_path):
    """Nothing in the cache is opened for writing: here by root too, whom permissions do not stop."""
    import shutil

    shutil.copytree(folder / "cache.zarr", tmp_path / "cache.zarr")
    for path in [tmp_path / "cache.zarr", *(tmp_path / "cache.zarr").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    seen: list[str] = []
    watching = [True]

    def audit(event: str, given: tuple) -> None:
        wrote = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if watching[0] and (wrote or event.startswith(("os.mkdir", "os.rename", "os.link", "os.remove", "os.chmod"))):
            seen.append(str(given[0]))

    sys.addaudithook(audit)
    before = {str(path): path.stat().st_mtime_ns for path in (tmp_path / "cache.zarr").rglob("*")}
    train(config(folder, tmp_path / "run", cache=tmp_path / "cache.zarr", steps=4))
    watching[0] = False
    assert seen
    assert [path for path in seen if "cache.zarr" in path] == []
    assert {str(path): path.stat().st_mtime_ns for path in (tmp_path / "cache.zarr").rglob("*")} == before


def test_another_cache_is_not_the_same_run(folder, tmp_path):
    train(config(folder, tmp_path / "run", steps=1))
    extract(ExtractConfig(data=folder / "photos", cache=tmp_path / "b.zarr", **{**LITE0, "error": 0.05}))
    with pytest.raises(IdentityError, match=r"cache\.identity\.codec\.error"):
        train(config(folder, tmp_path / "run", steps=1, resume=True, cache=tmp_path / "b.zarr"))


def test_two_processes_train_as_one(folder, tmp_path):
    """torchrun for real, two gloo processes: the same losses as one process, up to the order of a sum."""
    common = ["--cache", str(folder / "cache.zarr"), "--student", "vit_t", "--decoder-depth", "1", "--decoder-width", "64"]
    common += ["--batch-size", "16", "--steps", "3", "--log-every", "1", "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli.main"]
    done = subprocess.run(
        [*launcher, "train", *common, "--run-dir", str(tmp_path / "two")],
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    train(config(folder, tmp_path / "one", steps=3, log_every=1, holdout=0.02))
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["loss"] for line in two[1:]] == pytest.approx([line["loss"] for line in one[1:]], rel=1e-4)


def test_the_defaults_are_the_papers(folder, tmp_path):
    prepared = prepare(TrainingConfig(run=tmp_path / "run", cache=folder / "cache.zarr", device="cpu"), CPU)
    step = prepared.train
    assert prepared.settings["decoder"] == {"width": 512, "depth": 8, "keys_values": "visible+mask"}
    assert (step.betas, step.weight_decay) == ((0.9, 0.95), 0.05)
    assert step.lr == pytest.approx(1.5e-4 * step.batch_size / 256)
    assert step.steps == 400 * prepared.task.train.steps_per_epoch
    assert step.warmup_steps * 10 == step.steps
    assert prepared.task.config.mask_ratio == 0.75
    assert prepared.task.config.reconstruct == 1
    assert prepared.task.model.encoder.embed_dim == 384
