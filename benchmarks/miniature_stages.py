"""The stages of the miniature: caches, pretraining, probes, fine-tuning. Each leaves a JSON in WORK, and resumes until it has.

Every training is a `Trainer` run over `Loader`'s batches; pretraining is a `SAMITask` on targets from a cache, pixels, or a
teacher that runs along. Within a seed all arms of a data set share the encoder's initialisation, the order of images, flips and
masks.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from train import MAE

from pipelines.extract import extract
from pipelines.jobs import ExtractConfig
from sami_cache.batches import Batch, on_device
from sami_cache.checkpoints import load_weights
from sami_cache.data.images import decode_image
from sami_cache.data.sources import open_source
from sami_cache.data.views import ViewConfig, mirror
from sami_cache.errors import SamiCacheError
from sami_cache.loader import Loader, LoaderConfig
from sami_cache.losses import Kind
from sami_cache.models.students import SAMI, KeysValues, create_encoder
from sami_cache.models.teachers import load_teacher
from sami_cache.order import random_words
from sami_cache.probing import knn_accuracy, linear_accuracy
from sami_cache.processes import choose_device, keep_freed_memory
from sami_cache.samples import CacheSamples, SourceSamples
from sami_cache.store.cache import Cache
from sami_cache.store.files import digest
from sami_cache.tasks.sami import IMAGENET_MEAN, IMAGENET_STD, CacheTargets, OnlineTargets, PixelTargets, SAMIConfig, SAMITask
from sami_cache.training import TrainConfig, Trainer

Judge = Literal["test", "heldout"]
GRID = 8
WHOLE = ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
"""Whole images, mirrored at random: an image is seen a few times, and a crop of features is another question than a cache."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all arms share. Saved with every run; other numbers need another WORK."""

    teacher: str = "efficientnet_lite0"
    steps: int = 1000
    """Of pretraining."""
    batch_size: int = 128
    lr_teacher: float = 2e-3
    """Peak learning rate of pretraining towards features."""
    lr_pixels: float = 2e-3
    """The same towards pixels: chosen by the same search, of the same rates."""
    fine_steps: int = 300
    fine_lr: float = 2e-3
    """Peak learning rate of fine-tuning, one for all arms."""
    decoder_width: int = 96
    decoder_depth: int = 2
    decoder_heads: int = 4
    views: int = 2
    """Recorded of each CIFAR-10 image in the replay cache."""
    photo_views: int = 16
    """The same of each photograph."""
    fit_images: int = 256
    heldout: int = 5000
    """Last images of the training set, which settings are chosen on."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is special about an arm; the defaults are SAMI from a cache."""

    target: Literal["cache", "online", "pixels", "none"] = "cache"
    cache: str = "whole-0.01"
    """Of `CACHES`; where the images come from, whatever the target."""
    crops: bool = False
    """Random resized crops instead of whole images."""
    loss: Kind = "mse"
    mask_ratio: float = 0.75
    decoder: Literal["cross-attention", "all-token"] = "cross-attention"
    keys_values: KeysValues = "visible+mask"
    student: str = "small"


CACHES: dict[str, dict[str, Any]] = {
    "whole-0.01": {},
    "whole-0.1": {"error": 0.1},
    "whole-0.3": {"error": 0.3},
    "views": {"views": True},
    "photos": {"photos": True, "grid": 2 * GRID},
    "photo-views": {"photos": True, "views": True},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "small": {"img_size": 8 * GRID, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "vit_t": {"img_size": 16 * GRID},
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where everything is."""

    cifar: Path
    """`train.parquet` and `test.parquet` in Hugging Face layout."""
    photos: Path
    """A folder of pictures."""
    work: Path
    recipe: Recipe
    judge: Judge = "test"
    device: str = "auto"
    threads: int = 1

    @property
    def torch_device(self) -> torch.device:
        return choose_device(self.device)

    def folder(self, arm: str, seed: int) -> Path:
        return self.work / self.judge / arm / str(seed)

    def cache(self, name: str) -> Path:
        return self.work / "caches" / name


def result_path(place: Place, arm: str, seed: int, stage: str) -> Path:
    """Of a stage: there once it is finished."""
    # Not `with_suffix`: "whole-0.1" and "whole-0.3" have none to replace.
    return Path(f"{place.cache(arm)}.json") if stage == "cache" else place.folder(arm, seed) / f"{stage}.json"


def make(place: Place, name: str, arm: Arm | None, seed: int, stage: str) -> dict[str, Any]:
    """Make or go on with a stage; its result is written last. `arm`: None of a cache and of the teacher itself."""
    keep_freed_memory()
    began = time.perf_counter()
    if stage == "cache":
        found = make_cache(place, name)
    elif arm is None:
        found = probe_teacher(place)
    elif stage == "pretrain":
        found = pretrain(place, name, arm, seed)
    else:
        found = (probe if stage == "probe" else finetune)(place, name, arm, seed)
    found = {"seconds": time.perf_counter() - began} | found | {"arm": name, "seed": seed, "stage": stage}
    path = result_path(place, name, seed, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(found | {"recipe": asdict(place.recipe)}, indent=1))
    os.replace(path.with_suffix(".new"), path)
    return found


def make_cache(place: Place, name: str) -> dict[str, Any]:
    asked, recipe = CACHES[name], place.recipe
    photos = "photos" in asked
    check_no_leak(place)
    settings: dict[str, Any] = {"grid": asked.get("grid", GRID), "error": asked.get("error", 0.01)}
    if "views" in asked:
        settings["views"] = recipe.photo_views if photos else recipe.views
    # CIFAR-10's own JPEGs are what every arm sees; of photographs a cache holds smaller ones, which are read faster.
    config = ExtractConfig(
        data=place.photos if photos else place.cifar / "train.parquet",
        cache=place.cache(name),
        teacher=recipe.teacher,
        images=photos,
        fit_images=recipe.fit_images,
        batch_size=64,
        device=str(place.torch_device),
        workers=place.threads,
        trust_images=True,
        **settings,
    )
    made = extract(config)
    return {"bytes": made.bytes, "error": made.error, "failures": len(made.failures)}


def check_no_leak(place: Place) -> None:
    """Raise SamiCacheError where an image to be judged, by its pixels, is also one to learn from."""
    pixels: dict[str, set[str]] = {}
    for part in ("train", "test"):
        source = open_source(place.cifar / f"{part}.parquet")
        images = (np.asarray(decode_image(source.read(number))) for number in range(len(source)))
        pixels[part] = {digest(image.tobytes() + str(image.shape).encode()) for image in images}
    if shared := len(pixels["train"] & pixels["test"]):
        raise SamiCacheError(f"{place.cifar}: {shared} images of test.parquet are in train.parquet too. Remove them there.")


def check_cache(place: Place, cache: Cache) -> None:
    """Raise SamiCacheError unless all samples are of the training set, or of the photographs."""
    train, test = (set(open_source(place.cifar / f"{part}.parquet").keys) for part in ("train", "test"))
    photos = set(open_source(place.photos).keys)
    keys = set(cache.table()["key"].to_pylist())
    if keys & test or not (keys <= train or keys <= photos):
        raise SamiCacheError(f"{cache.path} holds images that are not of train.parquet or {place.photos}: remove it.")


@lru_cache(maxsize=2)
def labelled(place: Place, part: Literal["learn", "judge"], seed: int, size: int, teacher: int | None = None) -> Loader:
    """CIFAR-10 with labels. Judged on: the test set, or where settings are being chosen the last images of the training set."""
    file = "test" if (place.judge, part) == ("test", "judge") else "train"
    samples = SourceSamples(open_source(place.cifar / f"{file}.parquet"))
    chosen = samples.usable.copy()
    if place.judge == "heldout":
        chosen &= not_held_out(place, len(chosen)) == (part == "learn")
    config = loader_config(place, seed, size, batch_size=min(place.recipe.batch_size, int(chosen.sum())))
    teacher_options = {} if teacher is None else {"teacher_size": teacher, "teacher_interpolation": "bicubic"}
    return Loader(samples, chosen, replace(config, **teacher_options))


def not_held_out(place: Place, count: int) -> np.ndarray:
    """bool [count], of the training set in its order."""
    return np.arange(count) < count - place.recipe.heldout


def loader_config(place: Place, seed: int, size: int, *, batch_size: int, crops: bool = False) -> LoaderConfig:
    return LoaderConfig(
        batch_size=batch_size,
        seed=seed,
        image_size=size,
        tokens=GRID * GRID,
        views=ViewConfig() if crops else WHOLE,
        threads=place.threads,
        timeout=600,
        pin_memory=place.torch_device.type == "cuda",
    )


def train_config(recipe: Recipe, seed: int, *, steps: int, lr: float, betas: tuple[float, float]) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=recipe.batch_size,
        lr=lr,
        seed=seed,
        warmup_steps=steps // 10,
        betas=betas,
        clip_grad=1.0,
        log_every=max(1, steps // 20),
        checkpoint_every=max(1, steps // 10),
        keep_checkpoints=1,
    )


def new_encoder(arm: Arm, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return create_encoder("vit_t", **STUDENTS[arm.student])


def new_model(place: Place, arm: Arm, seed: int, channels: int) -> nn.Module:
    """The student with the decoder that pretraining needs."""
    recipe, encoder = place.recipe, new_encoder(arm, seed)
    if arm.decoder == "all-token":
        model = MAE(encoder, width=recipe.decoder_width, depth=recipe.decoder_depth, heads=recipe.decoder_heads)
        model.head = nn.Linear(recipe.decoder_width, channels)
        for part in (model.embed, model.head, *model.blocks.modules()):
            if isinstance(part, nn.Linear):  # as SAMI initialises its own
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.normal_(model.mask_token, std=0.02)
        return model
    decoder = {name: getattr(recipe, name) for name in ("decoder_width", "decoder_depth", "decoder_heads")}
    return SAMI(encoder, target_channels=channels, keys_values=arm.keys_values, **decoder)


def pretrain(place: Place, name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Everything the arm differs in is in this function and `new_model`."""
    recipe, device, student = place.recipe, place.torch_device, STUDENTS[arm.student]
    cache = Cache(place.cache(arm.cache))
    check_cache(place, cache)
    samples = CacheSamples(cache, None if cache.has_images else open_source(place.cifar / "train.parquet"))
    chosen = samples.usable.copy()
    if place.judge == "heldout" and not cache.has_images:
        chosen &= np.repeat(not_held_out(place, len(chosen) // max(1, cache.views)), max(1, cache.views))
    config = loader_config(place, seed, student["img_size"], batch_size=recipe.batch_size, crops=arm.crops)
    if arm.target == "online":
        teacher = load_teacher(recipe.teacher, image_size=16 * GRID, grid=GRID)
        config = replace(config, teacher_size=teacher.info.image_size, teacher_interpolation=teacher.info.interpolation)
        targets: Any = OnlineTargets(teacher).to(device)
        some = chosen & (random_words(0, 0, np.arange(len(chosen)), 1)[:, 0].argsort().argsort() < 512)
        targets.calibrate(Loader(samples, some, replace(config, batch_size=1)).evaluation(64), 512, device, GRID)
    else:
        targets = PixelTargets(student.get("patch_size", 16)) if arm.target == "pixels" else CacheTargets(cache.codec)
    sami = SAMIConfig(mask_ratio=arm.mask_ratio, loss=arm.loss, tokens="masked" if arm.target == "pixels" else "all")
    model = new_model(place, arm, seed, targets.channels)
    task = SAMITask(model, targets, Loader(samples, chosen, config), None, sami, device)  # type: ignore[arg-type]
    lr = recipe.lr_pixels if arm.target == "pixels" else recipe.lr_teacher
    optimised = train_config(recipe, seed, steps=recipe.steps, lr=lr, betas=(0.9, 0.95))
    return fit(place, task, optimised, place.folder(name, seed) / "pretraining", arm)


def fit(place: Place, task: Any, config: TrainConfig, run: Path, arm: Arm) -> dict[str, Any]:
    """Train, going on from what is there; the last line's loss and seconds."""
    settings = {"arm": asdict(arm), "recipe": asdict(place.recipe), "judge": place.judge}
    line = Trainer(task, config, run, place.torch_device, resume=run.exists(), settings=settings).fit()
    return {name: line[name] for name in ("loss", "seconds")}


def encoder_of(place: Place, name: str, arm: Arm, seed: int) -> VisionTransformer:
    """As pretraining left it, or of an arm without pretraining as initialised."""
    if arm.target == "none":
        return new_encoder(arm, seed)
    channels = 3 * STUDENTS[arm.student].get("patch_size", 16) ** 2
    if arm.target != "pixels":
        codec = Cache(place.cache(arm.cache)).codec
        channels = codec.directions if arm.target == "cache" else codec.basis.shape[1]
    model = new_model(place, arm, seed, channels)
    load_weights(model, place.folder(name, seed) / "pretraining")
    return model.encoder  # type: ignore[return-value]


class Classifier(nn.Module):
    """The mean of the patch tokens, and a linear layer."""

    def __init__(self, encoder: VisionTransformer, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embed_dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None] * 255, persistent=False)

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, D]."""
        pixels = (pixels.float() - self.get_buffer("mean")) / self.get_buffer("std")
        return self.encoder.forward_features(pixels)[:, 1:].mean(1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


class ClassificationTask:
    """Implements `training.Task`: cross-entropy, on images mirrored at random."""

    def __init__(self, model: Classifier, learn: Loader, judged: Loader, device: torch.device) -> None:
        self.model: nn.Module = model
        self.learn, self.judged, self.device, self.steps_per_epoch = learn, judged, device, learn.steps_per_epoch

    def batches(self, start_step: int) -> Iterator[Batch]:
        return on_device(self.learn.batches(start_step), self.device)

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        assert batch.pixels is not None
        pixels = mirror(batch.pixels.to(device), batch.flips.to(device))
        return {"loss": F.cross_entropy(model(pixels).float(), labels_of(self.learn, batch.samples).to(device))}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        right = 0
        for batch in self.judged.evaluation(256):
            assert batch.pixels is not None
            guessed = model(batch.pixels.to(self.device)).argmax(1).cpu()
            right += int((guessed == labels_of(self.judged, batch.samples)).sum())
        return {"accuracy": right / self.judged.count}


def labels_of(loader: Loader, numbers: np.ndarray) -> Tensor:
    return torch.tensor([loader.samples.labels[number] for number in numbers.tolist()])


def finetune(place: Place, name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """All weights and a linear head, on the labels; judged once, after the last step."""
    recipe, size = place.recipe, STUDENTS[arm.student]["img_size"]
    learn, judged = (labelled(place, part, seed, size) for part in ("learn", "judge"))
    classes = 1 + max(label or 0 for label in learn.samples.labels)
    model = Classifier(encoder_of(place, name, arm, seed), classes)
    task = ClassificationTask(model, learn, judged, place.torch_device)
    config = train_config(recipe, seed, steps=recipe.fine_steps, lr=recipe.fine_lr, betas=(0.9, 0.999))
    found = fit(place, task, config, place.folder(name, seed) / "finetuning", arm)
    return found | task.evaluate(model.eval())


def probe(place: Place, name: str, arm: Arm, seed: int) -> dict[str, float]:
    """k-NN and linear probe of the frozen encoder."""
    device = place.torch_device
    model = Classifier(encoder_of(place, name, arm, seed), 1).to(device).eval()
    return accuracies(place, STUDENTS[arm.student]["img_size"], lambda batch: model.features(batch.pixels.to(device)))


def probe_teacher(place: Place) -> dict[str, float]:
    """The same of the teacher's feature maps, averaged over the image: what the students are to come near."""
    device = place.torch_device
    teacher = load_teacher(place.recipe.teacher, image_size=16 * GRID, grid=GRID).to(device)
    size = teacher.info.image_size
    return accuracies(
        place, 16, lambda batch: teacher(teacher.normalise(batch.teacher_pixels.to(device))).mean((2, 3)), teacher=size
    )


@torch.no_grad()
def accuracies(place: Place, size: int, features: Any, teacher: int | None = None) -> dict[str, float]:
    """`features(batch)`: [B, D]."""
    given: list[Tensor] = []
    for part in ("learn", "judge"):
        loader = labelled(place, part, 0, size, teacher)
        given.append(torch.cat([features(batch).float() for batch in loader.evaluation(128)]))
        given.append(labels_of(loader, np.flatnonzero(loader.chosen)).to(given[0].device))
    return {"knn": knn_accuracy(*given), "linear": linear_accuracy(*given)}
