"""SwiGLU against float64; with up = 1 it shows the kernels' exp at every kind of argument."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core


@pytest.mark.parametrize(
    ("tokens", "cols"), [(1, 1), (3, 7), (1, 16), (2, 17), (5, 1536), (40, 1023)]
)
def test_swiglu_matches_oracle(isa, tokens, cols):
    rng = np.random.default_rng([tokens, cols])
    gate, up = (4 * rng.standard_normal((2, tokens, cols))).astype(np.float32)
    y = np.full((tokens + 2, cols), np.nan, np.float32)

    _core.swiglu(gate, up, y[1:-1])

    expected, bound = oracle.swiglu(gate, up)
    assert (abs(y[1:-1] - expected) <= bound).all()
    assert np.isnan(y[[0, -1]]).all(), "wrote outside y"


def test_swiglu_over_the_range_of_exp(isa):
    gate = np.linspace(-120, 120, 1 << 18, dtype=np.float32)[None]
    y = np.empty_like(gate)
    _core.swiglu(gate, np.ones_like(gate), y)
    expected, bound = oracle.swiglu(gate, np.ones_like(gate))
    assert (abs(y - expected) <= bound).all()


def test_swiglu_of_zero_infinity_and_nan(isa):
    gate = np.array([[0, -0.0, np.inf, -1e30, 1e30, np.nan] * 4], np.float32)
    y = np.empty_like(gate)
    _core.swiglu(gate, np.ones_like(gate), y)
    expected = np.array([0, 0, np.inf, 0, 1e30, np.nan] * 4, np.float32)
    assert np.array_equal(y[0], expected, equal_nan=True)


def test_swiglu_may_overwrite_its_gate(isa):
    gate, up = np.random.default_rng(0).standard_normal((2, 3, 37), dtype=np.float32)
    expected = np.empty_like(gate)
    _core.swiglu(gate, up, expected)
    _core.swiglu(gate, up, gate)
    assert (gate == expected).all()
