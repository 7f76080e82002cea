"""The report of a run, its figures, and the demo's photographs."""

import html
import json
import shutil
import socket

import numpy as np
import pytest
from PIL import Image
from test_export import SMALL, jpeg_cache

from pipelines import demo
from pipelines.report import read_metrics, report
from pipelines.train import TrainingConfig, train
from sami_cache.errors import DamageError, IdentityError, SamiCacheError
from sami_cache.report import Row, loss_figure, pca_rgb, reconstruction_figure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    jpeg_cache(folder / "cache.zarr")
    for target in ("teacher", "pixels"):
        train(TrainingConfig(run=folder / target, cache=folder / "cache.zarr", student="vit_t", target=target, **SMALL))
    return folder


def canvas(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def lines(count=30):
    first = {"step": 0, "heldout_loss": 1.5, "heldout_cosine": -0.05}
    rest = [
        {"step": s, "loss": 2 / s, "loss_visible": 1 / s, "loss_masked": None if s == 7 else 2 / s} for s in range(1, count)
    ]
    return [first, *rest, {"step": count, "loss": 0.1, "heldout_loss": 0.5, "heldout_cosine": 0.6}]


def test_the_loss_figure_shows_every_curve():
    figure = loss_figure(lines())
    left, right = figure.axes
    pale, *curves = left.lines
    assert [line.get_label() for line in curves] == ["training loss", "visible tokens", "masked tokens", "held-out loss"]
    assert pale.get_ydata().tolist() == [2 / s for s in range(1, 30)] + [0.1]
    smooth = curves[0].get_ydata()
    assert smooth[0] == 2.0
    assert smooth[-1] == pytest.approx((0.1 + 2 / 29 + 2 / 28) / 3)
    assert curves[3].get_ydata().tolist() == [1.5, 0.5]
    assert right.lines[0].get_xdata().tolist() == [0, 30]
    assert right.get_ylim()[0] <= -0.05
    assert len(curves[2].get_xdata()) == 28  # the null is left out
    pixels = canvas(figure)
    for line in (*curves, *right.lines):
        colour = (
            np.array([round(int(line.get_color().lstrip("#")[i : i + 2], 16)) for i in (0, 2, 4)])
            if "#" in line.get_color()
            else 0
        )
        assert (abs(pixels - colour).max(-1) < 8).sum() > 20, line.get_label()
    # Nothing is cut off at the border.
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_colours_are_those_of_the_reference():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(2, 14, 14, 24)) * 0.6 ** np.arange(24) + 5
    own = pca_rgb(teacher)
    assert own.dtype == np.uint8
    assert own.shape == (2, 14, 14, 3)
    assert all(own[..., channel].std() > 40 for channel in range(3))
    assert np.array_equal(pca_rgb(teacher, like=teacher), own)
    assert np.array_equal(pca_rgb(teacher[:1], like=teacher), own[:1])
    mean = np.broadcast_to(teacher.mean((0, 1, 2)), teacher.shape)
    assert pca_rgb(mean, like=teacher).std((0, 1, 2)).max() == 0
    halved = pca_rgb((teacher + mean) / 2, like=teacher)  # a timid student looks paler; alone it would not
    assert halved.std() < 0.7 * own.std()
    assert abs(pca_rgb((teacher + mean) / 2).astype(int) - own).max() <= 1


def test_features_of_few_channels_can_be_drawn():
    assert pca_rgb(np.random.default_rng(0).normal(size=(5, 5, 2)))[..., 2].max() == 0
    assert pca_rgb(np.ones((4, 4, 8))).shape == (4, 4, 3)


def test_the_reconstruction_figure_keeps_cells_sharp():
    cells = np.random.default_rng(0).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    image = np.full((224, 224, 3), 90, np.uint8)
    rows = [
        Row(name=f"some/long/folder/name/{i}.jpg", image=image, masked=image, target=cells, prediction=cells, cosine=0.5)
        for i in range(3)
    ]
    figure = reconstruction_figure(rows, ("a", "b", "c", "d"), "a caption")
    pixels = canvas(figure)
    assert len(figure.axes) == 12
    assert [axes.get_title() for axes in figure.axes[:4]] == ["a", "b", "c", "d"]
    box = figure.axes[2].get_window_extent()
    area = pixels[::-1][int(box.y0) + 2 : int(box.y1) - 2, int(box.x0) + 2 : int(box.x1) - 2]
    assert len(np.unique(area.reshape(-1, 3), axis=0)) == len(np.unique(cells.reshape(-1, 3), axis=0))


@pytest.mark.parametrize("target", ["teacher", "pixels"])
def test_a_report_says_what_the_log_says(folder, target):
    run = folder / target
    result = report(run, images=3, device="cpu")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert (result.loss_first, result.loss_last) == (losses[0], losses[-1])
    assert result.before["heldout_cosine"] == logged[0]["heldout_cosine"]
    assert result.after["heldout_loss"] == logged[-1]["heldout_loss"]
    assert (result.step, result.held_out, len(result.images)) == (2, True, 3)
    page = result.page.read_text()
    numbers = [losses[0], losses[-1], *result.before.values(), *result.after.values()]
    assert len(numbers) == 14
    for number in numbers:
        assert f">{number:.4f}<" in page
    assert 'src="data:image/png' in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert html.escape(str(folder / "cache.zarr")) in page
    for picture in (result.loss_picture, result.reconstruction_picture):
        with Image.open(picture) as opened:
            assert min(opened.size) > 400
            assert np.asarray(opened.convert("L")).std() > 20
    assert f"{logged[-1]['heldout_cosine']:.4f}" in result.text()


def test_the_picture_agrees_with_the_evaluation(folder, monkeypatch):
    """The rows' cosines over all held-out images average to the metric that training logged."""
    shown = {}
    monkeypatch.setattr(
        "pipelines.report.reconstruction_figure",
        lambda rows, *rest: shown.update(rows=rows) or reconstruction_figure(rows, *rest),
    )
    for target, metric in (("teacher", "heldout_cosine"), ("pixels", "heldout_cosine_masked")):
        result = report(folder / target, images=100, device="cpu")
        assert np.mean([row.cosine for row in shown["rows"]]) == pytest.approx(result.after[metric], abs=1e-5)
        for row in shown["rows"]:
            assert (row.masked == 128).all(-1).mean() == pytest.approx(0.75, abs=0.02)
    for row in shown["rows"]:  # pixels: undoing the patches' normalisation gives the image back
        assert abs(row.target.astype(int) - row.image).max() <= 1
        visible = ~(row.masked == 128).all(-1)
        assert abs(row.prediction[visible].astype(int) - row.image[visible]).max() <= 1
        assert abs(row.prediction[~visible].astype(int) - row.image[~visible]).max() > 20


def test_without_held_out_images_it_says_so(folder, tmp_path):
    train(TrainingConfig(run=tmp_path / "run", cache=folder / "cache.zarr", student="vit_t", **{**SMALL, "holdout": 0.0}))
    result = report(tmp_path / "run", images=2, device="cpu")
    assert not result.held_out
    assert result.after == {}
    assert "images it was trained on" in result.page.read_text()
    assert "held-out" not in result.text()


def test_what_cannot_be_reported(folder, tmp_path):
    with pytest.raises(SamiCacheError, match="there is no run here"):
        report(tmp_path / "nowhere")
    shutil.copytree(folder / "teacher", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report"))
    with pytest.raises(SamiCacheError, match="the run has no checkpoint yet"):
        report(tmp_path / "run")
    assert not (tmp_path / "run" / "report").exists()
    jpeg_cache(tmp_path / "other.zarr", samples=32)
    with pytest.raises(IdentityError, match=r"was trained from the cache .* with --cache"):
        report(folder / "teacher", cache=tmp_path / "other.zarr", device="cpu")
    with pytest.raises(SamiCacheError, match="--images 0"):
        report(folder / "teacher", images=0)


def test_a_torn_last_line_is_dropped_and_damage_is_not(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(DamageError, match="line 1: not JSON"):
        read_metrics(tmp_path)


def test_the_demo_cuts_photographs_without_a_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the demo asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    count = demo.cut_photos(tmp_path / "a")
    files = sorted((tmp_path / "a").rglob("*.jpg"))
    assert len(files) == count >= 200
    assert {path.parent.name for path in files} >= {"astronaut", "chelsea", "china", "flower"}
    sizes = set()
    area = 0
    for path in files:
        with Image.open(path) as opened:
            opened.load()
            assert min(opened.size) >= 64
            assert max(opened.size) / min(opened.size) < 3
            sizes.add(opened.size)
            area += opened.width * opened.height
    assert len(sizes) > 100
    photos = [Image.open(demo._package_folder(package) / file) for package, file, _ in demo.PHOTOS]
    assert area == sum(photo.width * photo.height for photo in photos)  # tiles cover each photograph once
    demo.cut_photos(tmp_path / "b")
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    assert demo.cut_photos(tmp_path / "a") == count
    assert all(path.stat().st_mtime_ns == stamps[path] for path in files[1:])
    assert files[0].exists()


def test_the_demo_says_which_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(SamiCacheError, match=r"pip install 'sami-cache\[demo\]'"):
        demo.cut_photos(tmp_path)


def test_the_demo_runs_and_runs_again(tmp_path, monkeypatch):
    """With few photographs and steps; what it prints are commands of the command line."""
    monkeypatch.setattr(demo, "PHOTOS", demo.PHOTOS[3:5])
    short = {"steps": 2, "decoder_width": 64, "decoder_depth": 1, "batch_size": 8, "log_every": 1, "evaluate_every": 2}
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING | short)
    said: list[str] = []
    first = demo.demo(tmp_path / "demo", said.append)
    text = "\n".join(said)
    commands = [line.removeprefix("$ sami-cache ") for line in text.splitlines() if line.startswith("$ ")]
    assert [line.split()[0] for line in commands] == ["extract", "verify", "train", "export", "report"]
    _parse_as_the_command_line(commands)
    assert first.images == 32
    for path in (first.encoder, first.report.page, first.report.loss_picture, first.cache / "ROOT.json"):
        assert path.exists()
        assert str(path.parent) in text
    assert f"{first.report.before['heldout_cosine']:.3f} -> {first.report.after['heldout_cosine']:.3f}" in text
    said.clear()
    monkeypatch.setattr("pipelines.extract.run_shards", lambda *args: pytest.fail("nothing was left to extract"))
    again = demo.demo(tmp_path / "demo", said.append)
    assert again.report.after == first.report.after
    assert "finished already" in "\n".join(said)


def _parse_as_the_command_line(commands):
    import typer

    from cli.main import app

    group = typer.main.get_command(app)
    for line in commands:
        name, *arguments = line.split()
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_both_feature_columns_have_the_teachers_colours(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pipelines.report.pca_rgb", lambda features, like=None: asked.append((features, like)) or pca_rgb(features, like)
    )
    report(folder / "teacher", images=2, device="cpu")
    (teacher, own), (student, like) = asked
    assert own is None
    assert like is teacher
    assert student.shape == teacher.shape
