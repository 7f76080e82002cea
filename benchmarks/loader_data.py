"""What the loader benchmark serves: two caches of real codes, about 50 KB a sample, made once by our own writing code.

Embeddings of EfficientNet-Lite0 for photographs: 50 of the 112 channels of its last stage of stride 16 at 512 pixels (32 x 32
cells), and 256 of the 672 channels inside that stage's last block at 224 pixels (14 x 14). The error that the codec is asked
for is searched so that a sample's codes have the wanted size. There are more samples than photographs: a shard holds each
photograph once, the next shard draws anew, so no chunk and no window of a compressor sees the same codes twice.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from loader_samples import PlainSamples
from PIL import Image

from sami_cache.data.images import decode_image, encode_jpeg
from sami_cache.models.teachers import load_teacher
from sami_cache.store.cache import Cache, choose_layout
from sami_cache.store.codecs import Codec
from sami_cache.store.commits import Sample
from sami_cache.store.creation import create_cache
from sami_cache.store.files import digest
from sami_cache.store.fitting import fit_codec
from sami_cache.store.writing import seal_cache, write_shard

KINDS = {"dense-32": (32, 512), "grid-14": (14, 224)}
"""Name of a cache: its grid and the teacher's input in pixels."""
CODE_BYTES = 32 * 32 * 50
INNER_CHANNELS = 256
DENSE_CHANNELS = 50


def make_cache(
    kind: str, data: Path, work: Path, *, samples: int, shard_samples: int = 512, code_bytes: int = CODE_BYTES
) -> tuple[Path, Path]:
    """The cache and the plain copy of its samples that the peers' files are made from; those of an earlier call if they fit."""
    grid, size = KINDS[kind]
    cache_path, plain_path = work / f"{kind}.zarr", work / f"{kind}-plain"
    if not (plain_path / "done").exists() or len(PlainSamples(plain_path)) != samples:
        for path in (cache_path, plain_path):
            shutil.rmtree(path, ignore_errors=True)
        jpegs, embeddings = _embed(data, grid, size, at_least=shard_samples)
        cache = _write_cache(cache_path, jpegs, embeddings, samples, shard_samples, code_bytes)
        write_plain(cache, plain_path)
    return cache_path, plain_path


def _embed(data: Path, grid: int, size: int, at_least: int) -> tuple[list[bytes], np.ndarray]:
    """JPEGs of short side 256 and float32 [n, C, grid, grid]; photographs, and random parts of them until there are enough."""
    teacher = load_teacher("efficientnet_lite0", image_size=size, grid=grid)
    photographs = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not photographs:
        raise SystemExit(f"{data}: no photographs (.jpg, .jpeg, .png)")
    rng = np.random.default_rng(0)
    jpegs, embeddings = [], []
    for number in range(max(at_least, len(photographs))):
        image = decode_image(photographs[number % len(photographs)].read_bytes())
        if number >= len(photographs):
            low = rng.random(2) * 0.3
            box = (*(low * image.size), *((low + 0.7) * image.size))
            image = image.crop(tuple(int(side) for side in box))  # type: ignore[arg-type]
        jpegs.append(encode_jpeg(image))
        pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        embeddings.append(_features(teacher, torch.from_numpy(pixels)[None], grid))
    return jpegs, np.concatenate(embeddings)


@torch.no_grad()
def _features(teacher, pixels: torch.Tensor, grid: int) -> np.ndarray:
    if grid == 32:
        # As many channels as give the wanted size at the error that a cache has by default.
        return teacher(teacher.normalise(pixels)).numpy()[:, :DENSE_CHANNELS]
    # What enters the last projection of the last block of stride 16: 672 channels, of which every second and third is taken.
    inner = []
    layer = dict(teacher.encoder.named_modules())["blocks.4.2.conv_pwl"]
    hook = layer.register_forward_pre_hook(lambda _, arguments: inner.append(arguments[0]))
    teacher(teacher.normalise(pixels))
    hook.remove()
    chosen = np.linspace(0, inner[0].shape[1] - 1, INNER_CHANNELS).astype(int)
    return inner[0][:, chosen].numpy()


def codec_of_size(embeddings: np.ndarray, code_bytes: int) -> Codec:
    """A codec whose codes have about `code_bytes` bytes a sample: a smaller error keeps more coefficients."""
    grid = embeddings.shape[2]
    low, high = 1e-5, 0.5
    best: tuple[float, Codec] | None = None
    for _ in range(9):
        error = float(np.sqrt(low * high))
        codec = fit_codec("pca", embeddings, error=error)
        size = int(np.prod(codec.sample_shape(grid)))
        miss = abs(np.log(size / code_bytes))
        if best is None or miss < best[0]:
            best = miss, codec
        low, high = (error, high) if size > code_bytes else (low, error)
    assert best
    return best[1]


def _write_cache(
    path: Path, jpegs: list[bytes], embeddings: np.ndarray, samples: int, shard_samples: int, code_bytes: int
) -> Cache:
    grid = embeddings.shape[2]
    codec = codec_of_size(embeddings[:: max(1, len(embeddings) // 256)], code_bytes)
    keys = [f"n{number // 1300:08d}/{number:08d}.JPEG" for number in range(samples)]
    identity = {
        "teacher": {"name": "efficientnet_lite0"},
        "grid": grid,
        "view": {"mode": "dense"},
        "images": {"short_side": 256, "quality": 90},
        "codec": {"name": "pca", "error": codec.error},
    }
    cache = create_cache(
        path,
        identity=identity,
        codec=codec,
        layout=choose_layout(codec, grid, samples, shard_samples),
        keys=keys,
        labels=[None] * samples,
        class_names=None,
        provenance={},
    )
    sizes = [decode_image(jpeg).size for jpeg in jpegs]
    for shard in range(cache.shards):
        numbers = cache.shard_samples(shard)
        drawn = np.random.default_rng(shard).permutation(len(jpegs))[: len(numbers)]
        rows = [
            Sample(key=keys[number], source=digest(jpegs[image]), width=sizes[image][0], height=sizes[image][1])
            for number, image in zip(numbers, drawn.tolist(), strict=True)
        ]
        write_shard(cache, shard, embeddings[drawn], rows, [jpegs[image] for image in drawn.tolist()])
    seal_cache(cache)
    return cache


def write_plain(cache: Cache, path: Path) -> None:
    """What comes out of the cache, as flat files, so that every contestant starts from the same bytes."""
    codes, jpegs = [], []
    for shard in range(cache.shards):
        codes.append(cache.read_codes(shard))
        jpegs += [jpeg or b"" for jpeg in cache.read_jpegs(shard)]
    PlainSamples.write(path, np.concatenate(codes), jpegs, cache.layout.shard_samples)
