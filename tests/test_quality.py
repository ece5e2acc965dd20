"""What the README promises of SmolLM2-135M, measured anew: an hour in all, so all is slow."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

import lowbitq as lq
from lowbitq.linears import Activation

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def model(smollm2):
    return lq.load(smollm2)


def test_perplexity_of_the_float_model(model, wikitext):
    """Transformers' value on the same windows."""
    found = lq.perplexity(model, wikitext / "wikitext2-test.txt", windows=16)
    assert found == pytest.approx(20.82, abs=0.05)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_quantized_activations_cost_little(model, wikitext, rotation):
    small = lq.compress(model, "int4g64", method="rtn", rotation=rotation)
    exact = small.copy()
    for name, linear in small.matrices():
        [copy] = linear.copies
        exact_copy = dataclasses.replace(copy, activation=Activation(None))
        exact.replace_linear(name, linear.replace(copies=(exact_copy,)))
    found = lq.evaluate(small, wikitext / "wikitext2-test.txt", exact, windows=4)
    assert abs(found.log_ratio) <= 0.01


@pytest.mark.parametrize(
    ("format", "seeds", "limit"),
    [("int4g64", [0], 0.10), ("int3g64", [0], 0.40), ("int2g64", [0, 1, 2], 1.50)],
)
def test_loss_of_rotated_gptq(model, wikitext, format, seeds, limit):
    losses = []
    for seed in seeds:
        text = wikitext / "wikitext2-valid.txt"
        small = lq.compress(model, format, text=text, samples=32, seed=seed, embedding=None)
        found = lq.evaluate(small, wikitext / "wikitext2-test.txt", model, windows=16)
        losses.append(found.log_ratio)
    assert statistics.median(losses) <= limit
