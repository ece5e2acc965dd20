"""range_test(): rates that grow until the loss blows up, and one that trains well."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_tokens
from student_models import content, pair

from lowbitq.distillation import distill
from lowbitq.optimizers import RATES
from lowbitq.range_test import range_test

WINDOWS = random_tokens(20 * 48, seed=9).reshape(20, 48)


def test_the_rate_that_it_finds_trains_better_than_its_neighbours():
    small, teacher = pair("int2g32 a32")
    before = content(small)
    found = range_test(small, teacher, WINDOWS, batch=4)
    assert content(small) == before
    assert found.rates == {kind: found.factor * rate for kind, rate in RATES.items()}
    assert 0.1 < found.factor < 10
    assert 1e-4 < found.rates["scale"] < 2e-2

    def held_back(factor):
        rates = {kind: factor * rate for kind, rate in found.rates.items()}
        options = {"steps": 40, "batch": 4, "validation": 4, "warmup": 2}
        learned = distill(small, teacher, WINDOWS, rates=rates, **options)
        return min(value for _, value in learned.provenance["distillation"]["validation"])

    chosen = held_back(1)
    assert chosen < held_back(0.05)
    assert chosen < held_back(20)


def test_factors_grow_geometrically_and_end_where_the_loss_doubles():
    small, teacher = pair()
    seen = []
    options = {"batch": 2, "steps": 30, "learn": ["scale"]}
    found = range_test(small, teacher, WINDOWS, low=0.1, high=1e4, progress=seen.append, **options)
    assert np.allclose(found.factors, np.geomspace(0.1, 1e4, 30)[: len(found.factors)])
    assert len(seen) == len(found.losses) == len(found.factors) < 30
    assert found.losses[-1] >= 2 * min(found.losses)
    mean = 0.0
    for count, one in enumerate(seen, 1):
        mean = 0.8 * mean + 0.2 * one.loss
        assert found.losses[count - 1] == pytest.approx(mean / (1 - 0.8**count))


def test_bad_ranges_are_refused():
    small, teacher = pair()
    with pytest.raises(ValueError, match="low is 3 and high 1, expected 0 < low < high"):
        range_test(small, teacher, WINDOWS, low=3, high=1)
    with pytest.raises(ValueError, match="steps is 1, expected at least 2"):
        range_test(small, teacher, WINDOWS, steps=1)
