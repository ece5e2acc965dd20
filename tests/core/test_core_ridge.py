"""Sums of outer products, and ridge regression from them, against NumPy in float64."""

import numpy as np
import pytest

from lowbitq import NumericalError, _core


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 1, 1), (100, 7, 33), (5000, 70, 40)])
def test_moments_are_sums_of_outer_products(tokens, rows, cols, weighted):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((tokens, rows), dtype=np.float32)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    weights = rng.random(tokens, dtype=np.float32) if weighted else None
    start = rng.standard_normal((rows, cols))
    moment = start.copy()
    _core.moment_add(y, x, weights, moment)
    wide = y.astype(float) * (1.0 if weights is None else weights[:, None])
    expected = start + wide.T @ x.astype(float)
    assert np.abs(moment - expected).max() < 1e-6 * tokens**0.5 * 10


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 70), (200, 150)])
def test_a_ridge_regression_equals_numpys(rows, cols, scale):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2 * cols, cols))
    hessian, b = scale * (x.T @ x), scale * rng.standard_normal((rows, cols))
    ridge = scale * 0.3
    expected = b @ np.linalg.inv(hessian + ridge * np.eye(cols))
    hessian[np.tril_indices(cols, -1)] = np.nan  # is not read
    _core.ridge_solve(hessian, b, ridge=ridge)
    np.testing.assert_allclose(b, expected, atol=1e-9 * np.abs(expected).max())


def test_results_do_not_depend_on_threads(threads):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3000, 150), dtype=np.float32)
    y = rng.standard_normal((3000, 90), dtype=np.float32)
    found = []
    for count in (1, 3):
        _core.set_num_threads(threads=count)
        hessian, moment = np.zeros((150, 150)), np.zeros((90, 150))
        _core.hessian_add(x, None, hessian)
        _core.moment_add(y, x, None, moment)
        _core.ridge_solve(hessian, moment, ridge=1.0)
        found.append(moment)
    assert np.array_equal(*found)


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(NumericalError, match=r"the Hessian with 0.5 .* not positive definite"):
        _core.ridge_solve(np.diag([1.0, -1.0]), np.ones((1, 2)), ridge=0.5)
