"""What a run has trained, as one file: an encoder or a classifier that stock timm loads, or a whole promptable model."""

import io
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pipelines.finetune_classification import open_classifier, timm_model
from pipelines.promptable import open_promptable
from pipelines.task_models import TaskModel, find_task_model, write_task_model
from sami_cache import __version__
from sami_cache.checkpoints import Checkpoint, load_newest, put_weights
from sami_cache.errors import SamiCacheError
from sami_cache.models.segment_anything_weights import load_segment_anything, save_segment_anything
from sami_cache.models.students import STUDENTS, create_encoder, export_encoder
from sami_cache.store.files import fsync_directory, write_durably
from sami_cache.tasks.sami import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was exported, and how to load it."""

    path: Path
    timm_name: str
    """What to hand to `timm.create_model`."""
    tensors: int
    parameters: int
    """Numbers in them, the untrained head's included."""
    bytes: int
    step: int
    """Optimizer steps the encoder was trained for."""
    steps: int
    """Those that the run is to have."""
    written: bool
    """False: the very same export was there already."""

    @property
    def load_line(self) -> str:
        """The line of Python that loads it. timm's own constants for these ViTs are 0.5, ours are ImageNet's."""
        cfg = f"dict(mean={IMAGENET_MEAN}, std={IMAGENET_STD})"
        return f"timm.create_model({self.timm_name!r}, checkpoint_path={str(self.path)!r}, pretrained_cfg_overlay={cfg})"


def export(run: Path, out: Path | None = None) -> ExportResult:
    """Write the encoder of a run's newest intact checkpoint, by default to RUN/<timm name>.safetensors.

    `out` is a .safetensors file or an existing folder. The file is float32, carries a head that nobody trained (timm's
    initial one; stock timm wants one), and appears under its name only after stock timm has loaded it strictly. What is there
    already is left alone: no error if it is this export, SamiCacheError if it is anything else. Raises SamiCacheError where
    `run` is no run or has no checkpoint yet, DamageError where no checkpoint is intact.
    """
    checkpoint = newest_checkpoint(run)
    config = checkpoint.config
    timm_name = STUDENTS[config["student"]]
    path = _target(run, out, f"{timm_name}.safetensors")
    encoder = create_encoder(config["student"])
    trained = {name[8:]: tensor for name, tensor in checkpoint.model.items() if name.startswith("encoder.")}
    put_weights(encoder, trained, f"the checkpoint of step {checkpoint.step} of {run}")
    weights = export_encoder(encoder)
    metadata = {
        "format": "pt",
        "timm": timm_name,
        "student": config["student"],
        "target": config["target"],
        "cache_id": config["cache"]["cache_id"] if config["cache"] else "none",
        "step": str(checkpoint.step),
        "steps": str(config["train"]["steps"]),
        "input": f"RGB in 0..1, mean {IMAGENET_MEAN}, std {IMAGENET_STD}",
        "head": "untrained: head.weight and head.bias are timm's initial ones",
        "sami_cache": __version__,
    }
    return ExportResult(
        path=path,
        timm_name=timm_name,
        tensors=len(weights),
        parameters=sum(tensor.numel() for tensor in weights.values()),
        step=checkpoint.step,
        steps=config["train"]["steps"],
        written=_write(path, weights, metadata, timm_name),
        bytes=path.stat().st_size,
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierExport:
    """A classifier that was written, and how to load it."""

    path: Path
    timm_name: str
    options: dict[str, Any]
    """Of `timm.create_model`, beside the name."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bytes: int
    step: int
    steps: int
    written: bool
    """False: the very same export was there already."""

    @property
    def load_line(self) -> str:
        """The line of Python that loads it."""
        own = {**self.options, "checkpoint_path": str(self.path)}
        options = ", ".join(f"{name}={value!r}" for name, value in own.items())
        return (
            f"timm.create_model({self.timm_name!r}, {options}, pretrained_cfg_overlay=dict(mean={self.mean}, std={self.std}))"
        )


def export_classifier(run: Path, out: Path | None = None) -> ClassifierExport:
    """Write the model of a `finetune classification` run, by default to RUN/<timm name>.safetensors.

    `out` and what is there already are treated as by `export`. The header's `class_names` is a JSON list, or null where the
    data named none; `options` says, as JSON, what `timm.create_model` is given.
    """
    model, checkpoint = open_classifier(run)
    own = checkpoint.config["classification"]
    timm_name, options = timm_model(own)
    path = _target(run, out, f"{timm_name}.safetensors")
    weights = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in model.encoder.state_dict().items()}
    mean, std = tuple(own["mean"]), tuple(own["std"])
    metadata = {
        "format": "pt",
        "timm": timm_name,
        "options": json.dumps(options),
        "student": own["student"],
        "class_names": json.dumps(own["class_names"]),
        "step": str(checkpoint.step),
        "steps": str(checkpoint.config["train"]["steps"]),
        "input": f"RGB in 0..1, mean {mean}, std {std}; evaluated on the middle {own['crop_ratio']} of the short side",
        "sami_cache": __version__,
    }
    return ClassifierExport(
        path=path,
        timm_name=timm_name,
        options=options,
        mean=mean,
        std=std,
        step=checkpoint.step,
        steps=checkpoint.config["train"]["steps"],
        written=_write(path, weights, metadata, timm_name, **options),
        bytes=path.stat().st_size,
    )


@dataclass(frozen=True, kw_only=True)
class PromptableExport:
    """A promptable model that was written."""

    path: Path
    family: str
    encoder: str
    image_size: int
    tensors: int
    bytes: int


def export_promptable(run: Path, out: Path | None = None) -> PromptableExport:
    """Write the model of a `finetune promptable` run, by default to RUN/<family>_<encoder>.pt.

    Family efficientsam: the layout of the released EfficientSAM, whose own code loads it; family sam: Meta's. `out` is a .pt or
    .pth file or an existing folder. Raises SamiCacheError where something is there already.
    """
    model = open_promptable(run)
    path = _target(run, out, f"{model.config.family}_{model.config.encoder}.pt", (".pt", ".pth"))
    if path.exists():
        raise SamiCacheError(f"{path} is there: nothing was overwritten. Remove it, or write to another file with --out FILE.")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.pt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        save_segment_anything(model, content)
        write_durably(temporary, content.getvalue())
        load_segment_anything(temporary)
        temporary.rename(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise SamiCacheError(f"{path}: not written ({error.strerror}). Give another place with --out FILE.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return PromptableExport(
        path=path,
        family=model.config.family,
        encoder=model.config.encoder,
        image_size=model.config.image_size,
        tensors=len(model.state_dict()),
        bytes=path.stat().st_size,
    )


def export_task_model(run: Path, out: Path | None = None) -> tuple[Path, TaskModel]:
    """Write the model of a `finetune detection` or `finetune semantic` run, by default to RUN/<kind>_<student>.safetensors.

    `open_detector` and `open_semantic` read it, and so do `sami-cache evaluate detection` and `semantic`.
    """
    kind = "detector" if _has_settings(run, "detector") else "semantic"
    model = find_task_model(run, kind)
    path = _target(run, out, f"{kind}_{model.settings['student']}.safetensors")
    return path, write_task_model(run, path, kind)


def is_task_model(run: Path) -> bool:
    """Whether the folder is a run of `finetune detection` or `finetune semantic`, as far as its settings say."""
    return _has_settings(run, "detector") or _has_settings(run, "semantic")


def is_promptable(run: Path) -> bool:
    """Whether the folder is a run of `finetune promptable`, as far as its settings say."""
    return _has_settings(run, "segment_anything")


def is_classifier(run: Path) -> bool:
    """Whether the folder is a run of `finetune classification`, as far as its settings say."""
    return _has_settings(run, "classification")


def _has_settings(run: Path, name: str) -> bool:
    try:
        return name in json.loads((run / "config.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest intact checkpoint of a pretraining run. Raises SamiCacheError that says what is missing, or DamageError."""
    if not (run / "config.json").exists():
        raise SamiCacheError(f"{run}: there is no run here (no config.json). `sami-cache train --run {run}` makes one.")
    checkpoint = load_newest(run / "checkpoints")
    if checkpoint is None:
        raise SamiCacheError(
            f"{run}: the run has no checkpoint yet. Let it reach its first, or continue it with the command that started it "
            "and --resume."
        )
    if checkpoint.config.get("student") not in STUDENTS or "decoder" not in checkpoint.config:
        raise SamiCacheError(f"{run}: this is no pretraining run of `sami-cache train`: expected a student in its config.json.")
    return checkpoint


def _target(run: Path, out: Path | None, name: str, endings: tuple[str, ...] = (".safetensors",)) -> Path:
    path = run / name if out is None else out / name if out.is_dir() else out
    if path.suffix not in endings:
        raise SamiCacheError(f"--out {path}: expected a name that ends in {' or '.join(endings)}, or a folder that exists.")
    return path


def _write(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any], timm_name: str, **options: Any) -> bool:
    """Make `path` these weights, checked; False if it was so already."""
    if path.exists():
        if _holds(path, weights, metadata):
            return False
        raise SamiCacheError(
            f"{path} is there and is not the export of step {metadata['step']} of this run: nothing was overwritten. Remove "
            "it, or write to another file with --out FILE."
        )
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(temporary, save(weights, metadata))
        timm.create_model(timm_name, **options).load_state_dict(load_file(temporary), strict=True)
        temporary.rename(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise SamiCacheError(f"{path}: not written ({error.strerror}). Give another place with --out FILE.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _holds(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> bool:
    # Compared by content, because safetensors writes the header's fields in any order.
    try:
        with safe_open(path, framework="pt") as file:
            same = file.metadata() == metadata and set(file.keys()) == set(weights)
            return same and all(torch.equal(file.get_tensor(name), tensor) for name, tensor in weights.items())
    except (OSError, SafetensorError):
        return False
