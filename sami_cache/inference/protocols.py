"""Evaluation protocols of promptable segmentation: which prompts an object gets, and which of the masks counts.

Papers differ in all of it and print the same "mIoU", so a protocol has a name, and what it means goes with every number.
Points are pixels (x, y) as `SegmentAnything.to_input` takes them; boxes are x0, y0, x1, y1 between pixels: a picture of W x H
is (0, 0, W, H). Masks are bool [H, W].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import numpy as np
from scipy import ndimage

from sami_cache.errors import SamiCacheError
from sami_cache.prompts import tight_box

MaskRule = Literal["confident", "box", "tight-box", "single", "oracle"]
"""confident: of the three masks, the one of the highest predicted IoU. box: the one whose pixels have the highest IoU with the
prompt box's; tight-box: the one whose own tight box has. single: token 0's. oracle: the one of the highest IoU with the truth,
an upper bound that no user reaches."""
FirstPoint = Literal["uniform", "farthest"]
"""uniform: any pixel of the object, by the seed. farthest: the pixel that is farthest from the object's boundary."""
NextPoints = Literal["uniform", "error-farthest", "error-centre"]
"""uniform: further pixels of the object, all at once. error-farthest and error-centre: one at a time, in the largest connected
part that is wrong so far, missing or too much: its pixel farthest from the boundary, or nearest the part's centre of mass."""
Boxes = Literal["tight", "annotated"]
"""tight: around the object's pixels. annotated: as the data has it."""
MAX_CLICKS = 32


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How promptable models are measured. Recorded whole with every number."""

    name: str
    box_mask: MaskRule
    """Which mask counts where the prompt is an object's box."""
    click_mask: MaskRule
    """Where it is one click."""
    clicks_mask: MaskRule
    """Where it is several."""
    detection_mask: MaskRule
    """Where it is a detector's box, for AP."""
    first_point: FirstPoint
    next_points: NextPoints
    previous_mask: bool
    """Whether the mask so far is a prompt too from the second click on; only decoders of family sam take one."""
    boxes: Boxes = "tight"
    crowd: bool = False
    """Whether crowd annotations count in mIoU. AP treats them as COCO does, always."""
    seed: int = 0
    """Of uniform points; each object has a stream of its own, whatever the order and number of objects."""

    def __post_init__(self) -> None:
        for field, allowed in (
            ("box_mask", MaskRule),
            ("click_mask", MaskRule),
            ("clicks_mask", MaskRule),
            ("detection_mask", MaskRule),
            ("first_point", FirstPoint),
            ("next_points", NextPoints),
            ("boxes", Boxes),
        ):
            if getattr(self, field) not in get_args(allowed):
                raise SamiCacheError(f"{field} is {getattr(self, field)!r}: expected one of {', '.join(get_args(allowed))}")
        if self.detection_mask == "oracle":
            raise SamiCacheError("detection_mask is oracle: a detector's box has no truth of its own; take another rule.")
        for field in ("click_mask", "clicks_mask"):
            if getattr(self, field) in ("box", "tight-box"):
                raise SamiCacheError(f"{field} is {getattr(self, field)}: a click comes with no box; take another rule.")

    def mask_rule(self, prompt: str) -> MaskRule:
        """Which mask counts for the prompt `box`, or a number of clicks."""
        return self.box_mask if prompt == "box" else self.click_mask if prompt == "1" else self.clicks_mask

    def settings(self, prompt: str, only_mask: str | None = None) -> str:
        """What a number of mIoU is under, in words; `only_mask` of an answer that has one alone."""
        parts = [f"mask {only_mask or self.mask_rule(prompt)}"]
        if prompt == "box":
            parts.append(f"boxes {self.boxes}")
        else:
            parts.append(f"first point {self.first_point}")
            if prompt != "1":
                parts.append(f"next {self.next_points}")
                if self.next_points != "uniform":
                    parts.append(f"previous mask {'prompted' if self.previous_mask else 'not prompted'}")
            if "uniform" in (self.first_point, self.next_points if prompt != "1" else ""):
                parts.append(f"seed {self.seed}")
        return ", ".join([*parts, f"crowd {'kept' if self.crowd else 'dropped'}"])


_PROTOCOLS = [
    # arXiv 2312.00863: points uniform in the mask, the tightest box, the most confident mask; for AP the mask of the highest
    # IoU with the detector's box. Open there: the seed, crowds, and whether the mask's pixels or its own box have that IoU.
    Protocol(
        name="efficientsam",
        box_mask="confident",
        click_mask="confident",
        clicks_mask="confident",
        detection_mask="box",
        first_point="uniform",
        next_points="uniform",
        previous_mask=False,
    ),
    # arXiv 2304.02643: the object's centre by the distance transform, further points from the error
    # region; one mask alone from the second point on.
    Protocol(
        name="sam",
        box_mask="confident",
        click_mask="confident",
        clicks_mask="single",
        detection_mask="confident",
        first_point="farthest",
        next_points="error-farthest",
        previous_mask=True,
    ),
    # SAM's points, judged as SAM's ablations do: the best of the three, by the truth.
    Protocol(
        name="oracle",
        box_mask="oracle",
        click_mask="oracle",
        clicks_mask="oracle",
        detection_mask="confident",
        first_point="farthest",
        next_points="error-farthest",
        previous_mask=True,
    ),
    # The one mask of token 0, which is trained for prompts that leave no doubt.
    Protocol(
        name="single",
        box_mask="single",
        click_mask="single",
        clicks_mask="single",
        detection_mask="single",
        first_point="farthest",
        next_points="error-farthest",
        previous_mask=True,
    ),
    # The mask that fits the prompt box best, for boxes of objects too; clicks between the points of the two papers.
    Protocol(
        name="box-iou",
        box_mask="box",
        click_mask="confident",
        clicks_mask="confident",
        detection_mask="box",
        first_point="farthest",
        next_points="error-centre",
        previous_mask=False,
    ),
]
PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}


def find_protocol(name: str) -> Protocol:
    """Raises SamiCacheError for an unknown name."""
    if name not in PROTOCOLS:
        raise SamiCacheError(f"protocol {name!r} is unknown: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def change_protocol(protocol: Protocol, *, mask: str | None = None, **changes: object) -> Protocol:
    """A protocol with other settings, those that are not None, under a name that says which.

    `mask` is for every prompt that can have it: box rules for boxes alone, `oracle` for all but a detector's boxes.
    """
    given = {field: value for field, value in changes.items() if value is not None}
    made = replace(protocol, **given)  # type: ignore[arg-type]
    if mask is not None:
        given = {"mask": mask, **given}
        fields = ["box_mask", "detection_mask", "click_mask", "clicks_mask"]
        if mask in ("box", "tight-box"):
            fields = fields[:2]
        elif mask == "oracle":
            fields.remove("detection_mask")
        made = replace(made, **dict.fromkeys(fields, mask))  # type: ignore[arg-type]
    if not given:
        return protocol
    return replace(made, name=f"{protocol.name} with {', '.join(f'{field} {value}' for field, value in given.items())}")


def mask_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of two masks of one shape; 0 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 0.0


def box_to_mask(box: Sequence[float] | np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centre is inside `box`: bool [height, width]. A box may reach over the picture's edge."""
    x0, y0, x1, y1 = (np.ceil(value - 0.5) for value in box)
    columns, rows = np.arange(width), np.arange(height)[:, None]
    return (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)


def box_iou(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Of two boxes; 0 where both are empty."""
    sides = [max(0.0, min(first[axis + 2], second[axis + 2]) - max(first[axis], second[axis])) for axis in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union > 0 else 0.0


def choose_mask(
    rule: MaskRule,
    predicted: np.ndarray,
    decode: Callable[[int], np.ndarray],
    *,
    box: Sequence[float] | np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> tuple[int, np.ndarray]:
    """The token whose mask counts, 0 to 3, and the mask.

    Args:
        predicted: float [4], the model's own IoU of each token's mask.
        decode: a token's mask; called for those that the rule has to look at, no others.
        box: the prompt box, for the rules `box` and `tight-box`; truth: for `oracle`. ValueError where one is missing.
    """
    if rule in ("single", "confident"):
        token = 0 if rule == "single" else 1 + int(np.argmax(predicted[1:]))
        return token, decode(token)
    masks = [decode(token) for token in (1, 2, 3)]
    if rule == "oracle" and truth is not None:
        scores = [mask_iou(mask, truth) for mask in masks]
    elif rule == "box" and box is not None:
        filled = box_to_mask(box, *masks[0].shape)
        scores = [mask_iou(mask, filled) for mask in masks]
    elif rule == "tight-box" and box is not None:
        scores = [box_iou(tight_box(mask), box) for mask in masks]
    else:
        raise ValueError(f"the rule {rule} needs {'the truth' if rule == 'oracle' else 'the prompt box'}")
    best = int(np.argmax(scores))
    return 1 + best, masks[best]


def farthest_point(mask: np.ndarray) -> tuple[int, int]:
    """The pixel of a mask that is not empty which is farthest from its boundary; the picture's edge is boundary too.

    The first in reading order where several are.
    """
    x0, y0, x1, y1 = map(int, tight_box(mask))
    distance = np.asarray(ndimage.distance_transform_edt(np.pad(mask[y0:y1, x0:x1], 1)))
    row, column = np.unravel_index(int(np.argmax(distance)), distance.shape)
    return x0 + int(column) - 1, y0 + int(row) - 1


def centre_point(mask: np.ndarray) -> tuple[int, int]:
    """The pixel of a mask that is not empty which is nearest its centre of mass."""
    rows, columns = np.nonzero(mask)
    nearest = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
    return int(columns[nearest]), int(rows[nearest])


def next_click(rule: NextPoints, mask: np.ndarray, truth: np.ndarray) -> tuple[tuple[int, int], int]:
    """The click that mends `mask` most, and its label: 1 where the object is missing, 0 where there is too much.

    In the largest 4-connected part of what is missing or too much. Where nothing is wrong: the object once more.
    """
    parts = [(_largest_part(truth & ~mask), 1), (_largest_part(mask & ~truth), 0)]
    part, label = max(parts, key=lambda pair: np.count_nonzero(pair[0]))  # the first where they are equal
    if not part.any():
        part, label = truth, 1
    return (centre_point if rule == "error-centre" else farthest_point)(part), label


def _largest_part(mask: np.ndarray) -> np.ndarray:
    labels = np.zeros(mask.shape, np.int32)
    if int(cast(int, ndimage.label(mask, output=labels))) < 2:
        return mask
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
