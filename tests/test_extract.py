"""Extraction as a user runs it: a real teacher on real photographs, interrupted, resumed, refused."""

import io
import json
import os
import random
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from blake3 import blake3
from photos import photo_folder, pieces
from PIL import Image

import pipelines.extract
import pipelines.plan
import pipelines.tally
from pipelines.embedding import Embedder, ViewMode
from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from pipelines.plan import plan
from sami_cache.data.sources import open_source
from sami_cache.data.views import VIEW_DRAWS, View, crop_embeddings, crop_image, random_view
from sami_cache.errors import DiskFullError, IdentityError, SamiCacheError
from sami_cache.models.teachers import Teacher, TeacherInfo, load_teacher
from sami_cache.store.cache import Cache
from sami_cache.store.integrity import verify_cache

LITE0 = {"teacher": "efficientnet_lite0", "grid": 4, "shard_samples": 16, "device": "cpu", "workers": 2}


def config(folder: Path, name: str = "cache.zarr", **changes) -> ExtractConfig:
    return ExtractConfig(**{"data": folder / "photos", "cache": folder / name, **LITE0, **changes})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract")
    photo_folder(folder / "photos", 72)
    (folder / "photos" / "chelsea" / "torn.jpg").write_bytes((folder / "photos" / "chelsea" / "0001.jpg").read_bytes()[:900])
    return folder


@pytest.fixture(scope="module")
def extracted(photos):
    return extract(config(photos))


def test_a_folder_becomes_a_verified_cache(photos, extracted):
    cache = Cache(extracted.cache)
    assert verify_cache(extracted.cache, level="deep").findings == []
    assert extracted.root["samples"] == 73
    assert extracted.failures == [("chelsea/torn.jpg", extracted.failures[0][1])]
    assert "truncated" in extracted.failures[0][1]
    assert cache.attributes["class_names"] == ["astronaut", "chelsea", "coffee", "rocket"]
    rows = cache.table().to_pylist()
    assert [row["key"] for row in rows] == sorted((row["key"] for row in rows), key=lambda key: blake3(key.encode()).digest())
    for number in (0, 20, 72):
        with Image.open(photos / "photos" / rows[number]["key"]) as image:
            assert (rows[number]["width"], rows[number]["height"]) == image.size


def test_stored_embeddings_are_the_teachers(photos, extracted):
    """The cache against the plain model: timm's forward on each photo alone, no batches, no padding tricks of ours."""
    import timm

    from sami_cache.models.weights import bundled_lite0, lite0_state, read_state

    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(lite0_state(read_state(bundled_lite0()), list(model.state_dict())))
    cache = Cache(extracted.cache)
    rows = cache.table().to_pylist()
    close = []
    for number in range(0, 73, 6):
        if rows[number]["status"] != "ok":
            continue
        image = Image.open(photos / "photos" / rows[number]["key"]).convert("RGB")
        scale = 64 / max(image.size)
        width, height = (int(side * scale + 0.5) for side in image.size)
        padded = np.zeros((64, 64, 3), np.float32)
        padded[:height, :width] = (np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) - 127.0) / 128.0
        with torch.no_grad():
            maps = model.forward_intermediates(
                torch.from_numpy(padded).permute(2, 0, 1)[None], indices=[3], intermediates_only=True
            )[0]
        stored = cache.read_embedding(number)
        if (width, height) == (64, 64):
            assert np.square(stored - maps[0].numpy()).mean() < 0.03 * cache.codec.variance
        # The mean over the valid cells does not depend on how they were resampled, only on which they are.
        inside = maps[0, :, : max(1, height // 16), : max(1, width // 16)].mean((1, 2)).numpy() - cache.codec.mean
        ours = stored.mean((1, 2)) - cache.codec.mean
        close.append(float(inside @ ours / np.linalg.norm(inside) / np.linalg.norm(ours)))
    assert np.median(close) > 0.9


class CoordinateTeacher(torch.nn.Module):
    """Features are coordinates: each cell says (y, x) of its own centre, in cells, whatever it is shown."""

    def __init__(self, size: int = 256, stride: int = 16):
        super().__init__()
        self.info = TeacherInfo(
            name="coordinates",
            layer="0",
            weights="random:0",
            weights_sha256="0" * 64,
            image_size=size,
            stride=stride,
            channels=2,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            interpolation="bilinear",
        )

    normalise = Teacher.normalise
    _mean = torch.zeros(3, 1, 1)
    _std = torch.ones(3, 1, 1)

    def get_buffer(self, name: str) -> torch.Tensor:
        return getattr(self, name)

    def forward(self, pixels):
        height, width = (side // self.info.stride for side in pixels.shape[2:])
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        return torch.stack([y, x])[None].expand(len(pixels), -1, -1, -1).float()


def test_dense_targets_are_geometrically_right(tmp_path):
    """Wide and tall images through the whole extractor: what is cut from the grid are the crop's own coordinates."""
    for index, size in enumerate([(400, 300), (300, 400), (640, 160), (150, 600), (256, 256)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    source = open_source(tmp_path)
    teacher = CoordinateTeacher()
    mode = ViewMode()
    embedder = Embedder(
        source=source,
        teacher=teacher,  # type: ignore[arg-type]
        grid=32,
        mode=mode,
        precision="float32",
        device=torch.device("cpu"),
        batch_size=2,
        images=None,
        workers=1,
    )
    rng = np.random.default_rng(0)
    for part in embedder.embed([[0, 1], [2, 3], [4]]):
        for sample, embedding in zip(part.samples, part.embeddings, strict=True):
            longest = max(sample.width, sample.height)
            cells = torch.tensor([sample.height, sample.width]) / longest * 16  # the valid part of the map
            for _ in range(25):
                view = random_view(rng.random(VIEW_DRAWS), sample.width, sample.height)
                crop = crop_embeddings(
                    torch.from_numpy(embedding)[None], torch.tensor([view.box]), torch.tensor([view.flip]), 14
                )
                x0, y0, x1, y1 = view.box
                steps = (torch.arange(14) + 0.5) / 14
                want_y, want_x = y0 + (y1 - y0) * steps, x0 + (x1 - x0) * steps
                got = crop[0] / cells[:, None, None]
                want_x = want_x.flip(0) if view.flip else want_x
                assert ((got[0] - want_y[:, None]).abs() / ((y1 - y0) / 14)).max() < 0.1
                assert ((got[1] - want_x[None]).abs() / ((x1 - x0) / 14)).max() < 0.1


def test_replay_stores_the_papers_targets(tmp_path):
    """Each recorded view, cut from the photo and shown to the teacher alone, gives the stored embedding."""
    photo_folder(tmp_path / "photos", 12)
    settings = {"views": 3, "grid": None, "image_size": 224, "codec": "float16", "shard_samples": 16}
    cache = Cache(extract(config(tmp_path, **settings)).cache)
    assert (cache.samples, cache.grid, cache.identity["view"]["mode"]) == (36, 14, "replay")
    rows = cache.table().to_pylist()
    assert len({tuple(row["view"]) for row in rows if row["view"]}) > 30
    teacher = load_teacher("efficientnet_lite0", grid=14)
    for number in (0, 1, 17, 35):
        row = rows[number]
        image = Image.open(tmp_path / "photos" / row["key"]).convert("RGB")
        view = View(tuple(row["view"][:4]), bool(row["view"][4]))
        pixels = torch.from_numpy(crop_image(image, view, 224, interpolation="bicubic")).permute(2, 0, 1)[None]
        expected = teacher(teacher.normalise(pixels))[0].numpy()
        assert np.abs(cache.read_embedding(number) - expected).max() < 0.02 * np.abs(expected).max()
    # One image a file, however many views of it lie in the shard.
    table = pa.ipc.open_file(cache.path / "images" / "000000.arrow").read_all()
    assert len(table) == len(set(table["key"].to_pylist())) == 6


def test_views_depend_on_key_and_seed_alone():
    mode = ViewMode(views=2, seed=5)
    assert mode.draw("a.jpg", 1, 300, 200) == mode.draw("a.jpg", 1, 300, 200)
    others = {mode.draw("a.jpg", 0, 300, 200), mode.draw("b.jpg", 1, 300, 200), ViewMode(views=2).draw("a.jpg", 1, 300, 200)}
    assert mode.draw("a.jpg", 1, 300, 200) not in others


@pytest.mark.parametrize("codec", ["pca", "int8", "float16"])
def test_codecs_reach_their_error_on_images_they_were_not_fitted_on(tmp_path, codec):
    photo_folder(tmp_path / "photos", 150, seed=3)
    summary = extract(config(tmp_path, codec=codec, fit_images=64, grid=6))
    rows = [row for row in Cache(summary.cache).table().to_pylist() if row["status"] == "ok"]
    energy = np.array([row["energy"] for row in rows])
    error = float((np.array([row["error"] for row in rows]) * energy).sum() / energy.sum())
    assert summary.error == pytest.approx(error, rel=1e-12)
    assert summary.asked == (0.01 if codec == "pca" else None)
    assert (summary.fit_samples, summary.clipped) == (64, (0, 0)) if codec == "pca" else summary.fit_samples == 64
    if codec == "pca":
        assert error == pytest.approx(0.01, rel=0.1)
    else:
        assert error < {"int8": 2e-3, "float16": 1e-6}[codec]


def test_plan_is_close_and_writes_nothing(photos, extracted):
    outlook = plan(config(photos, "planned.zarr"))
    assert not (photos / "planned.zarr").exists()
    assert outlook.total_bytes == pytest.approx(extracted.bytes, rel=0.02)  # it saw all of the images
    assert (outlook.images, outlook.remaining) == (73, 73)
    done = plan(config(photos))
    assert (done.remaining, done.total_bytes) == (0, extracted.bytes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"teacher": "vit_b", "weights": "random", "image_size": 64, "grid": 4}, marks=pytest.mark.slow),
        {"teacher": "resnet18", "weights": "random", "grid": 8, "image_size": 64, "views": 2},
        {"codec": "float16", "images": False},
        {"count": 20, "views": 16},
        {"count": 3, "views": 50},
    ],
    ids=lambda settings: " ".join(f"{name} {value}" for name, value in settings.items()) or "efficientnet_lite0",
)
def test_a_plan_from_a_sample_tells_the_final_bytes_within_5_percent(tmp_path, settings):
    settings = dict(settings)
    photo_folder(tmp_path / "photos", settings.pop("count", 192), seed=4)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    given = config(tmp_path, fit_images=64, **settings)
    outlook = plan(given)
    assert outlook.total_bytes == pytest.approx(extract(given).bytes, rel=0.05)
    # The parts are what they say they are, too, so that no two errors of a plan may cancel out.
    cache = Cache(given.cache)
    found = {
        name: sum(file.stat().st_size for file in (cache.path / name).iterdir()) for name in ("codes", "images", "commits")
    }
    assert cache.samples * outlook.code_bytes == pytest.approx(found["codes"], rel=0.06)
    assert cache.samples * outlook.image_bytes == pytest.approx(found["images"], rel=0.06)
    assert cache.samples * outlook.record_bytes == pytest.approx(
        found["commits"] + (cache.path / "manifest.parquet").stat().st_size, rel=0.15
    )


@pytest.mark.parametrize(("workers", "at_once"), [(2, 1), (8, 2), (100, 4)])
def test_shards_are_written_beside_each_other_and_to_the_same_bits(photos, extracted, tmp_path, monkeypatch, workers, at_once):
    """As many at a time as the workers allow: the first ones wait for each other, so that fewer would break the barrier."""
    real, lock, seen = pipelines.extract.commit_shard, threading.Lock(), [0, 0]
    together = threading.Barrier(at_once)

    def write(cache, shard, parts):
        with lock:
            seen[0] += 1
            seen[1] = max(seen)
        if shard < at_once:
            together.wait(timeout=60)
        try:
            return real(cache, shard, parts)
        finally:
            with lock:
                seen[0] -= 1

    monkeypatch.setattr(pipelines.extract, "commit_shard", write)
    found = extract(config(photos, cache=tmp_path / "cache.zarr", workers=workers))
    assert found.root == extracted.root
    assert seen == [0, at_once]


def test_running_again_does_nothing(photos, extracted):
    again = extract(config(photos))
    assert (again.samples_done, again.root) == (0, extracted.root)
    assert again.failures == extracted.failures


def test_settings_left_out_are_the_caches_own(photos, extracted):
    bare = ExtractConfig(data=photos / "photos", cache=photos / "cache.zarr", teacher="efficientnet_lite0")
    assert extract(bare).root == extracted.root


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"grid": 5}, "grid: the cache has 4, you ask for 5"),
        ({"error": 0.02}, "codec.error: the cache has 0.01, you ask for 0.02"),
        ({"codec": "int8"}, "codec.name: the cache has 'pca', you ask for 'int8'"),
        ({"images": False}, "images: the cache has {'quality': 90, 'short_side': 256}, you ask for None"),
        ({"views": 2, "grid": 4}, "view.mode: the cache has 'dense', you ask for 'replay'"),
        ({"weights": "random"}, "teacher.weights_sha256"),
        ({"precision": "bfloat16"}, "precision: the cache has 'float32', you ask for 'bfloat16'"),
        ({"teacher": "resnet10t", "weights": "random", "layer": None}, "teacher.name"),
    ],
)
def test_other_settings_are_refused_field_by_field(photos, extracted, changes, field):
    with pytest.raises(IdentityError, match="was made with other settings") as caught:
        extract(config(photos, **changes))
    assert field in str(caught.value)


def test_other_images_are_refused_by_name(photos, extracted, tmp_path):
    shutil.copytree(photos / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "coffee" / "0002.jpg").rename(tmp_path / "photos" / "coffee" / "zzz.jpg")
    with pytest.raises(IdentityError) as caught:
        extract(ExtractConfig(data=tmp_path / "photos", cache=photos / "cache.zarr", **LITE0))
    assert "1 removed: coffee/0002.jpg" in str(caught.value)
    assert "sami-cache subset" in str(caught.value)


def test_random_weights_are_said_for_ever(photos):
    summary = extract(config(photos, "random.zarr", teacher="resnet10t", weights="random", grid=2, seed=3))
    assert Cache(summary.cache).identity["teacher"]["weights"] == "random:3"


def test_tar_and_parquet_give_the_same_embeddings(photos, extracted, tmp_path):
    source = open_source(photos / "photos")
    with tarfile.open(tmp_path / "part-000.tar", "w") as tar:
        for index, key in enumerate(source.keys):
            data = source.read(index)
            info = tarfile.TarInfo(key.replace("/", "-"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    images = [{"bytes": source.read(index), "path": key} for index, key in enumerate(source.keys)]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"image": images, "label": source.labels}), tmp_path / "parquet" / "train.parquet")
    # The keys differ, so the codec is fitted on the images in another order: int8 is blind to that, up to rounding.
    reference = Cache(extract(config(photos, "int8.zarr", codec="int8")).cache)
    places = {row["source"]: number for number, row in enumerate(reference.table().to_pylist())}
    for data in (tmp_path / "part-000.tar", tmp_path / "parquet"):
        found = Cache(extract(ExtractConfig(data=data, cache=tmp_path / f"{data.name}.zarr", **LITE0, codec="int8")).cache)
        rows = found.table().to_pylist()
        assert {row["source"] for row in rows} == places.keys()
        for number, row in enumerate(rows):
            if row["status"] == "ok":
                there = reference.read_embedding(places[row["source"]])
                assert np.square(found.read_embedding(number) - there).mean() < 1e-3 * reference.codec.variance
    assert [row["label"] for row in rows] == source.labels


@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, "holds NaN"), (np.inf, "holds NaN or infinity"), (-np.inf, "infinity"), (None, "is the same")]
)
def test_a_teacher_that_breaks_is_named_before_the_commit(photos, tmp_path, monkeypatch, value, says):
    """Whether its image is among those the codec is fitted on or not."""
    real = Embedder.embed

    def broken(self, batches):
        for part in real(self, batches):
            for sample, embedding in zip(part.samples, part.embeddings, strict=True):
                if sample.key == "rocket/0031.jpg":
                    if value is None:
                        embedding[:] = 0.5
                    else:
                        embedding[5, 1, 1] = value
            yield part

    monkeypatch.setattr(Embedder, "embed", broken)
    for fit_images in (8, 73):
        target = tmp_path / f"{fit_images}.zarr"
        with pytest.raises(SamiCacheError, match=rf"'rocket/0031.jpg' .*{says}"):
            extract(ExtractConfig(data=photos / "photos", cache=target, fit_images=fit_images, **LITE0))
        assert target.exists() == (fit_images == 8)
    committed = Cache(tmp_path / "8.zarr")
    assert all("rocket/0031.jpg" not in [s.key for s in record.samples] for record in committed.records())


def test_a_full_disk_is_refused_before_and_stopped_during(photos, extracted, tmp_path, monkeypatch):
    target = ExtractConfig(data=photos / "photos", cache=tmp_path / "c.zarr", **LITE0)
    monkeypatch.setattr(pipelines.plan, "free_space", lambda path: 10_000_000)
    with pytest.raises(DiskFullError, match=r"will take about .* GB .* free"):
        extract(target)
    assert not (tmp_path / "c.zarr").exists()
    monkeypatch.undo()
    room = iter([1 << 40, 1 << 40, 1_000_000])
    monkeypatch.setattr(pipelines.tally, "free_space", lambda path: next(room, 1_000_000))
    with pytest.raises(DiskFullError, match=r"Stopped before the disk is full; 32 of 73 samples are committed"):
        extract(target)
    monkeypatch.undo()
    assert extract(target).root == extracted.root


def arguments(folder: Path, name: str) -> list[str]:
    given = ["--data", str(folder / "photos"), "--cache", str(folder / name), "--teacher", "efficientnet_lite0"]
    return ["extract", *given, "--grid", "4", "--shard-samples", "16", "--device", "cpu", "--workers", "1"]


def test_kill_nine_at_ten_random_moments(spawn, tmp_path):
    """The sealed root is that of an undisturbed run, and no committed shard is computed twice."""
    photo_folder(tmp_path / "photos", 640, seed=1)
    started = time.monotonic()
    calm = spawn(*arguments(tmp_path, "calm.zarr"))
    calm.join(120)
    seconds = time.monotonic() - started
    assert calm.exitcode == 0
    expected = Cache(tmp_path / "calm.zarr").root()
    assert expected is not None

    log, target = tmp_path / "log", tmp_path / "killed.zarr"
    rng = random.Random(20261123)
    kills = 0
    for attempt in range(10):
        before = committed_files(target)
        if attempt < 2:  # while the codec is fitted and the cache is made
            process = spawn(*arguments(tmp_path, target.name), log=str(log))
            time.sleep(rng.uniform(0.05, 0.25) * seconds)
            process.kill()
        else:  # before, during and after a commit
            process = spawn(*arguments(tmp_path, target.name), log=str(log), die=(rng.randint(1, 3), rng.uniform(0, 0.05)))
        process.join(120)
        kills += process.exitcode == -signal.SIGKILL
        after = committed_files(target)
        assert {name: after.get(name) for name in before} == before
    assert kills == 10
    assert len(committed_files(target)) >= 3 * 5  # most attempts commit something; how much is a matter of timing
    last = spawn(*arguments(tmp_path, target.name), log=str(log))
    last.join(120)
    assert last.exitcode == 0
    root = Cache(target).root()
    assert root is not None
    assert (root["root"], root["content_root"]) == (expected["root"], expected["content_root"])
    assert verify_cache(target, level="deep").findings == []
    begun = [json.loads(line) for line in log.read_text().splitlines()]
    assert not any(committed for _, committed in begun)  # none was computed again
    assert len(begun) - len({shard for shard, _ in begun}) <= kills  # and few were cut off between computing and commit


@pytest.fixture(scope="module")
def calm(spawn, photos):
    """What an undisturbed child makes. (Another number of threads rounds convolutions otherwise, so not this process.)"""
    process = spawn(*arguments(photos, "calm.zarr"))
    process.join(120)
    assert process.exitcode == 0
    return photos / "calm.zarr"


def committed_files(path: Path) -> dict[str, tuple[int, int]]:
    """(inode, mtime) of every committed shard's record and files: they never change again."""
    found = {}
    for record in (path / "commits").glob("*.json") if path.exists() else ():
        shard = int(record.stem)
        for file in (record, path / "codes" / f"{shard}.0.0.0", path / "images" / f"{shard:06d}.arrow"):
            found[str(file)] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_state_that_resumes(spawn, photos, calm, tmp_path, number, code):
    target = tmp_path / "c.zarr"
    process = spawn(*arguments(photos, str(target)))
    deadline = time.monotonic() + 60
    while not list(target.glob("commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert 1 <= len(Cache(target).committed()) < 5
    again = spawn(*arguments(photos, str(target)))
    again.join(60)
    assert again.exitcode == 0
    assert Cache(target).root() == Cache(calm).root()


def test_two_extractors_share_one_cache(spawn, photos, calm, tmp_path):
    target = tmp_path / "c.zarr"
    both = [spawn(*arguments(photos, str(target))) for _ in range(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert Cache(target).root() == Cache(calm).root()
    assert verify_cache(target, level="deep").findings == []


def test_unusable_sources_are_explained(tmp_path):
    with pytest.raises(SamiCacheError, match=r"--data|SAMI_DATA"):
        extract(config(tmp_path))
    (tmp_path / "photos").mkdir()
    for index in range(3):
        (tmp_path / "photos" / f"{index}.jpg").write_bytes(b"nothing")
    with pytest.raises(SamiCacheError, match=r"none of 3 images tried can be used; the first: '0\.jpg': not an image"):
        extract(config(tmp_path))
    pieces(1)[0].save(tmp_path / "photos" / "fine.jpg")
    (tmp_path / "taken.zarr").mkdir()
    (tmp_path / "taken.zarr" / "precious").write_text("mine")
    with pytest.raises(SamiCacheError, match="exists and is not a cache"):
        extract(config(tmp_path, "taken.zarr"))
    assert (tmp_path / "taken.zarr" / "precious").read_text() == "mine"
