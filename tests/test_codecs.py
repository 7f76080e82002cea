"""Codecs: the error they promise is the error they make, on embeddings they have not seen."""

import warnings
from functools import lru_cache

import numpy as np
import pytest
from conftest import teacher_like
from photos import pieces

from sami_cache.errors import SamiCacheError
from sami_cache.store.codecs import Codec, fit_codec


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
    codec = fit_codec("pca", embeddings)
    assert np.abs(codec.basis.astype(np.float64) @ codec.basis.T - np.eye(codec.kept)).max() < 1e-6
    assert (codec.step == codec.step[0]).all()
    a, b = codec.encode(embeddings[:32]), codec.encode(embeddings[32:64])
    between_codes = np.square(a.astype(np.float64) - b, dtype=np.float64).sum() * float(codec.step[0]) ** 2
    between_embeddings = np.square(codec.decode(a).astype(np.float64) - codec.decode(b)).sum()
    assert between_embeddings == pytest.approx(between_codes, rel=1e-5)


@pytest.mark.parametrize("name", ["pca", "int8", "float16"])
def test_the_same_sample_gives_the_same_codec_bit_for_bit(name: str) -> None:
    one, two = fit_codec(name, teacher_like(40)), fit_codec(name, teacher_like(40))
    assert one.parameters() == two.parameters()
    for array in ("basis", "mean", "step"):
        assert getattr(one, array).dtype == np.float32
        assert getattr(one, array).tobytes() == getattr(two, array).tobytes()


def test_the_sign_of_the_basis_is_fixed() -> None:
    basis = fit_codec("pca", teacher_like(40)).basis
    assert (basis[np.arange(len(basis)), np.abs(basis).argmax(1)] > 0).all()


@pytest.mark.parametrize("name", ["pca", "int8", "float16"])
def test_decoding_is_the_documented_line(name: str) -> None:
    embeddings = teacher_like(8)
    codec = fit_codec(name, embeddings)
    codes = codec.encode(embeddings)
    plain = codec.mean[:, None, None] + np.einsum("kc,nkyx->ncyx", codec.basis, codec.step[:, None, None] * codes)
    np.testing.assert_allclose(codec.decode(codes), plain, rtol=0, atol=1e-4)
    assert codec.decode(codes).dtype == np.float32


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
    assert codec.kept <= 24
    assert len(codec.spectrum) == 32
    assert list(codec.spectrum) == sorted(codec.spectrum, reverse=True)
    # They come back as their mean.
    np.testing.assert_allclose(codec.decode(codec.encode(joined))[:, 24:], 7.0, atol=0.1)
    assert codec.kept > fit_codec("pca", joined, error=0.2).kept


def test_a_giant_channel_takes_16_bits_and_keeps_the_error() -> None:
    """SAM's and DINOv2's features have channels of hundreds of times the others' size."""
    embeddings = teacher_like(128, seed=3)
    embeddings[:, 5] = 400 * embeddings[:, 5] + 5000
    for error, dtype in ((0.01, "int8"), (1e-5, "int16")):
        codec = fit_codec("pca", embeddings[:64], error=error)
        assert codec.dtype == dtype
        assert set_error(codec, embeddings[64:]) == pytest.approx(error, rel=0.1)
        assert codec.encode(embeddings).dtype == np.dtype(dtype)


def test_outliers_fall_to_16_bits_and_what_is_clipped_is_counted() -> None:
    embeddings = teacher_like(64)
    assert fit_codec("pca", embeddings).dtype == "int8"
    spiky = embeddings.copy()
    spiky[:, :, 0, 0] *= 40  # every sample, so that the judging quarter has them too
    codec = fit_codec("pca", spiky, error=0.0005)
    assert codec.dtype == "int16"
    assert not codec.clipped(codec.encode(spiky)).any()
    calm = fit_codec("pca", embeddings)
    codes = calm.encode(spiky)
    assert np.abs(codes.astype(int)).max() == 127  # clipped symmetrically, never wrapped round
    counts = calm.clipped(codes)
    assert counts.dtype == np.int64
    assert counts.tolist() == [int((np.abs(sample.astype(int)) == 127).sum()) for sample in codes]
    assert counts.sum() > 0
    error, _ = calm.distortion(spiky, codes)
    assert (error > 0.01).all()  # and what clipping costs is in the recorded error


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


def test_an_error_beyond_16_bits_is_refused() -> None:
    with pytest.raises(SamiCacheError, match="cannot be reached with 16-bit codes: ask for a larger error"):
        fit_codec("pca", teacher_like(16), error=1e-12)


def test_values_that_float16_cannot_hold_are_refused_not_turned_into_infinity() -> None:
    embeddings = teacher_like(4)
    codec = fit_codec("float16", embeddings)
    embeddings[2, 1, 0, 0] = 1e5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SamiCacheError, match="float16 ends at 65504: choose --codec pca or int8"):
            codec.encode(embeddings)
