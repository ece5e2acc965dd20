"""Divergences of attention maps against float64, in sizes around tiles of 128 x 512."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core

SIZES = [(1, 1, 1, 4), (5, 6, 2, 10), (127, 2, 1, 16), (129, 4, 4, 8), (300, 9, 3, 64)]
SIZES += [(512, 2, 2, 8), (513, 2, 1, 8), (1030, 1, 1, 4)]


def parts(tokens, heads, kv_heads, d, seed=0):
    """Queries, keys and, in float32, their log-sums."""
    rng = np.random.default_rng([seed, tokens])
    q, k = (rng.standard_normal((tokens, h, d), np.float32) for h in (heads, kv_heads))
    logs = oracle.attention_logs(q, k)
    wide = np.repeat(k.astype(float), heads // kv_heads, axis=1)
    first = np.einsum("thd,hd->ht", q.astype(float), wide[0]) / np.sqrt(d)  # all see key 0
    log_sum = ((first - logs[:, :, 0]) / np.log(2)).T
    return q, k, np.ascontiguousarray(log_sum, np.float32)


def divergence(one, other):
    found = np.full((len(one[0]) + 2, one[0].shape[1]), np.nan)
    _core.attention_divergence(_core.attention_map(*one), _core.attention_map(*other), found[1:-1])
    assert np.isnan(found[[0, -1]]).all(), "wrote outside divergence"
    return found[1:-1]


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "d"), SIZES)
def test_divergence_is_that_of_the_formula(isa, tokens, heads, kv_heads, d):
    own = parts(tokens, heads, kv_heads, d)
    target = parts(tokens, heads, heads, d + 2, seed=1)  # other groups, other heads
    expected = oracle.attention_divergence(*own[:2], *target[:2])
    # A score below 2^5 is off by d + 4 roundings of 2^-24, and so is what is averaged.
    assert abs(divergence(own, target) - expected).max() <= (d + 4) * 2.0**-18
    assert (divergence(own, own) == 0).all()


def test_bits_do_not_depend_on_threads():
    own, target = (parts(700, 6, 2, 16, seed=s) for s in (0, 1))
    before = _core.config()["threads"]
    results = []
    try:
        for threads in (1, 2, 3):
            _core.set_num_threads(threads=threads)
            results.append(divergence(own, target))
    finally:
        _core.set_num_threads(threads=before)
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_what_does_not_fit_is_refused():
    own = _core.attention_map(*parts(5, 4, 2, 8))
    for tokens, heads in ((6, 4), (5, 2)):
        other = _core.attention_map(*parts(tokens, heads, 1, 8))
        said = f"the target has {tokens} tokens of {heads} heads, expected 5 of 4"
        with pytest.raises(ValueError, match=said):
            _core.attention_divergence(own, other, np.empty((5, 4)))
    with pytest.raises(ValueError, match="divergence"):
        _core.attention_divergence(own, own, np.empty((5, 3)))
    q, k, log_sum = parts(5, 4, 2, 8)
    with pytest.raises(ValueError, match="q has 3 heads, k 2"):
        _core.attention_map(q[:, :3].copy(), k, log_sum[:, :3].copy())
