"""csrc/codes/stored.c: weights near the smallest numbers that scales and offsets can hold."""

from __future__ import annotations

import numpy as np
import pytest
from rounding import NF4, normal, quantize

CODES = {
    "int2": {"count": 4, "symmetric": False},
    "int4": {"count": 16, "symmetric": False},
    "int2sym": {"count": 4},
    "int8sym": {"count": 256},
    "binary": {"count": 2},
    "ternary": {"count": 3},
    "nf4": {"levels": NF4},
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("scale_bits", [16, 8, 0])
def test_no_group_is_worse_than_zeros_however_small(isa, code, scale_bits):
    if scale_bits == 8 and not CODES[code].get("symmetric", True):
        pytest.skip("integer scales come without offsets")
    exponents = np.arange(-45, -3)[:, None]
    weight = (normal(42, 96) * np.float32(10) ** exponents.clip(-37).astype(np.float32)).astype(
        float
    )
    weight = (weight * 10.0 ** (exponents - exponents.clip(-37))).astype(np.float32)
    for importance in (None, np.exp(normal(1, 96)[0])):
        h = np.ones(96) if importance is None else importance.astype(float)
        options = {"scale_bits": scale_bits, "unit": 1e-9, "importance": importance}
        values = quantize(weight, group=32, **CODES[code], **options)[3]
        error = (h * (values - weight) ** 2).reshape(42, 3, 32).sum(2)
        size = (h * weight.astype(float) ** 2).reshape(42, 3, 32).sum(2)
        assert (error <= size * (1 + 1e-6)).all()


@pytest.mark.parametrize("scale_bits", [16, 8, 4, 0])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_zeros_stay_zeros(isa, scale_bits, method):
    """Zeros of both signs, among other groups; the scale is the smallest, or 0 if no level is 0."""
    weight = normal(21, 96)
    weight[:, 32:64] = np.where(np.arange(32) % 2, 0.0, -0.0)
    weight[3] = 0
    smallest = {16: 2.0**-24, 0: np.finfo(np.float32).tiny}.get(scale_bits, np.float32(0.05))
    for code, options in CODES.items():
        if scale_bits in (8, 4) and not options.get("symmetric", True):
            continue
        _, scale, _, values = quantize(
            weight, group=32, method=method, scale_bits=scale_bits, unit=0.05, **options
        )
        assert (values[:, 32:64] == 0).all()
        assert (values[3] == 0).all()
        holds_zero = code in ("int2", "int4", "ternary", "nf4")
        assert (scale[:, 1] == (smallest if holds_zero else 0)).all()
        assert (scale[np.arange(21) != 3][:, [0, 2]] > 0).all()


@pytest.mark.parametrize(("offset", "width"), [(1000, 1e-3), (-300, 1e-4), (3e4, 1.0), (0.1, 1e-5)])
def test_a_spread_below_the_steps_of_an_offset(offset, width):
    """At least as good as the grid over the range, rounded to float16."""
    weight = (offset + width * normal(16, 64).astype(float)).astype(np.float32)
    for count in (2, 4, 16):
        w = weight.astype(float)
        start = np.float16(w.min(1, keepdims=True)).astype(float)
        scale = np.maximum(np.float16((w.max(1, keepdims=True) - start) / (count - 1)), 2.0**-24)
        codes = np.clip(np.rint((w - start) / scale), 0, count - 1)
        simple = ((scale.astype(float) * codes + start - w) ** 2).sum()
        values = quantize(weight, count=count, symmetric=False)[3]
        assert ((values - w) ** 2).sum() <= 1.05 * simple
