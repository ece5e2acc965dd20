"""csrc/codes/matrix.c: what packed words, and words that are not packed, stand for."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from packed_parts import code_of, description, pack, random_parts

from lowbitq import _core

SIZES = [(1, 1), (15, 33), (16, 64), (17, 128), (33, 576), (48, 100), (5, 15)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("table", [False, True])
def test_values_are_rounded_once(bits, table):
    if bits == 8 and table:
        pytest.skip("no table of 256 levels")
    levels = np.random.default_rng(0).normal(size=1 << bits).astype(np.float32) if table else None
    for rows, cols in SIZES:
        for group, has_offset in [(None, False), (32, True), (128, False)]:
            spec = description(rows, cols, bits, group, has_offset=has_offset, zero=1.5)
            codes, scale, offset = random_parts(spec)
            weight = np.full((rows + 2, cols), np.nan, np.float32)
            panels = pack(spec, codes, scale, offset)
            _core.packed_dequantize(
                code_of(spec, levels), panels, weight[1:-1], group=spec["group"]
            )
            if not has_offset:
                offset = np.float32(-1.5) * scale
            exact = oracle.decode(codes, scale, offset, spec["group"], levels)
            assert (weight[1:-1] == exact.astype(np.float32)).all()
            assert np.isnan(weight[[0, -1]]).all(), "wrote outside weight"
