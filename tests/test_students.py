"""lowbitq.students: what a student computes, its gradients, and what is stored of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from random_model import random_tokens
from student_models import (
    content,
    pair,
    tensors_of,
    with_activations,
    with_copies,
    with_head_norms,
)
from student_oracle import StudentOracle

from lowbitq import _core
from lowbitq.gradients import Pass
from lowbitq.linears import Copy, Linear, QuantizedLinear
from lowbitq.losses import Loss
from lowbitq.optimizers import AdamW
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


def backward(student, teacher, windows=(TOKENS,), keep="all"):
    """Add the gradient of the sum of the windows' mean divergences."""
    student.compose()
    runs = []
    for tokens in windows:
        run = Pass(student.model, tokens, keep=keep)
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


def moved(student, size=0.1):
    """Parameters away from the start, where factors of 1 would hide errors."""
    rng = np.random.default_rng(0)
    for p in student.parameters:
        p.value += rng.uniform(-size, size, p.value.shape).astype(np.float32)


def check_gradients(student, small, teacher, tokens=TOKENS[:16]):
    """Compare with differences of the float64 loss, along the gradient and a random direction."""
    backward(student, teacher, [tokens])
    exact = StudentOracle(small, student, teacher)
    logits = exact.logits(tokens)
    assert abs(student.model.logits(tokens) - logits).max() < 1e-4 * abs(logits).max()
    rng = np.random.default_rng(1)
    for p in student.parameters:
        size = np.linalg.norm(p.gradient)
        assert size > 0, p.name
        random = rng.standard_normal(p.value.shape) / p.value.size**0.5
        if p.kind == "rotation":  # which moves along R A only, A = -A^T
            random = (random - p.value @ random.T @ p.value) / 2
        for direction in (p.gradient / size, random):
            found = (p.gradient * direction).sum(dtype=float)
            expected = exact.slope(p.name, direction, tokens)
            assert abs(found - expected) <= 1e-3 * size, (p.name, found, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_central_differences(format):
    small, teacher = pair(f"{format} a32 + rank2", layers=1)
    student = Student(small, KINDS)
    moved(student)
    kinds = {p.kind for p in student.parameters}
    assert kinds >= set(KINDS) - {"offset", "level", "fusion", "activation", "rotation"}
    assert ("level" in kinds) == format.startswith("kmeans")
    check_gradients(student, small, teacher)


@pytest.mark.parametrize(
    ("format", "rotation"),
    [("int2g32", "hadamard"), ("int4tensor", "none"), ("int4g32sym", "orthogonal")],
)
def test_gradients_of_several_copies(format, rotation):
    small, teacher = pair(f"{format} a32 + rank2", rotation=rotation, layers=1)
    small = with_head_norms(with_copies(small))
    student = Student(small, KINDS)
    moved(student)
    names = [p.name for p in student.parameters]
    assert len(set(names)) == len(names)
    assert "model.layers.0.self_attn.q_proj.copies.1.scale" in names
    assert "model.layers.0.self_attn.k_proj.copies.1.scale" not in names, "the tensor is shared"
    check_gradients(student, small, teacher)


@pytest.mark.parametrize("format", ["int3g32", "kmeans2g32", "int4tensor"])
def test_gradients_of_rounded_inputs(format):
    """Few tokens and 4 bits, so that no input lies between two levels to a float32's precision."""
    small, teacher = pair(f"{format} + rank2", layers=1)
    small = with_copies(with_activations(small, 4))
    student = Student(small, KINDS)
    moved(student, 0.05)
    names = [p.name.removeprefix("model.layers.0.") for p in student.parameters]
    assert [name for name in names if ".activation." in name] == [
        "self_attn.q_proj.copies.0.activation.clip",
        "self_attn.o_proj.copies.0.activation.scale",
        "self_attn.o_proj.copies.2.activation.scale",  # of turned inputs
        "mlp.gate_proj.activation.clip",
        "mlp.gate_proj.activation.zero",
        "mlp.down_proj.activation.scale",
        "mlp.down_proj.activation.zero",
    ]
    check_gradients(student, small, teacher, TOKENS[:12])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_are_rounded_as_the_packed_model_does(format, bits):
    small = with_activations(pair(f"{format} + rank2", layers=1)[0], bits)
    student = Student(small, ["activation"])
    moved(student, 0.2)
    student.compose()
    finished = student.finish()
    for (name, layer), (_, linear) in zip(student.model.linears(), finished.linears(), strict=True):
        x = np.random.default_rng(0).standard_normal((30, layer.shape[1]), np.float32)
        y = np.empty((30, layer.shape[0]), np.float32)
        _core.linear_forward(layer.handle, x, y)
        packed = linear.forward(x)
        # Zero points meet sums of exact levels of a table there, here of levels in bytes.
        close = 1e-2 if linear.tensor.format.has_levels and "mlp" in name else 1e-5
        assert abs(y - packed).max() <= close * abs(packed).max(), name
        assert linear.copies[0].activation != dict(small.linears())[name].copies[0].activation
    heads = [finished.blocks[0].linears[name].handle for name in ("q_proj", "k_proj", "v_proj")]
    assert _core.linears_inputs(tuple(heads)) == 1, "a common input is still rounded once"


def test_clips_stay_in_their_range():
    small, teacher = pair("int4g32 a4", layers=1)
    student = Student(small, ["activation"])
    for value, clip in ((5, 1), (-3, 0.001)):
        for p in student.parameters:
            p.value[:] = value
        student.compose()
        clips = [linear.copies[0].activation.clip for _, linear in student.finish().linears()]
        assert clips == pytest.approx([clip] * len(clips))
        backward(student, teacher)
    with pytest.raises(ValueError, match="learn is activation, but the model has no such"):
        Student(pair("int4g32 a32", layers=1)[0], ["activation"])


def test_copies_that_have_not_changed_keep_their_bits():
    small = with_copies(pair("int2g32 + rank2")[0])
    again = Student(small, KINDS).finish()
    assert content(again) == content(small)
    assert len(tensors_of(again)) == len(tensors_of(small))
    assert np.array_equal(small.logits(TOKENS), again.logits(TOKENS))
    assert again.nbytes == small.nbytes


@pytest.mark.parametrize("options", [{}, {"rotation": "none"}])
def test_factors_are_folded_into_what_is_stored(options):
    """Powers of two are stored exactly, so that the finished model is the student."""
    small = with_copies(pair("int2g32 a32 + rank2", **options)[0])
    kinds = ["row", "fusion", "column"]
    student = Student(small, kinds)
    assert {p.kind for p in student.parameters} == set(kinds)
    rng = np.random.default_rng(0)
    for p in student.parameters:
        p.value *= rng.choice(np.float32([0.5, 1, 2]), p.value.shape)
        p.value[0] = 2
    student.compose()
    finished = student.finish()
    expected = student.model.logits(TOKENS)
    assert abs(small.logits(TOKENS) - expected).max() > 0.1 * abs(expected).max()
    assert abs(finished.logits(TOKENS) - expected).max() <= 2e-5 * abs(expected).max()
    assert content(finished)["codes"] == content(small)["codes"]
    assert len(tensors_of(finished)) == len(tensors_of(small)), "shared tensors are stored once"
    # Copies without a weight whose scales cannot take factors of rows: two of 16 bits each.
    grown = [
        dict(m.linears())[f"model.layers.0.self_attn.{name}"].nbytes
        for m in (finished, small)
        for name in ("k_proj", "o_proj", "q_proj", "v_proj")
    ]
    assert [a - b for a, b in zip(grown[:4], grown[4:], strict=True)] == [2 * 32, 2 * 64, 0, 0]


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_columns_are_those_of_the_layer_behind(rotation):
    """Trained factors of rows of v and up are, by GQA, the columns of o and down."""
    small, _ = pair("int4g32 a32 + rank2", rotation=rotation)
    student = Student(small, ["column"])
    free = ["self_attn.o_proj"] + ["mlp.down_proj"] * (rotation == "none")
    names = [f"model.layers.{i}.{name}.column" for i in range(2) for name in free]
    assert sorted(p.name for p in student.parameters) == sorted(names)
    moved(student, 0.5)
    student.compose()
    columns = small.copy()
    for p in student.parameters:
        name = p.name.removesuffix(".column")
        g = p.value
        if "o_proj" in name:  # head h reads values of key head h / 2
            g = np.repeat(g.reshape(2, 16), 2, axis=0).reshape(-1)
        linear = dict(small.linears())[name]
        columns.replace_linear(name, Linear(linear.dequantize() * g, linear.bias))
    expected = columns.logits(TOKENS)
    assert np.allclose(student.model.logits(TOKENS), expected, atol=2e-5 * abs(expected).max())


def with_turned_inputs(small):
    """The model with inputs of o and down rotated as it runs."""
    small = small.copy()
    for name, linear in small.linears():
        if name.endswith(("o_proj", "down_proj")):
            [copy] = linear.copies
            turned = replace(copy, rotation=Rotation(linear.shape[1]))
            small.replace_linear(name, linear.replace(copies=(turned,)))
    return small


@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("format", ["int2g32 a32", "int2g32 a32 + rank2"])
def test_gradients_do_not_depend_on_what_is_kept(format, head_norms):
    small, teacher = pair(format)
    if head_norms:
        small = with_head_norms(small)
    found = []
    for keep in ("all", "attention", "nothing"):
        student = Student(small, KINDS)
        rng = np.random.default_rng(0)
        for p in student.parameters:
            if p.kind in ("row", "bias"):
                p.value += rng.uniform(-0.2, 0.2, p.value.shape).astype(np.float32)
        backward(student, teacher, keep=keep)
        found.append([p.gradient for p in student.parameters])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert np.allclose(one, two, atol=2e-4 * abs(one).max())


def test_a_row_of_zero_weight_has_a_gradient():
    small, teacher = pair("int2g32 a32")
    student = Student(small, ["row"])
    for p in student.parameters:
        p.value[3] = 0
    backward(student, teacher)
    for p in student.parameters:
        assert p.gradient[3] != 0 or "k_proj" in p.name, p.name


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
    with pytest.raises(ValueError, match="learn is column, fusion, but the model has no such"):
        Student(with_turned_inputs(small), ["column", "fusion"])
    name, linear = next(iter(small.linears()))
    small.replace_linear(name, linear.replace(copies=linear.copies * 9))
    with pytest.raises(ValueError, match="copies has 9 gradients, expected at most 8"):
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


def test_paces_multiply_learning_rates_once():
    small, _ = pair("int2g32 a32 + rank2")
    other, _ = pair("int4g32 a32")
    for name, linear in other.linears():
        if name.endswith("v_proj"):
            small.replace_linear(name, linear)
    student = Student(small, ["scale", "norm", "adapter", "weight"], rounding="soft")
    before = {p.name: p.pace for p in student.parameters}
    student.set_paces({"*": 3.0, "int2*": 2.0, "*.o_proj": 0.5, "*layernorm": 0.25})
    factors = {p.name: p.pace / before[p.name] for p in student.parameters}
    for name, factor in factors.items():
        expected = 2.0
        if "v_proj" in name or name == "model.norm.norm":
            expected = 3.0
        elif "o_proj" in name:
            expected = 0.5
        elif "layernorm" in name:
            expected = 0.25
        assert factor == expected, name
    assert any("weight" in name for name in factors)
    for paces, message in [
        ({"*.gate": 2.0}, r"pace '\*.gate' matches no layer, norm or format"),
        ({"int2*": -1.0}, r"pace 'int2\*' is -1.0, expected a finite number of at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            student.set_paces(paces)


def test_a_pace_is_a_factor_of_a_layers_steps():
    small, teacher = pair("int2g32 a32")
    tokens, steps = random_tokens(48), []
    for paces in ({}, {"*layers.0.mlp.up_proj": 4.0}):
        student = Student(small, ["scale"])
        student.set_paces(paces)
        student.compose()
        run = Pass(student.model, tokens)
        hidden = teacher.hidden(tokens)
        run.loss(Loss.parse("kl"), teacher=teacher, teacher_hidden=hidden)
        student.backward([run])
        AdamW(student.parameters, {"scale": 1e-3}).step(1.0)
        steps.append({p.name: p.value - p.start for p in student.parameters})
    for name, step in steps[0].items():
        factor = 4 if "layers.0.mlp.up_proj" in name else 1
        assert np.allclose(steps[1][name], factor * step, rtol=1e-3, atol=2e-7), name
