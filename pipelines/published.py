"""What others published on prompted segmentation, to be printed beside our numbers and never among them.

All from arXiv 2312.00863, which measured the other methods itself or quotes them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """One table of the paper, with what its numbers are under."""

    title: str
    protocol: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, tuple[float, ...]]]
    """Method, data set, numbers in the order of `columns`, percent."""


PUBLISHED_MIOU = PublishedTable(
    title="zero-shot mIoU",
    protocol="points uniform in the mask, tight boxes, the most confident mask; seed and crowd not stated",
    columns=("box", "1", "3"),
    rows={
        "SAM": {"COCO": (78.4, 55.6, 74.1), "LVIS": (78.9, 59.8, 75.2)},
        "MobileSAM": {"COCO": (74.2, 43.7, 59.7), "LVIS": (73.8, 51.0, 54.4)},
        "SAM-MAE-Ti": {"COCO": (74.7, 43.3, 65.8), "LVIS": (73.8, 50.6, 65.3)},
        "EfficientSAM-Ti": {"COCO": (75.7, 45.5, 67.2), "LVIS": (74.3, 52.7, 66.8)},
        "EfficientSAM-S": {"COCO": (76.9, 50.0, 69.8), "LVIS": (75.4, 56.2, 68.7)},
    },
)
PUBLISHED_AP = PublishedTable(
    title="zero-shot instance segmentation AP",
    protocol=(
        "ViTDet-H's boxes; maxDets 100 (COCO), 300 (LVIS). EfficientSAM's rows: the mask of the highest IoU with the box; how "
        "the other methods' mask was chosen is not stated"
    ),
    columns=("AP", "APs", "APm", "APl"),
    rows={
        "SAM": {"COCO": (46.5, 30.8, 51.0, 61.7), "LVIS": (44.7, 32.5, 57.6, 65.5)},
        "MobileSAM": {"COCO": (38.7, 23.7, 42.2, 54.3), "LVIS": (34.4, 23.8, 44.9, 53.7)},
        "FastSAM": {"COCO": (37.9, 23.9, 43.4, 50.0), "LVIS": (34.5, 24.6, 46.2, 50.8)},
        "EfficientSAM-Ti": {"COCO": (42.3, 26.7, 46.2, 57.4), "LVIS": (39.9, 28.9, 51.0, 59.9)},
        "EfficientSAM-S": {"COCO": (44.4, 28.4, 48.3, 60.1), "LVIS": (42.3, 30.8, 54.0, 62.3)},
    },
)
