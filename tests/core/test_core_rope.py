"""Rotary embedding against float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core


def frequencies(d):
    return 10000.0 ** (-np.arange(0, d, 2) / d)


@pytest.mark.parametrize(
    ("tokens", "heads", "d", "first"),
    [(1, 1, 2, 0), (3, 2, 6, 5), (70, 3, 64, 0), (2, 9, 128, 131072)],
)
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rope_matches_oracle(tokens, heads, d, first, factor):
    rng = np.random.default_rng([tokens, heads, d])
    x = np.full((tokens + 2, heads, d), np.nan, np.float32)
    x[1:-1] = rng.standard_normal((tokens, heads, d))
    expected, bound = oracle.rope(x[1:-1], frequencies(d), first, factor)

    _core.rope(x[1:-1], frequencies(d), None, first=first, factor=factor, epsilon=0.0)

    assert (abs(x[1:-1] - expected) <= bound).all()
    assert np.isnan(x[[0, -1]]).all(), "wrote outside x"


def test_rope_normalises_each_head_before(isa):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 16), dtype=np.float32)
    gain = rng.standard_normal(16, dtype=np.float32)
    normed, error = oracle.rmsnorm(x, gain, 1e-6)
    expected, bound = oracle.rope(normed, frequencies(16), 2)
    first, second = np.split(error, 2, axis=-1)

    _core.rope(x, frequencies(16), gain, first=2, factor=1.0, epsilon=1e-6)

    carried = np.concatenate([first + second] * 2, axis=-1)
    assert (abs(x - expected) <= (bound + carried) * (1 + 1e-5)).all()


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 64), dtype=np.float32)
    scores = []
    for shift in (0, 1000):
        a, b = q.copy(), k.copy()
        _core.rope(a, frequencies(64), None, first=7 + shift, factor=1.0, epsilon=0.0)
        _core.rope(b, frequencies(64), None, first=3 + shift, factor=1.0, epsilon=0.0)
        scores.append(float((a.astype(float) * b).sum()))
    bound = 2 * 2 * 4 * oracle.UNIT * np.sqrt(2) * np.linalg.norm(q) * np.linalg.norm(k)
    assert abs(scores[0] - scores[1]) <= bound


def test_rope_refuses_frequencies_that_do_not_fit():
    x = np.zeros((1, 1, 8), np.float32)
    with pytest.raises(ValueError, match="x has heads of 8, expected twice the 3 frequencies"):
        _core.rope(x, np.ones(3), None, first=0, factor=1.0, epsilon=0.0)
