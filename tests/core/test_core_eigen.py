"""Leading eigenvectors of a symmetric matrix, or of a product of two."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq import NumericalError, _core

SIZES = [(1, 1), (2, 1), (5, 5), (33, 4), (192, 16), (300, 300)]


def symmetric(n, seed):
    a = np.random.default_rng([n, seed]).standard_normal((n, 2 * n))
    return a @ a.T


def upper_only(matrix):
    """With NaN below the diagonal, where nothing may be read."""
    return np.where(np.tri(len(matrix), k=-1, dtype=bool), np.nan, matrix)


def leading(matrix, metric, count):
    values, vectors = np.full(count, np.nan), np.full((count, len(matrix)), np.nan)
    copies = [None if x is None else upper_only(x) for x in (matrix, metric)]
    _core.leading_eigenvectors(*copies, values, vectors)
    return values, vectors


@pytest.mark.parametrize(("n", "count"), SIZES)
@pytest.mark.parametrize("metric", [False, True])
def test_eigenvectors_are_those_of_the_definition(n, count, metric):
    a, b = symmetric(n, 0), symmetric(n, 1) if metric else np.eye(n)
    values, vectors = leading(a, b if metric else None, count)

    # Backward stable: errors of n epsilon in A and B, whose condition multiplies them.
    bound = 100 * n * np.finfo(float).eps * np.linalg.cond(b)
    root = np.linalg.cholesky(b)
    expected = np.linalg.eigvalsh(root.T @ a @ root)[-count:]
    assert np.allclose(values, expected, rtol=0, atol=bound * expected[-1])
    size = np.linalg.norm(a, 2) * np.linalg.norm(b, 2) * np.linalg.norm(vectors, axis=1).max()
    assert abs(a @ b @ vectors.T - vectors.T * values).max() <= bound * size
    assert abs(vectors @ b @ vectors.T - np.eye(count)).max() <= bound
    assert (np.diff(values) >= 0).all()


def test_equal_values_have_orthogonal_vectors():
    values, vectors = leading(np.diag([3.0, 7, 7, 7, 1]), None, 3)
    assert np.allclose(values, 7)
    assert np.allclose(vectors @ vectors.T, np.eye(3))
    assert not vectors[:, [0, 4]].any()
    values, vectors = leading(np.zeros((4, 4)), None, 4)
    assert not values.any()
    assert np.allclose(vectors @ vectors.T, np.eye(4))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_any_unit(scale):
    a = symmetric(6, 0)
    values, vectors = leading(scale * a, None, 2)
    plain, same = leading(a, None, 2)
    assert np.allclose(values / scale, plain)
    assert np.allclose(abs(vectors), abs(same))


def test_refusals():
    with pytest.raises(ValueError, match="count is 3, expected 1 to 2"):
        leading(np.eye(2), None, 3)
    with pytest.raises(NumericalError, match="metric is not positive definite; raise damping"):
        leading(np.eye(2), np.diag([1.0, -1.0]), 1)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"matrix\[0, 1\] is {bad}, expected finite numbers"):
            leading(np.array([[1, bad], [0, 1]]), None, 1)
        with pytest.raises(ValueError, match=rf"metric\[1, 1\] is {bad}, expected finite numbers"):
            leading(np.eye(2), np.diag([1, bad]), 1)


def test_results_do_not_depend_on_threads(threads):
    a, b = symmetric(200, 0), symmetric(200, 1)
    found = []
    for count in (1, 2):
        _core.set_num_threads(threads=count)
        found.append(leading(a, b, 9))
    for one, two in zip(*found, strict=True):
        assert np.array_equal(one, two)
