"""Packed matrices as integers in 32-bit words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lowbitq as lq
from lowbitq.checkpoints.integer_words import compressed_tensors_arrays, gptq_arrays, integers_of
from lowbitq.tensors import QuantizedTensor

GOLDEN = Path(__file__).parent / "golden" / "compressed_tensors.npz"


def weights(rows=16, cols=128):
    return 0.05 * np.random.default_rng(0).standard_normal((rows, cols), np.float32)


@pytest.mark.parametrize(
    ("case", "format"),
    [("4", "int4g32symz8"), ("8", "int8g32symz128"), ("4 by rows", "int4symz8")],
)
def test_words_and_weights_are_those_of_compressed_tensors(case, format):
    """The golden file is the package's."""
    golden = np.load(GOLDEN)
    codes, scale = golden[f"{case}.codes"], golden[f"{case}.scale"]
    tensor = QuantizedTensor.pack(format, codes, scale)
    arrays = compressed_tensors_arrays(integers_of(tensor))
    assert np.array_equal(arrays["weight_packed"], golden[f"{case}.words"])
    assert np.array_equal(arrays["weight_scale"], scale)
    assert arrays["weight_shape"].tolist() == list(codes.shape)
    assert np.array_equal(tensor.dequantize(), golden[f"{case}.weight"])


@pytest.mark.parametrize("format", ["int4g32symz8", "int8g64symz128", "ternaryg32", "int4symz8"])
def test_gptq_arrays_stand_for_the_same_weights(format):
    """Read one by one, as the authors' CUDA kernel does: the stored zero is one less."""
    tensor = lq.quantize(weights(), format)
    matrix = integers_of(tensor)
    arrays, bits = gptq_arrays(matrix), matrix.bits
    in_word, mask = 32 // bits, (1 << bits) - 1
    words, zeros = (arrays[name].view(np.uint32) for name in ("qweight", "qzeros"))
    expected = tensor.dequantize()
    for row, col in [(0, 0), (1, 7), (15, 127), (7, 64), (9, 33)]:
        group = arrays["g_idx"][col]
        code = int(words[col // in_word, row]) >> (bits * (col % in_word)) & mask
        zero = (int(zeros[group, row // in_word]) >> (bits * (row % in_word)) & mask) + 1
        weight = np.float32(arrays["scales"][group, row]) * np.float32(code - zero)
        assert weight == expected[row, col]
    assert words.shape == (128 // in_word, 16)
    assert zeros.shape == (arrays["scales"].shape[0], 16 // in_word)


@pytest.mark.parametrize("format", ["int4g32", "int4g32sym", "nf4g32", "int8g32", "int4g32s8z8"])
def test_other_weights_are_no_integers(format):
    assert integers_of(lq.quantize(weights(), format)) is None


def test_words_must_be_full_for_gptq():
    matrix = integers_of(lq.quantize(weights(12), "int4g32symz8"))
    with pytest.raises(ValueError, match="12 x 128 weights, expected multiples of 8"):
        gptq_arrays(matrix)
