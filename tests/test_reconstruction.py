"""reconstruct(): each block comes nearer to the float block, by what it is told to train."""

from __future__ import annotations

import pytest
from random_model import random_model, random_tokens

from lowbitq.compression import compress
from lowbitq.evaluation import kl_divergence
from lowbitq.reconstruction import reconstruct

TEXT = random_tokens(64 * 40).reshape(-1, 64)
HELD_BACK = random_tokens(64 * 20, seed=5)


@pytest.fixture(scope="module")
def pair():
    model = random_model()
    return model, compress(model, "int2g32", text=TEXT[:16], drift=False)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_blocks_come_nearer(pair, inputs):
    model, small = pair
    found = []
    better = reconstruct(
        small,
        model,
        TEXT,
        window=64,
        samples=40,
        steps=30,
        batch=8,
        inputs=inputs,
        progress=found.append,
    )
    assert [one.block for one in found] == [0, 1, 2]
    assert all(one.after < one.before for one in found)
    before, after = (kl_divergence(m, model, HELD_BACK, window=64) for m in (small, better))
    assert after < before
    assert better.bits_per_weight == small.bits_per_weight


def test_codes_and_what_does_not_learn_stay(pair):
    model, small = pair
    better = reconstruct(small, model, TEXT, window=64, samples=8, steps=4, learn=["offset"])
    for (name, before), (_, after) in zip(small.linears(), better.linears(), strict=True):
        assert (before.tensor.codes == after.tensor.codes).all(), name
        assert (before.tensor.scale == after.tensor.scale).all(), name
        assert (before.tensor.offset != after.tensor.offset).any(), name
    assert (better.final_norm == small.final_norm).all()


def test_the_same_seed_gives_the_same_model(pair):
    model, small = pair
    options = {"window": 64, "samples": 8, "steps": 3}
    first, again, other = (
        reconstruct(small, model, TEXT, **options, seed=seed) for seed in (1, 1, 2)
    )
    tokens = HELD_BACK[:50]
    assert (first.logits(tokens) == again.logits(tokens)).all()
    assert (first.logits(tokens) != other.logits(tokens)).any()


def test_what_does_not_fit_is_refused(pair):
    model, small = pair
    with pytest.raises(ValueError, match="inputs is 'both', expected 'quantized' or 'float'"):
        reconstruct(small, model, TEXT, inputs="both")
    with pytest.raises(ValueError, match="steps"):
        reconstruct(small, model, TEXT, steps=0)
    with pytest.raises(ValueError, match=r"learn has \['codes'\]"):
        reconstruct(small, model, TEXT, window=64, learn=["codes"])
    with pytest.raises(ValueError, match="expected a quantized layer"):
        reconstruct(model, model, TEXT, window=64)
