"""Mask R-CNN on ViTDet's pyramid (arXiv 1703.06870, 2203.16527), of torchvision's parts."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from sami_cache.models.pyramid import SimpleFeaturePyramid

LEVELS = ("p2", "p3", "p4", "p5")
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
MASK_SIDE = 28
"""Of a mask before it is brought to its box."""


class Targets(NamedTuple):
    """The objects of one picture, N of them, perhaps none."""

    boxes: Tensor  # float32 [N, 4], x0 y0 x1 y1 in pixels of the input
    labels: Tensor  # int64 [N], from 1; 0 is the background
    masks: Tensor  # uint8 [N, S, S]


class Detections(NamedTuple):
    """What is found in one picture, the surest first."""

    boxes: Tensor  # float32 [N, 4], x0 y0 x1 y1 in pixels of the input
    labels: Tensor  # int64 [N], from 1
    scores: Tensor  # float32 [N]
    masks: Tensor  # float32 [N, 1, 28, 28], 0..1 within the box


class Detector(nn.Module):
    """ViTDet's Mask R-CNN: two convolutions in the RPN, four convolutions and a linear layer for boxes, four for masks.

    Norms are LayerNorms, as in ViTDet. Losses are taken picture by picture and averaged: torchvision's own average over all
    that was sampled in a batch would weigh a picture by whom it shares the batch with.
    """

    def __init__(
        self, backbone: SimpleFeaturePyramid, classes: int, *, image_size: int, detections: int = 100, regions: int = 512
    ) -> None:
        """Heads are as wide as the pyramid.

        Args:
            classes: without the background.
            detections: at most so many are found in a picture.
            regions: so many of the proposed ones the heads learn from in a picture.
        """
        super().__init__()
        self.backbone, self.classes, self.image_size = backbone, classes, image_size
        width = backbone.out_channels
        sizes = tuple((side,) for side in (32, 64, 128, 256, 512))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        norm = cast(Any, LayerNorm2d)
        box_head = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm_layer=norm)
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(list(LEVELS), 7, 2),
            box_head,
            FastRCNNPredictor(4 * width, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=detections,
            mask_roi_pool=MultiScaleRoIAlign(list(LEVELS), 14, 2),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        )

    def forward(
        self, pixels: Tensor, targets: Sequence[Targets] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses by name with targets, else what is found in each picture.

        Args:
            pixels: normalised float [B, 3, S, S].
            targets: of each picture.
            seeds: of what is sampled in each picture for its losses, so that it depends on nothing else; with `targets`.
        """
        features = OrderedDict((name, level.float()) for name, level in self.backbone(pixels).items())
        found, losses = [], []
        with torch.autocast(pixels.device.type, enabled=False):
            features["pool"] = torch.nn.functional.max_pool2d(features["p5"], 1, 2)
            for number in range(len(pixels)):
                own = OrderedDict((name, level[number : number + 1]) for name, level in features.items())
                image = ImageList(pixels[number : number + 1], [(self.image_size, self.image_size)])
                truth = None
                if targets is not None and seeds is not None:
                    truth = [targets[number]._asdict()]
                    torch.manual_seed(seeds[number])
                proposals, rpn_losses = self.rpn(image, own, truth)
                results, roi_losses = self.roi_heads(own, proposals, image.image_sizes, truth)
                found += [Detections(one["boxes"], one["labels"], one["scores"], one["masks"]) for one in results]
                losses.append({**rpn_losses, **roi_losses})
        if targets is None:
            return found
        return {name: torch.stack([one[name] for one in losses]).mean() for name in LOSSES}
