"""Evaluation against float64 NumPy, on models whose predictions are a table."""

from __future__ import annotations

import copy
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

import lowbitq as lq
from lowbitq import evaluation

VOCAB = 37


class Bigram:
    """Predicts the next token from the last one: logits are a row of a table."""

    def __init__(self, seed, *, adds_bos=False, scale=2.0):
        rng = np.random.default_rng(seed)
        self.table = (scale * rng.standard_normal((VOCAB, VOCAB))).astype(np.float32)
        self.config = SimpleNamespace(vocab_size=VOCAB, max_positions=4096)
        self.tokenizer = SimpleNamespace(adds_bos=adds_bos, bos_id=0, encode=self.encode)
        self.bits_per_weight, self.nbytes, self.parameters = 4.5, 9000, 16000
        self.largest = 0

    def encode(self, text):
        begin = [0] if self.tokenizer.adds_bos else []
        return np.array(begin + [1 + ord(c) % (VOCAB - 1) for c in text], np.int32)

    def hidden(self, tokens):
        return self.table[tokens]

    def head_logits(self, hidden, out):
        self.largest = max(self.largest, len(hidden))
        out[:] = hidden
        return out

    def log_softmax(self):
        wide = self.table.astype(np.float64)
        return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.fixture
def tokens():
    return np.random.default_rng(5).integers(0, VOCAB, 3000)


@pytest.fixture
def model():
    return Bigram(1)


@pytest.fixture
def reference():
    return Bigram(2)


def expected_nll(model, tokens, window):
    """Nats of each scored token, (windows, window - 1)."""
    cut = tokens[: len(tokens) // window * window].reshape(-1, window)
    return -model.log_softmax()[cut[:, :-1], cut[:, 1:]]


@pytest.mark.parametrize("window", [2, 16, 256, 257, 258, 1000, 3000])
def test_perplexity_is_the_formula(model, tokens, window):
    found = lq.perplexity(model, tokens, window=window)
    nll = expected_nll(model, tokens, window)
    assert math.isclose(found, np.exp(nll.mean()), rel_tol=1e-6)
    assert math.isclose(found.nll, nll.mean(), rel_tol=1e-6)
    assert np.allclose(found.per_window, np.exp(nll.mean(axis=1)), rtol=1e-6)
    assert (found.tokens, found.windows) == (nll.size, len(nll))


def test_windows_are_the_first_ones(model, tokens):
    found = lq.perplexity(model, tokens, window=100, windows=3)
    assert math.isclose(found, np.exp(expected_nll(model, tokens[:300], 100).mean()), rel_tol=1e-6)
    assert "3 windows of 100 tokens" in found.protocol
    assert "goes on for 27 more" in found.protocol


def test_ragged_end_is_left_out_and_said(model, tokens):
    found = lq.perplexity(model, tokens, window=1024)
    assert found == lq.perplexity(model, tokens[:2048], window=1024)
    assert "the last 952 tokens left out" in found.protocol


def test_text_shorter_than_a_window_is_scored(model, tokens):
    found = lq.perplexity(model, tokens[:50], window=1024)
    assert math.isclose(found, np.exp(expected_nll(model, tokens[:50], 50).mean()), rel_tol=1e-6)
    assert "1 window of 50 tokens" in found.protocol
    assert all(math.isnan(end) for end in found.interval)
    assert found.to_dict()["interval"] == [None, None]


def test_logits_come_in_pieces(model, tokens):
    lq.perplexity(model, tokens, window=3000)
    assert model.largest == 256


def test_text_file_and_tokens_agree(model, tmp_path):
    text = "How much wood would a woodchuck chuck? " * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = lq.perplexity(model, text, window=64)
    assert found == lq.perplexity(model, tmp_path / "text.txt", window=64)
    assert found == lq.perplexity(model, model.encode(text), window=64)
    assert "no BOS" in found.protocol


def test_bos_only_where_the_tokenizer_puts_one():
    model = Bigram(1, adds_bos=True)
    text = "abc" * 100
    found = lq.perplexity(model, text, window=64)
    nll = expected_nll(model, model.encode(text), 64)
    assert math.isclose(found, np.exp(nll.mean()), rel_tol=1e-6)
    assert "BOS at the start of the text" in found.protocol


def test_interval_covers_the_truth_as_often_as_it_says(model):
    """Windows of a text the model itself wrote: its true nats per token are its entropy rate."""
    chance = np.exp(model.log_softmax())
    stationary = np.linalg.matrix_power(chance, 200)[0]
    truth = -(stationary[:, None] * chance * model.log_softmax()).sum()
    rng = np.random.default_rng(0)
    cumulative = chance.cumsum(axis=1)
    tokens = np.zeros((200, 20 * 32), int)
    for t in range(1, tokens.shape[1]):
        draw = rng.random((200, 1)) * cumulative[tokens[:, t - 1], -1:]
        tokens[:, t] = (cumulative[tokens[:, t - 1]] < draw).sum(axis=1)
    covered = 0
    for text in tokens:
        low, high = lq.perplexity(model, text, window=32).interval
        covered += low <= math.exp(truth) <= high
    # 200 trials of at least 0.90 (the percentile bootstrap of 20 windows falls short of 0.95 by
    # 0.02): three standard deviations.
    assert covered >= 200 * 0.90 - 3 * math.sqrt(200 * 0.90 * 0.10)
    assert covered < 200, "an interval that always covers is too wide"


def test_interval_is_seeded_and_around_the_value(model, tokens):
    first, second = (lq.perplexity(model, tokens, window=64) for _ in range(2))
    assert first.interval == second.interval
    assert first.interval[0] < first < first.interval[1]


def test_kl_and_agreement_are_the_formulas(model, reference, tokens):
    window = 500
    kl = lq.kl_divergence(model, reference, tokens, window=window)
    before = tokens.reshape(-1, window)[:, :-1]
    p, q = reference.log_softmax()[before], model.log_softmax()[before]
    expected = (np.exp(p) * (p - q)).sum(axis=-1)
    assert math.isclose(kl, expected.mean(), rel_tol=1e-5)
    assert math.isclose(kl.percentiles[100.0], expected.max(), rel_tol=1e-5)
    assert math.isclose(kl.percentiles[99.0], np.percentile(expected, 99), rel_tol=1e-5)
    same = lq.agreement(model, reference, tokens, window=window)
    assert math.isclose(same, (p.argmax(-1) == q.argmax(-1)).mean(), rel_tol=1e-12)


def test_model_equals_itself(model, tokens):
    found = lq.evaluate(model, tokens, model, window=100)
    assert found.kl == 0
    assert found.agreement == 1
    assert found.log_ratio == 0
    assert found.log_ratio.interval == (0, 0)
    assert found.perplexity == found.reference


def test_evaluate_is_all_of_them_in_one_pass(model, reference, tokens):
    found = lq.evaluate(model, tokens, reference, window=128, windows=7)
    same = {"window": 128, "windows": 7}
    assert found.perplexity == lq.perplexity(model, tokens, **same)
    assert found.reference == lq.perplexity(reference, tokens, **same)
    assert found.kl == lq.kl_divergence(model, reference, tokens, **same)
    assert found.agreement == lq.agreement(model, reference, tokens, **same)
    assert math.isclose(found.log_ratio, math.log(found.perplexity / found.reference))
    assert (found.bits_per_weight, found.size_bytes) == (4.5, 9000)
    assert found.bits_per_parameter == 4.5
    assert found.seconds > 0
    assert math.isclose(found.tokens_per_second, 7 * 128 / found.seconds)


def test_differences_are_paired(model, tokens):
    """A model that is a little worse everywhere: surely so, though both perplexities are unsure."""
    worse = Bigram(1)
    worse.table *= np.float32(0.98)
    found = lq.evaluate(worse, tokens, model, window=100)
    width = np.diff(np.log(found.perplexity.interval))[0]
    assert np.diff(found.log_ratio.interval)[0] < 0.2 * width


def test_results_are_json_floats_and_survive_copies(model, reference, tokens):
    found = lq.evaluate(model, tokens, reference, window=128)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["perplexity"]["value"] == found.perplexity
    assert read["kl"]["percentiles"]["99.0"] == found.kl.percentiles[99.0]
    assert f"{found.perplexity:.3f}" == f"{float(found.perplexity):.3f}"
    for again in (copy.deepcopy(found.kl), pickle.loads(pickle.dumps(found.kl))):
        assert again == found.kl
        assert again.protocol == found.kl.protocol
    assert found.perplexity.protocol in str(found)
    without = lq.evaluate(model, tokens, window=128)
    assert without.kl is None
    json.dumps(without.to_dict(), allow_nan=False)
    assert "KL" not in str(without)


def test_progress_counts_windows(model, tokens):
    calls = []
    lq.perplexity(model, tokens, window=1000, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("function", [lq.perplexity, lq.evaluate], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("text", "options", "error", "match"),
    [
        ("", {}, ValueError, "text is empty"),
        ("a", {}, ValueError, "the text has 1 tokens, expected at least 2"),
        (np.zeros(0, int), {}, ValueError, "the text has 0 tokens"),
        ("abcd", {"window": 1}, ValueError, "window is 1, expected at least 2"),
        ("abcd", {"windows": 0}, ValueError, "windows is 0, expected at least 1"),
        (
            "abcd" * 9,
            {"window": 16, "windows": 3},
            ValueError,
            "36 tokens, enough for 2 windows of 16",
        ),
        (
            "abcd" * 2000,
            {"window": 5000},
            ValueError,
            "window is 5000, but the model has 4096 positions: .* window=4096",
        ),
        (np.zeros(9), {}, TypeError, "text has dtype float64, expected integers"),
        (np.zeros(9, bool), {}, TypeError, "text has dtype bool, expected integers"),
        (np.array(["a", "b"]), {}, TypeError, "text has dtype <U1, expected integers"),
        ([1, 2, VOCAB], {}, ValueError, f"text has {VOCAB}, expected 0 to {VOCAB - 1}"),
        (np.array([5, -1]), {}, ValueError, "text has -1, expected"),
        (np.array([5, 2**32 + 5]), {}, ValueError, "text has 4294967301, expected"),
        ("abcd", {"window": 2.5}, TypeError, "window is 2.5, expected an integer"),
        ("abcd", {"windows": "1"}, TypeError, "windows is '1', expected an integer"),
        ("wiki.test.raw", {}, FileNotFoundError, "wiki.test.raw: no such file"),
        (np.zeros((3, 3), int), {}, ValueError, r"shape \(3, 3\)"),
        (17, {}, TypeError, "text is int, expected str, path"),
        (["a", 2], {}, TypeError, "text is list, expected str, path"),
        (b"abc", {}, TypeError, "text is bytes"),
    ],
)
def test_bad_arguments_are_named(model, function, text, options, error, match):
    with pytest.raises(error, match=match):
        function(model, text, **options)


def test_models_without_a_tokenizer_read_tokens_only(model):
    model.tokenizer = None
    lq.perplexity(model, np.zeros(9, int), window=4)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        lq.perplexity(model, "text")


def test_vocabularies_must_agree(model, reference, tokens):
    reference.config = SimpleNamespace(vocab_size=VOCAB + 1, max_positions=4096)
    with pytest.raises(ValueError, match=f"reference has {VOCAB + 1} tokens"):
        lq.kl_divergence(model, reference, tokens)


def letters(alphabet, *, adds_bos=False, merges=()):
    """A tokenizer with a token for each letter, then one for each merged pair."""
    pairs = [a + b for a, b in merges]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *pairs])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges)))
    return lq.Tokenizer(backend, names={"bos_token": alphabet[0]}, adds_bos=adds_bos)


ALPHABET = ".abcdefgh"
TEXT = "abcd efgh" * 20


@pytest.mark.parametrize("function", [lq.evaluate, lq.kl_divergence, lq.agreement])
def test_a_reference_with_another_tokenizer_is_refused(function, model, reference, tmp_path):
    def run(ours, theirs, text=TEXT):
        model.tokenizer, reference.tokenizer = ours, theirs
        return function(model, text=text, reference=reference, window=16)

    plain, merged = letters(ALPHABET), letters(ALPHABET, merges=[("g", "h")])
    plain.save(tmp_path)
    saved = lq.Tokenizer.from_folder(tmp_path)
    padded = letters(ALPHABET + "xyz")
    for other in (plain, saved, padded, letters(ALPHABET, adds_bos=True), None):
        run(plain, other)
        if other is not None:
            run(other, plain)
    with pytest.raises(ValueError, match="its token 1 is 'b', the model's is 'a'"):
        run(plain, letters(".bacdefgh"))
    with pytest.raises(ValueError, match="its token 8 is 'x', the model's is 'h'"):
        run(plain, letters(".abcdefgx"), "abcd" * 20)  # in no word of the text
    for ours, theirs in ((plain, merged), (merged, plain)):
        with pytest.raises(ValueError, match="it cuts the text into other tokens"):
            run(ours, theirs)
        (tmp_path / "text.raw").write_text(TEXT)
        with pytest.raises(ValueError, match="it cuts the text into other tokens"):
            run(ours, theirs, tmp_path / "text.raw")
    run(plain, letters(".bacdefgh"), np.arange(64) % 9)


def test_the_reference_has_positions_for_the_windows(model, reference, tokens):
    reference.config = SimpleNamespace(vocab_size=VOCAB, max_positions=64)
    lq.evaluate(model, tokens, reference, window=64)
    with pytest.raises(ValueError, match="window is 65, but the reference has 64 positions"):
        lq.evaluate(model, tokens, reference, window=65)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(model, reference, tokens, value):
    model.table[5, 9] = value
    with pytest.raises(ValueError, match="logits has a NaN or infinity"):
        lq.perplexity(model, tokens, window=100)
    with pytest.raises(ValueError, match="logits has a NaN or infinity"):
        lq.kl_divergence(reference, model, tokens, window=100)


def test_lists_of_tokens_are_tokens(model, tokens):
    found = lq.perplexity(model, tokens.tolist(), window=100)
    assert found == lq.perplexity(model, tokens, window=100)
    assert "tokens as given" in found.protocol


def test_file_that_is_absent_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        lq.perplexity(model, tmp_path / "absent.txt")


def test_every_public_name_is_here():
    names = {"Divergence", "Estimate", "Evaluation", "Perplexity"}
    names |= {"agreement", "evaluate", "kl_divergence", "perplexity"}
    assert names <= set(lq.__all__)
    assert all(getattr(lq, name) is getattr(evaluation, name) for name in names)
