"""Objectives of a search against evaluations and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from searched_models import TOKENS, two_copies

import lowbitq as lq
from lowbitq.losses import diversity_loss
from lowbitq.search import Objective, Seen, Space

Q1 = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def models():
    model, small = two_copies()
    space = Space(small, {"*": {"scale1": (0.2, 1), "scale2": (0.2, 1)}})
    return model, small, space.apply({"* scale1": 0.8, "* scale2": 0.6})


def value_of(spec, model, student, layers=(Q1,)):
    return Objective(spec, Seen(model, TOKENS, layers))(student)


def test_divergence_and_perplexity_are_those_of_an_evaluation(models):
    model, _, student = models
    floats = student.copy()  # the divergence is between outputs of one head
    floats.embedding = model.embedding
    found = lq.evaluate(floats, TOKENS.ravel(), model, TOKENS.shape[1])
    assert value_of("kl", model, floats) == pytest.approx(float(found.kl), rel=1e-5)
    assert value_of("perplexity", model, floats) == pytest.approx(float(found.perplexity))


def test_the_error_of_blocks(models):
    model, _, student = models
    errors = []
    for window in TOKENS:
        hidden = model.embed(window)
        model.block_forward(0, hidden)
        before = hidden.copy()
        model.block_forward(1, hidden)
        turn = student.residual_rotation
        made = turn.apply(before)
        student.block_forward(1, made)
        error = turn.inverse(made).astype(float) - hidden
        errors.append(((error**2).sum(1) / (hidden.astype(float) ** 2).sum(1)).mean())
    assert value_of("block", model, student) == pytest.approx(np.mean(errors), rel=1e-3)
    assert value_of("block", model, student) > 0


def errors_of(model, student):
    """Errors of the two copies of layer Q1 that are due to rounded inputs, for each window."""
    for window in TOKENS:
        hidden = model.embed(window)
        model.block_forward(0, hidden)
        taps = {}
        student.block_forward(1, student.residual_rotation.apply(hidden), taps)
        layer = dict(student.linears())[Q1]
        W = layer.copies[0].tensor.dequantize()
        x = taps["qkv"]
        made = []
        for copy in layer.copies:
            step = copy.activation.scale
            made.append((np.clip(np.round(x / step), -7, 7) * step - x) @ W.T)
        yield made


def test_diversity_is_of_errors_due_to_rounding(models):
    model, _, student = models
    pairs = list(errors_of(model, student))
    expected = np.mean([diversity_loss(pair)[0] for pair in pairs])
    assert value_of("diversity", model, student) == pytest.approx(expected, rel=1e-3)
    expected = np.mean(
        [
            np.linalg.norm(a.T @ b) / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in (map(np.float64, pair) for pair in pairs)
        ]
    )
    assert value_of("orthogonality", model, student) == pytest.approx(expected, rel=1e-3)


def test_equal_copies_are_as_alike_as_can_be(models):
    model, small, student = models
    assert value_of("diversity", model, small) == pytest.approx(50 * math.log(2))
    assert value_of("diversity", model, student) < 10


def test_sums_and_functions(models):
    model, _, student = models
    parts = [value_of(name, model, student) for name in ("kl", "diversity")]
    found = value_of({"kl": 2, "diversity": 0.25}, model, student)
    assert found == pytest.approx(2 * parts[0] + 0.25 * parts[1])
    assert value_of(lambda one: one.nbytes, model, student) == student.nbytes
    seen = Seen(model, TOKENS, [Q1])
    assert Objective({"kl": 1, "block": 0.5}, seen).text == "kl + 0.5 block"
    assert Objective(max, seen).text == "max"


def test_windows_are_reported(models):
    model, _, student = models
    told = []
    objective = Objective("perplexity", Seen(model, TOKENS[:2], [Q1]))
    found = objective(student, lambda *step: told.append(step))
    first = lq.perplexity(student, TOKENS[0], TOKENS.shape[1])
    assert told == [(1, pytest.approx(float(first))), (2, found)]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("loss", "objective has 'loss', expected one of 'kl', 'perplexity'"),
        ({}, "objective is empty"),
        ({"kl": math.nan}, "'kl' times nan, expected a finite number"),
    ],
)
def test_unknown_objectives_are_refused(models, spec, said):
    with pytest.raises(ValueError, match=said):
        Objective(spec, Seen(models[0], TOKENS, [Q1]))


def test_diversity_needs_copies_that_round():
    model, floats = two_copies(bits=None, dynamic=True)
    with pytest.raises(ValueError, match="diversity is of copies that round their inputs"):
        value_of("diversity", model, floats)
    single = lq.compress(model, "int4g32", method="rtn")
    with pytest.raises(ValueError, match="no layer that changes has several copies"):
        value_of("diversity", model, single)
