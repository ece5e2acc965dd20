"""Policies of duplication against argsort, sums by hand and a scan of all thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from random_model import random_model

from lowbitq.costs import multiplications, stored_bytes
from lowbitq.duplication import grouped, threshold, top_k
from lowbitq.plans import CopyPlan, Plan
from lowbitq.scores import LayerScore, Sensitivity

COPY = "int2g32 hadamard residual"


def scores_of(values, names=None, level="linear"):
    """A Sensitivity with these scores."""
    names = names or [f"model.layers.{index}.mlp.up_proj" for index in range(len(values))]
    rows = tuple(
        LayerScore(name, "int2g32", 64, float(value), 0.1, 0.2, None, None, 0.3, 0.4)
        for name, value in zip(names, values, strict=True)
    )
    weights = {"int2g32": (0.6, 0.4, 0.0)}
    return Sensitivity(rows, level, 100.0, "mean", "minmax", weights, (1, 8), 0, 0.0)


def plan_for(scores):
    return Plan.uniform([row.layer for row in scores.rows], "int2g32", seed=5)


def copied(plan, count=2):
    return [name for name, layer in plan.layers.items() if len(layer.copies) == count]


def random_scores(seed, layers=30):
    return np.random.default_rng(seed).exponential(size=layers)


@pytest.mark.parametrize("seed", range(5))
def test_the_highest_scores_are_chosen(seed):
    values = random_scores(seed)
    scores = scores_of(values)
    plan = plan_for(scores)
    for options, expected in [({}, 8), ({"share": 0.1}, 3), ({"count": 30}, 30), ({"count": 0}, 0)]:
        made = top_k(scores, plan, COPY, **options)
        best = np.sort(np.argsort(-values)[:expected])
        assert copied(made) == [list(plan.layers)[index] for index in best]
        assert made.seed == 5
    assert not copied(plan)


def test_what_is_added_is_as_asked():
    scores = scores_of([1.0, 2.0])
    made = top_k(scores, plan_for(scores), "int2g32 + int4g32 residual a4", share=0.5)
    layer = made.layers["model.layers.1.mlp.up_proj"]
    assert str(layer) == "int2g32 + int2g32 + int4g32 residual a4"
    copy = CopyPlan("int3g32", mode="residual")
    made = top_k(scores, plan_for(scores), copy, count=1, by="quant")
    assert str(made.layers["model.layers.0.mlp.up_proj"]) == "int2g32 + int3g32 residual"


@pytest.mark.parametrize("limit", ["nbytes", "multiplications"])
@pytest.mark.parametrize("level", ["linear", "half", "block"])
def test_limits_count_what_is_added(limit, level):
    model = random_model(layers=4)
    shapes = {name: linear.shape for name, linear in model.linears()}
    names = list(
        dict.fromkeys(
            name.rsplit(".", ["linear", "half", "block"].index(level))[0] for name in shapes
        )
    )
    scores = scores_of(random_scores(1, len(names)), names, level)
    plan = Plan.uniform(shapes, "int2g32")
    cost = {"nbytes": stored_bytes, "multiplications": multiplications}[limit]

    def added(made):
        return sum(cost(made.layers[n], s) - cost(plan.layers[n], s) for n, s in shapes.items())

    counts = [added(top_k(scores, plan, COPY, count=count)) for count in range(len(names) + 1)]
    for most in np.linspace(0, 1.1 * counts[-1], 23).astype(int):
        made = top_k(scores, plan, COPY, model=model, **{limit: int(most)})
        fits = sum(one <= most for one in counts) - 1
        assert made == top_k(scores, plan, COPY, count=fits)


@pytest.mark.parametrize("groups", [1, 2, 3, 7])
@pytest.mark.parametrize("each", [1, 2])
def test_every_group_has_copies(groups, each):
    values = random_scores(3, 17)
    scores = scores_of(values)
    made = top_k(scores, plan_for(scores), COPY, count=0)
    made = grouped(scores, plan_for(scores), COPY, groups=groups, each=each)
    found = copied(made)
    assert len(found) == groups * each
    places = [list(made.layers).index(name) for name in found]
    parts = np.array_split(np.arange(17), groups)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        own = [place for place in places if place in part]
        assert sorted(own) == sorted(part[np.argsort(-values[part])[:each]])


@pytest.mark.parametrize("seed", range(100))
def test_the_threshold_of_a_scan(seed):
    """Random falling objectives, some scores equal; a linear scan is the reference."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 40, rng.integers(2, 60)) / 7
    scores = scores_of(values)
    plan, falling = plan_for(scores), np.sort(rng.exponential(size=len(values) + 1))[::-1]
    target = float(rng.choice(falling)) * rng.choice([1.0, 1.1])
    calls = []

    def objective(one):
        calls.append(len(copied(one)))
        return falling[calls[-1]]

    different = np.unique(values)[::-1]
    scan = [(math.inf, 0)] + [(level, int((values >= level).sum())) for level in different]
    fits = [(level, count) for level, count in scan if falling[count] <= target]
    if not fits:
        with pytest.raises(ValueError, match="but copies of all layers give"):
            threshold(scores, plan, COPY, objective, target)
    else:
        made, score = threshold(scores, plan, COPY, objective, target)
        level, count = fits[0]
        assert score == level
        assert len(copied(made)) == count
        assert all(
            (values[i] >= score) == (len(layer.copies) == 2)
            for i, layer in enumerate(made.layers.values())
        )
    assert len(calls) <= math.ceil(math.log2(len(values))) + 1
    assert len(set(calls)) == len(calls)


def two_formats():
    one = scores_of([1.0, 2.0])
    row = LayerScore(
        "model.layers.0.mlp.up_proj", "int3g32", 64, 1.0, 0.1, 0.2, None, None, 0.3, 0.4
    )
    weights = {"int2g32": (0.6, 0.4, 0.0), "int3g32": (0.6, 0.4, 0.0)}
    return Sensitivity((*one.rows, row), "linear", 100.0, "mean", "minmax", weights, (1, 8), 0, 0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 1.5}, "share is 1.5, expected 0 to 1"),
        ({"count": 3}, "count is 3, but there are only 2 layers"),
        ({"count": -1}, "count is -1, expected at least 0"),
        ({"count": 1, "nbytes": 9}, "count and nbytes are given, expected one limit"),
        ({"nbytes": 9}, "nbytes needs the model"),
        ({"by": "fisher"}, "fisher was not computed"),
        ({"format": "int9"}, "format is 'int9'"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    scores = scores_of([1.0, 2.0])
    with pytest.raises(ValueError, match=said):
        top_k(scores, plan_for(scores), COPY, **options)


def test_other_models_and_formats_are_refused():
    scores, other = scores_of([1.0, 2.0]), scores_of([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="scores are of another model"):
        top_k(scores, plan_for(other), COPY)
    with pytest.raises(ValueError, match="scores are of int2g32, int3g32: say which format"):
        top_k(two_formats(), plan_for(scores), COPY)
    with pytest.raises(ValueError, match="unknown format"):
        top_k(scores, plan_for(scores), "int9 residual")
    with pytest.raises(ValueError, match="the plan is for another model"):
        top_k(scores, plan_for(scores), COPY, nbytes=9, model=random_model(layers=1))
    with pytest.raises(ValueError, match="each is 2, but 2 groups of 2 layers have as few as 1"):
        grouped(scores, plan_for(scores), COPY, groups=2, each=2)
