"""GPTQ, Hessians and k-means of single matrices."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

import lowbitq as lq
from lowbitq.gptq import feedback
from lowbitq.gptq import gptq as with_feedback


def problem(seed=0, tokens=300, cols=64, rows=12):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, cols)) @ rng.standard_normal((cols, cols))
    return rng.standard_normal((rows, cols)), inputs


def test_a_hessian_is_the_sum_of_outer_products():
    _, inputs = problem()
    expected = sum(np.outer(x, x) for x in inputs.astype(np.float32).astype(np.float64))
    found = lq.hessian(inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * expected.max())
    assert np.array_equal(found, found.T)
    assert np.array_equal(lq.hessian(inputs.reshape(3, 100, 64)), found)


def test_gptq_takes_inputs_or_their_hessian():
    weight, inputs = problem()
    found = lq.gptq(weight, inputs, "int3g32")
    assert found == lq.gptq(weight, lq.hessian(inputs), "int3g32")
    assert found == lq.gptq(weight, inputs.reshape(3, 100, 64), "int3g32")
    known = feedback(lq.hessian(inputs), group=32)
    assert found == with_feedback(weight.astype(np.float32), known, "int3g32")[0]
    errors = [
        np.linalg.norm(inputs @ (weight - tensor).T)
        for tensor in (found, lq.quantize(weight, "int3g32"))
    ]
    assert errors[0] < 0.8 * errors[1]


def test_options_of_rounding_are_followed():
    weight, inputs = problem()
    error = {
        sweeps: np.linalg.norm(
            inputs @ (weight - lq.gptq(weight, inputs, "int2g32", sweeps=sweeps)).T
        )
        for sweeps in (0, 3)
    }
    assert error[3] < error[0]
    with pytest.raises(TypeError, match="swoops"):
        lq.gptq(weight, inputs, "int2g32", swoops=1)
    with pytest.raises(ValueError, match="method is 'rtn', expected 'gptq'; quantize"):
        lq.gptq(weight, inputs, "int2g32", method="rtn")


def test_shapes_that_do_not_fit_are_named():
    weight, inputs = problem()
    with pytest.raises(ValueError, match=r"hessian_or_inputs has shape \(300, 63\), expected"):
        lq.gptq(weight, inputs[:, 1:], "int4")
    with pytest.raises(ValueError, match=r"weight has shape \(64,\), expected \(rows, cols\)"):
        lq.gptq(weight[0], inputs, "int4")
    with pytest.raises(ValueError, match=r"inputs has shape \(64,\), expected \(\.\.\., cols\)"):
        lq.hessian(inputs[0])
    with pytest.raises(ValueError, match="inputs has a NaN or an infinity"):
        lq.hessian(inputs + np.nan)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_kmeans_is_optimal(count):
    """Against all partitions of few numbers into runs."""
    rng = np.random.default_rng(count)
    values, weights = np.sort(rng.standard_normal(12)), rng.uniform(0.1, 1, 12)

    def cost(parts):
        return sum(np.sum(w * (v - np.average(v, weights=w)) ** 2) for v, w in parts if len(v) > 0)

    def best(start, left):
        if left == 1:
            return cost([(values[start:], weights[start:])])
        cuts = range(start, 13 - left + 1)
        first = (cost([(values[start : cut + 1], weights[start : cut + 1])]) for cut in cuts)
        return min(a + best(cut + 1, left - 1) for a, cut in zip(first, cuts, strict=True))

    levels = lq.kmeans(values[::-1], count, weights[::-1])
    nearest = abs(values[:, None] - levels).min(1)
    assert np.array_equal(levels, np.sort(levels))
    assert np.sum(weights * nearest**2) <= best(0, count) * (1 + 1e-9)


def test_kmeans_refuses_what_has_no_mean():
    for values, weights, message in [
        ([], None, "values is empty"),
        ([1, np.nan], None, "has a NaN"),
        ([1, 2], [1], "weights has 1 numbers, values 2"),
        ([1, 2], [1, -1], "weights has a number that is negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            lq.kmeans(values, 2, weights)
    with pytest.raises(ValueError, match="count is 0"):
        lq.kmeans([1, 2], 0)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_is_sylvesters_matrix(n):
    found = lq.hadamard(np.eye(n))
    np.testing.assert_allclose(found, scipy.linalg.hadamard(n) / np.sqrt(n), atol=1e-6)


@pytest.mark.parametrize("n", [12, 36, 576, 13 * 4])
def test_hadamard_is_orthogonal(n):
    found = lq.hadamard(np.eye(n)).astype(np.float64)
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-5)
    with pytest.raises(ValueError, match=r"x has shape \(\), expected"):
        lq.hadamard(1.0)
