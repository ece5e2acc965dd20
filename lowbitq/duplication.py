"""Choosing the layers that get further copies, by their scores: the highest, above a threshold, or
the highest of each part of the model.

`lowbitq.plan` chooses copies, formats and ranks together under a budget, which is never worse by
its own prediction; these policies need no prices and are easy to explain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lowbitq.costs import multiplications as multiplications_of
from lowbitq.costs import stored_bytes
from lowbitq.models.decoder import Model
from lowbitq.models.tokens import check_count
from lowbitq.plans import CopyPlan, LayerPlan, Plan
from lowbitq.scores import Sensitivity, part_of


def top_k(
    scores: Sensitivity,
    plan: Plan,
    copies: CopyPlan | str,
    *,
    share: float = 0.25,
    count: int | None = None,
    nbytes: int | None = None,
    multiplications: int | None = None,
    model: Model | None = None,
    format: str | None = None,
    by: str = "score",
) -> Plan:
    """Add copies to the layers with the highest scores.

    Parameters
    ----------
    scores : Sensitivity
        Of linear layers, halves or blocks; all linear layers of a half or block get the copies.
    plan : Plan
        Left unchanged.
    copies : CopyPlan or str
        What to add: ``"int2g64 residual"``, or several joined by ``+``.
    share : float, default=0.25
        Share of the layers that get them, rounded to a whole number.
    count : int, default=None
        The number of layers, instead.
    nbytes, multiplications : int, default=None
        Instead, the most bytes or multiplications per token that are added: as many layers of the
        ranking as fit, up to the first that does not.
    model : Model, default=None
        Knows the shapes of the layers; needed for `nbytes` and `multiplications`.
    format : str, default=None
        The format whose scores count. None: the only one.
    by : str, default="score"
        As for `Sensitivity.ranking`.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If the scores are of another model or lack what `by` asks for, copies cannot be parsed,
        limits are out of range, or there are several.

    Examples
    --------
    >>> scores = lq.sensitivity(model, stats, "int2g64")  # doctest: +SKIP
    >>> plan = Plan.uniform(dict(model.linears()), "int2g64")  # doctest: +SKIP
    >>> top_k(scores, plan, "int2g64 hadamard residual", share=0.2)  # doctest: +SKIP
    """
    ranking = scores.ranking(_format(scores, format), by=by)
    limits = {"count": count, "nbytes": nbytes, "multiplications": multiplications}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, expected one limit")
    for name, limit in given.items():
        check_count(name, limit, 0)
    if not given:
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, expected 0 to 1")
        count = round(share * len(ranking))
    if count is not None:
        if count > len(ranking):
            raise ValueError(f"count is {count}, but there are only {len(ranking)} layers")
        return _with_copies(scores, plan, copies, ranking[:count])
    if model is None:
        raise ValueError(f"{next(iter(given))} needs the model, for the shapes of its layers")
    cost = stored_bytes if nbytes is not None else multiplications_of
    [limit] = given.values()
    shapes = {name: linear.shape for name, linear in model.linears()}
    whole = _with_copies(scores, plan, copies, ranking)
    added = dict.fromkeys(ranking, 0)
    for name, layer in whole.layers.items():
        if name not in shapes:
            raise ValueError(f"the plan is for another model, which has {name!r}")
        more = cost(layer, shapes[name]) - cost(plan.layers[name], shapes[name])
        added[part_of(name, scores.level)] += more
    fits = np.cumsum([added[name] for name in ranking]) <= limit
    return _with_copies(scores, plan, copies, ranking[: int(fits.sum())])


def grouped(
    scores: Sensitivity,
    plan: Plan,
    copies: CopyPlan | str,
    *,
    groups: int = 3,
    each: int = 1,
    format: str | None = None,
    by: str = "score",
) -> Plan:
    """Add copies to the layers with the highest scores in each part of the model.

    Parameters
    ----------
    scores, plan, copies, format, by
        As for `top_k`.
    groups : int, default=3
        Number of parts, consecutive layers, as equal as possible: front, middle and back.
    each : int, default=1
        Number of layers that get copies in each part.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        As for `top_k`, or if a part has fewer than `each` layers.
    """
    check_count("groups", groups, 1)
    check_count("each", each, 1)
    format = _format(scores, format)
    ranking = scores.ranking(format, by=by)
    names = [row.layer for row in scores.of(format)]
    if groups * each > len(names) or each > len(names) // groups:
        raise ValueError(
            f"each is {each}, but {groups} groups of {len(names)} layers have as few as "
            f"{len(names) // groups}"
        )
    chosen = []
    for part in np.array_split(np.arange(len(names)), groups):
        own = {names[index] for index in part}
        chosen += [name for name in ranking if name in own][:each]
    return _with_copies(scores, plan, copies, chosen)


def threshold(
    scores: Sensitivity,
    plan: Plan,
    copies: CopyPlan | str,
    objective: Callable[[Plan], float],
    target: float,
    *,
    format: str | None = None,
    by: str = "score",
) -> tuple[Plan, float]:
    """Add copies to all layers that score above a threshold, the highest one that is good enough.

    The threshold is found by bisection over the n different scores, in ``ceil(log2(n + 2))``
    evaluations of the objective, which is taken to fall as layers get copies.

    Parameters
    ----------
    scores, plan, copies, format, by
        As for `top_k`.
    objective : callable
        Of a Plan, such as ``lambda plan: lq.perplexity(lq.compress(model, plan, stats), text)``
        with a text for validation.
    target : float
        What it should be at most.

    Returns
    -------
    plan : Plan
    score : float
        Layers with this score or more have copies; infinity: none has.

    Raises
    ------
    ValueError
        As for `top_k`, or if the objective exceeds the target with copies of all layers.
    """
    format = _format(scores, format)
    ranking = scores.ranking(format, by=by)
    values = {row.layer: float(getattr(row, by)) for row in scores.of(format)}
    levels = sorted(set(values.values()), reverse=True)

    def at(number: int) -> Plan:
        """The plan with copies for the layers of the highest different scores."""
        chosen = [name for name in ranking if number and values[name] >= levels[number - 1]]
        return _with_copies(scores, plan, copies, chosen)

    low, high, last = 0, len(levels) + 1, float("nan")
    while low < high:  # the number sought is at least low and at most high
        middle = (low + high) // 2
        last = objective(at(middle))
        low, high = (low, middle) if last <= target else (middle + 1, high)
    if low > len(levels):
        raise ValueError(f"target is {target}, but copies of all layers give {last}")
    return at(low), levels[low - 1] if low else float("inf")


def _format(scores: Sensitivity, format: str | None) -> str:
    if format is not None:
        return format
    if len(scores.weights) != 1:
        raise ValueError(f"scores are of {', '.join(scores.weights)}: say which format")
    return next(iter(scores.weights))


def _with_copies(
    scores: Sensitivity, plan: Plan, copies: CopyPlan | str, chosen: Iterable[str]
) -> Plan:
    """Return the plan with copies for the linear layers of these layers, halves or blocks."""
    more = (copies,) if isinstance(copies, CopyPlan) else _parsed(copies)
    there = {part_of(name, scores.level) for name in plan.layers}
    known = {row.layer for row in scores.rows}
    if different := sorted(there ^ known):
        raise ValueError(f"scores are of another model: {different[0]!r} is in only one of them")
    wanted = set(chosen)
    layers: Mapping[str, LayerPlan] = {
        name: replace(layer, copies=(*layer.copies, *more))
        if part_of(name, scores.level) in wanted
        else layer
        for name, layer in plan.layers.items()
    }
    changes: dict[str, Any] = {"layers": dict(layers)}
    return replace(plan, **changes)


def _parsed(text: str) -> tuple[CopyPlan, ...]:
    return tuple(CopyPlan.parse(part.strip()) for part in text.split("+"))
