"""Rotations fitted to inputs by the orthogonal Procrustes problem."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core
from lowbitq.linears import Activation
from lowbitq.rotation_scores import (
    MASSIVE_TOKEN,
    check_inputs,
    massive_tokens,
    round_inputs,
    squares,
    weighted_quantile,
)
from lowbitq.rotations import Rotation

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# How much a quantile's target emphasises tokens near and above it: e^4. With 16 the quantile of
# SmolLM2's inputs falls further on the tokens themselves, less on others.
_EMPHASIS = 4
# The pull towards the previous rotation, in root mean square singular values. The least one leaves
# directions that no token has as they were; after a step that raised the target it starts from
# _PULL and grows by _STRONGER.
_LEAST, _PULL, _STRONGER, _STRONGEST = 1e-9, 0.01, 4.0, 100.0


def procrustes(
    a: ArrayLike, b: ArrayLike, weights: ArrayLike | None = None
) -> tuple[Float64, float]:
    """Orthogonal matrix that takes the rows of one matrix nearest to those of another.

    R minimises ``sum_t weights[t] |a[t] R - b[t]|^2``: ``R = U V^T`` where ``U S V^T`` are the
    singular values of ``a^T diag(weights) b``.

    Parameters
    ----------
    a, b : array_like of shape (tokens, n)
    weights : array_like of shape (tokens,), default=None
        Not negative; None: ones.

    Returns
    -------
    R : ndarray of shape (n, n), float64
        ``Rotation.from_matrix(R.T)`` takes a[t] to a[t] R.
    scale : float
        Sum of the singular values, as `scipy.linalg.orthogonal_procrustes` returns it.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or a weight is negative.

    References
    ----------
    P. Schoenemann, "A generalized solution of the orthogonal Procrustes problem", 1966.

    Examples
    --------
    >>> a = np.random.default_rng(0).standard_normal((9, 3))
    >>> turn = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    >>> R, scale = procrustes(a, 2 * a @ turn)
    >>> bool(np.allclose(R, turn))
    True
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or not a.size or a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape}, b {b.shape}, expected (tokens, n) for both")
    if weights is not None:
        w = np.asarray(weights, np.float64)
        if w.shape != (len(a),) or not (w >= 0).all():
            raise ValueError(f"weights has shape {w.shape}, expected {len(a)} numbers >= 0")
        a = a * w[:, None]
    moment = np.empty((a.shape[1], a.shape[1]))
    _core.product(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), moment)
    return nearest(moment)


def nearest(moment: Float64) -> tuple[Float64, float]:
    """Return the orthogonal matrix nearest to a square one, and the sum of its singular values.

    Parameters
    ----------
    moment : ndarray of shape (n, n), float64
        Whose scale does not matter. Of lower rank, it has several nearest ones.

    Returns
    -------
    matrix : ndarray of shape (n, n), float64
    scale : float

    Raises
    ------
    ValueError
        If a number is not finite.

    Examples
    --------
    >>> nearest(np.array([[0.0, 2.0], [-3.0, 0.0]]))[1]
    5.0
    """
    matrix, values = np.empty_like(moment), np.empty(len(moment))
    _core.polar(moment, matrix, values)
    return matrix, float(values.sum())


@dataclass(frozen=True, eq=False)
class OptimizedRotation:
    """What `optimize_rotation` found.

    Attributes
    ----------
    rotation : Rotation
    history : tuple of float
        The target on the inputs, at the start and after each step; it never rises.
    held_out : tuple of float
        The same on the inputs held out, which may rise; empty if there are none.
    massive : int
        Number of massive tokens, whose weight was raised.
    """

    rotation: Rotation
    history: tuple[float, ...]
    held_out: tuple[float, ...]
    massive: int


def optimize_rotation(
    inputs: Float32,
    *,
    start: Rotation | str = "hadamard",
    seed: int = 0,
    activation: Activation | None = None,
    group: int | None = 64,
    target: str | float = "mean",
    rounds: int = 100,
    massive_weight: float = 100.0,
    massive_ratio: float = MASSIVE_TOKEN,
    held_out: Float32 | None = None,
) -> OptimizedRotation:
    """Fit a rotation to inputs, so that rounding changes the rotated inputs little.

    In turns the rotated inputs are rounded, ``b[t] = round(R x[t])``, and R becomes the orthogonal
    matrix that takes the inputs nearest to b, with massive tokens weighted up. Rounding to a scale
    that moves with the inputs is no projection, so a step may raise the target; it is then tried
    again with a pull towards the previous R, and the search ends if no pull helps.

    Parameters
    ----------
    inputs : ndarray of shape (tokens, n), float32
        Of one or several layers that will share R. A matrix of n columns has n (n - 1) / 2 degrees
        of freedom: with fewer than some 10 n tokens it learns them by heart, which `held_out`
        shows.
    start : Rotation or {"hadamard", "orthogonal"}, default="hadamard"
    seed : int, default=0
        Of the start, unless it is a Rotation.
    activation : Activation, default=None
        How inputs are rounded. None: to 4 bits.
    group : {16, 32, 64, 128, None}, default=64
        Columns that share a scale, as in the packed weights; None: 128.
    target : {"mean", "max"} or float, default="mean"
        What the steps make smaller: mean or maximum of `token_errors`, or one of their quantiles,
        such as 0.99.
    rounds : int, default=100
        Largest number of steps; each takes a singular value decomposition, 0.3 s for 576 columns.
    massive_weight : float, default=100
        Weight of massive tokens, others have 1; in a quantile a token counts by its weight.
    massive_ratio : float, default=100
        What makes a token massive: see `massive_tokens`.
    held_out : ndarray of shape (tokens, n), float32, default=None
        Inputs to choose by: the best rotation for them is returned, which may be the start. None:
        the last rotation is returned.

    Returns
    -------
    OptimizedRotation

    Raises
    ------
    TypeError
        If an array is not float32.
    ValueError
        If shapes do not fit, a number is not finite, an option is out of range, or `activation`
        does not round.

    References
    ----------
    J. Xiang, S. Zhang, "DFRot: Achieving Outlier-Free and Massive Activation-Free for Rotated LLMs
    with Refined Rotation", 2024, algorithm 1: Hadamard start, 100 rounds, weight 100. There a token
    is massive if its error without rotation is below a constant of the model.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((400, 16), np.float32)
    >>> found = optimize_rotation(x, rounds=5, group=None)
    >>> found.history[-1] < found.history[0]
    True
    """
    check_inputs(inputs)
    n = inputs.shape[1]
    if held_out is not None:
        check_inputs(held_out, "held_out")
        if held_out.shape[1] != n:
            raise ValueError(f"held_out has shape {held_out.shape}, expected (tokens, {n})")
    first = Rotation(n, start, seed) if isinstance(start, str) else start
    if first.n != n:
        raise ValueError(f"start has order {first.n}, expected {n}")
    how = activation or Activation(4)
    if how.bits is None:
        raise ValueError("activation has bits = None and rounds nothing, expected 8 or 4 bits")
    _check_target(target)
    for name, value in (("rounds", rounds), ("massive_weight", massive_weight)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}, expected at least 0")

    def see(rows: Float32) -> _Seen:
        rows = np.ascontiguousarray(rows)
        return _Seen(rows, how, group, target, massive_weight, massive_ratio)

    seen, others = see(inputs), None if held_out is None else see(held_out)
    state = start_state = best = seen.at(first.matrix())
    history, beside = [state.value], [] if others is None else [others.at(state.matrix).value]
    pull = _LEAST
    for _ in range(rounds):
        moment, found = seen.moment(state), None
        size = np.sqrt(np.square(moment).sum() / n)
        while found is None and pull <= _STRONGEST:
            found = seen.at(nearest(moment + pull * size * state.matrix)[0])
            if not found.value < state.value:
                found, pull = None, max(pull * _STRONGER, _PULL)
        if found is None:
            break
        state, pull = found, (pull / 2 if pull > _PULL else _LEAST)
        history.append(state.value)
        if others is not None:
            beside.append(others.at(state.matrix).value)
        if others is None or beside[-1] == min(beside):
            best = state
    rotation = first
    if best is not start_state:
        rotation = Rotation.from_matrix(best.matrix.astype(np.float32))
    return OptimizedRotation(rotation, tuple(history), tuple(beside), seen.massive)


def _check_target(target: str | float) -> None:
    known = target in ("mean", "max") if isinstance(target, str) else 0 < target < 1
    if not known:
        raise ValueError(f"target is {target!r}, expected 'mean', 'max' or a quantile in (0, 1)")


@dataclass(frozen=True, eq=False)
class _State:
    """A rotation, the rounded inputs, the error of each token, and the target."""

    matrix: Float64
    rounded: Float32 = field(repr=False)
    errors: Float64 = field(repr=False)
    value: float = 0.0


class _Seen:
    """Inputs, and what rotations make of them."""

    def __init__(
        self,
        inputs: Float32,
        activation: Activation,
        group: int | None,
        target: str | float,
        massive_weight: float,
        massive_ratio: float,
    ) -> None:
        self._inputs, self._activation, self._group = inputs, activation, group
        self._target, self._size = target, squares(inputs).mean()
        massive = massive_tokens(inputs, massive_ratio)
        self.massive = int(massive.sum())
        self._weights = np.where(massive, float(massive_weight), 1.0)
        if not self._weights.any():
            raise ValueError("all tokens are massive and have massive_weight = 0")

    def at(self, matrix: NDArray[np.floating]) -> _State:
        """Return what a rotation makes of the inputs."""
        turned = self._inputs.copy()
        _core.rotate(_core.dense_rotation(matrix.astype(np.float32)), turned)
        rounded = round_inputs(turned, self._activation, self._group)
        errors = squares(rounded - turned) / self._size
        return _State(matrix.astype(np.float64), rounded, errors, self._value(errors))

    def _value(self, errors: Float64) -> float:
        if self._target == "mean":
            return float((self._weights * errors).sum() / self._weights.sum())
        if self._target == "max":
            return float(errors.max())
        return weighted_quantile(errors, self._weights, float(self._target))

    def moment(self, state: _State) -> Float64:
        """Return ``sum_t w_t b_t x_t^T``, whose polar factor is the next rotation."""
        weights = self._weights
        if self._target != "mean" and state.value > 0:
            weights = weights * np.minimum(1, state.errors / state.value) ** _EMPHASIS
        n = len(state.matrix)
        moment = np.zeros((n, n))
        _core.moment_add(state.rounded, self._inputs, weights.astype(np.float32), moment)
        return moment
