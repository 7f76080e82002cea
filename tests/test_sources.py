"""Folders, tars and Parquet files as people have them: nested, linked, misnamed, damaged."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3

from sami_cache.data.sources import ParquetSource, open_source
from sami_cache.errors import ImageError, SamiCacheError


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {name}".encode())


def make_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(source) -> dict[str, bytes]:
    return {key: source.read(i) for i, key in enumerate(source.keys)}


# folders


def test_folder_keys_order_and_classes(tmp_path):
    names = ["b/x/2.PNG", "b/1.jpeg", "a/1.JPG", "a/10.jpg", "a/9.webp", "Z.bmp", "a.tif", "ä/ü.tiff"]
    put(tmp_path, *names, "a/notes.txt", "a/noextension", ".hidden/1.jpg", "a/._1.jpg")
    source = open_source(tmp_path)
    assert source.kind == "folder"
    assert source.keys == sorted(names, key=lambda name: blake3(name.encode()).digest())
    assert source.class_names == ["a", "b", "b/x", "ä"]
    numbers = dict(zip(source.keys, source.labels, strict=True))
    assert numbers == {"Z.bmp": None, "a.tif": None, "a/1.JPG": 0, "a/10.jpg": 0, "a/9.webp": 0} | {
        "b/1.jpeg": 1,
        "b/x/2.PNG": 2,
        "ä/ü.tiff": 3,
    }
    assert len(source) == 8
    assert contents(source) == {name: f"bytes of {name}".encode() for name in names}


def test_folder_of_images_alone_has_no_labels(tmp_path):
    put(tmp_path, "1.jpg", "2.jpg")
    source = open_source(tmp_path)
    assert source.labels == [None, None]
    assert source.class_names is None


def test_index_out_of_range(tmp_path):
    put(tmp_path, "1.jpg")
    for index in (-1, 1):
        with pytest.raises(IndexError):
            open_source(tmp_path).read(index)


def test_relative_path_survives_a_change_of_folder(tmp_path, monkeypatch):
    put(tmp_path, "data/1.jpg")
    monkeypatch.chdir(tmp_path)
    source = open_source(Path("data"))
    monkeypatch.chdir("/")
    assert source.location == tmp_path / "data"
    assert source.read(0) == b"bytes of data/1.jpg"


def test_links_are_followed_and_loops_end(tmp_path):
    put(tmp_path, "outside/far/1.jpg", "root/real/2.jpg")
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "self").symlink_to("self")
    (root / "real" / "up").symlink_to("..")
    (root / "file.jpg").symlink_to(tmp_path / "outside/far/1.jpg")
    (root / "dangling.png").symlink_to("nowhere.png")
    source = open_source(root)
    assert sorted(source.keys) == ["dangling.png", "file.jpg", "linked/far/1.jpg", "real/2.jpg"]
    for key in ("file.jpg", "linked/far/1.jpg"):
        assert source.read(source.keys.index(key)) == b"bytes of outside/far/1.jpg"
    with pytest.raises(ImageError, match="cannot be read: No such file or directory"):
        source.read(source.keys.index("dangling.png"))


def test_of_two_links_to_a_folder_the_first_name_counts(tmp_path):
    put(tmp_path, "outside/1.jpg", "outside2/1.jpg", "root/readme.txt")
    for name in ("b", "a", "d", "c"):
        (tmp_path / "root" / name).symlink_to(tmp_path / ("outside" if name in "ab" else "outside2"))
    assert open_source(tmp_path / "root").keys == ["a/1.jpg", "c/1.jpg"]


def test_many_links_between_folders_stay_cheap(tmp_path):
    folders = [tmp_path / f"{i:02d}" for i in range(12)]
    for folder in folders:
        put(folder, "1.jpg")
    for folder in folders:
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    assert sorted(open_source(tmp_path).keys) == [f"{i:02d}/1.jpg" for i in range(12)]


def test_pipes_and_folders_named_like_images(tmp_path):
    put(tmp_path, "folder.jpg/1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    source = open_source(tmp_path)
    assert sorted(source.keys) == ["device.png", "folder.jpg/1.jpg", "pipe.jpg"]
    start = time.perf_counter()
    for key in ("device.png", "pipe.jpg"):
        with pytest.raises(ImageError, match=r"^not a regular file$"):
            source.read(source.keys.index(key))
    assert time.perf_counter() - start < 1


def test_names_that_are_not_utf8_or_not_printable(tmp_path):
    names = [b"caf\xe9.jpg", b"caf\\xe9.jpg", b"a\nb.jpg", "café.jpg".encode(), b"\xff/1.jpg"]
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    source = open_source(tmp_path)
    expected = {r"caf\xe9.jpg": names[0], r"caf\\xe9.jpg": names[1], r"a\x0ab.jpg": names[2], "café.jpg": names[3]}
    assert contents(source) == expected | {r"\xff/1.jpg": names[4]}
    assert source.class_names == [r"\xff"]
    "".join(source.keys).encode("utf-8")


def test_giant_files_are_not_read(tmp_path):
    with open(tmp_path / "1.jpg", "wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ImageError, match="too large: expected at most 1073741824 encoded bytes, found 1073741825"):
        open_source(tmp_path).read(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_that_cannot_be_listed(tmp_path):
    put(tmp_path, "a/1.jpg")
    (tmp_path / "a").chmod(0)
    with pytest.raises(SamiCacheError, match=r"cannot list .*/a: Permission denied"):
        open_source(tmp_path)


# tars


def test_tar_labels_order_and_names(tmp_path):
    make_tar(
        tmp_path / "sub" / "00.tar",
        [
            ("n/0002.jpg", b"two"),
            ("n/0002.cls", b" 7\n"),
            ("n/0001.json", b'{"label": 3, "other": 1}'),
            ("n/0001.webp", b"one"),
            ("n/0001.seg.png", b"mask"),
            ("../../etc/0003.jpg", b"up"),
            ("/root/0004.jpg", b"absolute"),
            ("0005.jpg", b"five"),
            ("0005.cls", b"cat"),
            ("m/0002.JPEG", b"other folder"),
            ("._0005.jpg", b"junk"),
            ("0006.jpg", b"six"),
            ("0006.json", b'{"cls": -1}'),
            ("caf\udce9.jpg", b"latin"),
        ],
    )
    make_tar(tmp_path / "01.tar", [("1.jpg", b"first"), ("1.cls", b"0")])
    source = open_source(tmp_path)
    assert source.kind == "tar"
    assert source.class_names is None
    rows = dict(zip(source.keys, zip(contents(source).values(), source.labels, strict=True), strict=True))
    assert list(rows.items()) == [
        ("01.tar/1.jpg", (b"first", 0)),
        ("sub/00.tar/n/0002.jpg", (b"two", 7)),
        ("sub/00.tar/n/0001.webp", (b"one", 3)),
        ("sub/00.tar/n/0001.seg.png", (b"mask", 3)),
        ("sub/00.tar/../../etc/0003.jpg", (b"up", None)),
        ("sub/00.tar//root/0004.jpg", (b"absolute", None)),
        ("sub/00.tar/0005.jpg", (b"five", None)),
        ("sub/00.tar/m/0002.JPEG", (b"other folder", None)),
        ("sub/00.tar/0006.jpg", (b"six", None)),
        (r"sub/00.tar/caf\xe9.jpg", (b"latin", None)),
    ]
    assert not (tmp_path.parent.parent / "etc").exists()


def test_one_tar_long_names_and_repeated_members(tmp_path):
    long = "d" * 90 + "/" + "n" * 150 + ".jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar = make_tar(tmp_path / "x.tar", [("1.jpg", b"old"), (long, b"long"), ("1.jpg", b"new")], format=form)
        assert [*contents(open_source(tar)).items()] == [(f"x.tar/{long}", b"long"), ("x.tar/1.jpg", b"new")]


def test_tar_links_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.LNKTYPE), ("3.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(SamiCacheError, match=r"its 1 tars hold no \.jpg"):
        open_source(tmp_path)


def test_truncated_tar_wherever_it_is_cut(tmp_path):
    whole = make_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"x" * 700) for i in range(4)]).read_bytes()
    members = 4 * (512 + 1024)
    for length in (0, 100, 512, 1000, 1536, 2000, members - 1, members):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        with pytest.raises(SamiCacheError, match=r"x\.tar is damaged or truncated: .*Fetch it again"):
            open_source(tmp_path)


def test_damaged_tar_header_is_not_the_end(tmp_path):
    path = make_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"x") for i in range(4)])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SamiCacheError, match=r"byte 1024: expected a header or the end mark of zeros, found neither"):
        open_source(path)


def test_tar_with_a_negative_size_does_not_loop(tmp_path):
    header = bytearray(tarfile.TarInfo("1.jpg").tobuf())
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(make_tar(tmp_path / "y", [("0.jpg", b"x")]).read_bytes()[:1024] + header + bytes(4096))
    with pytest.raises(SamiCacheError, match="damaged or truncated: byte 1024: the header gives a size of -1024"):
        open_source(tmp_path)


def test_tar_cut_after_it_was_opened(tmp_path):
    path = make_tar(tmp_path / "x.tar", [("1.jpg", b"x" * 5000)])
    source = open_source(path)
    os.truncate(path, 2000)
    with pytest.raises(ImageError, match="the tar ends early: expected 5000 bytes at 512, found 1488"):
        source.read(0)
    path.unlink()
    with pytest.raises(ImageError, match="No such file"):
        source.read(0)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "X.TAR.XZ"])
def test_compressed_tars_are_refused(tmp_path, name):
    put(tmp_path, name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(SamiCacheError, match=rf"{name} is compressed, .*`gunzip .*{name}` for gzip"):
            open_source(path)


# Parquet

FEATURES = {
    "info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}
}


def image_table(rows: int, size: int = 100, layout: str = "struct", start: int = 0) -> pa.Table:
    data = [f"{start + i}:".encode().ljust(size, b".") for i in range(rows)]
    paths = [f"{start + i}.jpg" for i in range(rows)]
    columns = {
        "struct": {"image": [{"bytes": b, "path": p} for b, p in zip(data, paths, strict=True)]},
        "flat": {"image.bytes": data, "image.path": paths},
        "flat without path": {"image.bytes": data},
        "plain": {"other": paths, "jpg": pa.array(data, pa.large_binary()), "thumbnail": [b"no"] * rows},
    }[layout]
    return pa.table(columns | {"label": [i % 3 for i in range(rows)]})


@pytest.mark.parametrize("layout", ["struct", "flat", "flat without path", "plain"])
def test_parquet_layouts(tmp_path, layout):
    (tmp_path / "deep").mkdir()
    pq.write_table(image_table(25, layout=layout), tmp_path / "deep" / "b.parquet", row_group_size=10)
    pq.write_table(image_table(5, layout=layout, start=100), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert source.kind == "parquet"
    assert source.keys[:2] == ["a.parquet/000000000", "a.parquet/000000001"]
    assert source.keys[5:] == [f"deep/b.parquet/{i:09d}" for i in range(25)]
    assert source.labels == [i % 3 for i in range(5)] + [i % 3 for i in range(25)]
    assert source.class_names is None
    numbers = [int(source.read(i).split(b":")[0]) for i in range(30)]
    assert numbers == [*range(100, 105), *range(25)]
    assert [int(source.read(i).split(b":")[0]) for i in (29, 3, 14, 15, 0)] == [24, 103, 9, 10, 100]
    assert open_source(tmp_path / "a.parquet").keys == source.keys[:5]


def test_parquet_class_names_and_missing_labels(tmp_path):
    table = image_table(3).drop_columns("label").append_column("label", pa.array([2, -1, None], pa.int32()))
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(FEATURES)}), tmp_path / "x.parquet")
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog", "eel"]
    assert source.labels == [2, None, None]


def test_parquet_label_by_the_schema_alone(tmp_path):
    features = {"info": {"features": {"species": {"names": ["cat"], "_type": "ClassLabel"}}}}
    table = image_table(2).rename_columns(["image", "species"]).set_column(1, "species", [[0, 0]])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "x.parquet")
    assert open_source(tmp_path).class_names == ["cat"]
    table = table.set_column(1, "species", [[0, 1]])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "x.parquet")
    with pytest.raises(SamiCacheError, match="has label 1, but its schema names 1 classes"):
        open_source(tmp_path)
    pq.write_table(table.replace_schema_metadata({"huggingface": "[not json"}), tmp_path / "x.parquet")
    assert open_source(tmp_path).labels == [None, None]


def test_parquet_null_bytes(tmp_path):
    rows = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "images/1.jpg"}, {"bytes": None, "path": None}, None]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    source = open_source(tmp_path)
    assert source.labels == [None] * 4
    assert source.read(0) == b"x"
    with pytest.raises(ImageError, match=r"^no image bytes, only a path: images/1\.jpg$"):
        source.read(1)
    for index in (2, 3):
        with pytest.raises(ImageError, match=r"^no image bytes$"):
            source.read(index)


def test_parquet_name_that_is_not_utf8(tmp_path):
    pq.write_table(image_table(2), tmp_path / "x.parquet")
    os.rename(tmp_path / "x.parquet", os.fsencode(tmp_path) + b"/\xe9.parquet")
    source = open_source(tmp_path)
    assert source.keys == [r"\xe9.parquet/000000000", r"\xe9.parquet/000000001"]
    assert source.read(1).startswith(b"1:")


def test_giant_row_group_is_streamed_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(ParquetSource, "run_bytes", 100_000)
    monkeypatch.setattr(ParquetSource, "cache_bytes", 300_000)
    for nested in ("struct", "flat"):
        table = image_table(3000, size=1000, layout=nested)
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=3000, compression="none", use_dictionary=False)
        source = open_source(tmp_path)
        held = []
        for i in [*range(3000), 5, 2999, 1500, 1499, 0]:
            assert source.read(i).startswith(f"{i}:".encode())
            held.append(sum(run.nbytes for run in source._runs.values()))
        assert max(held) < 400_000
        assert len(source._runs) > 1


def test_reading_in_order_decodes_each_row_group_once(tmp_path, monkeypatch):
    pq.write_table(image_table(1000), tmp_path / "x.parquet", row_group_size=100)
    source = open_source(tmp_path)
    opened = []
    stream = type(source._files[0]).stream
    monkeypatch.setattr(type(source._files[0]), "stream", lambda self, group: opened.append(group) or stream(self, group))
    for i in range(1000):
        source.read(i)
    assert opened == list(range(10))


def test_damaged_row_group_costs_its_rows_alone(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(image_table(30), path, row_group_size=10, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"15:....")] ^= 1
    path.write_bytes(data)
    source = open_source(path)
    failed = []
    for i in [*range(30), *range(30)]:
        try:
            assert source.read(i).startswith(f"{i}:".encode())
        except ImageError as error:
            failed.append((i, str(error)))
    assert [i for i, _ in failed] == [*range(10, 20)] * 2
    assert all(reason.startswith("row group 1 cannot be read: ") for _, reason in failed)


def test_damage_inside_a_giant_row_group_spares_the_rows_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ParquetSource, "run_bytes", 10_000)
    monkeypatch.setattr(ParquetSource, "cache_bytes", 10_000)
    path = tmp_path / "x.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "data_page_size": 4000}
    pq.write_table(image_table(100, size=1000, layout="plain").select(["jpg"]), path, write_batch_size=1, **options)
    data = bytearray(path.read_bytes())
    data[data.index(b"65:....")] ^= 1
    path.write_bytes(data)
    source = open_source(path)
    passes = []
    stream = type(source._files[0]).stream
    monkeypatch.setattr(type(source._files[0]), "stream", lambda self, group: passes.append(group) or stream(self, group))
    for _ in range(2):
        good = []
        for i in range(100):
            with contextlib.suppress(ImageError):
                assert source.read(i).startswith(f"{i}:".encode())
                good.append(i)
        assert 40 < len(good) <= 65
        assert good == [*range(len(good))]
    assert len(passes) <= 2


def test_parquet_that_is_none(tmp_path):
    pq.write_table(image_table(10), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    for wrong in (b"", data[:-5], b"PAR1 nonsense PAR1"):
        (tmp_path / "x.parquet").write_bytes(wrong)
        with pytest.raises(SamiCacheError, match=r"x\.parquet is not a whole Parquet file: .*Fetch it again"):
            open_source(tmp_path)
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(SamiCacheError, match=r"has no image column: .*; found text \(string\), label \(int64\)"):
        open_source(tmp_path)


# any source


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_threads_and_pickling(tmp_path, kind):
    samples = [(f"{i:04d}.jpg", f"{i}:".encode() * (1 + i % 7)) for i in range(400)]
    if kind == "folder":
        for name, data in samples:
            (tmp_path / name).write_bytes(data)
    elif kind == "tar":
        make_tar(tmp_path / "x.tar", samples)
    else:
        pq.write_table(pa.table({"image": [data for _, data in samples]}), tmp_path / "x.parquet", row_group_size=37)
    source = open_source(tmp_path)
    assert source.kind == kind
    order = [(i * 137) % 400 for i in range(1600)]
    content = dict(samples) if kind == "folder" else dict(zip(source.keys, (data for _, data in samples), strict=True))
    source.read(3)
    for one in (source, pickle.loads(pickle.dumps(source))):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one.read, order)) == [content[source.keys[i]] for i in order]
    assert source.keys == open_source(tmp_path).keys


def test_mixtures_ask_which(tmp_path):
    put(tmp_path, "a/1.jpg", "a/2.png")
    make_tar(tmp_path / "x.tar", [("3.jpg", b"x")])
    expected = r"2 \.jpg .*, 1 \.tar\. Say which with --source-kind folder or tar$"
    with pytest.raises(SamiCacheError, match=rf"holds more than one sort of source: {expected}"):
        open_source(tmp_path)
    assert open_source(tmp_path, kind="folder").keys == ["a/1.jpg", "a/2.png"]
    assert open_source(tmp_path, kind="tar").keys == ["x.tar/3.jpg"]
    with pytest.raises(SamiCacheError, match=r"no images in .*: looked for \.parquet, at any depth"):
        open_source(tmp_path, kind="parquet")
    with pytest.raises(SamiCacheError, match="unknown source kind 'zip': expected one of folder, tar, parquet"):
        open_source(tmp_path, kind="zip")


def test_nothing_to_read(tmp_path):
    put(tmp_path, "notes.txt")
    with pytest.raises(SamiCacheError, match=rf"no images in {tmp_path}: looked for \.jpg .*\.tiff or \.tar or \.parquet"):
        open_source(tmp_path)
    with pytest.raises(SamiCacheError, match=r"/none does not exist.*\$SAMI_DATA, or data/ .*--data DIR"):
        open_source(tmp_path / "none")
    put(tmp_path, "1.jpg")
    with pytest.raises(SamiCacheError, match=r"1\.jpg is one image: expected a folder of images"):
        open_source(tmp_path / "1.jpg")
