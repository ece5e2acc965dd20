"""Windows of text, and what the layers of a model read."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq._core import FormatError
from lowbitq.calibration import Statistics, calibrate, windows


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


def test_calibrate_sees_the_inputs_of_every_layer():
    model = random_model(layers=2)
    tokens = random_tokens(60).reshape(3, 20)
    done = []
    stats = calibrate(
        model,
        tokens,
        hessians=True,
        first_tokens=2,
        first_weight=5,
        progress=lambda *counts: done.append(counts),
    )
    assert stats.token_count == 60
    assert done == [(1, 2), (2, 2)]
    assert set(stats.mean_square) == {name for name, _ in model.linears()}

    weights = np.where(np.arange(20) < 2, 5.0, 1.0)
    for index in range(2):
        inputs = {}
        for row in tokens:
            hidden = model.embed(row)
            for i in range(index):
                model.block_forward(i, hidden)
            taps = {}
            model.block_forward(index, hidden, taps)
            for tap, x in taps.items():
                inputs.setdefault(tap, []).append(x.astype(np.float64))
        readers = {"qkv": "self_attn.v_proj", "o": "self_attn.o_proj", "mlp": "mlp.gate_proj"}
        for tap, reader in (readers | {"down": "mlp.down_proj"}).items():
            name, x = f"model.layers.{index}.{reader}", np.stack(inputs[tap])
            assert np.array_equal(stats.max_abs[name], abs(x).max((0, 1)).astype(np.float32))
            assert np.allclose(stats.mean_square[name], (x**2).mean((0, 1)), rtol=1e-6)
            expected = np.einsum("t,sti,stj->ij", weights, x, x)
            scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
            assert (abs(stats.hessians[name] - expected) <= 1e-5 * scale).all()
            assert np.array_equal(stats.hessians[name], stats.hessians[name].T)


def test_calibrate_shows_a_bar_if_asked(capsys):
    tokens = random_tokens(40).reshape(2, 20)
    calibrate(random_model(), tokens, progress=True)
    assert "3/3" in capsys.readouterr().err
    calibrate(random_model(), tokens)
    assert capsys.readouterr() == ("", "")


def test_a_massive_activation_is_found():
    model = random_model(layers=1)
    model.blocks[0].attention_norm[7] = 1e5
    tokens = random_tokens(40).reshape(2, 20)
    stats = calibrate(model, tokens)
    found = [m for m in stats.massive if m.layer.endswith("q_proj")]
    assert [(m.sample, m.channel) for m in found] == [(0, 7), (1, 7)]
    taps = {}
    model.block_forward(0, model.embed(tokens[1]), taps)
    column = taps["qkv"][:, 7]
    assert found[1].position == abs(column).argmax()
    assert found[1].value == column[found[1].position]
    assert found[1].ratio > 1000


@pytest.mark.parametrize("hessians", [False, True])
def test_statistics_survive_a_file(tmp_path, hessians):
    model = random_model(layers=1)
    model.blocks[0].attention_norm[7] = 1e5
    stats = calibrate(model, random_tokens(40).reshape(2, 20), hessians=hessians)
    stats.save(tmp_path / "stats")
    found = Statistics.load(tmp_path / "stats.npz")
    assert np.array_equal(found.tokens, stats.tokens)
    assert found.massive == stats.massive
    for kind in ("mean_square", "max_abs", "hessians"):
        a, b = getattr(found, kind), getattr(stats, kind)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_statistics_have_the_name_that_was_given(tmp_path):
    """What follows a point in a name is replaced by nothing."""
    names = ["stats-2.5bit", "stats-2.6bit", "a.npz", "v1.2"]
    for i, name in enumerate(names):
        Statistics(np.full((1, 2), i, np.int32), {}, {}, []).save(str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for i, name in enumerate(names):
        assert Statistics.load(tmp_path / name).tokens[0, 0] == i
    Statistics(np.zeros((1, 2), np.int32), {}, {}, []).save(tmp_path / "plain")
    assert (tmp_path / "plain.npz").exists()


def test_a_damaged_file_is_an_error(tmp_path):
    path = tmp_path / "stats.npz"
    calibrate(random_model(layers=1), random_tokens(40).reshape(2, 20)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"stats\.npz"):
            Statistics.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(FormatError, match="not statistics"):
        Statistics.load(path)
