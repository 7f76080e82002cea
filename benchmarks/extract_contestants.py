"""SAM's image encoder as others have it and as it is here, all with the same weights: what benchmarks/extract.py has race."""

import copy
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed_nhwc
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.encoding import Encoder
from sami_cache.models.fast_attention import use_attention
from sami_cache.models.teachers import Teacher, load_teacher

Run = Callable[[], Tensor]
TIMM = {"vit_h": "samvit_huge_patch16", "vit_l": "samvit_large_patch16", "vit_b": "samvit_base_patch16"}


class NotHereError(Exception):
    """A contestant cannot run here; the text says why."""


@dataclass(kw_only=True)
class Contestant:
    """`make()(pixels)`: of uint8 [B, S, S, 3] on the device -> a function that computes this batch's maps, [B, 256, h, w]."""

    name: str
    make: Callable[[], Callable[[Tensor], Run]]
    """Builds the model on the device; NotHereError where that is impossible."""
    batch_of: str | None = None
    """The contestant whose batch size this one gets; None: it has its own measured."""


def drawn_teacher(name: str, size: int) -> Teacher:
    """Random weights in the official layout; positions are drawn too, because timm's zeros would hide errors."""
    teacher = load_teacher(name, weights="random", image_size=size)
    torch.manual_seed(0)
    for key, parameter in teacher.encoder.named_parameters():
        if "rel_pos" in key or "pos_embed" in key:
            nn.init.normal_(parameter, std=0.1 if "rel_pos" in key else 0.02)
    return teacher


def official_state(teacher: Teacher, size: int) -> dict[str, Tensor]:
    """The encoder's weights under Meta's names, its position embedding resized to pictures of `size`, as timm does it."""
    state = {
        key.replace("mlp.fc1", "mlp.lin1").replace("mlp.fc2", "mlp.lin2"): value
        for key, value in teacher.encoder.state_dict().items()
    }
    state["pos_embed"] = resample_abs_pos_embed_nhwc(state["pos_embed"], (size // 16, size // 16))
    return state


def load_official(encoder: Any, state: dict[str, Tensor]) -> None:
    """Into an image encoder of segment-anything, whose position embedding takes the size of the state's."""
    inner = getattr(encoder, "_orig_mod", encoder)  # beneath torch.compile
    inner.pos_embed = nn.Parameter(state["pos_embed"].to(inner.pos_embed), requires_grad=False)
    inner.load_state_dict(state)


def contestants(
    name: str, size: int, device: torch.device, precision: str, ways: list[str], modes: list[str | None]
) -> list[Contestant]:
    """Everybody, for SAM's encoder `name` and pictures of `size` pixels. `modes`: of torch.compile for ours, None for none."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    teacher = drawn_teacher(name, size)

    def bound(model: nn.Module, *, autocast: bool = False) -> Callable[[Tensor], Run]:
        model.to(device).eval().requires_grad_(False)
        teacher.to(device)

        def bind(pixels: Tensor) -> Run:
            given = teacher.normalise(pixels.permute(0, 3, 1, 2).contiguous()).to(torch.float32 if autocast else dtype)

            def run() -> Tensor:
                with torch.autocast(device.type, dtype, enabled=autocast):
                    return model(given)

            return run

        return bind

    def plain(*, autocast: bool) -> Callable[[Tensor], Run]:
        model: Any = timm.create_model(TIMM[name])
        model.load_state_dict(teacher.encoder.state_dict())
        model.forward = model.forward_features
        return bound(model if autocast else model.to(dtype), autocast=autocast)

    def official() -> Callable[[Tensor], Run]:
        from segment_anything import sam_model_registry

        encoder = sam_model_registry[name]().image_encoder
        load_official(encoder, official_state(teacher, size))
        return bound(encoder.to(dtype))

    def fast() -> Callable[[Tensor], Run]:
        return bound(segment_anything_fast(name, official_state(teacher, size), device))

    def ours(way: str, mode: str | None) -> Callable[[Tensor], Run]:
        own = copy.deepcopy(teacher)
        use_attention(own.encoder, way)
        encoder = Encoder(own, grid=size // 16, precision=precision, device=device, compiled=mode)

        def bind(pixels: Tensor) -> Run:
            sizes = torch.full((len(pixels), 2), size, dtype=torch.int32, device=device)
            return lambda: encoder.maps(pixels, sizes)

        return bind

    casts = [("timm", False), ("timm, autocast", True)] if dtype != torch.float32 else [("timm", False)]
    found = [Contestant(name=label, make=partial(plain, autocast=autocast)) for label, autocast in casts]
    found.append(Contestant(name="segment-anything", make=official))
    for way in ways:
        label = f"ours, {way}"
        for mode in modes:
            if mode is None:
                found.append(Contestant(name=label, make=partial(ours, way, None)))
            elif not (way == "flex" and device.type == "cpu"):  # which torch cannot compile
                found.append(Contestant(name=f"{label}, compiled ({mode})", make=partial(ours, way, mode), batch_of=label))
    return [*found, Contestant(name="segment-anything-fast", make=fast, batch_of=f"ours, {ways[-1]}")]


def segment_anything_fast(name: str, state: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Its image encoder as it builds it: bfloat16, compiled with max-autotune, its own Triton kernel in the global blocks."""
    try:
        from segment_anything_fast import sam_model_fast_registry  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise NotHereError(
            f"{error}. It is in https://github.com/pytorch-labs/segment-anything-fast alone: PyPI's segment-anything-fast "
            f"{_pypi_version()}is FastSAM, another model"
        ) from error
    if device.type != "cuda":
        raise NotHereError("its kernels are for CUDA")
    encoder = sam_model_fast_registry[name]().image_encoder
    load_official(encoder, state)
    return encoder


def _pypi_version() -> str:
    try:
        return f"(here: {importlib.metadata.version('segment-anything-fast')}) "
    except importlib.metadata.PackageNotFoundError:
        return "(0.1.2) "


def exact(name: str, size: int, device: torch.device, pixels: Tensor) -> Tensor:
    """The maps by timm's plain model in float32, TF32 off: what all are compared with."""
    teacher = drawn_teacher(name, size)
    encoder = Encoder(teacher, grid=size // 16, precision="float32", device=device)
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = torch.full((1, 2), size, dtype=torch.int32, device=device)
    with torch.inference_mode():
        maps = torch.cat([encoder.maps(one[None], sizes) for one in pixels])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    return maps


def model_flops(name: str, size: int) -> float:
    """Of one picture: matrix products and convolutions of timm's model, a multiplication and an addition being two."""
    with torch.device("meta"):
        model: Any = timm.create_model(TIMM[name])
        pixels = torch.zeros(1, 3, size, size)
    for block in model.blocks:
        block.attn.fused_attn = False  # plain products, which the counter knows on every device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward_features(pixels)
    return float(counter.get_total_flops())
