"""Weights of whole promptable models: Meta's, Hugging Face's and EfficientSAM's files, and those of our own runs."""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from sami_cache.errors import SamiCacheError
from sami_cache.models.segment_anything import ENCODERS, SAM_ENCODERS, SegmentAnything, SegmentAnythingConfig
from sami_cache.models.weights import State, load_strictly, read_state, sam_encoder_state

# transformers' `SamModel` against segment-anything. Order matters: the heads' `layers.0` comes after `proj_in`.
_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_HUGGING_FACE = [
    (r"^shared_image_embedding\.positional_embedding$", _POSITIONS),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$", _POSITIONS),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d))\.proj_out\.", r"\1.layers.2."),
]
_DECODER_PARTS = ("prompt_encoder.", "mask_decoder.")


def load_segment_anything(path: str | Path, *, image_size: int | None = None) -> SegmentAnything:
    """A whole model from a file or folder, on the CPU, in evaluation mode.

    Official EfficientSAM (`{"model": ...}`), Meta's SAM, Hugging Face's `SamModel`, or what `save_segment_anything` wrote;
    which of them is read off the names and shapes. `image_size` is for others' students at another resolution than 1024, which
    their weights do not tell. Raises SamiCacheError where it is none of these or does not fit.
    """
    state = segment_anything_state(read_state(Path(path)))
    config = config_of(state, str(path))
    if image_size is None:
        image_size = _saved_image_size(Path(path))
    model = SegmentAnything(config if image_size is None else replace(config, image_size=image_size))
    load_strictly(model, state, str(path))
    return model.eval()


def load_decoder(model: SegmentAnything, path: str | Path) -> None:
    """Take prompt encoder and mask decoder alone from a file as `load_segment_anything` reads it: SAM's for a student."""
    state = segment_anything_state(read_state(Path(path)))
    if config_of(state, str(path)).family != model.config.family:
        raise SamiCacheError(
            f"weights: {path} is not of family {model.config.family}: choose the decoder's family with --family."
        )
    for part in _DECODER_PARTS:
        own = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        load_strictly(model.get_submodule(part.removesuffix(".")), own, f"{path}, {part.removesuffix('.')}")


def load_student(model: SegmentAnything, state: State, source: str) -> None:
    """Take blocks, patches and positions from a pretrained student (timm's names); its class token and norms have no place."""
    encoder = model.image_encoder
    wanted = [name for name in encoder.state_dict() if not name.startswith("neck.")]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise SamiCacheError(f"weights: {source} is no {model.config.encoder}: it has no {', '.join(missing[:4])}")
    neck = {name: value for name, value in encoder.state_dict().items() if name.startswith("neck.")}
    load_strictly(encoder, {name: state[name] for name in wanted} | neck, source)


def save_segment_anything(model: SegmentAnything, path: Path | IO[bytes]) -> None:
    """Write all weights as `{"model": ..., "image_size": S}` by `torch.save`, float32: family efficientsam's official layout.

    A student under SAM's decoder has the same names for its encoder and Meta's for the rest. Official loaders take "model";
    the size is for ours, since no weight of a student tells it.
    """
    state = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in model.state_dict().items()}
    if model.config.encoder in SAM_ENCODERS:  # back to Meta's
        state = {re.sub(r"^(image_encoder\..*\.mlp)\.fc", r"\1.lin", name): value for name, value in state.items()}
    torch.save({"model": state, "image_size": model.config.image_size}, path)


def _saved_image_size(path: Path) -> int | None:
    """What `save_segment_anything` put beside the weights; of files of others None. The file has been read, so it is sound."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    size = content.get("image_size") if isinstance(content, Mapping) else None
    return size if isinstance(size, int) else None


def segment_anything_state(state: State) -> State:
    """A whole model's tensors under the names of `SegmentAnything`."""
    renamed: dict[str, Tensor] = {}
    encoder = {name: value for name, value in state.items() if name.startswith(("image_encoder.", "vision_encoder."))}
    rest = {name: value for name, value in state.items() if name not in encoder}
    for name, value in rest.items():
        new = name
        for pattern, replacement in _HUGGING_FACE if "mask_decoder.upscale_conv1.weight" in state else ():
            new = re.sub(pattern, replacement, new)
        renamed[new] = value
    return {f"image_encoder.{name}": value for name, value in (sam_encoder_state(encoder) if encoder else {}).items()} | renamed


def config_of(state: State, source: str) -> SegmentAnythingConfig:
    """What model a state under the names of `SegmentAnything` is of. Raises SamiCacheError where it is of none."""
    positions = state.get("image_encoder.pos_embed")
    official = "mask_decoder.final_output_upscaling_layers.0.0.weight" in state
    if positions is None or not (official or "mask_decoder.output_upscaling.0.weight" in state):
        raise SamiCacheError(
            f"weights: {source} holds no whole promptable model: expected EfficientSAM's 278 tensors, Meta's SAM or Hugging "
            f"Face's, found {', '.join(list(state)[:3]) or 'nothing'}."
        )
    width = positions.shape[-1]
    depth = len({name.split(".")[2] for name in state if name.startswith("image_encoder.blocks.")})
    if positions.ndim == 4:
        encoder = {768: "sam_vit_b", 1024: "sam_vit_l", 1280: "sam_vit_h"}.get(width)
    else:
        encoder = {dims[0]: name for name, dims in ENCODERS.items()}.get(width)
    if encoder is None:
        raise SamiCacheError(f"weights: {source} has an encoder of width {width}, which is none of ours or SAM's.")
    size = 16 * positions.shape[1] if positions.ndim == 4 else 1024
    family = "efficientsam" if official else "sam"
    return SegmentAnythingConfig(
        family=family, encoder=encoder, image_size=size, depth=12 if encoder in SAM_ENCODERS else depth
    )
