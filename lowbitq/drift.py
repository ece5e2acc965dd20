"""Drift: weights that make up for what the quantized layers before have changed.

A layer y = W x of the float model runs as W x^ behind quantized layers. What it lacks there,

    e_t = y_t - W x^_t,

is in part a linear function of x^, which the weights can take over:

    W' = W + alpha E^T D X^ (X^^T D X^ + ridge I)^-1,        D = diag(d), weights of the tokens.

For o and down, y is not what the float layer gives but what the residual stream lacks, so each of
them repays the errors of all layers before. This is a regression, and with few tokens it fits their
noise as well: alpha and ridge are chosen on windows that are held back from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.gptq import product, symmetric
from lowbitq.rotations import Rotation

Array = NDArray[np.float32]
Wide = NDArray[np.float64]

RIDGES = (10.0, 100.0, 1000.0)  # in hundredths of the typical eigenvalue of X^^T D X^
LEAST_RIDGE = 1e-5  # in mean eigenvalues


@dataclass(eq=False)
class Moments:
    """Sums over tokens of a layer's inputs x^ and of targets z.

    Parameters
    ----------
    cols, rows : int
        Numbers of inputs and of targets.

    Attributes
    ----------
    hessian : ndarray of shape (cols, cols), float64
        ``sum d x^ x^^T``, upper triangle.
    cross : ndarray of shape (rows, cols), float64
        ``sum d z x^^T``.
    sizes : list of ndarray
        ``d |x^|^2`` of the tokens.
    """

    cols: int
    rows: int
    hessian: Wide = field(init=False)
    cross: Wide = field(init=False)
    sizes: list[NDArray[np.floating]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hessian = np.zeros((self.cols, self.cols))
        self.cross = np.zeros((self.rows, self.cols))

    def add(self, x: Array, target: Array, weights: Array | None) -> None:
        """Add tokens: x (t, cols), target (t, rows), weights (t) or None for ones."""
        _core.hessian_add(x, weights, self.hessian)
        _core.moment_add(target, x, weights, self.cross)
        size = np.einsum("tk,tk->t", x, x)
        self.sizes.append(size if weights is None else size * weights)

    def rotated(self, rotation: Rotation, *, of_inputs: bool) -> Moments:
        """Return the sums for inputs R x^, and for targets R z if these are inputs.

        In float64: a massive activation, which has one channel before it is rotated and all of them
        afterwards, would leave rounding noise as large as the typical eigenvalue.
        """
        R = rotation.matrix().astype(np.float64)
        turned = Moments(self.cols, self.rows, sizes=self.sizes)
        turned.hessian = product(R, product(R, self._full()))
        turned.cross = product(self.cross, R)
        if of_inputs:
            turned.cross = product(R, np.ascontiguousarray(turned.cross.T))
        return turned

    def _full(self) -> Wide:
        return symmetric(self.hessian)

    def plus(self, other: Moments) -> Moments:
        """Return the sums over the tokens of both."""
        both = Moments(self.cols, self.rows, sizes=self.sizes + other.sizes)
        both.hessian = self.hessian + other.hessian
        both.cross = self.cross + other.cross
        return both

    def ridge(self, times: float) -> float:
        """Return what is added to the diagonal: `times` a hundredth of the typical eigenvalue.

        By the median over tokens, which does not see the massive one that the mean of the diagonal
        consists of; but no less than float32 sums need.
        """
        sizes = np.concatenate(self.sizes)
        typical = len(sizes) * float(np.median(sizes)) / self.cols
        least = LEAST_RIDGE * float(np.diagonal(self.hessian).mean())
        return max(times * 0.01 * typical, least)

    def lack(self, weight: Array, *, of_inputs: bool) -> Wide:
        """Return ``sum d e x^^T``, e what the layer lacks.

        Parameters
        ----------
        weight : ndarray of shape (m, cols)
        of_inputs : bool
            True: the targets are x - x^, the layer lacks W (x - x^). False: they are y, it lacks
            y - W x^.
        """
        wide = np.ascontiguousarray(weight, np.float64)
        if of_inputs:
            return product(wide, np.ascontiguousarray(self.cross.T))
        return self.cross - product(wide, self._full())


@dataclass(frozen=True)
class Correction:
    """What `correct` chose: W' = W + alpha times the regression with this ridge.

    Attributes
    ----------
    alpha : float
        0 to 1.
    ridge : float
        One of `RIDGES`.
    gain : float
        Share of the squared lack on the held-back windows that goes, before rounding.
    """

    alpha: float
    ridge: float
    gain: float


def correct(
    weight: Array, train: Moments, held: Moments, *, of_inputs: bool
) -> tuple[Array, Correction]:
    """Correct the weights of a layer for the drift of its inputs.

    For each ridge the best alpha is ``tr(dW B^T) / tr(dW H dW^T)``, B and H of the held-back
    windows, clipped to 0 and 1. With the best pair, the regression is then done on all windows.

    Parameters
    ----------
    weight : ndarray of shape (m, cols), float32
        Left unchanged.
    train, held : Moments
        Of the windows for the regression and of those held back.
    of_inputs : bool
        What their targets are, see `Moments.lack`.

    Returns
    -------
    weight : ndarray of shape (m, cols), float32
    found : Correction

    Raises
    ------
    NumericalError
        If the Hessian is not positive definite.

    References
    ----------
    Y. Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025.
    S. Zhang et al., "Qronos: Correcting the Past by Shaping the Future... in Post-Training
    Quantization", 2025 (alpha = 1, without a ridge; the target is the float layer's output).
    """
    lack, test = (m.lack(weight, of_inputs=of_inputs) for m in (train, held))
    best, found = 0.0, Correction(0.0, RIDGES[0], 0.0)
    for ridge in RIDGES:
        step = lack.copy()
        _core.ridge_solve(train.hessian, step, ridge=train.ridge(ridge))
        gained = float((step * test).sum())
        spread = _core.hessian_error(held.hessian, step.astype(np.float32))
        alpha = min(max(gained / spread, 0.0), 1.0) if spread > 0 else 0.0
        gain = alpha * (2 * gained - alpha * spread)
        if gain > best:
            best, found = gain, Correction(alpha, ridge, gain)
    if found.alpha == 0:
        return weight, found
    both = train.plus(held)
    step = lack + test
    _core.ridge_solve(both.hessian, step, ridge=both.ridge(found.ridge))
    return (weight + found.alpha * step).astype(np.float32), found
