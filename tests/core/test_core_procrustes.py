"""The nearest orthogonal matrix, against SciPy and the definition."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq import _core

scipy_linalg = pytest.importorskip("scipy.linalg")


def polar(matrix):
    """With guard rows around the results."""
    n = len(matrix)
    q, values = np.full((n + 2, n), np.nan), np.full(n + 2, np.nan)
    before = matrix.copy()
    _core.polar(matrix, q[1:-1], values[1:-1])
    assert np.isnan(q[[0, -1]]).all(), "wrote outside q"
    assert np.isnan(values[[0, -1]]).all(), "wrote outside values"
    assert np.array_equal(matrix, before)
    return q[1:-1], values[1:-1]


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 65, 200])
def test_it_is_the_polar_factor(n):
    matrix = np.random.default_rng(n).standard_normal((n, n))
    q, values = polar(matrix)
    # The factor moves by a backward error over the sum of the two smallest singular values.
    expected, singular = scipy_linalg.polar(matrix)[0], np.linalg.svd(matrix, compute_uv=False)
    bound = 20 * n * np.finfo(float).eps
    assert abs(q - expected).max() <= bound * singular[0] / singular[-2:].sum()
    assert abs(values - singular).max() <= bound * singular[0]
    assert abs(q @ q.T - np.eye(n)).max() <= bound
    assert np.isclose(np.trace(q.T @ matrix), values.sum(), rtol=bound)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_matrix_of_low_rank_has_an_orthogonal_factor_that_reaches_the_maximum(rank):
    rng = np.random.default_rng(rank)
    matrix = rng.standard_normal((9, rank)) @ rng.standard_normal((rank, 9))
    q, values = polar(matrix)
    assert abs(q @ q.T - np.eye(9)).max() <= 1e-13
    expected = np.linalg.svd(matrix, compute_uv=False).sum()
    assert np.isclose(np.trace(q.T @ matrix), expected, atol=1e-12)
    assert np.isclose(values.sum(), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_any_unit(scale):
    matrix = np.random.default_rng(1).standard_normal((12, 12))
    assert np.allclose(polar(scale * matrix)[0], polar(matrix)[0], atol=1e-12)


def test_refusals():
    matrix = np.eye(3)
    matrix[1, 2] = np.inf
    with pytest.raises(ValueError, match=r"matrix\[1, 2\] is inf, expected finite numbers"):
        polar(matrix)
    with pytest.raises(ValueError, match="axis"):
        _core.polar(np.eye(3), np.empty((2, 2)), np.empty(3))
    with pytest.raises(ValueError, match="size 0"):
        polar(np.empty((0, 0)))
