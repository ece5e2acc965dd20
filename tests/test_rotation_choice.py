"""Rotations chosen by measured errors, and inputs for those of the residual stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq.calibration import Stream, calibrate
from lowbitq.compression import compress
from lowbitq.linears import QuantizedLinear
from lowbitq.models import load
from lowbitq.models.rotating import rotate
from lowbitq.models.slots import SLOTS, TAPS, name_in_block
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan
from lowbitq.procrustes import optimize_rotation
from lowbitq.quantizers import quantize
from lowbitq.rotation_choice import choose_rotations, residual_inputs
from lowbitq.rotations import Rotation

SHAPE = {"samples": 3, "window": 40}
PLAN = "int4g32 a4"


@pytest.fixture(scope="module")
def model():
    """Block 1 has an outlier channel at the inputs of q, k and v, which reads little of it."""
    model = random_model(5, layers=2)
    block = model.blocks[1]
    block.attention_norm[9] = 60
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = block.linears[name].weight.copy()
        weight[:, 9] /= 60
        block.linears[name] = block.linears[name].replace(weight=weight)
    return model


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(120, 2).reshape(3, 40)


@pytest.fixture(scope="module")
def found(model, tokens):
    return choose_rotations(model, tokens, PLAN, kinds=["none", "hadamard", "orthogonal"], **SHAPE)


def test_the_choice_is_no_worse_than_any_single_kind(found):
    for slots in TAPS.values():
        for index in range(2):
            names = [name_in_block(index, slot) for slot in slots]
            assert len({id(found.rotations[name]) for name in names}) == 1
            sums = {
                kind: sum(found.errors[name][kind] for name in names)
                for kind in ("none", "hadamard", "orthogonal")
            }
            assert min(sums, key=sums.get) == found.kinds[names[0]]
    assert str(found).splitlines()[-1].startswith("chosen")


def test_an_outlier_channel_is_rotated(found):
    kind = found.kinds["model.layers.1.self_attn.q_proj"]
    assert kind in ("hadamard", "orthogonal")
    assert found.rotations["model.layers.1.self_attn.q_proj"].kind == kind


@pytest.mark.parametrize("bits", ["a4", "a8", "a32"])
def test_errors_are_those_of_the_layers_that_run(model, tokens, bits):
    plan = LayerPlan.parse(f"int4g32 {bits}", Rounding(method="rtn"))
    found = choose_rotations(model, tokens, plan, **SHAPE)
    activation = {"a4": 4, "a8": 8, "a32": None}[bits]
    stream = Stream(model, tokens)
    for index in range(2):
        taps = {tap: [] for tap in TAPS}
        for seen in stream.taps(advance=True):
            for tap, x in seen.items():
                taps[tap].append(x.copy())
        for number, (tap, slots) in enumerate(TAPS.items()):
            x = np.concatenate(taps[tap])
            turn = Rotation(x.shape[1], stream=4 * index + number)
            for slot in slots:
                linear = model.blocks[index].linears[slot.name]
                y = x @ linear.weight.T
                for kind, rotation in (("none", None), ("hadamard", turn)):
                    weight = linear.weight if rotation is None else rotation.apply(linear.weight)
                    tensor = quantize(weight, "int4g32")
                    how = QuantizedLinear.of(tensor, activation_bits=activation).copies[0]
                    layer = QuantizedLinear((replace(how, rotation=rotation),))
                    error = np.square(layer.forward(x) - y).sum() / np.square(y).sum()
                    listed = found.errors[name_in_block(index, slot)][kind]
                    assert np.isclose(listed, error, rtol=1e-3), (slot.name, kind)


def test_a_model_with_own_rotations_is_compressed(model, tokens, found):
    turned = found.apply(model)
    expected = model.logits(tokens[0])
    assert np.allclose(turned.logits(tokens[0]), expected, atol=1e-4 * abs(expected).max())
    stats = calibrate(turned, tokens, hessians=True, **SHAPE)
    for how in ({"text": tokens, **SHAPE}, {"stats": stats}):
        small = compress(turned, PLAN, rotation="none", embedding=None, **how)
        for name, layer in small.linears():
            assert layer.rotation is found.rotations[name]
        errors = [record["relative_error"] for record in small.records.values()]
        assert len(errors) == 2 * len(SLOTS)
        assert max(errors) < 0.05


def test_optimized_rotations_are_tried_too(model, tokens):
    found = choose_rotations(model, tokens, PLAN, kinds=["hadamard", "optimized"], **SHAPE)
    assert all(list(errors) == ["hadamard", "optimized"] for errors in found.errors.values())


def test_residual_inputs_are_normalised_rows_of_all_blocks(model, tokens):
    x = residual_inputs(model, tokens, most=10**6, **SHAPE)
    assert x.shape == (2 * 2 * 120, 64)
    assert x.dtype == np.float32
    assert np.allclose(np.square(x).mean(1), 1, atol=1e-3)
    stream, expected = Stream(model, tokens), []
    for hidden in stream.hidden:
        expected.append(hidden / np.sqrt(np.square(hidden).mean(1, keepdims=True) + 1e-5))
    rows = {tuple(np.round(row, 2)) for row in x}
    assert {tuple(np.round(row, 2)) for row in np.concatenate(expected)[::7]} <= rows
    some = residual_inputs(model, tokens, most=100, **SHAPE)
    assert 60 < len(some) < 140
    assert np.array_equal(some, residual_inputs(model, tokens, most=100, **SHAPE))


def test_a_fitted_rotation_turns_the_model(model, tokens, tmp_path):
    x = residual_inputs(model, tokens, **SHAPE)
    turned = rotate(model, optimize_rotation(x, rounds=3).rotation, seed=1)
    expected = model.logits(tokens[0])
    assert np.allclose(turned.logits(tokens[0]), expected, atol=1e-3 * abs(expected).max())
    small = compress(turned, PLAN, text=tokens, rotation="none", embedding=None, **SHAPE)
    assert small.residual_rotation.kind == "matrix"
    small.save(tmp_path / "small")
    again = load(tmp_path / "small")
    assert np.array_equal(again.logits(tokens[0]), small.logits(tokens[0]))
    with pytest.raises(ValueError, match="rotated already"):
        compress(turned, PLAN, text=tokens, embedding=None, **SHAPE)


def test_refusals(model, tokens):
    with pytest.raises(ValueError, match="kind is 'givens'"):
        choose_rotations(model, tokens, PLAN, kinds=["givens"], **SHAPE)
    with pytest.raises(ValueError, match="expected one or several"):
        choose_rotations(model, tokens, PLAN, kinds=[], **SHAPE)
    with pytest.raises(ValueError, match="plan has no layer"):
        choose_rotations(model, tokens, {"a": PLAN}, **SHAPE)
    with pytest.raises(ValueError, match="rotates its input already"):
        choose_rotations(rotate(model), tokens, PLAN, **SHAPE)
    with pytest.raises(ValueError, match="rotated already"):
        residual_inputs(rotate(model), tokens, **SHAPE)
