"""Scores of rotations, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq import _core
from lowbitq.linears import Activation, QuantizedLinear
from lowbitq.quantizers import quantize
from lowbitq.rotation_scores import (
    massive_tokens,
    round_inputs,
    score_rotation,
    token_errors,
    weighted_quantile,
)
from lowbitq.rotations import Rotation


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 64, None])
def test_inputs_are_rounded_by_the_formula(bits, group):
    x = normal(7, 200)
    step = group or 128
    limit = 2 ** (bits - 1) - 1
    expected = np.empty(x.shape)
    for begin in range(0, 200, step):
        part = x[:, begin : begin + step].astype(float)
        scale = abs(part).max(1, keepdims=True) / limit
        expected[:, begin : begin + step] = scale * np.rint(part / scale)
    assert np.allclose(round_inputs(x, Activation(bits), group), expected, atol=1e-5)


@pytest.mark.parametrize("zero", [0.0, 0.5, "token"])
def test_packed_copies_round_alike(zero):
    """A layer on rounded inputs in float32 is the packed layer on the inputs."""
    x = normal(5, 64, seed=1)
    tensor = quantize(normal(16, 64, seed=2), "int4g32")
    how = Activation(4, clip=0.9, zero=zero)
    layer = QuantizedLinear.of(tensor)
    [copy] = layer.copies
    packed = QuantizedLinear((type(copy)(tensor, activation=how),)).forward(x)
    expected = round_inputs(x, how, 32).astype(float) @ tensor.dequantize().T
    assert np.allclose(packed, expected, atol=1e-4)


def test_scores_are_their_definitions():
    x = normal(50, 48, seed=3)
    x[:, 5] *= 20
    x[7, 9] = 900
    x[11] = 0
    rotation = Rotation(48, seed=2)
    for turn in (None, rotation):
        z = (x if turn is None else turn.apply(x)).astype(float)
        errors = token_errors(x, turn, group=16)
        rounded = round_inputs(z.astype(np.float32), Activation(4), 16)
        expected = np.square(rounded - z).sum(1) / np.square(z).sum(1).mean()
        assert np.allclose(errors, expected, rtol=1e-3, atol=1e-12)
        found = score_rotation(x, turn, group=16)
        z = np.delete(z, 11, axis=0)  # nothing is known of a token of zeros
        peaks = abs(z).max(1) / np.sqrt(np.square(z).mean(1))
        assert np.isclose(found.peak, peaks.mean(), rtol=1e-5)
        assert np.isclose(found.largest_peak, peaks.max(), rtol=1e-5)
        kurtosis = (z**4).mean(1) / np.square(z).mean(1) ** 2
        assert np.isclose(found.kurtosis, kurtosis.mean(), rtol=1e-4)
        assert np.isclose(found.error, errors.mean())
        for share, value in ((0.9, found.p90), (0.99, found.p99)):
            assert value == np.quantile(errors, share, method="inverted_cdf")
        assert found.largest_error == errors.max()
        assert found.massive == 1
        assert np.isclose(found.massive_share, errors[7] / errors.sum())


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotations_spread_an_outlier_channel(kind):
    """A channel 30 times as large among 512: max / RMS falls below 6."""
    x = normal(64, 512, seed=4)
    x[:, 100] *= 30
    before, after = score_rotation(x), score_rotation(x, Rotation(512, kind, seed=1))
    assert after.largest_peak < 6 < before.peak
    assert after.kurtosis < 4 < before.kurtosis
    assert after.error < before.error


def test_a_token_is_massive_by_its_own_median():
    x = np.float32([[1, 2, -3], [0.01, 0.02, 3], [0, 0, 1]])
    assert massive_tokens(x, 100).tolist() == [False, True, True]
    assert massive_tokens(x, 1).tolist() == [True, True, True]


def test_weights_count_tokens_of_a_quantile():
    values, counts = np.array([5.0, 1.0, 3.0, 2.0]), np.array([1, 3, 4, 2])
    repeated = np.repeat(values, counts)
    for share in (0.1, 0.3, 0.5, 0.9, 0.95, 1.0):
        expected = np.quantile(repeated, share, method="inverted_cdf")
        assert weighted_quantile(values, counts.astype(float), share) == expected


def test_refusals():
    with pytest.raises(TypeError, match="float32"):
        token_errors(np.ones((2, 2)))
    with pytest.raises(ValueError, match="expected \\(tokens, n\\)"):
        token_errors(np.ones(2, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        token_errors(np.full((1, 2), np.nan, np.float32))
    with pytest.raises(ValueError, match="only zeros"):
        token_errors(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="group is 40"):
        round_inputs(np.ones((1, 2), np.float32), Activation(4), 40)
    values, x = np.float32([1, 0, 0]), np.ones((1, 40), np.float32)
    with pytest.raises(ValueError, match="step is 40"):
        _core.round_inputs(x, values, x.copy(), bits=4, step=40)
    with pytest.raises(ValueError, match="bits"):
        _core.round_inputs(x, values, x.copy(), bits=5, step=16)
