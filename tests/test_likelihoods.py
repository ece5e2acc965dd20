"""Log-likelihoods of continuations: equal to sums over the model's logits in float64."""

from __future__ import annotations

import numpy as np
import pytest

import lowbitq as lq
from lowbitq import _core
from lowbitq.likelihoods import log_likelihoods

# The same sums, of activations that pass through the cache in pieces of other sizes.
CLOSE = {"rel": 1e-5, "abs": 1e-4}


def expected(model, context, continuation):
    """Both numbers from `model.logits`, in float64."""
    tokens = np.array([*context, *continuation])
    logits = model.logits(tokens[:-1])[len(context) - 1 :].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = tokens[len(context) :]
    nats = log_p[np.arange(len(targets)), targets].sum()
    return nats, bool((logits.argmax(axis=1) == targets).all())


@pytest.fixture(scope="module")
def model(tiny_folder):
    return lq.load(tiny_folder)


@pytest.fixture
def read(monkeypatch):
    """Counts of the tokens that the decoder runs."""
    counts = []
    run = _core.decoder_forward

    def counted(decoder, tokens, *rest, **options):
        counts.append(len(tokens))
        return run(decoder, tokens, *rest, **options)

    monkeypatch.setattr(_core, "decoder_forward", counted)
    return counts


def some_pairs(rng, vocabulary):
    few_shot = rng.integers(0, vocabulary, 50).tolist()
    pairs = []
    for length in (1, 7, 300):
        context = few_shot + rng.integers(0, vocabulary, length).tolist()
        pairs += [(context, rng.integers(0, vocabulary, n).tolist()) for n in (1, 1, 2, 9)]
    pairs += [([5], few_shot), (few_shot[:1], [3]), (few_shot, few_shot)]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def test_equal_sums_over_logits(model):
    pairs = some_pairs(np.random.default_rng(0), model.config.vocab_size)
    found = dict(log_likelihoods(model, pairs))
    assert sorted(found) == list(range(len(pairs)))
    for number, (context, continuation) in enumerate(pairs):
        nats, greedy = expected(model, context, continuation)
        assert found[number].nats == pytest.approx(nats, **CLOSE)
        assert found[number].greedy == greedy


def test_sharing_changes_nothing(model):
    pairs = some_pairs(np.random.default_rng(1), model.config.vocab_size)
    for number, shared in log_likelihoods(model, pairs):
        [(_, alone)] = log_likelihoods(model, [pairs[number]])
        assert shared.nats == pytest.approx(alone.nats, **CLOSE)
        assert shared.greedy == alone.greedy


def test_quantized_model(model):
    small = lq.compress(model, "int4g16", rotation="none", method="rtn")
    pairs = some_pairs(np.random.default_rng(2), model.config.vocab_size)
    for number, found in log_likelihoods(small, pairs):
        nats, greedy = expected(small, *pairs[number])
        assert found.nats == pytest.approx(nats, **CLOSE)
        assert found.greedy == greedy


def test_what_the_model_writes_is_greedy(model):
    context = [4, 8, 15]
    written = model.generate(context, max_new_tokens=6).tolist()
    other = [*written[:-1], (written[-1] + 1) % model.config.vocab_size]
    found = dict(log_likelihoods(model, [(context, written), (context, other)]))
    assert [found[0].greedy, found[1].greedy] == [True, False]


def test_each_token_runs_once(model, read):
    context = list(range(20))
    pairs = [(context, [1]), (context, [2]), (context, [3, 4]), (context, [3, 5, 6])]
    list(log_likelihoods(model, pairs))
    assert sum(read) == 20 + 2  # after the context, 3 and 5 are read


def test_nothing_to_score(model):
    assert list(log_likelihoods(model, [])) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "the context of pair 1 is empty"),
        (([1], []), "the continuation of pair 1 is empty"),
        (([1], [96]), "the continuation of pair 1 has 96, expected 0 to 95"),
        (([1], [2] * 4097), "pair 1 has 4097 tokens to read, but the model has 4096 positions"),
    ],
)
def test_refuses_pairs(model, pair, message):
    with pytest.raises(ValueError, match=message):
        list(log_likelihoods(model, [([1], [2]), pair]))


def test_fills_every_position(model):
    [(_, found)] = log_likelihoods(model, [([1], [2] * 4096)])
    assert np.isfinite(found.nats)
