"""A promptable model as two ONNX graphs, under the names that the official export of EfficientSAM has.

Encoder: `batched_images` -> `image_embeddings`. Decoder: `image_embeddings`, `batched_point_coords`, `batched_point_labels`,
`orig_im_size` -> `output_masks`, `iou_predictions`, and `low_res_masks`, which the official one gives without a name.

Pictures come as they are, any size, and prompts in their pixels: resizing, padding and normalising is part of the graphs.
Traced by torch's TorchScript exporter: torch.export has to know sizes that here are values of an input.
"""

import copy
import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor

from sami_cache.errors import SamiCacheError
from sami_cache.models.segment_anything import EFFICIENTSAM_POINTS, PIXEL_MEAN, PIXEL_STD, SAM_ENCODERS, SegmentAnything

OPSET = 18
"""The first one whose Resize can antialias."""
ENCODER_INPUTS, ENCODER_OUTPUTS = ("batched_images",), ("image_embeddings",)
DECODER_INPUTS = ("image_embeddings", "batched_point_coords", "batched_point_labels", "orig_im_size")
DECODER_OUTPUTS = ("output_masks", "iou_predictions", "low_res_masks")
_LARGEST = 2**31 - 1
"""Bytes of one ONNX file: protobuf's limit."""


def require_onnx() -> None:
    """Raise SamiCacheError with the command that mends it where a package of the extra `onnx` is missing."""
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise SamiCacheError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'sami-cache[onnx]'")


def export_encoder(model: SegmentAnything) -> bytes:
    """`batched_images`, float32 [B, 3, H, W], RGB in 0..1 -> `image_embeddings`, float32 [B, 256, S / 16, S / 16].

    Family sam: as `SegmentAnything.preprocess`, the pixels Pillow's but for single ones that are off by one of 255. Its weights
    must be on the CPU. Raises SamiCacheError where they are more than one ONNX file can hold, or a package is missing.
    """
    require_onnx()
    count = 4 * sum(parameter.numel() for parameter in model.image_encoder.parameters())
    if count > _LARGEST:
        raise SamiCacheError(
            f"the encoder {model.config.encoder} has {count / 1e9:.1f} GB of weights: one ONNX file holds 2.1 GB. "
            "Export a smaller one."
        )
    image = torch.rand(1, 3, 120, 160)
    axes = {"batched_images": {0: "batch", 2: "height", 3: "width"}, "image_embeddings": {0: "batch"}}
    return _export(EncoderGraph(model), (image,), ENCODER_INPUTS, ENCODER_OUTPUTS, axes)


def export_decoder(model: SegmentAnything, *, single_mask: bool = False) -> bytes:
    """Prompts and embeddings -> the three masks of each query, best predicted IoU first; or token 0's alone.

    Inputs:
        image_embeddings: float32 [B, 256, S / 16, S / 16].
        batched_point_coords: float32 [B, Q, P, 2], (x, y) in pixels of the picture.
        batched_point_labels: float32 [B, Q, P]: 1 in, 0 out, 2 and 3 a box's corners, -1 no point.
        orig_im_size: int64 [2], the height and width of all B pictures.

    Outputs, M = 3, or 1 with `single_mask`:
        output_masks: float32 [B, Q, M, height, width], above 0: inside.
        iou_predictions: float32 [B, Q, M].
        low_res_masks: float32 [B, Q, M, S / 4, S / 4].

    Family efficientsam pads or cuts a query to six points. Family sam adds one that is none where no label is a box's, as
    `SegmentAnything.complete_prompts` does. The weights must be on the CPU.
    """
    require_onnx()
    grid = model.config.image_size // 16
    prompts = torch.tensor([[[[30.0, 20.0], [50.0, 60.0]]] * 2]), torch.tensor([[[1.0, 0.0]] * 2])
    inputs = torch.rand(1, 256, grid, grid), *prompts, torch.tensor([120, 160])
    query = {0: "batch", 1: "queries"}
    axes = {
        "image_embeddings": {0: "batch"},
        "batched_point_coords": query | {2: "points"},
        "batched_point_labels": query | {2: "points"},
        "output_masks": query | {3: "height", 4: "width"},
        "iou_predictions": query,
        "low_res_masks": query,
    }
    return _export(DecoderGraph(model, single_mask=single_mask), inputs, DECODER_INPUTS, DECODER_OUTPUTS, axes)


class EncoderGraph(nn.Module):
    """What `export_encoder` traces."""

    def __init__(self, model: SegmentAnything) -> None:
        super().__init__()
        self.family, self.size = model.config.family, model.config.image_size
        self.image_encoder: Any = copy.deepcopy(model.image_encoder).eval()
        self.is_sam = model.config.encoder in SAM_ENCODERS
        if self.is_sam:
            for block in self.image_encoder.blocks:
                block.attn.fused_attn = False  # its bias has no symbolic form in the fused one
        else:
            # Sizes are values in a trace: left to itself, the graph would resize this constant on every call.
            positions = self.image_encoder.positions(self.size // 16).detach()
            self.image_encoder.positions = lambda grid: positions

    def forward(self, batched_images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        size = self.size
        if self.family == "efficientsam":
            pixels = F.interpolate(batched_images, (size, size), mode="bilinear", align_corners=False)
            pixels = (pixels - mean / 255) / (std / 255)
        else:
            shape = shape_as_tensor(batched_images)
            covered = _covered(shape[2:], size)
            # As Pillow does it: whole values of 255, along the rows first, whole values again.
            pixels = _whole(batched_images * 255)
            pixels = _whole(_Antialiased.apply(pixels, torch.cat([shape[:3], covered[1:]])))
            pixels = _whole(_Antialiased.apply(pixels, torch.cat([shape[:2], covered])))
            pixels = F.pad((pixels - mean) / std, (0, size, 0, size))[:, :, :size, :size]
        return self.image_encoder.forward_features(pixels) if self.is_sam else self.image_encoder(pixels)


class DecoderGraph(nn.Module):
    """What `export_decoder` traces."""

    def __init__(self, model: SegmentAnything, *, single_mask: bool) -> None:
        super().__init__()
        self.model, self.single_mask = model, single_mask
        self.family, self.size = model.config.family, model.config.image_size

    def forward(self, embeddings: Tensor, points: Tensor, labels: Tensor, orig_im_size: Tensor) -> tuple[Tensor, ...]:
        covered = _covered(orig_im_size, self.size) if self.family == "sam" else torch.tensor([self.size, self.size])
        points = points * (covered.double() / orig_im_size.double()).flip(0).float()
        masks = self.model.decode(embeddings, *self._complete(points, labels))
        low_res, iou = masks.single if self.single_mask else masks.three
        if not self.single_mask:
            iou, order = iou.topk(3, dim=-1)
            low_res = low_res.gather(2, order[..., None, None].expand_as(low_res))
        pictures = self._to_picture(low_res.flatten(0, 1), covered, orig_im_size)
        # By the input's shape: the exporter takes that of `low_res` for a constant.
        return pictures.unflatten(0, (labels.shape[0], labels.shape[1])), iou, low_res

    def _complete(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # Always more than enough, then cut: a trace has no branches.
        if self.family == "efficientsam":
            points = torch.where(points < 0, -1.0, points)  # as published: what is left of or above the picture is at -1
            missing, count = EFFICIENTSAM_POINTS, torch.tensor(EFFICIENTSAM_POINTS)
        else:
            missing, count = 1, shape_as_tensor(labels)[2] + 1 - (labels >= 2).any().long()
        points, labels = F.pad(points, (0, 0, 0, missing), value=-1.0), F.pad(labels, (0, missing), value=-1.0)
        return points[:, :, :count], labels[:, :, :count]

    def _to_picture(self, low_res: Tensor, covered: Tensor, orig_im_size: Tensor) -> Tensor:
        height, width = orig_im_size[0], orig_im_size[1]
        if self.family == "efficientsam":
            # onnxruntime's own cubic Resize takes 0.4 s for three masks of 1080 x 1920, these products 0.03 s.
            side = self.size // 4
            return _cubic_weights(side, height) @ low_res @ _cubic_weights(side, width).T
        square = F.interpolate(low_res, (self.size, self.size), mode="bilinear", align_corners=False)
        cut = square[:, :, : covered[0], : covered[1]]
        return F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)  # type: ignore[arg-type]


class _Antialiased(torch.autograd.Function):
    """Resize as Pillow does: bilinear, antialiased where it shrinks. `shape` int64 [4] is that of the result."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, shape: Tensor) -> Tensor:
        return F.interpolate(pixels, tuple(shape.tolist()[2:]), mode="bilinear", antialias=True)

    @staticmethod
    def symbolic(g: Any, pixels: Any, shape: Any) -> Any:
        none = g.op("prim::Constant")  # an input left out
        none.setType(torch._C.OptionalType.ofTensor())
        # Without `exclude_outside` the outermost pixels are counted more than once.
        how = {"mode_s": "linear", "antialias_i": 1, "exclude_outside_i": 1, "coordinate_transformation_mode_s": "half_pixel"}
        return g.op("Resize", pixels, none, none, shape, **how)


def _whole(values: Tensor) -> Tensor:
    return torch.floor(values + 0.5)


def _covered(size: Tensor, side: int) -> Tensor:
    """`SegmentAnything.covered` for family sam, of int64 [2]: in float64, as Python calculates it."""
    return torch.floor(size.double() * (side / size.max().double()) + 0.5).long()


def _cubic_weights(before: int, after: Tensor) -> Tensor:
    """float32 [after, before]: what each cell weighs in each pixel of torch's bicubic resizing. `after`: int64 []."""
    place = (torch.arange(after).double() + 0.5) * (before / after.double()) - 0.5  # type: ignore[arg-type]
    first = torch.floor(place) - 1
    cells = torch.arange(before)
    weights = torch.zeros(1, 1)
    for tap in range(4):
        cell = first + tap
        far = (place - cell).abs()
        near = (1.25 * far - 2.25) * far * far + 1
        beyond = -0.75 * (((far - 5) * far + 8) * far - 4)
        weight = torch.where(far <= 1, near, beyond).float()
        # Beyond the edge the outermost cell counts again.
        weights = weights + weight[:, None] * (cell.clamp(0, before - 1).long()[:, None] == cells)
    return weights


def _export(graph: nn.Module, inputs: tuple, names: Sequence[str], outputs: Sequence[str], axes: dict) -> bytes:
    sink: Any = io.BytesIO()  # some versions of torch declare no more than paths
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the trace's constants, which the tests compare with torch's own answers
        torch.onnx.export(
            graph.eval(),
            inputs,
            sink,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes=axes,
        )
    return sink.getvalue()
