"""Encoded bytes to upright 8-bit RGB pixels, and back to the small JPEG that a cache keeps beside its embeddings.

One rule for everything that is compared later: a picture is decoded by Pillow, in full, colour profiles ignored, as the
usual training pipelines do.
"""

import io
import math
import re
import threading
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ExifTags import Base as ExifTag
from PIL.ImageFile import ImageFile

from sami_cache.errors import ImageError

MAX_PIXELS = 100_000_000
"""Width x height above which an image is refused from its header, before a pixel is decoded."""

_MAX_JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_MAX_TIFF_TILE = 1 << 26  # pixels; libtiff allocates whole tiles, however small the picture is
_BACKGROUND = (255, 255, 255)
_local = threading.local()

# By content, never by file name. The plugins are called directly, not through Image.open: that one warns of large images, and
# a warning can be neither caught nor silenced for one thread alone. Plain JpegImageFile gives the first picture of an MPO.
_MAX_SCANS = 250
# Of a JPEG: neither a stuffed byte nor a restart, which are parts of a scan.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_FORMATS: list[tuple[re.Pattern[bytes], Callable[[io.BytesIO], ImageFile]]] = [
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImagePlugin.TiffImageFile),
]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Image.Image:
    """The first frame of a JPEG, PNG, WebP, BMP or TIFF as an upright "RGB" image with no metadata.

    The EXIF orientation is applied (a damaged EXIF block counts as none). Transparent pixels are laid over white. 16-bit
    grey is scaled from 0..65535 (12-bit TIFF from 0..4095) to 0..255. Safe to call from several threads. `upright=False`: as
    it lies in the file.

    Raises ImageError, whose message is the reason in one line, for anything that is not a whole picture of these formats, has
    more than `max_pixels` pixels, or holds pixels with no defined range (floats, 32-bit integers above 65535).
    """
    opener = _opener(data)
    _mute_pillow(UserWarning)  # remarks on odd metadata
    try:
        if opener is WebPImagePlugin.WebPImageFile:  # the plugin allocates the canvas when it is made
            _check_pixels(_webp_size(data), max_pixels)
        image = opener(io.BytesIO(data))
        _check_pixels(image.size, max_pixels)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            tile = image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 0), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 0)
            _check_pixels(tile, _MAX_TIFF_TILE, what="a tile of ")
            if math.prod(image.size) > (Image.MAX_IMAGE_PIXELS or max_pixels):
                _mute_pillow(Image.DecompressionBombWarning)  # this plugin asks once more while it loads
        image.load()
        turn = _UPRIGHT.get(_orientation(image)) if upright else None
        pixels = _to_rgb(image)
        if turn is not None:
            pixels = pixels.transpose(turn)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("not enough memory to decode it") from error
    except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
        raise ImageError(_reason(error)) from error
    pixels.info = {}
    return pixels


def decode_jpeg(data: bytes) -> np.ndarray:
    """A JPEG that `encode_jpeg` made, as uint8 [h, w, 3], RGB; this thread's next call overwrites it.

    The pixels are Pillow's, which uses the same library, bit for bit, at 1.15 times the speed; and hardly any of it needs
    Python's lock, so that many threads decode at once. Raises ImageError for what is no baseline JPEG.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        needed = int(height) * int(width) * 3
        if len(getattr(_local, "pixels", b"")) < needed:
            _local.pixels = bytearray(needed)  # fresh memory for each image would cost a third of the decoding
        return simplejpeg.decode_jpeg(data, buffer=memoryview(_local.pixels)[:needed])
    except ValueError as error:
        raise ImageError(_reason(error)) from error


def jpeg_size(width: int, height: int, short_side: int = 256) -> tuple[int, int]:
    """Width and height of what `encode_jpeg` makes of an image of `width` x `height` pixels."""
    scale = min(1.0, short_side / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode_jpeg(image: Image.Image, *, short_side: int = 256, quality: int = 90) -> bytes:
    """A baseline 4:2:0 JPEG of `image`, its short side reduced to `short_side` pixels (never enlarged), without metadata.

    Bicubic with antialias, the filter that the teachers' and students' own preprocessing uses; LANCZOS rings more at edges.
    `reducing_gap` lets large photos be averaged by whole factors first. The same pixels give the same bytes with the same
    libjpeg. Raises ImageError if the result is longer than JPEG's 65500 pixels.
    """
    size = jpeg_size(*image.size, short_side)
    if max(size) > _MAX_JPEG_SIDE:
        raise ImageError(f"too elongated for JPEG: expected at most {_MAX_JPEG_SIDE} pixels a side, found {size[0]}x{size[1]}")
    small = image if image.mode == "RGB" else image.convert("RGB")
    small = small.copy() if small.size == size else small.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    small.info = {}  # the encoder would write a comment found here
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=False, progressive=False)
    return buffer.getvalue()


def _opener(data: bytes) -> Callable[[io.BytesIO], ImageFile]:
    if data[:2] == b"\xff\xd8":
        _check_scans(data)
    for magic, opener in _FORMATS:
        if magic.match(data):
            return opener
    if not data:
        raise ImageError("empty: zero bytes")
    start = ascii(bytes(data[:8]))[2:-1]
    raise ImageError(f"not an image: expected JPEG, PNG, WebP, BMP or TIFF, found bytes that start with '{start}'")


def _mute_pillow(category: type[Warning]) -> None:
    # For the process: warnings cannot be caught in one thread alone. Looked up each time, since tests and users reset filters.
    entry = ("ignore", None, category, re.compile(r"PIL\."), 0)
    if entry not in warnings.filters:
        warnings.filterwarnings("ignore", category=category, module=r"PIL\.")


def _check_pixels(size: tuple[int, int], limit: int, *, what: str = "") -> None:
    width, height = size
    if width * height > limit:
        raise ImageError(f"too many pixels: expected at most {limit}, found {what}{width}x{height}")


def _check_scans(data: bytes) -> None:
    """A progressive JPEG has about ten scans; thousands, in one small file, take minutes to decode."""
    position = scans = 0
    while marker := _MARKER.search(data, position):
        position = marker.end()
        if marker[1] == b"\xd9":  # the end of the image; what follows is none of it
            return
        scans += marker[1] == b"\xda"
        if scans > _MAX_SCANS:
            raise ImageError(f"too many scans: expected at most {_MAX_SCANS} in a progressive JPEG")
        if marker[1] != b"\xd8":
            position += int.from_bytes(data[position : position + 2])


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas width and height by RFC 9649; (0, 0) for a header that the decoder will refuse."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return 0, 0


def _orientation(image: ImageFile) -> int:
    # After load(): PNG may carry its EXIF behind the pixels, and Pillow has by then turned a TIFF and removed its tag.
    try:
        return image.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # the pixels are whole, and viewers show such files too
        return 1


def _to_rgb(image: ImageFile) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels: expected 8-bit or 16-bit integers, since floats have no defined range")
    if image.mode.startswith("I"):
        return _wide_grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    page = Image.new("RGB", layered.size, _BACKGROUND)
    page.paste(layered, mask=layered.getchannel("A"))
    return page


def _wide_grey_to_rgb(image: ImageFile) -> Image.Image:
    """Modes "I", "I;16", "I;16B": Pillow's own conversion clips at 255 and turns most of a picture white."""
    values = np.asarray(image)
    largest = 65535
    inverted = False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        largest = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else largest
        inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # white is zero; Pillow heeds it up to 8 bits
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > largest:
        raise ImageError(f"integer pixels out of range: expected 0..{largest}, found {low}..{high}")
    table = (np.arange(largest + 1, dtype=np.uint32) * 255 + largest // 2) // largest
    grey = (255 - table if inverted else table).astype(np.uint8)[values]
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = _BACKGROUND[0]
    return Image.fromarray(grey).convert("RGB")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:160] or type(error).__name__
    if text == "not identified by this driver":
        return "damaged header, or zero size"
    return text if "truncated" in text.lower() else f"damaged: {text}"
