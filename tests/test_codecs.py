"""Codecs: the error they promise is the error they make, on embeddings they have not seen, and the bytes are few."""

import warnings
from functools import lru_cache

import numpy as np
import pytest
from conftest import teacher_like
from photos import pieces

from sami_cache.errors import SamiCacheError
from sami_cache.store.codecs import Codec, block_dct, dct_matrix, inverse_block_dct
from sami_cache.store.fitting import HEADROOM, choose_block, fit_codec
from sami_cache.store.shards import ShardLayout, pack_shard


def set_error(codec: Codec, embeddings: np.ndarray) -> float:
    """Relative squared error over the whole set, from what is recorded of every sample."""
    error, energy = codec.distortion(embeddings, codec.encode(embeddings))
    return float((error * energy).sum() / energy.sum())


@lru_cache
def real_embeddings() -> np.ndarray:
    """efficientnet_lite0 on 192 pieces of photographs: float32 [192, 112, 16, 16]."""
    import torch

    from sami_cache.models.teachers import load_teacher

    teacher = load_teacher("efficientnet_lite0", grid=16)
    pixels = np.stack([np.asarray(piece.resize((256, 256))) for piece in pieces(192)])
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(16)
    return torch.cat([teacher(teacher.normalise(batch)) for batch in batches]).numpy()


@pytest.mark.parametrize("error", [0.003, 0.01, 0.1])
def test_error_on_other_samples_is_the_one_asked_for(error: float) -> None:
    codec = fit_codec("pca", teacher_like(256), error=error)
    others = teacher_like(256, seed=1)
    assert set_error(codec, others) == pytest.approx(error, rel=0.05)
    # Computed without the codec's own bookkeeping.
    lost = np.square(others - codec.decode(codec.encode(others)), dtype=np.float64).sum()
    assert lost / np.square(others - others.mean((0, 2, 3), keepdims=True), dtype=np.float64).sum() == pytest.approx(
        error, rel=0.05
    )


@pytest.mark.parametrize("error", [0.003, 0.01, 0.1])
def test_error_on_other_photographs_is_the_one_asked_for(error: float) -> None:
    features = real_embeddings()
    odd = np.arange(len(features)) // 4 % 2 == 1  # every second piece of each picture
    codec = fit_codec("pca", features[~odd], error=error)
    assert codec.dtype == "int8"
    assert set_error(codec, features[odd]) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("features", [lambda: teacher_like(64), real_embeddings], ids=["synthetic", "real"])
def test_the_basis_is_orthonormal_and_error_between_codes_is_error_between_embeddings(features) -> None:
    embeddings = features()[:64]
    codec = fit_codec("pca", embeddings, error=0.03)
    assert np.abs(codec.basis.astype(np.float64) @ codec.basis.T - np.eye(codec.directions)).max() < 1e-6
    assert np.abs(codec.dct.astype(np.float64) @ codec.dct.T - np.eye(codec.block)).max() < 1e-6
    assert (codec.step == codec.step[0]).all()
    assert len(codec.rows) == 1
    a, b = codec.encode(embeddings[:32]), codec.encode(embeddings[32:64])
    between_codes = np.square(a.astype(np.float64) - b, dtype=np.float64).sum() * float(codec.step[0]) ** 2
    between_embeddings = np.square(codec.decode(a).astype(np.float64) - codec.decode(b)).sum()
    assert between_embeddings == pytest.approx(between_codes, rel=1e-5)


@pytest.mark.parametrize("name", ["pca", "int8", "float16"])
def test_the_same_sample_gives_the_same_codec_bit_for_bit(name: str) -> None:
    one, two = fit_codec(name, teacher_like(40)), fit_codec(name, teacher_like(40))
    assert one.parameters() == two.parameters()
    for array in ("basis", "dct", "index", "mean", "step"):
        assert getattr(one, array).dtype == (np.int32 if array == "index" else np.float32)
        assert getattr(one, array).tobytes() == getattr(two, array).tobytes()


def test_the_sign_of_the_basis_is_fixed() -> None:
    basis = fit_codec("pca", teacher_like(40)).basis
    assert (basis[np.arange(len(basis)), np.abs(basis).argmax(1)] > 0).all()


@pytest.mark.parametrize(("name", "error"), [("pca", 0.1), ("pca", 0.0003), ("int8", 0.01), ("float16", 0.01)])
@pytest.mark.parametrize("grid", [8, 12, 32])
def test_decoding_is_the_documented_sum(name: str, error: float, grid: int) -> None:
    """Row by row and block by block, with SciPy's inverse DCT."""
    from scipy.fft import idctn

    embeddings = teacher_like(8, grid=grid)
    codec = fit_codec(name, embeddings, error=error)
    codes, b = codec.encode(embeddings), codec.block
    assert b == (choose_block(grid) if name == "pca" else 1)
    assert len(codec.rows) == (2 if error < 0.001 else 1)
    assert codes.shape == (8, *codec.sample_shape(grid)) == (8, codec.kept, grid // b, grid // b)
    values = np.zeros((8, codec.directions, b, b, grid // b, grid // b))
    for row, coefficient in enumerate(codec.index.tolist()):
        direction, vertical, horizontal = np.unravel_index(coefficient, (codec.directions, b, b))
        values[:, direction, vertical, horizontal] += codes[:, row].astype(float) * codec.step[row]
    rotated = np.zeros((8, codec.directions, grid, grid))
    for y, x in np.ndindex(grid // b, grid // b):
        rotated[:, :, y * b : y * b + b, x * b : x * b + b] = idctn(values[..., y, x], axes=(2, 3), norm="ortho")
    plain = codec.mean[:, None, None] + np.einsum("kc,nkyx->ncyx", codec.basis, rotated)
    np.testing.assert_allclose(codec.decode(codes), plain, rtol=0, atol=1e-4)
    assert codec.decode(codes).dtype == np.float32


@pytest.mark.parametrize("size", [1, 4, 7, 8, 13, 19])
def test_the_transform_is_scipys_and_can_be_undone(size: int) -> None:
    from scipy.fft import dctn

    values = np.random.default_rng(size).normal(size=(2, 3, 2 * size, 3 * size)).astype(np.float32)
    found = block_dct(values, dct_matrix(size)).reshape(2, 3, size, size, 2, 3)
    for y, x in np.ndindex(2, 3):
        block = values[:, :, y * size : (y + 1) * size, x * size : (x + 1) * size]
        np.testing.assert_allclose(found[..., y, x], dctn(block, axes=(2, 3), norm="ortho"), atol=1e-5)
    back = inverse_block_dct(found.reshape(2, 3 * size * size, 6), dct_matrix(size), (2, 3))
    np.testing.assert_allclose(back, values, atol=1e-5)


def test_blocks_divide_the_grid() -> None:
    assert {grid: choose_block(grid) for grid in (1, 8, 12, 14, 16, 24, 32, 37, 64)} == {
        1: 1, 8: 8, 12: 6, 14: 7, 16: 8, 24: 8, 32: 8, 37: 37, 64: 8
    }  # fmt: skip


def test_stored_bytes_come_near_the_bound_and_well_below_plain_pca() -> None:
    """Gaussian bound by reverse water-filling, computed here; at 1 % of photographs a good coder is within half a bit."""
    features = real_embeddings()
    odd = np.arange(len(features)) // 4 % 2 == 1
    codec, others = fit_codec("pca", features[~odd]), features[odd]

    def stored(codec: Codec) -> float:
        layout = ShardLayout(sample_shape=codec.sample_shape(16), dtype="int8", shard_samples=128, chunk_samples=16)
        return 8 * len(pack_shard(codec.encode(others), layout)[0]) / others.size

    plain = fit_codec("pca", features[~odd], block=1)
    assert set_error(plain, others) == pytest.approx(0.01, rel=0.05)
    rotated = codec.basis @ (others.reshape(96, 112, -1) - codec.mean[:, None])
    variances = np.square(block_dct(rotated.reshape(96, 112, 16, 16), codec.dct)).mean((0, 2))
    levels = np.geomspace(1e-3 * variances.mean(), variances.max(), 4000)
    lost = [np.minimum(variances, level).sum() / variances.sum() for level in levels]
    level = levels[np.searchsorted(lost, set_error(codec, others))]
    bound = np.log2(np.maximum(variances / level, 1)).mean() / 2
    assert bound < stored(codec) < bound + 0.5
    assert stored(codec) < 0.93 * stored(plain)


def test_rows_of_codes_come_in_the_order_of_their_spread() -> None:
    codec = fit_codec("pca", real_embeddings())
    spread = np.square(codec.encode(real_embeddings()).astype(float)).mean((0, 2, 3))
    means = [part.mean() for part in np.array_split(spread, 32)]
    assert means == sorted(means, reverse=True)


def test_int8_maps_each_channels_largest_magnitude_to_127() -> None:
    embeddings = teacher_like(32)
    codec = fit_codec("int8", embeddings)
    codes = codec.encode(embeddings)
    assert codes.dtype == np.int8
    assert (np.abs(codes.astype(int)).max((0, 2, 3)) == 127).all()
    assert np.abs(codec.decode(codes) - embeddings).max() <= codec.step.max() * 0.501
    assert codec.error is None


def test_float16_loses_half_a_unit_in_the_last_place() -> None:
    embeddings = teacher_like(32)
    codec = fit_codec("float16", embeddings)
    lost = np.abs(codec.decode(codec.encode(embeddings)) - embeddings)
    assert (lost <= np.abs(embeddings - codec.mean[:, None, None]) * 2.0**-11 + 1e-5).all()


def test_channels_below_the_noise_of_the_step_are_not_stored() -> None:
    embeddings = teacher_like(64)
    dead = np.full((64, 8, 8, 8), 7.0, np.float32) + 1e-3 * np.random.default_rng(0).normal(size=(64, 8, 8, 8))
    joined = np.concatenate([embeddings, dead.astype(np.float32)], 1)
    codec = fit_codec("pca", joined)
    assert codec.directions <= 24
    assert len(codec.spectrum) == 32
    assert list(codec.spectrum) == sorted(codec.spectrum, reverse=True)
    # They come back as their mean.
    np.testing.assert_allclose(codec.decode(codec.encode(joined))[:, 24:], 7.0, atol=0.1)
    assert len(fit_codec("pca", np.concatenate([embeddings, np.full((64, 8, 8, 8), 7, np.float32)], 1)).basis) <= 24
    assert codec.kept > fit_codec("pca", joined, error=0.2).kept


def test_a_giant_channel_is_stored_in_several_digits_and_keeps_the_error() -> None:
    """SAM's and DINOv2's features have channels of hundreds of times the others' size."""
    embeddings = teacher_like(128, seed=3)
    embeddings[:, 5] = 400 * embeddings[:, 5] + 5000
    for error, digits in ((0.01, 1), (1e-5, 2), (1e-8, 3)):
        codec = fit_codec("pca", embeddings[:64], error=error)
        codes = codec.encode(embeddings)
        assert codes.dtype == np.int8
        assert len(codec.rows) == digits
        assert not codec.clipped(codes).any()
        assert set_error(codec, embeddings[64:]) == pytest.approx(error, rel=0.1)


def test_digits_hold_what_the_sample_reached_with_headroom_and_what_is_clipped_is_counted() -> None:
    embeddings = teacher_like(64)
    for error in (0.01, 0.0005):
        codec = fit_codec("pca", embeddings, error=error)
        largest = np.abs(codec.encode(embeddings).astype(int))
        assert not codec.clipped(codec.encode(embeddings)).any()
        narrow = np.bincount(codec.index, minlength=codec.index.max() + 1)[codec.index] == 1
        assert largest.max((0, 2, 3))[narrow].max() <= 127 / HEADROOM
        assert narrow.all() == (error == 0.01)
    calm = fit_codec("pca", embeddings)
    spiky = embeddings.copy()
    spiky[:, :, 0, 0] *= 400
    codes = calm.encode(spiky)
    assert np.abs(codes.astype(int)).max() == 127  # clipped symmetrically, never wrapped round
    counts = calm.clipped(codes)
    assert counts.dtype == np.int64
    assert counts.tolist() == [int((np.abs(sample.astype(int)) == 127).sum()) for sample in codes]
    assert counts.sum() > 0
    error, _ = calm.distortion(spiky, codes)
    assert (error > 0.01).all()  # and what clipping costs is in the recorded error
    # Of several digits, too, the end of the range is where a coefficient stops.
    wide = fit_codec("pca", embeddings, error=0.0005)
    far = 300 * embeddings
    digits = np.bincount(wide.index, minlength=24 * 64)
    rotated = (wide.basis @ (far.reshape(64, 24, -1) - wide.mean[:, None])).reshape(64, -1, 8, 8)
    digits = digits[: wide.directions * 64]
    values = block_dct(rotated, wide.dct)[:, :, 0] / wide.step.min()
    limit = (255**digits - 1) // 2
    within = np.clip(np.sign(values) * np.floor(np.abs(values) + 0.45), -limit, limit)
    codes = wide.encode(far).astype(int)[..., 0, 0]
    found = np.zeros_like(within)
    np.add.at(found, (slice(None), wide.index), codes * np.rint(wide.step / wide.step.min()).astype(int))
    off = np.abs(found - within)
    assert off.max() <= 1  # a value on the edge between two codes
    assert (off == 0).mean() > 0.99
    assert set(np.unique(digits)) == {0, 1, 2}
    ends = (np.abs(within) >= np.where(digits == 2, 127 * 255 - 127, limit)) & (digits > 0)
    assert wide.clipped(wide.encode(far)).tolist() == ends.sum(1).tolist()


def test_outliers_of_the_sample_are_not_clipped() -> None:
    spiky = teacher_like(64)
    spiky[::8, :, 0, 0] *= 400
    codec = fit_codec("pca", spiky, error=0.0005)
    assert not codec.clipped(codec.encode(spiky)).any()
    assert set_error(codec, spiky) < 0.0006


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["pca", "int8", "float16"])
def test_tiny_samples_give_a_usable_codec(name: str, count: int) -> None:
    embeddings = teacher_like(count)
    codec = fit_codec(name, embeddings)
    assert codec.fit_samples == count
    assert set_error(codec, embeddings) < 0.02
    assert set_error(codec, teacher_like(16, seed=1)) < 0.1


def test_the_recorded_error_and_energy_are_those_of_the_sample() -> None:
    embeddings = teacher_like(16)
    codec = fit_codec("pca", embeddings)
    error, energy = codec.distortion(embeddings, codec.encode(embeddings))
    sample, mean = embeddings[3].astype(np.float64), codec.mean[:, None, None].astype(np.float64)
    lost = sample - codec.decode(codec.encode(embeddings[3:4]))[0]
    assert error[3] == pytest.approx((lost**2).sum() / ((sample - mean) ** 2).sum(), rel=1e-6)
    assert energy[3] == pytest.approx(((sample - mean) ** 2).mean() / codec.variance, rel=1e-6)
    assert error.dtype == energy.dtype == np.float64


@pytest.mark.parametrize("error", [0.01, 0.1])
def test_a_grid_without_a_divisor_is_one_block_and_reaches_the_error(error: float) -> None:
    """37 cells, DINOv2's grid, makes one block an image: few to judge by, and 1369 coefficients of each direction."""
    codec = fit_codec("pca", teacher_like(96, grid=37), error=error)
    assert codec.block == 37
    assert set_error(codec, teacher_like(24, grid=37, seed=1)) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("error", [0.01, 0.9, 0.999999])
def test_one_image_unlike_all_others_can_be_fitted(error: float) -> None:
    """Be it among those that choose the step or not."""
    for odd in range(8):
        embeddings = np.zeros((8, 24, 8, 8), np.float32)
        embeddings[odd] = teacher_like(1)[0]
        codec = fit_codec("pca", embeddings, error=error)
        assert codec.kept > 0
        assert np.isfinite(codec.decode(codec.encode(embeddings))).all()


@pytest.mark.parametrize("name", ["pca", "int8", "float16"])
def test_constant_embeddings_are_refused(name: str) -> None:
    with pytest.raises(SamiCacheError, match="the same everywhere: there is nothing to store"):
        fit_codec(name, np.full((4, 3, 2, 2), 1.5, np.float32))


@pytest.mark.parametrize("error", [0, 1, -0.1, 2, float("nan")])
def test_an_error_outside_its_range_is_refused(error: float) -> None:
    with pytest.raises(SamiCacheError, match=r"--error .*between 0 and 1, such as 0\.01"):
        fit_codec("pca", teacher_like(4), error=error)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(SamiCacheError, match="codec 'zip' is unknown; choose one of pca, int8, float16"):
        fit_codec("zip", teacher_like(4))


def test_an_error_beyond_24_bits_is_refused() -> None:
    with pytest.raises(SamiCacheError, match="--error 1e-16 is out of reach of 24-bit codes: ask for a larger one"):
        fit_codec("pca", teacher_like(16), error=1e-16)


def test_values_that_float16_cannot_hold_are_refused_not_turned_into_infinity() -> None:
    embeddings = teacher_like(4)
    codec = fit_codec("float16", embeddings)
    embeddings[2, 1, 0, 0] = 1e5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SamiCacheError, match="float16 ends at 65504: choose --codec pca or int8"):
            codec.encode(embeddings)
