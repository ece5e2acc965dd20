"""Rank correlations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def ranks(values: ArrayLike) -> Float64:
    """Return the rank of each value, 1 for the smallest; equal values share their mean rank.

    Parameters
    ----------
    values : array_like of shape (n,)

    Returns
    -------
    ndarray of shape (n,), float64

    Raises
    ------
    ValueError
        If `values` is not one row of finite numbers.

    Examples
    --------
    >>> ranks([3, 1, 1, 2])
    array([4. , 1.5, 1.5, 3. ])
    """
    _, inverse, counts = np.unique(_row(values), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], np.float64)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation: Pearson's correlation of the ranks.

    Parameters
    ----------
    x, y : array_like of shape (n,)

    Returns
    -------
    float
        -1 to 1. NaN if all values of `x` or all of `y` are equal.

    Raises
    ------
    ValueError
        If a number is not finite, or the lengths differ.

    References
    ----------
    C. Spearman, "The proof and measurement of association between two things", American Journal
    of Psychology 15, 1904.

    Examples
    --------
    >>> round(spearman([1, 2, 3, 4], [1, 3, 2, 40]), 6)
    0.8
    """
    _check_lengths(x, y)
    a, b = (one - one.mean() for one in (ranks(x), ranks(y)))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else math.nan


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Return Kendall's tau-b: how many more pairs have the same order in both than the opposite.

    Parameters
    ----------
    x, y : array_like of shape (n,)
        It takes n^2 bytes.

    Returns
    -------
    float
        -1 to 1; pairs that are equal in `x` or in `y` are allowed for. NaN if all values of one are
        equal.

    Raises
    ------
    ValueError
        If a number is not finite, or the lengths differ.

    References
    ----------
    M. G. Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945.

    Examples
    --------
    >>> round(kendall([1, 2, 3, 4], [1, 3, 2, 40]), 6)
    0.666667
    """
    _check_lengths(x, y)
    a, b = ((row[:, None] > row).view(np.int8) for row in (ranks(x), ranks(y)))
    a, b = a - a.T, b - b.T
    # Sums of products of signs: exact as integers, each pair counted twice.
    norm = math.sqrt(np.count_nonzero(a) * np.count_nonzero(b))
    return int(np.sum(a * b, dtype=np.int64)) / norm if norm else math.nan


def _row(values: ArrayLike) -> Float64:
    row = np.asarray(values, np.float64)
    if row.ndim != 1 or not np.isfinite(row).all():
        raise ValueError(f"values {values!r} are not one row of finite numbers")
    return row


def _check_lengths(x: ArrayLike, y: ArrayLike) -> None:
    a, b = _row(x), _row(y)
    if len(a) != len(b):
        raise ValueError(f"x has {len(a)} values and y {len(b)}, expected as many")
