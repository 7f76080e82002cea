"""Decoding what people really have: rotated, transparent, 16-bit, CMYK, truncated, and hostile files."""

import io
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from photos import picture
from PIL import Image, ImageOps, PngImagePlugin

from sami_cache.data.images import decode_image, decode_jpeg, encode_jpeg, jpeg_size
from sami_cache.errors import ImageError


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def colourful(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth and without any symmetry."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    return Image.fromarray((np.stack([x, y, (1 - x) * (1 - y) ** 2], axis=-1) * 255).astype(np.uint8))


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_deflate"})],
)
def test_lossless_formats_give_the_pixels_back(form, options):
    image = colourful()
    np.testing.assert_array_equal(pixels(encoded(image, form, **options)), np.asarray(image))


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_come_close(form):
    image = colourful()
    assert np.abs(pixels(encoded(image, form, quality=95)).astype(int) - np.asarray(image)).mean() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = encoded(colourful(), form, exif=exif, **options)
    shown = pixels(data).astype(int)
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
    upright |= {6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2), 8: np.rot90}
    expected = upright[orientation](np.asarray(colourful()).astype(int))
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 3
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(shown, np.asarray(reference))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff garbage"])
def test_damaged_exif_does_not_cost_the_image(form, exif):
    assert decode_image(encoded(colourful(), form, exif=exif)).size == (64, 48)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_grey_is_scaled_not_clipped(order):
    ramp = np.array([[0, 257, 300, 32896, 65278, 65535]], dtype=np.uint16)
    expected = [0, 1, 1, 128, 254, 255]
    rows = b"\0" + ramp.astype(">u2").tobytes()
    assert pixels(png(6, 1, bits=16, colour=0, rows=rows))[0].tolist() == [[v] * 3 for v in expected]
    image = Image.frombytes("I;16B" if order == ">" else "I;16", (6, 1), ramp.astype(order + "u2").tobytes())
    assert pixels(encoded(image, "TIFF"))[0, :, 1].tolist() == expected


def test_16_bit_tiff_with_white_as_zero_is_inverted():
    ramp = Image.frombytes("I;16", (3, 1), np.array([0, 257, 65535], dtype="<u2").tobytes())
    assert pixels(encoded(ramp, "TIFF", tiffinfo={262: 0}))[0, :, 0].tolist() == [255, 254, 0]


def test_16_bit_grey_with_a_transparent_value_is_white_there():
    rows = b"\0" + np.array([5000, 40000], dtype=">u2").tobytes()
    body = struct.pack(">H", 5000)
    transparent = struct.pack(">I", 2) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    assert pixels(png(2, 1, bits=16, colour=0, rows=rows, extra=transparent))[0, :, 0].tolist() == [255, 156]


def test_32_bit_integers_within_16_bits_are_scaled_others_refused():
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 255]
    image = Image.fromarray(np.array([[-5, 70000]], dtype=np.int32))
    with pytest.raises(ImageError, match=r"integer pixels out of range: expected 0\.\.65535, found -5\.\.70000"):
        decode_image(encoded(image, "TIFF"))


def test_float_tiff_is_refused_with_the_reason():
    with pytest.raises(ImageError, match="floating-point pixels: expected 8-bit or 16-bit integers"):
        decode_image(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "white": (255, 255, 255), "black": (0, 0, 0), "blue": (0, 0, 255)}


@pytest.mark.parametrize("name", COLOURS)
def test_cmyk_jpeg_with_adobe_inversion(name):
    flat = np.array(Image.new("RGB", (16, 16), COLOURS[name]).convert("CMYK"))
    data = encoded(Image.fromarray(flat, "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(pixels(data).astype(int) - COLOURS[name]).max() <= 3


def test_ycck_jpeg():
    """The marker's transform flag says that the first three channels hold the inks as if they were RGB, in YCbCr."""
    inks = np.array(Image.new("RGB", (16, 16), (255 - 200, 255 - 40, 255 - 90)).convert("YCbCr"))
    stored = np.concatenate([inks, np.full((16, 16, 1), 255, np.uint8)], axis=-1)  # 255: no black ink, as Adobe writes it
    data = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=98, subsampling=0))
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data[place] = 2
    assert np.abs(pixels(bytes(data)).astype(int) - (200, 40, 90)).max() <= 4


def test_hidden_colours_do_not_show():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(255, 0, 255, 0), (0, 0, 0, 128), (10, 20, 30, 255)]
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        shown = pixels(encoded(Image.fromarray(rgba), form, **options))[0].tolist()
        assert shown == [[255, 255, 255], [127, 127, 127], [10, 20, 30]], form
    grey_alpha = Image.fromarray(np.array([[[7, 0], [7, 255]]], np.uint8), "LA")
    assert pixels(encoded(grey_alpha, "PNG"))[0, :, 0].tolist() == [255, 7]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_with_transparency(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert pixels(encoded(image, "PNG"))[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert pixels(encoded(image, "PNG", transparency=transparency))[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_one_bit_grey_and_transparent_rgb():
    bits = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    for form in ("PNG", "BMP", "TIFF"):
        assert pixels(encoded(bits, form))[0, :, 2].tolist() == [0, 255, 0]
    assert pixels(encoded(Image.new("L", (1, 1), 77), "JPEG"))[0, 0].tolist() == [77, 77, 77]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encoded(keyed, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [4, 5, 6]]


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_first_frame_of_several(form, options):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as check:
        assert check.n_frames == 3
    assert (pixels(data) == (255, 0, 0)).all()


def test_first_picture_of_an_mpo():
    data = encoded(colourful(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))], quality=95)
    assert np.abs(pixels(data).astype(int) - np.asarray(colourful())).mean() < 3


@pytest.mark.parametrize("data", [b"<html>", b"GIF89a........", encoded(Image.new("L", (3, 3)), "GIF"), b"%PDF-1.4"])
def test_other_contents_are_named(data):
    with pytest.raises(
        ImageError, match=r"^not an image: expected JPEG, PNG, WebP, BMP or TIFF, found bytes that start with '"
    ):
        decode_image(data)


def test_no_bytes():
    with pytest.raises(ImageError, match=r"^empty: zero bytes$"):
        decode_image(b"")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("WEBP", {}), ("TIFF", {})],
)
def test_truncated_files_are_refused_never_filled_with_grey(form, options, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    data = encoded(noise, form, **options)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: int(len(data) * share)])
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def webp_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (4, 4)), "WEBP", lossless=True))
    assert data[12:16] == b"VP8L"
    data[21:25] = (int.from_bytes(data[21:25], "little") >> 28 << 28 | width - 1 | height - 1 << 14).to_bytes(4, "little")
    return bytes(data)


def tiff_header(width: int, height: int, tags: dict[int, int]) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1} | tags
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (png(60000, 60000), "60000x60000"),
        (png(2**31 - 1, 2**31 - 1), "2147483647x2147483647"),
        (webp_header(16383, 16383), "16383x16383"),
        (tiff_header(60000, 60000, {273: 8, 278: 60000, 279: 1}), "60000x60000"),
        (b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0), "30000x30000"),
    ],
    ids=["png", "png-huge", "webp", "tiff", "bmp"],
)
def test_bombs_are_refused_from_the_header(data, found):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        with pytest.raises(ImageError, match=f"^too many pixels: expected at most 100000000, found {found}$"):
            decode_image(data)
    assert time.perf_counter() - start < 0.1
    assert caught == []


def test_the_limit_is_exact_and_adjustable():
    data = encoded(colourful(40, 25), "PNG")
    assert decode_image(data, max_pixels=1000).size == (40, 25)
    with pytest.raises(ImageError, match="expected at most 999, found 40x25"):
        decode_image(data, max_pixels=999)


def test_zero_size():
    with pytest.raises(ImageError, match="damaged header, or zero size"):
        decode_image(png(0, 5))


def test_text_bombs_and_giant_tiff_tiles():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 80_000_000, zip=True)
    with pytest.raises(ImageError, match=r"[Dd]ecompressed data too large"):
        decode_image(encoded(colourful(), "PNG", pnginfo=text))
    data = tiff_header(64, 48, {322: 60000, 323: 60000, 324: 8, 325: 1})
    with pytest.raises(ImageError, match=r"too many pixels: expected at most .*, found a tile of 60000x60000"):
        decode_image(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_damage_anywhere_gives_an_image_or_a_reason(form):
    whole = encoded(colourful(), form, **({"compression": "tiff_lzw"} if form == "TIFF" else {}))
    rng = np.random.default_rng(1)
    reasons = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(300):
            data = bytearray(whole)
            for place in rng.integers(0, min(len(data), 400), 6):
                data[place] = rng.integers(0, 256)
            try:
                assert decode_image(bytes(data), max_pixels=1_000_000).mode == "RGB"
            except ImageError as error:
                reasons.append(str(error))
    assert reasons
    assert all("\n" not in reason and 0 < len(reason) < 250 for reason in reasons)
    assert [str(warning.message) for warning in caught] == []


def test_an_interrupt_is_not_an_image_error(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_image(encoded(colourful(), "PNG"))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (341, 256)), ((480, 640), (256, 341)), ((300, 200), (300, 200)), ((256, 9000), (256, 9000))],
)
def test_encode_reduces_the_short_side_and_never_enlarges(size, expected):
    assert decode_image(encode_jpeg(colourful(*size))).size == expected


def test_encode_filters_before_it_reduces():
    """Stripes finer than the result's pixels must become grey, not stripes of another width."""
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    small = pixels(encode_jpeg(Image.fromarray(stripes)))[8:-8, 8:-8].astype(int)
    assert np.abs(small - 127).max() <= 3


def test_encoded_file_is_bare_baseline_420_and_repeatable():
    image = colourful(600, 400)
    image.info = {"comment": b"secret", "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0", "icc_profile": b"profile", "dpi": (300, 300)}
    data = encode_jpeg(image)
    assert data == encode_jpeg(image.copy())
    assert image.info["comment"] == b"secret"
    assert b"secret" not in data
    assert b"profile" not in data
    assert b"Exif" not in data
    with Image.open(io.BytesIO(data)) as check:
        assert check.layer[0][1:3] == (2, 2)
        assert check.layer[1][1:3] == (1, 1)
        assert "progressive" not in check.info
    assert b"\xff\xc0" in data
    assert len(encode_jpeg(image, quality=50)) < len(data) < len(encode_jpeg(image, quality=98))


def test_encode_refuses_what_jpeg_cannot_hold():
    with pytest.raises(ImageError, match="too elongated for JPEG: expected at most 65500 pixels a side, found 70000x2"):
        encode_jpeg(Image.new("RGB", (70000, 2)))


def test_threads_agree():
    files = [encoded(colourful(200 + i, 150), "JPEG") for i in range(40)]
    alone = [encode_jpeg(decode_image(data), short_side=64) for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: encode_jpeg(decode_image(data), short_side=64), files))
    assert together == alone


def test_cached_jpegs_decode_to_pillows_pixels_bit_for_bit():
    """Odd sizes and chroma that is sampled down; the second call uses the first one's memory again."""
    rng = np.random.default_rng(0)
    for name, side in (("chelsea", 256), ("coffee", 97), ("astronaut", 33)):
        data = encode_jpeg(picture(name).convert("RGB"), short_side=side)
        assert (decode_jpeg(data) == np.asarray(Image.open(io.BytesIO(data)))).all()
    noise = encode_jpeg(Image.fromarray(rng.integers(0, 256, (41, 67, 3), np.uint8)))
    assert (decode_jpeg(noise) == np.asarray(Image.open(io.BytesIO(noise)))).all()
    assert decode_jpeg(noise).shape[1::-1] == jpeg_size(67, 41)
    with pytest.raises(ImageError):
        decode_jpeg(noise[: len(noise) // 2])
    with pytest.raises(ImageError):
        decode_jpeg(b"no JPEG")
