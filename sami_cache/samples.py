"""Where training samples come from: a cache, or images with no cache. What a loader reads, shard by shard."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sami_cache.data.images import decode_image, decode_jpeg
from sami_cache.data.source import Source
from sami_cache.data.views import View
from sami_cache.errors import DamageError, IdentityError, ImageError, SamiCacheError
from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK
from sami_cache.store.files import digest
from sami_cache.store.images import ImageFile
from sami_cache.store.shards import ShardFile


class OpenShard(Protocol):
    """One shard, its files open until nobody holds it any more. Thread-safe."""

    def expect(self, *, images: bool) -> None:
        """Most of the shard's codes will be read soon, and of its images where `images` says so."""
        ...

    def read_codes(self, chunk: int, wanted: Mapping[int, np.ndarray]) -> None:
        """Copy the codes of samples of a chunk, by place in the chunk, into contiguous memory of their shape and type."""
        ...

    def encoded(self, place: int) -> bytes:
        """The encoded image of the sample at `place` in the shard."""
        ...

    def pixels(self, place: int) -> np.ndarray:
        """The same decoded: uint8 [h, w, 3], RGB, upright; this thread's next call may overwrite it."""
        ...

    def view(self, place: int) -> View | None:
        """The view that was recorded for the sample, None for a sample that stands for the whole image."""
        ...


class Samples(Protocol):
    """The samples of a data set, in storage order. Thread-safe."""

    keys: list[str]
    labels: list[int | None]
    usable: np.ndarray
    """bool [samples]."""
    shard_samples: int
    chunk_samples: int
    """Samples whose codes are decoded together; shards hold a whole number of chunks."""
    whole: bool
    """Whether a sample stands for a whole image, of which views are to be drawn, or for one recorded view."""
    codes_shape: tuple[int, ...] | None
    """Of one sample, None where there are no codes."""
    codes_dtype: np.dtype

    def open(self, shard: int) -> OpenShard:
        """Open a shard's files. Raises DamageError where they are not the ones committed."""
        ...


class CacheSamples:
    """The samples of a cache: codes and JPEGs, every byte checked against the commit records on the way.

    What belongs together is what one row of a sealed commit record names: key, codes, JPEG and view.
    """

    def __init__(self, cache: Cache, source: Source | None = None) -> None:
        """`source`: where to read images from if the cache holds none; each is checked against the digest in its record."""
        self.cache, self.source = cache, source
        if not cache.has_images and source is None:
            raise SamiCacheError(
                f"{cache.path} was extracted with --no-images: give the images it was made from with --data DIR, or extract a "
                "cache that holds them."
            )
        missing = cache.shards - len(cache.committed())
        if missing:
            raise SamiCacheError(
                f"{cache.path} is not complete: {missing} of {cache.shards} shards are missing. Run the same `sami-cache "
                "extract` command to finish it, then train."
            )
        table = cache.table(["record", "key", "label", "status"])
        self._digests = table["record"].take(list(range(0, len(table), cache.layout.shard_samples))).to_pylist()
        self.keys = table["key"].to_pylist()
        self.labels = table["label"].to_pylist()
        self.usable = np.array([status == OK for status in table["status"].to_pylist()])
        self.shard_samples, self.chunk_samples = cache.layout.shard_samples, cache.layout.chunk_samples
        self.whole = not cache.views
        self.codes_shape: tuple[int, ...] | None = cache.layout.sample_shape
        self.codes_dtype = cache.layout.stored_dtype
        self._where = {key: index for index, key in enumerate(source.keys)} if source and not cache.has_images else {}
        self._known: dict[int, _Known] = {}

    def open(self, shard: int) -> "_CacheShard":
        """Open a shard's files. Raises DamageError where they are not the ones committed."""
        self.cache.check_process()
        if shard not in self._known:
            # Parsing a record takes longer than decoding a chunk, and every epoch comes back to it.
            self._known[shard] = self._read_record(shard)
        return _CacheShard(self, shard, self._known[shard])

    def _read_record(self, shard: int) -> "_Known":
        record = self.cache.record(shard)
        if record.digest != self._digests[shard]:
            raise DamageError(
                f"{self.cache.record_path(shard)}: is not the record that the cache was sealed with. `sami-cache verify "
                "--repair` mends what the images can mend."
            )
        return _Known(
            sizes=[record.files[name].size for name in self.cache.shard_files(shard)],
            digests=[record.files[name].xxh3_128 for name in self.cache.shard_files(shard)],
            checksums=record.chunk_crc32c,
            jpegs=np.array([sample.jpeg or (0, 0, 0) for sample in record.samples]),
            views=None if self.whole else np.array([sample.view or (0, 0, 1, 1, 0) for sample in record.samples]),
            sources=None if self.cache.has_images else [sample.source for sample in record.samples],
        )

    def read_source(self, key: str, expected: str | None) -> bytes:
        """An image of a cache without images. Raises IdentityError where it is not the one the cache was made from."""
        if self.source is None or key not in self._where:
            where = "the source" if self.source is None else self.source.location
            raise IdentityError(f"{where}: image {key!r} of the cache is not there. Give the --data it was made from.")
        data = self.source.read(self._where[key])
        if digest(data) != expected:
            raise IdentityError(
                f"{self.source.location}: image {key!r} is not the one the cache was made from. Extract it anew."
            )
        return data


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a commit record says that training needs."""

    sizes: list[int]
    """Of the shard's files."""
    digests: list[str]
    """XXH3-128 of them."""
    checksums: list[int]
    """Of the chunks."""
    jpegs: np.ndarray
    """int64 [n, 3]: offset, size, crc32c; size 0 where there is none."""
    views: np.ndarray | None
    """float64 [n, 5] of a replay cache."""
    sources: list[str | None] | None
    """Digests of the source images, where the cache holds no images of its own."""


class _CacheShard:
    def __init__(self, samples: CacheSamples, shard: int, known: _Known) -> None:
        cache = samples.cache
        self._samples, self._known, self._first = samples, known, shard * samples.shard_samples
        paths = [cache.path / name for name in cache.shard_files(shard)]
        self._codes = ShardFile(paths[0], cache.layout, known.sizes[0], known.checksums)
        self._images = ImageFile(paths[1], known.sizes[1]) if cache.has_images else None

    def expect(self, *, images: bool) -> None:
        self._codes.expect(self._known.digests[0])
        if self._images and images:
            self._images.expect(self._known.digests[1])

    def read_codes(self, chunk: int, wanted: Mapping[int, np.ndarray]) -> None:
        self._codes.read_chunk(chunk, wanted)

    def encoded(self, place: int) -> bytes:
        key = self._samples.keys[self._first + place]
        if self._images is None:
            assert self._known.sources is not None
            return self._samples.read_source(key, self._known.sources[place])
        where = self._known.jpegs[place].tolist()
        if not where[1]:
            raise DamageError(f"{self._images.path}: sample {key!r} has no image")
        return self._images.read(where, key)

    def pixels(self, place: int) -> np.ndarray:
        data, key = self.encoded(place), self._samples.keys[self._first + place]
        if self._images is None:
            return decode_source(data, key)
        try:
            return decode_jpeg(data)
        except ImageError as error:
            raise ImageError(f"{self._images.path}: the image of {key!r}: {error}") from error

    def view(self, place: int) -> View | None:
        if self._known.views is None:
            return None
        x0, y0, x1, y1, flip = self._known.views[place].tolist()
        return View((x0, y0, x1, y1), bool(flip))


class SourceSamples:
    """The images of a source without a cache, for training with the teacher online."""

    whole = True
    codes_shape: tuple[int, ...] | None = None
    codes_dtype = np.dtype(np.int8)

    def __init__(self, source: Source, shard_samples: int = 256) -> None:
        self.source, self.shard_samples, self.chunk_samples = source, shard_samples, shard_samples
        self.keys, self.labels = list(source.keys), list(source.labels)
        self.usable = np.ones(len(source), bool)

    def open(self, shard: int) -> "_SourceShard":
        return _SourceShard(self, shard * self.shard_samples)


class _SourceShard:
    def __init__(self, samples: SourceSamples, first: int) -> None:
        self._samples, self._first = samples, first

    def expect(self, *, images: bool) -> None:
        pass

    def read_codes(self, chunk: int, wanted: Mapping[int, np.ndarray]) -> None:
        raise SamiCacheError("images without a cache come without codes")

    def encoded(self, place: int) -> bytes:
        return self._samples.source.read(self._first + place)

    def pixels(self, place: int) -> np.ndarray:
        return decode_source(self.encoded(place), self._samples.keys[self._first + place])

    def view(self, place: int) -> View | None:
        return None


def decode_source(data: bytes, key: str) -> np.ndarray:
    """A source's image as uint8 [h, w, 3]. Raises ImageError that names it."""
    try:
        return np.array(decode_image(data))  # of Pillow's memory one may not write, and torch warns of that
    except ImageError as error:
        raise ImageError(
            f"image {key!r}: {error}. Remove it, or train from a cache: extraction records such images and goes on."
        ) from error
