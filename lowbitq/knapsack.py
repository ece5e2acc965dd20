"""The multiple-choice knapsack problem: one option of each class, at the lowest price in a budget.

Exact, by dynamic programming over the states that nothing dominates: sums of costs and prices of
the classes so far. A state is dropped if the linear relaxation shows that no choice for the classes
left makes it better than a solution that is known. With the few hundred classes of a model some
hundred states remain, whatever the unit of the costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

# Relative error of a sum of prices, so that rounding drops no optimal state.
_ROUNDING = 1e-12


def cheapest(costs: Sequence[ArrayLike], prices: Sequence[ArrayLike], budget: int) -> list[int]:
    """Choose one option of each class so that the sum of prices is minimal within a budget.

    Parameters
    ----------
    costs : sequence of array_like of shape (options,), integers
        Of each class; at least 0. Classes may have different numbers of options.
    prices : sequence of array_like of shape (options,), float64
        Finite, of any sign.
    budget : int
        Maximum sum of costs.

    Returns
    -------
    list of int
        The option of each class. Among equal sums of prices, one of the lowest cost.

    Raises
    ------
    ValueError
        If even the smallest costs exceed the budget, or arrays do not fit.

    References
    ----------
    H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", 2004, chapter 11. G. Nemhauser,
    Z. Ullmann, "Discrete Dynamic Programming and Capital Allocation", Management Science 15, 1969
    (dominated states).

    Examples
    --------
    >>> cheapest([[1, 2, 4], [1, 3]], [[9.0, 4.0, 0.0], [5.0, 2.0]], budget=5)
    [2, 0]
    """
    classes = [_Class.of(c, p) for c, p in zip(costs, prices, strict=True)]
    if not classes:
        raise ValueError("costs is empty, expected at least one class")
    least = sum(int(one.costs[0]) for one in classes)
    if least > budget:
        raise ValueError(f"budget is {budget}, but the smallest costs sum to {least}")
    relaxed = _Relaxation(classes)
    best = relaxed.solution(budget)
    total_cost, total_price = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Counts, Counts]] = []  # of each class: previous state, option
    for index, one in enumerate(classes):
        cost = (total_cost[:, None] + one.costs).ravel()
        price = (total_price[:, None] + one.prices).ravel()
        bound = price + relaxed.bound(index + 1, budget - cost)
        keep = np.flatnonzero(bound <= best + _ROUNDING * (1 + abs(price) + abs(best)))
        keep = keep[np.lexsort((price[keep], cost[keep]))]
        sorted_price = price[keep]
        falls = np.empty(len(keep), bool)
        falls[0] = True
        falls[1:] = sorted_price[1:] < np.minimum.accumulate(sorted_price)[:-1]
        keep = keep[falls]
        total_cost, total_price = cost[keep], price[keep]
        steps.append((keep // len(one.costs), one.options[keep % len(one.costs)]))
    state = int(total_price.argmin())
    chosen = []
    for previous, option in reversed(steps):
        chosen.append(int(option[state]))
        state = int(previous[state])
    return chosen[::-1]


@dataclass(frozen=True)
class _Class:
    """The options of a class that no other one dominates, by rising cost and falling price."""

    costs: Counts
    prices: Floats
    options: Counts
    hull: Counts  # those of them on the lower convex hull

    @classmethod
    def of(cls, costs: ArrayLike, prices: ArrayLike) -> _Class:
        cost, price = np.asarray(costs), np.asarray(prices, np.float64)
        if cost.ndim != 1 or cost.shape != price.shape or not len(cost):
            raise ValueError(
                f"a class has costs of shape {cost.shape} and prices of shape {price.shape}, "
                "expected one number each for every option"
            )
        if cost.dtype.kind not in "iu" or cost.min() < 0:
            raise ValueError(f"costs are {cost}, expected integers of at least 0")
        if not np.isfinite(price).all():
            raise ValueError(f"prices are {price}, expected finite numbers")
        order = np.lexsort((price, cost))
        ahead = np.minimum.accumulate(price[order])
        order = order[np.append(True, price[order][1:] < ahead[:-1])]
        cost, price = cost[order].astype(np.int64), price[order]
        hull: list[int] = []
        for point in range(len(cost)):
            while len(hull) > 1 and _is_above(cost, price, hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        return cls(cost, price, order.astype(np.int64), np.array(hull))


def _is_above(cost: Counts, price: Floats, left: int, middle: int, right: int) -> bool:
    """Whether the middle point is not below the line through the others."""
    before = (price[middle] - price[left]) * (cost[right] - cost[left])
    return bool(before >= (price[right] - price[left]) * (cost[middle] - cost[left]))


class _Relaxation:
    """The same problem where a class may mix its options: steps along hulls, the best first."""

    def __init__(self, classes: list[_Class]) -> None:
        hulls = [(one.costs[one.hull], one.prices[one.hull]) for one in classes]
        cost = np.concatenate([np.diff(costs) for costs, _ in hulls])
        price = np.concatenate([np.diff(prices) for _, prices in hulls])
        number = np.repeat(np.arange(len(hulls)), [len(costs) - 1 for costs, _ in hulls])
        order = np.argsort(price / cost, kind="stable")  # in a class, slopes rise already
        self._cost, self._price, self._class = cost[order], price[order], number[order]
        first = np.array([costs[0] for costs, _ in hulls] + [0])
        prices = np.array([prices[0] for _, prices in hulls] + [0.0])
        # Sums over the classes from each on.
        self._least = first[::-1].cumsum()[::-1]
        self._start = prices[::-1].cumsum()[::-1]

    def bound(self, index: int, budget: Counts) -> Floats:
        """Lower bound on the price of the classes from `index` on; infinite if they do not fit."""
        left = self._class >= index
        cost = np.append(0, self._cost[left].cumsum())
        price = np.append(0.0, self._price[left].cumsum())
        room = budget - self._least[index]
        found = self._start[index] + np.interp(room, cost, price)
        return np.where(room >= 0, found, np.inf)

    def solution(self, budget: int) -> float:
        """Price of a solution: steps in order, leaving out those that do not fit."""
        room, price = budget - int(self._least[0]), float(self._start[0])
        ended = set()
        for cost, gain, number in zip(self._cost, self._price, self._class, strict=True):
            if cost > room:
                ended.add(number)  # the steps of a class build on each other
            elif number not in ended:
                room, price = room - int(cost), price + gain
        return price
