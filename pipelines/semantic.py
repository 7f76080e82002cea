"""A segmentation model: built, opened, and measured on masks."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from pipelines.starts import start_encoder
from pipelines.task_models import find_task_model
from sami_cache.checkpoints import put_weights
from sami_cache.data.class_masks import ClassLabels, MaskedPictures
from sami_cache.errors import SamiCacheError
from sami_cache.models.pyramid import SimpleFeaturePyramid
from sami_cache.models.semantic import Mask2Former, Mask2FormerShape
from sami_cache.processes import choose_device
from sami_cache.tasks.semantic import Normalise, SemanticTask, Viewing, figures


@dataclass(frozen=True, kw_only=True)
class OpenSemantic:
    """A model in evaluation mode, and what it was trained with."""

    model: Mask2Former
    own: dict[str, Any]
    """The run's settings under `semantic`."""

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
    found = find_task_model(path, "semantic")
    own = found.settings
    encoder = start_encoder(None, own["student"], image_size=own["image_size"], **own["shape"])[0]
    model = build(encoder, own)
    put_weights(model, found.state, found.source)
    return OpenSemantic(model=model.to(device).eval(), own=own)


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
    place = choose_device(device)
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
