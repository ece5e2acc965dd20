"""Massive activations that were planted are found, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq import _core
from lowbitq.calibration import Stream
from lowbitq.linears import Linear
from lowbitq.massive import magnitude_quantile, massive_activations

SPIKES = {91: (5, 900.0), 97: (40, -1500.0)}  # token: channel, value


@pytest.fixture(scope="module")
def model():
    """Embeddings of two tokens have a spike each, which no block changes much."""
    model = random_model(3)
    weight = model.embedding.weight.copy()
    for token, (channel, value) in SPIKES.items():
        weight[token, channel] = value
    model.embedding = Linear(weight)
    return model


@pytest.fixture(scope="module")
def tokens():
    tokens = np.minimum(random_tokens(96, 1), 80).reshape(2, 48)
    tokens[0, [7, 30]] = 91, 97
    tokens[1, 0] = 97
    return tokens


def test_planted_spikes_are_found_exactly(model, tokens):
    found = massive_activations(model, tokens, samples=2, window=48, ratio=50)
    planted = {(0, 7, 5), (0, 30, 40), (1, 0, 40)}
    for index in range(3):
        layer = f"model.layers.{index}"
        rows = [row for row in found.rows if row.layer == layer]
        assert {(row.sample, row.position, row.channel) for row in rows} == planted
        assert np.allclose([abs(row.value) for row in rows], [900, 1500, 1500], rtol=0.1)
    assert list(found.layers) == [f"model.layers.{index}" for index in range(3)]


@pytest.mark.parametrize("of", ["blocks", "inputs"])
@pytest.mark.parametrize("typical", ["median", "mean"])
def test_rows_are_all_that_the_definition_says(model, tokens, of, typical):
    found = massive_activations(
        model, tokens, samples=2, window=48, of=of, ratio=4, typical=typical, least=1.5
    )
    expected, sizes = {}, {}
    readers = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj"}
    readers |= {"mlp": "mlp.gate_proj", "down": "mlp.down_proj"}
    stream = Stream(model, tokens)
    for index in range(3):
        for sample, taps in enumerate(stream.taps(advance=True)):
            arrays = {f"model.layers.{index}.{readers[tap]}": x for tap, x in taps.items()}
            if of == "blocks":
                arrays = {f"model.layers.{index}": stream.hidden[sample]}
            for name, x in arrays.items():
                size = getattr(np, typical)(abs(x.astype(float)))
                sizes.setdefault(name, []).append(size)
                for t, k in np.argwhere((abs(x) >= 4 * size) & (abs(x) >= 1.5)):
                    expected[name, sample, int(t), int(k)] = float(x[t, k]), abs(x[t, k]) / size
    rows = {(r.layer, r.sample, r.position, r.channel): r for r in found.rows}
    assert len(rows) == len(found.rows) > 3
    # The median is rounded down by at most 1 / 128, which may add a few rows.
    assert expected.keys() <= rows.keys()
    for key in rows.keys() - expected.keys():
        assert typical == "median"
        assert rows[key].ratio < 4 * (1 + 1 / 64)
    for key, (value, ratio) in expected.items():
        assert rows[key].value == value
        assert ratio * (1 - 1e-5) <= rows[key].ratio <= ratio * (1 + 1 / 64)
    assert found.layers.keys() == sizes.keys()
    for name, values in sizes.items():
        assert np.isclose(found.layers[name], np.mean(values), rtol=1 / 64)


def test_table(model, tokens):
    found = massive_activations(model, tokens, samples=2, window=48, ratio=50)
    text = str(found).splitlines()
    assert "50 times the median and >= 100, in 2 windows of 48" in text[0]
    assert len(text) == 2 + 3
    assert text[2].split()[:2] == ["model.layers.0", "3"]
    assert text[2].endswith("40, 5; 7, 30, 0")
    none = massive_activations(model, tokens, samples=2, window=48, ratio=1e9)
    assert str(none).endswith("none")


def test_frame(model, tokens):
    pytest.importorskip("pandas")
    frame = massive_activations(model, tokens, samples=2, window=48, ratio=50).to_frame()
    assert frame["token"].tolist() == [91, 97, 97] * 3
    assert frame["position"].tolist() == [7, 30, 0] * 3
    none = massive_activations(model, tokens, samples=2, window=48, ratio=1e9).to_frame()
    assert list(none) == list(frame)
    assert len(none) == 0


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_a_quantile_is_rounded_down_by_one_part_in_128(count):
    x = np.random.default_rng(count).standard_normal((1, count), dtype=np.float32)
    counts = np.zeros(1 << 15, np.int64)
    _core.magnitude_counts(x, counts)
    for share in (0.01, 0.5, 1.0):
        exact = np.quantile(abs(x), share, method="inverted_cdf")
        assert exact * (1 - 1 / 128) <= magnitude_quantile(counts, share) <= exact


def test_refusals(model, tokens):
    shape = {"samples": 2, "window": 48}
    with pytest.raises(ValueError, match="of is 'layers', expected 'blocks' or 'inputs'"):
        massive_activations(model, tokens, of="layers", **shape)
    with pytest.raises(ValueError, match="typical is 'mode'"):
        massive_activations(model, tokens, typical="mode", **shape)
    with pytest.raises(ValueError, match="ratio is -1"):
        massive_activations(model, tokens, ratio=-1, **shape)
