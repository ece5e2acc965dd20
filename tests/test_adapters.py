"""lowbitq.adapters: the best adapter is that of Eckart and Young."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq._core import NumericalError
from lowbitq.adapters import as_stored, low_rank

SHAPES = [(1, 5), (7, 33), (33, 7), (40, 40)]


def problem(rows, cols, inputs=None, seed=0):
    """An error and the Hessian of correlated inputs; fewer inputs than columns: a singular one."""
    rng = np.random.default_rng([rows, cols, seed])
    x = rng.standard_normal((inputs or 3 * cols, cols)) @ rng.standard_normal((cols, cols))
    return rng.standard_normal((rows, cols)), x.T @ x


def objective(error, hessian, U, V):
    rest = error - U @ V.T
    return np.sum((rest @ hessian) * rest)


def optimum(error, hessian, rank):
    """Sum of the squared singular values of E H^(1/2) that a matrix of this rank leaves."""
    size, vectors = np.linalg.eigh(hessian)
    root = (vectors * np.sqrt(np.maximum(size, 0))) @ vectors.T
    return np.sum(np.linalg.svd(error @ root, compute_uv=False)[rank:] ** 2)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("inputs", ["many", "few"])
def test_the_whitened_error_is_the_optimum(rows, cols, inputs):
    error, hessian = problem(rows, cols, None if inputs == "many" else max(cols // 3, 1))
    hessian += 1e-2 * np.median(hessian.diagonal()) * np.eye(cols)
    total = objective(error, hessian, np.zeros((rows, 1)), np.zeros((cols, 1)))
    for rank in sorted({1, 2, min(rows, cols) // 2 + 1, min(rows, cols)}):
        if rank > min(rows, cols):
            continue
        U, V = low_rank(error, hessian, rank)
        assert U.shape == (rows, rank)
        assert V.shape == (cols, rank)
        expected = optimum(error, hessian, rank)
        assert objective(error, hessian, U, V) == pytest.approx(
            expected, rel=1e-5, abs=1e-9 * total
        )


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_without_a_hessian_it_is_the_svd(rows, cols):
    error, _ = problem(rows, cols)
    U, V = low_rank(error, None, 1)
    left, size, right = np.linalg.svd(error)
    assert np.allclose(U @ V.T, size[0] * np.outer(left[:, 0], right[0]), atol=1e-9)


def test_columns_are_balanced_and_fall():
    error, hessian = problem(20, 30)
    U, V = low_rank(error, hessian, 5)
    norms = [np.linalg.norm(x, axis=0) for x in (U, V)]
    assert np.allclose(*norms)
    taken = [objective(error, hessian, U[:, :k], V[:, :k]) for k in range(6)]
    steps = -np.diff(taken)
    assert (steps[:-1] >= steps[1:]).all()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_an_error_of_low_rank_is_made_up_for(shape):
    rng = np.random.default_rng(0)
    error = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    U, V = low_rank(error, np.eye(shape[1]), 4)
    assert np.allclose(U @ V.T, error)
    U, V = low_rank(0 * error, np.eye(shape[1]), 4)
    assert not U.any()
    assert not V.any()


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_ranks_out_of_range_are_refused(rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}, expected 1 to 5 for 5 x 8"):
        low_rank(np.ones((5, 8)), None, rank)


def test_what_is_stored_are_halves():
    stored = as_stored(np.array([[1 + 2.0**-12, 1e6]]))
    assert stored.dtype == np.float32
    assert stored.tolist() == [[1, 65504]]


def test_a_singular_hessian_is_refused_only_where_it_matters():
    for shape in [(6, 9), (9, 6)]:
        error, hessian = problem(*shape, inputs=2)
        if shape[0] < shape[1]:
            U, V = low_rank(error, hessian, 2)
            assert objective(error, hessian, U, V) < 1e-9 * np.trace(hessian)
            continue
        with pytest.raises(NumericalError, match="metric is not positive definite; raise damping"):
            low_rank(error, hessian - 1e-9 * np.eye(6), 2)
