"""Blocks hold packed matrices as they are: `gguf` decodes them to the same weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import lowbitq as lq
from lowbitq.checkpoints.gguf_blocks import blocks_of
from lowbitq.tensors import QuantizedTensor


def decoded(blocks):
    kind = gguf.GGMLQuantizationType[blocks.type]
    return gguf.quants.dequantize(blocks.raw, kind)


def weights(rows=7, cols=512, seed=0):
    return 0.05 * np.random.default_rng(seed).standard_normal((rows, cols), np.float32)


EXACT = {
    "int4g32symz8": "Q4_0",
    "int4g64symz8": "Q4_0",
    "int4symz8": "Q4_0",
    "int3g32symz4": "Q4_0",
    "int4tensorsymz8": None,  # its only scale is a float32
    "ternaryg32": "Q4_0",
    "int4g32": "Q4_1",
    "int4g128": "Q4_1",
    "int4": "Q4_1",
    "int3g64": "Q4_1",
    "int2g64": "Q4_1",
    "binaryg32": "Q4_1",
    "int8g32symz128": "Q8_0",
    "int8g64symz128": "Q8_0",
}


@pytest.mark.parametrize(("format", "type"), EXACT.items())
def test_codes_are_written_as_they_are(format, type):
    tensor = lq.quantize(weights(), format)
    blocks = blocks_of(tensor)
    if type is None:
        assert blocks is None or blocks.change > 0
        return
    assert (blocks.type, blocks.change) == (type, 0)
    assert np.array_equal(decoded(blocks), tensor.dequantize())


ROUNDED = {
    "int2g16s4": "Q2_K",
    "int2g32s4z2": "Q2_K",
    "int3g32s4z4": "Q3_K",
    "int4g32s4": "Q4_K",
    "int4g64s4z7.5": "Q4_K",
    "int4g32sym": "Q4_1",
    "int4g32s8z8": "Q4_0",
}


@pytest.mark.parametrize(("format", "type"), ROUNDED.items())
def test_scales_that_are_no_float16_are_rounded(format, type):
    tensor = lq.quantize(weights(), format)
    blocks, weight = blocks_of(tensor), tensor.dequantize()
    difference = abs(decoded(blocks) - weight).reshape(-1, 32).max(1)
    largest = abs(weight).reshape(-1, 32).max(1)
    assert blocks.type == type
    assert 0 < blocks.change <= 2**-9
    assert np.isclose(blocks.change, (difference / largest).max())


@pytest.mark.parametrize("format", ["int2g16s4z2", "int3g32s4z4", "int4g32s4z8"])
def test_k_types_are_exact_if_the_unit_is_a_float16(format):
    """All scales and codes that occur, not only likely ones."""
    format, rng = lq.Format.parse(format), np.random.default_rng(1)
    codes = rng.integers(0, format.level_count, (5, 512), dtype=np.uint8)
    scale = rng.integers(0, 16, (5, 512 // format.group)).astype(np.float32) / 64
    tensor = QuantizedTensor.pack(format, codes, scale, unit=1 / 64)
    blocks = blocks_of(tensor)
    assert blocks.type in ("Q2_K", "Q3_K", "Q4_K", "Q4_0")
    assert blocks.change == 0
    assert np.array_equal(decoded(blocks), tensor.dequantize())


def test_every_code_of_q8_0():
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    tensor = QuantizedTensor.pack("int8g32symz128", codes, np.full((1, 8), 0.5, np.float32))
    assert np.array_equal(decoded(blocks_of(tensor))[0], (np.arange(256) - 128) / 2)


@pytest.mark.parametrize("format", ["nf4g32", "kmeans4g32", "int8g32", "int4g16", "log3g32"])
def test_other_levels_have_no_blocks(format):
    assert blocks_of(lq.quantize(weights(), format)) is None


@pytest.mark.parametrize("cols", [16, 40, 31])
def test_rows_that_are_no_whole_blocks_have_none(cols):
    assert blocks_of(lq.quantize(weights(cols=cols), "int4symz8")) is None


def test_zeros_stay_zeros():
    blocks = blocks_of(lq.quantize(np.zeros((2, 64), np.float32), "int4g32symz8"))
    assert blocks.change == 0
    assert not decoded(blocks).any()
