"""Rounding by `_core.quantize` into guarded arrays, and matrices to round."""

from __future__ import annotations

import numpy as np
import oracle

from lowbitq import _core

NF4 = np.empty(16, np.float32)
_core.fixed_levels(NF4, kind="nf")

STORED = ("symmetric", "zero", "scale_bits", "unit")
NAMES = {2: "int1", 3: "ternary", 4: "int2", 8: "int3", 16: "int4", 256: "int8"}


def code_of(count, levels=None, symmetric=True, zero=None, scale_bits=16, unit=0.0):
    """A uniform code of `count` levels, or one with a table."""
    zero = (count - 1) / 2 if zero is None and symmetric and levels is None else zero or 0.0
    name = NAMES[count] if levels is None else f"kmeans{count.bit_length() - 1}"
    stored = {"symmetric": symmetric, "zero": zero, "scale_bits": scale_bits, "unit": unit}
    return _core.code(levels, name=name, **stored)


def quantize(weight, levels=None, count=None, importance=None, scale=None, offset=None, **rest):
    """Codes, scale, offset and values by _core.quantize; outputs prefilled, between guards."""
    count = len(levels) if levels is not None else count
    options = {
        "group": weight.shape[1],
        "fixed": scale is not None,
        "method": "mse",
        "clip": 1.0,
        "percentile": 100.0,
        "candidates": 10,
        "shrink": 0.9,
        "norm": 2.0,
    } | rest
    stored = {name: options.pop(name) for name in STORED if name in options}
    code = code_of(count, levels, **stored)
    rows, cols = weight.shape
    groups = -(-cols // options["group"])
    codes = np.full((rows + 2, cols), 255, np.uint8)
    scales = np.full((2, rows + 2, groups), np.nan, np.float32)
    if scale is not None:
        scales[:, 1:-1] = scale, offset
    _core.quantize(code, weight, importance, codes[1:-1], *scales[:, 1:-1], **options)
    assert (codes[[0, -1]] == 255).all(), "wrote outside codes"
    assert np.isnan(scales[:, [0, -1]]).all(), "wrote outside scale or offset"
    codes, scale, offset = codes[1:-1], scales[0, 1:-1], scales[1, 1:-1]
    values = oracle.decode(codes, scale, offset, options["group"], levels)
    return codes, scale, offset, values


def normal(rows, cols, seed=0):
    return np.random.default_rng([seed, rows, cols]).standard_normal((rows, cols), np.float32)
