"""linearity(): what a model's loss pays for errors of its weights, and how far that adds up.

The linearity theorem: if every layer's weights err by a relative t_l that is small enough and looks
like noise, the loss rises by a sum over layers, ``sum alpha_l t_l^2``. The coefficients alpha_l are
of the model alone. They are estimated here by adding Gaussian noise to one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq.calibration import Progress, reporter
from lowbitq.divergences import Reference, each_alone
from lowbitq.linears import Linear
from lowbitq.models.decoder import Model
from lowbitq.models.finite import check_finite
from lowbitq.models.tokens import token_array
from lowbitq.quantizers import quantize, relative_error
from lowbitq.ranks import spearman
from lowbitq.texts import check_positions

_NOISE = "noise"


@dataclass(frozen=True)
class LayerSlope:
    """What the loss pays for an error of one layer.

    Attributes
    ----------
    layer, format : str
    alpha : float
        Divergence for each t^2, from noise; nats per token.
    error : float
        t^2 = ||Q(W) - W||^2 / ||W||^2 of the format.
    distance : float
        ||Q(W) - W||, the length of the change.
    measured : float
        Divergence with this layer alone rounded.
    """

    layer: str
    format: str
    alpha: float
    error: float
    distance: float
    measured: float

    @property
    def predicted(self) -> float:
        """alpha t^2, the divergence that the noise predicts."""
        return self.alpha * self.error

    @property
    def slope(self) -> float:
        """S_l = |change of the loss| / ||change of the weights||; 0 if nothing changes."""
        return self.measured / self.distance if self.distance else 0.0


@dataclass(frozen=True)
class Linearity:
    """What `linearity` found. Its str is a table of the totals.

    Attributes
    ----------
    rows : tuple of LayerSlope
        Format by format, layers in the order of the model.
    noise : float
        t of the noise.
    together : dict of str to float
        By format: the divergence with all layers rounded.
    """

    rows: tuple[LayerSlope, ...]
    noise: float
    together: dict[str, float]

    def of(self, format: str) -> tuple[LayerSlope, ...]:
        """Return the rows of a format, in the order of the model."""
        return tuple(row for row in self.rows if row.format == format)

    def predicted(self, format: str) -> float:
        """The sum over layers of alpha t^2."""
        return sum(row.predicted for row in self.of(format))

    def alone(self, format: str) -> float:
        """The sum over layers of the divergence with that layer alone rounded."""
        return sum(row.measured for row in self.of(format))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"divergence in nats per token; alpha from noise of t = {self.noise:g}"
        columns = ["predicted", "alone", "together", "predicted / together", "rank correlation"]
        yield f"{'format':12}" + "".join(f" {name:>{max(len(name), 9)}}" for name in columns)
        for format, together in self.together.items():
            rows = self.of(format)
            predicted, alone = self.predicted(format), self.alone(format)
            alike = spearman([row.predicted for row in rows], [row.measured for row in rows])
            ratio = predicted / together if together else float("nan")
            numbers = [predicted, alone, together, ratio, alike]
            cells = zip(columns, numbers, strict=True)
            yield f"{format:12}" + "".join(f" {n:>{max(len(c), 9)}.4g}" for c, n in cells)


def linearity(
    model: Model,
    tokens: ArrayLike,
    formats: Sequence[str],
    *,
    noise: float = 0.1,
    seed: int = 0,
    progress: bool | Progress = False,
) -> Linearity:
    """Predict the divergence of formats from noise, and measure it.

    A layer costs a run of the later blocks and of the head for each format, window, and the noise.
    Memory holds the weights of all of these, 4 bytes each.

    Parameters
    ----------
    model : Model
        In float32. Left unchanged.
    tokens : array_like of shape (windows, window), integers
    formats : sequence of str
        Weights are rounded to nearest; inputs stay in float32.
    noise : float, default=0.1
        Relative size t of the noise. Much smaller, and rounding in float32 shows; much larger, and
        the loss is no longer quadratic.
    seed : int, default=0
        Of the noise.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the numbers of finished steps
        and of all steps; a step is one layer, replaced, on one window.

    Returns
    -------
    Linearity

    Raises
    ------
    ValueError
        If the model is quantized or not finite, tokens do not fit it, or an option is out of range.

    Notes
    -----
    SmolLM2-135M, one window of 128 tokens of Python's help texts, nats per token; the last column
    is Spearman's correlation of predicted and measured over the 210 layers:

    =======  =========  =====  ========  =====  ================
    format   predicted  alone  together  ratio  rank correlation
    =======  =========  =====  ========  =====  ================
    int4g64      0.212  0.208     0.208   1.02              0.87
    int2g64       5.24   8.61      9.02   0.58              0.73
    =======  =========  =====  ========  =====  ================

    In four bits noise predicts what rounding costs, and layers add up; in two it falls short.

    References
    ----------
    V. Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the
    Linearity Theorem", 2024, theorem 1 and section 4.

    Examples
    --------
    >>> found = linearity(model, tokens, ["int4g64", "int2g64"])  # doctest: +SKIP
    >>> print(found)  # doctest: +SKIP
    """
    if not 0 < noise < 1:
        raise ValueError(f"noise is {noise}, expected more than 0 and less than 1")
    windows = token_array(tokens, model.config.vocab_size, axes=(2,))
    check_positions(windows.shape[1], model.config)
    check_finite(model)
    layers: dict[tuple[str, str], Linear] = {}
    for index, (name, linear) in enumerate(model.linears()):
        if not isinstance(linear, Linear):
            raise ValueError(f"{name} is quantized already; measure the float original")
        layers[_NOISE, name] = noisy(linear, noise, [seed, index])
        for format in formats:
            layers[format, name] = _rounded(linear, format)
    total = len(windows) * len(layers)
    report, steps = reporter(progress, total, title="linearity", unit="step"), count(1)

    def step() -> None:
        report(next(steps), total)

    kl = each_alone(model, windows, layers, "linear", step)
    rows = []
    for format in formats:
        for name, linear in model.linears():
            assert isinstance(linear, Linear)
            change = layers[format, name].weight - linear.weight
            rows.append(
                LayerSlope(
                    name,
                    format,
                    kl[_NOISE, name] / noise**2,
                    float(relative_error(linear.weight, layers[format, name].weight)),
                    float(np.linalg.norm(change)),
                    kl[format, name],
                )
            )
    together = {format: _together(model, windows, layers, format) for format in formats}
    return Linearity(tuple(rows), noise, together)


def noisy(linear: Linear, noise: float, seed: list[int]) -> Linear:
    """Return a layer with Gaussian noise of exactly this relative size."""
    N = np.random.default_rng(seed).standard_normal(linear.shape, np.float32)
    size = noise * np.linalg.norm(linear.weight) / np.linalg.norm(N)
    return replace(linear, weight=linear.weight + np.float32(size) * N)


def _rounded(linear: Linear, format: str) -> Linear:
    return replace(linear, weight=quantize(linear.weight, format).dequantize())


def _together(
    model: Model,
    windows: NDArray[np.int32],
    layers: dict[tuple[str, str], Linear],
    format: str,
) -> float:
    student = model.copy()
    for name, _ in model.linears():
        student.replace_linear(name, layers[format, name])
    found = [Reference(model, row).divergence(student.hidden(row)[:-1]) for row in windows]
    return float(np.mean(found))
