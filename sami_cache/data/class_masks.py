"""Pictures with a class for every pixel: a folder of pictures, and one of PNGs of class indices under the same names."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3
from PIL import Image, PngImagePlugin

from sami_cache.data.images import MAX_PIXELS, decode_image
from sami_cache.data.source import IMAGE_EXTENSIONS, check_encoded_size, file_text
from sami_cache.errors import ImageError, SamiCacheError

IGNORED = -1
"""The label of pixels that are neither learnt nor measured."""
_VALUES = 1 << 16
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


class ClassLabels:
    """Between the indices in files, which may leave gaps, and labels 0 .. classes - 1.

    indices: of each label, ascending. names: of each label. ignored: indices of pixels that count nowhere.
    """

    def __init__(self, names: Mapping[int, str], ignored: Iterable[int] = ()) -> None:
        """`names`: by index, 0 to 65535; those of ignored ones are left out. Raises SamiCacheError with fewer than two left."""
        self.ignored = sorted(set(ignored))
        self.indices = sorted(set(names) - set(self.ignored))
        if len(self.indices) < 2:
            raise SamiCacheError(
                f"{len(self.indices)} classes beside the ignored indices ({self._ignored_text()}): expected two or more"
            )
        if not 0 <= self.indices[0] <= self.indices[-1] < _VALUES:
            raise SamiCacheError(f"class indices are 0 to {_VALUES - 1}: found {self.indices[0]} to {self.indices[-1]}")
        self.names = [names[index] for index in self.indices]
        self._labels = np.full(_VALUES, IGNORED - 1, np.int32)
        self._labels[self.indices] = np.arange(len(self.indices))
        self._labels[[index for index in self.ignored if index < _VALUES]] = IGNORED

    def __len__(self) -> int:
        return len(self.indices)

    def encode(self, indices: np.ndarray, where: str) -> np.ndarray:
        """Indices as in the file -> labels, int32, `IGNORED` among them. Raises SamiCacheError for one that is no class."""
        labels = self._labels[indices]
        if (unknown := labels < IGNORED).any():
            value = int(indices[unknown].min())
            raise SamiCacheError(
                f"{where}: index {value} is no class: expected one of {len(self)}, {self.indices[0]} to {self.indices[-1]}, or "
                f"one to ignore ({self._ignored_text()}). Name it with --classes FILE, or ignore it with --ignore-index {value}"
            )
        return labels

    def decode(self, labels: np.ndarray) -> np.ndarray:
        """Labels -> indices as in the files: uint8, or uint16 where they need it."""
        return np.array(self.indices, np.uint8 if self.indices[-1] < 256 else np.uint16)[labels]

    def _ignored_text(self) -> str:
        return ", ".join(map(str, self.ignored)) or "none"


class MaskedPictures:
    """`len(pictures)` pictures that have a mask, by name. unlabelled: pictures without one, which are left out.

    keys: names below the folders, without endings, such as "ADE_train_00000001". fingerprint: BLAKE3 of them. Safe to read
    from several threads.
    """

    def __init__(self, images: Path, masks: Path) -> None:
        """Raises SamiCacheError where a folder is none, holds nothing, or a mask has no picture or several."""
        pictures = _files(images, IMAGE_EXTENSIONS, "pictures")
        (self._images, twice), (self._masks, _) = pictures, _files(masks, (".png",), "PNGs of class indices")
        self.keys = sorted(self._masks)
        where = f"{file_text(masks)} and {file_text(images)}"
        if missing := [key for key in self.keys if key not in self._images]:
            raise SamiCacheError(
                f"{where}: {len(missing)} of {len(self.keys)} masks have no picture, such as {file_text(missing[0])}.png: "
                "expected a picture of the same name, its ending apart"
            )
        if unclear := sorted(twice & set(self.keys)):
            raise SamiCacheError(f"{where}: {file_text(unclear[0])} is the name of more than one picture: expected one")
        self.unlabelled = len(self._images) - len(self.keys)
        self.fingerprint = blake3("\0".join(map(file_text, self.keys)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.keys)

    def mask_name(self, number: int) -> str:
        """The file of mask `number`, for messages."""
        return file_text(self._masks[self.keys[number]])

    def mask(self, number: int) -> np.ndarray:
        """Indices [H, W] of mask `number`, uint16, as they are in the file. Raises SamiCacheError naming it."""
        return _read(self._masks[self.keys[number]], _decode_indices)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture `number`, uint8 [H, W, 3], RGB, and its mask as `mask` gives it.

        Upright, as its EXIF orientation says; where only the picture as it lies in the file has the mask's size, as it lies.
        Raises SamiCacheError naming the file that is missing, damaged or of another size.
        """
        indices, path = self.mask(number), self._images[self.keys[number]]

        def decode(data: bytes) -> np.ndarray:
            pixels = np.array(decode_image(data))
            if pixels.shape[:2] != indices.shape and pixels.shape[1::-1] == indices.shape:
                pixels = np.array(decode_image(data, upright=False))
            return pixels

        pixels = _read(path, decode)
        if pixels.shape[:2] != indices.shape:
            raise SamiCacheError(
                f"{self.mask_name(number)}: expected a mask of {pixels.shape[1]}x{pixels.shape[0]} pixels, as "
                f"{file_text(path)} has, found {indices.shape[1]}x{indices.shape[0]}"
            )
        return pixels, indices


def _files(folder: Path, endings: tuple[str, ...], what: str) -> tuple[dict[str, Path], set[str]]:
    """Files below a folder by their name there without its ending, and the names that several have. Hidden ones left out."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise SamiCacheError(f"{file_text(folder)} is no folder: expected {what}")
    found: dict[str, Path] = {}
    twice = set()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.suffix.lower() not in endings or any(part[0] == "." for part in place.parts) or not path.is_file():
            continue
        key = place.with_suffix("").as_posix()
        if key in found:
            twice.add(key)
        found[key] = path
    if not found:
        raise SamiCacheError(f"{file_text(folder)} holds no {what}: looked for {', '.join(endings)}, at any depth")
    return found, twice


def _read(path: Path, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    name = file_text(path)
    try:
        check_encoded_size(path.stat().st_size)
        return decode(path.read_bytes())
    except ImageError as error:
        raise SamiCacheError(f"{name}: {error}") from error
    except OSError as error:
        raise SamiCacheError(f"{name}: cannot be read: {error.strerror or error}") from error


def _decode_indices(data: bytes) -> np.ndarray:
    try:
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"too many pixels: expected at most {MAX_PIXELS}, found {image.width}x{image.height}")
        if image.mode not in _MODES:
            raise ImageError(f"expected a PNG of class indices, grey or with a palette, found colours ({image.mode})")
        values = np.asarray(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
        raise ImageError(f"damaged: expected a PNG of class indices ({type(error).__name__}: {error})") from error
    if values.min(initial=0) < 0 or values.max(initial=0) >= _VALUES:
        raise ImageError(f"class indices are 0 to {_VALUES - 1}: found {values.min()} to {values.max()}")
    return values.astype(np.uint16)


def resize_labels(labels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Labels [H, W] int32 in `box` (x0, y0, x1, y1, pixels) brought to `size` (width, height) by their nearest."""
    return np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST, box=box))
