"""How well a rotation prepares inputs for rounding: outliers that it leaves, errors of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.linears import Activation
from lowbitq.rotations import Rotation

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# A token is massive if its largest magnitude exceeds its median one by this factor; the inputs of
# ordinary tokens of SmolLM2 reach 10 to 50. Activations "100 to 1000 times the normal ones" are
# massive in M. Sun et al., "Massive Activations in Large Language Models", 2024.
MASSIVE_TOKEN = 100.0
_GROUPS = (16, 32, 64, 128, None)


def check_inputs(inputs: Float32, name: str = "inputs") -> None:
    """Raise TypeError or ValueError unless `inputs` is a finite matrix (tokens, n) of float32."""
    if not isinstance(inputs, np.ndarray) or inputs.dtype != np.float32:
        raise TypeError(f"{name} is not an ndarray of float32")
    if inputs.ndim != 2 or not inputs.size:
        raise ValueError(f"{name} has shape {inputs.shape}, expected (tokens, n)")
    if not np.isfinite(inputs).all():
        raise ValueError(f"{name} has a NaN or an infinity")
    if not inputs.any():
        raise ValueError(f"{name} has only zeros")


def massive_tokens(inputs: Float32, ratio: float = MASSIVE_TOKEN) -> NDArray[np.bool_]:
    """Say which tokens have a magnitude above `ratio` times the median one of the same token.

    Parameters
    ----------
    inputs : ndarray of shape (tokens, n), float32
    ratio : float, default=100

    Returns
    -------
    ndarray of shape (tokens,), bool

    Examples
    --------
    >>> massive_tokens(np.float32([[1, -2, 3], [1, -500, 2]]))
    array([False,  True])
    """
    check_inputs(inputs)
    magnitude = abs(inputs)
    return np.asarray(magnitude.max(1) > ratio * np.median(magnitude, axis=1))


def round_inputs(inputs: Float32, activation: Activation, group: int | None = 64) -> Float32:
    """Return inputs as a copy with this activation quantizer sees them.

    Parameters
    ----------
    inputs : ndarray of shape (tokens, n), float32, C-contiguous
        After the rotation of the copy.
    activation : Activation
        With ``bits=None`` nothing is rounded.
    group : {16, 32, 64, 128, None}, default=64
        Columns that share a scale. None: 128, as for formats without groups.

    Returns
    -------
    ndarray of shape (tokens, n), float32

    Raises
    ------
    ValueError
        If `group` is another number.

    Examples
    --------
    >>> round_inputs(np.float32([[7, 3.2, -0.4]]), Activation(4))
    array([[7., 3., 0.]], dtype=float32)
    """
    if activation.bits is None:
        return inputs.copy()
    if group not in _GROUPS:
        raise ValueError(f"group is {group}, expected 16, 32, 64, 128 or None")
    zero = np.nan if isinstance(activation.zero, str) else activation.zero
    values = np.array([activation.clip, activation.scale or 0, zero], np.float32)
    rounded = np.empty_like(inputs)
    _core.round_inputs(inputs, values, rounded, bits=activation.bits, step=group or 128)
    return rounded


def squares(rows: Float32) -> Float64:
    """Return the squared length of each row (tokens, n)."""
    return np.asarray(np.einsum("tk,tk->t", rows, rows, dtype=np.float64))


def token_errors(
    inputs: Float32,
    rotation: Rotation | None = None,
    *,
    activation: Activation | None = None,
    group: int | None = 64,
) -> Float64:
    """Squared error of each token after rotation and rounding, over the mean squared length.

    Its mean is the relative error of the inputs.

    Parameters
    ----------
    inputs : ndarray of shape (tokens, n), float32
    rotation : Rotation of order n, or None, default=None
        None: the identity.
    activation : Activation, default=None
        None: 4 bits, a scale for each token and group.
    group : {16, 32, 64, 128, None}, default=64
        Columns that share a scale, as for `round_inputs`.

    Returns
    -------
    ndarray of shape (tokens,), float64

    Raises
    ------
    TypeError
        If `inputs` is not float32.
    ValueError
        If shapes do not fit, a number is not finite, or all are 0.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((9, 64), np.float32)
    >>> x[:, 7] *= 30
    >>> bool(token_errors(x, Rotation(64)).mean() < 0.5 * token_errors(x).mean())
    True
    """
    check_inputs(inputs)
    turned = inputs if rotation is None else rotation.apply(inputs)
    turned = np.ascontiguousarray(turned)
    rounded = round_inputs(turned, activation or Activation(4), group)
    return np.asarray(squares(rounded - turned) / squares(inputs).mean(), np.float64)


def weighted_quantile(values: Float64, weights: Float64, share: float) -> float:
    """Return the smallest value below or at which lies this share of the weights.

    Examples
    --------
    >>> weighted_quantile(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0]), 0.75)
    2.0
    """
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    place = np.searchsorted(total, share * total[-1] * (1 - 1e-12))
    return float(values[order[min(place, len(order) - 1)]])


@dataclass(frozen=True)
class RotationScore:
    """Scores of a rotation by which rotations are compared; smaller is better.

    Attributes
    ----------
    peak : float
        Mean over tokens of the largest magnitude over the root mean square: 1 to sqrt(n); about 3.2
        for 576 normal numbers.
    largest_peak : float
        Maximum over tokens of the same.
    kurtosis : float
        Mean over tokens of the fourth moment over the squared second: 3 for normal numbers.
    error : float
        Relative squared error of the rounded inputs, the mean of `token_errors`.
    p90, p99, largest_error : float
        Quantiles and maximum of `token_errors`.
    massive : int
        Number of massive tokens, as found before rotation; see `massive_tokens`.
    massive_share : float
        Share of the summed squared error that lies in them.
    """

    peak: float
    largest_peak: float
    kurtosis: float
    error: float
    p90: float
    p99: float
    largest_error: float
    massive: int
    massive_share: float


def score_rotation(
    inputs: Float32,
    rotation: Rotation | None = None,
    *,
    activation: Activation | None = None,
    group: int | None = 64,
    massive_ratio: float = MASSIVE_TOKEN,
) -> RotationScore:
    """Measure what a rotation does to inputs.

    Parameters
    ----------
    inputs, rotation, activation, group
        As for `token_errors`.
    massive_ratio : float, default=100
        As for `massive_tokens`.

    Returns
    -------
    RotationScore

    Raises
    ------
    TypeError, ValueError
        As for `token_errors`.

    References
    ----------
    J. Xiang, S. Zhang, "DFRot: Achieving Outlier-Free and Massive Activation-Free for Rotated LLMs
    with Refined Rotation", 2024: rotations differ most in massive tokens.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((32, 512), np.float32)
    >>> x[:, 7] *= 30
    >>> score_rotation(x).peak > 10 > 6 > score_rotation(x, Rotation(512)).largest_peak
    True
    """
    errors = token_errors(inputs, rotation, activation=activation, group=group)
    turned = inputs if rotation is None else rotation.apply(inputs)
    lengths = squares(turned)
    some = turned[lengths > 0]
    second = lengths[lengths > 0] / turned.shape[1]
    peaks = abs(some).max(1) / np.sqrt(second)
    fourth = squares(some * some) / turned.shape[1]
    massive = massive_tokens(inputs, massive_ratio)
    total = float(errors.sum())
    equal = np.ones(len(errors))
    return RotationScore(
        peak=float(peaks.mean()),
        largest_peak=float(peaks.max()),
        kurtosis=float((fourth / second**2).mean()),
        error=float(errors.mean()),
        p90=weighted_quantile(errors, equal, 0.9),
        p99=weighted_quantile(errors, equal, 0.99),
        largest_error=float(errors.max()),
        massive=int(massive.sum()),
        massive_share=float(errors[massive].sum()) / total if total else 0.0,
    )
