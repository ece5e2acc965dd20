"""Blocks of GGUF files that hold the codes and scales of a packed matrix as they are.

Every type is tried from the smallest; blocks count only if `gguf` decodes them to the same weights.
K types store a float16 for 256 weights where a packed matrix has a float32 for all (`unit`), and
Q4_1 stores offsets. Where these must be rounded, weights change by up to 2^-9 of the largest beside
them.

Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.checkpoints.gguf import decode
from lowbitq.tensors import QuantizedTensor

Bytes = NDArray[Any]  # of uint8; to type checkers, byte & 15 has another dtype
Float32 = NDArray[np.float32]

_BLOCK, _LARGE = 32, 256
_TOLERANCE = 2.0**-9


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks of one type.

    Attributes
    ----------
    type : str
        ``"Q4_0"`` and the like.
    raw : ndarray of shape (rows, bytes), uint8
    change : float
        Largest change of a weight, relative to the largest weight of its block of 32; 0: none.
    """

    type: str
    raw: Bytes = field(repr=False)
    change: float


def blocks_of(tensor: QuantizedTensor) -> Blocks | None:
    """Return the smallest blocks that hold the matrix; None: no type does.

    Blocks with the same weights come before blocks with rounded scales.

    Parameters
    ----------
    tensor : QuantizedTensor

    Returns
    -------
    Blocks or None

    Examples
    --------
    >>> codes = np.arange(32, dtype=np.uint8).reshape(1, 32) % 16
    >>> tensor = QuantizedTensor.pack("int4g32symz8", codes, np.ones((1, 1), np.float32))
    >>> blocks_of(tensor).type, blocks_of(tensor).raw[0, :4].tolist()
    ('Q4_0', [0, 60, 0, 17])
    """
    matrix, rounded = _Matrix(tensor), None
    for type, (block, pack) in _TYPES.items():
        if tensor.cols % block or (parts := pack(matrix)) is None:
            continue
        raw = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts], axis=1)
        raw = raw.reshape(tensor.rows, -1)
        change = matrix.change(decode(raw, type))
        if change == 0:
            return Blocks(type, raw, change)
        if rounded is None and change <= _TOLERANCE:
            rounded = Blocks(type, raw, change)
    return rounded


class _Matrix:
    """The numbers of a packed matrix in the forms that blocks have; None where they do not fit."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        self.tensor = tensor
        self.weight = tensor.dequantize()

    def spread(self, values: Float32, step: int) -> Float32:
        """Return one value for each `step` columns, given one for each group."""
        group = self.tensor.format.group or self.tensor.cols
        return values[:, np.arange(0, self.tensor.cols, step) // group]

    def halves(self, values: Float32) -> Bytes | None:
        """Return the float16 of each block of 32, given one value for each group."""
        if (self.tensor.format.group or _BLOCK) % _BLOCK:
            return None
        return _half(self.spread(values, _BLOCK)[..., None])

    def steps(self, step: int, limit: int) -> Bytes | None:
        """Return integer scales (superblocks, 256 / step), one for each `step` columns."""
        format = self.tensor.format
        if format.scale_bits not in (4, 8) or (format.group or step) % step:
            return None
        found = np.rint(self.spread(self.tensor.scale, step) / np.float32(self.tensor.unit))
        fits = found.max(initial=0) < limit
        return found.astype(np.uint8).reshape(-1, _LARGE // step) if fits else None

    def whole(self, value: float) -> Bytes:
        """Return the float16 of every superblock."""
        count = self.weight.size // _LARGE
        return np.broadcast_to(_half(np.full((1, 1), value, np.float32)), (count, 2))

    def codes(self, limit: int) -> Bytes | None:
        """Return the codes (rows, cols) if all are below `limit`."""
        codes = self.tensor.codes
        fits = codes.shape == self.tensor.shape and codes.max(initial=0) < limit
        return codes if fits else None

    def levels(self, zero: int, count: int) -> Bytes | None:
        """Return weight / scale + zero if these are integers from 0 to count - 1."""
        scale = self.spread(self.tensor.scale, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.rint(np.where(scale == 0, 0, self.weight / scale)) + zero
        fits = found.min(initial=0) >= 0 and found.max(initial=0) < count
        return found.astype(np.uint8) if fits else None

    def change(self, found: Float32) -> float:
        """Return the largest difference from the weights, relative to the largest of 32."""
        difference = np.abs(found - self.weight).reshape(-1, _BLOCK).max(1)
        largest = np.abs(self.weight).reshape(-1, _BLOCK).max(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.where(difference == 0, 0, difference / largest).max(initial=0))


Parts = tuple[Bytes, ...] | None


def _q4_0(matrix: _Matrix) -> Parts:
    scale, levels = matrix.halves(matrix.tensor.scale), matrix.levels(8, 16)
    return None if scale is None or levels is None else (scale, _nibbles(levels, 16))


def _q4_1(matrix: _Matrix) -> Parts:
    scale, offset = matrix.halves(matrix.tensor.scale), matrix.halves(matrix.tensor.offset)
    codes = matrix.codes(16)
    if scale is None or offset is None or codes is None:
        return None
    return scale, offset, _nibbles(codes, 16)


def _q8_0(matrix: _Matrix) -> Parts:
    scale, levels = matrix.halves(matrix.tensor.scale), matrix.levels(128, 256)
    if scale is None or levels is None:
        return None
    return scale, (levels ^ 0x80).reshape(-1, _BLOCK)  # less 128, as int8


def _q2_k(matrix: _Matrix) -> Parts:
    steps, codes = matrix.steps(16, 16), matrix.codes(4)
    if steps is None or codes is None:
        return None
    return steps | steps << 4, _pairs(codes), *_unit_and_zero(matrix)


def _q3_k(matrix: _Matrix) -> Parts:
    steps, levels = matrix.steps(16, 32), matrix.levels(4, 8)
    if steps is None or levels is None:
        return None
    high = np.packbits(levels.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little")
    steps = steps + np.uint8(32)
    low = (steps[:, :8] & 15) | (steps[:, 8:] & 15) << 4
    top = _shifted((steps >> 4).reshape(-1, 4, 4), 2)
    return high, _pairs(levels & 3), low, top, matrix.whole(matrix.tensor.unit)


def _q4_k(matrix: _Matrix) -> Parts:
    steps, codes = matrix.steps(32, 64), matrix.codes(16)
    if steps is None or codes is None:
        return None
    first, last = steps[:, :4], steps[:, 4:]
    six = first | (last >> 4) << 6
    four = (last & 15) | (last & 15) << 4
    return *_unit_and_zero(matrix), six, six, four, _nibbles(codes, 32, _LARGE)


# Name -> columns of a block, what packs a matrix; by bits per weight: 2.6, 3.4, 4.5, 4.5, 5, 8.5.
_TYPES: dict[str, tuple[int, Callable[[_Matrix], Parts]]] = {
    "Q2_K": (_LARGE, _q2_k),
    "Q3_K": (_LARGE, _q3_k),
    "Q4_0": (_BLOCK, _q4_0),
    "Q4_K": (_LARGE, _q4_k),
    "Q4_1": (_BLOCK, _q4_1),
    "Q8_0": (_BLOCK, _q8_0),
}


def _half(values: Float32) -> Bytes:
    """Return the bytes of float16 numbers."""
    with np.errstate(over="ignore"):
        return values.astype("<f2").view(np.uint8)


def _unit_and_zero(matrix: _Matrix) -> tuple[Bytes, Bytes]:
    """Return what scales and minima are multiples of; the minimum of a group is zero * scale."""
    unit, zero = matrix.tensor.unit, matrix.tensor.zero
    assert zero is not None
    return matrix.whole(unit), matrix.whole(zero * unit)


def _shifted(parts: Bytes, bits: int) -> Bytes:
    """Join parts (n, k, m) to bytes (n, m): part i is shifted by i * bits."""
    shifts = np.arange(parts.shape[1], dtype=np.uint8) * np.uint8(bits)
    joined: Bytes = np.bitwise_or.reduce(parts << shifts[:, None], axis=1)
    return joined


def _nibbles(codes: Bytes, run: int, block: int = _BLOCK) -> Bytes:
    """Pack 4 bits each: `run` columns in low halves, the next `run` in high halves of bytes."""
    return _shifted(codes.reshape(-1, 2, run), 4).reshape(-1, block // 2)


def _pairs(codes: Bytes) -> Bytes:
    """Pack 2 bits each: a byte holds columns 0, 32, 64 and 96 behind its own."""
    return _shifted(codes.reshape(-1, 4, 32), 2).reshape(-1, _LARGE // 4)
