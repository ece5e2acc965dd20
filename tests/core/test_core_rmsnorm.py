"""RMSNorm against float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 15), (2, 16), (5, 33), (40, 64), (33, 577)])
@pytest.mark.parametrize("with_gain", [True, False])
def test_rmsnorm_matches_oracle(isa, rows, cols, with_gain):
    rng = np.random.default_rng([rows, cols])
    x = (10 * rng.standard_normal((rows, cols))).astype(np.float32)
    gain = rng.standard_normal(cols, dtype=np.float32) if with_gain else None
    y = np.full((rows + 2, cols), np.nan, np.float32)

    _core.rmsnorm(x, gain, y[1:-1], epsilon=1e-5)

    expected, bound = oracle.rmsnorm(x, gain, 1e-5)
    assert (abs(y[1:-1] - expected) <= bound).all()
    assert np.isnan(y[[0, -1]]).all(), "wrote outside y"


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-19, 1e-15, 1e15, 1e19, 1e20, 1e38])
@pytest.mark.parametrize("epsilon", [0.0, 1e-30, 1e-5])
@pytest.mark.parametrize("cols", [1, 17, 64, 577])
def test_rmsnorm_of_numbers_whose_squares_leave_float32(isa, size, epsilon, cols):
    rng = np.random.default_rng(cols)
    x = (size * rng.uniform(-3.4, 3.4, (2, cols))).astype(np.float32)
    x[0, 0] = 3.4 * size  # a denormal may have become zero
    x[1] = x[0, 0]
    gain = rng.standard_normal(cols, dtype=np.float32)
    for g in (None, gain):
        y = np.full_like(x, np.nan)
        _core.rmsnorm(x, g, y, epsilon=epsilon)
        expected, bound = oracle.rmsnorm(x, g, float(np.float32(epsilon)))
        assert (abs(y - expected) <= bound).all()


def test_rmsnorm_of_one_large_number_among_others(isa):
    x = np.ones((1, 70), np.float32)
    x[0, 40] = 3e38
    _core.rmsnorm(x, None, x, epsilon=1e-5)
    assert x[0, 40] == np.float32(70**0.5)
    assert (abs(np.delete(x, 40) * 3e38 / 70**0.5 - 1) < 1e-5).all()


def test_rmsnorm_of_no_number_is_no_number(isa):
    for bad in (np.nan, np.inf):
        x = np.ones((2, 40), np.float32)
        x[1, 33] = bad
        _core.rmsnorm(x, None, x, epsilon=1e-5)
        assert np.isfinite(x[0]).all()
        assert np.isnan(x[1, 33])


def test_rmsnorm_in_place_and_of_zeros(isa):
    x = np.zeros((2, 50), np.float32)
    x[1] = 3
    _core.rmsnorm(x, None, x, epsilon=1e-6)
    assert (x[0] == 0).all()
    assert abs(x[1] - 1).max() < 1e-5


def test_one_massive_channel_does_not_drown_the_others(isa):
    x = np.full((1, 576), 1.0, np.float32)
    x[0, 507] = 23721  # SmolLM2 after block 11
    y = np.empty_like(x)
    _core.rmsnorm(x, None, y, epsilon=1e-5)
    expected, bound = oracle.rmsnorm(x, None, 1e-5)
    assert (abs(y - expected) <= bound).all()


def test_rmsnorm_refuses_shapes_that_differ():
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"axis 0 .* of gain has size 3, expected 4"):
        _core.rmsnorm(x, np.zeros(3, np.float32), x, epsilon=0.0)
    with pytest.raises(TypeError, match="x has dtype float64, expected float32"):
        _core.rmsnorm(x.astype(float), None, x, epsilon=0.0)
