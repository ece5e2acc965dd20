"""What the layers of a model read."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq._core import FormatError, NumericalError
from lowbitq.calibration import Statistics, Stream, calibrate
from lowbitq.fisher import output_squares, token_weights
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.slots import SLOTS, TAPS, name_in_block
from lowbitq.quantizers import quantize


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


def test_fisher_weights_each_layers_hessian():
    model, tokens = random_model(layers=2), random_tokens(60).reshape(3, 20)
    done = []
    options = {"first_tokens": 2, "clip": 3, "seed": 4}
    stats = calibrate(
        model,
        tokens,
        hessians=True,
        fisher=True,
        progress=lambda *counts: done.append(counts),
        **options,
    )
    assert done == [(i, 5) for i in range(1, 6)]
    squares, outputs = output_squares(model, tokens, seed=4)
    inputs = Stream(model, tokens)
    for index in inputs:
        taps = {tap: [] for tap in TAPS}
        for seen in inputs.taps():
            for tap, x in seen.items():
                taps[tap].append(x.astype(float))
        for slot in SLOTS:
            name, x = name_in_block(index, slot), np.stack(taps[slot.tap])
            assert np.array_equal(stats.token_weights[name], squares[name])
            assert np.array_equal(stats.output_squares[name], outputs[name])
            weights = token_weights(squares[name], first_tokens=2, clip=3)
            expected = np.einsum("st,sti,stj->ij", weights, x, x)
            scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
            assert (abs(stats.hessians[name] - expected) <= 1e-5 * scale).all()
            assert np.array_equal(stats.hessians[name], stats.hessians[name].T)
    plain = calibrate(model, tokens, seed=4)
    assert not plain.token_weights
    assert not plain.hessians
    for name, array in plain.mean_square.items():
        assert np.array_equal(array, stats.mean_square[name])


def test_hessians_without_fisher_are_shared():
    stats = calibrate(random_model(layers=1), random_tokens(40).reshape(2, 20), hessians=True)
    q, k, v = (stats.hessians[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv")
    assert q is k is v


def test_fisher_needs_dense_layers():
    model = random_model(layers=1)
    name, linear = next(iter(model.linears()))
    model.replace_linear(name, QuantizedLinear.of(quantize(linear.weight, "int4g64")))
    with pytest.raises(ValueError, match="copy 0 is packed"):
        calibrate(model, random_tokens(40).reshape(2, 20), fisher=True)


def test_calibrate_shows_a_bar_if_asked(capsys):
    tokens = random_tokens(40).reshape(2, 20)
    calibrate(random_model(), tokens, progress=True)
    assert "3/3" in capsys.readouterr().err
    calibrate(random_model(), tokens)
    assert capsys.readouterr() == ("", "")


def test_bad_counts_are_refused():
    for options in ({"first_tokens": -1}, {"samples": 0}, {"window": 1}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least"):
            calibrate(random_model(), random_tokens(40), **options)
    with pytest.raises(ValueError, match="clip is 0, expected a positive number"):
        calibrate(random_model(), random_tokens(40), clip=0)


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


@pytest.mark.parametrize("gain", [1e25, 3e38])
def test_an_input_beyond_float32_is_named(gain):
    model = random_model(layers=2)
    model.blocks[1].mlp_norm[7] = gain
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.gate_proj .* channel 7 of"):
        calibrate(model, random_tokens(40).reshape(2, 20))


BY_LAYER = ("mean_square", "max_abs", "hessians", "token_weights", "output_squares")


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("hessians", [False, True])
def test_statistics_survive_a_file(tmp_path, hessians, fisher):
    model = random_model(layers=1)
    model.blocks[0].attention_norm[7] = 1e5
    tokens = random_tokens(40).reshape(2, 20)
    stats = calibrate(model, tokens, hessians=hessians, fisher=fisher)
    stats.save(tmp_path / "stats")
    found = Statistics.load(tmp_path / "stats.npz")
    assert np.array_equal(found.tokens, stats.tokens)
    assert found.massive == stats.massive
    for kind in BY_LAYER:
        a, b = getattr(found, kind), getattr(stats, kind)
        assert list(a) == list(b)
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert all(a[name].dtype == b[name].dtype for name in a)


def test_a_file_of_an_older_version_is_read(tmp_path):
    """As it was before there were token weights."""
    tokens = random_tokens(40).reshape(2, 20)
    arrays = {"tokens": tokens, "massive_layers": np.array([], dtype=str)}
    arrays |= {"massive": np.zeros((0, 5)), "mean_square/up": np.ones(3, np.float32)}
    np.savez(tmp_path / "stats.npz", **arrays)
    found = Statistics.load(tmp_path / "stats.npz")
    assert np.array_equal(found.tokens, tokens)
    assert list(found.mean_square) == ["up"]
    assert found.token_weights == found.output_squares == found.hessians == {}


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
    with pytest.raises(FormatError, match="not lowbitq statistics"):
        Statistics.load(path)


# --- the walk over blocks -------------------------------------------------------------------------


def by_hand(model, tokens, blocks):
    """The residual streams before a block, and its taps, from one block_forward after another."""
    hidden, taps = model.embed(tokens), {}
    for index in range(blocks):
        model.block_forward(index, hidden)
    before = hidden.copy()
    model.block_forward(blocks, hidden, taps)
    return before, taps


def test_a_stream_goes_through_all_blocks():
    model, tokens = random_model(layers=3), random_tokens(60).reshape(3, 20)
    stream = Stream(model, tokens)
    seen = []
    for index in stream:
        seen.append(index)
        expected = [by_hand(model, row, index) for row in tokens]
        assert np.array_equal(stream.hidden, [before for before, _ in expected])
        for taps, (_, own) in zip(stream.taps(), expected, strict=True):
            assert all(np.array_equal(taps[name], own[name]) for name in own)
        assert np.array_equal(stream.hidden, [before for before, _ in expected]), "it moved"
        if index == 1:  # done here or by the iterator, once
            assert len(list(stream.taps(advance=True))) == 3
    assert seen == [0, 1, 2]


def test_streams_in_lockstep_stop_between_taps():
    """A float model beside one whose query, key and value are quantized already."""
    model, tokens = random_model(layers=2), random_tokens(60).reshape(3, 20)
    student = model.copy()
    teacher, prefix = Stream(model, tokens), Stream(student, tokens)
    for _ in zip(teacher, prefix, strict=True):
        block = student.blocks[prefix.index]
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = block.linears[name]
            block.linears[name] = Linear(quantize(linear.weight, "int2g32").dequantize())
        pairs = zip(teacher.taps(), prefix.taps(), strict=True)
        same = [[np.array_equal(a[tap], b[tap]) for tap in ("qkv", "o", "mlp")] for a, b in pairs]
        assert same == [[prefix.index == 0, False, False]] * 3
