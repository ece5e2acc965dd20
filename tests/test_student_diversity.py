"""L_diversity of a student: its value by dense matrices, its gradient by differences."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_tokens
from student_models import content, pair, with_copies
from test_hints import training

from lowbitq.distillation import distill
from lowbitq.hints import Hints
from lowbitq.linears import Linear
from lowbitq.models.rotating import rotate
from lowbitq.models.slots import SLOTS
from lowbitq.student_diversity import averaged_layers

WINDOWS = random_tokens(20 * 48, seed=9).reshape(20, 48)
QUICK = {"steps": 12, "batch": 4, "validation": 4, "every": 4, "warmup": 2}
TWO = "int2g32 a32 + int2g32 a32 hadamard"


def dense(copy):
    """The matrix of a copy in the basis of the layer's inputs, with its weights."""
    [rows], cols = copy.weight.shape, copy.tensor.cols
    eye = np.eye(cols, dtype=np.float32)
    turned = eye if copy.rotation is None else copy.rotation.apply(eye).T
    matrix = copy.tensor.dequantize().astype(float) @ turned
    return copy.weight[:, None] * matrix.reshape(rows, cols)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_value_is_that_of_the_errors(rotation):
    small, teacher = pair(TWO, rotation=rotation)
    assert len(averaged_layers(small)) == 14
    run = training(small, teacher, Hints(), learn=("scale",), diversity=0.3)
    terms = run._gradient([3, 5], run.options.loss_at(1))
    floats = rotate(teacher, rotation, small.plan.seed)
    values = []
    for window in (3, 5):
        x = small.embed(WINDOWS[window])
        for index, (block, known) in enumerate(zip(small.blocks, floats.blocks, strict=True)):
            taps = {}
            run.student.model.block_forward(index, x, taps)
            for slot in SLOTS:
                linear = known.linears[slot.name]
                inputs = taps[slot.tap]
                outputs = Linear(linear.weight, rotation=linear.rotation).forward(inputs)
                errors = [
                    inputs @ dense(copy).T - copy.weight * outputs
                    for copy in block.linears[slot.name].copies
                ]
                rho = np.corrcoef([e.reshape(-1) for e in errors])
                values.append(-np.log(np.linalg.det(rho)))
    assert terms["diversity"] == pytest.approx(np.mean(values), rel=1e-3)


@pytest.mark.parametrize("learn", [("scale", "offset"), ("row", "fusion")])
def test_gradient_is_that_of_differences(learn):
    """In the first layers, whose inputs do not learn."""
    small, teacher = pair("int2g32 a32", biases=False)
    for name, linear in pair(TWO, biases=False)[0].linears():
        if "layers.0.self_attn" in name and "o_proj" not in name:
            small.replace_linear(name, linear)
    assert averaged_layers(small) == [(0, name) for name in ("q_proj", "k_proj", "v_proj")]
    run = training(small, teacher, Hints(), learn=learn, diversity=1e3, loss="1e-9 kl")
    loss = run.options.loss_at(1)
    run._gradient([0, 7], loss)
    parameters = [p for p in run.student.parameters if ".copies." in p.name]
    assert {p.kind for p in parameters} == set(learn)
    gradients = [p.gradient / 1e3 for p in parameters]
    size = np.sqrt(sum(np.sum(np.square(g, dtype=float)) for g in gradients))
    assert size > 0
    sides = []
    for h in (1e-2, -1e-2):
        for p, gradient in zip(parameters, gradients, strict=True):
            p.value[:] = p.start + np.float32(h / size) * gradient
        sides.append(run._gradient([0, 7], loss)["diversity"])
    assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(size, rel=2e-3)


def test_copies_are_taught_to_differ():
    small, teacher = pair(TWO)
    ends = []
    for diversity in (1e-9, 1.0):
        seen = []
        options = {"learn": ["scale", "offset"], **QUICK, "steps": 20, "diversity": diversity}
        learned = distill(small, teacher, WINDOWS, progress=seen.append, **options)
        ends.append(np.mean([found.terms["diversity"] for found in seen[-4:]]))
    assert ends[1] < 0.9 * ends[0]
    for found in seen:
        assert found.loss == pytest.approx(found.terms["predictions"] + found.terms["diversity"])
    assert content(learned)["codes"] == content(small)["codes"]


def test_a_weight_of_zero_changes_nothing():
    small, teacher = pair(TWO)
    options = {"learn": ["scale"], **QUICK, "steps": 4}
    one = distill(small, teacher, WINDOWS, **options)
    two = distill(small, teacher, WINDOWS, diversity=0.0, **options)
    assert content(one) == content(two)
    assert "diversity" not in one.provenance["distillation"]["steps"][0]


def test_what_does_not_fit_is_refused():
    small, teacher = pair()
    with pytest.raises(ValueError, match=r"diversity is 0\.1, but no layer averages copies"):
        distill(small, teacher, WINDOWS, diversity=0.1, **QUICK)
    residual, _ = pair("int2g32 a32 + int2g32 a32 residual")
    shared, _ = pair("int2g32 a4 + int2g32 a4 hadamard shared")
    for model in (residual, shared, with_copies(small)):
        assert averaged_layers(model) == []
    two, _ = pair(TWO)
    with pytest.raises(ValueError, match="diversity is -1, expected a finite number"):
        distill(two, teacher, WINDOWS, diversity=-1, **QUICK)
    two.plan = None
    with pytest.raises(ValueError, match="no plan with its rotations"):
        distill(two, teacher, WINDOWS, diversity=0.1, **QUICK)
