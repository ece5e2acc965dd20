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
