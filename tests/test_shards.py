"""Shard files are Zarr: stock readers get our numbers, we read stock shards, and a changed bit is never a changed number."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import full_cache, new_cache, teacher_like

from sami_cache.errors import DamageError
from sami_cache.store.head import CODEC_ARRAYS
from sami_cache.store.shards import ABSENT, ShardFile, ShardLayout, crc32c, pack_shard, parse_index, unpack_chunk

LAYOUT = ShardLayout(sample_shape=(3, 2, 2), dtype="float16", shard_samples=8, chunk_samples=2)


def some_codes(samples: int, layout: ShardLayout = LAYOUT) -> np.ndarray:
    values = np.random.default_rng(samples).integers(-100, 100, (samples, *layout.sample_shape))
    return values.astype(layout.dtype)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(path: Path, data: bytes, checksums: list[int], samples: int, layout: ShardLayout = LAYOUT) -> np.ndarray:
    with ShardFile(path, layout, len(data), checksums) as file:
        return file.read(samples)


def open_zarr(path: Path) -> zarr.Group:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # commits/, images/ and tmp/ are no Zarr nodes
        group = zarr.open_group(path, mode="r")
        assert set(group.array_keys()) == {"codes", *CODEC_ARRAYS}
    return group


def read_tensorstore(path: Path) -> np.ndarray:
    import tensorstore

    return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result().read().result()


@pytest.mark.parametrize(
    ("codec", "error", "dtype", "last"),
    [("pca", 0.01, "int8", 8), ("pca", 1e-5, "int8", 5), ("float16", 0.01, "float16", 1), ("int8", 0.01, "int8", 16)],
)
def test_zarr_and_tensorstore_read_what_we_read(tmp_path: Path, codec: str, error: float, dtype: str, last: int) -> None:
    """The last shard and, with 4 samples a chunk, its last chunk are partly filled."""
    cache = full_cache(tmp_path / "c.zarr", samples=32 + last, codec=codec, error=error, chunk_samples=4)
    assert cache.codec.dtype == dtype
    assert cache.layout.chunk_samples == 4
    ours = np.concatenate([cache.read_codes(shard) for shard in range(cache.shards)])
    assert ours.shape == (32 + last, cache.codec.kept, *((1, 1) if codec == "pca" else (8, 8)))
    group = open_zarr(cache.path)
    codes = group["codes"]
    assert isinstance(codes, zarr.Array)
    assert codes.dtype == dtype
    np.testing.assert_array_equal(np.asarray(codes[:]), ours)
    np.testing.assert_array_equal(read_tensorstore(cache.path / "codes"), ours)
    for name in CODEC_ARRAYS:
        array = group[name]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(np.asarray(array[:]), getattr(cache.codec, name))
        np.testing.assert_array_equal(read_tensorstore(cache.path / name), getattr(cache.codec, name))
    assert np.abs(cache.codec.decode(ours[:16]) - teacher_like(32 + last)[:16]).max() < 3


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("samples", [1, 3, 8, 13])
def test_we_read_what_zarr_writes(tmp_path: Path, dtype: str, samples: int) -> None:
    layout = ShardLayout(sample_shape=(3, 2, 2), dtype=dtype, shard_samples=8, chunk_samples=2)
    (tmp_path / "codes").mkdir()
    write(tmp_path / "codes" / "zarr.json", json.dumps(layout.metadata(samples)).encode())
    codes = some_codes(samples, layout)
    zarr.open_array(tmp_path / "codes", mode="r+")[:] = codes
    for shard in range(-(-samples // 8)):
        path = tmp_path / "codes" / layout.file_name(shard)
        data, expected = path.read_bytes(), codes[shard * 8 : shard * 8 + 8]
        index = parse_index(data[-layout.index_bytes :], layout, len(data) - layout.index_bytes, "")
        spans = index[: -(-len(expected) // 2)].tolist()
        checksums = [crc32c(data[offset : offset + count - 4]) for offset, count in spans]
        np.testing.assert_array_equal(read(path, data, checksums, len(expected), layout), expected)


def test_zarr_reads_a_shard_of_ours_put_into_its_own_array(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "a",
        shape=(13, 3, 2, 2),
        dtype="float16",
        chunks=(2, 3, 2, 2),
        shards=(8, 3, 2, 2),
        filters=[zarr.codecs.TransposeCodec(order=(1, 0, 2, 3))],
        compressors=[zarr.codecs.ZstdCodec(level=1, checksum=True), zarr.codecs.Crc32cCodec()],
    )
    codes = some_codes(13)
    for shard, part in enumerate((codes[:8], codes[8:])):
        path = tmp_path / "a" / "c" / str(shard) / "0" / "0" / "0"
        path.parent.mkdir(parents=True)
        path.write_bytes(pack_shard(part, LAYOUT)[0])
    np.testing.assert_array_equal(np.asarray(array[:]), codes)


def test_chunks_behind_the_last_sample_are_absent_and_cannot_be_read(tmp_path: Path) -> None:
    data, checksums = pack_shard(some_codes(3), LAYOUT)
    assert len(checksums) == 2
    path = write(tmp_path / "s", data)
    with ShardFile(path, LAYOUT, len(data), checksums) as file:
        assert file.index[2:].tolist() == [[-1, 0], [-1, 0]]
        with pytest.raises(DamageError, match="chunk 2: absent from the shard"):
            file.read_chunk(2, {})


def test_every_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    codes = some_codes(5)
    data, checksums = pack_shard(codes, LAYOUT)
    path, flipped, refused = tmp_path / "s", bytearray(data), 0
    for bit in range(8 * len(data)):
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(read(path, data, checksums, 5), codes)
        except DamageError:
            refused += 1
    assert refused == 8 * len(data)  # every byte of the file is under a checksum


def test_a_chunk_with_a_recomputed_checksum_is_still_not_the_committed_one(tmp_path: Path) -> None:
    """Another shard's bytes are consistent in themselves; only the commit record knows better."""
    mine, other = pack_shard(some_codes(8), LAYOUT), pack_shard(some_codes(8) + 1, LAYOUT)
    assert len(mine[0]) == len(other[0])
    path = write(tmp_path / "s", other[0])
    np.testing.assert_array_equal(read(path, other[0], other[1], 8), some_codes(8) + 1)
    with pytest.raises(DamageError, match="chunk 0: the chunk does not match its crc32c"):
        read(path, mine[0], mine[1], 8)


@pytest.mark.parametrize(
    "change",
    [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d + b"\0", lambda d: b"\0" + d],
    ids=["one byte short", "half", "empty", "one byte more", "shifted"],
)
def test_another_length_is_refused_before_anything_is_read(tmp_path: Path, change) -> None:
    data, checksums = pack_shard(some_codes(8), LAYOUT)
    path = write(tmp_path / "s", change(data))
    with pytest.raises(DamageError, match=rf"s: {len(change(data))} bytes, its commit record says {len(data)}"):
        read(path, data, checksums, 8)


def test_a_file_shorter_than_its_index_is_refused_even_if_the_record_says_so(tmp_path: Path) -> None:
    for size in (0, 1, LAYOUT.index_bytes - 1):
        path = write(tmp_path / "s", bytes(size))
        with pytest.raises(DamageError, match="index does not match its crc32c"):
            ShardFile(path, LAYOUT, size, [0])


@pytest.mark.parametrize(
    "entry",
    [
        (10**6, 20),
        (0, 10**6),
        (2**64 - 2, 20),
        (2**63, 2**63),
        (0, 2**64 - 2),
        (ABSENT, 20),
        (0, ABSENT),
        (0, 4),
        (0, 0),
    ],
)
def test_an_index_that_points_outside_is_refused(tmp_path: Path, entry: tuple[int, int]) -> None:
    data, checksums = pack_shard(some_codes(8), LAYOUT)
    index = np.frombuffer(data[-LAYOUT.index_bytes : -4], "<u8").reshape(-1, 2).copy()
    index[1] = entry
    table = index.tobytes()
    forged = data[: -LAYOUT.index_bytes] + table + crc32c(table).to_bytes(4, "little")
    path = write(tmp_path / "s", forged)
    with pytest.raises(DamageError, match="the shard's index points outside the file"):
        read(path, forged, checksums, 8)


def test_an_index_that_lacks_a_chunk_or_swaps_two_gives_no_numbers(tmp_path: Path) -> None:
    data, checksums = pack_shard(some_codes(8), LAYOUT)
    index = np.frombuffer(data[-LAYOUT.index_bytes : -4], "<u8").reshape(-1, 2)
    lacking, swapped = index.copy(), index[[1, 0, 2, 3]]
    lacking[0] = ABSENT
    for forged, what in ((lacking, "chunk 0: absent"), (swapped, "chunk 0: the chunk does not match")):
        table = forged.tobytes()
        path = write(tmp_path / "s", data[: -LAYOUT.index_bytes] + table + crc32c(table).to_bytes(4, "little"))
        with pytest.raises(DamageError, match=what):
            read(path, data, checksums, 8)


@pytest.mark.parametrize("size", [0, 1, LAYOUT.chunk_samples * 24 - 1, LAYOUT.chunk_samples * 24 + 1, 1 << 20])
def test_a_chunk_that_holds_another_number_of_bytes_is_refused(size: int) -> None:
    """With every checksum right: a frame of zeros that would fill a gigabyte must not be believed either."""
    import zstandard

    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(size))
    with pytest.raises(DamageError, match=r"the chunk holds .* expected 48"):
        unpack_chunk(frame + crc32c(frame).to_bytes(4, "little"), LAYOUT, crc32c(frame), {}, "here")


def test_a_chunk_that_is_no_zstd_is_refused() -> None:
    with pytest.raises(DamageError, match="here: zstd cannot decode the chunk"):
        unpack_chunk(b"garbage" + crc32c(b"garbage").to_bytes(4, "little"), LAYOUT, crc32c(b"garbage"), {}, "here")


def test_zstds_own_checksum_is_written() -> None:
    """Readers that skip the crc32c (zarrs does, on partial reads) still find a changed byte by it."""
    import zstandard

    data, _ = pack_shard(some_codes(8), LAYOUT)
    assert zstandard.get_frame_parameters(data).has_checksum


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, what in (
        ("fifo", "not a regular file"),
        ("folder", "not a regular file"),
        ("loop", "cannot be read"),
        ("file/below", "missing"),
        ("nothing", "missing"),
    ):
        with pytest.raises(DamageError, match=f"{name}: .*{what}"):
            ShardFile(tmp_path / name, LAYOUT, 0, [])


@pytest.mark.parametrize(
    "change",
    [
        {"shard_samples": 0},
        {"chunk_samples": 3},
        {"chunk_samples": 16},
        {"shard_samples": 2**40},
        {"sample_shape": (2**20, 2**20, 2**20)},
        {"sample_shape": (3, -2, 2)},
        {"sample_shape": (3, 2.0, 2)},
        {"dtype": "float64"},
        {"dtype": "object"},
    ],
)
def test_impossible_layouts_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"codes of type|a shard of"):
        ShardLayout(**({"sample_shape": (3, 2, 2), "dtype": "int8", "shard_samples": 8, "chunk_samples": 2} | change))


def test_readers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    layout = ShardLayout(sample_shape=(8, 16, 16), dtype="int8", shard_samples=64, chunk_samples=1)
    codes = some_codes(64, layout)
    data, checksums = pack_shard(codes, layout)
    path = write(tmp_path / "s", data)

    def one(chunk: int) -> bool:
        out = np.empty(layout.sample_shape, np.int8)
        file.read_chunk(chunk, {0: out})
        return np.array_equal(out, codes[chunk])

    with ShardFile(path, layout, len(data), checksums) as file, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, list(range(64)) * 4))


def test_a_missing_shard_is_an_error_for_us_and_zeros_for_zarr(tmp_path: Path) -> None:
    """Why presence is checked against the record before any byte is decoded."""
    cache = full_cache(tmp_path / "c.zarr")
    shutil.move(cache.path / "codes" / "1.0.0.0", tmp_path / "away")
    codes = open_zarr(cache.path)["codes"]
    assert isinstance(codes, zarr.Array)
    assert not np.asarray(codes[16:32]).any()
    with pytest.raises(DamageError, match=r"codes/1\.0\.0\.0: missing"):
        cache.read_codes(1)


def test_layouts_follow_the_size_of_a_sample(tmp_path: Path) -> None:
    from sami_cache.errors import SamiCacheError
    from sami_cache.store.cache import choose_layout

    codec = new_cache(tmp_path / "c.zarr", codec="int8").codec
    assert codec.kept == 24
    for grid, samples, expected in (
        (46, 10**6, (512, 16)),  # 50 KB a sample
        (208, 10**6, (32, 1)),  # 1 MB
        (46, 1000, (64, 16)),  # eight shards at least
        (46, 40, (16, 16)),  # but not of fewer than 16 samples
        (1, 10**7, (4096, 64)),  # a record stays small
    ):
        layout = choose_layout(codec, grid, samples)
        assert (layout.shard_samples, layout.chunk_samples) == expected
    assert choose_layout(codec, 46, 10**6, 4).chunk_samples == 4
    for wrong, what in ((0, "power of two"), (48, "power of two"), (1 << 20, "at most 32768"), (1, "more than 1048576 shards")):
        with pytest.raises(SamiCacheError, match=rf"--shard-samples {wrong}: .*{what}"):
            choose_layout(codec, 8, 2 * 10**6, wrong)
    with pytest.raises(SamiCacheError, match="--grid 1024: an embedding of 24 channels has 25165824 values then"):
        choose_layout(codec, 1024, 100)
