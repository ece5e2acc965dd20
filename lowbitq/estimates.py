"""What `evaluate` finds: means over tokens with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowbitq import plots
from lowbitq.tables import as_frame, as_html

_RESAMPLES = 10_000  # of the bootstrap: the interval's ends vary by 2 % of its width


class Estimate(float):
    """A mean over tokens: a float with a confidence interval.

    Attributes
    ----------
    interval : tuple of float
        95 % confidence interval: percentile bootstrap over windows, with a fixed seed. NaN if there
        is only one window.
    tokens, windows : int
        Numbers of scored tokens and of windows.
    per_window : ndarray of shape (windows,), float64
        Mean of each window.
    protocol : str
        What was measured, in words. Numbers with the same protocol are comparable.

    References
    ----------
    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """

    interval: tuple[float, float]
    tokens: int
    windows: int
    per_window: NDArray[np.float64]
    protocol: str

    def __str__(self) -> str:
        low, high = self.interval
        sure = "" if math.isnan(low) else f", 95 % interval {low:.4g} to {high:.4g}"
        return f"{float(self):.4g} ({self.protocol}{sure})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def to_dict(self) -> dict[str, Any]:
        """Return value, interval, tokens, windows and protocol for JSON; NaN becomes None."""
        low, high = (None if math.isnan(end) else end for end in self.interval)
        return {
            "value": float(self),
            "interval": [low, high],
            "tokens": self.tokens,
            "windows": self.windows,
            "protocol": self.protocol,
        }


class Perplexity(Estimate):
    """exp of the mean negative log likelihood per token.

    Attributes
    ----------
    nll : float
        That mean, in nats per token.
    per_window : ndarray of shape (windows,), float64
        Perplexity of each window.
    """

    nll: float


class Divergence(Estimate):
    """Mean Kullback-Leibler divergence per token, in nats.

    Attributes
    ----------
    percentiles : dict of float to float
        Percentiles 50, 90, 99, 99.9 and 100 (the maximum) over tokens.
    """

    percentiles: dict[float, float]


Kind = TypeVar("Kind", bound=Estimate)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    perplexity : Perplexity
    bits_per_weight : float
        Stored bits per weight of the blocks' linear layers, everything counted.
    bits_per_parameter : float
        Bits of the whole model, embeddings and norms included: 8 size_bytes / parameters.
    size_bytes : int
        Size of the whole model.
    seconds : float
        Time of the evaluated model for all windows.
    tokens_per_second : float
    reference : Perplexity or None
        Perplexity of the reference on the same windows.
    log_ratio : Estimate or None
        ln(perplexity / reference), in nats per token. Its interval is computed from differences per
        window, so it is much narrower than the intervals of the perplexities.
    kl : Divergence or None
        Divergence from the reference.
    agreement : Estimate or None
        Share of tokens for which both models find the same token most likely.
    """

    perplexity: Perplexity
    bits_per_weight: float
    bits_per_parameter: float
    size_bytes: int
    seconds: float
    tokens_per_second: float
    reference: Perplexity | None = None
    log_ratio: Estimate | None = None
    kl: Divergence | None = None
    agreement: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain numbers, texts, lists and dicts, for JSON."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values[name] = value.to_dict() if isinstance(value, Estimate) else value
        if self.kl is not None:
            values["kl"]["percentiles"] = {str(p): v for p, v in self.kl.percentiles.items()}
        return values

    def to_frame(self) -> Any:
        """Return a pandas DataFrame of one row; ImportError without pandas.

        Frames of several models go together with ``pandas.concat``.
        """
        row = {name: value for name, value in vars(self).items() if value is not None}
        return as_frame([{name: float(value) for name, value in row.items()}])

    def plot(self, axes: Any = None) -> Any:
        """Draw percentiles over tokens of the divergence from the reference.

        Parameters
        ----------
        axes : matplotlib.axes.Axes, default=None
            Where to draw. None: a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ValueError
            If there was no reference.
        ImportError
            If `axes` is None and matplotlib is not installed.
        """
        if self.kl is None:
            raise ValueError("there is no divergence to draw: evaluate(model, text, reference)")
        known = {f"{self.bits_per_weight:.2f} bits": self.kl.percentiles}
        return plots.percentiles(known, "KL divergence of a token, nats", axes)

    def _repr_html_(self) -> str:
        lines = ((line[:12].rstrip(), line[12:]) for line in str(self).splitlines())
        return as_html(["", "value"], [{"": name, "value": value} for name, value in lines])

    def __str__(self) -> str:
        lines = [f"perplexity  {self.perplexity}"]
        if self.log_ratio is not None and self.kl is not None and self.agreement is not None:
            low, high = self.log_ratio.interval
            lines += [
                f"reference   {float(self.reference or math.nan):.4g}",
                f"ln ratio    {float(self.log_ratio):.4f} ({low:.4f} to {high:.4f})",
                f"KL          {float(self.kl):.4f} nats per token, "
                f"99 % below {self.kl.percentiles[99.0]:.3g}, largest "
                f"{self.kl.percentiles[100.0]:.3g}",
                f"agreement   {float(self.agreement):.2%}",
            ]
        lines += [
            f"bits        {self.bits_per_weight:.3f} per weight of the linear layers, "
            f"{self.bits_per_parameter:.3f} per parameter of the whole model",
            f"size        {self.size_bytes / 1e6:.1f} MB",
            f"speed       {self.tokens_per_second:.0f} tokens/s",
        ]
        return "\n".join(lines)


def mean_estimate(
    kind: type[Kind],
    values: NDArray[np.float64],
    protocol: str,
    of_mean: Callable[[Any], Any] = lambda mean: mean,
) -> Kind:
    """Return the mean of values (windows, tokens), with its interval; `of_mean` is monotonic."""
    per_window = values.mean(axis=1)
    result = kind(of_mean(per_window.mean()))
    result.interval = (math.nan, math.nan)
    if len(per_window) > 1:
        # A fixed seed compares models on the same draws of windows.
        draws = np.random.default_rng(0).integers(0, len(per_window), (_RESAMPLES, len(per_window)))
        low, high = np.percentile(per_window[draws].mean(axis=1), [2.5, 97.5])
        result.interval = (float(of_mean(low)), float(of_mean(high)))
    result.tokens, result.windows = values.size, len(per_window)
    result.per_window = of_mean(per_window)
    result.protocol = protocol
    return result
