"""Rotations of a student's inputs: dense orthogonal matrices that are trained.

The optimizer moves all entries of R; its gradient has only directions that keep R orthogonal to
first order, and the nearest orthogonal matrix takes the place of what a step has made. Both follow
P.-A. Absil, R. Mahony, R. Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, examples
3.6.2 (tangent space) and 4.1.3 (retraction by the polar factor). Z. Liu et al., "SpinQuant: LLM
quantization with learned rotations", 2024, trains rotations of a quantized network.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.gptq import product
from lowbitq.parameters import Parameter
from lowbitq.rotations import Rotation

Array = NDArray[np.float32]
Float64 = NDArray[np.float64]

# Entries of R^T R - I that are left alone: float32 cannot do better for the largest entries.
_TOLERANCE = 2.5e-7
_MOST_STEPS = 50  # Newton-Schulz takes 5 from a norm of 1.7


class StudentRotation:
    """A dense rotation as training sees it; copies that rotate one input alike share it.

    Parameters
    ----------
    name : str
        Of the first copy.
    rotation : Rotation
        Of a kind with a dense matrix.

    Attributes
    ----------
    parameter : Parameter
        R, which a network reads in place; `compose` makes it orthogonal again.
    gradient : ndarray of shape (n, n), float32
        Where a pass adds dL/dR.
    handle : capsule
        For `_core`.
    """

    def __init__(self, name: str, rotation: Rotation) -> None:
        self.rotation = rotation
        self.parameter = Parameter(f"{name}.rotation", "rotation", rotation.matrix())
        self.gradient = np.zeros_like(self.parameter.value)
        self.handle = _core.dense_rotation(self.parameter.value)

    def compose(self) -> None:
        """Replace the matrix by the nearest orthogonal one, unless it is that."""
        if self.parameter.changed:
            self.parameter.value[:] = nearest_orthogonal(self.parameter.value.astype(np.float64))

    def pull(self) -> None:
        """Add the tangent part of the gradient, ``(G - R G^T R) / 2``, to that of the parameter."""
        if not self.gradient.any():  # another copy has pulled
            return
        R, G = (x.astype(np.float64) for x in (self.parameter.value, self.gradient))
        back = product(product(R, G), np.ascontiguousarray(R.T))
        self.parameter.gradient += (G - back) / 2
        self.gradient[:] = 0

    def finish(self) -> Rotation:
        """Return the rotation as it is now; unchanged, the one that was given."""
        return (
            Rotation.from_matrix(self.parameter.value) if self.parameter.changed else self.rotation
        )


def nearest_orthogonal(matrix: Float64) -> Float64:
    """Return the polar factor of a matrix of full rank, by Newton-Schulz steps X (3 I - X^T X) / 2.

    Parameters
    ----------
    matrix : ndarray of shape (n, n), float64
        An orthogonal one, to 2.5e-7 in each entry of X^T X, is returned as it is.

    Raises
    ------
    NumericalError
        If the steps do not converge: `matrix` is singular, or not finite.

    References
    ----------
    N. J. Higham, "Functions of Matrices: Theory and Computation", 2008, equation 8.20.

    Examples
    --------
    >>> nearest_orthogonal(np.array([[0.0, 2.0], [-2.0, 0.0]])).round(6)
    array([[ 0.,  1.],
           [-1.,  0.]])
    """
    X, eye = matrix, np.eye(len(matrix))
    for _ in range(_MOST_STEPS):
        columns = np.ascontiguousarray(X.T)
        gram = product(columns, columns)
        if abs(gram - eye).max() <= (_TOLERANCE if X is matrix else 1e-12):
            return X
        if not np.isfinite(gram).all():
            break
        # The largest singular value must be below sqrt(3); the norm of rows bounds its square.
        size = max(1.0, abs(gram).sum(1).max() / 2.9)
        X = product(X, 1.5 * eye - gram / (2 * size)) / np.sqrt(size)
    raise _core.NumericalError(
        "a rotation that is trained has become singular or not finite; lower its learning rate"
    )
