"""Pictures with a class for every pixel: a folder of pictures, and one of PNGs of class numbers with the same names."""

from pathlib import Path

import numpy as np
from blake3 import blake3
from PIL import Image

from sami_cache.data.images import decode_image
from sami_cache.data.source import file_text
from sami_cache.errors import ImageError, SamiCacheError

IGNORED = 255
"""In what `labels` returns: pixels without a class."""
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class SegmentedPictures:
    """`len(pictures)` pictures, the PNGs of `masks` with a picture of the same stem in `images`, in order of their names.

    ADE20K's layout (`images/training`, `annotations/training`), and any other with folders inside both.
    """

    def __init__(self, images: Path, masks: Path) -> None:
        """Raises SamiCacheError where a folder is missing, holds no PNG, or a PNG has no picture."""
        for folder in (images, masks):
            if not folder.is_dir():
                raise SamiCacheError(
                    f"{file_text(folder)} is no folder: expected pictures, and PNGs of class numbers (--masks)"
                )
        pictures = {
            path.relative_to(images).with_suffix("").as_posix(): path
            for path in sorted(images.rglob("*"))
            if path.suffix.lower() in _ENDINGS
        }
        self.masks = {path.relative_to(masks).with_suffix("").as_posix(): path for path in sorted(masks.rglob("*.png"))}
        if not self.masks:
            raise SamiCacheError(f"{file_text(masks)} holds no PNG: expected one of class numbers for each picture")
        if missing := [key for key in self.masks if key not in pictures]:
            few = f"{len(missing)} of {len(self.masks)} have none"
            raise SamiCacheError(
                f"{file_text(self.masks[missing[0]])} has no picture in {file_text(images)} ({few}): expected the same "
                "names but for their endings"
            )
        self.keys = list(self.masks)
        self.images = {key: pictures[key] for key in self.keys}
        self.fingerprint = blake3("\0".join(self.keys).encode()).hexdigest()
        """BLAKE3 of the names."""

    def __len__(self) -> int:
        return len(self.keys)

    def values(self, number: int) -> np.ndarray:
        """The numbers in the PNG as they are: int64 [H, W]. Raises SamiCacheError where it is damaged or in colour."""
        path = self.masks[self.keys[number]]
        try:
            with Image.open(path) as image:
                values = np.array(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise SamiCacheError(f"{file_text(path)}: damaged, or no PNG ({error})") from error
        if values.ndim != 2:
            raise SamiCacheError(f"{file_text(path)}: expected one class number a pixel (grey or palette), found colours")
        return values.astype(np.int64)

    def read_image(self, number: int) -> np.ndarray:
        """Picture `number`: uint8 [H, W, 3], RGB, upright. Raises SamiCacheError where it is damaged."""
        path = self.images[self.keys[number]]
        try:
            return np.array(decode_image(path.read_bytes()))
        except (ImageError, OSError) as error:
            raise SamiCacheError(f"{file_text(path)}: {error}") from error

    def labels(self, number: int, place: dict[int, int], ignored: frozenset[int], size: tuple[int, int]) -> np.ndarray:
        """Classes of picture `number`, uint8 [H, W]: `place[value]`, or IGNORED for the values in `ignored`.

        Raises SamiCacheError, with file and value, for a value that is neither, and where the size is not the picture's.
        """
        values, path = self.values(number), self.masks[self.keys[number]]
        if values.shape != size:
            raise SamiCacheError(
                f"{file_text(path)}: {values.shape[1]}x{values.shape[0]} pixels, its picture {size[1]}x{size[0]}"
            )
        labels = np.full(size, IGNORED, np.uint8)
        for value in np.unique(values).tolist():
            if value in place:
                labels[values == value] = place[value]
            elif value not in ignored:
                raise SamiCacheError(
                    f"{file_text(path)}: the value {value} is no class: expected one of {len(place)}, or an ignored one "
                    f"({', '.join(map(str, sorted(ignored))) or 'none'})"
                )
        return labels
