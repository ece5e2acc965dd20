"""ggml's quantizers and dot products, through ctypes on the libraries of llama-cpp-python.

The structures copy include/ggml.h and include/ggml-cpu.h, which that package installs beside
itself; names and sizes of the types are checked when the libraries are loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import LOOPS, compiled, find

TYPES = {
    "q4_0": 2,
    "q8_0": 8,
    "q2_K": 10,
    "q3_K": 11,
    "q4_K": 12,
    "q8_K": 15,
    "tq2_0": 35,
    "q1_0": 41,
}  # enum ggml_type


class _Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", c_char_p),
        ("block", c_int64),
        ("block_interleave", c_int64),
        ("block_bytes", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    )


class _CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu."""

    _fields_ = (
        ("from_float", CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int),
        ("rows", c_int64),
    )


@dataclass(frozen=True)
class Matrix:
    """A matrix in ggml's blocks."""

    type: str
    rows: int
    cols: int
    blocks: NDArray[np.uint8]


class Ggml:
    """The library; `types` are the TYPES that it supports."""

    def __init__(self) -> None:
        folder = find("llama_cpp/lib")
        if folder is None:
            raise FileNotFoundError("llama-cpp-python is not found; see benchmarks/peers/README.md")
        self.version = llama_version()
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self._loops = compiled([LOOPS])
        self._base.ggml_get_type_traits.restype = POINTER(_Traits)
        self._cpu.ggml_get_type_traits_cpu.restype = POINTER(_CpuTraits)
        self._cpu.ggml_cpu_init()  # fills the float16 tables for the dot products
        self.types = [name for name, type in TYPES.items() if self._traits(type).type_name]
        for name in self.types:
            found = self._traits(TYPES[name]).type_name.decode()
            if found != name:
                raise RuntimeError(
                    f"type {TYPES[name]} of llama-cpp-python {self.version} is {found}, expected "
                    f"{name}: its structures are not those of 0.3.36"
                )

    def quantize(
        self,
        type: str,
        weight: NDArray[np.float32],
        importance: NDArray[np.float32] | None = None,
    ) -> Matrix:
        """Round a matrix to the blocks of a type; `importance` (cols) weights squared errors."""
        matrix = self.empty(type, *weight.shape)
        self.quantize_into(matrix, weight, importance)()
        return matrix

    def empty(self, type: str, rows: int, cols: int) -> Matrix:
        """Return an uninitialised matrix of a type and shape."""
        return Matrix(type, rows, cols, np.zeros((rows, self._row_bytes(type, cols)), np.uint8))

    def quantize_into(
        self,
        matrix: Matrix,
        weight: NDArray[np.float32],
        importance: NDArray[np.float32] | None = None,
    ) -> Callable[[], object]:
        """Return a call that rounds contiguous `weight` (rows, cols) to `matrix`."""
        arguments = _arguments(
            c_int(TYPES[matrix.type]), weight, matrix.blocks, c_int64(0), c_int64(matrix.rows),
            c_int64(matrix.cols), importance,
        )  # fmt: skip
        return lambda: self._base.ggml_quantize_chunk(*arguments)

    def dequantize(self, matrix: Matrix) -> NDArray[np.float32]:
        """Return the values of a matrix."""
        values = np.empty((matrix.rows, matrix.cols), np.float32)
        to_float = self._traits(TYPES[matrix.type]).to_float
        to_float(*_arguments(matrix.blocks, values, c_int64(values.size)))
        return values

    def quantize_activations(
        self, type: str, x: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint8], Callable[[], object]]:
        """Return a buffer for a vector of a type, and a call that rounds `x` (cols) to it."""
        blocks = np.zeros(self._row_bytes(type, len(x)), np.uint8)
        from_float = self._cpu_traits(TYPES[type]).from_float
        arguments = _arguments(x, blocks, c_int64(len(x)))
        return blocks, lambda: from_float(*arguments)

    def product(
        self, matrix: Matrix, x: NDArray[np.float32], y: NDArray[np.float32]
    ) -> Callable[[], object]:
        """Return a call for y (rows) = matrix times x (cols); x is quantized once, in advance."""
        traits = self._cpu_traits(TYPES[matrix.type])
        names = {number: name for name, number in TYPES.items()}
        blocks, quantize = self.quantize_activations(names[traits.vec_dot_type], x)
        quantize()
        arguments = _arguments(
            c_void_p(traits.vec_dot), c_int(matrix.cols), c_int(matrix.rows), matrix.blocks,
            c_size_t(matrix.blocks.shape[1]), blocks, y,
        )  # fmt: skip
        return lambda: self._loops.dot_rows(*arguments)

    def _traits(self, type: int) -> _Traits:
        return self._base.ggml_get_type_traits(c_int(type)).contents

    def _cpu_traits(self, type: int) -> _CpuTraits:
        return self._cpu.ggml_get_type_traits_cpu(c_int(type)).contents

    def _row_bytes(self, type: str, cols: int) -> int:
        traits = self._traits(TYPES[type])
        if cols % traits.block:
            raise ValueError(f"{cols} columns, not a multiple of {type}'s block of {traits.block}")
        return cols // traits.block * traits.block_bytes


def load() -> Ggml | None:
    """Return the library, if it is found."""
    return Ggml() if find("llama_cpp/lib") else None


def llama_version() -> str:
    """Return the version of the llama-cpp-python found."""
    folder = find("llama_cpp")
    found = distributions(name="llama_cpp_python", path=[str(folder.parent)]) if folder else []
    return next((one.version for one in found), "unknown")


def _arguments(*values: Any) -> tuple[Any, ...]:
    """Return arrays as pointers that keep them alive."""
    return tuple(v.ctypes.data_as(POINTER(c_float)) if hasattr(v, "ctypes") else v for v in values)
