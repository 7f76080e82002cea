"""The ONNX files in onnxruntime's hands against torch, on photographs."""

import builtins
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from photos import picture
from typer.testing import CliRunner

import pipelines.export_onnx
from cli.main import app
from pipelines.export_onnx import ExportOnnxConfig, best_first, export_onnx
from sami_cache.errors import DiskFullError, SamiCacheError
from sami_cache.inference.onnx_export import export_decoder, export_encoder
from sami_cache.inference.onnx_variants import agreement
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig
from sami_cache.models.segment_anything_weights import save_segment_anything

SIZE = 128
GRID = SIZE // 16


@pytest.fixture(scope="module", params=["sam", "efficientsam"])
def model(request):
    torch.manual_seed(0)
    return SegmentAnything(SegmentAnythingConfig(family=request.param, depth=2, image_size=SIZE)).eval()


@pytest.fixture(scope="module")
def sessions(model):
    """Encoder, decoder, and the decoder of one mask."""
    files = export_encoder(model), export_decoder(model), export_decoder(model, single_mask=True)
    return [onnxruntime.InferenceSession(file) for file in files]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of two, one upright and one lying."""
    folder = tmp_path_factory.mktemp("photographs")
    picture("coffee").save(folder / "a.png")
    picture("rocket").crop((200, 0, 400, 427)).save(folder / "b.jpg")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_segment_anything(SegmentAnything(SegmentAnythingConfig(family="efficientsam", depth=1)), path)
    return path


@pytest.fixture
def small(monkeypatch):
    """Checkpoints open at 128 pixels: a file of weights does not tell the size."""
    from sami_cache.models.segment_anything_weights import load_segment_anything

    monkeypatch.setattr(pipelines.export_onnx, "open_promptable", lambda path: load_segment_anything(path, image_size=SIZE))


def prompts(batch, queries, points, height, width, seed=0):
    rng = np.random.default_rng(seed)
    coords = (rng.random((batch, queries, points, 2)) * [width, height]).astype(np.float32)
    return coords, rng.integers(0, 2, (batch, queries, points)).astype(np.float32)


def torch_answer(model, embeddings, coords, labels, height, width, *, single=False):
    with torch.inference_mode():
        points = model.to_input(torch.from_numpy(coords), height, width)
        masks = model.decode(embeddings, *model.complete_prompts(points, torch.from_numpy(labels).long()))
        logits, iou = masks.single if single else best_first(masks.three)
        full = model.to_picture(logits.flatten(0, 1), height, width).unflatten(0, logits.shape[:2])
    return full.numpy(), iou.numpy(), logits.numpy()


def onnx_answer(session, embeddings, coords, labels, height, width):
    names = [put.name for put in session.get_inputs()]
    return session.run(None, dict(zip(names, (embeddings, coords, labels, np.array([height, width])), strict=True)))


def closest(got, expected, tolerance):
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=0)


def as_floats(*photos):
    return np.stack([np.asarray(photo) for photo in photos]).transpose(0, 3, 1, 2).astype(np.float32) / 255


def test_inputs_and_outputs_have_the_official_names(sessions):
    encoder, decoder, single = sessions
    assert [(put.name, put.shape) for put in encoder.get_inputs()] == [("batched_images", ["batch", 3, "height", "width"])]
    assert [(put.name, put.shape) for put in encoder.get_outputs()] == [("image_embeddings", ["batch", 256, GRID, GRID])]
    taken = {put.name: (put.shape, put.type) for put in decoder.get_inputs()}
    assert taken == {
        "image_embeddings": (["batch", 256, GRID, GRID], "tensor(float)"),
        "batched_point_coords": (["batch", "queries", "points", 2], "tensor(float)"),
        "batched_point_labels": (["batch", "queries", "points"], "tensor(float)"),
        "orig_im_size": ([2], "tensor(int64)"),
    }
    given = {put.name: put.shape for put in decoder.get_outputs()}
    assert given == {
        "output_masks": ["batch", "queries", 3, "height", "width"],
        "iou_predictions": ["batch", "queries", 3],
        "low_res_masks": ["batch", "queries", 3, 4 * GRID, 4 * GRID],
    }
    assert single.get_outputs()[0].shape == ["batch", "queries", 1, "height", "width"]


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_the_encoder_takes_pictures_of_any_size(model, sessions, name):
    photo = np.asarray(picture(name))
    with torch.inference_mode():
        expected = model.encode(model.preprocess(photo)[None]).numpy()
    (got,) = sessions[0].run(None, {"batched_images": as_floats(photo)})
    # Family sam: Pillow calculates with integers, and single pixels differ by one of 255.
    closest([got], [expected], 0.05 if model.config.family == "sam" else 1e-4)
    assert np.abs(got - expected).mean() < 2e-3


def test_a_picture_of_the_models_size_gives_torchs_embedding(model, sessions):
    photos = [picture(name).crop((40, 0, 40 + SIZE, 80)) for name in ("coffee", "rocket")]
    if model.config.family == "efficientsam":
        photos = [photo.resize((SIZE, SIZE)) for photo in photos]
    with torch.inference_mode():
        expected = model.encode(torch.stack([model.preprocess(np.asarray(photo)) for photo in photos])).numpy()
    closest(sessions[0].run(None, {"batched_images": as_floats(*photos)}), [expected], 1e-4)


@pytest.mark.parametrize(
    ("batch", "queries", "points", "size"), [(1, 1, 1, (300, 451)), (2, 3, 4, (427, 640)), (1, 5, 2, (700, 90))]
)
def test_the_decoder_takes_any_batch_queries_points_and_picture(model, sessions, batch, queries, points, size):
    embeddings = torch.randn(batch, 256, GRID, GRID, generator=torch.Generator().manual_seed(3))
    coords, labels = prompts(batch, queries, points, *size)
    closest(
        onnx_answer(sessions[1], embeddings.numpy(), coords, labels, *size),
        torch_answer(model, embeddings, coords, labels, *size),
        1e-3,
    )
    closest(
        onnx_answer(sessions[2], embeddings.numpy(), coords, labels, *size),
        torch_answer(model, embeddings, coords, labels, *size, single=True),
        1e-3,
    )


def test_boxes_and_absent_points(model, sessions):
    """SAM's padding depends on whether there is a box; -1 fills up the query that has fewer points."""
    embeddings = torch.randn(1, 256, GRID, GRID, generator=torch.Generator().manual_seed(4))
    coords, _ = prompts(1, 2, 2, 200, 300)
    coords[0, 1, 1] = -1
    for labels in ([[2, 3], [1, -1]], [[1, 0], [0, -1]]):
        told = np.array([labels], np.float32)
        got = onnx_answer(sessions[1], embeddings.numpy(), coords, told, 200, 300)
        if model.config.family == "efficientsam":  # its places of no point are those of the input
            with torch.inference_mode():
                points = model.to_input(torch.from_numpy(coords), 200, 300).where(torch.from_numpy(coords) >= 0, -1.0)
                answer = model.decode(embeddings, *model.complete_prompts(points, torch.from_numpy(told).long()))
            expected = best_first(answer.three)
            closest(got[1:], [expected.iou.numpy(), expected.logits.numpy()], 1e-5)
        else:
            closest(got, torch_answer(model, embeddings, coords, told, 200, 300), 1e-3)


def test_efficientsam_cuts_a_query_to_six_points(model, sessions):
    if model.config.family == "sam":
        pytest.skip("takes as many as there are")
    embeddings = torch.randn(1, 256, GRID, GRID).numpy()
    coords, labels = prompts(1, 2, 9, 200, 300)
    nine = onnx_answer(sessions[1], embeddings, coords, labels, 200, 300)
    closest(nine, onnx_answer(sessions[1], embeddings, coords[:, :, :6], labels[:, :, :6], 200, 300), 0)


def test_masks_come_best_first(sessions):
    coords, labels = prompts(1, 8, 1, 200, 300)
    _, iou, _ = onnx_answer(
        sessions[1], np.random.default_rng(0).normal(size=(1, 256, GRID, GRID)).astype("f4"), coords, labels, 200, 300
    )
    assert (np.diff(iou, axis=-1) <= 0).all()


def test_the_command_writes_checked_files_and_says_what_the_small_ones_cost(small, checkpoint, photographs, tmp_path):
    out = tmp_path / "deep" / "onnx"
    arguments = ["--out", str(out), "--fp16", "--int8", "--images", str(photographs), "--runs", "2"]
    done = CliRunner().invoke(app, ["export-onnx", str(checkpoint), *arguments])
    assert done.exit_code == 0, done.output
    names = {"encoder.onnx", "decoder.onnx", "encoder_fp16.onnx", "encoder_int8.onnx"}
    assert {path.name for path in out.iterdir()} == names
    assert (
        len(re.findall(r"IoU of 32 masks with the float32 encoder's: mean [01]\.\d{4}, lowest [01]\.\d{4}", done.output)) == 2
    )
    difference = re.search(r"logits differ by at most (\S+) ", done.output)
    assert difference
    assert 0 < float(difference[1]) < 1e-4
    resizing = re.search(r"relatively by (\S+) where the graph resizes", done.output)
    assert resizing
    assert 0 < float(resizing[1]) < 1e-4
    feed = {"batched_images": as_floats(picture("coffee"))}
    whole, *others = (
        onnxruntime.InferenceSession(out / name).run(None, feed)[0]
        for name in ("encoder.onnx", "encoder_fp16.onnx", "encoder_int8.onnx")
    )
    errors = [np.linalg.norm(other - whole) / np.linalg.norm(whole) for other in others]
    assert 0 < errors[0] < 0.002 < errors[1] < 0.1
    sizes = [(out / name).stat().st_size for name in ("encoder_int8.onnx", "encoder_fp16.onnx", "encoder.onnx")]
    assert sizes[1] < 0.55 * sizes[2]
    assert sizes[0] < 0.8 * sizes[2]

    with pytest.raises(SamiCacheError, match=r"encoder\.onnx is there already: nothing was written"):
        export_onnx(ExportOnnxConfig(model=checkpoint, out=out, images=photographs))


def test_fp16_of_family_sam_keeps_the_pixels_whole(photographs):
    """Values of 255 and the sizes of pictures do not pass through float16."""
    from sami_cache.inference.onnx_variants import half_precision

    torch.manual_seed(0)
    model = SegmentAnything(SegmentAnythingConfig(family="sam", depth=1, image_size=128)).eval()
    encoder = export_encoder(model)
    feed = {"batched_images": as_floats(picture("rocket"))}
    whole, half = (onnxruntime.InferenceSession(file).run(None, feed)[0] for file in (encoder, half_precision(encoder)))
    assert 0 < np.linalg.norm(half - whole) / np.linalg.norm(whole) < 0.005


@pytest.mark.parametrize("family", ["sam", "efficientsam"])
def test_files_that_resize_otherwise_never_appear(small, family, photographs, tmp_path, monkeypatch):
    """They see pictures of the model's own size as torch does, and no others."""
    torch.manual_seed(0)
    save_segment_anything(SegmentAnything(SegmentAnythingConfig(family=family, depth=1)), tmp_path / "model.pt")

    def spoiled(model):
        file = onnx.load_from_string(export_encoder(model))
        for node in file.graph.node:
            if node.op_type == "Resize":
                del node.attribute[:]  # by default the nearest pixel
        return file.SerializeToString()

    monkeypatch.setattr(pipelines.export_onnx, "export_encoder", spoiled)
    with pytest.raises(SamiCacheError, match=r"of other sizes .* differ by 0\..*Nothing was written"):
        export_onnx(ExportOnnxConfig(model=tmp_path / "model.pt", out=tmp_path / "out", images=photographs, runs=1))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_files_that_differ_from_torch_never_appear(small, checkpoint, photographs, tmp_path, monkeypatch, wrong):
    def spoiled(model, **options):
        with torch.no_grad():
            model.mask_decoder.iou_prediction_head.fc.bias += wrong
        file = export_decoder(model, **options)
        with torch.no_grad():
            model.mask_decoder.iou_prediction_head.fc.bias.zero_()
        return file

    monkeypatch.setattr(pipelines.export_onnx, "export_decoder", spoiled)
    with pytest.raises(SamiCacheError, match=r"differ from torch's by .*Nothing was written"):
        export_onnx(ExportOnnxConfig(model=checkpoint, out=tmp_path / "out", images=photographs, runs=1))
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_missing_or_unreadable_is_said(small, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"\xff\xd8\xff no picture")
    config = ExportOnnxConfig(model=checkpoint, out=tmp_path / "out", images=tmp_path / "bad")
    with pytest.raises(SamiCacheError, match=r"a\.jpg: .*Remove it from the folder"):
        export_onnx(config)

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.export_onnx, "write_durably", full)
        with pytest.raises(DiskFullError, match="the disk is full"):
            export_onnx(ExportOnnxConfig(model=checkpoint, out=tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []

    monkeypatch.setattr("sami_cache.inference.onnx_export.find_spec", lambda name: None if name == "onnxruntime" else builtins)
    with pytest.raises(SamiCacheError, match=r"needs onnxruntime, not installed here: pip install 'sami-cache\[onnx\]'"):
        export_onnx(config)


def test_an_encoder_that_no_file_holds_is_refused(model):
    from unittest.mock import Mock

    huge = Mock(config=model.config)
    huge.image_encoder.parameters.return_value = [Mock(numel=lambda: 637_000_000)]
    with pytest.raises(SamiCacheError, match=r"2\.5 GB of weights: one ONNX file holds 2\.1 GB"):
        export_encoder(huge)


def test_agreement_is_the_iou_of_the_masks(model):
    embeddings = [torch.randn(1, 256, GRID, GRID), torch.randn(1, 256, GRID, GRID)]
    assert agreement(model, embeddings, embeddings, [(100, 300), (200, 50)]) == (1, 1, 32)
    other = agreement(model, embeddings, embeddings[::-1], [(100, 300), (200, 50)])
    assert 0 <= other.lowest < other.mean < 1
