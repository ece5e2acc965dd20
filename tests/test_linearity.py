"""linearity(): slopes against NumPy, and sums that add up where errors are small."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq.compression import compress
from lowbitq.linearity import linearity
from lowbitq.models.rotating import rotate
from lowbitq.quantizers import quantize

TOKENS = random_tokens(4 * 40).reshape(4, 40)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def divergence(model, other):
    """Mean KL of `other` from `model` over the tokens that predict another, in float64."""
    found = []
    for row in TOKENS:
        log_p, log_q = (log_softmax(m.logits(row)[:-1]) for m in (model, other))
        found.append((np.exp(log_p) * (log_p - log_q)).sum(1))
    return np.mean(found)


def with_layer(model, name, weight):
    changed = model.copy()
    changed.replace_linear(name, dict(model.linears())[name].replace(weight=weight))
    return changed


@pytest.mark.parametrize("turned", [False, True])
def test_slopes_are_those_of_one_layer_at_a_time(turned):
    model = rotate(random_model(layers=2)) if turned else random_model(layers=2)
    found = linearity(model, TOKENS, ["int3g32", "int4g32"], noise=0.2, seed=5)
    linears = dict(model.linears())
    names = list(linears)
    for format in ("int3g32", "int4g32"):
        assert [row.layer for row in found.of(format)] == names
    for row in [found.of("int3g32")[0], found.of("int4g32")[9]]:
        weight, index = linears[row.layer].weight, names.index(row.layer)
        rounded = quantize(weight, row.format).dequantize()
        change = rounded.astype(float) - weight
        assert row.distance == pytest.approx(np.linalg.norm(change), rel=1e-5)
        size = np.linalg.norm(weight.astype(float))
        assert row.error == pytest.approx((row.distance / size) ** 2, rel=1e-5)
        alone = divergence(model, with_layer(model, row.layer, rounded))
        assert row.measured == pytest.approx(alone, rel=1e-3, abs=1e-7)
        assert row.slope == row.measured / row.distance
        N = np.random.default_rng([5, index]).standard_normal(weight.shape, np.float32)
        noisy = weight + N * np.float32(0.2 * size / np.linalg.norm(N))
        expected = divergence(model, with_layer(model, row.layer, noisy)) / 0.2**2
        assert row.alpha == pytest.approx(expected, rel=1e-2)
        assert row.predicted == row.alpha * row.error


def test_all_layers_together():
    model = random_model(layers=2)
    found = linearity(model, TOKENS, ["int3g32"])
    rounded = model.copy()
    for name, linear in model.linears():
        weight = quantize(linear.weight, "int3g32").dequantize()
        rounded.replace_linear(name, linear.replace(weight=weight))
    assert found.together["int3g32"] == pytest.approx(divergence(model, rounded), rel=1e-3)
    assert found.alone("int3g32") == pytest.approx(sum(r.measured for r in found.rows))
    assert found.predicted("int3g32") == pytest.approx(sum(r.predicted for r in found.rows))


def test_small_errors_add_up():
    """In six bits the sum over layers is the whole, and noise predicts it."""
    model = random_model(layers=2)
    model.embedding = model.embedding.replace(weight=model.embedding.weight / 4)
    found = linearity(model, TOKENS, ["int6g32"], noise=0.02)
    together = found.together["int6g32"]
    assert found.alone("int6g32") == pytest.approx(together, rel=0.3)
    assert found.predicted("int6g32") == pytest.approx(together, rel=0.3)


def test_progress_and_table():
    done = []
    model = random_model(layers=2)
    found = linearity(model, TOKENS[:2], ["int2g32"], progress=lambda *c: done.append(c))
    total = 2 * 14 * 2
    assert done == [(i + 1, total) for i in range(total)]
    lines = str(found).splitlines()
    assert lines[0] == "divergence in nats per token; alpha from noise of t = 0.1"
    assert lines[2].split()[0] == "int2g32"
    assert float(lines[2].split()[3]) == pytest.approx(found.together["int2g32"], rel=1e-3)


def test_what_does_not_fit_is_refused():
    model = random_model(layers=1)
    with pytest.raises(ValueError, match="noise is 0, expected more than 0 and less than 1"):
        linearity(model, TOKENS, ["int4g32"], noise=0)
    small = compress(model, "int4g32", text=TOKENS)
    with pytest.raises(ValueError, match="q_proj is quantized already; measure the float original"):
        linearity(small, TOKENS, ["int4g32"])
