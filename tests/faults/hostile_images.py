"""Hostile pictures from a seed: every format and what breaks it, bombs, and other things named like pictures."""

import io
import random
import struct
import zlib
from contextlib import suppress
from functools import lru_cache

from photos import picture
from PIL import Image

EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_TIFF = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg", "zstd", "lzma")
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@lru_cache
def good_images() -> dict[str, bytes]:
    """Name with extension -> bytes: small, whole pictures of every kind that Pillow writes, and Adam7."""
    photo = picture("chelsea").resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear, palette = photo.convert("RGBA"), photo.convert("P")
    clear.putalpha(120)
    frames = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    pages = {"save_all": True, "append_images": [photo.rotate(90)]}  # an image remembers the options it was last saved with
    wide = Image.frombytes("I;16", photo.size, bytes(range(256)) * 18 + bytes(192))
    wanted: dict[str, tuple[Image.Image, dict]] = {
        "baseline.jpg": (photo, {}),
        "progressive.jpg": (photo, {"progressive": True}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "grey.jpg": (photo.convert("L"), {}),
        "exif.jpeg": (photo, {"exif": exif, "comment": "c" * 300, "icc_profile": bytes(500), "subsampling": 0}),
        "two.mpo": (photo, frames),
        "rgb.png": (photo, {"exif": exif}),
        "rgba.png": (clear, {}),
        "wide.png": (wide, {}),
        "palette.png": (palette, {"transparency": 3}),
        "bits.png": (photo.convert("1"), {}),
        "frames.png": (photo, {**frames, "duration": 10}),
        "lossy.webp": (photo, {"exif": exif}),
        "lossless.webp": (clear, {"lossless": True}),
        "frames.webp": (photo, {**frames, "duration": 10}),
        "rgb.bmp": (photo, {}),
        "palette.bmp": (palette, {}),
        "bits.bmp": (photo.convert("1"), {}),
        **{f"{name}.tif": (photo, {"compression": name}) for name in _TIFF},
        **{f"{name}.tiff": (photo.convert("1"), {"compression": name}) for name in ("group3", "group4", "tiff_ccitt")},
        "wide.tif": (wide, {}),
        "cmyk.tif": (photo.convert("CMYK"), {"compression": "tiff_lzw"}),
        "float.tif": (photo.convert("F"), {}),
        "big.tif": (photo, {"big_tiff": True, "exif": exif}),
        "pages.tif": (photo, pages),
    }
    made = {"adam7.png": _png(60, 40, 2, _adam7(60, 40), depth=8, interlace=1)}
    for name, (image, options) in wanted.items():
        buffer = io.BytesIO()
        kind = {"mpo": "MPO", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}.get(name.split(".")[1])
        with suppress(OSError):  # not every libtiff has every compression
            image.copy().save(buffer, kind or ("TIFF" if name.split(".")[1].startswith("tif") else "JPEG"), **options)
            made[name.replace(".mpo", ".jpg")] = buffer.getvalue()
    return made


def other_formats() -> dict[str, bytes]:
    """What is no supported picture, under the name of one; an EPS would be a program for Ghostscript to run."""
    made = {}
    for kind in ("GIF", "PPM", "ICO", "PDF", "EPS", "TGA", "PCX"):
        buffer = io.BytesIO()
        picture("coffee").resize((20, 20)).save(buffer, kind)
        made[f"{kind}.jpg"] = buffer.getvalue()
    texts = {"svg.png": b"<svg onload='x()'/>", "empty.jpg": b"", "magic.png": b"\x89PNG\r\n\x1a\n", "soi.jpg": b"\xff\xd8\xff"}
    return (
        made
        | texts
        | {"zeros.webp": bytes(5000), "riff.webp": b"RIFF\xff\xff\xff\xffWEBP", "bm.bmp": b"BM", "ii.tif": b"II*\0"}
    )


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """`data`, damaged in one to three ways."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice((_flip, _flip, _overwrite, _truncate, _insert, _splice, _length, _length, _repeat))(rng, data, other)
    return data


def hostile_image(rng: random.Random) -> tuple[str, bytes]:
    """Its kind's name, and its bytes."""
    kinds = good_images()
    name = rng.choice(sorted(kinds))
    data, other = kinds[name], kinds[rng.choice(sorted(kinds))]
    if rng.random() < 0.03:
        return name, data
    if rng.random() < 0.2:
        data = _claim(rng, name, data)
    if rng.random() < 0.85:
        data = mutate(rng, data, other)
    if name.endswith(".png") and rng.random() < 0.6:
        data = _mend_png(data)
    return name, data


def _flip(rng: random.Random, data: bytes, _: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 5, 20)) if out else 0):
        out[rng.randrange(rng.choice((len(out), min(len(out), 200))))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _overwrite(rng: random.Random, data: bytes, _: bytes) -> bytes:
    start, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 30, 300))
    return data[:start] + rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length))) + data[start + length :]


def _truncate(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(rng: random.Random, data: bytes, _: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 3, 50, 5000))) + data[start:]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _length(rng: random.Random, data: bytes, _: bytes) -> bytes:
    width = rng.choice((2, 4, 4, 8))
    start = rng.randrange(rng.choice((len(data), min(len(data), 300))) + 1)
    value = rng.choice(EXTREMES) & ((1 << 8 * width) - 1)
    return data[:start] + value.to_bytes(width, rng.choice(("big", "little"))) + data[start + width :]


def _repeat(rng: random.Random, data: bytes, _: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((10, 100, 1000))]
    return data[:start] + piece * rng.choice((2, 50, 500)) + data[start:]


def _claim(rng: random.Random, name: str, data: bytes) -> bytes:
    """The same picture with other sides in its header."""
    sides = [rng.choice((0, 1, 61, 9_000, 16_383, 65_535, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)) for _ in range(2)]
    short = [side & 0xFFFF for side in sides]
    out = bytearray(data)
    if name.endswith(".png"):
        struct.pack_into(">II", out, 16, *sides)
        return _mend_png(bytes(out))
    if name.endswith(".bmp"):
        struct.pack_into("<II", out, 18, *sides)
    elif name.endswith(".webp"):
        if out[12:16] == b"VP8X":
            out[24:30] = (sides[0] & 0xFFFFFF).to_bytes(3, "little") + (sides[1] & 0xFFFFFF).to_bytes(3, "little")
        else:
            struct.pack_into("<HH", out, 26, *short)
    elif name.endswith((".tif", ".tiff")):
        _edit_tag(out, rng.choice((256, 257, 258, 259, 262, 273, 277, 278, 279, 322, 323)), rng.choice(EXTREMES))
    else:
        start = max(out.find(b"\xff\xc0"), out.find(b"\xff\xc2"))
        struct.pack_into(">HH", out, start + 5, *short)
    return bytes(out)


def _edit_tag(out: bytearray, tag: int, value: int) -> None:
    """Another value for a tag of the first directory of a classic little-endian TIFF."""
    if out[:4] != b"II*\0":
        return
    (start,) = struct.unpack_from("<I", out, 4)
    (count,) = struct.unpack_from("<H", out, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", out, place)[0] == tag:
            struct.pack_into("<HHII", out, place, tag, 4, 1, value & 0xFFFFFFFF)


def _mend_png(data: bytes) -> bytes:
    """Right checksums, so that what is wrong inside the chunks is looked at."""
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, place)
        end = place + 8 + length
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(
    width: int, height: int, colour: int, packed: bytes, *, depth: int = 1, interlace: int = 0, extra: bytes = b""
) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + extra + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _adam7(width: int, height: int) -> bytes:
    rows = b""
    for x, y, step_x, step_y in _ADAM7:
        columns, lines = -(-(width - x) // step_x), -(-(height - y) // step_y)
        rows += (b"\0" + bytes(range(3 * columns))) * lines
    return zlib.compress(rows)


def _zeros(count: int) -> bytes:
    packer = zlib.compressobj(1)
    block = bytes(1 << 20)
    parts = [packer.compress(block[: min(len(block), count - start)]) for start in range(0, count, len(block))]
    return b"".join(parts) + packer.flush()


def _tiff(width: int, height: int, packed: bytes, **tags: int) -> bytes:
    """A 1-bit TIFF of one deflated strip; `tags` by number as t322=65536."""
    values = {256: width, 257: height, 258: 1, 259: 8, 262: 1, 273: 8, 277: 1, 278: height, 279: len(packed)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    directory = struct.pack("<H", len(values)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + directory


def _scans(side: int, count: int) -> bytes:
    """A progressive JPEG of side x side whose last scan comes `count` times: every one walks over all blocks."""
    data = good_images()["progressive.jpg"]
    start, last = data.find(b"\xff\xc2"), data.rfind(b"\xff\xda")
    header = bytearray(data[:last])
    struct.pack_into(">HH", header, start + 5, side, side)
    return bytes(header) + data[last:-2] * count + b"\xff\xd9"


@lru_cache
def bombs() -> dict[str, bytes]:
    """Small files that claim, or truly decode to, far more than they are."""
    giant = _zeros(30_000 * (1 + 30_000 // 8))
    text = b"note\0\0" + _zeros(300_000_000)
    rle = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 70, 0, 0, 54, 40, 9_900, 9_900, 1, 8, 1, 16, 0, 0, 0, 0) + b"\xff\x01" * 8
    bmp = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 70, 0, 0, 54, 40, 30_000, -(2**31), 1, 24, 0, 16, 0, 0, 0, 0)
    webp = bytearray(good_images()["frames.webp"])
    webp[24:30] = b"\xff\x3f\0\xff\x3f\0"
    small = zlib.compress(bytes(100))
    return {
        "decodes.png": _png(30_000, 30_000, 0, giant),
        "decodes.tif": _tiff(30_000, 30_000, giant),
        "claims.png": _png(0x7FFFFFFF, 0x7FFFFFFF, 0, small),
        "line.png": _png(100_000_000, 1, 0, _zeros(12_500_001)),
        "below.png": _png(9_900, 9_900, 0, _zeros(9_900 * (1 + -(-9_900 // 8)))),
        "surplus.png": _png(10, 10, 0, giant),
        "ztxt.png": _png(10, 10, 0, small, extra=_chunk(b"zTXt", text)),
        "ztxts.png": _png(10, 10, 0, small, extra=_chunk(b"zTXt", b"note\0\0" + _zeros(1_000_000)) * 300),
        "itxt.png": _png(10, 10, 0, small, extra=_chunk(b"iTXt", b"note\0\1\0\0\0" + text[6:])),
        "iccp.png": _png(10, 10, 0, small, extra=_chunk(b"iCCP", text)),
        "giant.webp": bytes(webp),
        "rle.bmp": rle,
        "negative.bmp": bmp,
        "tile.tif": _tiff(100, 100, small, t322=65_536, t323=65_536, t324=8, t325=len(small)),
        "strip.tif": _tiff(100, 100, small, t278=0xFFFFFFFF),
        "samples.tif": _tiff(9_000, 9_000, small, t277=0xFFFF, t258=16),
        "loop.tif": struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 256, 4, 1, 100, 8),
        "count.tif": struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 256, 4, 0xFFFFFFFF, 100, 0),
        "bigtiff.tif": struct.pack("<2sHHHQQHHQQQ", b"II", 43, 8, 0, 16, 1, 256, 16, 1 << 62, 1 << 62, 16),
        "scans.jpg": _scans(9_900, 20),
        "wide.jpg": _scans(65_500, 1),
    }
