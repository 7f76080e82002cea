"""Where the weights of an encoder that is fine-tuned come from: a run of ours, its export, timm, or nowhere."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from sami_cache.checkpoints import load_newest
from sami_cache.errors import SamiCacheError
from sami_cache.models.students import STUDENTS, create_encoder
from sami_cache.models.weights import State, load_strictly, read_state
from sami_cache.tasks.sami import IMAGENET_MEAN, IMAGENET_STD

WIDTHS = {192: "vit_t", 384: "vit_s", 768: "vit_b"}
TIMM = "timm:"
RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Pretrained weights of a plain ViT, without a head."""

    student: str
    """A name in `STUDENTS`, or timm's."""
    state: State
    """Under timm's names."""
    source: str
    """For messages and the run's settings."""


def open_start(init: str | Path | None) -> Start | None:
    """The encoder that `init` names; None where it is none of these, or None itself.

    A run's folder of `sami-cache train` or `finetune classification`; a file of `sami-cache export`, or any file with the
    weights of a timm ViT that has a student's width; `timm:NAME`, timm's own pretrained weights of that model, from the hub or
    its cache. Raises SamiCacheError where it is not there or cannot be read.
    """
    if init is None:
        return None
    if str(init).startswith(TIMM):
        return _from_timm(str(init).removeprefix(TIMM))
    path = Path(init)
    if (path / "config.json").exists() and (path / "checkpoints").exists():
        checkpoint = load_newest(path / "checkpoints")
        if checkpoint is None:
            return None
        config = checkpoint.config
        student = config.get("classification", {}).get("student") or ("decoder" in config and config.get("student"))
        if not student:
            return None
        own = {name[8:]: value for name, value in checkpoint.model.items() if name.startswith("encoder.")}
        return Start(student=student, state=_without_head(own), source=f"{path}, step {checkpoint.step}")
    state = _without_head(read_state(path))
    width = state["cls_token"].shape[-1] if "cls_token" in state and "blocks.0.norm1.weight" in state else None
    student = WIDTHS.get(width or 0)
    return None if student is None else Start(student=student, state=state, source=str(path))


def start_encoder(
    init: str | Path | None, student: str | None, *, image_size: int = 224, drop_path: float = 0.0, **overrides: Any
) -> tuple[VisionTransformer, str, str]:
    """An encoder for `image_size` pixels with the weights of `init`: (encoder, student's name, where its weights are from).

    Position embeddings of another grid are resampled (bicubic, antialiased). Without `init`, `student` (default vit_t) is
    initialised from torch's global generator; with it, `student` must agree or be None.

    Args:
        student: a name in `STUDENTS`, or one of timm's plain ViTs.
        overrides: to timm, for other shapes than the student's own: patch_size, embed_dim, depth, num_heads.

    Raises SamiCacheError for what does not fit together.
    """
    start = open_start(init)
    if init is not None and start is None:
        raise SamiCacheError(
            f"--init {init}: no encoder is there. Expected a run of `sami-cache train`, a file of `sami-cache export`, a plain "
            f"ViT's weights, or {TIMM}NAME"
        )
    if start and student and student != start.student and STUDENTS.get(student) != start.student:
        raise SamiCacheError(f"--student {student}: {start.source} is a {start.student}")
    name = start.student if start else student or "vit_t"
    options: dict[str, Any] = {"img_size": image_size, "drop_path_rate": drop_path, **overrides}
    encoder = create_encoder(name, **options) if name in STUDENTS else _timm_vit(name, num_classes=0, **options)
    if start is None:
        return encoder, name, "scratch"
    state = dict(start.state)
    if "pos_embed" in state and encoder.pos_embed is not None and state["pos_embed"].shape != encoder.pos_embed.shape:
        grid = cast(tuple[int, int], encoder.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(grid), num_prefix_tokens=encoder.num_prefix_tokens)
    load_strictly(encoder, state, start.source)
    return encoder, name, start.source


def start_constants(init: str | Path | None) -> tuple[RGB, RGB]:
    """Mean and standard deviation, of R, G, B in 0..1, of the pixels that these weights have seen.

    timm's weights have their own, a run of `finetune classification` those that it started with; all others ImageNet's.
    """
    if init is None:
        return IMAGENET_MEAN, IMAGENET_STD
    if str(init).startswith(TIMM):
        config = timm.get_pretrained_cfg(str(init).removeprefix(TIMM))
        return (IMAGENET_MEAN, IMAGENET_STD) if config is None else (_rgb(config.mean), _rgb(config.std))
    settings = Path(init) / "config.json"
    own = json.loads(settings.read_text())["config"].get("classification") if settings.exists() else None
    return (_rgb(own["mean"]), _rgb(own["std"])) if own else (IMAGENET_MEAN, IMAGENET_STD)


def _rgb(values: Any) -> RGB:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _without_head(state: State) -> State:
    """A classifier's weights as an encoder's: what normalised the mean of its tokens becomes the norm of each."""
    return {name.replace("fc_norm.", "norm."): value for name, value in state.items() if not name.startswith("head.")}


def _from_timm(name: str) -> Start:
    try:
        model = _timm_vit(name, pretrained=True, num_classes=0)
    except SamiCacheError:
        raise
    except Exception as error:  # whatever a hub without a network comes up with
        raise SamiCacheError(
            f"--init {TIMM}{name}: timm's weights cannot be had ({type(error).__name__}: {str(error)[:200]}). They come from "
            "the Hugging Face hub: look at the name (timm.list_pretrained()) and at the network"
        ) from error
    base = name.partition(".")[0]
    student = next((own for own, timms in STUDENTS.items() if timms == base), base)
    return Start(student=student, state=model.state_dict(), source=f"{TIMM}{name}")


def _timm_vit(name: str, **options: Any) -> VisionTransformer:
    if not timm.is_model(name):
        raise SamiCacheError(f"there is no student {name!r}: expected {', '.join(STUDENTS)}, or one of timm's plain ViTs")
    with torch.random.fork_rng(devices=[], enabled=bool(options.get("pretrained"))):
        model = timm.create_model(name, **options)
    if not isinstance(model, VisionTransformer):
        raise SamiCacheError(f"{name} is a {type(model).__name__}: expected a plain ViT, timm's VisionTransformer")
    return model
