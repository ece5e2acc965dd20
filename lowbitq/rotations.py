"""Rotations: orthogonal matrices that spread outliers."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core, plots
from lowbitq.arrays import float32

Float32 = NDArray[np.float32]

KINDS = ("hadamard", "orthogonal", "matrix")


class Rotation:
    """An orthogonal matrix R of any order, applied to vectors by the fastest algorithm.

    Parameters
    ----------
    n : int
        Order of R, 1 or more.
    kind : {"hadamard", "orthogonal"}, default="hadamard"
        ``"hadamard"``: R = (B_1 ⊗ ... ⊗ B_m ⊗ H) diag(s) / √n with random signs s, the Sylvester
        matrix H and base matrices B_j of the orders in `orders`: Paley's Hadamard matrices where
        they exist, else Hartley's matrix (entries up to √2) for an odd factor. It takes
        O(n (c_1 + ... + c_m + log n)) additions and stores only its seed.
        ``"orthogonal"``: uniform over all orthogonal matrices (Haar), stored and applied densely.
    seed : int, default=0
        The same seed gives the same signs on every machine.
    stream : int, default=0
        Distinguishes rotations that share a seed.

    Attributes
    ----------
    n, kind, seed, stream
        As given; kind ``"matrix"`` after :meth:`from_matrix`.
    orders : tuple of int
        Orders c_j of the base matrices, empty if n is a power of two or R is dense.
    handle : capsule
        This rotation for C functions.

    Raises
    ------
    ValueError
        If n < 1, kind is unknown, or a base matrix of order above 4096 is needed (n has a prime
        factor that large and no Paley matrix covers it).

    References
    ----------
    R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12, 1933.
    S. Ashkboos et al., "QuaRot: Outlier-free 4-bit inference in rotated LLMs", 2024.
    F. Mezzadri, "How to generate random matrices from the classical compact groups", 2007.

    Examples
    --------
    >>> rotation = Rotation(576, seed=3)
    >>> rotation.orders
    (36,)
    >>> outlier = np.zeros(576, np.float32)
    >>> outlier[7] = 24
    >>> abs(rotation.apply(outlier)).max().item()
    1.0
    >>> bool(np.allclose(rotation.inverse(rotation.apply(outlier)), outlier, atol=1e-4))
    True
    """

    n: int
    kind: str
    seed: int
    stream: int
    orders: tuple[int, ...]
    handle: object

    def __init__(self, n: int, kind: str = "hadamard", seed: int = 0, *, stream: int = 0) -> None:
        if kind == "hadamard":
            self._start(n, kind, seed, stream, orders=hadamard_orders(n))
        elif kind == "orthogonal":
            if n < 1:
                raise ValueError(f"n is {n}, expected at least 1")
            q = np.empty((n, n))
            _core.orthogonal(q, seed=seed, stream=stream)
            self._start(n, kind, seed, stream, matrix=q.astype(np.float32))
        else:
            raise ValueError(f"kind is {kind!r}, expected 'hadamard' or 'orthogonal'")

    def _start(
        self,
        n: int,
        kind: str,
        seed: int,
        stream: int,
        *,
        orders: tuple[int, ...] = (),
        matrix: Float32 | None = None,
    ) -> None:
        self.n, self.seed, self.stream = int(n), int(seed), int(stream)
        self.kind, self.orders = kind, orders
        self._dense = matrix
        if matrix is not None:
            self.handle = _core.dense_rotation(matrix)
            return
        bits = np.empty(n, np.uint64)
        _core.random_bits(bits, seed=seed, stream=stream)
        sign = np.where(bits >> np.uint64(63), np.float32(-1), np.float32(1))
        diagonal = sign * np.float32(1 / np.sqrt(n))
        self.handle = _core.hadamard_rotation(np.array(orders, np.int64), _bases(orders), diagonal)

    @classmethod
    def from_matrix(cls, matrix: Float32) -> Rotation:
        """Make a rotation from an orthogonal matrix.

        Parameters
        ----------
        matrix : ndarray of shape (n, n), float32
            Copied.

        Returns
        -------
        Rotation
            Its kind is ``"matrix"``.

        Raises
        ------
        ValueError
            If `matrix` is not square, or an entry of R R^T - I is over 1e-4.

        Examples
        --------
        >>> Rotation.from_matrix(np.eye(3, dtype=np.float32)[::-1]).apply(np.float32([1, 2, 3]))
        array([3., 2., 1.], dtype=float32)
        """
        dense = np.array(matrix, np.float32, order="C")
        if dense.ndim != 2 or dense.shape[0] != dense.shape[1] or dense.size == 0:
            raise ValueError(f"matrix has shape {dense.shape}, expected (n, n)")
        rotation = cls.__new__(cls)
        rotation._start(len(dense), "matrix", 0, 0, matrix=dense)
        error = float(abs(rotation.apply(dense) - np.eye(len(dense), dtype=np.float32)).max())
        if not error <= 1e-4:
            raise ValueError(f"matrix is not orthogonal: R R^T differs from I by {error:.2g}")
        return rotation

    def __repr__(self) -> str:
        if self.kind == "matrix":
            return f"Rotation.from_matrix(<{self.n} x {self.n}>)"
        return f"Rotation({self.n}, {self.kind!r}, seed={self.seed}, stream={self.stream})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Rotation.from_dict, (self.to_dict(), self.to_arrays())

    def apply(self, x: ArrayLike) -> Float32:
        """Return R x for every vector along the last axis of `x`.

        Parameters
        ----------
        x : array_like of shape (..., n)
            Left unchanged.

        Returns
        -------
        ndarray of shape (..., n), float32
            A new array.

        Raises
        ------
        ValueError
            If the last axis of `x` is not n long.
        TypeError
            If `x` is not real numbers.

        Examples
        --------
        >>> Rotation(4, seed=1).apply(np.ones((2, 3, 4), np.float32)).shape
        (2, 3, 4)
        """
        rows = self._copy_of(x)
        _core.rotate(self.handle, rows.reshape(-1, self.n))
        return rows

    def inverse(self, x: ArrayLike) -> Float32:
        """Return R^T x for every vector along the last axis of `x`; see :meth:`apply`.

        Examples
        --------
        >>> rotation, x = Rotation(4, seed=1), np.ones(4, np.float32)
        >>> rotation.inverse(rotation.apply(x))
        array([1., 1., 1., 1.], dtype=float32)
        """
        rows = self._copy_of(x)
        _core.rotate_back(self.handle, rows.reshape(-1, self.n))
        return rows

    def plot(self, x: ArrayLike, axes: Any = None) -> Any:
        """Draw histograms of the magnitudes of vectors before and after this rotation.

        Parameters
        ----------
        x : array_like of shape (..., n)
            Such as inputs of a layer.
        axes : matplotlib.axes.Axes, default=None
            Where to draw. None: a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ValueError
            If the last axis of `x` is not n long, or all of it is zero.
        ImportError
            If `axes` is None and matplotlib is not installed.
        """
        return plots.magnitudes({"before": x, self.kind: self.apply(x)}, axes)

    def _copy_of(self, x: ArrayLike) -> Float32:
        found = float32(x, "x")
        if found.ndim == 0 or found.shape[-1] != self.n:
            raise ValueError(f"x has shape {found.shape}, expected (..., {self.n})")
        return np.array(found)

    def matrix(self) -> Float32:
        """Return R, dense.

        Returns
        -------
        ndarray of shape (n, n), float32
            A new array.

        Examples
        --------
        >>> abs(Rotation(4).matrix())[0]
        array([0.5, 0.5, 0.5, 0.5], dtype=float32)
        """
        if self._dense is not None:
            return self._dense.copy()
        return np.ascontiguousarray(self.apply(np.eye(self.n, dtype=np.float32)).T)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; with :meth:`to_arrays`, they restore this rotation.

        Examples
        --------
        >>> Rotation(24, seed=5).to_dict()
        {'kind': 'hadamard', 'n': 24, 'seed': 5, 'stream': 0, 'orders': [12]}
        """
        return {
            "kind": self.kind,
            "n": self.n,
            "seed": self.seed,
            "stream": self.stream,
            "orders": list(self.orders),
        }

    def to_arrays(self) -> dict[str, Float32]:
        """Return the arrays to keep beside :meth:`to_dict`: ``{"matrix": R}`` if R is dense.

        Examples
        --------
        >>> Rotation(24).to_arrays()
        {}
        """
        return {} if self._dense is None else {"matrix": self._dense}

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], arrays: Mapping[str, Float32] | None = None
    ) -> Rotation:
        """Make the rotation that :meth:`to_dict` and :meth:`to_arrays` describe.

        Parameters
        ----------
        fields : mapping
            From :meth:`to_dict`.
        arrays : mapping, default=None
            From :meth:`to_arrays`; needed only if R is dense. Not copied.

        Returns
        -------
        Rotation
            Bit-identical to the one described.

        Raises
        ------
        ValueError
            If a field or array is missing or does not fit the others.

        Examples
        --------
        >>> Rotation.from_dict(Rotation(24, seed=5).to_dict())
        Rotation(24, 'hadamard', seed=5, stream=0)
        """
        try:
            kind, orders = fields["kind"], tuple(fields["orders"])
            n, seed, stream = (fields[name] for name in ("n", "seed", "stream"))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"fields are {reprlib.repr(fields)}, expected kind, n, seed, stream, orders"
            ) from error
        named = [("n", n), ("seed", seed), ("stream", stream), *(("orders", c) for c in orders)]
        for name, value in named:
            if type(value) is not int or value >= 2**63:
                found = f"{name} of a rotation: found {reprlib.repr(value)}"
                raise ValueError(f"{found}, expected an integer below 2^63")
        if kind not in KINDS:
            raise ValueError(f"kind is {reprlib.repr(kind)}, expected one of {', '.join(KINDS)}")
        if n < 1 or min(orders, default=1) < 1 or max(orders, default=1) > n:
            raise ValueError(f"orders are {reprlib.repr(orders)}, expected divisors of n = {n}")
        rotation = cls.__new__(cls)
        if kind == "hadamard":
            rotation._start(n, kind, seed, stream, orders=orders)
            return rotation
        matrix = (arrays or {}).get("matrix")
        if matrix is None or matrix.shape != (n, n):
            found = "missing" if matrix is None else f"of shape {matrix.shape}"
            raise ValueError(f"array 'matrix' of a rotation is {found}, expected ({n}, {n})")
        rotation._start(n, kind, seed, stream, matrix=matrix)
        return rotation


def hadamard(x: ArrayLike) -> Float32:
    """Return H x for every vector along the last axis of `x`, H orthogonal and without signs.

    H is Sylvester's matrix divided by ``sqrt(n)`` if n is a power of two, and otherwise the
    Kronecker product of that and of one matrix of each order in `hadamard_orders`. `Rotation` first
    flips random signs.

    Parameters
    ----------
    x : array_like of shape (..., n)
        Left unchanged.

    Returns
    -------
    ndarray of shape (..., n), float32
        A new array of the same norms.

    Raises
    ------
    TypeError
        If `x` is not real numbers.
    ValueError
        If `x` has no axis, or n has a prime factor for which there is no matrix.

    Examples
    --------
    >>> hadamard([[3, 1, 0, 0], [1, 1, 1, 1]])
    array([[2., 1., 2., 1.],
           [2., 0., 0., 0.]], dtype=float32)
    """
    found = np.array(float32(x, "x"))
    if found.ndim == 0 or found.size == 0:
        raise ValueError(f"x has shape {found.shape}, expected (..., n), not empty")
    n = found.shape[-1]
    orders = hadamard_orders(n)
    diagonal = np.full(n, 1 / np.sqrt(n), np.float32)
    handle = _core.hadamard_rotation(np.array(orders, np.int64), _bases(orders), diagonal)
    _core.rotate(handle, found.reshape(-1, n))
    return found


def hadamard_orders(n: int) -> tuple[int, ...]:
    """Return the orders c_j of the base matrices in n = c_1 ... c_m 2^k.

    These give the cheapest transform built from Hadamard matrices only, or, if there is none, the
    one with the smallest other matrix.

    Parameters
    ----------
    n : int
        1 or more.

    Returns
    -------
    tuple of int
        Empty for a power of two.

    Raises
    ------
    ValueError
        If n < 1, or an order would exceed 4096.

    Examples
    --------
    >>> [hadamard_orders(n) for n in (4096, 576, 8960, 11008, 13696)]
    [(), (36,), (28, 20), (344,), (107,)]
    """
    orders = np.zeros(8, np.int64)
    _core.hadamard_orders(orders, n=n)
    return tuple(orders[orders > 0].tolist())


@cache
def _bases(orders: tuple[int, ...]) -> Float32:
    """Return each base matrix and its transpose, in one array that rotations share."""
    bases = np.empty(2 * sum(c * c for c in orders), np.float32)
    at = 0
    for c in orders:
        pair = bases[at : at + 2 * c * c].reshape(2, c, c)
        _core.hadamard_base(pair[0])
        pair[1] = pair[0].T
        at += pair.size
    return bases
