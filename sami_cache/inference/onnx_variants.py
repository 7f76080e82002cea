"""Smaller encoders made from an ONNX encoder, and what the difference does to masks."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sami_cache.inference.onnx_export import require_onnx
from sami_cache.mask_losses import mask_iou
from sami_cache.models.segment_anything import SegmentAnything

CLICKS = 4
"""Rows, and columns, of the clicks that masks are compared by."""


class Agreement(NamedTuple):
    """IoU of the masks that two encoders lead to, same decoder, same prompts."""

    mean: float
    lowest: float
    masks: int


def half_precision(encoder: bytes) -> bytes:
    """The encoder with weights and arithmetic in float16. Its input and output stay float32, and so does the resizing."""
    require_onnx()
    import onnx
    from onnx import compose
    from onnx.utils import Extractor
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # Cut where patches are made: between nodes that it is told to leave alone, the converter still rounds to float16.
    model: Any = onnx.load_from_string(encoder)
    (images,), (embeddings,) = ([put.name for put in puts] for puts in (model.graph.input, model.graph.output))
    pixels = next(node.input[0] for node in model.graph.node if node.op_type == "Conv")
    shape = ["batch", 3, None, None]
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(pixels, onnx.TensorProto.FLOAT, shape))
    cut = Extractor(model)
    before, after = cut.extract_model([images], [pixels]), cut.extract_model([pixels], [embeddings])
    half = convert_float_to_float16(after, keep_io_types=True)
    OnnxModel(half).topological_sort()  # the converter puts its own nodes last
    # Both have copies of some constants, and names are to be unique.
    whole = compose.merge_models(before, half, io_map=[(pixels, pixels)], prefix1="pixels/")
    for node in whole.graph.node:
        node.input[:] = [images if name == f"pixels/{images}" else name for name in node.input]
    whole.graph.input[0].name = images
    return whole.SerializeToString()


def eight_bits(encoder: bytes) -> bytes:
    """The encoder with int8 weights in its linear layers, a scale a channel, and their inputs as uint8, scaled as they come.

    Needs no pictures to calibrate with. Attention, norms and convolutions stay float32.
    """
    require_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "result"))
        source.write_bytes(encoder)
        quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(prepared, result, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
        return result.read_bytes()


def agreement(
    model: SegmentAnything, embeddings: list[Tensor], others: list[Tensor], sizes: list[tuple[int, int]]
) -> Agreement:
    """Compare the masks of two encoders on the same pictures: 4 x 4 single clicks on each, its best mask by predicted IoU.

    Args:
        embeddings, others: float32 [1, 256, S / 16, S / 16], one a picture.
        sizes: height and width of each picture, pixels.

    Masks are compared at the decoder's resolution, without padding; two that are both empty agree.
    """
    found = [
        iou
        for one, other, size in zip(embeddings, others, sizes, strict=True)
        for iou in mask_iou(*(clicked(model, embedding, *size) for embedding in (one, other))).tolist()
    ]
    return Agreement(float(np.mean(found)), min(found), len(found))


@torch.inference_mode()
def clicked(model: SegmentAnything, embedding: Tensor, height: int, width: int) -> Tensor:
    """bool [16, h, w]: for each click of a 4 x 4 grid the mask of the highest predicted IoU."""
    places = (torch.arange(CLICKS) + 0.5) / CLICKS
    rows, columns = torch.meshgrid(places * height, places * width, indexing="ij")
    points = model.to_input(torch.stack([columns, rows], dim=-1).reshape(1, -1, 1, 2), height, width)
    logits, iou = model.decode(embedding, *model.complete_prompts(points, torch.ones(1, CLICKS**2, 1, dtype=torch.long))).three
    best = logits[0, torch.arange(CLICKS**2), iou[0].argmax(dim=-1)]
    covered = (-(-side // 4) for side in model.covered(height, width))
    return best[:, : next(covered), : next(covered)] > 0
