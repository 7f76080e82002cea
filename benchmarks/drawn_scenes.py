"""Annotated pictures that nobody annotated, for a promptable model to learn what a prompt is: drawn objects of one to three
parts, one before another. Ground and objects are patterns and, with `--textures`, cut-outs of photographs that need no
annotations: a model that has seen patterns alone takes leave of its box where it first sees a photograph.

    python benchmarks/drawn_scenes.py DIR --size 128 --count 1000 [--textures PHOTOS]

writes DIR/instances.json, COCO-format, and the pictures, whose longest side is `--size`; the same ones for the same arguments.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

LEAST_AREA = 64
"""Pixels of an object that are seen; what is seen of less is not annotated, nor is what is hidden by three quarters."""


def draw_scenes(folder: Path, size: int, count: int, textures: Path | None = None) -> Path:
    """The COCO-format JSON of `count` drawn scenes. A folder that has them keeps them."""
    file = folder / "instances.json"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [] if textures is None else read_photographs(textures, size)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        pixels, masks = draw_scene(size, np.random.default_rng((0, number)), photographs)
        height, width = pixels.shape[:2]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        for mask in masks:
            segmentation = {"size": [height, width], "counts": run_lengths(mask)}
            annotations.append({"id": len(annotations), "image_id": number, "segmentation": segmentation})
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def read_photographs(folder: Path, size: int) -> list[np.ndarray]:
    """uint8 [h, w, 3] of every JPEG at or below `folder`, its shortest side about `size`."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")):
        with Image.open(path) as image:
            image.draft("RGB", (size, size))
            scale = size / min(image.size)
            found.append(np.asarray(image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size])))
    if not found:
        raise SystemExit(f"{folder}: expected JPEGs, found none")
    return found


def draw_scene(
    size: int, rng: np.random.Generator, photographs: Sequence[np.ndarray] = ()
) -> tuple[np.ndarray, list[np.ndarray]]:
    """uint8 [H, W, 3] with a longest side of `size`, and bool [H, W] of what is seen of each annotated object."""
    sides = [size, round(size * rng.uniform(0.6, 1))]
    height, width = sides if rng.integers(2) else sides[::-1]

    def cover() -> np.ndarray:
        return cut_out(height, width, rng, photographs) if photographs and rng.integers(4) else texture(height, width, rng)

    pixels = cover()
    shown: list[np.ndarray] = []
    whole: list[int] = []
    for _ in range(rng.integers(3, 10)):
        parts = draw_object(height, width, rng)
        mask = np.any(parts, axis=0)
        shown = [one & ~mask for one in shown] + [mask]
        whole.append(int(mask.sum()))
        # Half of the objects look alike all over, the others part by part.
        for part in [mask] if rng.integers(2) else parts:
            pixels[part] = cover()[part]
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


def cut_out(height: int, width: int, rng: np.random.Generator, photographs: Sequence[np.ndarray]) -> np.ndarray:
    """float [H, W, 3]: a third to all of a side of a random photograph, mirrored or not, lighter or darker."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    sides = np.array(photograph.shape[:2])
    scale = (sides / (height, width)).min() * rng.uniform(1 / 3, 1)
    rows, columns = np.maximum(1, (scale * np.array([height, width])).astype(int))
    top, left = (rng.integers(side - part + 1) for side, part in zip(sides, (rows, columns), strict=True))
    part = Image.fromarray(photograph).resize(
        (width, height), Image.Resampling.BILINEAR, (left, top, left + columns, top + rows)
    )
    pixels = np.asarray(part, dtype=np.float64) * rng.uniform(0.7, 1.3) + rng.normal(0, 20)
    return pixels[:, ::-1] if rng.integers(2) else pixels


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
    parser.add_argument("--textures", type=Path, help="a folder of JPEGs")
    given = parser.parse_args()
    print(draw_scenes(given.folder, given.size, given.count, given.textures))


if __name__ == "__main__":
    main()
