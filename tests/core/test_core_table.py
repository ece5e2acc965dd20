"""csrc/codes/table.c: the fixed tables."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from lowbitq import _core


def table(kind, count):
    levels = np.full(count + 2, np.nan, np.float32)
    _core.fixed_levels(levels[1:-1], kind=kind)
    assert np.isnan(levels[[0, -1]]).all()
    return levels[1:-1]


def test_nf4_is_made_of_normal_quantiles():
    """As bitsandbytes constructs it: 8 quantiles above zero, 7 below, the ends at +-1."""
    end = 0.9677083
    above = [NormalDist().inv_cdf(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    expected = np.sort([*below, 0, *above]) / above[0]
    assert abs(table("nf", 16) - expected).max() <= 1e-6


@pytest.mark.parametrize("count", [4, 8, 16])
def test_log_levels_are_signed_powers_of_two(count):
    levels = table("log", count)
    assert (np.diff(levels) > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1
    assert np.count_nonzero(levels == 0) == 1
    assert np.count_nonzero(levels > 0) == count // 2
    exponents = np.log2(abs(levels[levels != 0]))
    assert (exponents == np.rint(exponents)).all()


def test_unknown_tables_are_named():
    with pytest.raises(ValueError, match="no table of 16 levels is called 'nf4'"):
        table("nf4", 16)
    with pytest.raises(ValueError, match="no table of 8 levels is called 'nf'"):
        table("nf", 8)
