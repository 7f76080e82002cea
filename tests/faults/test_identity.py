"""Going on with another teacher, other preprocessing or other images: refused before the teacher runs, field by field.

A half-finished extraction is continued with the same settings but one: a checkpoint of the teacher in which one random value of
a random tensor differs, another size, layer, precision, codec or view; or with images that were edited (same size, same time
stamp, same decoded size), removed, renamed or relabelled. Every attempt must be refused with the name of the field or of
the image, before a single image reaches the teacher, and leave the cache as it is, byte by byte. What changes nothing (another
time stamp, a copy of the folder, the weights in another file format) must be accepted.
"""

import os
import random
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from conftest import tree
from photos import photo_folder, pieces
from safetensors.torch import save_file

import pipelines.extract
from pipelines.encoding import Encoder
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from sami_cache.data.images import decode_image
from sami_cache.errors import IdentityError, ImageError
from sami_cache.models.weights import bundled_lite0, lite0_state, read_state
from sami_cache.store.cache import Cache

SEED = 20261123
LITE0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 8, "device": "cpu", "workers": 2}
COMMITTED = 3
SETTINGS = {
    "grid": ({"grid": 5}, "grid: the cache has 4, you ask for 5"),
    "image size": ({"image_size": 96}, "teacher.image_size: the cache has 64, you ask for 96"),
    "layer": ({"layer": "2", "image_size": 64}, "teacher.layer"),
    "precision": ({"precision": "bfloat16"}, "precision: the cache has 'float32', you ask for 'bfloat16'"),
    "codec": ({"codec": "int8"}, "codec.name: the cache has 'pca', you ask for 'int8'"),
    "error": ({"error": 0.02}, "codec.error: the cache has 0.01, you ask for 0.02"),
    "views": ({"views": 2}, "view.mode: the cache has 'dense', you ask for 'replay'"),
    "images": ({"images": False}, "images: the cache has"),
    "teacher": ({"teacher": "resnet10t", "weights": "random", "layer": None}, "teacher.name"),
}


class Reached(Exception):
    """The teacher was asked for something."""


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A cache of 40 photographs of which three of five shards are committed."""
    folder = tmp_path_factory.mktemp("identity")
    photo_folder(folder / "photos", 40)
    real, left = pipelines.extract.write_shard, iter(range(COMMITTED))

    def stops(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.extract, "write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            extract(ExtractConfig(data=folder / "photos", cache=folder / "cache.zarr", **LITE0))
    assert len(Cache(folder / "cache.zarr").committed()) == COMMITTED
    return folder


@pytest.fixture
def idle(monkeypatch):
    """A teacher that says when it is run."""

    def reached(self, batch):
        raise Reached

    monkeypatch.setattr(Encoder, "launch", reached)


def go_on(folder: Path, data: Path | None = None, **changes) -> None:
    extract(ExtractConfig(**{"data": data or folder / "photos", "cache": folder / "cache.zarr", **LITE0, **changes}))


def change_weight(rng: random.Random, target: Path) -> Path:
    """The teacher's own file with the smallest possible change to one value."""
    state = dict(read_state(bundled_lite0()))
    # What comes behind the stage that is tapped is no part of the teacher.
    name = rng.choice([name for name in state if name.startswith("_blocks.") and int(name.split(".")[1]) < 11])
    if not state[name].is_floating_point():
        name = "_conv_stem.weight"
    values = state[name].clone().contiguous()
    place = rng.randrange(values.numel())
    values.view(-1)[place] = torch.nextafter(values.view(-1)[place], torch.tensor(torch.inf))
    torch.save({**state, name: values}, target)
    return target


def edit_image(rng: random.Random, path: Path) -> None:
    """Flip bits of an image until it decodes to other pixels; its size in bytes and its time stamp stay."""
    before, status = path.read_bytes(), path.stat()
    while True:
        data = bytearray(before)
        data[rng.randrange(len(data) // 2, len(data) - 2)] ^= 1 << rng.randrange(8)
        with suppress(ImageError):
            if decode_image(bytes(data)).tobytes() != decode_image(before).tobytes():
                break
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_images(rng: random.Random, kind: str, half: Path, folder: Path) -> str:
    """Make `folder`, a copy of the photographs that differs in one way; returns what the error must name."""
    shutil.copytree(half / "photos", folder)
    keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    # What was not extracted yet may be edited; what is listed may not change.
    key = rng.choice(keys[: COMMITTED * 8] if kind in ("edited", "replaced", "unreadable") else keys)
    path = folder / key
    if kind == "edited":
        edit_image(rng, path)
    elif kind == "replaced":
        pieces(1, seed=rng.randrange(1000) + 7)[0].save(path)
    elif kind == "unreadable":
        path.unlink()
        path.symlink_to("nowhere")
    elif kind == "removed":
        path.unlink()
    elif kind == "renamed":
        path.rename(path.with_name("zz.jpg"))
    else:  # every class number moves by one
        (folder / "aaa").mkdir()
        path.rename(folder / "aaa" / path.name)
    return key


IMAGES = ("edited", "replaced", "unreadable", "removed", "renamed", "relabelled")


def play(half: Path, folder: Path, rounds: int) -> Counter:
    rng, seen = random.Random(SEED), Counter()
    before = tree(half / "cache.zarr")

    def refused(what: str, names: str, **changes) -> None:
        with pytest.raises(IdentityError) as caught:
            go_on(half, **changes)
        assert names in str(caught.value), (what, names, str(caught.value))
        assert tree(half / "cache.zarr") == before
        seen[what] += 1

    for number in range(rounds):
        weights = change_weight(rng, folder / "changed.pth")
        refused("one value of the weights", "teacher.weights_sha256: the cache has", weights=str(weights))
        kind = IMAGES[number % len(IMAGES)]
        named = other_images(rng, kind, half, folder / f"photos{number}")
        refused(f"images {kind}", named, data=folder / f"photos{number}")
        shutil.rmtree(folder / f"photos{number}")
    for name, (changes, field) in SETTINGS.items():
        refused(f"settings: {name}", field, **changes)
    return seen


def accepted(half: Path, folder: Path) -> Counter:
    """What changes nothing goes on to the teacher."""
    seen = Counter()
    shutil.copytree(half / "photos", folder / "copy")
    for path in (folder / "copy").rglob("*.jpg"):
        os.utime(path, (1, 1))
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    state = {name: value.contiguous() for name, value in lite0_state(read_state(bundled_lite0()), names).items()}
    save_file(state, folder / "same.safetensors")
    for what, changes in (
        ("nothing changed", {}),
        ("a copy with other time stamps", {"data": folder / "copy"}),
        ("the same weights in another format", {"weights": str(folder / "same.safetensors")}),
        ("another batch size and more workers", {"batch_size": 3, "workers": 4}),
    ):
        with pytest.raises(Reached):
            go_on(half, **changes)
        seen[what] += 1
    return seen


def test_other_teachers_settings_and_images_are_refused(half, tmp_path, idle):
    assert sum(play(half, tmp_path, 6).values()) == 12 + len(SETTINGS)
    assert sum(accepted(half, tmp_path).values()) == 4


def test_a_finished_cache_is_checked_too_unless_told_to_trust(half, tmp_path):
    shutil.copytree(half / "cache.zarr", tmp_path / "cache.zarr")
    shutil.copytree(half / "photos", tmp_path / "photos")
    go_on(tmp_path)
    edit_image(random.Random(1), tmp_path / "photos" / "chelsea" / "0001.jpg")
    with pytest.raises(IdentityError, match=r"1 edited: chelsea/0001\.jpg"):
        go_on(tmp_path)
    go_on(tmp_path, trust_images=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_other_teachers_and_images(half, tmp_path, idle, campaign):
    refusals = play(half, tmp_path, 210)
    passed = accepted(half, tmp_path)
    figures = {f"refused: {what}": count for what, count in sorted(refusals.items())}
    figures |= {f"accepted: {what}": count for what, count in passed.items()}
    campaign("identity", seed=SEED, figures={**figures, "images that reached the teacher before a refusal": 0})
