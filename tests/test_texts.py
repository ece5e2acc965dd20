"""Text in every form becomes windows of tokens."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest

from lowbitq._core import FormatError
from lowbitq.models.config import ModelConfig
from lowbitq.texts import fallback_texts, is_tokens, plain_text, read_text, read_texts, windows


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


@pytest.mark.parametrize(
    ("count", "samples", "window"), [(1000, 7, 50), (1000, 20, 50), (1234, 3, 2), (9, 1, 9)]
)
def test_windows_of_a_text_with_room(count, samples, window):
    """One in each equal part of the places, wherever the generator says."""
    found = windows(None, np.arange(count), samples=samples, window=window, seed=5)
    draws = np.random.default_rng(5).random(samples)
    places = count - window + 1
    starts = [int((i + draw) * places / samples) for i, draw in enumerate(draws)]
    assert found.tolist() == [list(range(start, start + window)) for start in starts]


@pytest.mark.parametrize(("count", "room"), [(10, 1), (19, 1), (20, 2), (29, 2), (47, 4)])
def test_no_text_is_counted_twice(count, room):
    """As many windows as there is room for, none overlapping, from the start to the end."""
    with pytest.warns(UserWarning, match=f"samples={room}") as caught:
        found = windows(None, np.arange(count), samples=30, window=10)
    assert found.shape == (room, 10)
    assert np.unique(found).size == found.size
    assert found[0, 0] == 0
    assert room == 1 or found[-1, -1] == count - 1
    assert f"text has {count} tokens, but 30 windows of 10 need 300" in str(caught[0].message)
    again = windows(None, np.arange(count), samples=room, window=10)
    assert again.shape == found.shape, "what the warning asks for is accepted"


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


@pytest.mark.parametrize("begun", [False, True], ids=["bare", "begun"])
def test_a_window_has_one_bos(begun):
    """Whether or not the text itself begins with one, as that of a real tokenizer does."""

    class Begun(Words):
        def encode(self, text):
            return np.insert(super().encode(text), 0, 99) if begun else super().encode(text)

    text = "a bb ccc dddd " * 5
    with pytest.warns(UserWarning, match="samples=6"):
        found = windows(Begun(adds_bos=True), text, samples=9, window=4)
    assert found.shape == (6, 4)
    assert ((found == 99) == [True, False, False, False]).all()
    assert (windows(Begun(adds_bos=True), text, samples=1, window=21) == 99).sum() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text is empty"),
        ([], "text is empty"),
        ((), "text is empty"),
        ([" \n"], "text is empty"),
        ("a b c", "text has 3 tokens, fewer than one window of 5: give a longer text or a smaller"),
        (np.arange(4), "text has 4 tokens, fewer than one window of 5"),
        (np.zeros((0, 5), int), r"shape \(0, 5\), expected at least one window"),
        (np.zeros((3, 1), int), r"shape \(3, 1\), expected at least one window"),
    ],
)
def test_too_little_text_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        windows(Words(), text, samples=2, window=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples is 0, expected at least 1"),
        ({"window": 1}, ValueError, "window is 1, expected at least 2"),
        ({"window": 5.0}, TypeError, "window is 5.0, expected an integer"),
        ({"samples": True}, TypeError, "samples is True, expected an integer"),
    ],
)
def test_counts_are_integers(options, error, message):
    with pytest.raises(error, match=message):
        windows(None, np.arange(100), **options)


# --- tokens as text -------------------------------------------------------------------------------

CONFIG = ModelConfig(
    "llama", 8, 8, layers=1, heads=1, kv_heads=1, head_dim=8, vocab_size=50, max_positions=16
)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda t: t.astype(np.uint64),
        lambda t: t.astype(">i4"),
        lambda t: t.astype(np.int8),
        lambda t: np.repeat(t, 2)[::2],
        lambda t: array("q", t.tolist()),
    ],
)
def test_integers_of_every_kind_are_tokens(make):
    tokens = np.arange(40)
    expected = windows(None, tokens, samples=2, window=8, config=CONFIG)
    given = make(tokens)
    assert np.array_equal(windows(None, given, samples=2, window=8, config=CONFIG), expected)


def test_tokens_are_left_unchanged():
    tokens = np.arange(40, dtype=np.int32)
    tokens.flags.writeable = False
    windows(None, tokens, samples=2, window=8)
    assert windows(None, tokens.reshape(5, 8)).tolist() == tokens.reshape(5, 8).tolist()


@pytest.mark.parametrize("shape", [(40,), (5, 8)])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t + 0.5, TypeError, "text has dtype float64, expected integers"),
        (lambda t: t.astype(float), TypeError, "text has dtype float64, expected integers"),
        (lambda t: t > 5, TypeError, "text has dtype bool"),
        (lambda t: t.astype(object), TypeError, "text has dtype object"),
        (lambda t: t.astype(str), TypeError, "text has dtype <U"),
        (lambda t: t.astype("m8[s]"), TypeError, "text has dtype timedelta64"),
        (lambda t: t + 2**32, ValueError, r"text has 42949673\d\d, expected 0 to 49"),
        (lambda t: t - 1, ValueError, "text has -1, expected 0 to 49"),
        (lambda t: t + 11, ValueError, "text has 50, expected 0 to 49"),
        (lambda t: t.reshape(2, 5, 4), ValueError, r"expected \(t,\) or \(samples, window\)"),
        (lambda t: t[:1].reshape(()) if t.ndim == 1 else np.array(5), ValueError, r"shape \(\)"),
    ],
)
def test_other_numbers_are_refused(shape, change, error, message):
    with pytest.raises(error, match=message):
        windows(None, change(np.arange(40).reshape(shape)), samples=2, window=8, config=CONFIG)


def test_tokens_without_a_model_fit_into_an_int32():
    for token in (-1, 2**31, 2**32 + 5):
        with pytest.raises(ValueError, match=f"text has {token}, expected 0 to 2147483647"):
            windows(None, np.array([1, 2, token]), samples=1, window=2)


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="rows of different lengths"):
        windows(None, [[1, 2, 3], [4, 5]])


@pytest.mark.parametrize("text", [np.arange(40), np.arange(34).reshape(2, 17)])
def test_windows_longer_than_the_positions_are_refused(text):
    with pytest.raises(ValueError, match="window is 17, but the model has 16 positions"):
        windows(None, text, samples=1, window=17, config=CONFIG)
    assert windows(None, text[..., :16], samples=1, window=16, config=CONFIG).shape[1] == 16


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        windows(None, "some text", samples=1, window=2)


# --- records and iterators ------------------------------------------------------------------------

RECORDS = [{"text": "one two"}, {"id": 7, "text": "three\n"}, {"text": ""}]


class Rows:
    """As a Hugging Face dataset: neither a list nor an iterator, and read more than once."""

    def __getitem__(self, index):
        return RECORDS[index]

    def __len__(self):
        return len(RECORDS)

    def __iter__(self):
        return iter(RECORDS)


@pytest.mark.parametrize(
    "text", [RECORDS, tuple(RECORDS), iter(RECORDS), Rows(), (row["text"] for row in RECORDS)]
)
def test_records_and_iterators_are_texts(text):
    assert plain_text(text) == "one two\n\nthree\n\n\n"


def test_windows_of_an_iterator():
    words = [f"{'x' * (1 + i % 9)}" for i in range(200)]
    expected = windows(Words(), "\n\n".join(words), samples=3, window=20)
    for given in (iter(words), ({"text": word} for word in words)):
        assert np.array_equal(windows(Words(), given, samples=3, window=20), expected)
    numbers = [len(word) for word in words]
    assert np.array_equal(windows(None, iter(numbers), samples=3, window=20), expected)


def test_a_text_in_a_record_is_never_a_path():
    assert plain_text([{"text": "absent.txt"}]) == "absent.txt"


def test_paths_of_an_iterator_are_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    assert plain_text(tmp_path / name for name in ("a.txt", "b.txt")) == "text a\n\ntext b"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"content": "x", "id": 1}, r"text\[1\] has no 'text', but 'content', 'id'"),
        ({}, r"text\[1\] has no 'text', but nothing"),
        ({"text": ["x"]}, r"text\[1\] has a 'text' that is list, expected str"),
    ],
)
def test_a_record_without_a_text_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        plain_text([{"text": "a"}, record])


def test_splits_and_open_files_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(TypeError, match="text is dict, expected"):
        plain_text({"train": RECORDS})
    with (
        open(tmp_path / "a.txt") as file,
        pytest.raises(TypeError, match="text is TextIOWrapper, expected"),
    ):
        plain_text(file)


def test_lines_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one\\ntwo", "id": 1}\r\n\n{"text": "thr\u2028ee"}\n', encoding="utf-8"
    )
    for form in (path, str(path), [path]):
        assert plain_text(form) == "one\ntwo\n\nthr\u2028ee"
    assert read_texts(path).calibration == plain_text(path)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"words": "x"}', ValueError, "line 3 has no 'text', but 'words'"),
        ('{"text": 5}', ValueError, "line 3 has a 'text' that is int, expected str"),
        ('{"text": "x"', FormatError, "line 3: not JSON: "),
        ('["x"]', FormatError, "line 3: not a JSON object, but list"),
        ("[" * 10**5, FormatError, "line 3: not JSON: "),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, error, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(error, match=rf"a\.jsonl, {message}"):
        read_text(path)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["wiki.test.raw", "WIKI.TXT", "calibration.md", "wiki.tokens", "a b.json", "plain", "~"]
)
def test_the_name_of_a_file_is_the_file(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("words in a file", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for form in (name, np.str_(name), Path(name), str(tmp_path / name), [name], [Path(name)]):
        assert plain_text(form) == "words in a file"
    assert plain_text([name, Path(name)]) == "words in a file\n\nwords in a file"
    assert plain_text(name + "\n") == name + "\n"


@pytest.mark.parametrize(
    "name", ["wiki.test.raw", "data/wiki", "~/wiki.txt", "my texts.txt", "/absent", "absent.json"]
)
def test_what_looks_like_a_path_is_no_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for form in (name, [name], [name, name]):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file; .* line break"):
            plain_text(form)
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file$"):
        plain_text(Path(name))


@pytest.mark.parametrize(
    "text",
    [
        "word",
        "either/or, he said",
        "A sentence ends in a full stop.",
        "pi is 3.14",
        "first line\nsecond/line.txt",
        "wiki.test.raw\n",
        "文/" * 200,
        "a/" * 100_000,
        "words\0with a NUL",
        "\ud800 half a pair",
    ],
)
def test_text_is_text(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("of a file")
    assert plain_text(text) == text
    assert plain_text([text, "lines"]) == f"{text}\n\nlines", "one that could be a path is none"


def test_a_directory_is_no_text(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for form in ("folder", "folder/", Path("folder"), str(tmp_path), "."):
        with pytest.raises(IsADirectoryError):
            plain_text(form)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_path_that_cannot_be_is_named(name):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        plain_text(Path(name))


@pytest.mark.parametrize(
    ("data", "offset"), [(b"\xff\xfea\0", 0), (b"na\xefve", 2), (b"x" * 10**5 + b"\xc3", 10**5)]
)
def test_a_file_in_another_encoding_is_named(tmp_path, data, offset):
    path = tmp_path / "latin.txt"
    path.write_bytes(data)
    for read in (read_text, read_texts, plain_text):
        with pytest.raises(FormatError, match=rf"latin\.txt: byte {offset}: not UTF-8"):
            read(path)


def test_an_empty_file_is_named(tmp_path):
    for data in (b"", b" \r\n"):
        (tmp_path / "empty.txt").write_bytes(data)
        with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
            plain_text(tmp_path / "empty.txt")


def test_line_ends_are_those_of_python(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("a\r\nb\rc\nd\r\r\n\u2028é".encode())
    assert read_text(path) == path.read_text(encoding="utf-8") == "a\nb\nc\nd\n\n\u2028é"


@pytest.mark.parametrize(
    "text", [b"abc", b"", bytearray(b"abc"), memoryview(b"abc"), 17, None, {"a": 1}, {"a"}]
)
def test_other_things_are_no_text(text):
    with pytest.raises((TypeError, ValueError), match=r"text is (empty|\w+, expected str, path)"):
        windows(Words(), text)
    assert not is_tokens(text)


@pytest.mark.parametrize("text", [["a b c", 2], [1, "a b c"], [{"text": "a"}, 2], iter(["a", 1])])
def test_mixtures_are_no_text(text):
    with pytest.raises(TypeError, match=r"text is \w+, expected str, path"):
        windows(Words(), text)


def test_text_of_a_file_is_halved(tmp_path):
    (tmp_path / "text.txt").write_text("abcdef", encoding="utf-8")
    texts = read_texts(tmp_path / "text.txt", halves=True)
    assert (texts.calibration, texts.held_out) == ("abc", "def")
    assert read_texts(tmp_path / "text.txt").held_out == "abcdef"
    assert not texts.warning


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
    assert texts == fallback_texts() == read_texts(None, halves=True)
    assert "no text is given, so topics of Python's help are used" in texts.warning
    assert min(len(texts.calibration), len(texts.held_out)) > 100_000
    assert not set(texts.calibration.split("\n\n")) & set(texts.held_out.split("\n\n"))
