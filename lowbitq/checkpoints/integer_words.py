"""Packed matrices as integers and float16 scales, in the two forms that GPU programs read.

A matrix fits if its weights are whole multiples of its scales, as those of ``int4g32symz8`` are.

compressed-tensors (pack-quantized): a row's integers, plus 2^(bits - 1), lie in 32-bit words, the
first in the lowest bits. GPTQ: the same, but along columns of the transposed matrix, with a zero
for each scale, stored less one.

References: https://github.com/vllm-project/compressed-tensors; E. Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", 2022, whose authors' CUDA
kernels defined the second form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.tensors import QuantizedTensor

Words = NDArray[np.int32]


@dataclass(frozen=True)
class Integers:
    """A matrix ``W[r, k] = scale[r, k // group] * values[r, k]``.

    Attributes
    ----------
    bits : int
        4 or 8; values are -2^(bits - 1) to 2^(bits - 1) - 1.
    group : int or None
        Columns that share a scale; None: all of a row do.
    values : ndarray of shape (rows, cols), int16
    scale : ndarray of shape (rows, groups), float16
    """

    bits: int
    group: int | None
    values: NDArray[np.int16] = field(repr=False)
    scale: NDArray[np.float16] = field(repr=False)


def integers_of(tensor: QuantizedTensor) -> Integers | None:
    """Return a packed matrix as integers; None: its weights are none, or its scales no float16.

    Examples
    --------
    >>> codes = np.arange(32, dtype=np.uint8).reshape(1, 32) % 16
    >>> tensor = QuantizedTensor.pack("int4g32symz8", codes, np.ones((1, 1), np.float32))
    >>> integers_of(tensor).bits, integers_of(tensor).values[0, :3].tolist()
    (4, [-8, -7, -6])
    """
    cols, group = tensor.cols, tensor.format.group
    scale = tensor.scale
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if cols % (group or cols) or not np.array_equal(half, scale):
        return None
    weight = tensor.dequantize()
    by_column = scale[:, np.arange(cols) // (group or cols)]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.rint(np.where(by_column == 0, 0, weight / by_column))
    if not np.array_equal(found * by_column, weight):
        return None
    for bits in (4, 8):
        top = 1 << (bits - 1)
        if found.min(initial=0) >= -top and found.max(initial=0) < top:
            return Integers(bits, group, found.astype(np.int16), half)
    return None


def compressed_tensors_arrays(matrix: Integers) -> dict[str, NDArray[Any]]:
    """Return the arrays of a layer as compressed-tensors names them."""
    return {
        "weight_packed": _words(matrix.values, matrix.bits),
        "weight_scale": matrix.scale,
        "weight_shape": np.array(matrix.values.shape, np.int64),
    }


def gptq_arrays(matrix: Integers) -> dict[str, NDArray[Any]]:
    """Return the arrays of a layer as GPTQ's programs name them.

    Raises
    ------
    ValueError
        If rows or columns do not fill 32-bit words.
    """
    rows, cols = matrix.values.shape
    in_word = 32 // matrix.bits
    if rows % in_word or cols % in_word:
        raise ValueError(f"{rows} x {cols} weights, expected multiples of {in_word}")
    groups = matrix.scale.shape[1]
    zeros = np.full((groups, rows), -1, np.int16)  # of each scale, less one
    return {
        "qweight": np.ascontiguousarray(_words(matrix.values.T, matrix.bits, along=0)),
        "qzeros": _words(zeros, matrix.bits),
        "scales": np.ascontiguousarray(matrix.scale.T),
        "g_idx": (np.arange(cols) // (matrix.group or cols)).astype(np.int32),
    }


def _words(values: NDArray[np.int16], bits: int, along: int = 1) -> Words:
    """Pack signed values, plus 2^(bits - 1), into 32-bit words along an axis."""
    if along == 0:
        return _words(values.T, bits).T
    in_word = 32 // bits
    codes = (values + (1 << (bits - 1))).astype(np.uint32)
    codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % in_word)])
    parts = codes.reshape(len(codes), -1, in_word)
    words = np.bitwise_or.reduce(parts << (bits * np.arange(in_word, dtype=np.uint32)), axis=2)
    return np.ascontiguousarray(words.astype(np.uint32)).view(np.int32)
