"""Scores of layers: what `lowbitq.sensitivity` finds, and the sum of metrics that ranks layers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import plots
from lowbitq._core import FormatError
from lowbitq.checkpoints.writing import new_file
from lowbitq.formats import Format
from lowbitq.plans import LayerPlan
from lowbitq.ranks import kendall, ranks, spearman
from lowbitq.tables import as_frame, as_html

NORMALIZE = ("minmax", "zscore", "rank")
LEVELS = ("linear", "half", "block")
TAU_BY = ("mean", "median", "quantile", "absolute")
METRICS = ("score", "quant", "massive", "gradient", "fisher", "output", "energy")

Weights = tuple[float, float, float]


def weights_for_bits(bits: float) -> Weights:
    """Return the weights of S_quant, S_massive and S_grad in the score, alpha, beta and gamma.

    Parameters
    ----------
    bits : float
        Bits per code, above 0. From 2 bits up the weights are those of 2 bits, from 1 bit down
        those of 1 bit, which give massive activations more weight; in between, such as for 1.5
        bits, they are interpolated linearly.

    Returns
    -------
    tuple of float
        They sum to 1.

    Raises
    ------
    ValueError
        If `bits` is not positive.

    Examples
    --------
    >>> weights_for_bits(2), weights_for_bits(1), weights_for_bits(1.5)
    ((0.5, 0.3, 0.2), (0.3, 0.5, 0.2), (0.4, 0.4, 0.2))
    """
    if not bits > 0:
        raise ValueError(f"bits is {bits}, expected a positive number")
    share = min(max(bits - 1, 0), 1)
    return 0.3 + 0.2 * share, 0.5 - 0.2 * share, 0.2


def normalized(values: ArrayLike, how: str) -> NDArray[np.float64]:
    """Return one metric of several layers on a scale that does not depend on its unit.

    Parameters
    ----------
    values : array_like of shape (n,)
    how : {"minmax", "zscore", "rank"}
        ``"minmax"``: 0 for the smallest, 1 for the largest. ``"zscore"``: in standard deviations
        from the mean. ``"rank"``: the rank, from 0 to 1; equal values share theirs.

    Returns
    -------
    ndarray of shape (n,), float64
        Zeros if all values are equal.

    Raises
    ------
    ValueError
        If `how` is none of these.

    Examples
    --------
    >>> normalized([1, 3, 2], "minmax")
    array([0. , 1. , 0.5])
    """
    check_choice("normalize", how, NORMALIZE)
    row = np.asarray(values, np.float64)
    low, high = row.min(), row.max()
    if low == high:
        return np.zeros(len(row))
    if how == "minmax":
        return np.asarray((row - low) / (high - low), np.float64)
    if how == "zscore":
        return np.asarray((row - row.mean()) / row.std(), np.float64)
    return (ranks(row) - 1) / (len(row) - 1)


@dataclass(frozen=True)
class LayerScore:
    """How sensitive one layer is to one format.

    A half or a block has the means of its linear layers, weighted by their parameters; `measured`
    is of quantizing all of them.

    Attributes
    ----------
    layer : str
        ``"model.layers.3.mlp.up_proj"``; a half is ``"model.layers.3.mlp"``, a block
        ``"model.layers.3"``.
    format : str
    parameters : int
        Number of weights.
    score : float
        ``alpha S_quant + beta S_massive + gamma S_grad``, each normalized over the linear layers.
    quant : float
        S_quant = ||W - Q(W)||_F / ||W||_F; 0 if W = 0.
    massive : float
        S_massive: share of the inputs x with |x| > tau.
    gradient : float or None
        S_grad = ||dL/dW||_F ||W - Q(W)||_F, in the unit of the loss; None without gradients.
    fisher : float or None
        The elementwise form, sum (dL/dW)^2 (W - Q(W))^2; None without gradients.
    output : float
        ||(W - Q(W)) D||_F / ||W D||_F, D^2 the mean squares of the input channels: the relative
        error of the outputs if channels do not correlate.
    energy : float
        Share of the sum of x^2 that massive inputs carry.
    measured : float or None
        KL divergence from the float model, in nats per token, if only this layer is quantized; None
        if it was not measured.
    """

    layer: str
    format: str
    parameters: int
    score: float
    quant: float
    massive: float
    gradient: float | None
    fisher: float | None
    output: float
    energy: float
    measured: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("layer", "format"):
                fits = isinstance(value, str)
            elif value is None:
                fits = name in ("gradient", "fisher", "measured")
            else:
                fits = type(value) in (int, float) and math.isfinite(value)
            if not fits:
                raise ValueError(f"{name} of a layer is {value!r}")


@dataclass(frozen=True)
class Sensitivity:
    """What `lowbitq.sensitivity` found. Its str is a table, with rank correlations below.

    Attributes
    ----------
    rows : tuple of LayerScore
        Format by format, layers in the order of the model.
    level : {"linear", "half", "block"}
        What a layer is.
    tau, tau_by
        Threshold of massive inputs, as asked for.
    normalize : str
    weights : dict of str to tuple of float
        alpha, beta, gamma of each format, as used: without gradients gamma is 0, and alpha and beta
        are divided by their sum.
    shape : tuple of int
        Numbers of calibration windows and of tokens in each.
    measured_windows : int
        How many of them the divergence was measured on; 0: it was not.
    seconds : float
    """

    rows: tuple[LayerScore, ...]
    level: str
    tau: float
    tau_by: str
    normalize: str
    weights: dict[str, Weights]
    shape: tuple[int, int]
    measured_windows: int
    seconds: float

    def __post_init__(self) -> None:
        for name, choices in (("level", LEVELS), ("tau_by", TAU_BY), ("normalize", NORMALIZE)):
            check_choice(name, getattr(self, name), choices)
        if {row.format for row in self.rows} != set(self.weights):
            raise ValueError("the formats of rows and weights differ")
        without = [(row.gradient is None, row.fisher is None) for row in self.rows]
        if set(without) not in ({(True, True)}, {(False, False)}):
            raise ValueError("some rows have gradients and some have not")
        if any((row.measured is None) != (self.measured_windows == 0) for row in self.rows):
            raise ValueError(f"measured is there or not, for {self.measured_windows} windows")

    @property
    def has_gradients(self) -> bool:
        """Whether there were gradients of the loss."""
        return all(row.gradient is not None for row in self.rows)

    def of(self, format: str) -> tuple[LayerScore, ...]:
        """Return the rows of a format, in the order of the model; ValueError if there are none."""
        if format not in self.weights:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(self.weights)}")
        return tuple(row for row in self.rows if row.format == format)

    def ranking(self, format: str, *, by: str = "score") -> list[str]:
        """Return the names of the layers, the most sensitive first.

        Parameters
        ----------
        format : str
        by : str, default="score"
            A metric of `LayerScore`, or ``"measured"``.

        Raises
        ------
        ValueError
            If there is no such format, or the metric is unknown or was not computed.
        """
        found = zip(self._values(format, by), self.of(format), strict=True)
        return [row.layer for _, row in sorted(found, key=lambda pair: -pair[0])]

    def _values(self, format: str, metric: str) -> list[float]:
        if metric not in (*METRICS, "measured"):
            expected = ", ".join([*METRICS, "measured"])
            raise ValueError(f"metric is {metric!r}, expected one of {expected}")
        values = [getattr(row, metric) for row in self.of(format)]
        if None in values:
            needs = "measure=True" if metric == "measured" else "gradients"
            raise ValueError(f"{metric} was not computed; it needs {needs}")
        return values

    @property
    def correlations(self) -> dict[str, dict[str, float]]:
        """Spearman's rank correlation of each metric with `measured`, by format and metric.

        Empty if nothing was measured. A metric that is the same for all layers has none.
        """
        if not self.measured_windows:
            return {}
        found = {
            format: {
                metric: spearman(self._values(format, metric), self._values(format, "measured"))
                for metric in self._computed
            }
            for format in self.weights
        }
        return {
            format: {metric: value for metric, value in row.items() if not math.isnan(value)}
            for format, row in found.items()
        }

    @property
    def _computed(self) -> list[str]:
        """The metrics that all rows have."""
        return [m for m in METRICS if self.has_gradients or m not in ("gradient", "fisher")]

    def compare(self, other: Sensitivity, *, by: str = "score") -> dict[str, dict[str, float]]:
        """Return how alike two results rank the same layers, such as before and after rotation.

        Parameters
        ----------
        other : Sensitivity
        by : str, default="score"
            As for `ranking`.

        Returns
        -------
        dict of str to dict of str to float
            For each format of both: ``"spearman"`` and ``"kendall"`` (tau-b), NaN if undefined.

        Raises
        ------
        ValueError
            If the layers differ, or a metric was not computed.
        """
        found = {}
        for format in (format for format in self.weights if format in other.weights):
            if [row.layer for row in self.of(format)] != [row.layer for row in other.of(format)]:
                raise ValueError("the results have different layers")
            pair = self._values(format, by), other._values(format, by)
            found[format] = {"spearman": spearman(*pair), "kendall": kendall(*pair)}
        return found

    def at(self, level: str) -> Sensitivity:
        """Return the result for halves or blocks, from one for linear layers.

        Every metric and the score of a half or block is the mean of its linear layers', weighted by
        their parameters. The divergence is not: it has to be measured again.

        Parameters
        ----------
        level : {"half", "block"}
            ``"half"``: attention or MLP.

        Raises
        ------
        ValueError
            If this result is not for linear layers, or `level` is unknown.
        """
        if level == self.level:
            return self
        if self.level != "linear" or level not in LEVELS:
            raise ValueError(f"level is {level!r}, but the result is for {self.level!r}")
        groups: dict[tuple[str, str], list[LayerScore]] = {}
        for row in self.rows:
            groups.setdefault((row.format, part_of(row.layer, level)), []).append(row)
        rows = tuple(_mean(name, group) for (_, name), group in groups.items())
        return replace(self, rows=rows, level=level, measured_windows=0)

    def rescored(
        self, *, weights: Weights | None = None, normalize: str | None = None
    ) -> Sensitivity:
        """Return the result with other weights or another normalization, as for `sensitivity`.

        Raises
        ------
        ValueError
            If this result is not for linear layers, or an argument is out of range.
        """
        if self.level != "linear":
            raise ValueError(f"the result is for {self.level!r}, expected 'linear'; then use at()")
        used = self.weights
        if weights is not None:
            used = {f: effective_weights(f, weights, self.has_gradients) for f in self.weights}
        how = self.normalize if normalize is None else normalize
        rows = scored(self.rows, used, how)
        return replace(self, rows=rows, weights=used, normalize=how)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, texts, lists and dicts, for JSON."""
        weights = {format: list(three) for format, three in self.weights.items()}
        return asdict(self) | {
            "rows": [asdict(row) for row in self.rows],
            "weights": weights,
            "shape": list(self.shape),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Restore what `to_dict` returned.

        Raises
        ------
        ValueError
            If a field is missing, unknown or of another type.
        """
        if set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"found the fields {', '.join(map(str, values))}")
        texts = {name: values[name] for name in ("level", "tau_by", "normalize")}
        try:
            return cls(
                tuple(LayerScore(**row) for row in values["rows"]),
                **texts,
                tau=_number(values["tau"]),
                weights={format: _three(three) for format, three in values["weights"].items()},
                shape=_pair(values["shape"]),
                measured_windows=_whole(values["measured_windows"]),
                seconds=_number(values["seconds"]),
            )
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a Sensitivity: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, atomically; OSError if that fails."""
        with new_file(path) as file:
            file.write(json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what `save` wrote.

        Raises
        ------
        FormatError
            If the file is something else.
        """
        try:
            values = json.loads(Path(path).read_bytes())
            if not isinstance(values, dict):
                raise ValueError(f"expected a JSON object, found {type(values).__name__}")
            return cls.from_dict(values)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from error

    def to_frame(self) -> Any:
        """Return the rows as a pandas DataFrame; ImportError if pandas is missing."""
        return as_frame(map(asdict, self.rows))

    def _repr_html_(self) -> str:
        columns = ["layer", "format", *self._computed, *["measured"] * (self.measured_windows > 0)]
        rows = sorted(map(asdict, self.rows), key=lambda row: -row["score"])
        return as_html(columns, rows, caption=next(self._lines()), bars=columns[2:])

    def plot(self, format: str, *, by: str = "score", axes: Any = None) -> Any:
        """Draw a metric over the blocks, one line for each kind of layer.

        Parameters
        ----------
        format, by
            As for `ranking`.
        axes : matplotlib.axes.Axes, default=None
            None: a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            If `axes` is None and matplotlib is not installed.
        """
        names = [row.layer for row in self.of(format)]
        values = dict(zip(names, self._values(format, by), strict=True))
        return plots.by_layer(values, f"{by}, {format}", axes)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        columns = self._computed + ["measured"] * (self.measured_windows > 0)
        width = max(len(row.layer) for row in self.rows)
        samples, window = self.shape
        unit = {"quantile": " quantile of |x|", "absolute": ""}.get(
            self.tau_by, f" x {self.tau_by} |x|"
        )
        yield f"{samples} windows of {window} tokens; massive: |x| > {self.tau:g}{unit}"
        for format, (alpha, beta, gamma) in self.weights.items():
            terms = f"{alpha:.3g} quant + {beta:.3g} massive + {gamma:.3g} gradient"
            without = "" if self.has_gradients else " (no gradients: their weight is shared out)"
            yield f"{format}: score = {terms}, each by {self.normalize}{without}"
            yield f"  {'layer':{width}}" + "".join(f" {name:>9}" for name in columns)
            for row in sorted(self.of(format), key=lambda row: -row.score):
                numbers = "".join(f" {getattr(row, name):9.3g}" for name in columns)
                yield f"  {row.layer:{width}}{numbers}"
        for format, found in self.correlations.items():
            shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            yield (
                f"{format}: Spearman correlation with the KL divergence measured on "
                f"{self.measured_windows} windows: {shown}"
            )


def part_of(layer: str, level: str) -> str:
    """Return the half or block that a linear layer belongs to, or itself.

    Examples
    --------
    >>> [part_of("model.layers.3.mlp.up_proj", level) for level in LEVELS]
    ['model.layers.3.mlp.up_proj', 'model.layers.3.mlp', 'model.layers.3']
    """
    return layer.rsplit(".", LEVELS.index(level))[0]


def effective_weights(format: str, weights: Weights | None, has_gradients: bool) -> Weights:
    """Check the weights of a format, or find them by its bits; share out gamma without gradients.

    Raises
    ------
    ValueError
        If there are not three finite numbers of at least 0, or those in use sum to 0.

    Examples
    --------
    >>> [round(w, 3) for w in effective_weights("int2g64", None, has_gradients=False)]
    [0.625, 0.375, 0.0]
    """
    if weights is None:
        copies = LayerPlan.parse(format).copies
        weights = weights_for_bits(sum(Format.parse(copy.format).rate for copy in copies))
    alpha, beta, gamma = _three(weights)
    gamma = gamma if has_gradients else 0.0
    total = alpha + beta + gamma
    if min(alpha, beta, gamma) < 0 or total == 0:
        raise ValueError(f"weights are {weights}, expected three numbers >= 0, not all 0")
    return (alpha, beta, gamma) if has_gradients else (alpha / total, beta / total, 0.0)


def scored(
    rows: Iterable[LayerScore], weights: Mapping[str, Weights], normalize: str
) -> tuple[LayerScore, ...]:
    """Return the rows with their scores; each metric is normalized over the rows of a format."""
    result: list[LayerScore] = []
    rows = tuple(rows)
    for format, three in weights.items():
        own = [row for row in rows if row.format == format]
        score = np.zeros(len(own))
        for weight, metric in zip(three, ("quant", "massive", "gradient"), strict=True):
            if weight:
                score += weight * normalized([getattr(row, metric) for row in own], normalize)
        result += [replace(row, score=float(s)) for row, s in zip(own, score, strict=True)]
    return tuple(result)


def _mean(name: str, rows: Sequence[LayerScore]) -> LayerScore:
    parameters = sum(row.parameters for row in rows)

    def mean(metric: str) -> Any:
        values = [getattr(row, metric) for row in rows]
        if None in values:
            return None
        return (
            math.fsum(v * row.parameters for v, row in zip(values, rows, strict=True)) / parameters
        )

    return LayerScore(name, rows[0].format, parameters, *map(mean, METRICS))


def _three(values: Any) -> Weights:
    alpha, beta, gamma = map(_number, values)
    return alpha, beta, gamma


def _pair(values: Any) -> tuple[int, int]:
    samples, window = map(_whole, values)
    return samples, window


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless an option is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
