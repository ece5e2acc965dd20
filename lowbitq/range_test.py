"""range_test(): the largest learning rates at which training still learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbitq.distillation import options_of
from lowbitq.hints import Hints
from lowbitq.losses import Loss
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.tokens import check_count
from lowbitq.optimizers import RATES
from lowbitq.roundings import LearnedRounding
from lowbitq.teachers import Teacher
from lowbitq.texts import Text
from lowbitq.training import Reporting, Round, Training

_SMOOTH = 0.8  # of the running mean of losses, about five steps
_BLOWN_UP = 2.0  # the loss in times of the least one, where the test ends


@dataclass(frozen=True)
class RangeTest:
    """What a range test has seen.

    Attributes
    ----------
    factors, losses : list of float
        Of each step: the factor of the learning rates, and the smoothed loss.
    factor : float
        The one to train with: a third of the factor with the least loss, because what a loss
        survives for a few steps it does not survive for hundreds.
    rates : dict of str to float
        The learning rates times `factor`, for ``distill(..., rates=...)``.
    """

    factors: list[float]
    losses: list[float]
    factor: float
    rates: dict[str, float]


def range_test(
    model: QuantizedModel,
    teacher: Model,
    text: Text,
    *,
    learn: Iterable[str] = ("scale", "offset", "norm"),
    rounding: LearnedRounding | str = "nearest",
    loss: Loss | str = "kl",
    hints: Hints | None = None,
    batch: int = 2,
    window: int = 512,
    rates: Mapping[str, float] | None = None,
    low: float = 0.03,
    high: float = 30.0,
    steps: int = 40,
    seed: int = 0,
    progress: bool | Callable[[Round], object] = False,
) -> RangeTest:
    """Train with learning rates that grow from step to step until the loss blows up.

    Parameters
    ----------
    model, teacher, text, learn, rounding, loss, hints, batch, window, rates, seed, progress
        As for `lowbitq.distillation.distill`. Nothing is held back; `model` is left unchanged.
    low, high : float
        First and last factor of the learning rates; they grow geometrically.
    steps : int, default=40
        Number of steps from `low` to `high`, unless the loss doubles before.

    Returns
    -------
    RangeTest

    Raises
    ------
    ValueError
        If an option is out of range, or models and text do not fit.

    References
    ----------
    L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3.

    Examples
    --------
    >>> found = range_test(small, model, "train.txt")  # doctest: +SKIP
    >>> small = distill(small, model, "train.txt", rates=found.rates)  # doctest: +SKIP
    """
    check_count("steps", steps, 2)
    if not 0 < low < high < float("inf"):
        raise ValueError(f"low is {low} and high {high}, expected 0 < low < high")
    fixed: dict[str, Any] = {"warmup": 0, "clip": 1.0, "decay": 0.0}
    fixed |= {"diversity": 0.0, "regularization": 0.0}
    options, rows = options_of(
        model,
        teacher,
        text,
        learn=learn,
        rounding=rounding,
        loss=loss,
        hints=hints,
        temperatures=(),
        batch=batch,
        window=window,
        memory=None,
        validation=1,
        rates=rates,
        paces=None,
        top_k=None,
        steps=steps + 1,  # so that the last one is not validated
        every=steps + 1,
        keep=1,
        seed=seed,
        **fixed,
    )
    blocks = options.hints.states(len(model.blocks))
    run = Training(model, Teacher(teacher, rows, blocks), options, rows)
    factors, losses, mean = [], [], 0.0
    with Reporting(progress, steps, 0, "range test") as report:
        for factor in np.geomspace(low, high, steps):
            done = run.step(float(factor))
            mean = _SMOOTH * mean + (1 - _SMOOTH) * done.loss
            factors.append(float(factor))
            losses.append(mean / (1 - _SMOOTH ** len(factors)))
            report(done)
            if not losses[-1] < _BLOWN_UP * min(losses):
                break
    # A step's loss is that of the parameters before it, which the factor before has made.
    best = factors[max(int(np.argmin(losses)) - 1, 0)] / 3
    used = RATES | dict(rates or {})
    return RangeTest(factors, losses, best, {kind: best * rate for kind, rate in used.items()})
