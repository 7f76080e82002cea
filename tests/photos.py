"""Real photographs for the tests: pieces of those that scikit-image ships."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = ("astronaut", "chelsea", "coffee", "rocket")


@lru_cache
def picture(name: str) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)())


def pieces(count: int, seed: int = 0) -> list[Image.Image]:
    """`count` random pieces of 60 to 200 pixels a side, wide and tall ones among them."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        source = picture(PICTURES[index % len(PICTURES)])
        width, height = (int(side) for side in rng.integers(60, 200, 2))
        x, y = int(rng.integers(0, source.width - width)), int(rng.integers(0, source.height - height))
        found.append(source.crop((x, y, x + width, y + height)))
    return found


def photo_folder(path: Path, count: int, seed: int = 0) -> Path:
    """A folder with one class folder per picture, JPEGs of quality 92."""
    for index, image in enumerate(pieces(count, seed)):
        file = path / PICTURES[index % len(PICTURES)] / f"{index:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=92)
    return path
