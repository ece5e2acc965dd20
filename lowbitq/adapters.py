"""Adapters: the low-rank matrices that make up best for the error of a quantized layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.gptq import product


def low_rank(
    error: NDArray[np.floating],
    hessian: NDArray[np.float64] | None,
    rank: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Approximate a matrix by ``U V^T`` so that the outputs change least.

    Minimises ``tr(D H D^T)``, D = E - U V^T. With any S such that H = S S^T, this is the squared
    Frobenius norm of D S, so the minimum is the truncated SVD of E S (Eckart and Young). If the
    columns of A are its first left singular vectors, U V^T S = A A^T E S, hence U V^T = A (A^T E):
    neither S nor its inverse is needed, only the eigenvectors A of E H E^T. If E has more rows than
    columns, an eigenvector x of the smaller E^T E H gives E H x of A.

    Parameters
    ----------
    error : ndarray of shape (rows, cols)
        E.
    hessian : ndarray of shape (cols, cols), float64, or None
        H, symmetric and positive definite. None: the identity.
    rank : int
        1 to ``min(rows, cols)``.

    Returns
    -------
    U, V : ndarray of shape (rows, rank) and (cols, rank), float64
        Columns by falling contribution. Those of the same index have equal norms, which uses the
        range of float16 best.

    Raises
    ------
    ValueError
        If `rank` is out of range, or a number is not finite.
    NumericalError
        If H is not positive definite, which only matters if there are more rows than columns.

    References
    ----------
    C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", Psychometrika
    1, 1936. C. Zhang et al., "QERA: an Analytical Framework for Quantization Error Reconstruction",
    2024, theorem 1 (its H^(1/2) is one S). R. Saha et al., "Compressing Large Language Models using
    Low Rank and Low Precision Decomposition" (CALDERA), 2024.

    Examples
    --------
    >>> error = np.diag([3.0, 2.0, 1.0])
    >>> U, V = low_rank(error, None, 1)
    >>> (U @ V.T).round(6).diagonal()
    array([3., 0., 0.])
    >>> U, V = low_rank(error, np.diag([1.0, 9.0, 1.0]), 1)
    >>> (U @ V.T).round(6).diagonal()
    array([0., 2., 0.])
    """
    rows, cols = error.shape
    if not 1 <= rank <= min(rows, cols):
        raise ValueError(f"rank is {rank}, expected 1 to {min(rows, cols)} for {rows} x {cols}")
    E = np.ascontiguousarray(error, np.float64)
    ET = np.ascontiguousarray(E.T)
    EH = E if hessian is None else product(E, hessian)
    if rows <= cols:
        A = _leading(product(EH, E), None, rank).T
    else:
        A = product(EH, _leading(product(ET, ET), hessian, rank))
        size = np.linalg.norm(A, axis=0)
        A /= np.where(size > size.max(initial=0) * cols * np.finfo(float).eps, size, np.inf)
    V = product(ET, np.ascontiguousarray(A.T))
    size = np.linalg.norm(V, axis=0)
    return A * np.sqrt(size), V / np.sqrt(np.where(size > 0, size, 1))


def _leading(
    matrix: NDArray[np.float64], metric: NDArray[np.float64] | None, rank: int
) -> NDArray[np.float64]:
    """Return the eigenvectors (rank, n) of `matrix`, or of `matrix` times `metric`, largest first.

    By _core: NumPy's eigh finds all of them, and its threads wait for each other hundreds of times,
    which on a busy machine of two cores took 6.7 s instead of 0.09 s for 576 columns.
    """
    vectors = np.empty((rank, len(matrix)))
    metric = None if metric is None else metric.copy()
    _core.leading_eigenvectors(matrix, metric, np.empty(rank), vectors)
    return np.ascontiguousarray(vectors[::-1])


def as_stored(x: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the nearest float16 numbers, as float32 and C-contiguous."""
    limit = np.finfo(np.float16).max
    return np.ascontiguousarray(np.clip(x, -limit, limit).astype(np.float16).astype(np.float32))
