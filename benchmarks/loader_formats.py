"""Peers that are asked for samples by number: arrays, databases, tables and files."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from loader_engines import Format

CHUNK = 16


class Memmap(Format):
    """Two .npy files; JPEGs one after another, with offsets."""

    checks = "nothing"

    def write(self) -> None:
        for name in ("codes.npy", "jpegs.npy") if self.jpegs else ("codes.npy",):
            (self.folder / name).write_bytes((self.samples.folder / name).read_bytes())

    def open(self, order: str) -> None:
        self.codes = np.load(self.folder / "codes.npy", mmap_mode="r")
        self.joined = np.load(self.folder / "jpegs.npy", mmap_mode="r") if self.jpegs else None
        if order == "random":
            for array in (self.codes, self.joined):
                if array is not None:
                    array._mmap.madvise(mmap.MADV_RANDOM)

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        np.take(self.codes, numbers, 0, out=codes, mode="clip")
        return self._jpegs(numbers)

    def block(self, start: int, stop: int, codes: np.ndarray) -> list[bytes] | None:
        codes[:] = self.codes[start:stop]
        return self._jpegs(range(start, stop))

    def _jpegs(self, numbers: Sequence[int] | np.ndarray) -> list[bytes] | None:
        if self.joined is None:
            return None
        offsets = self.samples.offsets
        return [self.joined[offsets[number] : offsets[number + 1]].tobytes() for number in numbers]

    def close(self) -> None:
        self.codes = self.joined = None


class ZarrFiles(Format):
    """Arrays of Zarr v3: our own cache as it lies there, or its codes in plain chunks of 1 or 16 samples in shards.

    The JPEGs are rows of one array, filled up with zeros: no stock reader but zarr-python knows byte strings of any length.
    Beside our cache they are read from its Arrow files with pyarrow.
    """

    layouts: ClassVar = {"chunk 1": ("random",), "chunk 16": ("blocks",), "our cache": ("blocks",)}
    checks: ClassVar[str] = "crc32c and zstd's checksum"
    pipeline: ClassVar[str] = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def write(self) -> None:
        import zarr

        samples = self.samples
        if self.layout == "our cache":
            return
        chunk = int(self.layout.split()[1])
        codecs = [zarr.codecs.ZstdCodec(level=1, checksum=True), zarr.codecs.Crc32cCodec()]
        lengths = np.diff(samples.offsets)
        rows = np.zeros((len(samples), lengths.max()), np.uint8)
        for number in range(len(samples)):
            rows[number, : lengths[number]] = np.frombuffer(samples.jpeg(number), np.uint8)
        for name, values in (("codes", samples.codes), ("jpegs", rows))[: 1 + self.jpegs]:
            zarr.create_array(
                str(self.folder / name),
                shape=values.shape,
                dtype=values.dtype,
                chunks=(chunk, *values.shape[1:]),
                shards=(-(-samples.block // chunk) * chunk, *values.shape[1:]),
                compressors=codecs,
            )[:] = values

    def paths(self) -> list[Path]:
        ours = [self.cache / "codes", self.cache / "images"][: 1 + self.jpegs]
        return ours if self.layout == "our cache" else [self.folder]

    def open(self, order: str) -> None:
        ours = self.layout == "our cache"
        self.codes = self._open((self.cache if ours else self.folder) / "codes")
        self.rows = self._open(self.folder / "jpegs") if self.jpegs and not ours else None
        self.lengths = np.diff(self.samples.offsets)

    def _open(self, path: Path) -> Any:
        import zarr

        zarr.config.set({"codec_pipeline.path": self.pipeline, "threading.max_workers": 2})
        return zarr.open_array(str(path), mode="r")

    def _read(self, array: Any, numbers: np.ndarray | slice) -> np.ndarray:
        if isinstance(numbers, slice):
            return array[numbers]
        # One by one: `oindex` of 64 scattered samples is slower than 64 reads (benchmarked here before).
        return np.concatenate([array[number : number + 1] for number in numbers.tolist()])

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        codes[:] = self._read(self.codes, numbers)
        if self.rows is None:
            return None
        rows = self._read(self.rows, numbers)
        return [row[:length].tobytes() for row, length in zip(rows, self.lengths[numbers], strict=True)]

    def block(self, start: int, stop: int, codes: np.ndarray) -> list[bytes] | None:
        codes[:] = self._read(self.codes, slice(start, stop))
        if not self.jpegs:
            return None
        if self.rows is None:
            return self._arrow_jpegs(start // self.samples.block)
        rows = self._read(self.rows, slice(start, stop))
        return [row[:length].tobytes() for row, length in zip(rows, self.lengths[start:stop], strict=True)]

    def _arrow_jpegs(self, shard: int) -> list[bytes]:
        import pyarrow as pa

        with pa.OSFile(str(self.cache / "images" / f"{shard:06d}.arrow")) as file:
            return pa.ipc.open_file(file).get_batch(0).column("jpeg").to_pylist()

    def close(self) -> None:
        self.codes = self.rows = None


class Zarrs(ZarrFiles):
    """The same files through the Rust codecs."""

    checks = "zstd's checksum (crc32c only where whole shards are read)"
    pipeline = "zarrs.ZarrsCodecPipeline"

    def _open(self, path: Path) -> Any:
        import zarrs  # noqa: F401  (registers the pipeline)

        return super()._open(path)


class TensorStore(ZarrFiles):
    """The same files; a batch is one asynchronous read."""

    def _open(self, path: Path) -> Any:
        import tensorstore as ts

        limit = {"limit": 2}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "context": {"data_copy_concurrency": limit, "cache_pool": {"total_bytes_limit": 0}},
        }
        return ts.open(spec, open=True, read=True).result()

    def _read(self, array: Any, numbers: np.ndarray | slice) -> np.ndarray:
        return array[numbers].read().result()


class HDF5(Format):
    """Chunked data sets with zstd 1 and fletcher32; JPEGs as byte strings of any length."""

    layouts: ClassVar = {"chunk 1": ("random",), "chunk 16": ("blocks",)}
    checks = "fletcher32 of the codes, nothing of the JPEGs"

    def write(self) -> None:
        import h5py
        import hdf5plugin

        samples = self.samples
        chunk = int(self.layout.split()[1])
        with h5py.File(self.folder / "samples.h5", "w", libver="latest") as file:
            file.create_dataset(
                "codes",
                data=samples.codes,
                chunks=(chunk, *samples.codes.shape[1:]),
                fletcher32=True,
                **hdf5plugin.Zstd(clevel=1),
            )
            jpegs = file.create_dataset("jpegs", (len(samples),), h5py.vlen_dtype(np.uint8))
            for number in range(len(samples) if self.jpegs else 0):
                jpegs[number] = np.frombuffer(samples.jpeg(number), np.uint8)

    def open(self, order: str) -> None:
        import h5py
        import hdf5plugin  # noqa: F401  (registers zstd)

        self.file = h5py.File(self.folder / "samples.h5", "r")
        self.codes, self.strings = self.file["codes"], self.file["jpegs"] if self.jpegs else None

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        for place, number in enumerate(numbers.tolist()):
            self.codes.read_direct(codes, np.s_[number : number + 1], np.s_[place : place + 1])
        return None if self.strings is None else [self.strings[number].tobytes() for number in numbers.tolist()]

    def block(self, start: int, stop: int, codes: np.ndarray) -> list[bytes] | None:
        self.codes.read_direct(codes, np.s_[start:stop])
        return None if self.strings is None else [jpeg.tobytes() for jpeg in self.strings[start:stop]]

    def close(self) -> None:
        self.codes = self.strings = None
        self.file.close()


class LMDB(Format):
    """Raw values, codes and JPEGs under keys that sort by number."""

    checks = "nothing"

    def write(self) -> None:
        import lmdb

        samples = self.samples
        size = 2 * (samples.codes.nbytes + samples.jpeg_bytes.nbytes) + (64 << 20)
        with lmdb.open(str(self.folder), map_size=size, max_dbs=2) as environment:
            for name, value in (("codes", lambda n: samples.codes[n].tobytes()), ("jpegs", samples.jpeg))[: 1 + self.jpegs]:
                table = environment.open_db(name.encode())
                with environment.begin(write=True, db=table) as transaction:
                    for number in range(len(samples)):
                        transaction.put(number.to_bytes(8, "big"), value(number), append=True)

    def open(self, order: str) -> None:
        import lmdb

        # Read-ahead is what its documentation has turned off for random reads of more than fits in memory.
        self.environment = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=order == "blocks", max_dbs=2)
        self.codes = self.environment.open_db(b"codes")
        self.strings = self.environment.open_db(b"jpegs") if self.jpegs else None

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        keys = [int(number).to_bytes(8, "big") for number in numbers]
        flat = codes.reshape(len(codes), -1)
        with self.environment.begin(buffers=True) as transaction:
            for place, key in enumerate(keys):
                flat[place] = np.frombuffer(transaction.get(key, db=self.codes), np.int8)
            return None if self.strings is None else [bytes(transaction.get(key, db=self.strings)) for key in keys]

    def close(self) -> None:
        self.codes = self.strings = None
        self.environment.close()


class Lance(Format):
    """A table of version 2.1 with zstd 1 for the codes."""

    checks = "nothing"

    def write(self) -> None:
        import lance
        import pyarrow as pa

        samples = self.samples
        zstd = {"lance-encoding:compression": "zstd", "lance-encoding:compression-level": "1"}
        fields = [pa.field("codes", pa.binary(), metadata=zstd), pa.field("jpeg", pa.binary())]
        schema = pa.schema(fields[: 1 + self.jpegs])

        def parts():
            for start in range(0, len(samples), 256):
                numbers = range(start, min(start + 256, len(samples)))
                columns = [[samples.codes[n].tobytes() for n in numbers], [samples.jpeg(n) for n in numbers]]
                arrays = [pa.array(column, pa.binary()) for column in columns]
                yield pa.record_batch(arrays[: 1 + self.jpegs], schema=schema)

        lance.write_dataset(parts(), str(self.folder / "samples.lance"), schema=schema, data_storage_version="2.1")

    def open(self, order: str) -> None:
        import lance

        self.table = lance.dataset(str(self.folder / "samples.lance"))
        self.columns = ["codes", "jpeg"][: 1 + self.jpegs]

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        return self._fill(self.table.take(numbers.tolist(), columns=self.columns), codes)

    def block(self, start: int, stop: int, codes: np.ndarray) -> list[bytes] | None:
        return self._fill(self.table.to_table(columns=self.columns, offset=start, limit=stop - start), codes)

    def _fill(self, table: Any, codes: np.ndarray) -> list[bytes] | None:
        flat = codes.reshape(len(codes), -1)
        for place, value in enumerate(piece for part in table["codes"].chunks for piece in part):
            flat[place] = np.frombuffer(value.as_buffer(), np.int8)
        return table["jpeg"].to_pylist() if self.jpegs else None

    def close(self) -> None:
        self.table = None


class SafeTensors(Format):
    """One file a sample, as Theia keeps its features."""

    layouts: ClassVar = {"": ("random",)}
    checks = "nothing"

    def write(self) -> None:
        from safetensors.numpy import save_file

        for number in range(len(self.samples)):
            arrays = {"codes": self.samples.codes[number]}
            if self.jpegs:
                arrays["jpeg"] = np.frombuffer(self.samples.jpeg(number), np.uint8)
            path = self._file(number)
            path.parent.mkdir(exist_ok=True)
            save_file(arrays, path)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number // 1000:04d}" / f"{number:08d}.safetensors"

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        from safetensors import safe_open

        jpegs = []
        for place, number in enumerate(numbers.tolist()):
            with safe_open(self._file(number), "numpy") as file:
                codes[place] = file.get_tensor("codes")
                if self.jpegs:
                    jpegs.append(file.get_tensor("jpeg").tobytes())
        return jpegs if self.jpegs else None
