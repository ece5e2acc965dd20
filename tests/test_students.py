"""lowbitq.students: what a student computes, its gradients, and what is stored of it."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_tokens
from student_models import content, pair

from lowbitq import _core
from lowbitq.gradients import Pass
from lowbitq.linears import Copy, QuantizedLinear
from lowbitq.losses import Loss
from lowbitq.rotations import Rotation
from lowbitq.students import KINDS as ALL_KINDS
from lowbitq.students import Student

TOKENS = random_tokens(40, seed=4)
KINDS = [kind for kind in ALL_KINDS if kind != "weight"]  # which tests/test_roundings.py tests
FORMATS = [
    "int2g32",
    "int4g32sym",
    "int2g16s4",
    "int3g32s8",
    "trellis2g32",
    "lattice2g32",
    "kmeans2g32",
    "nf4g32",
    "int4tensor",
    "int4tensorsym",
    "binary",
]


def loss_of(student, teacher, tokens=TOKENS):
    """Mean divergence in nats, in float64 from float32 logits."""
    student.compose()
    log_p, log_q = (
        x - np.log(np.exp(x).sum(1, keepdims=True))
        for x in (m.logits(tokens).astype(np.float64) for m in (teacher, student.model))
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(1).mean()


def backward(student, teacher, windows=(TOKENS,)):
    """Add the gradient of the sum of the windows' mean divergences."""
    student.compose()
    runs = []
    for tokens in windows:
        run = Pass(student.model, tokens)
        run.loss(
            Loss.parse("kl"),
            teacher=teacher,
            teacher_hidden=teacher.hidden(tokens),
            weights=np.full(len(tokens), 1 / len(tokens), np.float32),
            final_norm=student.final_norm_gradient,
        )
        runs.append(run)
    student.backward(runs)


@pytest.mark.parametrize("format", FORMATS)
def test_a_student_begins_as_the_quantized_model(format):
    small, _ = pair(f"{format} a32 + rank2")
    student = Student(small, KINDS)
    student.compose()
    expected = small.logits(TOKENS)
    assert np.allclose(student.model.logits(TOKENS), expected, atol=2e-5 * abs(expected).max())


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_has_not_changed_keeps_its_bits(format, rotation):
    small, _ = pair(f"{format} + rank2", rotation=rotation, layers=1)
    student = Student(small, KINDS)
    again = student.finish()
    assert content(again) == content(small)
    for (name, one), (_, two) in zip(small.linears(), again.linears(), strict=True):
        assert np.array_equal(one.tensor.panels, two.tensor.panels), name
    assert np.array_equal(small.logits(TOKENS), again.logits(TOKENS))
    assert (again.nbytes, again.plan, again.records) == (small.nbytes, small.plan, small.records)


@pytest.mark.parametrize("format", FORMATS)
def test_what_has_changed_is_stored(format):
    """The finished model is the student, up to the rounding of what is stored."""
    small, _ = pair(f"{format} a32 + rank2")
    student = Student(small, KINDS)
    rng = np.random.default_rng(0)
    for p in student.parameters:
        p.value += rng.uniform(-0.05, 0.05, p.value.shape).astype(np.float32)
    student.compose()
    finished = student.finish()
    assert content(finished)["codes"] == content(small)["codes"]
    assert finished.bits_per_weight == pytest.approx(small.bits_per_weight, abs=0.6)
    for (name, layer), (_, linear) in zip(student.model.linears(), finished.linears(), strict=True):
        expected = layer_matrix(layer)
        steps = {16: 2.0**-9, 8: 2.0**-4, 4: 0.5, 0: 2.0**-9}[linear.tensor.format.scale_bits]
        error = np.linalg.norm(linear.dequantize() - expected) / np.linalg.norm(expected)
        assert error < steps, name
        assert np.array_equal(linear.bias, layer.bias)


def layer_matrix(layer):
    """The matrix of a student's layer, from its answers to unit vectors."""
    y = np.empty((layer.shape[1], layer.shape[0]), np.float32)
    _core.linear_forward(layer.handle, np.eye(layer.shape[1], dtype=np.float32), y)
    return (y if layer.bias is None else y - layer.bias).T


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_central_differences(format):
    small, teacher = pair(f"{format} a32 + rank2")
    student = Student(small, KINDS)
    rng = np.random.default_rng(0)
    for p in student.parameters:  # away from the start, where factors of 1 would hide errors
        p.value += rng.uniform(-0.1, 0.1, p.value.shape).astype(np.float32)
    backward(student, teacher)
    assert {p.kind for p in student.parameters} >= set(KINDS) - {"offset", "level"}
    assert ("level" in {p.kind for p in student.parameters}) == format.startswith("kmeans")
    for p in student.parameters:
        size = np.linalg.norm(p.gradient)
        start = p.value.copy()
        losses = []
        step = 1e-2 * min(1, np.linalg.norm(start) + 1)
        for sign in (1, -1):
            p.value[:] = start + np.float32(sign * step / size) * p.gradient
            losses.append(loss_of(student, teacher))
        p.value[:] = start
        slope = (losses[0] - losses[1]) / (2 * step)
        # The mean of float32 logits' losses is known to 1e-6.
        assert slope == pytest.approx(size, rel=0.02, abs=1e-6 / step), p.name


def test_gradients_of_windows_add_up():
    small, teacher = pair()
    windows = [TOKENS, TOKENS[::-1].copy()]
    together = Student(small, KINDS)
    backward(together, teacher, windows)
    alone = Student(small, KINDS)
    for tokens in windows:
        backward(alone, teacher, [tokens])
    for one, two in zip(together.parameters, alone.parameters, strict=True):
        assert np.allclose(one.gradient, two.gradient, atol=1e-5 * abs(two.gradient).max())


def test_a_teacher_that_agrees_has_no_gradient():
    small, _ = pair()
    student = Student(small, KINDS)
    student.compose()
    backward(student, student.model)
    assert loss_of(student, student.model) == 0
    assert max(abs(p.gradient).max() for p in student.parameters) < 1e-6


def test_rows_with_rotated_outputs_become_weights():
    """A factor of the outputs is none of the rows of the weights behind a rotation."""
    small, _ = pair("int4g32 a32", layers=1)
    name, linear = next(iter(small.linears()))
    [copy] = linear.copies
    turned = Copy(copy.tensor, copy.rotation, Rotation(64, seed=5), copy.activation)
    small.replace_linear(name, QuantizedLinear((turned,), linear.bias))
    student = Student(small, ["row"])
    p = next(p for p in student.parameters if p.name == f"{name}.row")
    p.value[:] = np.linspace(0.5, 1.5, 64)
    finished = dict(student.finish().linears())[name]
    assert np.array_equal(finished.tensor.panels, copy.tensor.panels)
    expected = p.value[:, None] * turned.dequantize()
    assert np.allclose(finished.dequantize(), expected, atol=1e-3 * abs(expected).max())


def test_refusals():
    small, teacher = pair("int4g32 a32", biases=False, layers=1)
    with pytest.raises(ValueError, match=r"learn has \['colour'\], expected some of scale, "):
        Student(small, ["colour"])
    with pytest.raises(ValueError, match="learn is adapter, bias, but the model has no such"):
        Student(small, ["bias", "adapter"])
    with pytest.raises(ValueError, match="learn is nothing, but"):
        Student(small, [])
    with pytest.raises(ValueError, match="q_proj is a Linear, expected a quantized layer"):
        Student(teacher, ["scale"])
    name, linear = next(iter(small.linears()))
    small.replace_linear(name, linear.replace(copies=linear.copies * 2))
    with pytest.raises(ValueError, match="q_proj has 2 copies, expected one"):
        Student(small, ["scale"])


def test_the_given_model_does_not_change():
    small, _ = pair()
    before, logits = content(small), small.logits(TOKENS)
    student = Student(small, KINDS)
    for p in student.parameters:
        p.value += np.float32(0.1)
    student.compose()
    student.finish()
    assert content(small) == before
    assert np.array_equal(small.logits(TOKENS), logits)
