"""Hostile sources from a seed: folders of things that are no files, tars and Parquet files that lie."""

import io
import json
import os
import random
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hostile_images import bombs, good_images, hostile_image, mutate, other_formats

HUGE = 1 << 62
DEEP = "[" * 100_000


def special_folder(folder: Path, rng: random.Random) -> list[str]:
    """Fill `folder` with good pictures, and with everything else that a directory can hold; returns what was made."""
    good = good_images()
    folder.mkdir(parents=True)
    for name in ("baseline.jpg", "rgb.png", "wide.tif", "lossless.webp"):
        (folder / name).write_bytes(good[name])
    photo = good["baseline.jpg"]
    root = os.fsencode(folder) + b"/"
    for number in range(4):  # names, all of them of pictures that can be read
        odd = rng.choice(
            (b"\xff\xfe", b"new\nline", b"\x1b[2J", b"back\\slash", b"..", b"tab\t", b"\xed\xa0\x80", "ü😀\u202e".encode())
        )
        (Path(os.fsdecode(root + b"%d" % number + odd + b".jpg"))).write_bytes(photo)
    (folder / ("n" * 251 + ".jpg")).write_bytes(photo)
    os.mkfifo(folder / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()  # a socket's address has 108 bytes, not enough for a path
        os.chdir(folder)
        server.bind("socket.png")
        os.chdir(here)
    for number, target in enumerate(
        ("/dev/zero", "/dev/full", "/dev/random", "/dev/tty", "/proc/self/mem", "nowhere", "", "fifo.jpg")
    ):
        if target:
            (folder / f"link{number}.jpg").symlink_to(target)
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "ping.png").symlink_to("pong.png")
    (folder / "pong.png").symlink_to("ping.png")
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "up").symlink_to("..")
    (folder / "folder.jpg" / "up.png").symlink_to("../..")
    with open(folder / "sparse.bmp", "wb") as file:
        file.write(b"BM")
        file.truncate(rng.choice((HUGE >> 20, 1 << 28, (1 << 30) + 1)))
    return [str(path) for path in folder.rglob("*")]


def deep_folder(folder: Path) -> list[str]:
    """Folders within folders, beyond the longest path that the kernel takes."""
    folder.mkdir(parents=True)
    (folder / "good.jpg").write_bytes(good_images()["baseline.jpg"])
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=descriptor)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    return ["deep"]


def image_folder(folder: Path, rng: random.Random, count: int, extra: dict[str, bytes]) -> list[str]:
    """`count` hostile pictures in one folder, `extra` beside them, and a few good ones so that there is something to fit on."""
    folder.mkdir(parents=True)
    files = {f"good-{name}": data for name, data in good_images().items() if name != "float.tif"}
    files |= {f"extra-{name}": data for name, data in extra.items()}
    for number in range(count):
        name, data = hostile_image(rng)
        files[f"{number:05d}-{name}"] = data
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return list(files)


def all_bombs() -> dict[str, bytes]:
    return bombs() | other_formats()


# Tars


def _header(name: str, size: bytes = b"%011o\0" % 0, kind: bytes = b"0", link: str = "", **fields: bytes) -> bytes:
    """A header with any size field and a right checksum."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    out = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    out[124:136] = size
    for start, value in ((int(place[1:]), value) for place, value in fields.items()):
        out[start : start + len(value)] = value
    out[148:156] = b" " * 8
    out[148:156] = b"%06o\0 " % sum(out)
    return bytes(out)


def _member(name: str, data: bytes, kind: bytes = b"0", link: str = "") -> bytes:
    return _header(name, b"%011o\0" % len(data), kind, link) + data + bytes(-len(data) % 512)


def _pax(**records: str) -> bytes:
    lines = b""
    for name, value in records.items():
        body = b" " + name.replace("_", ".").encode() + b"=" + value.encode("utf-8", "surrogateescape") + b"\n"
        length = len(body) + len(str(len(body) + len(str(len(body)))))
        lines += str(length).encode() + body
    return _member("pax", lines, b"x")


def _base256(size: int) -> bytes:
    return (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)


def hostile_tar(rng: random.Random, outside: str) -> bytes:
    """A tar with good members and a few hostile ones, damaged in half of the cases; `outside`: a path to climb to."""
    photo = rng.choice([good_images()[name] for name in ("baseline.jpg", "rgb.png", "lossy.webp")])
    name, data = hostile_image(rng)
    size = rng.choice((HUGE, -1, -512, -HUGE, (1 << 87) - 1, -(1 << 87), 1 << 33, 1 << 40))
    number = rng.choice((str(HUGE), "-1", "1" * 5000, "nan", "1e400", "", "0x10", "\0"))
    makers: list[Callable[[], bytes]] = [
        lambda: _member("../" * rng.randrange(1, 30) + rng.choice(("x.jpg", outside.lstrip("/") + "/x.jpg")), photo),
        lambda: _member(f"{outside}/x.jpg"[:100], photo),
        lambda: _header(
            "link.jpg", kind=rng.choice((b"1", b"2")), link=rng.choice((outside, "/dev/zero", "../../x", "link.jpg"))[:100]
        ),
        lambda: _header("device.jpg", kind=rng.choice((b"3", b"4", b"6", b"7", b"5", b"Z", b"\0", b"V", b"M"))),
        lambda: _header("size.jpg", _base256(size)),
        lambda: _header(
            "octal.jpg", rng.choice((b"77777777777\0", b"-0000000001\0", b"99999999999\0", b" " * 12, b"\xff" * 12))
        ),
        lambda: _header("sparse.jpg", kind=b"S", p386=b"77777777777\0" * 8, p482=b"\1", p483=b"77777777777\0") + bytes(512),
        lambda: _header("sparse.jpg", kind=b"S", p386=_base256(size) * 8, p483=_base256(HUGE)) + bytes(512),
        lambda: (
            _pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=number) + _member("s.jpg", number.encode() * 3)
        ),
        lambda: _pax(GNU_sparse_map=f"0,{number},{number},1", GNU_sparse_size=number) + _member("s.jpg", photo),
        lambda: _pax(size=number) + _member("pax.jpg", photo),
        lambda: _pax(path="../" * 5000 + "x.jpg", mtime=number, uid=number, linkpath=outside) + _member("pax.jpg", photo),
        lambda: _pax(path="a\0b\n\x1b[2J\udcff.jpg", hdrcharset=rng.choice(("BINARY", "x" * 999))) + _member("pax.jpg", photo),
        lambda: _pax(comment="c" * 100_000) * rng.choice((1, 30)) + _member("pax.jpg", photo),
        lambda: _header("pax", _base256(1 << 34), b"x") + b"30 path=" + b"x" * 504,
        lambda: _member(
            "pax", rng.choice((b"99999999999999999999 a=b\n", b"0 =\n", b"-5 a=b\n", b"\xff" * 40, b"5 a=b")), b"x"
        ),
        lambda: _member("g", b"12 path=x.p\n", b"g"),
        lambda: _member("././@LongLink", ("../" * 700 + "long.jpg\0").encode(), b"L") + _member("short", photo),
        lambda: _header("././@LongLink", _base256(size), b"L") + bytes(512) + _member("short", photo),
        lambda: _member("././@LongLink", b"x.jpg\0", b"L") * rng.choice((2, 3000)) + _member("short", photo),
        lambda: _member("same.jpg", b"") * 1000 + _member("same.jpg", photo),
        lambda: (
            _member("n.cls", rng.choice((b"9" * 30, b"-1", b"1" * 5000, b"1e5", b"\xd9\xa3", b"\xff")))
            + _member("n.jpg", photo)
        ),
        lambda: (
            _member("n.json", rng.choice((DEEP, json.dumps({"label": 1 << 70}), '{"label": NaN}', '{"cls": 1e999}')).encode())
            + _member("n.jpg", photo)
        ),
        lambda: _header("n.cls", _base256(1 << 19)) + bytes(512),
        lambda: _member(f"x{name}", data),
        lambda: _member(
            rng.choice(("", "/", ".", "..", ".jpg", "a/.jpg", "a//b.jpg", "\n.jpg", "\udcff.jpg", "con.jpg ")), photo
        ),
    ]
    parts = [_member(f"{number}.jpg", photo) for number in range(3)]
    parts += [rng.choice(makers)() for _ in range(rng.choice((1, 1, 2, 4)))]
    rng.shuffle(parts)
    tar = b"".join(parts) + bytes(rng.choice((1024, 1024, 0, 512)))
    return mutate(rng, tar, data) if rng.random() < 0.4 else tar


# Parquet


def hostile_parquet(rng: random.Random) -> bytes:
    """Odd columns, or a footer that claims what it likes, or plain damage."""
    table = _odd_table(rng) if rng.random() < 0.3 else _plain_table(rng)
    sink = io.BytesIO()
    compression = rng.choice(("none", "zstd", "snappy", "gzip"))
    pq.write_table(table, sink, compression=compression, row_group_size=rng.choice((100, 1000)))
    data = sink.getvalue()
    if rng.random() < 0.5:
        data = _lie(rng, data)
    return mutate(rng, data, good_images()["rgb.png"]) if rng.random() < 0.3 else data


ROWS = 150


def _plain_table(rng: random.Random) -> pa.Table:
    photo = good_images()["lossy.webp"]
    images = [photo] * ROWS
    image = rng.choice((images, [{"bytes": data, "path": "../../x.jpg"} for data in images]))
    return pa.table({"image": image} | rng.choice(({}, {"label": [1] * ROWS})))


def _odd_table(rng: random.Random) -> pa.Table:
    photo = good_images()["baseline.jpg"]
    features = {"info": {"features": {"label": {"names": rng.choice((["a"], "ab", 7, [[]], {"x": 1})), "_type": "ClassLabel"}}}}
    hints = rng.choice((DEEP, json.dumps(features), '{"info": {"features": ' + '{"a":' * 50_000, "\xff", "{}", "null", "[]"))
    twice = pa.table([[photo] * 3, [1, 2, 3], [4, 5, 6]], names=["image", "label", "label"])
    return rng.choice(
        (
            lambda: twice,
            lambda: pa.table([[photo], [photo]], names=["image", "image"]),
            lambda: pa.table({"image": [photo] * 3, "label": [0, 0, 0]}).replace_schema_metadata({"huggingface": hints}),
            lambda: pa.table({"image": [photo], "label": pa.array([(1 << 64) - 1], pa.uint64())}),
            lambda: pa.table({"image": [[photo]]}),
            lambda: pa.table({"image": ["text"], "label": ["text"]}),
            lambda: pa.table({"image": [{"bytes": {"bytes": photo}}]}),
            lambda: pa.table({"image": [{"bytes": photo, "path": {"a": [1]}}]}),
            lambda: pa.table({"image": [{"bytes": None, "path": "/dev/zero"}, {"bytes": photo, "path": "\n\x1b[2J"}]}),
            lambda: pa.table({"image.bytes": [photo], "image": [{"bytes": photo}]}),
            lambda: pa.table({"a\n\x1b[2J": [photo], "b" * 100_000: [photo]}),
            lambda: pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}),
            lambda: pa.table({"image": pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array([photo]))}),
            lambda: pa.table({"image": [bytes(64 << 20)] * 4}),
            lambda: pa.table({"image": [hostile_image(rng)[1] for _ in range(20)], "label": [-HUGE] * 20}),
        )
    )()


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _lie(rng: random.Random, data: bytes) -> bytes:
    """Other numbers in the footer: one of the row counts, all of them, or anything that looks like a number."""
    length = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - length], data[-8 - length : -8]
    claim = _varint(2 * rng.choice((HUGE, HUGE - 1, 1 << 40, 1 << 31, 100_000_000, 149, 151, 0)) + rng.choice((0, 0, 1)))
    rows = _varint(2 * ROWS)
    places = [place for place in range(len(footer)) if footer.startswith(rows, place)]
    chosen = rng.choice((places, places[-1:], places[:1], [rng.randrange(len(footer)) for _ in range(2)]))
    for place in sorted(chosen, reverse=True):
        end = place
        while end < len(footer) - 1 and footer[end] & 0x80:
            end += 1
        footer = footer[:place] + claim + footer[end + 1 :]
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"
