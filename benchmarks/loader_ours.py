"""Our own loader, and what bounds it: bare decoding, bare copying, the disk, the JPEG decoders."""

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import local
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from loader_samples import BATCH, Batch, PlainSamples, full_permutations
from PIL import Image

from sami_cache.store.cache import Cache

READ_BYTES = 4 << 20
_own = local()


def our_batches(path: Path, images: str, cores: int, repeats: int, seed: int) -> Iterator[Batch | None]:
    """Our loader as a contestant; images: "none", "encoded" or "pixels"."""
    # Torch is imported here and not above: the references do without it.
    from sami_cache.loader import Loader, LoaderConfig
    from sami_cache.processes import keep_freed_memory, objects_kept
    from sami_cache.samples import CacheSamples

    keep_freed_memory()  # as `sami-cache train` does
    samples = CacheSamples(Cache(path))
    config = LoaderConfig(batch_size=BATCH, seed=seed, threads=cores, images=images)  # type: ignore[arg-type]
    loader = Loader(samples, samples.usable, config)
    stop_step = repeats * loader.steps_per_epoch
    with objects_kept(), closing(loader.batches(0, stop_step)) as batches:  # type: ignore[type-var]
        yield None
        for batch in batches:
            yield Batch(batch.samples, batch.codes, batch.encoded)


class Count:
    """What a reference hands out instead of a batch: how many samples it went through."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples


Reference = Callable[[Path, PlainSamples, int, int], Iterator[Count | None]]


def in_threads(cores: int, act: Callable[[Any], int], tasks: Iterable[Any]) -> Iterator[Count | None]:
    """Run `act` on all tasks in threads; it returns how many samples it did."""
    yield None
    ahead: deque[Any] = deque()
    with ThreadPoolExecutor(cores) as pool:
        try:
            for task in tasks:
                ahead.append(pool.submit(act, task))
                if len(ahead) > 2 * cores:
                    yield Count(ahead.popleft().result())
            while ahead:
                yield Count(ahead.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)


def bare_decode(path: Path, samples: PlainSamples, cores: int, repeats: int) -> Iterator[Count | None]:
    """zstd + crc32c of the cache's own chunks, all in memory, one decompressor and one buffer a thread."""
    cache = Cache(path)
    size, chunks = int(np.prod(cache.layout.chunk_shape)), []
    for shard in range(cache.shards):
        with cache.open_codes(shard) as file:
            chunks += [file.read_at(offset, count, path) for offset, count in file.index.tolist() if offset >= 0]

    def decode(packed: bytes) -> int:
        if not hasattr(_own, "decompressor"):
            _own.decompressor, _own.buffer = zstandard.ZstdDecompressor(), bytearray(size)
        body = packed[:-4]
        assert google_crc32c.value(body) == int.from_bytes(packed[-4:], "little")
        with _own.decompressor.stream_reader(body, closefd=False) as reader:
            filled = 0
            while filled < size and (count := reader.readinto(memoryview(_own.buffer)[filled:])):
                filled += count
        assert filled == size
        return cache.layout.chunk_samples

    yield from in_threads(cores, decode, itertools.chain.from_iterable(itertools.repeat(chunks, repeats)))


def bare_copy(_: Path, samples: PlainSamples, cores: int, repeats: int) -> Iterator[Count | None]:
    """memcpy of the codes, a batch at a time, into one buffer a thread."""
    codes = np.array(samples.codes)

    def copy(start: int) -> int:
        part = codes[start : start + BATCH]
        if not hasattr(_own, "copy"):
            _own.copy = np.empty_like(part)
        np.copyto(_own.copy[: len(part)], part)
        return len(part)

    starts = range(0, len(codes), BATCH)
    yield from in_threads(cores, copy, itertools.chain.from_iterable(itertools.repeat(starts, repeats)))


def disk(path: Path, samples: PlainSamples, cores: int, repeats: int, images: bool) -> Iterator[Count | None]:
    """The cache's files read from end to end, one after another, 4 MB a call."""
    cache = Cache(path)
    buffer = bytearray(READ_BYTES)
    yield None
    for shard in itertools.chain.from_iterable(itertools.repeat(range(cache.shards), repeats)):
        for name in cache.shard_files(shard)[: 1 + images]:
            with open(cache.path / name, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        yield Count(len(cache.shard_samples(shard)))


def _pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def bare_pixels(decoder: str, crop: bool) -> Reference:
    """A decoder alone, or with a random crop resized to 224 pixels: by Pillow, or by what our loader uses."""

    def run(_: Path, samples: PlainSamples, cores: int, repeats: int) -> Iterator[Count | None]:
        import torch

        from sami_cache.data.images import decode_jpeg
        from sami_cache.data.views import VIEW_DRAWS, crop_image, crop_pixels, random_view

        jpegs = [samples.jpeg(number) for number in range(len(samples))]

        def act(numbers: np.ndarray) -> int:
            draws = np.random.default_rng(numbers).random((len(numbers), VIEW_DRAWS)).tolist()
            out = torch.empty(224, 224, 3, dtype=torch.uint8).permute(2, 0, 1)
            for number, drawn in zip(numbers.tolist(), draws, strict=True):
                if decoder == "Pillow":
                    image = _pillow(jpegs[number])
                    if crop:
                        crop_image(image, random_view(drawn, image.width, image.height), 224)
                else:
                    pixels = decode_jpeg(jpegs[number])
                    if crop:
                        crop_pixels(pixels, random_view(drawn, *pixels.shape[1::-1]), out)
            return len(numbers)

        yield from in_threads(cores, act, full_permutations(len(samples), repeats, 0))

    return run


DECODERS = ("simplejpeg", "Pillow")
WARM: dict[str, dict[str, Reference]] = {
    "none": {"bare zstd + crc32c": bare_decode, "bare memcpy of the codes": bare_copy},
    "encoded": {},
    "pixels": {
        f"{decoder}, {'decode, crop, resize' if crop else 'decode only'}": bare_pixels(decoder, crop)
        for decoder in DECODERS
        for crop in (True, False)
    },
}
COLD: dict[str, dict[str, Reference]] = {
    "none": {"the disk, sequentially": lambda *arguments: disk(*arguments, images=False)},
    "encoded": {"the disk, sequentially": lambda *arguments: disk(*arguments, images=True)},
    "pixels": {},
}
"""By what is served of the images."""
