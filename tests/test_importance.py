"""importance() against NumPy, and Wanda's metric as one case of it."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq.importance import importance

rng = np.random.default_rng(0)
W, G = rng.standard_normal((2, 6, 9), np.float32)
X = rng.standard_normal((20, 9), np.float32)


def test_elements_are_weighted_by_the_gradient():
    assert np.array_equal(importance(W, G), abs(W.astype(float)) * abs(G.astype(float)))


def test_wanda_is_the_case_of_norms():
    norms = np.linalg.norm(X, axis=0)
    expected = abs(W.astype(float)) * norms  # Sun et al., equation 1
    assert np.allclose(importance(W, norms), expected, rtol=1e-6)
    # Its order within a row is that of the errors that single weights leave if they become 0.
    errors = np.array([np.linalg.norm(X[:, k] * W[2, k]) for k in range(9)])
    assert np.array_equal(np.argsort(importance(W, norms)[2]), np.argsort(errors))


def test_channels_and_layers_are_sums():
    sizes = abs(X).sum(0)
    by_channel = abs(W.astype(float)).sum(0) * sizes
    assert np.allclose(importance(W, sizes, level="channel"), by_channel, rtol=1e-6)
    assert importance(W, sizes, level="layer") == pytest.approx(by_channel.sum())
    assert importance(W, G, level="layer") == pytest.approx(abs(W.astype(float) * G).sum())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="level is 'row', expected one of 'element', 'channel'"):
        importance(W, G, level="row")
    with pytest.raises(ValueError, match=r"by \(6,\), expected \(rows, cols\)"):
        importance(W, G[:, 0])
    with pytest.raises(ValueError, match=r"weight has shape \(9,\)"):
        importance(W[0], G[0])
