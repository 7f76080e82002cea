"""`sami-cache probe`: features are the encoder's, computed once, never taken for others; figures are those of `probing`."""

import json

import numpy as np
import pytest
import torch
from test_classification import COLOURS, SHAPE, config, write_pictures
from typer.testing import CliRunner

import pipelines.probe
from cli.main import app
from pipelines.finetune_classification import finetune_classification
from pipelines.probe import ProbeConfig, probe
from sami_cache.data.labelled import LabelledPictures
from sami_cache.data.sources import open_source
from sami_cache.errors import SamiCacheError
from sami_cache.features import read_features, save_features
from sami_cache.models.students import create_encoder, export_encoder
from sami_cache.models.teachers import load_teacher
from sami_cache.probing import bootstrap_interval, knn_accuracy, linear_accuracy
from sami_cache.tasks.sami import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    write_pictures(folder / "train", 0, 12)
    write_pictures(folder / "test", 1, 6)
    torch.manual_seed(3)
    encoder = create_encoder("vit_t", img_size=32, patch_size=8, depth=2)
    torch.save(export_encoder(encoder, head=False), folder / "weights.pth")
    return folder


def settings(data, **changes) -> ProbeConfig:
    fields = {"train": data / "train", "test": data / "test", "image_size": 32, "ks": (3,), "device": "cpu", "workers": 2}
    return ProbeConfig(**(fields | changes))


def of_student(data, tmp_path, **changes) -> ProbeConfig:
    own = {"weights": data / "weights.pth", "shape": {"patch_size": 8, "depth": 2}, "features": tmp_path / "features"}
    return settings(data, **(own | changes))


def test_figures_are_those_of_the_encoders_features(data, tmp_path):
    found = probe(of_student(data, tmp_path, ks=(3, 5), batch_size=7))
    encoder = create_encoder("vit_t", img_size=32, patch_size=8, depth=2).eval()
    encoder.load_state_dict(torch.load(data / "weights.pth", weights_only=True))
    view = pipelines.probe.evaluation_view(32, 0.875)
    sides = {}
    for name in ("train", "test"):
        pictures = LabelledPictures(open_source(data / name))
        pixels = torch.stack([view(pictures.image(number)) for number in range(len(pictures))]).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            tokens = encoder.forward_features((pixels - mean) / std)
        kept = {pool: x.half().float() for pool, x in {"patches": tokens[:, 1:].mean(1), "class": tokens[:, 0]}.items()}
        sides[name] = kept, pictures.labels
    assert set(found["pools"]) == {"patches", "class"}
    stored = [torch.from_numpy(np.load(path)).float() for path in (tmp_path / "features").glob("*.npy")]
    for expected in [*sides["train"][0].values(), *sides["test"][0].values()]:
        assert any(x.shape == expected.shape and torch.allclose(x, expected, atol=2e-3) for x in stored)
    for pool, values in found["pools"].items():
        (train, labels), (test, true) = ((features[pool], labels) for features, labels in sides.values())
        for k in (3, 5):
            assert values["knn"][str(k)]["accuracy"] == knn_accuracy(train, labels, test, true, k=k)
        linear = values["linear"]
        assert linear["accuracy"] == linear_accuracy(train, labels, test, true)
        assert (linear["low"], linear["high"]) == bootstrap_interval(round(linear["accuracy"] * 18), 18)
    assert found["pools"]["patches"]["linear"]["accuracy"] > 0.9
    assert (found["train"]["pictures"], found["test"]["pictures"], found["test_pictures_in_train"]) == (36, 18, 0)


def test_features_are_computed_once_and_for_nothing_else(data, tmp_path, monkeypatch):
    first = probe(of_student(data, tmp_path))
    assert not first["features_reused"]
    assert len(list((tmp_path / "features").glob("*.npy"))) == 4  # two pools of two sides
    computed = []
    real = pipelines.probe.StudentSubject.pooled
    monkeypatch.setattr(pipelines.probe.StudentSubject, "pooled", lambda *args: computed.append(len(args[1])) or real(*args))
    again = probe(of_student(data, tmp_path, batch_size=5, ks=(3, 4)))
    assert again["features_reused"]
    assert not computed
    assert again["pools"]["class"]["knn"]["3"] == first["pools"]["class"]["knn"]["3"]

    torch.manual_seed(4)
    other = create_encoder("vit_t", img_size=32, patch_size=8, depth=2)
    torch.save(export_encoder(other, head=False), tmp_path / "other.pth")
    write_pictures(tmp_path / "moved" / "train", 5, 12)
    for changes in (
        {"weights": tmp_path / "other.pth"},
        {"train": tmp_path / "moved" / "train"},
        {"image_size": 40},
        {"crop_ratio": 1.0},
        {"shape": {"patch_size": 8, "depth": 2, "num_heads": 1}},
    ):
        computed.clear()
        assert not probe(of_student(data, tmp_path, **changes))["features_reused"]
        assert sum(computed) == (36 if "train" in changes else 54), changes


def test_a_damaged_file_is_computed_again(data, tmp_path):
    only = {"pools": ("class",)}
    expected = probe(of_student(data, tmp_path, **only))["pools"]
    for number, path in enumerate(sorted((tmp_path / "features").iterdir())):
        content = path.read_bytes()
        damaged = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:] if number % 2 else content[: len(content) // 2]
        path.write_bytes(damaged)
        found = probe(of_student(data, tmp_path, **only))
        assert not found["features_reused"]
        assert found["pools"] == expected
        assert probe(of_student(data, tmp_path, **only))["features_reused"]


def test_features_are_kept_as_they_will_be_read(tmp_path):
    of = {"model": "some", "data": "0" * 64}
    assert read_features(tmp_path / "new", of) is None
    kept = save_features(tmp_path / "new", of, np.random.default_rng(0).normal(size=(5, 3)))
    found = read_features(tmp_path / "new", of)
    assert found.dtype == np.float16
    assert np.array_equal(found, kept)
    assert read_features(tmp_path / "new", of | {"data": "1" * 64}) is None
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".npy", ".json"}
    with pytest.raises(SamiCacheError, match="features of some are not finite in float16"):
        save_features(tmp_path / "new", of, np.array([[1e6]]))
    (tmp_path / "file").write_text("")
    with pytest.raises(SamiCacheError, match="Give another place with --features DIR"):
        save_features(tmp_path / "file", of, np.zeros((1, 1)))


def test_a_teacher_is_the_ceiling(data, tmp_path):
    found = probe(settings(data, teacher="efficientnet_lite0", features=tmp_path / "features", image_size=64))
    assert found["pools"]["pooled"]["dimensions"] == 112
    assert found["pools"]["pooled"]["linear"]["accuracy"] > 0.9
    info = load_teacher("efficientnet_lite0", image_size=64).info
    assert found["model"] == {
        "name": f"efficientnet_lite0, layer {info.layer}",
        "source": info.weights,
        "weights_sha256": info.weights_sha256,
    }


def test_the_command_prints_a_table_and_warns_of_leaks(data, tmp_path):
    arguments = ["probe", "--student", "vit_t", "--image-size", 32, "--features", tmp_path / "features", "--pool", "class"]
    arguments += ["--train", data / "train", "--device", "cpu", "--workers", 1]
    done = CliRunner().invoke(app, list(map(str, [*arguments, "--test", data / "train", "--k", "1,2"])), catch_exceptions=False)
    assert done.exit_code == 0
    assert "class, 192 numbers, 1-NN    100.00 % (100.00 to 100.00)" in done.output
    assert "Beware: 36 of the test pictures are among those to learn from" in done.output
    done = CliRunner().invoke(app, list(map(str, [*arguments, "--test", data / "test", "--json"])), catch_exceptions=False)
    found = json.loads(done.stdout)
    assert list(found["pools"]["class"]["knn"]) == ["20"]
    assert found["model"]["source"] == "scratch"


def test_a_classifier_is_probed_too(data, tmp_path):
    write_pictures(tmp_path / "train", 0, 4)
    finetune_classification(config(tmp_path / "run", tmp_path, val=None, steps=1))
    found = probe(settings(data, weights=tmp_path / "run", shape=SHAPE, features=tmp_path / "features"))
    assert found["pools"]["patches"]["dimensions"] == 32


def test_what_cannot_be_probed_is_said(data, tmp_path):
    for changes in ({}, {"teacher": "efficientnet_lite0", "student": "vit_t"}):
        with pytest.raises(SamiCacheError, match="give what is to be probed: RUN_OR_WEIGHTS, or --student"):
            probe(settings(data, **changes))
    with pytest.raises(SamiCacheError, match="--pool cls: expected patches, class or both"):
        probe(of_student(data, tmp_path, pools=("cls",)))
    with pytest.raises(SamiCacheError, match="k is 99: expected 1 to 36"):
        probe(of_student(data, tmp_path, ks=(99,)))
    write_pictures(tmp_path / "other", 0, 1, {"mauve": COLOURS["red"]})
    with pytest.raises(SamiCacheError, match=r"unknown there \(mauve\)"):
        probe(of_student(data, tmp_path, test=tmp_path / "other"))
    done = CliRunner().invoke(app, ["probe", "--k", "ten"])
    assert "--k ten: expected a number" in str(done.exception)
