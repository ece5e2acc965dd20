"""Cross entropy and Kullback-Leibler divergence against float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core

SHAPES = [(1, 1), (3, 2), (5, 7), (2, 8), (4, 15), (4, 16), (4, 17), (9, 1000), (3, 49152)]


def nll_of(logits, target):
    nll = np.full(len(logits) + 2, np.nan)
    _core.cross_entropy(logits, target, nll[1:-1])
    assert np.isnan(nll[[0, -1]]).all(), "wrote outside nll"
    return nll[1:-1]


def kl_of(p, q):
    kl, same = np.full(len(p) + 2, np.nan), np.full(len(p) + 2, 7, np.uint8)
    _core.kl_divergence(p, q, kl[1:-1], same[1:-1])
    assert np.isnan(kl[[0, -1]]).all()
    assert (same[[0, -1]] == 7).all()
    return kl[1:-1], same[1:-1]


@pytest.mark.parametrize(("tokens", "vocab"), SHAPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_cross_entropy_matches_oracle(isa, tokens, vocab, spread):
    rng = np.random.default_rng([tokens, vocab])
    logits = (20 + spread * rng.standard_normal((tokens, vocab))).astype(np.float32)
    target = rng.integers(0, vocab, tokens, dtype=np.int32)
    expected, bound = oracle.cross_entropy(logits, target)
    assert (abs(nll_of(logits, target) - expected) <= bound).all()


@pytest.mark.parametrize(("tokens", "vocab"), SHAPES)
@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_kl_divergence_matches_oracle(isa, tokens, vocab, distance):
    rng = np.random.default_rng([tokens, vocab])
    p, noise = 4 * rng.standard_normal((2, tokens, vocab))
    p, q = p.astype(np.float32), (p + distance * noise + 3).astype(np.float32)
    kl, same = kl_of(p, q)
    expected, bound = oracle.kl_divergence(p, q)
    assert (abs(kl - expected) <= bound).all()
    assert (same == (p.argmax(1) == q.argmax(1))).all()


def test_no_distance_from_itself(isa):
    p = np.random.default_rng(0).standard_normal((3, 100), dtype=np.float32)
    kl, same = kl_of(p, p)
    assert (kl == 0).all()
    assert (same == 1).all()


def test_logits_far_below_the_maximum_do_not_matter(isa):
    logits = np.full((1, 40), -1e30, np.float32)
    logits[0, 3] = 5
    assert nll_of(logits, np.array([3], np.int32))[0] == 0
    logits[0, 5:] = -np.inf
    assert nll_of(logits, np.array([3], np.int32))[0] == 0


def test_logits_whose_differences_leave_float32(isa):
    rng = np.random.default_rng(1)
    p, q = rng.choice(np.float32([-3.4e38, -1e38, 0, 1e38, 3.4e38]), (2, 30, 40))
    target = rng.integers(0, 40, 30, dtype=np.int32)
    for found, (expected, bound) in [
        (nll_of(p, target), oracle.cross_entropy(p, target)),
        (kl_of(p, q)[0], oracle.kl_divergence(p, q)),
    ]:
        assert np.isfinite(found).all()
        assert (abs(found - expected) <= bound + 1e-12 * abs(expected)).all()


def test_equal_maxima_count_the_first():
    p, q = np.zeros((2, 1, 30), np.float32)
    p[0, [4, 20]] = q[0, [4, 21]] = 1
    assert kl_of(p, q)[1][0] == 1
    q[0, 2] = 1
    assert kl_of(p, q)[1][0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(isa, bad):
    logits = np.zeros((3, 20), np.float32)
    logits[1, 17] = bad
    target, nll = np.zeros(3, np.int32), np.empty(3)
    with pytest.raises(ValueError, match="row 1 of logits has a NaN or infinity"):
        _core.cross_entropy(logits, target, nll)
    with pytest.raises(ValueError, match="row 1 of p or q is not finite"):
        _core.kl_divergence(logits, np.zeros_like(logits), nll, np.empty(3, np.uint8))


@pytest.mark.parametrize("target", [-1, 20])
def test_targets_outside_the_vocabulary_are_refused(target):
    logits, targets = np.zeros((2, 20), np.float32), np.array([0, target], np.int32)
    with pytest.raises(ValueError, match=rf"target\[1\] is {target}, expected 0 to 19"):
        _core.cross_entropy(logits, targets, np.empty(2))
