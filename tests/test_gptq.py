"""GPTQ of a matrix: numbers out of range, in the weights and in the Hessian."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq.formats import Format
from lowbitq.gptq import feedback, gptq
from lowbitq.quantizers import adaround, relative_error

SMALL = [
    "int2g64",
    "int4g64sym",
    "int4g64symz8",
    "binary",
    "nf4",
    "ternaryg64",
    "kmeans2g64",
    "int4g32s8",
    "lattice2g64",
    "trellis2w10",
]


def normal(rows, cols, seed=0):
    return np.random.default_rng([seed, rows, cols]).standard_normal((rows, cols), np.float32)


@pytest.mark.parametrize("order", ["group", "act", "none"])
def test_the_scale_of_the_hessian_does_not_matter(order):
    weight, hessian = normal(16, 128), oracle.gram(128, 0)
    hessian[7] = hessian[:, 7] = 0

    def run(unit, importance):
        inputs = feedback(hessian * unit, group=64, order=order)
        return gptq(weight, inputs, "int3g64", importance=importance, sweeps=1)

    expected, error = run(1.0, importance=False)
    with_importance = run(1.0, importance=True)[1]
    for unit in (1e38, 1e-38, 1e200, 1e-300, 1e300):
        found = run(unit, importance=False)
        assert (found[0].panels == expected.panels).all()
        assert found[1] == pytest.approx(error, rel=1e-9)
        # Importance is rounded to float32, so that a close call may end otherwise.
        assert run(unit, importance=True)[1] == pytest.approx(with_importance, rel=0.02)


def test_a_power_of_two_changes_no_bit():
    weight, hessian = normal(16, 192), oracle.gram(192, 0)
    for power in (-1000, -130, 130, 1000):
        known = [feedback(h, group=64) for h in (hessian, np.ldexp(hessian, power))]
        found = [gptq(weight, inputs, "int2g64", sweeps=2) for inputs in known]
        assert (found[0][0].panels == found[1][0].panels).all()
        assert found[0][1] == found[1][1]
        rounded = [adaround(weight[:2], h, "int2g64", steps=9)
                   for h in (hessian, np.ldexp(hessian, power))]  # fmt: skip
        assert (rounded[0].panels == rounded[1].panels).all()


@pytest.mark.parametrize("text", ["trellis2w10", "trellis1.5", "lattice2"])
@pytest.mark.parametrize("order", ["none", "act"])
def test_sweeps_lower_the_error_of_codes_without_order(text, order):
    weight, hessian = normal(100, 190), oracle.gram(190, 0)  # neither whole strips nor whole runs
    inputs = feedback(hessian, run=Format.parse(text).run, order=order)
    errors = [gptq(weight, inputs, text, sweeps=sweeps)[1] for sweeps in (0, 1, 3)]
    assert errors[1] < 0.995 * errors[0]
    assert errors[2] <= errors[1]


@pytest.mark.parametrize("text", SMALL)
@pytest.mark.parametrize("order", ["group", "act"])
def test_zeros_stay_zeros_and_small_weights_do_not_grow(text, order):
    hessian, weight = oracle.gram(192, 1, decay=0), normal(20, 192)
    format = Format.parse(text)
    inputs = feedback(hessian, group=format.group, run=format.run, order=order)
    assert not gptq(np.zeros_like(weight), inputs, text)[0].dequantize().any()
    mixed = weight.copy()
    mixed[3] = 0
    mixed[:, 64:128] = 0
    for sweeps in (0, 2):
        values = gptq(mixed, inputs, text, sweeps=sweeps)[0].dequantize()
        assert not values[3].any()
        if format.group:
            assert not values[:, 64:128].any()
    for exponent in (-7, -8, -9, -12, -42):
        small = (weight.astype(float) * 10.0**exponent).astype(np.float32)
        tensor, error = gptq(small, inputs, text)
        assert error <= 1 + 1e-3
        assert relative_error(small, tensor.dequantize()) <= 1 + 1e-6


@pytest.mark.parametrize("text", ["int3g64", "int4", "nf4g64", "int3tensor", "int4g32s8"])
@pytest.mark.parametrize("order", ["group", "act"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e32])
def test_unfit_weights_are_named_in_dead_columns_too(text, order, bad):
    weight, hessian = normal(20, 128), oracle.gram(128, 2)
    hessian[33] = hessian[:, 33] = 0
    inputs = feedback(hessian, group=Format.parse(text).group, order=order)
    for column in (33, 70):
        wrong = weight.copy()
        wrong[17, column] = bad
        with pytest.raises(ValueError, match=rf"weight\[17, {column}\] is "):
            gptq(wrong, inputs, text)


@pytest.mark.parametrize("range", ["mse", "minmax", "percentile"])
def test_weights_beyond_float16_scales_are_refused_as_by_quantize(range):
    weight = normal(20, 128)
    inputs = feedback(oracle.gram(128, 2), group=64)
    weight[17, 70] = 4e4
    with pytest.raises(ValueError, match=r"weight\[17, 70\] is 40000, expected at most 32752"):
        gptq(weight, inputs, "int3g64", range=range)
    weight[17, 70] = 3e4
    assert np.isfinite(gptq(weight, inputs, "int3g64", range=range)[0].dequantize()).all()


def test_a_loud_input_spoils_no_weight():
    """1e4 times the others: its square has 1e8 times their importance."""
    x = np.random.default_rng(0).standard_normal((300, 128))
    weight, loud = normal(32, 128), np.where(np.arange(128) == 7, 1e4, 1)
    quiet, noisy = (
        gptq(weight, feedback((x * by).T @ (x * by), group=64), "int3g64")
        for by in (np.ones(128), loud)
    )
    errors = [relative_error(weight, tensor.dequantize()) for tensor, _ in (quiet, noisy)]
    assert errors[1] <= 3 * errors[0]
    assert noisy[1] <= 1e-6


def test_unfit_hessians_are_named():
    with pytest.raises(TypeError, match="hessian is not an ndarray of float64"):
        feedback(np.eye(4, dtype=np.float32))
    with pytest.raises(TypeError, match="hessian is not an ndarray of float64"):
        feedback([[1.0]])
    for value, at in ((np.nan, (0, 3)), (np.inf, (2, 2)), (-1.0, (1, 1)), (-np.inf, (0, 1))):
        hessian = np.eye(4)
        hessian[at] = value
        with pytest.raises(ValueError, match=rf"hessian H\[{at[0]}, {at[1]}\] is "):
            feedback(hessian)
