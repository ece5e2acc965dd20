"""Linear layers, dense and quantized, as a network calls them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core
from lowbitq.arrays import float32
from lowbitq.tensors import QuantizedTensor

if TYPE_CHECKING:
    from lowbitq.grids import UniformGrid
    from lowbitq.rotations import Rotation


Adapter = tuple[NDArray[np.float32], NDArray[np.float32]]


class _Layer:
    """Common base of both kinds of layer."""

    bias: NDArray[np.float32] | None
    handle: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        raise NotImplementedError

    def forward(self, x: ArrayLike) -> NDArray[np.float32]:
        """Apply the layer to tokens.

        Parameters
        ----------
        x : array_like of shape (t, cols)

        Returns
        -------
        ndarray of shape (t, rows), float32

        Raises
        ------
        TypeError
            If `x` is not real numbers.
        ValueError
            If `x` has another shape.
        """
        tokens = float32(x, "x")
        y = np.empty((len(tokens), self.shape[0]), np.float32)
        _core.linear_forward(self.handle, tokens, y)
        return y

    @property
    def rotation(self) -> Rotation | None:
        """Rotation of the input."""
        raise NotImplementedError

    def rotate_input(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `x` (t, cols) as the weights see it: `x` itself, or a new, rotated array."""
        return x if self.rotation is None else self.rotation.apply(x)

    def replace(self, **changes: Any) -> Any:
        """Return a layer that differs in the named fields."""
        return replace(self, **changes)  # type: ignore[type-var]

    def __reduce__(self) -> tuple[Any, ...]:
        # Leaves out the handle, which is valid in this process only; a copy makes its own.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Linear(_Layer):
    """A dense layer ``y = W R x + b`` in float32.

    Parameters
    ----------
    weight : array_like of shape (rows, cols)
        Shared, not copied, if it is a C-contiguous array of float32.
    bias : array_like of shape (rows,), or None, default=None
    rotation : Rotation or None, default=None
        R, of order ``cols``; None: the identity.

    Raises
    ------
    TypeError
        If an array is not real numbers.
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
        object.__setattr__(self, "weight", float32(self.weight, "weight"))
        if self.bias is not None:
            object.__setattr__(self, "bias", float32(self.bias, "bias"))
        rotation = None if self.rotation is None else self.rotation.handle
        copy = _core.copy_dense(self.weight, rotation, None, None)
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

    def dequantize(self) -> NDArray[np.float32]:
        """Return the matrix W R that the layer represents, of shape (rows, cols), float32."""
        return self.weight if self.rotation is None else self.rotation.inverse(self.weight)

    def to_float(self) -> Linear:
        """Return the layer itself."""
        return self


@dataclass(frozen=True)
class Activation:
    """How the input of a copy is rounded as the model runs.

    ``x ~ scale * q + zero`` with integers ``|q| <= 2**(bits - 1) - 1``, for each step of the packed
    weights.

    Parameters
    ----------
    bits : {8, 4, None}, default=8
        None: float32 activations, a slow path that decodes the weights exactly. With 8 or 4, a
        table of more than two levels (nf4, log, kmeans) is rounded to multiples of 1/127 of its
        maximum.
    clip : float, default=1.0
        Fraction of a step's range that is kept, 0.001 to 1.
    scale : float or None, default=None
        One scale for all tokens and steps, 2**-100 to 2**120. None: each has its own, by its
        maximum magnitude.
    zero : float or "token", default=0.0
        Zero point of all tokens. ``"token"``: the middle of each token's range.
    rotation : Rotation or None, default=None
        T, of order ``cols``: the input is rounded in another basis, ``T^T round(T x)``, and the
        product takes the result in 8 bits. So copies with the same weights can differ in their
        errors of rounding inputs. None: the identity.

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> Activation(4, clip=0.9).bits
    4
    """

    bits: int | None = 8
    clip: float = 1.0
    scale: float | None = None
    zero: float | str = 0.0
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, None):
            raise ValueError(f"activation_bits is {self.bits}, expected 8, 4 or None")
        if not 0.001 <= self.clip <= 1:
            raise ValueError(f"clip is {self.clip}, expected 0.001 to 1")
        # Inputs below 2**-100 become zeros in any case; 127 times the largest is still a float32.
        if self.scale is not None and not 2.0**-100 <= self.scale <= 2.0**120:
            raise ValueError(f"scale is {self.scale}, expected 2**-100 to 2**120 or None")
        if self.zero != "token" and not (
            isinstance(self.zero, (int, float)) and np.isfinite(self.zero)
        ):
            raise ValueError(f"zero is {self.zero!r}, expected a number or 'token'")
        rest = (self.clip, self.scale, self.zero, self.rotation)
        if self.bits is None and rest != (1, None, 0, None):
            raise ValueError("clip, scale, zero and rotation need 8 or 4 bits, found bits = None")

    @classmethod
    def of_grid(cls, grid: UniformGrid) -> Activation:
        """Return the static quantizer that rounds all inputs to one grid.

        The grid's middle code becomes q = 0, so `scale` is the step of the grid and `zero` the
        value of its middle code. Only inputs halfway between two levels may round to the other one.

        Parameters
        ----------
        grid : UniformGrid
            One grid for the whole tensor, of either convention, with 255 or 15 codes. Fit it to
            calibration inputs as the weights see them, after the rotation of the copy.

        Returns
        -------
        Activation
            With 8 or 4 bits, by the number of codes.

        Raises
        ------
        ValueError
            If the grid has several scales or zeros, another number of codes (256 and 16 have no
            middle code), or a scale or zero that is out of range.

        Examples
        --------
        >>> from lowbitq.grids import fit_grid
        >>> inputs = np.array([[-2.0, 0.0, 1.0, 5.0]])
        >>> grid = fit_grid(inputs, bits=4, restricted=True)
        >>> Activation.of_grid(grid)
        Activation(bits=4, clip=1.0, scale=0.5, zero=1.5, rotation=None)
        """
        if grid.scale.size != 1 or grid.zero.size != 1:
            found = f"scale of shape {grid.scale.shape} and zero of shape {grid.zero.shape}"
            raise ValueError(f"grid has a {found}, expected one grid for the whole tensor")
        count = grid.high - grid.low + 1
        bits = {(1 << bits) - 1: bits for bits in (8, 4)}.get(count)
        if bits is None:
            raise ValueError(
                f"grid has {count} codes, expected 255 or 15; fit_grid makes them with bits = 8 "
                "or 4 and restricted = True"
            )
        middle = (grid.low + grid.high) // 2
        plain = grid.to_convention("subtract")
        scale = plain.scale.item()
        return cls(bits, scale=scale, zero=scale * (middle - plain.zero.item()))

    @property
    def is_centred(self) -> bool:
        """Whether there is a zero point."""
        return self.zero != 0


@dataclass(frozen=True, eq=False)
class Copy:
    """One quantized copy of a layer, ``weight * P^T (W act(R x))``.

    Parameters
    ----------
    tensor : QuantizedTensor
        W. Copies may share one object, which is then stored once.
    rotation, output_rotation : Rotation or None, default=None
        R, of order ``cols``, and P, of order ``rows``; None: the identity.
    activation : Activation
    weight : ndarray of shape (rows,), float32, or None, default=None
        Factors of the outputs; None: ones.

    Raises
    ------
    TypeError
        If an array is not float32.
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> tensor = QuantizedTensor.pack("binary", np.eye(2, dtype=np.uint8), np.ones((2, 1), "f4"))
    >>> Copy(tensor, weight=np.float32([1, 2])).dequantize()
    array([[ 0.5, -0.5],
           [-1. ,  1. ]], dtype=float32)
    """

    tensor: QuantizedTensor
    rotation: Rotation | None = None
    output_rotation: Rotation | None = None
    activation: Activation = Activation()
    weight: NDArray[np.float32] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        how, basis = self.activation, self.activation.rotation
        sums = None
        if how.is_centred and basis is None:
            sums = self.tensor.dequantize().sum(1, dtype=np.float64).astype(np.float32)
        handle = self.tensor.copy_handle(
            None if self.rotation is None else self.rotation.handle,
            None if self.output_rotation is None else self.output_rotation.handle,
            self.weight,
            sums,
            None if basis is None else basis.handle,
            activation_bits=how.bits or 0,
            activation_clip=how.clip,
            activation_scale=how.scale or 0.0,
            activation_zero=0.0 if isinstance(how.zero, str) else float(how.zero),
            zero_per_token=how.zero == "token",
        )
        object.__setattr__(self, "handle", handle)

    handle: Any = field(init=False, repr=False, default=None)

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("tensor", "rotation", "output_rotation", "activation", "weight")
        return type(self), tuple(getattr(self, name) for name in names)

    def dequantize(self) -> NDArray[np.float32]:
        """Return weight * P^T W R, of shape (rows, cols), float32."""
        matrix = self.tensor.dequantize()
        if self.rotation is not None:
            matrix = self.rotation.inverse(matrix)
        if self.output_rotation is not None:
            columns = np.ascontiguousarray(matrix.T)
            matrix = np.ascontiguousarray(self.output_rotation.inverse(columns).T)
        return matrix if self.weight is None else matrix * self.weight[:, None]


@dataclass(frozen=True, eq=False)
class QuantizedLinear(_Layer):
    """A layer of packed weights: ``y = sum_i weight_i P_i^T (W_i act_i(R_i x)) + U V^T x + b``.

    If all activations are integers and there is no adapter, the result is bit-identical on every
    instruction set, with any number of threads and with any other tokens in the call.

    Parameters
    ----------
    copies : tuple of Copy
        At least one, all of the same shape; `of` makes a layer of one.
    bias : ndarray of shape (rows,), float32, or None, default=None
    adapter : (ndarray, ndarray) or None, default=None
        U (rows, rank) and V (cols, rank), float32.

    Attributes
    ----------
    tensor, rotation, activation_bits
        These fields of a layer's only copy; ValueError if it has several.

    Raises
    ------
    TypeError
        If an array is not float32.
    ValueError
        If shapes do not fit.

    Examples
    --------
    >>> codes = np.array([[0, 1, 2, 3]], np.uint8)
    >>> tensor = QuantizedTensor.pack("int2sym", codes, scale=np.ones((1, 1), np.float32))
    >>> QuantizedLinear.of(tensor).forward(np.array([[0, 0, 0, 1]], np.float32))
    array([[1.5]], dtype=float32)
    >>> QuantizedLinear((Copy(tensor), Copy(tensor))).dequantize()
    array([[-3., -1.,  1.,  3.]], dtype=float32)
    """

    copies: tuple[Copy, ...]
    bias: NDArray[np.float32] | None = field(default=None, repr=False)
    adapter: Adapter | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "copies", tuple(self.copies))
        handles = tuple(copy.handle for copy in self.copies)
        U, V = self.adapter or (None, None)
        object.__setattr__(self, "handle", _core.linear(handles, self.bias, U, V))

    @classmethod
    def of(
        cls,
        tensor: QuantizedTensor,
        bias: NDArray[np.float32] | None = None,
        rotation: Rotation | None = None,
        activation_bits: int | None = 8,
    ) -> QuantizedLinear:
        """Make a layer of one copy; see the classes for parameters and errors."""
        activation = Activation(activation_bits)
        return cls((Copy(tensor, rotation, activation=activation),), bias)

    @property
    def tensor(self) -> QuantizedTensor:
        return self._only.tensor

    @property
    def rotation(self) -> Rotation | None:
        return self._only.rotation

    @property
    def activation_bits(self) -> int | None:
        return self._only.activation.bits

    @property
    def _only(self) -> Copy:
        if len(self.copies) != 1:
            raise ValueError(
                f"the layer has {len(self.copies)} copies, expected 1; read layer.copies"
            )
        return self.copies[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.copies[0].tensor.shape

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights, output factors and adapter as stored; without the bias."""
        tensors = {id(copy.tensor): copy.tensor for copy in self.copies}
        arrays = [copy.weight for copy in self.copies if copy.weight is not None]
        arrays += self.adapter or ()
        return sum(x.nbytes for x in tensors.values()) + sum(map(_stored_bytes, arrays))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, everything counted, divided by ``rows * cols``."""
        rows, cols = self.shape
        return 8 * self.nbytes / (rows * cols)

    def dequantize(self) -> NDArray[np.float32]:
        """Return the matrix that the layer represents, of shape (rows, cols), float32."""
        matrix = self.copies[0].dequantize()
        for copy in self.copies[1:]:
            matrix = matrix + copy.dequantize()
        return matrix if self.adapter is None else matrix + self.adapter[0] @ self.adapter[1].T

    def to_float(self) -> Linear:
        """Return the layer with its weights decoded, for float32 activations.

        A layer of one copy keeps its rotation, so its weights are the stored ones.
        """
        [first, *others] = self.copies
        plain = first.output_rotation is None and first.weight is None and self.adapter is None
        if plain and not others:
            return Linear(first.tensor.dequantize(), self.bias, first.rotation)
        return Linear(self.dequantize(), self.bias)


def _stored_bytes(values: NDArray[np.float32]) -> int:
    """Bytes in a file, which holds 16-bit floats where they are exact."""
    with np.errstate(over="ignore"):
        half = (values.astype(np.float16) == values).all()
    brain = not (values.view(np.uint32) & 0xFFFF).any()
    return values.nbytes // 2 if half or brain else values.nbytes
