"""What a frozen encoder's features are worth: k nearest neighbours and a linear probe on labelled pictures."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.starts import start_constants, start_encoder
from sami_cache.augmentation import evaluation_view
from sami_cache.data.labelled import LabelledPictures
from sami_cache.data.sources import open_source
from sami_cache.errors import SamiCacheError
from sami_cache.features import read_features, save_features
from sami_cache.models.teachers import Teacher, load_teacher
from sami_cache.models.weights import state_digest
from sami_cache.probing import TEMPERATURE, K, bootstrap_interval, fit_linear, knn_predictions
from sami_cache.processes import choose_device
from sami_cache.steps import prepared
from sami_cache.store.files import canonical_json, digest

POOLS = ("patches", "class")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is probed, on what, and how. One of `weights`, `teacher` and `student` (untrained) must be given."""

    train: Path
    """Labelled pictures that are the neighbours, and that the probe is fitted on; as `open_source` reads them."""
    test: Path
    weights: str | Path | None = None
    """As `starts.open_start` reads it."""
    student: str | None = None
    """Without `weights`: this student with random weights."""
    shape: dict[str, Any] = field(default_factory=dict)
    """timm's options for a student of another shape: patch_size, embed_dim, depth, num_heads."""
    teacher: str | None = None
    teacher_weights: str | None = None
    """As `load_teacher` reads them."""
    layer: str | None = None
    """Of the teacher."""
    image_size: int = 224
    crop_ratio: float = 0.875
    """The short side is resized to image_size / crop_ratio, the middle cut out."""
    pools: tuple[str, ...] = POOLS
    """Of a student: patches, the mean of the patch tokens; class, the class token. A teacher's map is averaged."""
    ks: tuple[int, ...] = (K,)
    temperature: float = TEMPERATURE
    seed: int = 0
    """Of random weights, of the tenth that the probe's penalty is chosen on, and of the intervals."""
    features: Path = Path("features")
    """Where features are kept."""
    batch_size: int = 64
    device: str = "auto"
    workers: int | None = None


class Subject(Protocol):
    """What is probed."""

    name: str
    source: str
    pools: tuple[str, ...]
    interpolation: str

    def identity(self) -> dict[str, Any]:
        """Like JSON: all that its features depend on, besides the pictures and how they are cut."""
        ...

    def pooled(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, S, S] -> float32 [B, D] by pool."""
        ...


class StudentSubject:
    """Implements `Subject`: a plain ViT."""

    interpolation = "bicubic"

    def __init__(self, config: ProbeConfig, device: torch.device) -> None:
        if unknown := [pool for pool in config.pools if pool not in POOLS]:
            raise SamiCacheError(f"--pool {unknown[0]}: expected patches, class or both")
        torch.manual_seed(config.seed)
        encoder, self.name, self.source = start_encoder(
            config.weights, config.student, image_size=config.image_size, **config.shape
        )
        self.pools = tuple(pool for pool in config.pools if pool == "patches" or encoder.has_class_token)
        if not self.pools:
            raise SamiCacheError(f"{self.source} has no class token: give --pool patches")
        self._shape, self._digest = config.shape, state_digest(encoder)
        self._constants = start_constants(config.weights)
        self._encoder = encoder.to(device).eval()
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] * 255 for values in self._constants)

    def identity(self) -> dict[str, Any]:
        mean, std = map(list, self._constants)
        return {"model": self.name, "shape": self._shape, "weights_sha256": self._digest, "mean": mean, "std": std}

    def pooled(self, pixels: Tensor) -> dict[str, Tensor]:
        tokens = self._encoder.forward_features((pixels.float() - self._mean) / self._std)
        # Where the norm comes after pooling, as in ViTs that were trained to classify a mean.
        return {
            "patches": self._encoder.fc_norm(tokens[:, self._encoder.num_prefix_tokens :].mean(1)),
            "class": self._encoder.fc_norm(tokens[:, 0]),
        }


class TeacherSubject:
    """Implements `Subject`: the mean over the map that is distilled, which no student of it is expected to pass."""

    pools: tuple[str, ...] = ("pooled",)

    def __init__(self, config: ProbeConfig, device: torch.device) -> None:
        assert config.teacher is not None
        self._teacher: Teacher = load_teacher(
            config.teacher, weights=config.teacher_weights, layer=config.layer, image_size=config.image_size, seed=config.seed
        ).to(device)
        info = self._teacher.info
        self.name, self.source, self.interpolation = f"{info.name}, layer {info.layer}", info.weights, info.interpolation

    def identity(self) -> dict[str, Any]:
        info = self._teacher.info
        own = {"layer": info.layer, "weights_sha256": info.weights_sha256, "mean": list(info.mean), "std": list(info.std)}
        return {"model": info.name, **own}

    def pooled(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"pooled": self._teacher(self._teacher.normalise(pixels)).mean((2, 3))}


def probe(config: ProbeConfig, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Probe and return, like JSON, what was found: accuracies are shares of the test set, with 95 % bootstrap intervals.

    Features are read from `config.features` where they are kept there, and kept there otherwise. Raises SamiCacheError where
    the arguments, the data or the weights do not fit together.
    """
    started = time.perf_counter()
    own = bool(config.weights or config.student)
    if own == bool(config.teacher):
        raise SamiCacheError("give what is to be probed: RUN_OR_WEIGHTS, or --student NAME (untrained), or --teacher NAME")
    device = choose_device(config.device)
    train = LabelledPictures(open_source(config.train))
    test = LabelledPictures(open_source(config.test), train)
    subject: Subject = (TeacherSubject if config.teacher else StudentSubject)(config, device)
    contents, sides, reused = {}, {}, True
    for name, pictures in (("train", train), ("test", test)):
        contents[name] = _contents(pictures, config.workers)
        sides[name], kept = _features(
            config, subject, pictures, contents[name], device, lambda text, name=name: say(name + text)
        )
        reused &= kept
    seen = set(contents["train"])
    found: dict[str, Any] = {
        "model": {"name": subject.name, "source": subject.source, "weights_sha256": subject.identity()["weights_sha256"]},
        "image_size": config.image_size,
        "crop_ratio": config.crop_ratio,
        "classes": train.classes,
        "train": {"path": str(config.train), "pictures": len(train)},
        "test": {"path": str(config.test), "pictures": len(test)},
        "test_pictures_in_train": sum(content in seen for content in contents["test"]),
        "temperature": config.temperature,
        "seed": config.seed,
        "pools": {},
        "features_reused": reused,
    }
    for pool in subject.pools:
        say(f"probing {pool}")
        found["pools"][pool] = _measure(config, sides["train"][pool], train.labels, sides["test"][pool], test.labels, device)
    return found | {"seconds": time.perf_counter() - started}


def _measure(
    config: ProbeConfig, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray, device: torch.device
) -> dict[str, Any]:
    gallery, queries = (torch.from_numpy(each).to(device).float() for each in (train, test))
    true = torch.from_numpy(labels).to(device)

    def share(predicted: Tensor) -> dict[str, Any]:
        right = int((predicted == true).sum())
        low, high = bootstrap_interval(right, len(true), seed=config.seed)
        return {"accuracy": right / len(true), "low": low, "high": high}

    neighbours = knn_predictions(gallery, train_labels, queries, ks=config.ks, temperature=config.temperature)
    linear = fit_linear(gallery, train_labels, seed=config.seed)
    return {
        "dimensions": train.shape[1],
        "knn": {str(k): share(predicted) for k, predicted in neighbours.items()},
        "linear": share(linear.predict(queries)) | {"penalty": linear.penalty, "heldout_accuracy": linear.heldout_accuracy},
    }


def _contents(pictures: LabelledPictures, workers: int | None) -> list[str]:
    """BLAKE3 of every picture's bytes. Names and time stamps say nothing about them."""

    def content(number: int) -> str:
        return digest(pictures.read(number))

    return list(prepared(content, ((number,) for number in range(len(pictures))), threads=workers, ahead=64))


def _features(
    config: ProbeConfig,
    subject: Subject,
    pictures: LabelledPictures,
    contents: list[str],
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[dict[str, np.ndarray], bool]:
    """float16 [N, D] by pool, and whether they were there already."""
    common = {
        **subject.identity(),
        "data": digest(canonical_json(contents)),
        "image_size": config.image_size,
        "crop_ratio": config.crop_ratio,
        "interpolation": subject.interpolation,
        "device": device.type,  # which rounds in its own way
    }
    ofs = {pool: common | {"pool": pool} for pool in subject.pools}
    kept = {pool: read_features(config.features, of) for pool, of in ofs.items()}
    there = {pool: features for pool, features in kept.items() if features is not None}
    if len(there) == len(ofs):
        return there, True
    parts: dict[str, list[np.ndarray]] = {pool: [] for pool in ofs}
    for pixels, done in _batches(config, subject, pictures):
        with torch.inference_mode():
            for pool, values in subject.pooled(pixels.to(device)).items():
                if pool in parts:
                    parts[pool].append(values.float().cpu().numpy())
        say(f": picture {done} of {len(pictures)}")
    return {pool: save_features(config.features, of, np.concatenate(parts[pool])) for pool, of in ofs.items()}, False


def _batches(config: ProbeConfig, subject: Subject, pictures: LabelledPictures) -> Iterator[tuple[Tensor, int]]:
    """uint8 [B, 3, S, S] in order, and how many pictures have come."""
    view = evaluation_view(config.image_size, config.crop_ratio, subject.interpolation)
    some: list[Tensor] = []
    jobs = ((number,) for number in range(len(pictures)))
    items = prepared(lambda number: view(pictures.image(number)), jobs, threads=config.workers, ahead=config.batch_size)
    for done, pixels in enumerate(items, 1):
        some.append(pixels)
        if len(some) == config.batch_size or done == len(pictures):
            yield torch.stack(some), done
            some = []
