"""Attention against float64, in sizes around its panels of 64 and blocks of 256 keys, and for
few tokens, whose keys are split into several runs."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core


def attend(q, k, v, bits=32):
    o = np.full((len(q) + 2, *q.shape[1:]), np.nan, np.float32)
    _core.attention(q, k, v, o[1:-1], bits=bits)
    assert np.isnan(o[[0, -1]]).all(), "wrote outside o"
    return o[1:-1]


SIZES = [
    (1, 1, 1, 1, 2),
    (1, 63, 3, 1, 16),
    (1, 65, 9, 3, 64),
    (2, 257, 4, 4, 20),
    (64, 64, 2, 1, 8),
    (97, 97, 3, 3, 64),
    (65, 300, 9, 3, 64),
    (33, 33, 14, 2, 64),
    (5, 130, 8, 2, 128),
    (7, 40, 100, 1, 4),
    (300, 300, 6, 2, 80),
    (1, 1025, 9, 3, 64),
    (1, 768, 32, 8, 128),
    (3, 2000, 8, 2, 100),
    (1, 16500, 2, 1, 64),
    (40, 1300, 2, 2, 64),
]


def random_inputs(tokens, keys, heads, kv_heads, d):
    rng = np.random.default_rng([tokens, keys, heads])
    q = (2 * rng.standard_normal((tokens, heads, d))).astype(np.float32)
    return q, *rng.standard_normal((2, keys, kv_heads, d), dtype=np.float32)


def rounded(x):
    """x rounded to 8 bits, int8 times max |x| / 127 per position and head; and the step."""
    top = abs(x).max(-1, keepdims=True)
    q = np.rint(x * (np.float32(127) / top))
    step = top / np.float32(127)
    return q * step.astype(float), step.astype(float)


@pytest.mark.parametrize(("tokens", "keys", "heads", "kv_heads", "d"), SIZES)
def test_attention_matches_oracle(isa, tokens, keys, heads, kv_heads, d):
    q, k, v = random_inputs(tokens, keys, heads, kv_heads, d)
    expected, bound = oracle.attention(q, k, v)
    assert (abs(attend(q, k, v) - expected) <= bound).all()


def transformed(x):
    """H x, block by block, with H the Hadamard matrix of the largest order that divides d."""
    order = x.shape[-1] & -x.shape[-1]
    y = x.reshape(*x.shape[:-1], -1, order).copy()
    for distance in 2 ** np.arange(order.bit_length() - 1):
        pairs = y.reshape(*y.shape[:-1], -1, 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], axis=-2).reshape(y.shape)
    return y.reshape(x.shape)


def transformed_inputs(q, k):
    """Exact H q, and H k / n in float32, rounded to 8 bits."""
    order = k.shape[-1] & -k.shape[-1]
    return transformed(q.astype(float)), transformed(k / np.float32(order)), order


@pytest.mark.parametrize(("tokens", "keys", "heads", "kv_heads", "d"), SIZES)
def test_8_bits_match_attention_over_rounded_keys_and_values(isa, tokens, keys, heads, kv_heads, d):
    q, k, v = random_inputs(tokens, keys, heads, kv_heads, d)
    hq, hk, order = transformed_inputs(q, k)
    kept = rounded(hk)[0]
    expected, bound = oracle.attention(hq, kept, rounded(v)[0])
    # Each of log2(order) sums in H q is off by a unit of at most the sum of |q|, which moves a
    # weight by twice the error of its score. Scales are multiplied separately: one more rounding of
    # each score, weight and value.
    sums = np.log2(order) * oracle.UNIT * abs(q).sum(-1).max() * abs(kept).sum(-1).max()
    bound += 2 * sums / d**0.5 * abs(v).max()
    assert (abs(attend(q, k, v, bits=8) - expected) <= bound * (1 + 3 / d)).all()


def test_8_bits_give_every_channel_the_same_step(isa):
    """A channel of 100 among others of 1 may cost them as much as one of 100 / sqrt(64)."""
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, 200, 2, 64), dtype=np.float32)
    v = np.eye(200, 64, dtype=np.float32)[:, None].repeat(2, axis=1)
    q[..., 7], k[..., 7] = 0, 100
    exact, _ = oracle.attention(q, k, v)
    small = k.copy()
    small[..., 7] = 100 / 64**0.5
    limit = abs(oracle.attention(q, rounded(small)[0], v)[0] - exact).mean()
    assert abs(attend(q, k, v, bits=8) - exact).mean() < 1.5 * limit


def test_8_bits_cost_half_a_step():
    """Against unrounded keys and values: scores are off by half a key step times |H q|, which
    moves a weight by at most twice as much, and values by half a step of theirs."""
    q, k, v = random_inputs(20, 300, 6, 2, 64)
    exact, bound = oracle.attention(q, k, v)
    hq, hk, _ = transformed_inputs(q, k)
    _, k_step = rounded(hk)
    _, v_step = rounded(v)
    group = q.shape[1] // k.shape[1]
    score = abs(hq).sum(-1) * np.repeat(k_step.max(0)[:, 0], group) / 2 / 64**0.5
    moved = np.expm1(2 * score)[:, :, None] * np.repeat(abs(v).max(0), group, axis=0)
    limit = moved + np.repeat(v_step.max(0), group, axis=0) / 2
    error = abs(attend(q, k, v, bits=8) - exact)
    assert (error <= limit + 2 * bound).all()
    assert error.max() > bound.max(), "nothing was rounded"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_8_bits_hide_no_number_that_is_none(isa, bad):
    q, k, v = random_inputs(3, 70, 2, 1, 16)
    v[5, 0, 3] = bad
    assert np.isnan(attend(q, k, v, bits=8)).all()


def test_8_bits_of_zeros(isa):
    q, k, v = random_inputs(3, 70, 2, 1, 16)
    k[:], v[:, :, :] = 0, 0
    assert (attend(q, k, v, bits=8) == 0).all()


def test_a_maximum_that_grows_late(isa):
    """The last keys outweigh all earlier ones, whose sums must be scaled away."""
    rng = np.random.default_rng(0)
    q = np.ones((4, 2, 16), np.float32)
    k, v = rng.standard_normal((2, 700, 2, 16), dtype=np.float32)
    k *= np.linspace(0, 12, 700, dtype=np.float32)[:, None, None]
    k[-5] = 9
    expected, bound = oracle.attention(q, k, v)
    assert (abs(attend(q, k, v) - expected) <= bound).all()


def test_later_keys_do_not_exist(isa):
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 100, 2, 32), dtype=np.float32)
    before = attend(q, k, v)
    k[60:], v[60:] = 1e30, 1e30
    after = attend(q, k, v)
    assert (after[:60] == before[:60]).all()
    assert (after[60:] != before[60:]).all()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("tokens", "keys"), [(200, 200), (1, 3000)])
def test_threads_do_not_change_a_bit(tokens, keys, bits):
    rng = np.random.default_rng(2)
    k, v = rng.standard_normal((2, keys, 4, 32), dtype=np.float32)
    q = rng.standard_normal((tokens, 4, 32), dtype=np.float32)
    threads = _core.config()["threads"]
    results = []
    for count in (1, 2, 3):
        _core.set_num_threads(threads=count)
        results.append(attend(q, k, v, bits))
    _core.set_num_threads(threads=threads)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


def test_attention_refuses_heads_that_do_not_share_evenly():
    q, k = np.zeros((2, 3, 4), np.float32), np.zeros((2, 2, 4), np.float32)
    with pytest.raises(ValueError, match="q has 2 tokens of 3 heads, k 2 of 2"):
        _core.attention(q, k, k, q, bits=32)
    with pytest.raises(ValueError, match="q has 2 tokens of 3 heads, k 1 of 3"):
        _core.attention(q, q[:1].copy(), q[:1].copy(), q, bits=32)


def test_attention_refuses_other_bits():
    q = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match="bits is 16, expected 8 or 32"):
        _core.attention(q, q, q, np.empty_like(q), bits=16)
