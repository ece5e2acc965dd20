"""plan(): never above the budget, never worse than any rival; fronts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq import budgets
from lowbitq.budgets import choose, front
from lowbitq.calibration import calibrate
from lowbitq.copies import LayerInputs
from lowbitq.costs import multiplications, stored_bytes
from lowbitq.encoding import encode
from lowbitq.linears import Copy, Linear, QuantizedLinear
from lowbitq.plans import LayerPlan, Plan
from lowbitq.prices import Prices
from lowbitq.quantizers import quantize
from lowbitq.rotations import Rotation

CANDIDATES = ("int2g64", "int3g64", "int2g64 + int2g64 residual", "int2g64 + rank8", "int4g64")
SHAPES = [(64, 64), (32, 64), (96, 64), (64, 128)]


def made_up(seed=0, layers=7, candidates=CANDIDATES):
    """Prices with what real ones have: layers differ by two orders of magnitude."""
    rng = np.random.default_rng(seed)
    plans = tuple(map(LayerPlan.parse, candidates))
    shapes = [SHAPES[index % 4] for index in range(layers)]
    errors = {"int2g64": 0.1, "int3g64": 0.03, CANDIDATES[2]: 0.012, CANDIDATES[3]: 0.07}
    typical = np.array([errors.get(name, 0.009) for name in candidates])
    kl = rng.lognormal(0, 1.5, (layers, 1)) * typical * rng.lognormal(0, 0.2, (layers, len(plans)))
    return Prices(
        tuple(f"model.layers.{index}.mlp.up_proj" for index in range(layers)),
        plans,
        kl,
        np.array([[stored_bytes(plan, shape) for plan in plans] for shape in shapes]),
        np.array([[multiplications(plan, shape) for plan in plans] for shape in shapes]),
        np.array([rows * cols for rows, cols in shapes]),
        5000,
        Plan({}, seed=3),
        "measured",
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_other_plan_is_better(seed):
    """Brute force over all plans of seven layers and four candidates."""
    found = made_up(seed, candidates=CANDIDATES[:4])
    every = np.array(list(product(range(4), repeat=7)))
    nbytes = found.nbytes[np.arange(7), every].sum(1)
    kl = found.kl[np.arange(7), every].sum(1)
    for bits in (2.6, 3.0, 3.7):
        made = choose(found, bits=bits)
        assert made.outcome.bits <= bits
        fits = 8 * nbytes <= bits * found.parameters.sum()
        assert made.outcome.kl == pytest.approx(kl[fits].min(), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_rivals_never_win(seed):
    found = made_up(seed, layers=30)
    for bits in (2.5, 2.75, 3.1, 4.0, 5.0):
        made = choose(found, bits=bits)
        uniform, single, unlimited = made.rivals.values()
        assert made.outcome.kl <= single.kl <= uniform.kl * (1 + 1e-12)
        assert max(uniform.bits, single.bits, made.outcome.bits) <= bits
        assert unlimited.multiplications <= made.outcome.multiplications
        assert unlimited.kl <= single.kl
        for one in (single, unlimited):
            assert not any("residual" in text for text in one.layers)
        assert sum(made.outcome.layers.values()) == 30
        assert len(uniform.layers) == 1


def test_without_copies_among_the_candidates_there_is_nothing_to_compare():
    found = made_up(candidates=CANDIDATES[2:3])
    made = choose(found, bits=5.0)
    assert made.rivals["uniform"] == made.outcome
    assert made.rivals["without copies, same bytes"] is None
    assert "nothing fits" in str(made)
    assert made.comparison()["without copies, same bytes"] is None


def test_a_size_is_that_of_the_whole_model():
    found = made_up()
    made = choose(found, size=5000 + int(found.nbytes[:, 1].sum()))
    assert made.outcome.size == made.outcome.nbytes + 5000 <= 5000 + found.nbytes[:, 1].sum()
    same = choose(found, bits=8 * found.nbytes[:, 1].sum() / found.parameters.sum())
    assert made == same


def test_it_is_a_plan():
    made = choose(made_up(), bits=3.0)
    assert isinstance(made, Plan)
    assert (made.seed, len(made.layers)) == (3, 7)
    again = Plan.from_json(made.to_json())
    assert type(again) is Plan
    assert made == again
    assert again == made
    assert hash(made) == hash(again)
    assert made != replace(again, seed=4)
    assert made.comparison()["plan"]["kl"] == made.outcome.kl


def test_copies_cost_what_they_store():
    """Formulas of bytes against layers made by hand."""
    W = np.random.default_rng(0).standard_normal((96, 64), dtype=np.float32)
    tensor, half = quantize(W, "int2g64"), np.full(96, 0.5, np.float32)
    adapter = np.full((96, 3), 0.5, np.float32), np.full((64, 3), 0.5, np.float32)
    turn = Rotation(64, seed=1)
    for text, copies, factors in [
        ("int2g64", (Copy(tensor),), None),
        ("int2g64 + int2g64 residual", (Copy(tensor), Copy(quantize(W, "int2g64"))), None),
        (
            "int2g64 + int2g64 hadamard shared + rank3",
            (Copy(tensor, weight=half), Copy(tensor, turn, weight=half)),
            adapter,
        ),
    ]:
        plan, layer = LayerPlan.parse(text), QuantizedLinear(copies, adapter=factors)
        assert stored_bytes(plan, W.shape) == layer.nbytes
    own = stored_bytes(LayerPlan.parse("int2g64 + int2g64 orthogonal"), W.shape)
    assert own == 2 * tensor.nbytes + 2 * 2 * 96 + 4 * 64 * 64


@pytest.mark.parametrize(
    "text",
    [
        "int2g32 + int3g32 hadamard",
        "int2g32 + int2g32 shared",
        "int2g32 + int2g32 hadamard residual + rank2",
        "int2g32 + int2g32 + int3g32 residual",
        "int2g32 hadamard + int2g32 hadamard + int2g32",
    ],
)
def test_encoded_copies_cost_what_was_planned(text):
    linear = Linear(np.random.default_rng(1).standard_normal((40, 64), dtype=np.float32))
    plan = LayerPlan.parse(text)
    layer, _ = encode(linear, LayerInputs(np.eye(64)), plan)
    assert stored_bytes(plan, linear.shape) == layer.nbytes


def test_a_whole_run():
    """The model that a plan makes has the bits that it says."""
    model, tokens = random_model(layers=2), random_tokens(3 * 40).reshape(3, 40)
    stats = calibrate(model, tokens, hessians=True)
    formats = ["int2g32", "int3g32", "int2g32 + rank2", "int2g32 + int2g32 hadamard residual"]
    how = {"formats": [*formats, "int2g32 + int2g32 hadamard", "int6g32"], "measure": 1}
    made = lq.plan(model, stats, bits=4.1, rows=None, **how)
    small = lq.compress(model, made, stats)
    assert small.bits_per_weight == pytest.approx(made.outcome.bits, rel=1e-12)
    assert small.bits_per_weight <= 4.1
    assert small.nbytes == made.outcome.size
    assert made.outcome.kl < made.rivals["uniform"].kl
    sized = lq.plan(model, stats, size=small.nbytes, rows=None, **how)
    assert sized.outcome.kl <= made.outcome.kl


def test_a_front_falls():
    found = made_up(layers=20)
    made = front(found, [4.0, 2.5, 3.0])
    assert list(made.plans) == [2.5, 3.0, 4.0]
    kl = [one.outcome.kl for one in made.plans.values()]
    assert kl == sorted(kl, reverse=True)
    assert made.alike["int3g64"].kl == pytest.approx(found.kl[:, 1].sum())
    values = made.to_dict()
    assert [one["budget"] for one in values["plans"]] == [2.5, 3.0, 4.0]
    assert str(made).count("at most") == 3


def test_a_front_is_drawn():
    pytest.importorskip("matplotlib")
    made = front(made_up(), [2.6, 3.0, 4.0])
    axes = made.plot()
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    outcomes = [one.outcome for one in made.plans.values()]
    assert drawn[0] == ([one.bits for one in outcomes], [one.kl for one in outcomes])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["per layer", "per layer, without copies"]
    assert len(drawn) == 2 + len(CANDIDATES)


def test_a_front_as_a_frame():
    pytest.importorskip("pandas")
    frame = front(made_up(), [2.6, 4.0]).to_frame()
    assert len(frame) == 2 * 4
    assert set(frame["what"]) == {"plan", *choose(made_up(), bits=4.0).rivals}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "bits is None and size is None, expected one of them"),
        ({"bits": 3.0, "size": 9000}, "expected one of them"),
        ({"bits": 2.4}, "bits is 2.4, but the smallest candidates take 2."),
        ({"size": 6000}, "size is 6000, but the smallest candidates take "),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(budget, said):
    with pytest.raises(ValueError, match=said):
        choose(made_up(), **budget)


def test_no_budget_is_refused_before_work_starts():
    with pytest.raises(ValueError, match="expected one of them"):
        budgets.plan(random_model(), "text")
    with pytest.raises(ValueError, match="bits is empty"):
        front(made_up(), [])
