"""Annotated pictures that nobody photographed, for a promptable model to learn what a prompt is: objects of one to three parts,
textured, one before another, on a textured ground.

    python benchmarks/drawn_scenes.py DIR --size 128 --count 1000

writes DIR/instances.json, COCO-format, and the pictures, whose longest side is `--size`; the same ones for the same arguments.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

LEAST_AREA = 64
"""Pixels of an object that are seen; what is seen of less is not annotated, nor is what is hidden by three quarters."""


def draw_scenes(folder: Path, size: int, count: int) -> Path:
    """The COCO-format JSON of `count` drawn scenes. A folder that has them keeps them."""
    file = folder / "instances.json"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        pixels, masks = draw_scene(size, np.random.default_rng((0, number)))
        height, width = pixels.shape[:2]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        for mask in masks:
            segmentation = {"size": [height, width], "counts": run_lengths(mask)}
            annotations.append({"id": len(annotations), "image_id": number, "segmentation": segmentation})
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def draw_scene(size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """uint8 [H, W, 3] with a longest side of `size`, and bool [H, W] of what is seen of each annotated object."""
    sides = [size, round(size * rng.uniform(0.6, 1))]
    height, width = sides if rng.integers(2) else sides[::-1]
    pixels = texture(height, width, rng)
    shown: list[np.ndarray] = []
    whole: list[int] = []
    for _ in range(rng.integers(3, 10)):
        parts = draw_object(height, width, rng)
        mask = np.any(parts, axis=0)
        shown = [one & ~mask for one in shown] + [mask]
        whole.append(int(mask.sum()))
        # Half of the objects look alike all over, the others part by part.
        for part in [mask] if rng.integers(2) else parts:
            pixels[part] = texture(height, width, rng)[part]
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    noisy = np.asarray(picture) + rng.normal(0, rng.uniform(1, 15), pixels.shape)
    kept = [mask for mask, area in zip(shown, whole, strict=True) if mask.sum() >= max(LEAST_AREA, area / 4)]
    return noisy.clip(0, 255).astype(np.uint8), kept


def draw_object(height: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """bool [H, W] of one to three parts, the later ones beside or in front of the first and smaller."""
    size = max(height, width)
    middle = rng.uniform(0.05, 0.95, 2) * (height, width)
    radii = np.exp(rng.uniform(np.log(0.05), np.log(0.45), 2)) * size
    if rng.integers(2):  # objects as long as wide are commoner than chance would have it
        radii[:] = np.sqrt(radii.prod()) * np.exp(rng.normal(0, 0.2, 2))
    parts = [draw_part(height, width, middle, radii, rng)]
    for _ in range(rng.integers(3)):
        angle = rng.uniform(0, 2 * np.pi)
        place = middle + radii * rng.uniform(0.5, 1.1) * (np.sin(angle), np.cos(angle))
        parts.append(draw_part(height, width, place, radii * rng.uniform(0.25, 0.8, 2), rng))
    return parts


def draw_part(height: int, width: int, middle: np.ndarray, radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [H, W]: an ellipse, a rounded rectangle or a blob with bays, turned by any angle in every other case."""
    rows, columns = np.mgrid[:height, :width] + 0.5 - middle[:, None, None]
    turn = rng.uniform(0, np.pi) if rng.integers(2) else 0.0
    across = (columns * np.cos(turn) + rows * np.sin(turn)) / radii[1]
    along = (rows * np.cos(turn) - columns * np.sin(turn)) / radii[0]
    if rng.integers(3) == 0:
        power = rng.uniform(3, 10)
        return np.abs(across) ** power + np.abs(along) ** power <= 1
    angle, edge = np.arctan2(along, across), np.ones((height, width))
    waviness = rng.uniform(0, 0.5) if rng.integers(3) else 0.0
    for wave in range(2, 7):
        edge += waviness * rng.normal() / wave * 2 * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(across, along) <= edge


def texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """float [H, W, 3], about 0 to 255: a greyish colour that changes slowly from one side to the other, patches and stripes."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    pixels = np.zeros((height, width, 3)) + rng.uniform(20, 235) + rng.normal(0, 35, 3)
    slope = rng.normal(0, 40, 2)
    pixels += (slope[0] * rows + slope[1] * columns)[..., None]
    if rng.integers(3):
        cells = np.exp(rng.uniform(np.log(3), np.log(40), 2)).astype(int)
        patches = Image.fromarray(rng.normal(0, 1, cells).astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(patches)[..., None] * rng.normal(0, 25, 3)
    if not rng.integers(4):
        angle, count = rng.uniform(0, np.pi), rng.uniform(4, 25)
        wave = np.sin(2 * np.pi * count * (np.cos(angle) * rows + np.sin(angle) * columns))
        pixels += wave[..., None] * rng.normal(0, 30, 3)
    return pixels


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's plain run lengths of bool [H, W]: in columns, of False first."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    print(draw_scenes(given.folder, given.size, given.count))


if __name__ == "__main__":
    main()
