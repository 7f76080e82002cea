"""The ONNX files of a promptable model: made, compared with torch on photographs, timed, and only then put in their place."""

import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.promptable import open_promptable
from sami_cache.data.images import decode_image
from sami_cache.data.sources import open_source
from sami_cache.errors import ImageError, SamiCacheError
from sami_cache.inference.onnx_export import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    ENCODER_INPUTS,
    export_decoder,
    export_encoder,
    require_onnx,
)
from sami_cache.inference.onnx_variants import Agreement, agreement, eight_bits, half_precision
from sami_cache.models.segment_anything import Masks, SegmentAnything
from sami_cache.store.files import disk_full_as_error, fsync_directory, write_durably

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
"""Of scikit-image."""
MOST_PHOTOGRAPHS = 20
TOLERANCE = 1e-3
"""Of the logits, relative to the largest one (or 1)."""
RESIZING_TOLERANCE = 0.01
"""Of the embedding of a picture that the graph itself resized, relative, by norms. Single pixels that two resizers round
differently come to 0.001 at most; the picture resized by another rule, without antialiasing, is 0.03 to 0.26 off."""


@dataclass(frozen=True, kw_only=True)
class ExportOnnxConfig:
    """What to export, and what to compare it on."""

    model: Path
    """A run of `finetune promptable`, or a checkpoint as `load_segment_anything` reads it."""
    out: Path
    """A folder; made where it is missing."""
    fp16: bool = False
    int8: bool = False
    single_mask: bool = False
    """The decoder gives token 0's mask alone."""
    images: Path | None = None
    """Photographs, the first 20 of them. None: those that scikit-image ships."""
    runs: int = 10
    """Of each graph, for the median."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One file."""

    path: Path
    bytes: int
    milliseconds: float
    """Median of one picture, or one click, with onnxruntime's own number of threads."""
    agreement: Agreement | None
    """A smaller encoder's masks against those of the float32 one."""


@dataclass(frozen=True, kw_only=True)
class ExportOnnxResult:
    """All files, and how far the float32 ones are from torch."""

    files: list[Exported]
    embedding_difference: float
    logit_difference: float
    """Largest absolute one, of all masks at the photographs' resolution."""
    resizing_difference: float
    """Largest one of the embeddings of photographs at their own size, which the graph resizes: relative, by norms."""
    largest_logit: float
    photographs: int
    milliseconds_torch: float
    """Median of torch's encoder on the same pictures, with torch's own number of threads."""


class _Photograph(NamedTuple):
    pixels: np.ndarray  # uint8 [H, W, 3]

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]

    def feed(self) -> dict[str, np.ndarray]:
        return {ENCODER_INPUTS[0]: self.pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255}

    def as_input(self, model: SegmentAnything) -> "_Photograph":
        """At the size that the model sees it: two resizers round single pixels differently."""
        rows, columns = model.covered(*self.size)
        return _Photograph(np.array(Image.fromarray(self.pixels).resize((columns, rows), Image.Resampling.BILINEAR)))


def export_onnx(config: ExportOnnxConfig, say: Callable[[str], None] = lambda text: None) -> ExportOnnxResult:
    """Write encoder.onnx and decoder.onnx, and encoder_fp16.onnx and encoder_int8.onnx where asked for, to `config.out`.

    `say` hears what is being done. The files appear only after onnxruntime has read them from the disk and given torch's masks
    on every photograph. Raises SamiCacheError where it does not, a file is there already, a package is missing or a photograph
    cannot be read; no file is left behind then.
    """
    require_onnx()
    variants = {name: make for name, make in _VARIANTS.items() if getattr(config, name)}
    names = ["encoder.onnx", "decoder.onnx", *(f"encoder_{name}.onnx" for name in variants)]
    for name in names:
        if (config.out / name).exists():
            raise SamiCacheError(
                f"{config.out / name} is there already: nothing was written. Remove it, or give another --out."
            )
    photographs = _photographs(config.images)
    model = open_promptable(config.model)
    staging = config.out / f".onnx.{secrets.token_hex(8)}"
    config.out.mkdir(parents=True, exist_ok=True)
    with disk_full_as_error(config.out, "exporting"):
        try:
            staging.mkdir()
            say("exporting")
            encoder = export_encoder(model)
            write_durably(staging / "encoder.onnx", encoder)
            write_durably(staging / "decoder.onnx", export_decoder(model, single_mask=config.single_mask))
            for name, make in variants.items():
                say(f"making the {name} encoder")
                write_durably(staging / f"encoder_{name}.onnx", make(encoder))
            say(f"comparing on {len(photographs)} photographs")
            result = _measure(model, staging, config, names, photographs)
            for name in names:
                (staging / name).rename(config.out / name)
            fsync_directory(config.out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return result


_VARIANTS: dict[str, Callable[[bytes], bytes]] = {"fp16": half_precision, "int8": eight_bits}


def _measure(
    model: SegmentAnything, folder: Path, config: ExportOnnxConfig, names: list[str], photographs: list[_Photograph]
) -> ExportOnnxResult:
    sessions = {name: _session(folder / name) for name in names}
    differences = [_compare(model, config, sessions, photograph) for photograph in photographs]
    embeddings_off, resizing, logits, largest = np.max(differences, axis=0).tolist()  # NaN if one is, unlike Python's max
    allowed = TOLERANCE * max(1.0, largest)
    if not logits <= allowed:  # NaN is not
        raise SamiCacheError(
            f"the masks of the ONNX files differ from torch's by {logits:.2g} in logits of up to {largest:.2g}: expected at "
            f"most {allowed:.2g}. Nothing was written. Try other versions of torch and onnxruntime, and report it."
        )
    if not resizing <= RESIZING_TOLERANCE:
        raise SamiCacheError(
            "the ONNX encoder does not resize as torch does: embeddings of photographs of other sizes than the model's differ "
            f"by {resizing:.2g}, relative; expected at most {RESIZING_TOLERANCE}. Nothing was written. Try other versions of "
            "torch and onnxruntime, and report it."
        )
    embeddings: dict[str, list[Tensor]] = {}
    files = []
    for name, session in sessions.items():
        if name == "decoder.onnx":
            feeds = [
                _click(photograph, embedding.numpy())
                for photograph, embedding in zip(photographs, embeddings["encoder.onnx"], strict=True)
            ]
        else:
            feeds = [photograph.feed() for photograph in photographs]
            embeddings[name] = [torch.from_numpy(session.run(None, feed)[0]) for feed in feeds]
        same = None
        if name not in ("encoder.onnx", "decoder.onnx"):
            sizes = [photograph.size for photograph in photographs]
            same = agreement(model, embeddings["encoder.onnx"], embeddings[name], sizes)
        seconds = _median([partial(session.run, None, feed) for feed in feeds], config.runs)
        path = config.out / name
        size = (folder / name).stat().st_size
        files.append(Exported(path=path, bytes=size, milliseconds=1000 * seconds, agreement=same))
    pixels = [model.preprocess(photograph.pixels)[None] for photograph in photographs]
    with torch.inference_mode():
        torch_seconds = _median([partial(model.encode, values) for values in pixels], config.runs)
    return ExportOnnxResult(
        files=files,
        embedding_difference=embeddings_off,
        logit_difference=logits,
        resizing_difference=resizing,
        largest_logit=largest,
        photographs=len(photographs),
        milliseconds_torch=1000 * torch_seconds,
    )


@torch.inference_mode()
def _compare(
    model: SegmentAnything, config: ExportOnnxConfig, sessions: dict[str, Any], photograph: _Photograph
) -> tuple[float, float, float, float]:
    """Of one photograph: how far the embedding is off, also with the graph's own resizing, and logits; and the largest logit.

    The first and third are largest absolute differences, the logits those of two clicks and a box; the second is relative.
    """
    shown = photograph.as_input(model)
    expected = model.encode(model.preprocess(shown.pixels)[None])
    got = sessions["encoder.onnx"].run(None, shown.feed())[0]
    resized = sessions["encoder.onnx"].run(None, photograph.feed())[0]
    own = model.encode(model.preprocess(photograph.pixels)[None]).numpy()
    height, width = photograph.size
    corners = torch.tensor([[[0.4, 0.4], [0.7, 0.2]], [[0.2, 0.3], [0.8, 0.9]]])[None] * torch.tensor([width, height])
    labels = torch.tensor([[[1, 0], [2, 3]]])
    answer = model.decode(expected, *model.complete_prompts(model.to_input(corners, height, width), labels))
    logits, iou = answer.single if config.single_mask else best_first(answer.three)
    picture = model.to_picture(logits.flatten(0, 1), height, width).unflatten(0, logits.shape[:2]).numpy()
    feed = (got, corners.numpy(), labels.numpy().astype(np.float32), np.array(photograph.size))
    masks, predicted, _ = sessions["decoder.onnx"].run(list(DECODER_OUTPUTS), dict(zip(DECODER_INPUTS, feed, strict=True)))
    logit = float(np.max([np.abs(masks - picture).max(), np.abs(predicted - iou.numpy()).max()]))
    resizing = float(np.linalg.norm(resized - own) / np.linalg.norm(own))
    return float(np.abs(got - expected.numpy()).max()), resizing, logit, float(np.abs(picture).max())


def best_first(masks: Masks) -> Masks:
    """In the order that the ONNX decoder has: by predicted IoU, falling."""
    order = masks.iou.argsort(dim=-1, descending=True)
    return Masks(masks.logits.take_along_dim(order[..., None, None], dim=2), masks.iou.take_along_dim(order, dim=2))


def _click(photograph: _Photograph, embedding: np.ndarray) -> dict[str, np.ndarray]:
    height, width = photograph.size
    middle = np.array([[[[width / 2, height / 2]]]], np.float32)
    feed = (embedding, middle, np.ones((1, 1, 1), np.float32), np.array(photograph.size))
    return dict(zip(DECODER_INPUTS, feed, strict=True))


def _median(calls: list[Callable[[], object]], runs: int) -> float:
    """Seconds; the calls take turns, after one that does not count."""
    calls[0]()
    seconds = []
    for run in range(runs):
        started = time.perf_counter()
        calls[run % len(calls)]()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its remarks on graphs are not for the user
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _photographs(folder: Path | None) -> list[_Photograph]:
    if folder is None:
        package = find_spec("skimage")  # importing it may go looking for a network
        if package is None or not package.submodule_search_locations:
            raise SamiCacheError(
                "the photographs to compare on come with scikit-image, not installed here: pip install 'sami-cache[demo]', "
                "or give your own with --images DIR"
            )
        data = Path(package.submodule_search_locations[0]) / "data"
        encoded = {name: (data / name).read_bytes() for name in PHOTOGRAPHS}
    else:
        source = open_source(folder, kind="folder")
        encoded = {source.keys[number]: source.read(number) for number in range(min(len(source), MOST_PHOTOGRAPHS))}
    found = []
    for name, data in encoded.items():
        try:
            found.append(_Photograph(np.array(decode_image(data))))
        except ImageError as error:
            raise SamiCacheError(f"--images {folder}: {name}: {error}. Remove it from the folder.") from error
    return found
