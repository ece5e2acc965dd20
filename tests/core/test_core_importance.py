"""csrc/codes/importance.c: only ratios matter, and the most important columns are fitted."""

from __future__ import annotations

import numpy as np
import pytest
from rounding import NF4, normal, quantize


def anchored_grid_error(w, h, levels):
    """Error of float16 grids over the range whose offset fits the most important weight."""
    k = h.argmax()
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    scale = np.float16((high - low) / (levels - 1)).astype(float)
    code = np.clip(np.rint((w[:, k : k + 1] - low) / scale), 0, levels - 1)
    offset = np.float16(w[:, k : k + 1] - scale * code).astype(float)
    values = scale * np.clip(np.rint((w - offset) / scale), 0, levels - 1) + offset
    return (h * (values - w) ** 2).sum()


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_a_column_that_dominates_is_met(isa, count, norm):
    weight = normal(64, 64, seed=count)
    for power in range(0, 16, 3):
        h = np.ones(64, np.float32)
        h[3] = 10.0**power
        values = quantize(weight, count=count, symmetric=False, importance=h, norm=norm)[3]
        found = (h.astype(float) * (values - weight) ** 2).sum()
        assert found <= 1.05 * anchored_grid_error(weight.astype(float), h.astype(float), count)
        # The others are rounded about as well as without importance.
        plain = quantize(weight, count=count, symmetric=False)[3]
        assert ((values - weight) ** 2).sum() <= 1.5 * ((plain - weight) ** 2).sum()


@pytest.mark.parametrize("options", [{"count": 8, "symmetric": False}, {"count": 8}])
def test_two_columns_that_dominate(options):
    """Never worse than with importance that float32 can resolve, up to float16 rounding."""
    weight = normal(64, 64)
    for power in (7, 8, 10, 12):
        h = np.ones(64, np.float32)
        h[[3, 40]] = 10.0**power, 2 * 10.0**power
        softer = np.minimum(h, np.float32(1e6))
        error = [
            (h.astype(float) * (quantize(weight, importance=i, **options)[3] - weight) ** 2).sum()
            for i in (h, softer)
        ]
        assert error[0] <= 1.02 * error[1]


def test_only_ratios_of_importance_matter():
    weight, importance = normal(20, 96), np.exp(2 * normal(1, 96)[0])
    expected = quantize(weight, count=8, group=32, importance=importance)
    for power in (-120, -60, 60, 110):
        scaled = importance * np.float32(2.0**power)
        found = quantize(weight, count=8, group=32, importance=scaled)
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    # Ratios between groups do not matter: the first group's importance is scaled by 2^-100.
    scaled = np.where(np.arange(96) < 32, importance * np.float32(2.0**-100), importance)
    found = quantize(weight, count=8, group=32, importance=scaled)
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-30])
def test_unfit_importance_is_named(bad):
    importance = np.ones(8, np.float32)
    importance[5] = bad
    with pytest.raises(ValueError, match=r"importance\[5\] is "):
        quantize(normal(2, 8), count=4, importance=importance)


@pytest.mark.parametrize(
    "options", [{"count": 2}, {"count": 4}, {"count": 4, "symmetric": False}, {"levels": NF4}]
)
@pytest.mark.parametrize("group", [128, 64])
def test_groups_whose_important_weights_are_zeros_are_zeros(isa, group, options):
    importance = (np.arange(128) < 64).astype(np.float32)
    weight = normal(5, 128)
    weight[:, :64] = 0
    values = quantize(weight, group=group, importance=importance, **options)[3]
    assert not values[:, :64].any()
