"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq._core import NumericalError
from lowbitq.models.tokens import check_count, token_array


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; `sample` documents the fields, which are checked here."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, expected a number of at least 0")
        if self.top_k is not None:
            check_count("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, expected 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            found = self.repetition_penalty
            raise ValueError(f"repetition_penalty is {found}, expected a number above 0")

    def choose(
        self,
        logits: ArrayLike,
        seen: NDArray[np.int32],
        generator: np.random.Generator | None,
    ) -> int:
        """Return the next token; see `sample`."""
        values = np.array(logits, dtype=np.float64)  # a copy, which the penalty changes
        if values.ndim != 1 or not values.size:
            raise ValueError(f"logits have shape {values.shape}, expected (vocab,)")
        if self.repetition_penalty != 1:
            values[seen] = _penalized(values[seen], self.repetition_penalty)
        best = int(values.argmax())
        if not math.isfinite(values[best]):  # argmax returns a NaN if there is one
            raise NumericalError(f"the largest logit is {values[best]} (token {best})")
        if self.temperature == 0:
            return best
        if generator is None:
            raise ValueError(f"temperature = {self.temperature} needs a random generator")

        with np.errstate(over="ignore"):  # with a tiny temperature, to minus infinity
            probability = np.exp((values - values[best]) / self.temperature)
        kept = np.flatnonzero(probability)
        if self.top_k is not None and self.top_k < kept.size:
            kept = kept[_largest(values[kept], self.top_k)]
        if self.top_p is not None:
            kept = kept[_nucleus(probability[kept], self.top_p)]
        if self.min_p is not None:
            kept = kept[probability[kept] >= self.min_p]  # that of the best token is 1
        cumulative = probability[kept].cumsum()
        drawn = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
        return int(kept[min(int(drawn), kept.size - 1)])  # the product may round up to the total


def sample(
    logits: ArrayLike,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: ArrayLike = (),
    generator: np.random.Generator | None = None,
) -> int:
    """Choose the next token.

    First the logits of tokens in `seen` are penalized. The probability of token i is then
    ``softmax(logits / temperature)[i]``, set to zero outside the `top_k` most probable tokens,
    renormalised, set to zero outside the smallest set of most probable tokens whose total reaches
    `top_p`, and set to zero where it is below `min_p` times that of the most probable token.

    Parameters
    ----------
    logits : array_like of shape (vocab,)
        Minus infinity forbids a token.
    temperature : float, default=0.0
        0 takes the largest logit (the lowest token if several are equal) and ignores `top_k`,
        `top_p`, `min_p` and `generator`.
    top_k : int, default=None
        At least 1. Among equal logits at the border, lower tokens are kept.
    top_p : float, default=None
        In (0, 1].
    min_p : float, default=None
        In [0, 1].
    repetition_penalty : float, default=1.0
        Above 0. Logits of tokens in `seen` are divided by it where they are positive, and
        multiplied by it elsewhere: above 1, repetition becomes less probable.
    seen : array_like of shape (t,), integer, default=()
        Tokens of the prompt and of its continuation. A token counts once.
    generator : numpy.random.Generator, default=None
        Source of one uniform number. Required unless `temperature` is 0.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If an argument is out of range.
    NumericalError
        If a logit is NaN or plus infinity, or no token is allowed.

    References
    ----------
    A. Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020 (`top_p`).

    N. N. Minh et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs",
    ICLR 2025 (`min_p`).

    N. S. Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable
    Generation", 2019 (`repetition_penalty`).

    Examples
    --------
    >>> sample([0.0, 2.0, 2.0])
    1
    >>> sample([0.0, 2.0, 2.0], repetition_penalty=1.1, seen=[1])
    2
    >>> generator = np.random.default_rng(0)
    >>> [sample([0.0, 2.0, 2.0], temperature=1, min_p=0.5, generator=generator) for _ in range(5)]
    [2, 1, 1, 1, 2]
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    known = token_array(seen, np.size(np.asarray(logits)), name="seen")
    return sampling.choose(logits, known, generator)


def _penalized(values: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # to an infinity, which `choose` refuses or forbids
        return np.where(values > 0, values / penalty, values * penalty)


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Mark the `count` largest values; among equal ones, the first."""
    border = np.partition(values, values.size - count)[values.size - count]
    chosen: NDArray[np.bool_] = values > border
    equal = np.flatnonzero(values == border)
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Mark the fewest largest weights whose sum reaches `top_p` of the total."""
    order = np.argsort(-weights, kind="stable")
    cumulative = weights[order].cumsum()
    count = 1 + int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left"))
    chosen = np.zeros(weights.size, dtype=np.bool_)
    chosen[order[:count]] = True
    return chosen
