"""The knapsack against brute force, SciPy's solver and its own constraints."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import optimize

from lowbitq.knapsack import cheapest


def random_problem(seed, classes, options, *, unit=1):
    rng = np.random.default_rng([seed, classes, options])
    costs = [unit * rng.integers(0, 60, rng.integers(1, options + 1)) for _ in range(classes)]
    prices = [rng.exponential(size=len(cost)) for cost in costs]
    least, most = sum(c.min() for c in costs), sum(c.max() for c in costs)
    return costs, prices, int(rng.integers(least, most + 1))


def total(table, chosen):
    return sum(row[option] for row, option in zip(table, chosen, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_brute_force(seed):
    costs, prices, budget = random_problem(seed, classes=1 + seed % 7, options=4)
    chosen = cheapest(costs, prices, budget)
    assert total(costs, chosen) <= budget
    every = product(*(range(len(row)) for row in costs))
    best = min(total(prices, one) for one in every if total(costs, one) <= budget)
    assert total(prices, chosen) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_of_scipy(seed):
    costs, prices, budget = random_problem(seed, classes=60, options=6, unit=997)
    sizes = [len(row) for row in costs]
    each = np.repeat(np.eye(len(costs)), sizes, axis=1)
    found = optimize.milp(
        np.concatenate(prices),
        integrality=np.ones(sum(sizes)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(each, 1, 1),
            optimize.LinearConstraint(np.concatenate(costs), ub=budget),
        ],
        options={"mip_rel_gap": 0},
    )
    chosen = cheapest(costs, prices, budget)
    assert total(costs, chosen) <= budget
    assert total(prices, chosen) == pytest.approx(found.fun, rel=1e-9)


def test_a_large_model_in_a_fine_unit():
    """512 classes, costs of millions of bytes without a common divisor."""
    rng = np.random.default_rng(0)
    base = rng.integers(10**5, 10**7, 512)
    costs = [np.sort(size * rng.uniform(1, 4, 8)).astype(int) for size in base]
    prices = [np.sort(rng.exponential(size=8))[::-1] for _ in base]
    budget = int(1.9 * base.sum())
    chosen = cheapest(costs, prices, budget)
    assert 0 <= budget - total(costs, chosen) < base.max()
    step = [budget + size // 100 for size in base[:3]]
    assert all(total(prices, cheapest(costs, prices, b)) <= total(prices, chosen) for b in step)


def test_a_larger_budget_is_never_worse():
    costs, prices, _ = random_problem(3, classes=20, options=5)
    least, most = sum(c.min() for c in costs), sum(c.max() for c in costs)
    found = [total(prices, cheapest(costs, prices, b)) for b in range(least, most + 1, 17)]
    assert found == sorted(found, reverse=True)
    chosen = cheapest(costs, prices, most)
    assert total(prices, chosen) == pytest.approx(sum(p.min() for p in prices))


def test_of_equal_prices_the_lower_cost():
    assert cheapest([[5, 3, 4]], [[1.0, 1.0, 1.0]], 9) == [1]


@pytest.mark.parametrize(
    ("costs", "prices", "budget", "said"),
    [
        ([[3, 4], [2]], [[1.0, 0.0], [0.0]], 4, "budget is 4, but the smallest costs sum to 5"),
        ([], [], 4, "costs is empty"),
        ([[1, 2]], [[1.0]], 4, r"costs of shape \(2,\) and prices of shape \(1,\)"),
        ([[]], [[]], 4, r"costs of shape \(0,\)"),
        ([[1.5]], [[1.0]], 4, "expected integers"),
        ([[-1]], [[1.0]], 4, "at least 0"),
        ([[1]], [[np.nan]], 4, "expected finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused(costs, prices, budget, said):
    with pytest.raises(ValueError, match=said):
        cheapest(costs, prices, budget)
