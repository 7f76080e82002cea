"""Peers that shuffle by themselves: WebDataset, LitData and MosaicML Streaming."""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from loader_engines import Format
from loader_samples import BATCH, Batch, PlainSamples

SHUFFLE_BUFFER = 2048
CHUNK_BYTES = 1 << 26


class Stream(Format):
    """A sample is a dictionary: number, codes and perhaps jpeg."""

    layouts: ClassVar = {"": ("own",)}

    def collate(self, rows: Iterable[tuple[int, Any, bytes | None]]) -> Iterator[Batch]:
        """Batches of rows as they come; the codes of each are anything that holds their bytes."""
        shape = self.samples.codes.shape[1:]
        place, numbers, codes, jpegs = 0, np.empty(BATCH, np.int64), np.empty((BATCH, *shape), np.int8), []
        for number, row, jpeg in rows:
            numbers[place] = number
            codes[place] = row if isinstance(row, np.ndarray) else np.frombuffer(row, np.int8).reshape(shape)
            jpegs.append(jpeg)
            place += 1
            if place == BATCH:
                yield Batch(numbers, codes, jpegs if self.jpegs else None)
                place, numbers, codes, jpegs = 0, np.empty(BATCH, np.int64), np.empty((BATCH, *shape), np.int8), []
        if place:
            yield Batch(numbers[:place], codes[:place], jpegs if self.jpegs else None)


class WebDataset(Stream):
    """Tar files of a shard's samples each; raw bytes, no decoder in between."""

    checks = "nothing"

    def write(self) -> None:
        import webdataset as wds

        samples = self.samples
        with wds.ShardWriter(str(self.folder / "%06d.tar"), maxcount=samples.block, verbose=0) as sink:
            for number in range(len(samples)):
                row = {"__key__": f"{number:08d}", "codes": samples.codes[number].tobytes()}
                sink.write(row | ({"jpg": samples.jpeg(number)} if self.jpegs else {}))

    def stream(self, repeats: int) -> Iterator[Batch]:
        import webdataset as wds

        tars = sorted(str(path) for path in self.folder.glob("*.tar"))
        data = wds.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
        data = data.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4)
        rows = (row for _ in range(repeats) for row in data)
        yield from self.collate((int(row["__key__"]), row["codes"], row.get("jpg")) for row in rows)


def litdata_sample(samples: PlainSamples, jpegs: bool, number: int) -> dict[str, Any]:
    row = {"number": number, "codes": samples.codes[number].copy()}
    return row | ({"jpeg": samples.jpeg(number)} if jpegs else {})


class LitData(Stream):
    """Chunks of 64 MB, uncompressed or with every sample compressed by zstd 1."""

    layouts: ClassVar = {"raw": ("random", "own"), "zstd": ("own",)}
    checks = "nothing"

    def write(self) -> None:
        import litdata

        zstd = {"compression": "zstd:1", "compression_level": "sample"} if self.layout == "zstd" else {}
        litdata.optimize(
            partial(litdata_sample, PlainSamples(self.samples.folder), self.jpegs),
            list(range(len(self.samples))),
            output_dir=str(self.folder),
            chunk_bytes=CHUNK_BYTES,
            num_workers=1,
            **zstd,
        )

    def open(self, order: str) -> None:
        os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
        import litdata

        self.data = litdata.StreamingDataset(str(self.folder), shuffle=order == "own", drop_last=False, seed=0)

    def stream(self, repeats: int) -> Iterator[Batch]:
        rows = (row for _ in range(repeats) for row in self.data)
        yield from self.collate((int(row["number"]), row["codes"], row.get("jpeg")) for row in rows)

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        rows = [self.data[number] for number in numbers.tolist()]
        for place, row in enumerate(rows):
            codes[place] = row["codes"]
        return [row["jpeg"] for row in rows] if self.jpegs else None

    def close(self) -> None:
        self.data = None


class Mosaic(Stream):
    """MDS shards of 64 MB. Compressed ones are unpacked to the disk when first used and are read raw ever after: so raw."""

    layouts: ClassVar = {"": ("random", "own")}
    checks = "nothing (a shard's hash when it is downloaded)"

    def write(self) -> None:
        from streaming import MDSWriter

        samples = self.samples
        shape = ",".join(map(str, samples.codes.shape[1:]))
        columns = {"number": "int", "codes": f"ndarray:int8:{shape}"} | ({"jpeg": "bytes"} if self.jpegs else {})
        folder = str(self.folder)
        with MDSWriter(out=folder, columns=columns, hashes=["xxh64"], size_limit=CHUNK_BYTES, exist_ok=True) as sink:
            for number in range(len(samples)):
                sink.write(litdata_sample(samples, self.jpegs, number))

    def prepare(self) -> None:
        import streaming

        streaming.base.util.clean_stale_shared_memory()
        self.data = streaming.StreamingDataset(
            local=str(self.folder), shuffle=True, batch_size=BATCH, shuffle_seed=0, validate_hash="xxh64"
        )

    def stream(self, repeats: int) -> Iterator[Batch]:
        rows = (row for _ in range(repeats) for row in self.data)
        yield from self.collate((int(row["number"]), row["codes"], row.get("jpeg")) for row in rows)

    def fetch(self, numbers: np.ndarray, codes: np.ndarray) -> list[bytes] | None:
        rows = [self.data[number] for number in numbers.tolist()]
        for place, row in enumerate(rows):
            codes[place] = row["codes"]
        return [row["jpeg"] for row in rows] if self.jpegs else None
