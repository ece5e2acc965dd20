"""Sampling against exact probabilities; generation against models that write a fixed text."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from lowbitq import NumericalError
from lowbitq.generation import generate, sample
from lowbitq.models.tokenizer import Tokenizer

INF = float("inf")


def probabilities(logits, temperature, top_k, top_p):
    """The definition in `sample`, one token at a time, from the most probable down."""
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        kept.append(i)
        reached += weights[i]
        if top_p is not None and reached >= top_p * total:
            break
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, None, None), (0.5, None, None), (2, 3, None), (1, None, 0.7), (1.5, 5, 0.8), (1, 1, 1)],
)
def test_frequencies_follow_the_definition(temperature, top_k, top_p):
    logits = [0.5, 2.0, -1.0, 2.0, 1.0, -INF, 0.0]
    generator = np.random.default_rng(3)
    draws = 2000
    counts = np.zeros(len(logits))
    for _ in range(draws):
        counts[
            sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        ] += 1
    expected = draws * probabilities(logits, temperature, top_k, top_p)
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
        ({"temperature": 1.0}, "needs a random generator"),
    ],
)
def test_sample_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sample([0.0, 1.0], **options)


class Script:
    """A model that continues any prompt with the same tokens, and records what it was given."""

    def __init__(self, script, tokenizer=None, vocab_size=64, ends=(0,)):
        self.config = SimpleNamespace(
            vocab_size=vocab_size, max_positions=200, sliding_window=None, eos_token_ids=ends
        )
        self.tokenizer = tokenizer
        self.script = script
        self.read = []

    def new_cache(self, capacity, *, bits):
        self.cache_bits = bits
        return SimpleNamespace(capacity=capacity, filled=0, steps=0)

    def step(self, tokens, cache):
        assert tokens.dtype == np.int32
        cache.filled += tokens.size
        assert cache.filled <= cache.capacity
        self.read.append(tokens.tolist())
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self.script[cache.steps % len(self.script)]] = 20
        cache.steps += 1
        return logits


def bytes_tokenizer(eos_ids=(0,)):
    """Token 1 + b is byte b, 0 ends a text; the first word loses its space, as in SentencePiece."""
    vocabulary = {"<end>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, eos_ids=eos_ids)


def writing(text, **options):
    script = [byte + 1 for byte in text.encode()] + [0]
    return Script(script, bytes_tokenizer(), vocab_size=257, **options)


def test_tokens_until_the_end_token():
    model = Script([5, 6, 7, 0])
    seen = []
    result = generate(model, np.array([1, 2], np.int64), on_token=seen.append)
    assert result.dtype == np.int32
    assert result.tolist() == seen == [5, 6, 7]
    assert model.read == [[1, 2], [5], [6], [7]]


def test_cache_bits_reach_the_cache():
    model = Script([5])
    generate(model, [1], max_new_tokens=2)
    assert model.cache_bits == 32
    generate(model, [1], max_new_tokens=2, cache_bits=8)
    assert model.cache_bits == 8


def test_no_more_than_max_new_tokens():
    model = Script([5])
    assert generate(model, [1], max_new_tokens=3).tolist() == [5, 5, 5]
    assert len(model.read) == 3


def test_text_comes_in_whole_characters():
    seen = []
    model = writing(" é 你好 🙂!", ends=())
    assert generate(model, "a", on_token=seen.append) == " é 你好 🙂!"
    assert seen == [" ", "é", " ", "你", "好", " ", "🙂", "!"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("lo", "hel"), (["wor", "o w"], "hell"), ("hello", ""), ("x", "hello world"), ([], None)],
)
def test_stop_is_not_shown(stop, expected):
    seen = []
    text = generate(writing("hello world"), ">", stop=stop, on_token=seen.append)
    assert text == "".join(seen) == (expected if expected is not None else "hello world")


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=3)))
def test_stop_against_search(text, stops):
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    assert generate(writing(text), ">", stop=stops) == expected


def test_seed_decides():
    def model():
        script = Script([5])
        script.step = lambda tokens, cache: np.zeros(64, np.float32)
        return script

    first, again, other = (
        generate(model(), [1], temperature=1.0, seed=seed).tolist() for seed in (7, 7, 8)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([], {}, ValueError, "no tokens"),
        ("", {}, ValueError, "no tokens"),
        ([1.5], {}, TypeError, "float64"),
        ([[1]], {}, ValueError, r"shape \(1, 1\)"),
        ([300], {}, ValueError, "prompt has 300, expected 0 to 256"),
        ([-1], {}, ValueError, "prompt has -1"),
        ([[1], [1, 2]], {}, ValueError, "prompt has rows of different lengths"),
        ([1] * 150, {}, ValueError, "150 tokens.*200 positions"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ([1], {"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5, expected an integer"),
        ([1], {"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ([1], {"stop": "x"}, ValueError, "stop needs"),
        ("a", {"stop": [""]}, ValueError, "non-empty"),
        ("a", {"temperature": -1}, ValueError, "temperature"),
        ("a", {"seed": -1}, ValueError, "seed is -1, expected at least 0"),
        ("a", {"seed": 0.5}, TypeError, "seed is 0.5"),
    ],
)
def test_generate_refuses(prompt, options, error, message):
    with pytest.raises(error, match=message):
        generate(writing("x"), prompt, **options)


def test_the_sliding_window_is_checked_before_the_first_token():
    model = Script([5])
    model.config.sliding_window = 8
    assert generate(model, [1] * 5, max_new_tokens=4).tolist() == [5] * 4
    model.read.clear()
    with pytest.raises(ValueError, match="9 tokens exceed the sliding window of 8"):
        generate(model, [1] * 5, max_new_tokens=5)
    assert not model.read


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(Script([5]), "hello")
