"""Hints: values by the formula, gradients by differences, and nothing for a weight of zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from random_model import random_tokens
from student_models import pair, with_head_norms

from lowbitq import _core
from lowbitq import hints as module
from lowbitq.attention_maps import AttentionMap
from lowbitq.distillation import distill, options_of
from lowbitq.gradients import Pass
from lowbitq.hints import Hints
from lowbitq.losses import attention_loss
from lowbitq.models.rotating import rotate
from lowbitq.models.slots import TO
from lowbitq.optimizers import RATES
from lowbitq.teachers import Teacher
from lowbitq.training import Training

WINDOWS = random_tokens(20 * 48, seed=9).reshape(20, 48)
QUICK = {"steps": 12, "batch": 4, "validation": 4, "every": 4, "warmup": 2}
BOTH = Hints((0, -1), features=0.7, relations=0.4)


def training(small, teacher, hints, learn=("norm",), **changes):
    others = {"steps": 4, "every": 4, "keep": 1, "warmup": 0, "seed": 0, "clip": 1.0, "decay": 0.0}
    arguments = {
        "learn": learn,
        "rounding": "nearest",
        "loss": "kl",
        "hints": hints,
        "temperatures": (),
        "batch": 2,
        "window": 48,
        "memory": None,
        "validation": 2,
        "rates": RATES,
        "top_k": None,
        "diversity": 0.0,
        "paces": None,
        "regularization": 0.0,
    }
    options, rows = options_of(small, teacher, WINDOWS, **arguments | others | changes)
    return Training(small, Teacher(teacher, rows, hints.states(2)), options, rows)


def states(model, tokens):
    """The residual stream behind each block in float64, in the basis of the embedding."""
    x, found = model.embed(tokens), []
    for index in range(len(model.blocks)):
        model.block_forward(index, x)
        plain = x.copy()
        if model.residual_rotation is not None:
            plain = model.residual_rotation.inverse(plain)
        found.append(plain.astype(np.float64))
    return found


def similarities(x):
    return x @ x.T / np.linalg.norm(x @ x.T)


def logs_of_attention(model, index, tokens):
    """Logarithms of the weights of a block, (heads, t, t), in float64 from its layers on."""
    block, config, taps = model.blocks[index], model.config, {}
    x = model.embed(tokens)
    for before in range(index):
        model.block_forward(before, x)
    model.block_forward(index, x, taps, steps=TO["qkv"])
    parts = []
    for name, norm in (("q_proj", block.query_norm), ("k_proj", block.key_norm)):
        layer = block.linears[name]
        y = np.empty((len(x), layer.shape[0]), np.float32)
        _core.linear_forward(layer.handle, taps["qkv"], y)
        y = y.reshape(len(x), -1, config.head_dim)
        if norm is not None:
            y = oracle.rmsnorm(y, norm, config.norm_eps)[0]
        parts.append(oracle.rope(y, config.rope_frequencies()[0], 0)[0])
    return oracle.attention_logs(*parts)


def test_values_are_those_of_the_formula():
    small, teacher = pair()
    assert small.residual_rotation is not None, "the test is of two bases"
    run = training(small, teacher, BOTH)
    terms = run._gradient([3, 5], run.options.loss_at(1))
    features, relations = [], []
    for window in (3, 5):
        mine = states(run.student.model, WINDOWS[window])
        theirs = states(teacher, WINDOWS[window])
        for index in (0, 1):
            x, y = mine[index], theirs[index]
            features.append((((x - y) ** 2).sum(1) / (y**2).sum(1)).mean())
            relations.append(((similarities(x) - similarities(y)) ** 2).sum())
    assert terms["features"] == pytest.approx(np.mean(features), rel=1e-4)
    assert terms["relations"] == pytest.approx(np.mean(relations), rel=1e-3)


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, -1)])
def test_attention_is_compared_by_the_formula(blocks):
    small, teacher = pair()
    teacher = with_head_norms(teacher)
    run = training(small, teacher, Hints(blocks, attention=0.3))
    terms = run._gradient([3, 5], run.options.loss_at(1))
    expected = []
    for window in (3, 5):
        for index in {block % 2 for block in blocks}:
            ours, theirs = (
                logs_of_attention(model, index, WINDOWS[window])
                for model in (run.student.model, teacher)
            )
            expected.append(attention_loss(ours, theirs)[0])
    assert terms["attention"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert set(terms) == {"predictions", "attention"}


def test_a_map_is_the_same_computed_again():
    _, teacher = pair()
    teacher = with_head_norms(teacher)
    for keep in ("all", "attention", "nothing"):
        run = Pass(teacher, WINDOWS[0], keep=keep)
        for index in (0, 1):
            before = run.behind(0) if index else teacher.embed(WINDOWS[0])
            found, again = run.attention(index), AttentionMap.of(teacher, index, before)
            assert all(
                np.array_equal(getattr(found, part), getattr(again, part))
                for part in ("q", "k", "log_sum")
            )
            assert (found.divergence(again) == 0).all()


@pytest.mark.parametrize(
    "hints",
    [
        Hints((0,), features=1.0),
        Hints((0, 1), relations=1.0),
        Hints((-1,), 0.5, 2.0),
        BOTH,
        Hints((0, 1), attention=5.0),
        Hints((1,), 0.5, 0.2, 2.0),
    ],
)
def test_gradient_is_that_of_differences(hints):
    small, teacher = pair()
    run = training(small, teacher, hints, learn=("norm", "scale", "adapter"))
    loss, weights = run.options.loss_at(1), run.options.weights

    def total():
        terms = run._gradient([0, 7], loss)
        return sum(weights[name] * terms[name] for name in weights)

    total()
    gradients = [p.gradient.copy() for p in run.student.parameters]
    size = np.sqrt(sum(np.sum(np.square(g, dtype=float)) for g in gradients))
    sides = []
    for h in (3e-2, -3e-2):
        for p, gradient in zip(run.student.parameters, gradients, strict=True):
            p.value[:] = p.start + np.float32(h / size) * gradient
        sides.append(total())
    assert (sides[0] - sides[1]) / 6e-2 == pytest.approx(size, rel=0.02)


def test_the_loss_is_the_weighted_sum():
    small, teacher = pair()
    seen = []
    options = {"hints": BOTH, "regularization": 1e-3, "learn": ["norm"], **QUICK}
    learned = distill(small, teacher, WINDOWS, progress=seen.append, **options)
    weights = {"predictions": 1, "features": 0.7, "relations": 0.4, "regularization": 1e-3}
    for found in seen:
        assert found.terms.keys() == weights.keys()
        assert found.loss == pytest.approx(sum(weights[k] * v for k, v in found.terms.items()))
    assert learned.provenance["distillation"]["steps"][3] == {
        "step": 4,
        "loss": seen[3].loss,
        "norm": seen[3].norm,
        **seen[3].terms,
    }


@pytest.mark.parametrize(
    ("hints", "features", "relations"),
    [(Hints((0, 1)), 0, 0), (Hints((0, 1), features=1.0), 24, 0), (Hints((1,), 0, 1.0), 0, 12)],
)
def test_a_zero_weight_is_not_computed(hints, features, relations, monkeypatch):
    calls = {"feature_loss": 0, "relation_loss": 0, "embed": 0}

    def counting(name, function):
        def counted(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return counted

    small, teacher = pair()
    for name in ("feature_loss", "relation_loss"):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    monkeypatch.setattr(
        type(teacher), "block_forward", counting("embed", type(teacher).block_forward)
    )
    options = {"learn": ["norm"], **QUICK, "steps": 3}
    learned = distill(small, teacher, WINDOWS, hints=hints, **options)
    assert (calls["feature_loss"], calls["relation_loss"]) == (features, relations)
    assert (calls["embed"] > 0) == bool(hints)
    if not hints:
        plain = distill(small, teacher, WINDOWS, **options)
        assert np.array_equal(plain.logits(WINDOWS[0]), learned.logits(WINDOWS[0]))


def test_hints_teach():
    small, teacher = pair()

    def distance(model):
        return np.mean(
            [
                ((x - y) ** 2).sum() / (y**2).sum()
                for x, y in zip(*(states(m, WINDOWS[-1]) for m in (model, teacher)), strict=True)
            ]
        )

    options = {"learn": ["norm", "scale"], "loss": "1e-6 kl", **QUICK, "steps": 20}
    with_hints = distill(small, teacher, WINDOWS, hints=Hints((0, 1), features=5.0), **options)
    assert distance(with_hints) < 0.95 * distance(small)


def test_attention_is_taught():
    small, teacher = pair()
    seen = []
    options = {"learn": ["adapter", "scale"], "loss": "1e-6 kl", **QUICK, "steps": 24}
    hints, rates = Hints((0, 1), attention=5.0), {"adapter": 3e-3, "scale": 3e-3}
    distill(small, teacher, WINDOWS, hints=hints, rates=rates, progress=seen.append, **options)
    curve = [found.terms["attention"] for found in seen]
    assert np.mean(curve[-4:]) < 0.85 * np.mean(curve[:4])  # four steps see each window once


def test_what_does_not_fit_is_refused():
    small, teacher = pair()
    for hints, message in [
        (Hints((2,), features=1.0), "blocks has 2, expected -2 to 1"),
        (Hints((-3,)), "blocks has -3, expected -2 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            distill(small, teacher, WINDOWS, hints=hints, **QUICK)
    with pytest.raises(ValueError, match="features is -1, expected a finite number of at least 0"):
        Hints(features=-1)
    with pytest.raises(ValueError, match="blocks is empty"):
        Hints(())
    other = teacher.copy()
    other.blocks = other.blocks[:1]
    other.config = replace(teacher.config, layers=1)
    with pytest.raises(ValueError, match="the model has 2 of width 64, the teacher 1 of 64"):
        distill(small, other, WINDOWS, hints=BOTH, **QUICK)


def test_another_number_of_heads_is_refused():
    small, teacher = pair()
    teacher = teacher.copy()
    teacher.config = replace(teacher.config, heads=2, kv_heads=1, head_dim=32)
    with pytest.raises(ValueError, match="teacher has 2 heads, the model 4"):
        distill(small, teacher, WINDOWS, hints=Hints(attention=0.1), **QUICK)
    with pytest.raises(ValueError, match="attention is -1, expected a finite number of at least 0"):
        Hints(attention=-1)


def test_a_rotated_teacher_is_refused():
    small, teacher = pair()
    with pytest.raises(ValueError, match="teacher is rotated"):
        distill(small, rotate(teacher, "hadamard"), WINDOWS, hints=BOTH, **QUICK)
