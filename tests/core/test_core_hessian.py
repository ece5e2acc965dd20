"""H += X^T diag(w) X, and the error that it measures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lowbitq import _core

SIZES = [(1, 1), (5, 3), (100, 191), (300, 193), (2049, 64), (4100, 40), (700, 576)]


@pytest.fixture
def one_and_two_threads():
    """Calls a function with one and with two threads and returns both results."""
    before = _core.config()["threads"]

    def both(function):
        results = []
        for threads in (1, 2):
            _core.set_num_threads(threads=threads)
            results.append(function())
        return results

    yield both
    _core.set_num_threads(threads=before)


def accumulate(x, weights=None):
    hessian = np.full((x.shape[1],) * 2, np.nan)
    hessian[np.triu_indices(len(hessian))] = 0
    _core.hessian_add(x, weights, hessian)
    return hessian


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "cols"), SIZES)
def test_hessian_matches_oracle(tokens, cols, weighted):
    rng = np.random.default_rng([tokens, cols])
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    weights = rng.uniform(0, 16, tokens).astype(np.float32) if weighted else None

    found = accumulate(x, weights)

    scaled = x.astype(np.float64)
    left = scaled if weights is None else scaled * weights[:, None]
    upper = np.triu_indices(cols)
    expected = (left.T @ scaled)[upper]
    magnitude = (abs(left).T @ abs(scaled))[upper]
    # A sum of at most 2048 products in float32, each factor rounded twice more by sqrt(w).
    bound = (min(tokens, 2048) + 5) * 2.0**-24 * magnitude
    assert (abs(found[upper] - expected) <= bound).all()
    assert np.isnan(found[np.tril_indices(cols, -1)]).all(), "wrote below the diagonal"


def test_hessian_adds_to_what_is_there():
    x = np.ones((3, 2), np.float32)
    hessian = np.full((2, 2), 10.0)
    _core.hessian_add(x, None, hessian)
    _core.hessian_add(x, np.array([0, 16, 1], np.float32), hessian)
    assert hessian.tolist() == [[30, 30], [10, 30]]


@pytest.mark.parametrize("weighted", [False, True])
def test_hessian_does_not_depend_on_threads(one_and_two_threads, weighted):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 400), dtype=np.float32)
    weights = rng.uniform(0, 16, len(x)).astype(np.float32) if weighted else None
    one, two = one_and_two_threads(lambda: accumulate(x, weights))
    assert np.array_equal(one, two, equal_nan=True)


def test_hessians_of_two_callers_at_once():
    """They share the pool and OpenBLAS, whose threads each call turns off and on again."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((3000, 300), dtype=np.float32) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(accumulate, inputs))
    for x, hessian in zip(inputs, together, strict=True):
        assert np.array_equal(accumulate(x), hessian, equal_nan=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_hessian_refuses_bad_inputs(bad):
    x = np.ones((4, 5), np.float32)
    x[2, 3] = bad
    with pytest.raises(ValueError, match=r"X has a NaN, an infinity .* in column 3"):
        accumulate(x)


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf])
def test_hessian_refuses_bad_weights(bad):
    weights = np.array([1, 1, bad], np.float32)
    with pytest.raises(ValueError, match=r"weights\[2\] is"):
        accumulate(np.ones((3, 2), np.float32), weights)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (63, 7), (65, 100), (200, 64), (30, 600)])
def test_error_matches_oracle(one_and_two_threads, rows, cols):
    rng = np.random.default_rng([rows, cols])
    x = rng.standard_normal((cols + 10, cols))
    hessian = x.T @ x
    upper = np.triu(hessian) + np.tril(np.full_like(hessian, np.nan), -1)
    error = rng.standard_normal((rows, cols), dtype=np.float32)

    one, two = one_and_two_threads(lambda: _core.hessian_error(upper, error))

    assert one == two
    outputs = error.astype(np.float64) @ x.T  # tr(E X^T X E^T) = |E X^T|^2, no cancellation
    terms = (abs(error).astype(np.float64) @ abs(x).T) ** 2
    assert abs(one - (outputs**2).sum()) <= 4 * (cols + rows) * 2.0**-53 * terms.sum()
