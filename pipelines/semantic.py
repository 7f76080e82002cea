"""A trained segmentation model: opened, measured on masks, and written as one file."""

import io
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from pipelines.starts import start_encoder
from sami_cache import __version__
from sami_cache.checkpoints import load_newest, put_weights
from sami_cache.data.class_masks import ClassLabels, MaskedPictures
from sami_cache.errors import SamiCacheError, one_line
from sami_cache.models.pyramid import SimpleFeaturePyramid
from sami_cache.models.semantic import Mask2Former, Mask2FormerShape
from sami_cache.models.weights import State
from sami_cache.store.files import fsync_directory, write_durably
from sami_cache.tasks.semantic import Normalise, SemanticTask, Viewing, figures


@dataclass(frozen=True, kw_only=True)
class OpenSemantic:
    """A model in evaluation mode, and what it was trained with."""

    model: Mask2Former
    own: dict[str, Any]
    """The run's settings under `semantic`."""
    step: int
    steps: int

    @property
    def classes(self) -> ClassLabels:
        return class_labels(self.own)


def build(encoder: VisionTransformer, own: Mapping[str, Any]) -> Mask2Former:
    """The model around an encoder, as a run's settings under `semantic` say; decoders are drawn from torch's generator."""
    pyramid = SimpleFeaturePyramid(encoder, channels=own["channels"], window=own["window"], global_blocks=own["global_blocks"])
    return Mask2Former(pyramid, len(own["indices"]), Mask2FormerShape(**own["mask2former"]))


def class_labels(own: Mapping[str, Any]) -> ClassLabels:
    """The classes of a run's settings."""
    return ClassLabels(dict(zip(own["indices"], own["class_names"], strict=True)), own["ignored"])


def open_semantic(path: Path, device: torch.device | str = "cpu") -> OpenSemantic:
    """The newest intact checkpoint of a run of `finetune semantic`, or a file that `export` made of one.

    Raises SamiCacheError where `path` is neither, DamageError where no checkpoint is intact.
    """
    own, state, step, steps, source = _read_run(path) if path.is_dir() else _read_export(path)
    encoder = start_encoder(None, own["student"], image_size=own["image_size"], **own["shape"])[0]
    model = build(encoder, own)
    put_weights(model, state, source)
    return OpenSemantic(model=model.to(device).eval(), own=own, step=step, steps=steps)


def _read_run(path: Path) -> tuple[dict[str, Any], State, int, int, str]:
    checkpoint = load_newest(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    if checkpoint is None or "semantic" not in checkpoint.config:
        raise SamiCacheError(f"{path}: no run of `sami-cache finetune semantic` with a checkpoint is there")
    config, source = checkpoint.config, f"the checkpoint of step {checkpoint.step} of {path}"
    return config["semantic"], checkpoint.model, checkpoint.step, config["train"]["steps"], source


def _read_export(path: Path) -> tuple[dict[str, Any], State, int, int, str]:
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            own, step, steps = json.loads(said["semantic"]), int(said["step"]), int(said["steps"])
            return own, {name: file.get_tensor(name) for name in file.keys()}, step, steps, str(path)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SamiCacheError(
            f"{path}: expected a run of `sami-cache finetune semantic`, or a file that `sami-cache export` made of one "
            f"({one_line(error, 120)})"
        ) from error


def evaluate_semantic(
    run: Path,
    data: Path,
    masks: Path,
    *,
    out: Path | None = None,
    viewing: Viewing | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> dict[str, Any]:
    """Measure a run, or its export, at the pictures' own size.

    `miou`, `mean_accuracy` and `pixel_accuracy`, 0..1, and `iou`: of each class that occurs, by name. With `out`, a new or
    empty folder: what was found, as PNGs of class indices under the pictures' names. `viewing`: by default the run's.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SamiCacheError(f"{out} is there: nothing was overwritten. Remove it, or write to another folder with --out")
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    opened, pictures = open_semantic(run, place), MaskedPictures(data, masks)
    own, classes = opened.own, opened.classes
    task = SemanticTask(
        opened.model,
        None,
        classes,
        size=own["image_size"],
        normalise=Normalise(tuple(own["mean"]), tuple(own["std"])),
        viewing=viewing or own["viewing"],
        device=place,
        threads=workers,
    )

    def keep(number: int, labels: np.ndarray) -> None:
        if out is not None:
            path = out / f"{pictures.keys[number]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            Image.fromarray(classes.decode(labels)).save(content, "PNG")
            path.write_bytes(content.getvalue())

    with torch.no_grad():
        pairs = task.confusion(opened.model, pictures, keep)
    right, true, found = (values.tolist() for values in (pairs.diagonal(), pairs.sum(1), pairs.sum(0)))
    iou = {
        name: right[label] / (true[label] + found[label] - right[label])
        for label, name in enumerate(classes.names)
        if true[label]
    }
    return {**figures(pairs), "iou": iou, "pictures": len(pictures), "viewing": task.viewing}


@dataclass(frozen=True, kw_only=True)
class SemanticExport:
    """A segmentation model that was written."""

    path: Path
    student: str
    image_size: int
    classes: int
    tensors: int
    bytes: int
    step: int
    steps: int


def export_semantic(run: Path, out: Path | None = None) -> SemanticExport:
    """Write the whole model of a run, by default to RUN/semantic_<student>.safetensors; `open_semantic` reads it.

    Float32. In the header: `semantic`, all that builds the model, as JSON, the classes' names and indices among it; also by
    themselves as `class_names`. `out` is a .safetensors file or an existing folder. Raises SamiCacheError where something is
    there already.
    """
    opened = open_semantic(run)
    own, name = opened.own, f"semantic_{opened.own['student']}.safetensors"
    path = run / name if out is None else out / name if out.is_dir() else out
    if path.suffix != ".safetensors":
        raise SamiCacheError(f"--out {path}: expected a name that ends in .safetensors, or a folder that exists.")
    if path.exists():
        raise SamiCacheError(f"{path} is there: nothing was overwritten. Remove it, or write to another file with --out FILE.")
    weights = {name: tensor.detach().float().contiguous() for name, tensor in opened.model.state_dict().items()}
    metadata = {
        "format": "pt",
        "semantic": json.dumps(own),
        "class_names": json.dumps(own["class_names"]),
        "step": str(opened.step),
        "steps": str(opened.steps),
        "input": f"RGB in 0..1, mean {tuple(own['mean'])}, std {tuple(own['std'])}; short side {own['image_size']} pixels",
        "sami_cache": __version__,
    }
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(temporary, save(weights, metadata))
        open_semantic(temporary)
        temporary.rename(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise SamiCacheError(f"{path}: not written ({error.strerror}). Give another place with --out FILE.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return SemanticExport(
        path=path,
        student=own["student"],
        image_size=own["image_size"],
        classes=len(own["indices"]),
        tensors=len(weights),
        bytes=path.stat().st_size,
        step=opened.step,
        steps=opened.steps,
    )


def is_semantic(run: Path) -> bool:
    """Whether the folder is a run of `finetune semantic`, as far as its settings say."""
    try:
        return "semantic" in json.loads((run / "config.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
