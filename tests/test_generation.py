"""Generation against models that write a fixed text."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from lowbitq.generation import generate, room, stream
from lowbitq.models.tokenizer import Tokenizer


@dataclass(eq=False)
class Cache:
    capacity: int
    filled: int = 0
    steps: int = 0


class Script:
    """A model that continues any prompt with the same tokens, and records what it was given."""

    def __init__(self, script, tokenizer=None, vocab_size=64, ends=(0,)):
        self.config = SimpleNamespace(
            vocab_size=vocab_size, max_positions=200, sliding_window=None, eos_token_ids=ends
        )
        self.tokenizer = tokenizer
        self.script = script
        self.read = []
        self.caches = weakref.WeakSet()

    def new_cache(self, capacity, *, bits):
        self.cache_bits = bits
        cache = Cache(capacity)
        self.caches.add(cache)
        return cache

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
        (np.array([[1]]), {}, ValueError, r"shape \(1, 1\)"),
        ([300], {}, ValueError, "prompt has 300, expected 0 to 256"),
        ([-1], {}, ValueError, "prompt has -1"),
        ([1, [1, 2]], {}, ValueError, "prompt has rows of different lengths"),
        (["a", ""], {}, ValueError, r"prompt\[1\] has no tokens"),
        ([[1], [300]], {}, ValueError, r"prompt\[1\] has 300, expected 0 to 256"),
        (["a", 3], {}, ValueError, r"prompt\[1\] has shape \(\)"),
        (["a", "b"], {"on_token": print}, ValueError, "on_token is for one prompt, found a list"),
        ([[1], [2]], {"stop": "x"}, ValueError, r"stop needs a text, but prompt\[0\] is tokens"),
        ([{"role": "user", "content": "x"}], {}, ValueError, "no chat template"),
        ([1] * 150, {}, ValueError, "150 tokens.*200 positions"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ([1], {"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5, expected an integer"),
        ([1], {"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ([1], {"stop": "x"}, ValueError, "stop needs"),
        ("a", {"stop": [""]}, ValueError, "non-empty"),
        ("a", {"temperature": -1}, ValueError, "temperature"),
        ("a", {"min_p": 2}, ValueError, "min_p is 2"),
        ("a", {"repetition_penalty": -1}, ValueError, "repetition_penalty is -1"),
        ("a", {"cache_bits": 7}, ValueError, "cache_bits is 7, expected 8 or 32"),
        ("a", {"colour": 1}, TypeError, "unexpected keyword argument 'colour'"),
        ("a", {"seed": -1}, ValueError, "seed is -1, expected at least 0"),
        ("a", {"seed": 0.5}, TypeError, "seed is 0.5"),
    ],
)
def test_what_is_refused(prompt, options, error, message):
    model = writing("x")
    with pytest.raises(error, match=message):
        generate(model, prompt, **options)
    assert not model.read, "it is refused before the model runs"


def test_stream_refuses_at_once():
    for prompt, options in (("", {}), ([], {}), ("a", {"top_k": 0}), ("a", {"on_token": print})):
        with pytest.raises((ValueError, TypeError)):
            stream(writing("x"), prompt, **options)


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


def test_the_penalty_counts_prompt_and_continuation():
    def step(tokens, cache):
        return np.array([0, 4, 3, 2, -1], np.float32)  # prefers 1, then 2, then 3

    model = Script([0], vocab_size=5)
    model.step = step
    assert generate(model, [4], max_new_tokens=3).tolist() == [1, 1, 1]
    found = generate(model, [1], max_new_tokens=3, repetition_penalty=1.7)
    assert found.tolist() == [2, 1, 1], "4/1.7 > 2 > 3/1.7"
    found = generate(model, [4], max_new_tokens=4, repetition_penalty=100.0)
    assert found.tolist() == [1, 2, 3, 1]


def test_min_p_leaves_out_the_improbable():
    model = Script([5], ends=())
    found = generate(model, [1], max_new_tokens=30, temperature=20.0, min_p=0.9)
    assert set(found.tolist()) == {5}, "the others have exp(-1) times its probability"
    found = generate(model, [1], max_new_tokens=30, temperature=20.0, min_p=0.3)
    assert len(set(found.tolist())) > 5


@pytest.mark.parametrize("options", [{}, {"stop": "lo w"}, {"max_new_tokens": 4}])
def test_stream_yields_what_generate_joins(options):
    seen = []
    whole = generate(writing("hello world"), ">", on_token=seen.append, **options)
    pieces = list(stream(writing("hello world"), ">", **options))
    assert pieces == seen
    assert "".join(pieces) == whole


def test_a_stream_of_tokens():
    model = Script([5, 6, 7, 0])
    pieces = stream(model, [1, 2])
    assert (pieces.prompt_tokens, pieces.tokens, pieces.finish) == (2, 0, None)
    assert not model.read, "the model runs while the pieces are taken"
    assert next(pieces) == 5
    assert model.read == [[1, 2]]
    assert list(pieces) == [6, 7]
    assert (pieces.tokens, pieces.finish) == (4, "stop")
    assert list(pieces) == []


@pytest.mark.parametrize(
    ("options", "finish"),
    [({}, "stop"), ({"stop": "ab"}, "stop"), ({"max_new_tokens": 3}, "length")],
)
def test_a_stream_says_what_ended_it(options, finish):
    pieces = stream(writing("abab"), ">", **options)
    assert pieces.finish is None
    assert all(pieces)
    assert pieces.finish == finish


def test_a_stop_in_the_last_token_is_a_stop():
    pieces = stream(writing("abc"), ">", stop="bc", max_new_tokens=3)
    assert list(pieces) == ["a"]
    assert pieces.finish == "stop"


@pytest.mark.parametrize("prompt", [">", [5]])
@pytest.mark.parametrize("end", ["close", "leave", "drop"])
def test_a_stream_that_is_left_early_frees_its_cache(prompt, end):
    model = writing("hello world")
    gc.disable()
    try:
        pieces = stream(model, prompt)
        for _ in pieces:
            break
        assert len(model.caches) == 1
        if end == "close":
            pieces.close()
            assert list(pieces) == []
        elif end == "leave":
            with pieces:
                next(pieces)
        else:
            del pieces
        assert len(model.caches) == 0
    finally:
        gc.enable()


def test_a_stream_that_was_never_begun_holds_no_cache():
    model = writing("hello")
    pieces = stream(model, ">")
    assert len(model.caches) == 0
    pieces.close()
    assert list(pieces) == []
    assert not model.read


def test_prompts_of_a_list_are_independent():
    model = writing("hello")
    options = {"temperature": 30.0, "seed": 3, "max_new_tokens": 5}
    assert generate(model, ["a", "bc"], **options) == [
        generate(model, prompt, **options) for prompt in ("a", "bc")
    ]
    tokens = generate(Script([5, 6, 0]), [[1], np.array([2, 3])])
    assert [one.tolist() for one in tokens] == [[5, 6], [5, 6]]
    assert {one.dtype for one in tokens} == {np.dtype(np.int32)}
    assert generate(model, ("a",), max_new_tokens=2) == ["he"]


def test_messages_go_through_the_chat_template():
    model = writing("hello")
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}]
    assert generate(model, messages) == "hello"
    assert model.read[0] == model.tokenizer.encode("user: hi").tolist()
    assert list(stream(model, messages)) == list("hello")
    assert generate(model, [messages, messages]) == ["hello"] * 2
    assert generate(model, ["hi", messages]) == ["hello"] * 2


def test_room_is_what_generate_accepts():
    model = Script([5])
    assert room(model.config) == 200
    model.config.sliding_window = 8
    assert room(model.config) == 9
    generate(model, [1] * 5, max_new_tokens=4)
    with pytest.raises(ValueError, match="sliding window"):
        generate(model, [1] * 5, max_new_tokens=5)
