"""What everything mode costs on a big photo: seconds and peak resident memory, libraries and model included.

    python benchmarks/everything_memory.py [--width 4000] [--height 3000] [--family sam] [--encoder vit_t]
        [--points-per-side 32] [--pred-iou-thresh 0] [--stability-score-thresh 0] [--segment-anything]

The photo is scikit-image's `coffee`, enlarged; the weights are random. By default no filter is on, so that every mask is
enlarged and kept up to the boxes' suppression: the most that any weights can cost. `--segment-anything` measures that
package's own generator instead, on the same weights (family sam).
"""

import argparse
import resource
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from sami_cache.inference.mask_generator import MaskGenerator, MaskGeneratorConfig
from sami_cache.inference.predictor import QUERIES_AT_ONCE, SamPredictor
from sami_cache.models.segment_anything import SegmentAnything, SegmentAnythingConfig


def photo(width: int, height: int) -> np.ndarray:
    import skimage.data

    return np.asarray(Image.fromarray(skimage.data.coffee()).resize((width, height), Image.Resampling.BICUBIC))


def reference(model: SegmentAnything, **settings: Any) -> Any:
    """segment-anything's generator around the same modules."""
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.modeling import Sam

    encoder: Any = model.image_encoder
    encoder.img_size = model.config.image_size
    parts: Any = SimpleNamespace(prompts=model.prompt_encoder, decoder=model.mask_decoder)
    return SamAutomaticMaskGenerator(Sam(encoder, parts.prompts, parts.decoder).eval(), output_mode="coco_rle", **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--family", default="sam")
    parser.add_argument("--encoder", default="vit_t")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--points-per-batch", type=int, default=QUERIES_AT_ONCE)
    parser.add_argument("--pred-iou-thresh", type=float, default=0.0)
    parser.add_argument("--stability-score-thresh", type=float, default=0.0)
    parser.add_argument("--segment-anything", action="store_true")
    given = parser.parse_args()
    image = photo(given.width, given.height)
    torch.manual_seed(0)
    model = SegmentAnything(SegmentAnythingConfig(family=given.family, encoder=given.encoder)).eval()
    settings = {name: getattr(given, name) for name in ("points_per_side", "pred_iou_thresh", "stability_score_thresh")}
    if given.segment_anything:
        generator = reference(model, points_per_batch=given.points_per_batch, **settings)
    else:
        predictor = SamPredictor(model, queries_at_once=given.points_per_batch)
        generator = MaskGenerator(predictor, MaskGeneratorConfig(**settings))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    masks = generator.generate(image)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{'segment-anything' if given.segment_anything else 'ours'}, {given.family}, {given.encoder}, {given.width} x "
        f"{given.height}, {given.points_per_side}^2 points, {given.points_per_batch} at once: {len(masks)} masks in "
        f"{seconds:.1f} s; peak {peak / 2**20:.2f} GiB, {before / 2**20:.2f} GiB of it before"
    )


if __name__ == "__main__":
    main()
