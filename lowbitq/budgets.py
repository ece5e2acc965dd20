"""plan(): the formats, copies and ranks of a model's layers under a budget of bits or bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import plots
from lowbitq.calibration import Progress, Statistics
from lowbitq.formats import Format
from lowbitq.knapsack import cheapest
from lowbitq.models.decoder import Model
from lowbitq.plans import LayerPlan, Plan
from lowbitq.prices import Prices, prices
from lowbitq.tables import as_frame
from lowbitq.texts import Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowbitq.prices import PriceOptions

FORMATS = ("trellis1", "trellis2", "trellis3", "trellis4")


@dataclass(frozen=True)
class Outcome:
    """What a plan is predicted to give.

    Attributes
    ----------
    kl : float
        Sum of the prices of its layers: divergence from the float model, in nats per token.
    bits : float
        Stored bits per weight of the linear layers, everything counted.
    nbytes : int
        Bytes of the linear layers.
    size : int
        Bytes of the whole model.
    multiplications : float
        For each weight of the linear layers and token; 1 for a single copy without adapter.
    layers : dict of str to int
        How many layers have each LayerPlan.
    """

    kl: float
    bits: float
    nbytes: int
    size: int
    multiplications: float
    layers: dict[str, int]

    @classmethod
    def of(cls, found: Prices, choice: Sequence[int]) -> Outcome:
        """Sum up the candidates of these indices, one for each layer."""
        at = np.arange(len(choice)), np.asarray(choice)
        nbytes, weights = int(found.nbytes[at].sum()), int(found.parameters.sum())
        counts = Counter(str(found.candidates[index]) for index in choice)
        return cls(
            kl=float(found.kl[at].sum()),
            bits=8 * nbytes / weights,
            nbytes=nbytes,
            size=nbytes + found.outside,
            multiplications=float(found.multiplications[at].sum() / weights),
            layers={str(c): counts[str(c)] for c in found.candidates if counts[str(c)]},
        )

    def __str__(self) -> str:
        mix = ", ".join(f"{count} x {text}" for text, count in self.layers.items())
        return f"{self.kl:9.4g} {self.bits:7.3f} {self.multiplications:8.3f}  {mix}"


@dataclass(frozen=True, eq=False, repr=False)
class BudgetPlan(Plan):
    """A plan chosen under a budget, with what else the same budget buys. Its str is a table.

    It is a `Plan` and equal to any other that plans the same; JSON and saved models keep only that.

    Attributes
    ----------
    outcome : Outcome
        What this plan gives.
    rivals : dict of str to Outcome or None
        ``"uniform"``: the best candidate for all layers alike in the same budget.
        ``"without copies, same bytes"``: the best plan of candidates with a single copy in the same
        budget. ``"without copies, same multiplications"``: the best one with no more
        multiplications than this plan, however large. None: there is none.
    """

    outcome: Outcome = field(kw_only=True)
    rivals: dict[str, Outcome | None] = field(kw_only=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    __hash__ = Plan.__hash__

    def comparison(self) -> dict[str, Any]:
        """Return the outcomes of this plan and its rivals as plain numbers, for JSON."""
        rivals = {name: None if one is None else asdict(one) for name, one in self.rivals.items()}
        return {"plan": asdict(self.outcome), **rivals}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        rows = {"this plan": self.outcome, **self.rivals}
        width = max(map(len, rows))
        yield f"{'':{width}} {'KL':>9} {'bits':>7} {'products':>8}  layers"
        for name, one in rows.items():
            yield f"{name:{width}} {one if one is not None else '        - (nothing fits)'}"


def choose(found: Prices, *, bits: float | None = None, size: int | None = None) -> BudgetPlan:
    """Choose the candidates whose prices sum to the minimum under a budget.

    Parameters
    ----------
    found : Prices
    bits : float, default=None
        Maximum of the stored bits per weight of the linear layers, everything counted.
    size : int, default=None
        Maximum of the bytes of the whole model, instead.

    Returns
    -------
    BudgetPlan

    Raises
    ------
    ValueError
        If not exactly one budget is given, or the smallest candidates exceed it.

    References
    ----------
    V. Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the
    Linearity Theorem", 2024, equation 13.
    """
    if (bits is None) == (size is None):
        raise ValueError(f"bits is {bits} and size is {size}, expected one of them")
    weights = int(found.parameters.sum())
    budget = int(size or 0) - found.outside if bits is None else _bytes_within(bits, weights)
    least = int(found.nbytes.min(1).sum())
    if least > budget:
        asked = f"bits is {bits}" if bits is not None else f"size is {size}"
        needs = 8 * least / weights if bits is not None else least + found.outside
        raise ValueError(f"{asked}, but the smallest candidates take {needs:.6g}")
    choice = cheapest(list(found.nbytes), list(found.kl), budget)
    outcome = Outcome.of(found, choice)
    used = int(found.multiplications[np.arange(len(choice)), choice].sum())
    rivals = {
        "uniform": _uniform(found, budget),
        "without copies, same bytes": _single(found, found.nbytes, budget),
        "without copies, same multiplications": _single(found, found.multiplications, used),
    }
    made = found.plan(choice)
    given = {one.name: getattr(made, one.name) for one in fields(made)}
    return BudgetPlan(**given, outcome=outcome, rivals=rivals)


def _bytes_within(bits: float, weights: int) -> int:
    """The most bytes whose bits per weight do not exceed `bits` in floating point either."""
    most = int(bits * weights / 8) + 1
    return most if 8 * most / weights <= bits else most - 1


def _uniform(found: Prices, budget: int) -> Outcome | None:
    fits = np.flatnonzero(found.nbytes.sum(0) <= budget)
    if not len(fits):
        return None
    best = int(fits[found.kl.sum(0)[fits].argmin()])
    return Outcome.of(found, [best] * len(found.layers))


def _single(found: Prices, costs: NDArray[np.int64], budget: int) -> Outcome | None:
    among = found.without_copies()
    if not len(among) or costs[:, among].min(1).sum() > budget:
        return None
    chosen = cheapest(list(costs[:, among]), list(found.kl[:, among]), budget)
    return Outcome.of(found, [int(among[index]) for index in chosen])


def plan(
    model: Model,
    data: Statistics | Text,
    *,
    bits: float | None = None,
    size: int | None = None,
    formats: Sequence[LayerPlan | Format | str] = FORMATS,
    progress: bool | Progress = False,
    **options: Unpack[PriceOptions],
) -> BudgetPlan:
    """Choose how each layer of a model is quantized, at the lowest divergence under a budget.

    Every candidate has a price in each layer, the divergence that it causes alone, and a cost, all
    bytes that it stores. The sum of prices is minimised exactly. `lowbitq.prices` finds the prices;
    call it and `lowbitq.budgets.choose` or `front` to try several budgets on the same prices.

    Parameters
    ----------
    model : Model
        In float32, not rotated. Left unchanged.
    data : Statistics, or text as for `calibrate`
        Best with Hessians; see `lowbitq.prices`.
    bits : float, default=None
        Maximum of the stored bits per weight of the linear layers, everything counted.
    size : int, default=None
        Maximum of the bytes of the whole model, instead.
    formats : sequence of LayerPlan, Format or str
        Candidates for every layer, with copies and adapters: ``"trellis2 + trellis2 residual"``,
        ``"int2g64 + rank8"``.
    progress : bool or callable, default=False
        As for `lowbitq.prices`.
    **options
        As for `lowbitq.prices`: ``by``, ``measure`` and others, and fields of Plan.

    Returns
    -------
    BudgetPlan
        A Plan for `compress`, never above the budget. Printed, it stands beside the best uniform
        plan and the best plans without copies.

    Raises
    ------
    ValueError
        If the smallest candidates exceed the budget, or as for `lowbitq.prices`.

    Notes
    -----
    SmolLM2-135M without drift correction, 16 windows of 512 tokens of calibration, candidates
    ternaryg64, int2g64, int3g64 and int4g64; divergence and ln of the ratio of perplexities on 8
    windows of 512 tokens of WikiText-2's test text. The sum of prices was 0.57 and 0.15: below the
    divergence, as layers that err much add up to more.

    ====  ==============  ==============
    bits  uniform         plan
    ====  ==============  ==============
    2.5   1.212, 1.153    1.063, 1.011
    3.5   0.313, 0.283    0.289, 0.246
    ====  ==============  ==============

    Examples
    --------
    >>> plan = plan(model, text, bits=2.25, formats=["trellis2", "trellis3"])  # doctest: +SKIP
    >>> print(plan)  # doctest: +SKIP
    >>> small = lq.compress(model, plan, text=text)  # doctest: +SKIP
    """
    if (bits is None) == (size is None):
        raise ValueError(f"bits is {bits} and size is {size}, expected one of them")
    return choose(prices(model, data, formats, progress=progress, **options), bits=bits, size=size)


@dataclass(frozen=True)
class Front:
    """Plans under several budgets, each the best in its own. Its str is a table.

    Attributes
    ----------
    plans : dict of float to BudgetPlan
        By the budget, in bits per weight.
    alike : dict of str to Outcome
        Each candidate for all layers.
    """

    plans: dict[float, BudgetPlan]
    alike: dict[str, Outcome]

    def to_dict(self) -> dict[str, Any]:
        """Return budgets, outcomes and rivals as plain numbers, for JSON."""
        budgets = [{"budget": at, **one.comparison()} for at, one in self.plans.items()]
        return {"plans": budgets, "alike": {name: asdict(one) for name, one in self.alike.items()}}

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, a row for each budget and outcome; ImportError without it."""
        rows = [
            {"budget": at, "what": name, **{k: v for k, v in one.items() if k != "layers"}}
            for at, plan in self.plans.items()
            for name, one in plan.comparison().items()
            if one is not None
        ]
        return as_frame(rows)

    def plot(self, axes: Any = None) -> Any:
        """Draw the predicted divergence over bits; see `lowbitq.plots.front`."""
        return plots.front(self._lines(), {n: (o.bits, o.kl) for n, o in self.alike.items()}, axes)

    def _lines(self) -> dict[str, list[tuple[float, float]]]:
        lines = {"per layer": [(one.outcome.bits, one.outcome.kl) for one in self.plans.values()]}
        name = "without copies, same bytes"
        single = [one.rivals[name] for one in self.plans.values()]
        if any(len(text.split(" + ")) > 1 for text in self.alike):
            lines["per layer, without copies"] = [(s.bits, s.kl) for s in single if s is not None]
        return lines

    def __str__(self) -> str:
        return "\n".join(f"at most {at:g} bits\n{one}" for at, one in self.plans.items())


def front(found: Prices, bits: Iterable[float]) -> Front:
    """Choose a plan for each of several budgets, in bits per weight.

    Parameters
    ----------
    found : Prices
    bits : iterable of float

    Returns
    -------
    Front

    Raises
    ------
    ValueError
        If there is no budget, or the smallest candidates exceed one.
    """
    plans = {float(at): choose(found, bits=float(at)) for at in sorted(bits)}
    if not plans:
        raise ValueError("bits is empty, expected at least one budget")
    alike = {
        str(one): Outcome.of(found, [index] * len(found.layers))
        for index, one in enumerate(found.candidates)
    }
    return Front(plans, alike)
