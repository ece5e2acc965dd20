"""Rounding single matrices, without a model: for arrays of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core
from lowbitq.arrays import float32, float64
from lowbitq.copies import LayerInputs
from lowbitq.encoding import encode
from lowbitq.formats import Format
from lowbitq.linears import Linear
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan
from lowbitq.tensors import QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowbitq.plan_options import RoundingOptions

# Largest relative difference of a Hessian from its transpose: a float32 product's rounding.
_SYMMETRIC = 1e-5


def hessian(inputs: ArrayLike) -> NDArray[np.float64]:
    """Return the Hessian of a layer's squared output error, ``sum_t x_t x_t^T``.

    Parameters
    ----------
    inputs : array_like of shape (..., cols)
        Inputs of the layer; all axes but the last one count tokens.

    Returns
    -------
    ndarray of shape (cols, cols), float64
        Symmetric; without the factor 2.

    Raises
    ------
    TypeError
        If `inputs` are not real numbers.
    ValueError
        If `inputs` has fewer than two axes, or a NaN or an infinity.

    Examples
    --------
    >>> hessian([[1, 2], [3, 4]])
    array([[10., 14.],
           [14., 20.]])
    """
    rows = float32(inputs, "inputs")
    if rows.ndim < 2 or rows.size == 0:
        raise ValueError(f"inputs has shape {rows.shape}, expected (..., cols), not empty")
    if not np.isfinite(rows).all():
        raise ValueError("inputs has a NaN or an infinity")
    total = np.zeros((rows.shape[-1], rows.shape[-1]))
    _core.hessian_add(rows.reshape(-1, rows.shape[-1]), None, total)
    return np.asarray(np.triu(total) + np.triu(total, 1).T)


def gptq(
    weight: ArrayLike,
    hessian_or_inputs: ArrayLike,
    format: Format | str,
    **rounding: Unpack[RoundingOptions],
) -> QuantizedTensor:
    """Round a weight matrix so that the outputs of its layer change least.

    Parameters
    ----------
    weight : array_like of shape (rows, cols)
    hessian_or_inputs : array_like of shape (cols, cols) or (..., cols)
        A symmetric matrix is the Hessian, as `hessian` returns it, up to a factor. Anything else is
        inputs of the layer.
    format : Format or str
        For example ``"int3g64"``.
    **rounding
        Fields of `Rounding`: ``damping``, ``order``, ``sweeps``, ``range`` and others.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    TypeError
        If arguments are not real numbers, or an option is unknown.
    ValueError
        If shapes do not fit, a number is not finite or an option is out of range.
    NumericalError
        If no damping makes the Hessian positive definite.

    References
    ----------
    E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization
    for Generative Pre-trained Transformers", 2023.

    Examples
    --------
    >>> from lowbitq import quantize
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64))
    >>> w = rng.standard_normal((8, 64))
    >>> by_gptq, nearest = gptq(w, x, "int3g64"), quantize(w, "int3g64")
    >>> bool(np.linalg.norm(x @ (w - by_gptq).T) < 0.8 * np.linalg.norm(x @ (w - nearest).T))
    True
    """
    how = Rounding(**{"method": "gptq"} | rounding)
    if how.method != "gptq":
        raise ValueError(f"method is {how.method!r}, expected 'gptq'; quantize() rounds to nearest")
    matrix, other = float32(weight, "weight"), float64(hessian_or_inputs, "hessian_or_inputs")
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"weight has shape {matrix.shape}, expected (rows, cols), not empty")
    if other.ndim < 2 or other.shape[-1] != matrix.shape[1]:
        raise ValueError(
            f"hessian_or_inputs has shape {other.shape}, expected (..., {matrix.shape[1]})"
        )
    given = other if _is_symmetric(other) else hessian(other)
    plan = LayerPlan.parse(Format.parse(format), how)
    layer, _ = encode(Linear(matrix), LayerInputs(given), plan)
    return layer.tensor


def _is_symmetric(matrix: NDArray[np.float64]) -> bool:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        return False
    limit = _SYMMETRIC * np.abs(matrix).max(initial=0.0)
    return bool((np.abs(matrix - matrix.T) <= limit).all())


def kmeans(values: ArrayLike, count: int, weights: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return the levels that represent numbers with the least squared error.

    Parameters
    ----------
    values : array_like of any shape
    count : int
        Number of levels, at least 1.
    weights : array_like of the same shape, default=None
        Non-negative weights of the squared errors; None: ones.

    Returns
    -------
    ndarray of shape (count,), float64
        Ascending.

    Raises
    ------
    TypeError
        If arguments are not real numbers.
    ValueError
        If there are no values, a number is not finite, a weight is negative, or shapes differ.

    References
    ----------
    S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28, 1982.

    Examples
    --------
    >>> kmeans([0, 1, 10, 11, 12], 2)
    array([ 0.5, 11. ])
    """
    flat = float64(values, "values").reshape(-1)
    share = None if weights is None else float64(weights, "weights").reshape(-1)
    if flat.size == 0 or not np.isfinite(flat).all():
        raise ValueError("values is empty, or has a NaN or an infinity")
    if share is not None and share.shape != flat.shape:
        raise ValueError(f"weights has {share.size} numbers, values {flat.size}")
    if share is not None and not ((share >= 0) & np.isfinite(share)).all():
        raise ValueError("weights has a number that is negative or not finite")
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1")
    levels = np.empty(count)
    _core.kmeans(flat, share, levels)
    return levels
