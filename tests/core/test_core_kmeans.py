"""csrc/codes/kmeans.c: tables of levels."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core


def kmeans(values, count, weights=None):
    levels = np.full(count + 2, np.nan)
    _core.kmeans(np.asarray(values, float), weights, levels[1:-1])
    assert np.isnan(levels[[0, -1]]).all(), "wrote outside levels"
    assert (np.diff(levels[1:-1]) >= 0).all(), "levels do not ascend"
    return levels[1:-1]


def inertia(values, levels, weights=1.0):
    return (weights * ((values[:, None] - levels) ** 2).min(1)).sum()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 40])
def test_no_partition_is_better(n, count):
    """Against the quadratic dynamic programme, weighted and not, with repeated values."""
    rng = np.random.default_rng([n, count])
    for values in (rng.standard_normal(n), rng.integers(-3, 4, n).astype(float)):
        for weights in (np.ones(n), rng.exponential(size=n)):
            found = inertia(values, kmeans(values, count, weights), weights)
            best = oracle.kmeans_error(values, count, weights)
            assert found <= best * (1 + 1e-9) + 1e-12
        assert (kmeans(values, count) == kmeans(values, count, np.ones(n))).all()


# J. Max, "Quantizing for minimum distortion", 1960; digits of quality.md section 15.
@pytest.mark.parametrize(
    ("count", "expected"), [(2, 0.3634), (3, 0.1902), (4, 0.1175), (8, 0.0345), (16, 0.0095)]
)
def test_normal_variable_gives_lloyd_max(count, expected):
    values = oracle.normal_quantiles(1 << 15)
    levels = kmeans(values, count)
    assert abs(inertia(values, levels) / values.size - expected) <= 1e-4
    assert abs(levels + levels[::-1]).max() <= 0.01
    if count == 4:
        assert abs(levels - [-1.5104, -0.4528, 0.4528, 1.5104]).max() <= 0.01


def test_many_values_end_where_lloyd_has_nothing_to_do():
    rng = np.random.default_rng(3)
    values, weights = rng.standard_t(3, 20000), rng.exponential(size=20000)
    levels = kmeans(values, 8, weights)
    nearest = abs(values[:, None] - levels).argmin(1)
    means = np.bincount(nearest, weights * values) / np.bincount(nearest, weights)
    assert abs(means - levels).max() <= 1e-9


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="value 1 is nan"):
        kmeans([0.0, np.nan], 2)
    with pytest.raises(ValueError, match="count is 17"):
        kmeans([0.0, 1.0], 17)
    with pytest.raises(ValueError, match="no values"):
        kmeans([], 2)
    with pytest.raises(ValueError, match="weight -1"):
        kmeans([0.0, 1.0], 2, np.array([1.0, -1.0]))
