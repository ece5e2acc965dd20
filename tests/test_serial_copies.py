"""Blocks that run several times: identities, saving, caches."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq.serial_copies import repeat_blocks

TOKENS = random_tokens(24, seed=4)


def through(model, *steps):
    """The hidden states behind some blocks; a step is (block, attention scale, MLP scale)."""
    hidden = model.embed(TOKENS)
    for index, attention, mlp in steps:
        one = model.copy()
        one.blocks[index].attention_scale = attention
        one.blocks[index].mlp_scale = mlp
        one.block_forward(index, hidden)
    return hidden


def behind(model, count):
    hidden = model.embed(TOKENS)
    for index in range(count):
        model.block_forward(index, hidden)
    return hidden


@pytest.mark.parametrize(("options", "steps"), [
    ({}, [(0, 1, 1), (1, 1, 1), (1, 1, 1)]),
    ({"times": 3}, [(0, 1, 1), *[(1, 1, 1)] * 3]),
    ({"mode": "half_step"}, [(0, 1, 1), (1, 0.5, 0.5), (1, 0.5, 0.5)]),
    ({"part": "attention"}, [(0, 1, 1), (1, 1, 0), (1, 1, 1)]),
    ({"part": "mlp", "mode": "half_step"}, [(0, 1, 1), (1, 1, 0.5), (1, 0, 0.5)]),
])  # fmt: skip
def test_it_is_the_composition(options, steps):
    model = random_model(layers=3)
    repeated = repeat_blocks(model, 1, **options)
    assert np.array_equal(behind(repeated, len(steps)), through(model, *steps))
    assert len(repeated.blocks) == len(steps) + 1
    assert len(model.blocks) == 3
    assert {block.mlp_scale for block in model.blocks} == {1}


def test_a_range_runs_as_a_group():
    model = random_model(layers=3)
    repeated = repeat_blocks(model, range(2))
    order = [0, 1, 0, 1, 2]
    assert np.array_equal(behind(repeated, 5), through(model, *[(i, 1, 1) for i in order]))


def test_half_steps_of_a_float_model_change_less_than_repeating():
    model = random_model(layers=4)
    before = behind(model, 4)
    changes = [
        np.linalg.norm(behind(repeat_blocks(model, 2, mode=mode), 5) - before)
        for mode in ("repeat", "half_step")
    ]
    assert changes[1] < changes[0]


def test_weights_are_stored_once_and_caches_are_their_own(tmp_path):
    small = lq.compress(random_model(layers=2), "int4g32", method="rtn")
    repeated = repeat_blocks(small, 1, mode="half_step")
    assert isinstance(repeated, lq.QuantizedModel)
    assert repeated.nbytes == small.nbytes
    repeated.save(tmp_path / "saved")
    loaded = lq.load(tmp_path / "saved")
    assert np.array_equal(loaded.hidden(TOKENS), repeated.hidden(TOKENS))
    sizes = []
    for name, model in (("a", small), ("b", repeated)):
        model.save(tmp_path / name)
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
    assert sizes[1] < 1.05 * sizes[0]
    whole = repeated.logits(TOKENS)
    cache = repeated.new_cache(len(TOKENS))
    for token in TOKENS:
        last = repeated.step([token], cache)
    assert np.allclose(np.ravel(last), whole[-1], atol=1e-4)


def test_refusals():
    model = random_model(layers=3)
    for options, said in (
        ({"blocks": 3}, r"blocks is \[3\], expected adjacent indices from 0 to 2"),
        ({"blocks": [0, 2]}, r"blocks is \[0, 2\]"),
        ({"blocks": []}, r"blocks is \[\]"),
        ({"blocks": 0, "times": 0}, "times is 0, expected at least 1"),
        ({"blocks": 0, "mode": "twice"}, "mode is 'twice', expected one of 'repeat', 'half_step'"),
        ({"blocks": range(2), "part": "mlp"}, "part is 'mlp' of 2 blocks, expected one block"),
    ):
        with pytest.raises(ValueError, match=said):
            repeat_blocks(model, **options)
