"""Haar-distributed matrices, and rotations by a stored matrix."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core


def orthogonal(n, seed=0, stream=0):
    q = np.full((n, n), np.nan)
    _core.orthogonal(q, seed=seed, stream=stream)
    return q


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 300])
def test_rows_are_orthonormal(n):
    q = orthogonal(n)
    assert (abs(q @ q.T - np.eye(n)) <= 1e-10).all()


def test_it_is_the_q_of_the_normal_matrix_with_positive_r():
    n = 20
    normal = oracle.random_normal(n * n, seed=7, stream=3).reshape(n, n).T  # LAPACK's is by column
    q, r = np.linalg.qr(normal)
    expected = (q * np.sign(np.diag(r))).T
    # Perturbations of 2^-53 in the entries grow by the condition number at most.
    bound = 64 * n * np.linalg.cond(normal) * 2.0**-53
    assert (abs(orthogonal(n, seed=7, stream=3) - expected) <= bound).all()


def test_distribution_is_haar():
    """E tr Q = 0 and E (tr Q)^2 = 1, which LAPACK's own choice of signs would not give."""
    trace = np.array([np.trace(orthogonal(6, seed=seed)) for seed in range(2000)])
    assert abs(trace.mean()) < 5 / np.sqrt(len(trace))
    assert abs((trace**2).mean() - 1) < 5 * np.sqrt(2 / len(trace))
    corner = np.array([orthogonal(6, seed=seed)[0, 0] for seed in range(2000)])
    assert abs(corner.mean()) < 5 / np.sqrt(6 * len(corner))


def test_seeds_and_streams_differ():
    first = orthogonal(8)
    assert np.array_equal(orthogonal(8), first)
    assert not np.allclose(orthogonal(8, seed=1), first)
    assert not np.allclose(orthogonal(8, stream=1), first)


@pytest.mark.parametrize("rows", [1, 3, 17, 127, 128, 129])
@pytest.mark.parametrize("n", [1, 5, 64, 100])
def test_dense_rotation_matches_the_product(n, rows):
    matrix = orthogonal(n).astype(np.float32)
    handle = _core.dense_rotation(matrix)
    x = np.random.default_rng([n, rows]).standard_normal((rows, n), dtype=np.float32)
    y = np.full((rows + 2, n), np.nan, np.float32)  # the first and last row are guards
    y[1:-1] = x
    # n products and n - 1 sums in any order.
    bound = n * 2.0**-24 * (abs(x).astype(float) @ abs(matrix.T).astype(float))
    _core.rotate(handle, y[1:-1])
    assert (abs(y[1:-1] - x.astype(float) @ matrix.T) <= bound).all()
    y[1:-1] = x
    _core.rotate_back(handle, y[1:-1])
    bound = n * 2.0**-24 * (abs(x).astype(float) @ abs(matrix).astype(float))
    assert (abs(y[1:-1] - x.astype(float) @ matrix) <= bound).all()
    assert np.isnan(y[[0, -1]]).all(), "wrote outside x"


def test_refusals():
    with pytest.raises(ValueError, match="axis 1"):
        _core.dense_rotation(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="seed is -1"):
        _core.orthogonal(np.zeros((2, 2)), seed=-1, stream=0)
    with pytest.raises(TypeError, match=r"rotation is not a lowbitq\.rotation"):
        _core.rotate(None, np.zeros((1, 2), np.float32))
