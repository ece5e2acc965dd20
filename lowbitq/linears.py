"""Linear layers, dense and quantized: what a network calls."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.tensors import QuantizedTensor

if TYPE_CHECKING:
    from lowbitq.rotations import Rotation


class _Layer:
    """What both kinds of layer do alike."""

    bias: NDArray[np.float32] | None
    rotation: Rotation | None
    handle: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        raise NotImplementedError

    def forward(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the layer to tokens.

        Parameters
        ----------
        x : ndarray of shape (t, cols), float32, C-contiguous

        Returns
        -------
        ndarray of shape (t, rows), float32

        Raises
        ------
        TypeError
            If `x` is not float32.
        ValueError
            If `x` has another shape or is not contiguous.
        """
        y = np.empty((len(x), self.shape[0]), np.float32)
        _core.linear_forward(self.handle, x, y)
        return y

    def rotate_input(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the weights see of `x` (t, cols): `x` itself, or rotated, a new array."""
        return x if self.rotation is None else self.rotation.apply(x)

    def replace(self, **changes: Any) -> Any:
        """Return a layer that differs in the named fields."""
        return replace(self, **changes)  # type: ignore[type-var]

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the handle, which only this process has: a copy makes its own.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    @property
    def _rotation_handle(self) -> Any:
        return None if self.rotation is None else self.rotation.handle


@dataclass(frozen=True, eq=False)
class Linear(_Layer):
    """A dense layer ``y = W R x + b`` in float32.

    Parameters
    ----------
    weight : ndarray of shape (rows, cols), float32, C-contiguous
        Shared, not copied.
    bias : ndarray of shape (rows,), float32, or None, default=None
    rotation : Rotation or None, default=None
        R, of order ``cols``; None: the identity.

    Raises
    ------
    TypeError
        If an array is not float32.
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> layer = Linear(np.array([[1, 2], [3, 4]], np.float32))
    >>> layer.forward(np.ones((1, 2), np.float32))
    array([[3., 7.]], dtype=float32)
    """

    weight: NDArray[np.float32] = field(repr=False)
    bias: NDArray[np.float32] | None = field(default=None, repr=False)
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        copy = _core.copy_dense(self.weight, self._rotation_handle, None, None)
        handle = _core.linear((copy,), self.bias, None, None)
        object.__setattr__(self, "handle", handle)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        rows, cols = self.weight.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        """Bytes of the weight; a bias is not counted."""
        return self.weight.nbytes

    @property
    def bits_per_weight(self) -> float:
        """32.0."""
        return 8 * self.nbytes / self.weight.size


@dataclass(frozen=True, eq=False)
class QuantizedLinear(_Layer):
    """A layer ``y = W act(R x) + b`` with packed weights and quantized activations.

    Each token's activations are rounded to integers with one scale per group of the weight (per 64
    columns where a row has one group). The result does not depend on the instruction set, the
    number of threads or the other tokens of the call, to the last bit.

    Parameters
    ----------
    tensor : QuantizedTensor
        W.
    bias : ndarray of shape (rows,), float32, or None, default=None
    rotation : Rotation or None, default=None
        R, of order ``cols``; None: the identity.
    activation_bits : {8, 4, None}, default=8
        None: float32 activations, a slow path that decodes the weights exactly. With 8 or 4 a table
        of more than two levels (nf4, log, kmeans) is rounded to multiples of 1/127 of its largest.

    Raises
    ------
    TypeError
        If an array is not float32.
    ValueError
        If shapes do not fit or `activation_bits` is another number.

    Examples
    --------
    >>> codes = np.array([[0, 1, 2, 3]], np.uint8)
    >>> tensor = QuantizedTensor.pack("int2sym", codes, scale=np.ones((1, 1), np.float32))
    >>> QuantizedLinear(tensor).forward(np.array([[0, 0, 0, 1]], np.float32))
    array([[1.5]], dtype=float32)
    """

    tensor: QuantizedTensor
    bias: NDArray[np.float32] | None = field(default=None, repr=False)
    rotation: Rotation | None = None
    activation_bits: int | None = 8

    def __post_init__(self) -> None:
        if self.activation_bits not in (8, 4, None):
            raise ValueError(f"activation_bits is {self.activation_bits}, expected 8, 4 or None")
        handle = self.tensor.linear(
            self.bias, self._rotation_handle, activation_bits=self.activation_bits
        )
        object.__setattr__(self, "handle", handle)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight; a bias is not counted."""
        return self.tensor.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the weight, everything counted, divided by ``rows * cols``."""
        return self.tensor.bits_per_weight
