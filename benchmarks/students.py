"""What a student learns from compressed targets, and from crops of features instead of features of crops.

    python benchmarks/students.py prepare --data DIR --work DIR
    python benchmarks/students.py errors|crops|replay --work DIR [--seeds 5] [--steps 600]
    python benchmarks/students_report.py DIR --plot FILE

DIR of the data holds `cifar10/{train,test}.parquet` (Hugging Face layout), `imagenet-sample/` and `coco128/images/` (photos in
folders). The teacher is EfficientNet-Lite0, trained on ImageNet; the student a ViT of width 96 and depth 4 on 64 x 64 pixels,
8 x 8 tokens, 75 % of them masked. Every run is a `Trainer` with a `SAMITask`; within a seed all arms share initialisation,
order of samples, views and masks, and only the targets differ.

- errors: teacher at 256 pixels, dense maps of 16 x 16, fresh random views. Targets in float32 against the same maps through the
  codec at each error, by `Codec.encode` and `Codec.decode`: the arithmetic of a cache. One more arm goes through a cache that
  `extract` made and the stock `CacheTargets`, and its twin in memory, to show that both give the same training.
- crops: dense maps at several grids, cut for K recorded views, against the teacher run on those views; photographs.
- replay: the same on CIFAR-10, and errors of a cache whose grid is the student's, where no resampling averages the error away.

All are evaluated on held-out images against uncompressed features, and by k-NN and a linear probe of the encoder on CIFAR-10.
Results collect in WORK/results.json; a run that is there is not made again.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig, prepare_job
from sami_cache.batches import Batch
from sami_cache.data.images import decode_jpeg
from sami_cache.data.views import View, crop_embeddings
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.models.students import SAMI, create_encoder
from sami_cache.probing import knn_accuracy, linear_accuracy
from sami_cache.processes import keep_freed_memory
from sami_cache.samples import CacheSamples, OpenShard, Samples
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.codecs import Codec
from sami_cache.store.files import digest
from sami_cache.store.fitting import fit_codec
from sami_cache.store.shards import pack_shard
from sami_cache.tasks.sami import CacheTargets, SAMIConfig, SAMITask
from sami_cache.training import TrainConfig, Trainer

CPU = torch.device("cpu")
TEACHER, CHANNELS = "efficientnet_lite0", 112
PIXELS, PATCH, GRID = 64, 8, 8  # of the student
SHARD = 512
DEFAULT = 0.01
ERRORS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
GRIDS = (14, 16, 24, 32, 64)
BINS = ((0.2, 0.35), (0.35, 0.6), (0.6, 1.01))
FIT_IMAGES = 256
STEPS = {"errors": 600, "crops": 400, "replay": 400}


class FeatureSamples:
    """Implements `samples.Samples` with float32 feature maps in place of codes; with a codec, as it would give them back."""

    def __init__(self, folder: Path, codec: Codec | None = None, maps: np.ndarray | None = None) -> None:
        table = pq.read_table(folder / "samples.parquet")
        self.keys, self.labels, self.jpegs = (table[name].to_pylist() for name in ("key", "label", "jpeg"))
        views = table["view"].to_pylist()
        self.views = [None if v is None else View((v[0], v[1], v[2], v[3]), bool(v[4])) for v in views]
        self.usable = np.array(table["usable"].to_pylist())
        self.maps = np.load(folder / "maps.npy", mmap_mode="r") if maps is None else maps
        self.codec, self.shard_samples, self.chunk_samples = codec, SHARD, 16
        self.codes_shape: tuple[int, ...] | None = self.maps.shape[1:]
        self.codes_dtype = self.maps.dtype
        self.whole = not any(self.views)

    def open(self, shard: int) -> OpenShard:
        return FeatureShard(self, shard * SHARD)

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """(train, held out): CIFAR-10's own test images, of photographs every sixth."""
        if any(key.startswith("test") for key in self.keys):
            held = np.array([key.startswith("test") for key in self.keys])
        else:
            held = np.array([int(digest(key.encode())[:8], 16) % 6 == 0 for key in self.keys])
        return self.usable & ~held, self.usable & held

    def fitted(self, error: float) -> Codec:
        """The codec that `extract` would fit: on the images whose keys have the smallest digests."""
        order = sorted(range(len(self.keys)), key=lambda index: digest(self.keys[index].encode()))[:FIT_IMAGES]
        return fit_codec("pca", self.maps[order], error=error)


class FeatureShard:
    """Implements `samples.OpenShard`."""

    def __init__(self, samples: FeatureSamples, first: int) -> None:
        self.samples, self.first = samples, first

    def expect(self, *, images: bool) -> None:
        pass

    def read_codes(self, chunk: int, wanted: Mapping[int, np.ndarray]) -> None:
        start, codec = self.first + chunk * self.samples.chunk_samples, self.samples.codec
        for place, out in wanted.items():
            maps = np.asarray(self.samples.maps[start + place : start + place + 1])
            out[:] = (codec.decode(codec.encode(maps)) if codec else maps)[0]

    def encoded(self, place: int) -> bytes:
        return self.samples.jpegs[self.first + place]

    def pixels(self, place: int) -> np.ndarray:
        return decode_jpeg(self.encoded(place))

    def view(self, place: int) -> View | None:
        return self.samples.views[self.first + place]


class FeatureTargets(nn.Module):
    """Implements `tasks.sami.Targets` for feature maps less `mean`, over `scale`; all channels, or those of `basis`."""

    def __init__(self, mean: np.ndarray, scale: float, basis: np.ndarray | None = None) -> None:
        super().__init__()
        basis = np.eye(len(mean), dtype=np.float32) if basis is None else basis
        self.channels, self.scale = len(basis), scale
        self.register_buffer("mean", torch.from_numpy(mean.copy()))
        self.register_buffer("basis", torch.from_numpy(basis.copy()))

    def forward(self, batch: Batch, pixels: Tensor, grid: int) -> Tensor:
        assert batch.codes is not None
        boxes, flips = (batch.boxes, batch.flips) if batch.whole else whole(len(batch.codes))
        cut = crop_embeddings(batch.codes, boxes, flips, grid).flatten(2).transpose(1, 2)
        return (cut - self.get_buffer("mean")) @ self.get_buffer("basis").T / self.scale

    def features(self, values: Tensor) -> Tensor:
        return values * self.scale @ self.get_buffer("basis") + self.get_buffer("mean")


def moments(maps: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean of every channel, and the square root of the mean variance, of float32 [n, C, h, w]."""
    mean = maps.mean((0, 2, 3), dtype=np.float64).astype(np.float32)
    return mean, float(np.sqrt(np.square(maps - mean[:, None, None], dtype=np.float64).mean()))


def embed(folder: Path, data: Path, **settings: Any) -> None:
    """Keep the teacher's float32 maps, JPEGs and views: what `extract` computes, before its codec."""
    if (folder / "samples.parquet").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    embedder = prepare_job(ExtractConfig(data=data, cache=folder / "none", teacher=TEACHER, device="cpu", **settings)).embedder
    embedder = replace(embedder, images={"short_side": 128, "quality": 90})  # the student sees 64 pixels
    shape = (len(embedder), CHANNELS, embedder.grid, embedder.grid)
    maps = np.lib.format.open_memmap(folder / "maps.npy", mode="w+", dtype=np.float32, shape=shape)
    rows: list[dict[str, Any]] = []
    size = embedder.batch_size
    for part in embedder.embed([range(at, min(at + size, len(maps))) for at in range(0, len(maps), size)]):
        maps[len(rows) : len(rows) + len(part.samples)] = part.embeddings
        for sample, jpeg in zip(part.samples, part.jpegs, strict=True):
            fields = {name: getattr(sample, name) for name in ("key", "label", "width", "height", "view")}
            rows.append(fields | {"jpeg": jpeg, "usable": sample.status == "ok"})
    maps.flush()
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    print(f"{folder.name}: {shape}, {time.perf_counter() - started:.0f} s", flush=True)


def prepare(data: Path, work: Path, train: int, test: int, few: int, views: int) -> None:
    """`few`: training images of CIFAR-10 (and a quarter as many test images) that are also seen through recorded views."""
    for folder, counts in (("cifar", (train, test)), ("few", (few, few // 4))):
        (work / folder / "images").mkdir(parents=True, exist_ok=True)
        for name, count in zip(("train", "test"), counts, strict=True):
            table = pq.read_table(data / "cifar10" / f"{name}.parquet").slice(0, count)
            pq.write_table(table, work / folder / "images" / f"{name}.parquet")
    photos = work / "photos" / "images"
    for name in ("imagenet-sample", "coco128/images"):
        shutil.copytree(data / name, photos / name.split("/")[0], dirs_exist_ok=True)
    embed(work / "cifar" / "16", work / "cifar" / "images", grid=16)
    embed(work / "photos" / "replay", photos, views=2 * views)
    for grid in GRIDS:
        embed(work / "photos" / str(grid), photos, grid=grid)
    embed(work / "few" / "replay", work / "few" / "images", views=views)
    cifar = FeatureSamples(work / "cifar" / "16")
    where = {key: row for row, key in enumerate(cifar.keys)}
    replayed = FeatureSamples(work / "few" / "replay").keys[::views]
    (work / "few" / "16").mkdir(exist_ok=True)
    np.save(work / "few" / "16" / "maps.npy", cifar.maps[[where[key] for key in replayed]])
    for kind, grids in (("photos", GRIDS), ("few", (16,))):
        cut_all(work / kind, grids)


def cut_all(folder: Path, grids: tuple[int, ...]) -> None:
    """For the recorded views: targets on the student's grid, from replay and from dense maps; and how far these are apart."""
    if (folder / "distances.json").exists():
        return
    replay = FeatureSamples(folder / "replay")
    boxes = torch.tensor([view.box for view in replay.views])
    flips = torch.tensor([view.flip for view in replay.views])
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).numpy()
    mean, _ = moments(replay.maps[:2048])
    cut_to(folder / "cut-replay.npy", replay.maps, 1, None, None, GRID)
    found: dict[str, Any] = {}
    for grid in sorted(grids):
        dense = np.load(folder / str(grid) / "maps.npy", mmap_mode="r")
        each = len(replay.maps) // len(dense)
        cut_to(folder / f"cut-{grid}.npy", dense, each, boxes, flips, GRID)
        found[f"{16 * grid}/{grid}"] = distances(dense, replay.maps, each, boxes, flips, areas, mean)
        if grid == 32:  # a teacher at 512 pixels whose maps are stored smaller, as SAM's are
            for stored in (14, 16, 24):
                small = crop_embeddings(torch.from_numpy(np.array(dense)), *whole(len(dense)), stored).numpy()
                found[f"512/{stored}"] = distances(small, replay.maps, each, boxes, flips, areas, mean)
    (folder / "distances.json").write_text(json.dumps(found, indent=1))


def whole(count: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(count, 4), torch.zeros(count, dtype=torch.bool)


def cut(maps: np.ndarray, each: int, boxes: Tensor | None, flips: Tensor | None, rows: range, size: int) -> Tensor:
    chosen = torch.from_numpy(maps[[row // each for row in rows]])
    if boxes is None or flips is None:
        return crop_embeddings(chosen, *whole(len(rows)), size)
    return crop_embeddings(chosen, boxes[rows.start : rows.stop], flips[rows.start : rows.stop], size)


def cut_to(path: Path, maps: np.ndarray, each: int, boxes: Tensor | None, flips: Tensor | None, size: int) -> None:
    count = len(maps) * each
    parts = [cut(maps, each, boxes, flips, range(at, min(at + 64, count)), size).numpy() for at in range(0, count, 64)]
    np.save(path, np.concatenate(parts))


def distances(
    dense: np.ndarray, replay: np.ndarray, each: int, boxes: Tensor, flips: Tensor, areas: np.ndarray, mean: np.ndarray
) -> dict[str, list[float]]:
    """By the view's share of the image: [cosine about the mean, relative squared error], on the grid of the replay maps."""
    rows: list[tuple[float, float, float]] = []
    centre = torch.from_numpy(mean)[:, None, None]
    for at in range(0, len(replay), 64):
        part = range(at, min(at + 64, len(replay)))
        a = cut(dense, each, boxes, flips, part, replay.shape[-1]) - centre
        b = torch.from_numpy(np.array(replay[at : part.stop])) - centre
        cosine = F.cosine_similarity(a, b, dim=1).mean((1, 2))
        lost, energy = (a - b).square().sum((1, 2, 3)), b.square().sum((1, 2, 3))
        rows += zip(cosine.tolist(), lost.tolist(), energy.tolist(), strict=True)
    table = np.array(rows)
    chosen = {"all": np.ones(len(areas), bool)} | {
        f"{low:g}-{min(high, 1):g}": (areas >= low) & (areas < high) for low, high in BINS
    }
    return {name: [float(table[k, 0].mean()), float(table[k, 1].sum() / table[k, 2].sum())] for name, k in chosen.items()}


def new_student(channels: int, seed: int, **decoder: Any) -> SAMI:
    """`decoder`: options of `SAMI` that differ from the study's."""
    torch.manual_seed(seed)
    encoder = create_encoder("vit_t", img_size=PIXELS, patch_size=PATCH, embed_dim=96, depth=4, num_heads=3)
    return SAMI(encoder, target_channels=channels, **{"decoder_width": 96, "decoder_depth": 2, "decoder_heads": 4} | decoder)


def loader_of(samples: Samples, chosen: np.ndarray, batch_size: int, seed: int = 0) -> Loader:
    config = LoaderConfig(batch_size=batch_size, seed=seed, image_size=PIXELS, tokens=GRID * GRID, threads=1, timeout=600)
    return Loader(samples, chosen, config)


def train_config(steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=64,
        lr=1e-3,
        seed=seed,
        warmup_steps=steps // 10,
        log_every=max(1, steps // 20),
        clip_grad=1.0,
    )


def train(
    samples: Samples,
    chosen: np.ndarray,
    targets: nn.Module,
    judges: dict[str, Loader],
    *,
    seed: int,
    steps: int,
    probe: Loader | None,
) -> dict[str, Any]:
    """One run. `judges`: held-out images with the features to compare with; their masks are the same for all seeds."""
    started = time.perf_counter()
    model = new_student(targets.channels, seed)
    task = SAMITask(model, targets, loader_of(samples, chosen, 64, seed), None, SAMIConfig(), CPU)
    config = train_config(max(1, steps), seed)
    lines: list[dict[str, Any]] = []
    if steps:
        with tempfile.TemporaryDirectory() as folder:
            Trainer(task, config, Path(folder) / "run", CPU, on_log=lines.append).fit()
    found: dict[str, Any] = {"curve": [line["loss"] for line in lines], "wait": lines[-1]["data_wait_percent"] if lines else 0}
    model.eval()
    with torch.no_grad():
        for name, judge in judges.items():
            task.held_out = judge
            found[name] = task.evaluate(model)
        if probe is not None:
            found |= probe_encoder(model, probe)
    return found | {"seconds": time.perf_counter() - started}


def probe_encoder(model: SAMI | None, labelled: Loader, features: np.ndarray | None = None) -> dict[str, float]:
    """k-NN (k = 20) and linear probe of the mean of the encoder's patch tokens, whole images; or of given `features`."""
    numbers = np.flatnonzero(labelled.chosen)
    if features is None:
        assert model is not None
        mean, std = torch.tensor([123.675, 116.28, 103.53])[:, None, None], torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        pixels = (batch.pixels for batch in labelled.evaluation(64))
        x = torch.cat([model.encoder.forward_features((part.float() - mean) / std)[:, 1:].mean(1) for part in pixels])
    else:
        x = torch.from_numpy(features)
    labels = torch.tensor([labelled.samples.labels[number] or 0 for number in numbers])
    held = torch.tensor([labelled.samples.keys[number].startswith("test") for number in numbers])
    x = (x - x[~held].mean(0)) / (x[~held].std(0) + 1e-6)
    given = x[~held], labels[~held], x[held], labels[held]
    return {"knn": knn_accuracy(*given), "linear": linear_accuracy(*given)}


@lru_cache(maxsize=1)
def labelled_images(work: Path, gallery: int = 4000) -> Loader:
    """CIFAR-10 for the probes: the first `gallery` training images and all held-out ones."""
    samples = FeatureSamples(work / "cifar" / "16")
    chosen, held = samples.split()
    return loader_of(samples, held | (chosen & (chosen.cumsum() <= gallery)), 1)


@lru_cache(maxsize=8)
def fitted(folder: Path, error: float) -> Codec:
    return FeatureSamples(folder).fitted(error)


@lru_cache(maxsize=4)
def scaling(folder: Path) -> tuple[np.ndarray, float]:
    samples = FeatureSamples(folder)
    return moments(np.asarray(samples.maps[np.flatnonzero(samples.split()[0])[:1024]]))


def run_errors(work: Path, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """`arm`: float32, untrained, an error, or at the default error `cache` (the real path) and `memory` (its twin)."""
    folder = work / "cifar" / "16"
    exact = FeatureSamples(folder)
    chosen, held = exact.split()
    if arm in ("cache", "memory"):
        codec = Cache(work / "cifar" / "cache.zarr").codec
        targets: nn.Module = FeatureTargets(codec.mean, math.sqrt(codec.variance), codec.basis)
        samples: Samples = FeatureSamples(folder, codec)
        if arm == "cache":
            samples, targets = CacheSamples(Cache(work / "cifar" / "cache.zarr")), CacheTargets(codec)
            assert (samples.keys, samples.shard_samples) == (exact.keys, SHARD)
        return train(samples, chosen, targets, {}, seed=seed, steps=steps, probe=None)
    targets = FeatureTargets(*scaling(folder))
    codec = None if arm in ("float32", "untrained") else fitted(folder, float(arm))
    judge = {"exact": loader_of(exact, held, 1)}
    steps = 0 if arm == "untrained" else steps
    return train(FeatureSamples(folder, codec), chosen, targets, judge, seed=seed, steps=steps, probe=labelled_images(work))


def run_crops(work: Path, kind: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """`kind`: photos or few. `arm`: replay, the grid of a dense cache, or an error of a replay cache on the student's grid."""
    folder = work / kind
    cuts = {path.stem[4:]: np.load(path, mmap_mode="r") for path in folder.glob("cut-*.npy")}
    samples = {name: FeatureSamples(folder / "replay", maps=maps) for name, maps in cuts.items()}
    chosen, held = samples["replay"].split()
    targets = FeatureTargets(*moments(np.asarray(cuts["replay"][np.flatnonzero(chosen)[:4096]])))
    judges = {"exact": loader_of(samples["replay"], held, 1)}
    if arm in cuts:
        source = samples[arm]
        judges |= {"own": loader_of(source, held, 1)} if arm != "replay" else {}
    else:
        source = FeatureSamples(folder / "replay", samples["replay"].fitted(float(arm)), cuts["replay"])
    return train(source, chosen, targets, judges, seed=seed, steps=steps, probe=labelled_images(work))


def measure_codecs(work: Path) -> dict[str, Any]:
    """Of each error: bits a value in a shard, the error on images not fitted on, and what the teacher's features are worth."""
    found: dict[str, Any] = {}
    for name, place in (("cifar", "cifar/16"), ("photos", "photos/32")):
        samples = FeatureSamples(work / place)
        maps = np.array(samples.maps[:SHARD])
        centre = moments(maps)[0][:, None, None]
        energy = np.square(maps - centre, dtype=np.float64).mean()
        small = crop_embeddings(torch.from_numpy(maps), *whole(SHARD), GRID).numpy()
        for error in ERRORS:
            codec = fitted(work / place, error)
            codes = codec.encode(maps)
            lost = codec.decode(codes) - maps
            cut_lost = crop_embeddings(torch.from_numpy(lost), *whole(SHARD), GRID).numpy()
            packed, _ = pack_shard(codes, choose_layout(codec, maps.shape[-1], len(samples.keys), SHARD))
            found[f"{name}/{error:g}"] = {
                "bits": 8 * len(packed) / maps.size,
                "kept": codec.kept,
                "error": float(np.square(lost, dtype=np.float64).mean() / energy),
                "error_cut": float(np.square(cut_lost).mean() / np.square(small - centre).mean()),
            }
    labelled = labelled_images(work)
    maps = np.asarray(labelled.samples.maps[np.flatnonzero(labelled.chosen)])
    found["teacher"] = {"float32": probe_encoder(None, labelled, maps.mean((2, 3)))}
    for error in ERRORS:
        codec = fitted(work / "cifar" / "16", error)
        pooled = [codec.decode(codec.encode(maps[at : at + SHARD])).mean((2, 3)) for at in range(0, len(maps), SHARD)]
        found["teacher"][f"{error:g}"] = probe_encoder(None, labelled, np.concatenate(pooled))
    return found


def jobs_of(part: str, seeds: int) -> list[tuple[str, str, int]]:
    """(kind, arm, seed), seed by seed, so that what is there when time runs out can be compared."""
    errors = [f"{error:g}" for error in ERRORS]
    kinds = {
        "errors": [("errors", arm) for arm in ("float32", *errors, "untrained")],
        "crops": [("photos", arm) for arm in ("replay", *map(str, GRIDS))],
        "replay": [("few", arm) for arm in ("replay", "16", *errors[2:])],
    }
    jobs = [(kind, arm, seed) for seed in range(seeds) for kind, arm in kinds[part]]
    return ([("errors", "cache", 0), ("errors", "memory", 0)] if part == "errors" else []) + jobs


def run_job(work: Path, steps: int, job: tuple[str, str, int]) -> tuple[str, dict[str, Any]]:
    kind, arm, seed = job
    run = partial(run_errors, work) if kind == "errors" else partial(run_crops, work, kind)
    return "/".join(map(str, job)), run(arm, seed, steps)


def start_worker() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


def run_all(work: Path, part: str, seeds: int, steps: int, processes: int, arms: list[str] | None) -> None:
    """The runs that results.json lacks, several at a time, each on one thread."""
    path = work / "results.json"

    def kept() -> dict[str, Any]:
        return json.loads(path.read_text()) if path.exists() else {}

    def keep(name: str, found: dict[str, Any]) -> None:
        path.with_suffix(".new").write_text(json.dumps(kept() | {name: found}, indent=1))
        os.replace(path.with_suffix(".new"), path)

    results = kept()

    left = [job for job in jobs_of(part, seeds) if "/".join(map(str, job)) not in results and job[1] in (arms or job[1:])]
    if any(kind == "errors" and arm not in ("float32", "untrained") for kind, arm, _ in left):
        cache = work / "cifar" / "cache.zarr"
        settings = {"teacher": TEACHER, "grid": 16, "error": DEFAULT, "fit_images": FIT_IMAGES, "shard_samples": SHARD}
        extract(ExtractConfig(data=work / "cifar" / "images", cache=cache, device="cpu", trust_images=True, **settings))
        if "codecs" not in results:
            keep("codecs", measure_codecs(work))
    with multiprocessing.get_context("spawn").Pool(processes, start_worker) as pool:
        for name, found in pool.imap_unordered(partial(run_job, work, steps), left):
            keep(name, found)
            loss = found.get("exact", {}).get("heldout_loss", found["curve"][-1] if found["curve"] else math.nan)
            print(f"{name}: {loss:.5f}, k-NN {found.get('knn', math.nan):.4f}, {found['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "errors", "crops", "replay"))
    parser.add_argument("--data", type=Path, help="the images (prepare)")
    parser.add_argument("--work", type=Path, required=True, help="where features, caches and results.json go: 12 GB")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every run, 64 images each; default 600 (errors) or 400")
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    if given.part == "prepare":
        prepare(given.data, given.work, train=8000, test=2000, few=4000, views=4)
    else:
        run_all(given.work, given.part, given.seeds, given.steps or STEPS[given.part], given.processes, given.arms)


if __name__ == "__main__":
    main()
