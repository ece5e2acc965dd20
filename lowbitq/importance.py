"""importance(): one score of weights at three levels: elements, input channels, whole layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq.arrays import float32

LEVELS = ("element", "channel", "layer")


def importance(weight: ArrayLike, by: ArrayLike, *, level: str = "element") -> NDArray[np.float64]:
    """Score weights by their size times what they meet.

    ==============================================  =======================  ================
    `by`                                            what `level` "element"   the name of it
    ==============================================  =======================  ================
    gradient of the loss (rows, cols)               abs(w) abs(g)            first order, LLM-Pruner
    norm of each input channel, ``||x_k||`` (cols)  ``abs(w) ||x_k||``       Wanda
    sum of each channel's sizes, ``sum |x_k|``      ``abs(w) sum |x_k|``     activation weighted
    ==============================================  =======================  ================

    Parameters
    ----------
    weight : array_like of shape (rows, cols)
    by : array_like of shape (rows, cols) or (cols,)
        Only its magnitude counts.
    level : {"element", "channel", "layer"}, default="element"
        ``"channel"``: the sum over the rows, so that with ``sum |x_k|`` it is
        ``sum_r |w_rk| sum_t |x_tk|``. ``"layer"``: the sum over all.

    Returns
    -------
    ndarray of shape (rows, cols), (cols,) or (), float64

    Raises
    ------
    TypeError
        If arguments are not real numbers.
    ValueError
        If shapes do not fit or `level` is unknown.

    References
    ----------
    M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
    equation 1 (Wanda). X. Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language
    Models", 2023, equation 4 at first order.

    Examples
    --------
    >>> w, x = np.float32([[1, -2], [3, 0]]), np.float32([[1, 2], [0, -4]])
    >>> importance(w, abs(x).sum(0), level="channel")
    array([ 4., 12.])
    >>> float(importance(w, np.linalg.norm(x, axis=0), level="layer").round(3))
    12.944
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, expected one of {', '.join(map(repr, LEVELS))}")
    weight, by = float32(weight, "weight"), float32(by, "by")
    if weight.ndim != 2 or by.shape not in (weight.shape, weight.shape[1:]):
        raise ValueError(
            f"weight has shape {weight.shape} and by {by.shape}, expected (rows, cols) and "
            "(rows, cols) or (cols,)"
        )
    found = np.abs(weight, dtype=np.float64) * np.abs(by, dtype=np.float64)
    if level == "element":
        return found
    return np.asarray(found.sum(0) if level == "channel" else found.sum())
