"""Pictures with the objects in them: COCO-format JSON, and folders of SA-1B.

COCO: one file, https://cocodataset.org/#format-data; a segmentation is polygons, or run lengths, plain or compressed. SA-1B:
one `sa_*.json` beside each `sa_*.jpg`. A file's structure is checked when it is read; what an object covers is worked out
when it is asked for, so a million of them cost no more than their text.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from faster_coco_eval.core import mask as coco_mask

from sami_cache.data.images import MAX_PIXELS, decode_image
from sami_cache.data.source import check_encoded_size, file_text
from sami_cache.errors import ImageError, SamiCacheError, one_line

_LAYOUT = "a COCO-format JSON file (with the folder of its pictures), or a folder of SA-1B's sa_*.json and sa_*.jpg"


@dataclass(frozen=True, kw_only=True)
class Object:
    """One annotated object of a picture."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the picture, as annotated."""
    area: int
    """Pixels, as annotated (COCO's fractions rounded); counted where the file does not say."""
    crowd: bool
    """Several objects in one region: neither a single mask to learn nor one to be measured on."""
    category: int | None
    """The file's `category_id`; SA-1B has none."""
    annotation_id: int
    image_id: int
    height: int
    """Of the picture, pixels; also `width`."""
    width: int
    where: str
    """File and annotation, for messages."""
    segmentation: Any = field(repr=False)
    """As the file has it."""

    def mask(self) -> np.ndarray:
        """Decode: bool [height, width], True inside. Raises SamiCacheError where the segmentation is none."""
        rle = _to_rle(self.segmentation, self.height, self.width, self.where, decode=False)
        with _damage(self.height, self.width, self.where):
            return coco_mask.decode(rle).astype(bool)

    def rle(self) -> dict[str, Any]:
        """The same as COCO's compressed run lengths: {"size": [height, width], "counts": bytes}."""
        return _to_rle(self.segmentation, self.height, self.width, self.where)


class Annotations(ABC):
    """`len(annotations)` pictures. `keys`: unique text, one a picture, in the order of the data set."""

    keys: list[str]
    fingerprint: str
    """BLAKE3 of what names the data set: COCO's file, or the names in a folder of SA-1B."""

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def objects(self, index: int) -> list[Object]:
        """What is annotated in picture `index`, crowds included, in the file's order. May be empty."""

    @abstractmethod
    def _image(self, index: int) -> tuple[Path, int, int]:
        """A picture's file, and the height and width that its annotations are made for."""

    def read_image(self, index: int) -> np.ndarray:
        """Picture `index`: uint8 [H, W, 3], RGB. Raises SamiCacheError where it is missing, damaged or resized.

        Upright, as its EXIF orientation says; where only the picture as it lies in the file has the annotated size, as it lies.
        """
        path, height, width = self._image(index)
        name = file_text(path)
        try:
            check_encoded_size(path.stat().st_size)
            data = path.read_bytes()
            pixels = np.array(decode_image(data))
            if pixels.shape[:2] != (height, width) and pixels.shape[:2] == (width, height):
                pixels = np.array(decode_image(data, upright=False))
        except FileNotFoundError:
            raise SamiCacheError(
                f"{name}: annotated, but not there. Give the folder of the pictures with --images DIR"
            ) from None
        except (ImageError, OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise SamiCacheError(f"{name}: {error}") from error
        if pixels.shape[:2] != (height, width):
            raise SamiCacheError(
                f"{name}: its annotations are for {width}x{height} pixels, found {pixels.shape[1]}x{pixels.shape[0]}. Give "
                "the pictures that were annotated"
            )
        return pixels


def open_annotations(path: Path, images: Path | None = None) -> Annotations:
    """The annotations at `path`: a COCO-format JSON, whose pictures are in `images`, or a folder in SA-1B's layout.

    Raises SamiCacheError, with the file and what was expected, for anything else.
    """
    path = Path(path).absolute()
    if path.is_dir():
        return SA1BAnnotations(path)
    if not path.is_file():
        raise SamiCacheError(f"{file_text(path)} does not exist: expected {_LAYOUT}")
    if images is None:
        raise SamiCacheError(
            f"{file_text(path)} is a COCO-format file, which says no folder: give its pictures with --images DIR"
        )
    if not Path(images).is_dir():
        raise SamiCacheError(f"{file_text(images)} is no folder: expected the pictures of {file_text(path)}")
    return CocoAnnotations(path, Path(images).absolute())


class CocoAnnotations(Annotations):
    """A COCO-format file: `images` (id, file_name, width, height) and `annotations`, in the file's order."""

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self.folder, self._name = path, images, file_text(path)
        data = _read_json(path, self._name)
        self.fingerprint = blake3(path.read_bytes()).hexdigest()
        self._images = [
            _checked_image(entry, f"{self._name}: image {n}") for n, entry in enumerate(_list(data, "images", self._name))
        ]
        self.keys = [image["file_name"] for image in self._images]
        if len(set(self.keys)) != len(self.keys):
            twice = next(key for n, key in enumerate(self.keys) if key in self.keys[:n])
            raise SamiCacheError(f"{self._name}: two images are named {one_line(twice)!r}: expected each once")
        self._objects: dict[int, list[Any]] = {image["id"]: [] for image in self._images}
        if len(self._objects) != len(self._images):
            raise SamiCacheError(f"{self._name}: two images have one id: expected each id once")
        for n, entry in enumerate(_list(data, "annotations", self._name)):
            where = f"{self._name}: annotation {_said_id(entry, n)}"
            image = _integer(entry, "image_id", where)
            if image not in self._objects:
                raise SamiCacheError(f"{where}: image_id {image} is none of the file's {len(self._images)} images")
            self._objects[image].append(entry)
        self.categories: dict[int, str] = {
            _integer(entry, "id", f"{self._name}: category {n}"): one_line(entry.get("name", ""))
            for n, entry in enumerate(_list(data, "categories", self._name) if data.get("categories") else [])
        }
        """Names by `category_id`; empty where the file names none."""

    def objects(self, index: int) -> list[Object]:
        image = self._images[index]
        return [_object(entry, image, self._name, n) for n, entry in enumerate(self._objects[image["id"]])]

    def _image(self, index: int) -> tuple[Path, int, int]:
        image = self._images[index]
        return self.folder / image["file_name"], image["height"], image["width"]


class SA1BAnnotations(Annotations):
    """A folder of SA-1B: each `sa_*.json` holds one picture's annotations. A file is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = sorted(path.stem for path in folder.glob("sa_*.json"))
        if not self.keys:
            raise SamiCacheError(f"{file_text(folder)} holds no sa_*.json: expected {_LAYOUT}")
        self.fingerprint = blake3("\0".join(self.keys).encode()).hexdigest()

    def objects(self, index: int) -> list[Object]:
        name, data, image = self._read(index)
        return [_object(entry, image, name, n) for n, entry in enumerate(_list(data, "annotations", name))]

    def _image(self, index: int) -> tuple[Path, int, int]:
        _, _, image = self._read(index)
        return self.folder / image["file_name"], image["height"], image["width"]

    def _read(self, index: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
        path = self.folder / f"{self.keys[index]}.json"
        name = file_text(path)
        data = _read_json(path, name)
        entry = data.get("image")
        if isinstance(entry, dict) and "id" not in entry:
            entry = entry | {"id": entry.get("image_id")}  # COCO's name for it is the other
        return name, data, _checked_image(entry, f"{name}: image")


def _object(entry: Mapping[str, Any], image: Mapping[str, Any], name: str, place: int) -> Object:
    where = f"{name}: annotation {_said_id(entry, place)}"
    identity = _integer(entry, "id", where)
    segmentation = entry.get("segmentation")
    if not isinstance(segmentation, list | dict):
        raise SamiCacheError(
            f"{where}: expected a segmentation (polygons or run lengths), found {one_line(segmentation, 40)!r}"
        )
    height, width = image["height"], image["width"]
    box, area = entry.get("bbox"), entry.get("area")
    if box is None or area is None:
        rle = _to_rle(segmentation, height, width, where)
        box = coco_mask.toBbox(rle).tolist() if box is None else box
        area = int(coco_mask.area(rle)) if area is None else area
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0):
        raise SamiCacheError(f"{where}: expected bbox [x, y, width, height] in pixels, found {one_line(box, 80)}")
    if not (_is_number(area) and area >= 0):
        raise SamiCacheError(f"{where}: expected area in pixels, found {one_line(area, 40)!r}")
    x, y, w, h = map(float, box)
    return Object(
        box=(x, y, x + w, y + h),
        area=round(area),
        crowd=bool(entry.get("iscrowd", 0)),
        category=_integer(entry, "category_id", where) if entry.get("category_id") is not None else None,
        annotation_id=identity,
        image_id=image["id"],
        height=height,
        width=width,
        where=where,
        segmentation=segmentation,
    )


@contextmanager
def _damage(height: int, width: int, where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        text = one_line(error, 120)
        raise SamiCacheError(f"{where}: damaged segmentation, expected a mask of {width}x{height}: {text}") from error


def _to_rle(segmentation: Any, height: int, width: int, where: str, *, decode: bool = True) -> dict[str, Any]:
    """`decode`: which checks compressed run lengths; the caller who does it anyway need not have it done twice."""
    with _damage(height, width, where):
        if isinstance(segmentation, list):
            return _polygons_to_rle(segmentation, height, width, where)
        return _runs_to_rle(segmentation, height, width, where, decode)


def _polygons_to_rle(polygons: list[Any], height: int, width: int, where: str) -> dict[str, Any]:
    if not polygons:
        return coco_mask.encode(np.zeros((height, width), np.uint8, order="F"))
    # The library checks run lengths but not polygons: NaN among them ends the process.
    reach = 2 * max(height, width)
    for polygon in polygons:
        if not (isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_number, polygon))):
            raise SamiCacheError(f"{where}: expected polygons [x, y, x, y, x, y, ...], found {one_line(polygon, 80)}")
        if min(polygon) < -reach or max(polygon) > reach:
            raise SamiCacheError(f"{where}: a polygon lies far outside of the {width}x{height} picture: expected its pixels")
    parts: Any = coco_mask.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width)
    return coco_mask.merge(parts)


def _runs_to_rle(segmentation: Mapping[str, Any], height: int, width: int, where: str, decode: bool) -> dict[str, Any]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise SamiCacheError(f"{where}: expected run lengths of size [{height}, {width}], found {one_line(size, 40)}")
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
            found = _sum_text(counts)
            raise SamiCacheError(f"{where}: expected run lengths that add up to {height} x {width} pixels, found {found}")
        encoded: Any = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return encoded
    if not isinstance(counts, str):
        raise SamiCacheError(f"{where}: expected run lengths as a list or a text, found {one_line(counts, 40)!r}")
    rle = {"size": [height, width], "counts": counts.encode("latin-1")}
    if decode:
        coco_mask.decode(rle)  # which checks what the library's other functions take as it comes
    return rle


def _sum_text(counts: list[Any]) -> str:
    wrong = [count for count in counts if type(count) is not int or count < 0]
    return one_line(f"{wrong[0]!r}", 40) if wrong else str(sum(counts))


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise SamiCacheError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SamiCacheError(f"{name}: not JSON ({one_line(error, 120)}): expected {_LAYOUT}") from error
    if not isinstance(data, dict):
        raise SamiCacheError(f"{name}: expected an object with annotations, found a {type(data).__name__}: expected {_LAYOUT}")
    return data


def _list(data: Mapping[str, Any], key: str, name: str) -> list[Any]:
    entries = data.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SamiCacheError(f"{name}: expected a list of objects under {key!r}, found {one_line(entries, 40)!r}")
    return entries


def _checked_image(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, dict) and "file_name" not in entry and isinstance(entry.get("coco_url"), str):
        # LVIS names a picture by its address alone, whose last two parts are COCO's folder and file.
        entry = entry | {"file_name": "/".join(entry["coco_url"].split("/")[-2:])}
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise SamiCacheError(f"{where}: expected an object with id, file_name, width and height, found {one_line(entry, 80)}")
    if Path(entry["file_name"]).is_absolute() or ".." in Path(entry["file_name"]).parts:
        raise SamiCacheError(
            f"{where}: expected a file_name inside the folder of the pictures, found {one_line(entry['file_name'])!r}"
        )
    checked = {key: _integer(entry, key, where) for key in ("id", "width", "height")}
    if min(checked["width"], checked["height"]) < 1 or checked["width"] * checked["height"] > MAX_PIXELS:
        raise SamiCacheError(
            f"{where}: expected a size of 1 to {MAX_PIXELS} pixels, found {checked['width']}x{checked['height']}"
        )
    return checked | {"file_name": entry["file_name"]}


def _said_id(entry: Mapping[str, Any], place: int) -> str:
    return one_line(entry["id"], 40) if "id" in entry else f"number {place} (no id)"


def _integer(entry: Mapping[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        raise SamiCacheError(f"{where}: expected a whole number as {key}, found {one_line(value, 40)!r}")
    return value


def _is_number(value: Any) -> bool:
    # Larger than any picture is none: whole numbers of any length are JSON.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e12 < value < 1e12
