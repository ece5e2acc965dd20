"""Monitors against NumPy, detectors on planted changes, and copies switched while a model runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from random_model import random_model

from lowbitq.calibration import Stream
from lowbitq.evaluation import perplexity
from lowbitq.linears import Copy, Linear, QuantizedLinear
from lowbitq.models.slots import TAPS
from lowbitq.monitoring import Detector, Moments, OnlineModel, learn_normal
from lowbitq.quantizers import quantize

WINDOW = 32
SPIKE = 99  # a token whose embedding is massive


def texts(count, seed=0):
    return np.random.default_rng(seed).integers(0, 90, (count, WINDOW)).astype(np.int32)


def unusual(count, seed=0):
    tokens = texts(count, seed)
    tokens[:, 5] = SPIKE
    return tokens


@pytest.fixture(scope="module")
def model():
    model = random_model(4, layers=2)
    weight = model.embedding.weight.copy()
    weight[SPIKE, 7] = 3000
    model.embedding, model.head = Linear(weight), model.embedding
    return model


@pytest.fixture(scope="module")
def normal(model):
    return learn_normal(model, texts(64, 1), samples=64, window=WINDOW)


def look_of(model, row):
    moments = Moments(len(model.blocks))
    model.hidden(row, moments=moments.values)
    return moments


def test_moments_are_those_of_the_inputs(model):
    tokens = texts(3)
    stream, taps = Stream(model, tokens), {}
    for index in stream:
        for seen in stream.taps(advance=True):
            for tap, x in seen.items():
                taps.setdefault((index, tap), []).append(abs(x[1:]))
    found = Moments(2, 0.7)
    for row in tokens:
        found.add(look_of(model, row))
    assert not found.above.any()  # the others had no threshold
    found.clear()
    assert not found.count.any()
    assert not found.ratio.any()
    for row in tokens:
        model.logits(row, moments=found.values)
    for index in range(2):
        for place, tap in enumerate(TAPS):
            size = np.concatenate(taps[index, tap])
            assert found.count[index, place] == size.size
            assert found.above[index, place] == (size > np.float32(0.7)).sum()
            assert np.isclose(found.mean[index, place], size.mean(dtype=float), rtol=1e-5)
            assert np.isclose(found.largest[index, place], size.max(), rtol=1e-6)
    assert np.allclose(found.ratio, found.largest / found.mean)
    cache, stepped = model.new_cache(WINDOW), Moments(2, 0.7)
    model.step(tokens[0, :10], cache, moments=stepped.values)
    model.step(tokens[0, 10:], cache, moments=stepped.values)
    whole = look_of(model, tokens[0])
    assert np.array_equal(stepped.count, whole.count)
    assert np.allclose(stepped.mean, whole.mean, rtol=1e-4)


def test_normal_is_what_was_seen(model, normal):
    looks = [look_of(model, row) for row in texts(64, 1)]
    features = np.array([[np.log(one.mean), np.log(one.largest)] for one in looks])
    assert np.allclose(normal.center, features.mean(0))
    assert np.allclose(normal.spread, features.std(0, ddof=1))
    assert np.allclose(normal.thresholds, 100 * np.mean([one.mean for one in looks], axis=0))
    assert normal.tokens == WINDOW
    assert 0 < normal.low < normal.high


def test_ordinary_text_raises_no_alarm(model, normal):
    """Fewer than one in a thousand."""
    detector = Detector(normal)
    alarms = sum(detector.update(look_of(model, row)) for row in texts(2000, 2))
    assert alarms <= 1


@pytest.mark.parametrize("before", [0, 1, 40])
def test_a_planted_change_is_found_within_three_looks_and_its_end_too(model, normal, before):
    detector = Detector(normal)
    for row in texts(before, 3):
        assert not detector.update(look_of(model, row))
    states = [detector.update(look_of(model, row)) for row in unusual(6, 4)]
    assert states.index(True) < 3
    assert all(states[states.index(True) :])
    assert detector.score > normal.high
    assert detector.layers()[0].startswith("model.layers.")
    states = [detector.update(look_of(model, row)) for row in texts(40, 5)]
    assert not states[-1]
    assert states == sorted(states, reverse=True)  # switched off once


def test_the_alarm_has_hysteresis(normal):
    """Between the two levels it stays as it is."""
    detector, moments = Detector(normal), Moments(2)

    def look(z):
        features = normal.center + z * normal.spread
        moments.values[..., 1] = 1000
        moments.values[..., 3], moments.values[..., 4] = (
            1000 * np.exp(features[0]),
            np.exp(features[1]),
        )
        for _ in range(60):  # until the average has arrived
            state = detector.update(moments)
        return state

    unit = np.sqrt(normal.smoothing / (2 - normal.smoothing))  # deviation of the average
    between = unit * (normal.high + normal.low) / 2
    assert not look(between)
    assert look(1.1 * unit * normal.high)
    assert look(between)
    assert not look(0.9 * unit * normal.low)


def copies_of(linear, count):
    """Residual copies of 2 bits each."""
    rest, copies = linear.weight, []
    for _ in range(2):
        tensor = quantize(rest, "int2g32")
        copies.append(Copy(tensor))
        rest = rest - tensor.dequantize()
    return copies[:count], linear.bias


@pytest.fixture(scope="module")
def pair(model):
    """One copy of each layer, and two; the first copy is the same object."""
    off, on = model.copy(), model.copy()
    for name, linear in model.linears():
        copies, bias = copies_of(linear, 2)
        off.replace_linear(name, QuantizedLinear(tuple(copies[:1]), bias))
        on.replace_linear(name, QuantizedLinear(tuple(copies), bias))
    return off, on


@pytest.fixture(scope="module")
def normals(pair):
    return [learn_normal(one, texts(32, 1), samples=32, window=WINDOW) for one in pair]


def test_copies_are_switched_on_by_unusual_text_and_off_again(pair, normals):
    off, on = pair
    online = OnlineModel(off, on, *normals)
    stream = [*texts(5, 6), *unusual(6, 7), *texts(25, 8)]
    states = []
    for row in stream:
        states.append(online.is_on)
        expected = (on if online.is_on else off).logits(row)
        assert np.array_equal(online.logits(row), expected)
    assert not any(states[:5])
    assert states.index(True) <= 5 + 3
    assert not states[-1]
    assert online.switches == 2
    assert len(online.looks) == len(stream)
    assert all(look.tokens == WINDOW for look in online.looks)


def test_looks_gather_enough_tokens(pair, normals):
    online = OnlineModel(*pair, *normals)
    for row in texts(4, 9):
        for piece in np.split(row, 4):
            online.hidden(piece)
    assert len(online.looks) == 4


def test_copies_switch_in_the_middle_of_a_text(pair, normals):
    off, on = pair
    online = OnlineModel(off, on, *normals)
    tokens, cache = texts(1, 10)[0], online.new_cache(WINDOW)
    online.step(tokens[:20], cache)
    online.force(True)
    logits = online.step(tokens[20:], cache)
    expected = off.new_cache(WINDOW)
    off.step(tokens[:20], expected)
    expected.decoder = on.handle
    assert np.array_equal(logits, on.step(tokens[20:], expected))
    online.force(None)
    assert not online.is_on


def test_threads_share_it(pair, normals):
    online, rows = OnlineModel(*pair, *normals), texts(40, 11)
    expected = {(i, on): pair[on].logits(row) for i, row in enumerate(rows) for on in (0, 1)}

    def run(i):
        online.force(i % 3 == 0)
        return online.logits(rows[i])

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(run, range(len(rows)))):
            assert any(np.array_equal(found, expected[i, on]) for on in (0, 1))


def test_it_can_be_evaluated(pair, normals):
    off, on = pair
    online = OnlineModel(off, on, *normals)
    tokens = texts(4, 12).reshape(-1)
    for state, static in ((False, off), (True, on)):
        online.force(state)
        found = perplexity(online, tokens, window=WINDOW)
        assert float(found) == float(perplexity(static, tokens, window=WINDOW))


def test_refusals(model, normal):
    with pytest.raises(ValueError, match="there are 5 windows of text, expected at least 8"):
        learn_normal(model, texts(5), samples=5, window=WINDOW)
    with pytest.raises(ValueError, match="smoothing is 0"):
        learn_normal(model, texts(8), samples=8, window=WINDOW, smoothing=0)
    with pytest.raises(ValueError, match="massive is 0"):
        learn_normal(model, texts(8), samples=8, window=WINDOW, massive=0)
    other = random_model(4, layers=3)
    with pytest.raises(ValueError, match="different configurations"):
        OnlineModel(model, other, normal)
    with pytest.raises(ValueError, match="normal is of 2 blocks, the models have 3"):
        OnlineModel(other, other, normal)
    with pytest.raises(ValueError, match="axis 0"):
        model.hidden(texts(1)[0], moments=np.zeros((3, 4, 5)))
