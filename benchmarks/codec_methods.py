"""What `codecs.py` compares: methods that turn embeddings into codes, and coders that turn codes into bytes."""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import numcodecs
import numpy as np
import zstandard
from rate_distortion import Features, groups, principal

from sami_cache.store.fitting import fit_codec
from sami_cache.store.shards import ShardLayout, pack_shard, unpack_chunk

OURS = "pca (ours)"
STORED = "as stored"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Methods: embeddings to codes and back.


class Method(Protocol):
    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 [n, C, h, w] -> codes [n, classes, ...]; codes of one class are alike."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> float32 [n, C, h, w]."""
        ...


class Float16:
    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings.astype(np.float16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes.astype(np.float32)


class BFloat16:
    """The upper half of a float32, rounded to nearest, ties to even."""

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(embeddings).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.uint32) << 16).view(np.float32)


class BitRounding:
    """float32 whose last bits are zero."""

    def __init__(self, bits: int) -> None:
        self._filter = numcodecs.BitRound(keepbits=bits)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        return np.asarray(self._filter.encode(embeddings)).view(np.float32).reshape(embeddings.shape)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes


class Int8:
    """Each channel by itself: its largest magnitude becomes `limit`; below 127 the step is coarser."""

    def __init__(self, features: Features, limit: int) -> None:
        self._mean, self._limit = features.mean, np.float32(limit)
        largest = np.abs(features.fit - self._mean).max((0, 2, 3), keepdims=True)[0]
        self._step = np.where(largest > 0, largest / self._limit, 1)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        return np.clip(np.rint((embeddings - self._mean) / self._step), -self._limit, self._limit).astype(np.int8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes * self._step + self._mean


class ProductQuantiser:
    """faiss: the channels of a cell in `parts` of equal size, each replaced by the nearest of 256 centroids."""

    def __init__(self, features: Features, parts: int) -> None:
        import faiss

        faiss.omp_set_num_threads(os.cpu_count() or 1)
        self._channels, self._grid = features.fit.shape[1:3]
        self._quantiser = faiss.ProductQuantizer(self._channels, parts, 8)
        self._quantiser.cp.max_points_per_centroid = 64
        self._quantiser.cp.niter = 15
        rows = np.moveaxis(features.fit, 1, -1).reshape(-1, self._channels)
        chosen = np.random.default_rng(0).choice(len(rows), min(len(rows), 256 * 64), replace=False)
        self._quantiser.train(np.ascontiguousarray(rows[chosen]))
        faiss.omp_set_num_threads(1)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(np.moveaxis(embeddings, 1, -1).reshape(-1, self._channels))
        codes = self._quantiser.compute_codes(rows).reshape(len(embeddings), -1, self._quantiser.M)
        return np.ascontiguousarray(codes.transpose(0, 2, 1))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(codes.transpose(0, 2, 1)).reshape(-1, self._quantiser.M)
        cells = self._quantiser.decode(rows).reshape(len(codes), self._grid, self._grid, self._channels)
        return np.ascontiguousarray(np.moveaxis(cells, -1, 1))


class ChannelPCA:
    """PCA of the channels, one step, no transform in space; directions below the noise of the step are dropped."""

    def __init__(self, features: Features, error: float) -> None:
        fit = features.fit
        variances, basis = principal(fit, features.mean)
        rotated = basis @ (fit - features.mean)[:32].reshape(min(32, len(fit)), len(basis), -1)
        power = np.square(rotated, dtype=np.float64).mean((0, 2))

        def lost(step: float) -> float:
            kept = variances > step * step / 12
            rounded = np.rint(rotated[:, kept] / np.float32(step)) * np.float32(step)
            inside = np.square(rotated[:, kept] - rounded).mean((0, 2), dtype=np.float64).sum()
            return float((inside + power[~kept].sum()) / power.sum())

        low, high = 0.0, float(np.sqrt(12 * variances[0]))
        for _ in range(20):
            self.step = (low + high) / 2
            low, high = (self.step, high) if lost(self.step) < error else (low, self.step)
        self._basis = basis[variances > self.step**2 / 12]
        self._mean, self._centre = features.mean[:, 0], self._basis @ features.mean[:, 0]
        wide = np.abs(self._basis @ (fit[:32].reshape(-1, len(basis), fit[0, 0].size) - self._mean)).max() > 127 * self.step
        self._limit, self._dtype = (32767, np.int16) if wide and error < 0.005 else (127, np.int8)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        scaled = (self._basis @ embeddings.reshape(*embeddings.shape[:2], -1) - self._centre) * np.float32(1 / self.step)
        codes = np.clip(np.rint(scaled, out=scaled), -self._limit, self._limit, out=scaled).astype(self._dtype)
        return codes.reshape(len(embeddings), -1, *embeddings.shape[2:])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        scaled = codes.reshape(*codes.shape[:2], -1) * np.float32(self.step)
        return (self._basis.T @ scaled + self._mean).reshape(len(codes), -1, *codes.shape[2:])


def families(features: Features) -> dict[str, dict[Any, Callable[[], Method]]]:
    """Every method with the values of its parameter."""
    channels = features.fit.shape[1]
    found: dict[str, dict[Any, Callable[[], Method]]] = {
        OURS: {error: partial(fit_codec, "pca", features.fit, error=error) for error in (0.0008, 0.003, 0.01, 0.03, 0.1, 0.3)},
        "PCA only": {error: partial(ChannelPCA, features, error) for error in (0.0008, 0.003, 0.01, 0.03, 0.1, 0.3)},
        "int8 per channel": {limit: partial(Int8, features, limit) for limit in (127, 63, 31, 15, 7)},
        "bit-rounding": {bits: partial(BitRounding, bits) for bits in (10, 7, 5, 4, 3, 2, 1)},
        "float16": {"": Float16},
        "bfloat16": {"": BFloat16},
    }
    if installed("faiss", "faiss-cpu"):
        parts = [channels // size for size in (1, 2, 4, 8) if channels % size == 0]
        found["PQ (faiss)"] = {part: partial(ProductQuantiser, features, part) for part in parts}
    return found


def installed(module: str, package: str) -> bool:
    if find_spec(module):
        return True
    say(f"{module} is left out: not installed (pip install {package})")
    return False


# Coders: codes to bytes and back.


class Coder(Protocol):
    def pack(self, codes: np.ndarray) -> bytes: ...

    def unpack(self, packed: bytes, out: np.ndarray) -> None: ...


class Raw:
    def pack(self, codes: np.ndarray) -> bytes:
        return codes.tobytes()

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        out[...] = np.frombuffer(packed, out.dtype).reshape(out.shape)


class Zstd:
    def __init__(self, level: int, **settings: int) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(level, write_checksum=True, **settings)
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def pack(self, codes: np.ndarray) -> bytes:
        return self._compressor.compress(codes.data)

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        with self._decompressor.stream_reader(packed) as reader:
            reader.readinto(out.data.cast("B"))


class Stored:
    """The bytes of a shard that holds one chunk: zstd with our parameters, both checksums, the index."""

    def __init__(self) -> None:
        self._checksums: dict[bytes, int] = {}

    @staticmethod
    def _layout(codes: np.ndarray) -> ShardLayout:
        return ShardLayout(
            sample_shape=codes.shape[1:], dtype=codes.dtype.name, shard_samples=len(codes), chunk_samples=len(codes)
        )

    def pack(self, codes: np.ndarray) -> bytes:
        return pack_shard(codes, self._layout(codes))[0]

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        layout = self._layout(out)
        chunk = packed[: -layout.index_bytes]
        unpack_chunk(chunk, layout, int.from_bytes(chunk[-4:], "little"), dict(enumerate(out)), "benchmark")


class Lzma:
    """LZMA's adaptive range coder, contexts as for bytes that stand alone, through numcodecs."""

    def __init__(self) -> None:
        import lzma

        filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "lc": 0, "lp": 0, "pb": 0, "mode": lzma.MODE_FAST}]
        self._codec = numcodecs.LZMA(format=lzma.FORMAT_RAW, filters=filters)

    def pack(self, codes: np.ndarray) -> bytes:
        return bytes(self._codec.encode(codes))

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        self._codec.decode(packed, out=out)


class Blosc:
    def __init__(self, name: str, shuffle: int) -> None:
        self._codec = numcodecs.Blosc(cname=name, clevel=1 if name == "zstd" else 5, shuffle=shuffle)

    def pack(self, codes: np.ndarray) -> bytes:
        return bytes(self._codec.encode(codes))

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        self._codec.decode(packed, out=out)


class Blosc2:
    def __init__(self) -> None:
        import blosc2

        blosc2.set_nthreads(1)
        self._blosc2 = blosc2

    def pack(self, codes: np.ndarray) -> bytes:
        packed = self._blosc2.compress2(
            codes, typesize=codes.itemsize, codec=self._blosc2.Codec.ZSTD, clevel=1, filters=[self._blosc2.Filter.BITSHUFFLE]
        )
        assert isinstance(packed, bytes)
        return packed

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        self._blosc2.decompress2(packed, dst=out)


class RangeANS:
    """constriction: ANS with a frozen histogram for each of up to 64 groups of classes, counted on the fitted half."""

    def __init__(self, fit: np.ndarray, seen: np.ndarray) -> None:
        import constriction

        self._coder = constriction.stream.stack.AnsCoder
        # Values outside the fitted range would need an escape; here the range is known and only their rate counts.
        self._low = int(min(fit.min(), seen.min()))
        size = int(max(fit.max(), seen.max())) - self._low + 1
        self._groups = groups(fit.shape[1])
        self._models = []
        for group in self._groups:
            counts = np.bincount(fit[:, group].astype(np.int64).ravel() - self._low, minlength=size) + 0.5
            self._models.append(constriction.stream.model.Categorical(counts / counts.sum(), lazy=False, perfect=False))

    def pack(self, codes: np.ndarray) -> bytes:
        coder = self._coder()
        for group, model in zip(self._groups[::-1], self._models[::-1], strict=True):
            coder.encode_reverse(codes[:, group[0] : group[-1] + 1].astype(np.int32).ravel() - self._low, model)
        return coder.get_compressed().tobytes()

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        coder = self._coder(np.frombuffer(packed, np.uint32))
        for group, model in zip(self._groups, self._models, strict=True):
            part = out[:, group[0] : group[-1] + 1]
            part[...] = (coder.decode(model, part.size) + self._low).reshape(part.shape)


class Pcodec:
    """pcodec: an adaptive histogram and tANS for each of up to `most` groups of classes; each behind its length."""

    def __init__(self, codes: np.ndarray, most: int = 64) -> None:
        import pcodec

        self._standalone = pcodec.standalone
        if codes.dtype.kind == "f":
            self._settings = pcodec.ChunkConfig()
        else:
            mode, delta = pcodec.ModeSpec.classic(), pcodec.DeltaSpec.no_op()
            self._settings = pcodec.ChunkConfig(mode_spec=mode, delta_spec=delta, enable_8_bit=True)
        self._groups = groups(codes.shape[1], most)

    def pack(self, codes: np.ndarray) -> bytes:
        parts = []
        for group in self._groups:
            part = np.ascontiguousarray(codes[:, group[0] : group[-1] + 1]).ravel()
            packed = self._standalone.simple_compress(part, self._settings)
            parts += [len(packed).to_bytes(4, "little"), packed]
        return b"".join(parts)

    def unpack(self, packed: bytes, out: np.ndarray) -> None:
        view, offset = memoryview(packed), 0
        for group in self._groups:
            part = out[:, group[0] : group[-1] + 1]
            size = int.from_bytes(view[offset : offset + 4], "little")
            room = np.empty(part.size, out.dtype)
            self._standalone.simple_decompress_into(bytes(view[offset + 4 : offset + 4 + size]), room)
            part[...] = room.reshape(part.shape)
            offset += 4 + size


def coders(method: str, fit: np.ndarray, seen: np.ndarray) -> dict[str, Coder]:
    """The coders for a method's codes: `fit` of the fitted half, `seen` of the other."""
    found: dict[str, Coder] = {STORED: Stored()} if method == OURS else {"none": Raw()}
    found |= {f"zstd {level}": Zstd(level) for level in (1, 3, 9)}
    found["zstd 1, 16 KB window"] = Zstd(1, window_log=14, min_match=7, hash_log=6)
    found["blosc lz4 shuffle"] = Blosc("lz4", numcodecs.Blosc.SHUFFLE)
    found["blosc zstd 1 shuffle"] = Blosc("zstd", numcodecs.Blosc.SHUFFLE)
    found["blosc zstd 1 bitshuffle"] = Blosc("zstd", numcodecs.Blosc.BITSHUFFLE)
    if find_spec("blosc2"):
        found["blosc2 zstd 1 bitshuffle"] = Blosc2()
    if find_spec("pcodec"):
        found["pcodec"] = Pcodec(fit)
    if find_spec("constriction") and few_values(fit):
        found["ANS (constriction)"] = RangeANS(fit, seen)
    return found


def few_values(codes: np.ndarray) -> bool:
    """Whether a histogram of each class can be counted: not of 16-bit floats."""
    return codes.dtype.kind in "iu" and (codes.itemsize == 1 or codes.dtype.kind == "i")
