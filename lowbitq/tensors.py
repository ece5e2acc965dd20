"""QuantizedTensor: a matrix as packed codes, scales, offsets and levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core
from lowbitq.formats import Format

_KEYS = {"format", "rows", "cols", "gamma", "zero"}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized matrix: ``W[r, k] ~ scale[r, g] * level[code[r, k]] + offset[r, g]``.

    Usually made by `lowbitq.quantize` or `QuantizedTensor.pack`. The arrays are shared, not copied,
    and must not change afterwards.

    Parameters
    ----------
    format : Format or str
        The code, its group and how scales are stored.
    rows, cols : int
        Shape of the matrix.
    panels : ndarray of shape (bytes,), uint8
        Codes, scales and offsets in panels of 16 rows (csrc/core/packed.h); a file holds the same
        bytes. Fastest at a 64-byte boundary.
    levels : ndarray of shape (2**bits,), float32, or None
        What the codes stand for; None: themselves. Formats of kind ``nf``, ``log`` and ``kmeans``
        have levels, the others do not.
    gamma : float, default=1.0
        What integer scales are multiples of; with one scale per tensor, that scale.
    zero : float or None, default=None
        Where no offset is stored, offset = -zero * scale. None: ``format.zero``.

    Raises
    ------
    TypeError
        If an array has another dtype.
    ValueError
        If sizes do not fit `format`, or a number is not finite.

    Examples
    --------
    >>> codes = np.array([[0, 1, 2, 3]], np.uint8)
    >>> tensor = QuantizedTensor.pack("int2sym", codes, scale=np.ones((1, 1), np.float32))
    >>> tensor.dequantize()
    array([[-1.5, -0.5,  0.5,  1.5]], dtype=float32)
    """

    format: Format
    rows: int
    cols: int
    panels: NDArray[np.uint8] = field(repr=False)
    levels: NDArray[np.float32] | None = field(default=None, repr=False)
    gamma: float = 1.0
    zero: float | None = None

    def __post_init__(self) -> None:
        format = Format.parse(self.format)
        object.__setattr__(self, "format", format)
        object.__setattr__(self, "zero", _float32(format.zero if self.zero is None else self.zero))
        object.__setattr__(self, "gamma", _float32(self.gamma))
        if (self.levels is not None) != _has_levels(format):
            found, expected = ("given", "none") if self.levels is not None else ("None", "a table")
            raise ValueError(f"levels is {found}, expected {expected} with format {format}")
        if self.levels is not None and not np.isfinite(self.levels).all():
            raise ValueError("levels has a NaN or an infinity")
        self._float_copy()  # checks dtypes, sizes and numbers

    @classmethod
    def pack(
        cls,
        format: Format | str,
        codes: NDArray[np.uint8],
        scale: NDArray[np.float32] | None = None,
        offset: NDArray[np.float32] | None = None,
        *,
        levels: NDArray[np.float32] | None = None,
        gamma: float = 1.0,
        zero: float | None = None,
    ) -> QuantizedTensor:
        """Store given codes, scales and offsets; nothing is rounded.

        Parameters
        ----------
        format : Format or str
            What to store them as.
        codes : ndarray of shape (rows, cols), uint8
            Below ``format.levels`` each (``2**format.bits`` is not checked against it).
        scale : ndarray of shape (rows, groups), float32, or None
            As its stored form holds it exactly: a float16, or an integer times `gamma`. None only
            with one scale per tensor, which is `gamma`.
        offset : ndarray of shape (rows, groups), float32, or None
            A float16 each; None for formats without offsets.
        levels : ndarray of shape (2**bits,), float32, or None, default=None
            Values of the codes, for formats that have a table.
        gamma, zero : float
            See the class.

        Returns
        -------
        QuantizedTensor

        Raises
        ------
        TypeError
            If an array has another dtype.
        ValueError
            If a shape does not fit, a code is too large, or a scale or offset is not exact.
        """
        format = Format.parse(format)
        if np.ndim(codes) != 2:
            raise ValueError(f"codes has {np.ndim(codes)} axes, expected 2 (rows, cols)")
        if (scale is None) != format.per_tensor:
            expected = "None" if format.per_tensor else "an array"
            raise ValueError(f"format {format} expects scale to be {expected}")
        if (offset is not None) != _has_offset(format):
            expected = "an array" if _has_offset(format) else "None"
            raise ValueError(f"format {format} expects offset to be {expected}")
        rows, cols = codes.shape
        zero = format.zero if zero is None else zero
        scalars = packed_scalars(format, rows, cols, _float32(gamma), _float32(zero))
        panels = _core.aligned_empty(bytes=_core.packed_bytes(**scalars))
        _core.pack(codes, scale, offset, panels, **scalars)
        return cls(format, rows, cols, panels, levels, gamma, zero)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.rows, self.cols

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, offsets, padding, and what the whole matrix shares."""
        return self.format.stored_bytes(self.rows, self.cols)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, everything counted, divided by ``rows * cols``."""
        return 8 * self.nbytes / (self.rows * self.cols)

    @property
    def codes(self) -> NDArray[np.uint8]:
        """Codes of shape (rows, cols), uint8, unpacked anew each time."""
        codes = np.empty(self.shape, np.uint8)
        _core.unpack(self.panels, codes, None, None, **self._scalars)
        return codes

    @property
    def scale(self) -> NDArray[np.float32]:
        """Scales of shape (rows, groups), float32, unpacked anew each time."""
        scale = np.empty((self.rows, self.format.groups(self.cols)), np.float32)
        _core.unpack(self.panels, None, scale, None, **self._scalars)
        return scale

    @property
    def offset(self) -> NDArray[np.float32]:
        """Offsets of shape (rows, groups), float32: stored ones, or ``-zero * scale``."""
        offset = np.empty((self.rows, self.format.groups(self.cols)), np.float32)
        _core.unpack(self.panels, None, None, offset, **self._scalars)
        return offset

    def dequantize(self) -> NDArray[np.float32]:
        """Return the matrix that the codes stand for.

        Returns
        -------
        ndarray of shape (rows, cols), float32
            ``scale * level + offset``, rounded once.
        """
        weight = np.empty(self.shape, np.float32)
        _core.packed_dequantize(self.panels, self.levels, weight, **self._scalars)
        return weight

    def __matmul__(self, x: ArrayLike) -> NDArray[np.float32]:
        """Product with a vector (cols,) or matrix (cols, t) of float32, in float32.

        The reference path: weights are decoded and multiplied by BLAS. It agrees with
        ``dequantize() @ x`` to rounding. `QuantizedLinear` has the fast one.
        """
        x = np.asarray(x)
        if x.dtype != np.float32:
            raise TypeError(f"x has dtype {x.dtype}, expected float32")
        if x.ndim not in (1, 2) or x.shape[0] != self.cols:
            raise ValueError(f"x has shape {x.shape}, expected ({self.cols},) or ({self.cols}, t)")
        tokens = np.ascontiguousarray(np.atleast_2d(x.T))
        y = np.empty((tokens.shape[0], self.rows), np.float32)
        layer = _core.linear((self._float_copy(),), None, None, None)
        _core.linear_forward(layer, tokens, y)
        return y.T if x.ndim == 2 else y[0]

    def copy_handle(self, *parts: Any, **activation: Any) -> Any:
        """Make the C handle of a layer's copy with these weights; it keeps all arrays alive.

        Parameters
        ----------
        *parts
            Handles of the input and the output rotation, or None; fusion weights (rows,) and sums
            of the rows of the weights (rows,), float32, or None.
        **activation
            How the input is rounded, as `_core.copy_packed` has it.

        Returns
        -------
        capsule
            For `_core.linear`.
        """
        return _core.copy_packed(self.panels, self.levels, *parts, **activation, **self._scalars)

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Split into arrays and metadata for a file.

        Returns
        -------
        arrays : dict of str to ndarray
            ``"panels"`` and, if there is a table, ``"levels"``.
        metadata : dict
            Numbers and text that JSON can hold.
        """
        arrays: dict[str, NDArray[Any]] = {"panels": self.panels}
        if self.levels is not None:
            arrays["levels"] = self.levels
        metadata = {
            "format": str(self.format),
            "rows": self.rows,
            "cols": self.cols,
            "gamma": self.gamma,
            "zero": self.zero,
        }
        return arrays, metadata

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]
    ) -> QuantizedTensor:
        """Put together what `to_arrays` split, sharing the arrays.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            ``"panels"`` and perhaps ``"levels"``, mapped from a file or not.
        metadata : mapping
            As read back from JSON. Nothing in it is trusted.

        Returns
        -------
        QuantizedTensor

        Raises
        ------
        FormatError
            If keys, types, sizes or numbers are not those of a packed matrix.
        """
        if set(metadata) != _KEYS:
            raise _core.FormatError(
                f"metadata of a packed matrix has {sorted(metadata)}, expected {sorted(_KEYS)}"
            )
        if "panels" not in arrays or not set(arrays) <= {"panels", "levels"}:
            raise _core.FormatError(
                f"a packed matrix has the arrays {sorted(arrays)}, expected panels, perhaps levels"
            )
        types = {"format": str, "rows": int, "cols": int, "gamma": float, "zero": float}
        for name, kind in types.items():
            if type(metadata[name]) is not kind:
                raise _core.FormatError(
                    f"{name} of a packed matrix is {metadata[name]!r}, expected {kind.__name__}"
                )
        try:
            return cls(levels=arrays.get("levels"), panels=arrays["panels"], **metadata)
        except (TypeError, ValueError, OverflowError) as error:
            raise _core.FormatError(f"damaged packed matrix: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.format, self.rows, self.cols, self.panels)
        return _unpickled, (*fields, self.levels, self.gamma, self.zero)

    def _float_copy(self) -> Any:
        return self.copy_handle(
            None,
            None,
            None,
            None,
            activation_bits=0,
            activation_clip=1.0,
            activation_scale=0.0,
            activation_zero=0.0,
            zero_per_token=False,
        )

    @property
    def _scalars(self) -> dict[str, Any]:
        assert self.zero is not None
        return packed_scalars(self.format, self.rows, self.cols, self.gamma, self.zero)


def aligned(panels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bytes at a 64-byte boundary: themselves, or copied where they lie elsewhere."""
    if panels.ctypes.data % 64 == 0:
        return panels
    copy = _core.aligned_empty(bytes=panels.size)
    copy[:] = panels
    return copy


def _unpickled(
    format: Format, rows: int, cols: int, panels: NDArray[np.uint8], *more: Any
) -> QuantizedTensor:
    return QuantizedTensor(format, rows, cols, aligned(panels), *more)


def _float32(value: float) -> float:
    """The nearest float32, beyond its range an infinity: what C computes with is what is kept."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _has_levels(format: Format) -> bool:
    return format.kind in ("nf", "log", "kmeans")


def _has_offset(format: Format) -> bool:
    return not format.symmetric and not format.per_tensor


def packed_scalars(
    format: Format, rows: int, cols: int, gamma: float, zero: float
) -> dict[str, Any]:
    """Keyword arguments by which `_core` describes a packed matrix.

    Parameters
    ----------
    format : Format
    rows, cols : int
    gamma, zero : float
        See `QuantizedTensor`.

    Returns
    -------
    dict

    Examples
    --------
    >>> packed_scalars(Format.parse("int2"), 16, 100, 1.0, 0.0)["group"]
    100
    """
    return {
        "rows": rows,
        "cols": cols,
        "bits": format.bits,
        "group": format.group or max(cols, 1),
        "scale_bits": format.scale_bits,
        "has_offset": _has_offset(format),
        "gamma": gamma,
        "zero": zero,
    }
