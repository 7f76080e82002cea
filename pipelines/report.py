"""A page about a pretraining run: its loss curve, what it reconstructs of held-out images, and its settings."""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.export import newest_checkpoint
from pipelines.page import document, picture, png, settings_table
from pipelines.train import TrainingConfig, prepare
from sami_cache.batches import Batch
from sami_cache.checkpoints import Checkpoint, put_weights
from sami_cache.data.views import mirror
from sami_cache.errors import DamageError, IdentityError, SamiCacheError
from sami_cache.loader import Loader
from sami_cache.processes import distributed
from sami_cache.report import Row, loss_figure, pca_rgb, reconstruction_figure
from sami_cache.store.places import AnyPath, parse_place
from sami_cache.tasks.sami import IMAGENET_MEAN, IMAGENET_STD, SAMITask

TITLES = {
    "teacher": ("image", "what the student saw", "teacher's features", "student's reconstruction"),
    "pixels": ("image", "what the student saw", "target: the masked pixels", "student's reconstruction"),
}
CAPTIONS = {
    "teacher": "Features as RGB: the first three principal components of the teacher's, the same for both columns.",
    "pixels": "Masked patches have the image's brightness and contrast: the loss does not ask for them (norm_pix_loss).",
}


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Where the report is, and the numbers in it. `before` is step 0, `after` the last evaluation up to `step`."""

    page: Path
    loss_picture: Path
    reconstruction_picture: Path
    step: int
    """Of the checkpoint; `steps` are planned."""
    steps: int
    loss_first: float
    """First and last training loss that was logged."""
    loss_last: float
    before: dict[str, float]
    """`heldout_loss`, `heldout_cosine`, ... as in metrics.jsonl; empty without held-out images."""
    after: dict[str, float]
    images: list[str]
    """Keys of the images in the picture."""
    held_out: bool
    """False: the run held no image out, and the picture shows images it was trained on."""

    def text(self) -> str:
        """The figures in a few lines."""
        lines = [f"loss {self.loss_first:.4f} -> {self.loss_last:.4f} (step {self.step} of {self.steps})"]
        if self.after:
            lines.append(
                f"held-out images: cosine to the target {self.before['heldout_cosine']:.4f} -> "
                f"{self.after['heldout_cosine']:.4f} (masked tokens {self.after['heldout_cosine_masked']:.4f}), loss "
                f"{self.before['heldout_loss']:.4f} -> {self.after['heldout_loss']:.4f} (of predicting the mean: "
                f"{self.after['heldout_loss_of_mean']:.4f})"
            )
        return "\n".join([*lines, f"page: {self.page}", f"pictures: {self.loss_picture}, {self.reconstruction_picture}"])


def report(
    run: Path, *, cache: AnyPath | None = None, data: Path | None = None, images: int = 6, device: str = "auto"
) -> ReportResult:
    """Write RUN/report/report.html (self-contained), loss.png and reconstruction.png from the newest intact checkpoint.

    `cache`, `data`: where they are now, if not where they were in training. Raises SamiCacheError where there is no run, no
    checkpoint or no logged loss, IdentityError where the cache is another one, and what opening cache and images raises.
    """
    checkpoint = newest_checkpoint(run)
    if images < 1:
        raise SamiCacheError(f"--images {images}: at least one.")
    lines = [line for line in read_metrics(run) if line["step"] <= checkpoint.step]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if not losses:
        raise SamiCacheError(f"{run / 'metrics.jsonl'}: no loss was logged up to step {checkpoint.step}: train further.")
    with distributed(device) as place:
        task = _rebuild(run, checkpoint, cache, data, place)
        rows = _reconstruct(task, checkpoint.config, images)
    evaluations = [{k: v for k, v in line.items() if k.startswith("heldout_") and v is not None} for line in lines]
    evaluations = [values for values in evaluations if values]
    target = checkpoint.config["target"]
    figures = {
        "loss.png": loss_figure(lines),
        "reconstruction.png": reconstruction_figure(rows, TITLES[target], CAPTIONS[target]),
    }
    pictures = {name: png(figure) for name, figure in figures.items()}
    folder = run / "report"
    result = ReportResult(
        page=folder / "report.html",
        loss_picture=folder / "loss.png",
        reconstruction_picture=folder / "reconstruction.png",
        step=checkpoint.step,
        steps=checkpoint.config["train"]["steps"],
        loss_first=losses[0],
        loss_last=losses[-1],
        before=evaluations[0] if evaluations else {},
        after=evaluations[-1] if evaluations else {},
        images=[row.name for row in rows],
        held_out=task.held_out is not None,
    )
    folder.mkdir(exist_ok=True)
    for name, data_ in pictures.items():
        (folder / name).write_bytes(data_)
    result.page.write_text(_page(run, result, checkpoint.config, pictures), encoding="utf-8")
    return result


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; a last one that a crash or a running training has left unfinished is dropped."""
    path = run / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise DamageError(f"{path}, line {number}: not JSON ({error}). Restore the file, or train anew.") from error
    return lines


def _rebuild(run: Path, checkpoint: Checkpoint, cache: AnyPath | None, data: Path | None, device: torch.device) -> SAMITask:
    """The run's task as it was configured, on the same split, with the checkpoint's weights, in evaluation mode."""
    saved, places, online = checkpoint.config, checkpoint.config["places"], checkpoint.config["teacher_online"] or {}
    cache = cache or (parse_place(places["cache"]) if places["cache"] else None)
    data = data or (Path(places["data"]) if places["data"] else None)
    prepared = prepare(
        TrainingConfig(
            run=run,
            cache=cache,
            data=data,
            student=saved["student"],
            target=saved["target"],
            teacher_online=bool(online),
            teacher=online.get("name"),
            weights=places["weights"],
            layer=online.get("layer"),
            image_size=online.get("image_size"),
            steps=saved["train"]["steps"],
            batch_size=saved["train"]["batch_size"],
            mask_ratio=saved["sami"]["mask_ratio"],
            loss=saved["sami"]["loss"],
            keys_values=saved["decoder"]["keys_values"],
            decoder_width=saved["decoder"]["width"],
            decoder_depth=saved["decoder"]["depth"],
            holdout=saved["holdout"],
            seed=saved["train"]["seed"],
        ),
        device,
    )
    expected = saved["cache"] and saved["cache"]["cache_id"]
    found = prepared.settings["cache"] and prepared.settings["cache"]["cache_id"]
    if expected != found:
        raise IdentityError(
            f"{run} was trained from the cache {expected}, {cache} is {found}: give the one it was trained from with --cache."
        )
    task = prepared.task
    assert isinstance(task, SAMITask)
    put_weights(task.model, checkpoint.model, f"the checkpoint of step {checkpoint.step} of {run}")
    task.model.to(device).eval()
    return task


@torch.no_grad()
def _reconstruct(task: SAMITask, config: Mapping[str, Any], count: int) -> list[Row]:
    """`count` held-out images spread over the set (without any, training images), each with a mask that never changes."""
    loader = task.held_out or task.train
    numbers = np.flatnonzero(loader.chosen)
    chosen = np.zeros_like(loader.chosen)
    chosen[numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)]] = True
    few = Loader(loader.samples, chosen, replace(loader.config, batch_size=1, micro_batches=1))
    batch = next(few.evaluation(count))
    prediction, target, mask = task.predict(task.model, batch)
    prediction = prediction.float()
    cosines = torch.nn.functional.cosine_similarity(prediction, target, dim=-1)
    if config["target"] == "pixels":  # nothing was asked of the visible tokens
        cosines, per_image = cosines * mask, mask.sum(1)
    else:
        per_image = torch.full((len(mask),), mask.shape[1], device=mask.device)
    draw = _pixel_pictures if config["target"] == "pixels" else _feature_pictures
    targets, predictions = draw(task, batch, prediction, target, mask)
    assert batch.pixels is not None
    images = mirror(batch.pixels, batch.flips).permute(0, 2, 3, 1).numpy()
    hidden = _per_pixel(mask, task.grid, images.shape[1])
    return [
        Row(
            name=key,
            image=images[i],
            masked=np.where(hidden[i], np.uint8(128), images[i]),
            target=targets[i],
            prediction=predictions[i],
            cosine=float(cosines[i].sum() / per_image[i]),
        )
        for i, key in enumerate(batch.keys)
    ]


def _feature_pictures(
    task: SAMITask, batch: Batch, prediction: Tensor, target: Tensor, mask: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Both as uint8 [B, grid, grid, 3], in the colours of the target's principal components."""
    shape = (len(batch.keys), task.grid, task.grid, -1)
    teacher, student = (values.reshape(shape).cpu().numpy() for values in (target, prediction))
    return pca_rgb(teacher), pca_rgb(student, like=teacher)


def _pixel_pictures(
    task: SAMITask, batch: Batch, prediction: Tensor, target: Tensor, mask: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Both as uint8 [B, S, S, 3], visible patches as in the image."""
    scale, offset = (torch.tensor(values)[:, None, None] * 255 for values in (IMAGENET_STD, IMAGENET_MEAN))
    assert batch.pixels is not None
    pixels = (mirror(batch.pixels, batch.flips).float() - offset) / scale  # the space in which patches are normalised
    count, grid, patch = len(pixels), task.grid, pixels.shape[-1] // task.grid
    blocks = pixels.reshape(count, 3, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1).reshape(count, grid * grid, -1)
    variance, mean = torch.var_mean(blocks, dim=-1, keepdim=True)

    def picture(values: Tensor) -> np.ndarray:
        merged = torch.where(mask.cpu()[..., None], values.cpu() * variance.sqrt() + mean, blocks)
        cut = merged.reshape(count, grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(pixels.shape)
        return (cut * scale + offset).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()

    return picture(target), picture(prediction)


def _per_pixel(mask: Tensor, grid: int, size: int) -> np.ndarray:
    """bool [B, N] per token -> bool [B, size, size, 1] per pixel."""
    cells = mask.reshape(-1, grid, grid).cpu().numpy()
    return cells.repeat(size // grid, 1).repeat(size // grid, 2)[..., None]


def _page(run: Path, result: ReportResult, config: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    # Beneath this point only text that has gone through html.escape, numbers and our own constants.
    numbers = [("training loss", result.loss_first, result.loss_last)]
    numbers += [
        (key.replace("heldout_", "held-out ").replace("_", " "), result.before[key], result.after[key]) for key in result.after
    ]
    table = "".join(
        f'<tr><td>{html.escape(label)}</td><td class="n">{first:.4f}</td><td class="n">{last:.4f}</td></tr>'
        for label, first, last in numbers
    )
    loss, rows = (
        picture(alt, pictures[file]) for file, alt in (("loss.png", "loss curve"), ("reconstruction.png", "reconstructions"))
    )
    which = "held-out images, never trained on" if result.held_out else "images it was trained on (the run held none out)"
    return document(
        str(run),
        f"<p>Step {result.step} of {result.steps}. Before "
        "training the student predicts noise: the held-out loss is then above that of predicting the target's mean, and the "
        "cosine, taken per token between features less their mean, about 0. Training losses are of single batches.</p>"
        f"<table><tr><th></th><th>first</th><th>last</th></tr>{table}</table>"
        f"<h2>Loss</h2>{loss}<h2>Reconstruction of {which}</h2>{rows}<h2>Settings</h2>{settings_table(config)}",
    )
