"""QuantizedTensor: a matrix as packed codes, scales, offsets and levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core
from lowbitq.arrays import float32
from lowbitq.formats import Format
from lowbitq.tables import as_html

_KEYS = {"format", "rows", "cols", "gamma", "zero"}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized matrix: ``W[r, k] ~ scale[r, g] * level[code[r, k]] + offset[r, g]``.

    Usually made by `lowbitq.quantize` or `QuantizedTensor.pack`. The arrays are shared, not copied,
    and must not change afterwards. To NumPy it is the decoded matrix: ``np.asarray(q)``,
    ``x @ q.T`` and ``w - q`` work, and `len` and indexing have rows.

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
        What the codes stand for; None: the code itself says so. Formats that have a table
        (``Format.has_levels``) have levels, the others do not.
    unit : float, default=1.0
        What integer scales are multiples of; with one scale per tensor, that scale.
    zero : float or None, default=None
        Where no offset is stored, ``offset = -zero * scale``. If ``format.stores_zero``, it is
        fitted to the matrix. Otherwise it is ``format.zero_level``; a different number becomes the
        format's choice, provided that the format lets it be chosen and has not chosen yet.

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
    unit: float = 1.0
    zero: float | None = None
    handle: Any = field(init=False, repr=False)  # of the code, for _core

    def __post_init__(self) -> None:
        format = Format.parse(self.format)
        zero = format.zero_level if self.zero is None else _float32(self.zero)
        if zero != format.zero_level and not format.stores_zero:
            format = format.with_zero(zero)
        object.__setattr__(self, "format", format)
        object.__setattr__(self, "zero", zero)
        object.__setattr__(self, "unit", _float32(self.unit))
        object.__setattr__(self, "handle", code_of(format, self.levels, self.unit, self.zero))
        self._float_copy()  # checks dtypes, sizes and numbers

    @classmethod
    def pack(
        cls,
        format: Format | str,
        codes: NDArray[np.uint8],
        scale: ArrayLike | None = None,
        offset: ArrayLike | None = None,
        *,
        levels: NDArray[np.float32] | None = None,
        unit: float = 1.0,
        zero: float | None = None,
        shape: tuple[int, int] | None = None,
    ) -> QuantizedTensor:
        """Store given codes, scales and offsets; nothing is rounded.

        Parameters
        ----------
        format : Format or str
            What to store them as.
        codes : ndarray of shape ``format.code_shape(rows, cols)``, uint8
            Each below ``format.level_count``; only ``2**format.bits`` is checked.
        scale : array_like of shape (rows, groups), or None
            Exactly representable in the stored form: a float16, or an integer times `unit`. None
            only with one scale per tensor, which is `unit`.
        offset : array_like of shape (rows, groups), or None
            A float16 each; None for formats without offsets.
        levels : ndarray of shape (2**bits,), float32, or None, default=None
            Values of the codes, for formats that have a table.
        unit, zero : float
            See the class.
        shape : (int, int) or None, default=None
            (rows, cols); None: that of `codes`.

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
        if (offset is not None) != format.has_offsets:
            expected = "an array" if format.has_offsets else "None"
            raise ValueError(f"format {format} expects offset to be {expected}")
        scale = None if scale is None else float32(scale, "scale")
        offset = None if offset is None else float32(offset, "offset")
        rows, cols = codes.shape if shape is None else shape
        code = code_of(format, levels, unit, zero)
        panels = _core.aligned_empty(bytes=format.panel_bytes(rows, cols))
        group = format.group or max(cols, 1)
        _core.pack(code, codes, scale, offset, panels, rows=rows, cols=cols, group=group)
        return cls(format, rows, cols, panels, levels, unit, zero)

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
        """Codes of shape ``format.code_shape(rows, cols)``, uint8, unpacked on each access."""
        codes = np.empty(self.format.code_shape(self.rows, self.cols), np.uint8)
        _core.unpack(self.handle, self.panels, codes, None, None, **self._layout)
        return codes

    @property
    def scale(self) -> NDArray[np.float32]:
        """Scales of shape (rows, groups), float32, unpacked on each access."""
        scale = np.empty((self.rows, self.format.groups(self.cols)), np.float32)
        _core.unpack(self.handle, self.panels, None, scale, None, **self._layout)
        return scale

    @property
    def offset(self) -> NDArray[np.float32]:
        """Offsets of shape (rows, groups), float32: stored ones, or ``-zero * scale``."""
        offset = np.empty((self.rows, self.format.groups(self.cols)), np.float32)
        _core.unpack(self.handle, self.panels, None, None, offset, **self._layout)
        return offset

    def dequantize(self) -> NDArray[np.float32]:
        """Return the matrix that the codes stand for.

        Returns
        -------
        ndarray of shape (rows, cols), float32
            ``scale * level + offset``, rounded once.
        """
        weight = np.empty(self.shape, np.float32)
        _core.packed_dequantize(self.handle, self.panels, weight, group=self._layout["group"])
        return weight

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return `dequantize`, for `numpy.asarray`; a new array in any case."""
        if copy is False:
            raise ValueError("copy is False, but packed codes have no array of weights to share")
        weight = self.dequantize()
        return weight if dtype is None else weight.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Return decoded rows: ``q[3]``, ``q[2:5]``, ``q[[0, 7]]``; ``q[3, 5]`` is one weight."""
        found: NDArray[np.float32] = self.dequantize()[rows]
        return found

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return iter(self.dequantize())

    @property
    def T(self) -> NDArray[np.float32]:  # noqa: N802 (NumPy's name)
        """The transpose of `dequantize`, of shape (cols, rows), float32."""
        return self.dequantize().T

    def __eq__(self, other: object) -> bool:
        """Whether both have the same format and shape, and the same codes and scales to the bit."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        if self._key() != other._key() or not np.array_equal(self.panels, other.panels):
            return False
        if self.levels is None or other.levels is None:
            return self.levels is other.levels
        return np.array_equal(self.levels, other.levels)

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.format, self.rows, self.cols, self.unit, self.zero

    def __matmul__(self, x: ArrayLike) -> NDArray[np.float32]:
        """Product with a vector (cols,) or matrix (cols, t), in float32.

        The reference path: weights are decoded and multiplied by BLAS. It agrees with
        ``dequantize() @ x`` to rounding. `QuantizedLinear` has the fast one.
        """
        x = float32(x, "x")
        if x.ndim not in (1, 2) or x.shape[0] != self.cols:
            raise ValueError(f"x has shape {x.shape}, expected ({self.cols},) or ({self.cols}, t)")
        tokens = np.ascontiguousarray(np.atleast_2d(x.T))
        y = np.empty((tokens.shape[0], self.rows), np.float32)
        layer = _core.linear((self._float_copy(),), None, None, None)
        _core.linear_forward(layer, tokens, y)
        return y.T if x.ndim == 2 else y[0]

    def _repr_html_(self) -> str:
        rows, cols = self.shape
        about = f"{rows} x {cols} in {self.format}, {8 * self.nbytes / (rows * cols):.3f} bits each"
        corner = self[:5, :8]
        names = [str(k) for k in range(corner.shape[1])]
        shown = [dict(zip(names, map(float, row), strict=True)) for row in corner]
        return as_html(names, shown, caption=about)

    def copy_handle(self, *parts: Any, **activation: Any) -> Any:
        """Make the C handle of a layer's copy with these weights; it keeps all arrays alive.

        Parameters
        ----------
        *parts
            Handles of the input and the output rotation, or None; fusion weights (rows,) and sums
            of the rows of the weights (rows,), float32, or None; handle of the rotation in which
            the input is rounded, or None.
        **activation
            How the input is rounded, as `_core.copy_packed` has it.

        Returns
        -------
        capsule
            For `_core.linear`.
        """
        return _core.copy_packed(self.handle, self.panels, *parts, **activation, **self._layout)

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
            "gamma": self.unit,
            "zero": self.zero,  # often implied by the format, but earlier versions require it
        }
        return arrays, metadata

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]
    ) -> QuantizedTensor:
        """Join what `to_arrays` split; the arrays are shared.

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
            fields = {"unit" if name == "gamma" else name: x for name, x in metadata.items()}
            return cls(levels=arrays.get("levels"), panels=arrays["panels"], **fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise _core.FormatError(f"damaged packed matrix: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.format, self.rows, self.cols, self.panels)
        return _unpickled, (*fields, self.levels, self.unit, self.zero)

    def _float_copy(self) -> Any:
        return self.copy_handle(
            *5 * [None],
            activation_bits=0,
            activation_clip=1.0,
            activation_scale=0.0,
            activation_zero=0.0,
            zero_per_token=False,
        )

    @property
    def _layout(self) -> dict[str, Any]:
        group = self.format.group or max(self.cols, 1)
        return {"rows": self.rows, "cols": self.cols, "group": group}


def aligned(panels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bytes at a 64-byte boundary, copied only if they start elsewhere."""
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
    """Round to float32, as C will use it; beyond its range, to an infinity."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def code_of(
    format: Format,
    levels: NDArray[np.float32] | None = None,
    unit: float = 1.0,
    zero: float | None = None,
    *,
    scale_bits: int | None = None,
) -> Any:
    """Make the C handle of a code and of how its scales are stored.

    Parameters
    ----------
    format : Format
    levels, unit, zero
        As for `QuantizedTensor`.
    scale_bits : int or None, default=None
        None: ``format.scale_bits``.

    Returns
    -------
    capsule
        For `_core.quantize` and the like; it keeps `levels` alive.

    Examples
    --------
    >>> scale, offset = np.empty((2, 1, 1), np.float32)
    >>> weight = np.array([[-3.0, -1.0, 1.0, 3.0]], np.float32)
    >>> options = {"clip": 1.0, "percentile": 100.0, "candidates": 1, "shrink": 0.0, "norm": 2.0}
    >>> _core.quantize(
    ...     code_of(Format("int2")), weight, None, None, scale, offset,
    ...     group=4, fixed=False, method="minmax", **options,
    ... )
    >>> scale
    array([[2.]], dtype=float32)
    """
    if (levels is not None) != format.has_levels:
        found, expected = ("given", "none") if levels is not None else ("None", "a table")
        raise ValueError(f"levels is {found}, expected {expected} with format {format}")
    return _core.code(
        levels,
        name=format.code,
        symmetric=format.symmetric,
        scale_bits=format.scale_bits if scale_bits is None else scale_bits,
        unit=_float32(unit),
        zero=_float32(format.zero_level if zero is None else zero),
    )
