"""Text in every form becomes windows of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq.texts import default_text, read_texts, windows


class Words:
    """A tokenizer whose tokens are the lengths of words."""

    bos_id = 99

    def __init__(self, adds_bos=False):
        self.adds_bos = adds_bos

    def encode(self, text):
        return np.array([len(word) for word in text.split()], np.int32)


def test_windows_are_pieces_of_the_text():
    tokens = np.arange(1000)
    found = windows(None, tokens, samples=7, window=50, seed=1)
    assert found.shape == (7, 50)
    assert found.dtype == np.int32
    assert (np.diff(found, axis=1) == 1).all()
    assert (np.diff(found[:, 0]) > 0).all(), "windows begin at different places"


def test_windows_follow_the_seed():
    tokens = np.arange(1000)
    a, b, c = (windows(None, tokens, samples=4, window=50, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("count", [10, 11, 40])
def test_windows_of_a_short_text(count):
    found = windows(None, np.arange(count), samples=count - 9, window=10)
    assert np.array_equal(found[:, 0], np.arange(count - 9)), "every place once"


def test_every_kind_of_text_gives_the_same_windows(tmp_path):
    words = [("x" * (1 + i % 9)) for i in range(200)]
    text = " ".join(words)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    expected = windows(None, Words().encode(text), samples=3, window=20)
    for form in (text, path, str(path), [" ".join(words[:90]), " ".join(words[90:])]):
        assert np.array_equal(windows(Words(), form, samples=3, window=20), expected)


def test_windows_begin_as_the_tokenizer_says():
    found = windows(Words(adds_bos=True), "a bb ccc dddd " * 50, samples=3, window=20)
    assert found.shape == (3, 20)
    assert (found[:, 0] == 99).all()
    assert (found[:, 1:] < 5).all()


def test_windows_can_be_given():
    tokens = np.arange(12).reshape(3, 4)
    assert np.array_equal(windows(None, tokens), tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text is empty"),
        ([" \n"], "text is empty"),
        ("a b c", "text has 3 tokens; 2 windows of 5 need at least 6"),
        (np.arange(5), "text has 5 tokens; 2 windows of 5 need at least 6"),
        (np.ones(9), "expected .* integers"),
    ],
)
def test_too_little_text_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        windows(Words(), text, samples=2, window=5)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        windows(None, "some text", samples=1, window=2)


def test_the_default_text_is_long():
    assert len(default_text()) > 300_000


def test_text_of_a_file_is_halved(tmp_path):
    (tmp_path / "text.txt").write_text("abcdef", encoding="utf-8")
    texts = read_texts(tmp_path / "text.txt", halves=True)
    assert (texts.calibration, texts.held_out) == ("abc", "def")
    assert read_texts(tmp_path / "text.txt").held_out == "abcdef"


def test_text_of_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBITQ_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"wikitext2-valid\.txt"):
        read_texts(None)
    (tmp_path / "wikitext2-valid.txt").write_text("valid")
    (tmp_path / "wikitext2-test.txt").write_text("test")
    texts = read_texts(None)
    assert (texts.calibration, texts.held_out) == ("valid", "test")


def test_text_of_last_resort_shares_no_topic(monkeypatch):
    monkeypatch.delenv("LOWBITQ_DATA", raising=False)
    texts = read_texts(None)
    assert min(len(texts.calibration), len(texts.held_out)) > 100_000
    assert not set(texts.calibration.split("\n\n")) & set(texts.held_out.split("\n\n"))
