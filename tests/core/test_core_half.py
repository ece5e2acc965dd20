"""Halves, exhaustively: every float16 and bfloat16, and every float32 that could round wrongly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lowbitq import _core

ALL = np.arange(1 << 16, dtype=np.uint16)


def narrow(values):
    out = np.zeros(len(values), np.uint16)
    _core.float_to_half(values, out)
    return out


def test_every_float16_widens_as_numpy_does():
    out = np.empty(1 << 16, np.float32)
    _core.half_to_float(ALL, out)
    expected = ALL.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    assert (out.view(np.uint32) == expected.view(np.uint32))[~nan].all()
    assert np.isnan(out[nan]).all()


def test_every_bfloat16_widens_as_ml_dtypes_does():
    out = np.empty(1 << 16, np.float32)
    _core.bfloat_to_float(ALL, out)
    assert (out.view(np.uint32) == ALL.astype(np.uint32) << 16).all()
    expected = ALL.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)


def test_every_float16_survives_the_round_trip():
    wide = ALL.view(np.float16).astype(np.float32)
    nan = np.isnan(wide)
    assert (narrow(wide) == ALL)[~nan].all()
    assert (narrow(wide[nan]) & 0x7FFF > 0x7C00).all()


def test_rounding_at_every_midpoint_and_its_neighbours():
    finite = ALL[np.isfinite(ALL.view(np.float16))].view(np.float16).astype(np.float64)
    finite = np.sort(np.append(finite, [65536, -65536]))  # rounds to infinity from the middle up
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)  # exact: 12 bits
    values = np.concatenate(
        [
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(-np.inf)),
        ]
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert (narrow(values) == expected).all()


def test_infinities_and_the_largest_floats():
    values = np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0], np.float32)
    assert narrow(values).tolist() == [0x7C00, 0xFC00, 0x7C00, 0xFC00, 0, 0x8000, 0, 0x8000]


@pytest.mark.parametrize("count", [0, 1, 65535, 65536, 65537, 200_001])
def test_length_is_respected(count):
    rng = np.random.default_rng(count)
    x = rng.integers(0, 0x7C00, count, dtype=np.uint16)
    y = np.full(count + 2, np.nan, np.float32)
    _core.half_to_float(x, y[1:-1])
    assert np.array_equal(y[1:-1], x.view(np.float16).astype(np.float32))
    assert np.isnan(y[[0, -1]]).all(), "wrote outside y"
