"""Sampling against exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbitq import NumericalError
from lowbitq.sampling import sample

INF = float("inf")


def probabilities(logits, temperature, top_k, top_p, min_p):
    """The definition in `sample`, one token at a time, from the most probable down."""
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        kept.append(i)
        reached += weights[i]
        if top_p is not None and reached >= top_p * total:
            break
    kept = [i for i in kept if weights[i] >= (min_p or 0) * weights.max()]
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1, None, None, None),
        (0.5, None, None, None),
        (2, 3, None, None),
        (1, None, 0.7, None),
        (1.5, 5, 0.8, None),
        (1, 1, 1, None),
        (1, None, None, 0.3),
        (2, None, None, 0.3),
        (1.5, 5, 0.8, 0.5),
        (1, None, None, 1),
    ],
)
def test_frequencies_follow_the_definition(temperature, top_k, top_p, min_p):
    logits = [0.5, 2.0, -1.0, 2.0, 1.0, -INF, 0.0]
    generator = np.random.default_rng(3)
    draws = 2000
    counts = np.zeros(len(logits))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for _ in range(draws):
        counts[sample(logits, generator=generator, **options)] += 1
    expected = draws * probabilities(logits, **options)
    possible = expected > 0
    assert not counts[~possible].any()
    # Pearson's statistic: five standard deviations above its mean. The seed is fixed, so this
    # fails for a wrong distribution, not now and then.
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 2), (0.75, 3), (0.5000001, 3), (1.0, 4)])
def test_tokens_that_reach_top_p_exactly_are_enough(top_p, kept):
    # Four equal tokens: the sums 0.25, 0.5, 0.75 and 1 are exact.
    generator = np.random.default_rng(0)
    drawn = {sample([0.0] * 4, temperature=1, top_p=top_p, generator=generator) for _ in range(200)}
    assert drawn == set(range(kept))


@pytest.mark.parametrize(("temperature", "kept"), [(1.0, 2), (2.0, 3)])
def test_min_p_counts_after_the_temperature(temperature, kept):
    # exp(-1 / 1) < 0.5 < exp(-0.5 / 1), and exp(-1 / 2) > 0.5 > exp(-2 / 2).
    logits = [0.0, -0.5, -1.0, -2.0]
    generator = np.random.default_rng(0)
    options = {"temperature": temperature, "min_p": 0.5, "generator": generator}
    assert {sample(logits, **options) for _ in range(300)} == set(range(kept))


def test_a_token_of_exactly_min_p_is_kept():
    logits = [0.0, 0.0, -np.inf]
    generator = np.random.default_rng(0)
    options = {"temperature": 1, "min_p": 1.0, "generator": generator}
    assert {sample(logits, **options) for _ in range(50)} == {0, 1}


def penalized(logits, seen, penalty):
    """The definition of the repetition penalty, token by token."""
    result = np.array(logits, np.float64)
    for token in set(seen):
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    return result


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5),
    seen=st.lists(st.integers(0, 4), max_size=8),
    penalty=st.floats(0.1, 10),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_repetition_penalty_follows_the_definition(logits, seen, penalty, temperature):
    options = {"temperature": temperature, "top_k": 3}
    changed = penalized(logits, seen, penalty)
    one, other = (np.random.default_rng(1) for _ in range(2))
    found = sample(logits, seen=seen, repetition_penalty=penalty, generator=one, **options)
    assert found == sample(changed, generator=other, **options)


def test_repetition_penalty_leaves_the_logits_alone():
    logits = np.array([1.0, 2.0, 3.0])
    assert sample(logits, seen=[2], repetition_penalty=2.0) == 1
    assert logits.tolist() == [1, 2, 3]
    assert sample([-INF, 0.0], seen=[0], repetition_penalty=2.0) == 1
    assert sample([-1.0, -1.5], seen=[0], repetition_penalty=2.0) == 1, "multiplied"
    assert sample([2.0, 2.5], seen=[0], repetition_penalty=0.5) == 0, "below 1 it encourages"


LOGITS = st.lists(st.sampled_from([-INF, -3.0, -1.0, 0.0, 1.0, 2.5]), min_size=1, max_size=12)


@given(
    logits=LOGITS.filter(lambda values: max(values) > -INF),
    temperature=st.sampled_from([1e-310, 1e-3, 1.0, 50.0]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(1e-6, 1),
    seed=st.integers(0, 2**32),
)
def test_only_kept_tokens_are_drawn(logits, temperature, top_k, top_p, seed):
    drawn = sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=np.random.default_rng(seed),
    )
    assert logits[drawn] > -INF
    above = sum(value > logits[drawn] for value in logits)
    before = sum(value == logits[drawn] for value in logits[:drawn])
    assert top_k is None or above + before < top_k


def test_greedy_takes_the_lowest_of_equals():
    assert sample([1.0, 3.0, 3.0]) == 1
    assert sample(np.zeros(5, np.float32), top_k=2, top_p=0.5) == 0


@pytest.mark.parametrize("logits", [[0.0, np.nan], [INF, 0.0], [-INF, -INF]])
def test_impossible_logits(logits):
    with pytest.raises(NumericalError, match="largest logit"):
        sample(logits, temperature=1, generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": INF}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1, expected 0 to 1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number above 0"),
        ({"repetition_penalty": INF}, "repetition_penalty is inf"),
        ({"seen": [2]}, "seen has 2, expected 0 to 1"),
        ({"temperature": 1.0}, "needs a random generator"),
    ],
)
def test_sample_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sample([0.0, 1.0], **options)
