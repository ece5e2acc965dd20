"""sensitivity(): how much each layer of a model suffers from being quantized.

Three walks, each linear in the number of calibration windows: one over the inputs of the layers,
one over their weights (and the gradients of a loss), and, if asked for, one that quantizes a layer
at a time and runs the rest of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.calibration import Progress, Statistics, Stream, reporter
from lowbitq.copies import LayerInputs
from lowbitq.divergences import each_alone
from lowbitq.encoding import encode
from lowbitq.formats import Format
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.massive import magnitude_quantile
from lowbitq.models.decoder import Block, Model
from lowbitq.models.finite import check_finite
from lowbitq.models.slots import SLOTS, name_in_block
from lowbitq.models.tokens import check_count, token_array
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan
from lowbitq.scores import (
    LEVELS,
    NORMALIZE,
    TAU_BY,
    LayerScore,
    Sensitivity,
    Weights,
    check_choice,
    effective_weights,
    part_of,
    scored,
)
from lowbitq.texts import check_positions

Array = NDArray[np.float32]
Tokens = NDArray[np.int32]
Gradients: TypeAlias = Callable[[Model, Tokens], Iterable[tuple[str, Array]]]

_MAGNITUDES = 1 << 15  # bins of magnitude_counts, one for each bfloat16


def sensitivity(
    model: Model,
    stats: Statistics,
    formats: LayerPlan | Format | str | Sequence[LayerPlan | Format | str],
    *,
    tau: float = 100.0,
    tau_by: str = "mean",
    weights: Weights | None = None,
    normalize: str = "minmax",
    level: str = "linear",
    measure: bool | int = False,
    gradients: Gradients | None = None,
    progress: bool | Progress = False,
) -> Sensitivity:
    """Score how sensitive each layer of a model is to quantization.

    ``score = alpha S_quant + beta S_massive + gamma S_grad`` with each metric of `LayerScore`
    normalized over the linear layers of the model, because their scales have nothing in common.

    The model is scored as it is. To compare with another setting, such as a rotation, score both
    and call `Sensitivity.compare`:

        before = sensitivity(model, calibrate(model, text), "int2g64")
        turned = rotate(model)
        after = sensitivity(turned, calibrate(turned, text), "int2g64")
        before.compare(after)["int2g64"]["kendall"]

    Parameters
    ----------
    model : Model
        In float32, rotated or not. Left unchanged.
    stats : Statistics
        From `calibrate` on this model. Its windows are run again.
    formats : LayerPlan, Format or str, or a sequence of them
        A format is rounded to nearest; a LayerPlan says how itself, and ``"gptq"`` needs
        ``calibrate(..., hessians=True)``. Layers have 8-bit activations when they are measured,
        unless the plan says otherwise: ``"int2g64 a32"``.
    tau : float, default=100.0
        Threshold of massive inputs.
    tau_by : {"mean", "median", "quantile", "absolute"}, default="mean"
        ``"mean"``, ``"median"``: `tau` times this statistic of ``|x|`` in the layer.
        ``"absolute"``: `tau` itself. ``"quantile"``: the quantile `tau` (0 to 1) of ``|x|`` in the
        whole model, inputs that layers share counted once; in a single layer, the share above a
        quantile is always the same. Medians and quantiles are rounded down to bfloat16: by less
        than 1 %.
    weights : (float, float, float), default=None
        alpha, beta and gamma for all formats. None: `weights_for_bits` of each.
    normalize : {"minmax", "zscore", "rank"}, default="minmax"
        See `normalized`.
    level : {"linear", "half", "block"}, default="linear"
        What to score: linear layers; attention and MLP; or blocks. A half or block has the mean of
        its linear layers, weighted by parameters; see also `Sensitivity.at`.
    measure : bool or int, default=False
        Whether to quantize each layer alone (each half or block, by `level`) and measure the KL
        divergence from the float model, on all windows, or on the first `measure` of them. A layer
        costs a run of the later blocks and of the head, so this takes far longer than the rest. It
        holds the quantized layers of all formats and the logits of a window, 4 window vocab bytes.
    gradients : callable, default=None
        ``gradients(model, tokens)`` yields the name and the gradient (rows, cols), float32, of the
        loss with respect to each linear layer's weight, in any order, for tokens
        (samples, window), as `lowbitq.gradients.weight_gradients` does. None: no S_grad, and alpha
        and beta share its weight.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the numbers of finished steps
        and of all steps.

    Returns
    -------
    Sensitivity

    Raises
    ------
    ValueError
        If the model is quantized or has a NaN or an infinity, `stats` is of another model or lacks
        Hessians, the gradients are not those of the linear layers, the inputs of a layer overflow,
        or an option is out of range.

    Notes
    -----
    Spearman's rank correlation with the measured divergence, of SmolLM2-135M (4-bit at the source)
    in int2g64, 4 windows of 512 tokens of WikiText-2 for everything, cross-entropy gradients:

    =============  ======  ========  =====  ======  =======  =====
    level          fisher  gradient  quant  output  massive  score
    =============  ======  ========  =====  ======  =======  =====
    linear (210)     0.77      0.54   0.26    0.55     0.23   0.41
    block (30)       0.74      0.65   0.17    0.37     0.37   0.48
    =============  ======  ========  =====  ======  =======  =====

    The relative error of the weights is nearly the same in all layers, so it says little; the
    elementwise Fisher form predicts best.

    References
    ----------
    M. Sun et al., "Massive Activations in Large Language Models", 2024 (S_massive). S. Kim et al.,
    "SqueezeLLM: Dense-and-Sparse Quantization", 2024 (the elementwise Fisher form).

    Examples
    --------
    >>> from lowbitq import Block, Model, ModelConfig, calibrate
    >>> config = ModelConfig(
    ...     "llama", 32, 64, layers=2, heads=2, kv_heads=2, head_dim=16, vocab_size=50
    ... )
    >>> rng = np.random.default_rng(0)
    >>> def linear(*shape):
    ...     return Linear(rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5))
    >>> def block():
    ...     return Block(None, None, {slot.name: linear(*slot.shape(config)) for slot in SLOTS})
    >>> model = Model(config, None, linear(50, 32), [block(), block()], np.ones(32, np.float32))
    >>> stats = calibrate(model, rng.integers(0, 50, (2, 16)))
    >>> found = sensitivity(model, stats, "int2g32", level="half", measure=True)
    >>> len(found.rows), [round(weight, 3) for weight in found.weights["int2g32"]]
    (4, [0.625, 0.375, 0.0])
    >>> found.ranking("int2g32", by="measured")[0]
    'model.layers.0.self_attn'
    """
    started = time.perf_counter()
    check_choice("level", level, LEVELS)
    check_choice("normalize", normalize, NORMALIZE)
    _check_tau(tau, tau_by)
    plans = _plans(formats, stats)
    used = {name: effective_weights(name, weights, gradients is not None) for name in plans}
    tokens = _check(model, stats)
    measured = tokens[: _windows(measure, len(tokens))]

    names = [name for name, _ in model.linears()]
    parts = list(dict.fromkeys((part_of(name, level), f) for f in plans for name in names))
    walks = 2 if tau_by == "quantile" else 1
    total = walks * len(model.blocks) + len(names) + len(measured) * len(parts)
    report, steps = reporter(progress, total, title="sensitivity", unit="step"), count(1)

    def step() -> None:
        report(next(steps), total)

    found = _scan(model, tokens, tau, tau_by, step)
    rows: dict[tuple[str, str], LayerScore] = {}
    layers: dict[tuple[str, str], QuantizedLinear] = {}
    for name, linear, inputs, gradient in _each_weight(model, stats, tokens, gradients):
        mean_square = found[name].mean_square
        if mean_square is None:
            mean_square = stats.mean_square[name]
        for format, plan in plans.items():
            layer, _ = encode(linear, inputs, plan)
            rows[format, name] = _row(
                name, format, linear, layer, found[name], mean_square, gradient
            )
            if len(measured):
                layers[format, name] = layer
        step()
    in_order = [rows[format, name] for format in plans for name in names]
    result = Sensitivity(
        scored(in_order, used, normalize),
        "linear",
        tau,
        tau_by,
        normalize,
        used,
        (len(tokens), tokens.shape[1]),
        0,
        0.0,
    ).at(level)
    if len(measured):
        kl = each_alone(model, measured, layers, level, step)
        with_kl = tuple(replace(row, measured=kl[row.format, row.layer]) for row in result.rows)
        result = replace(result, rows=with_kl, measured_windows=len(measured))
    return replace(result, seconds=time.perf_counter() - started)


# --- arguments ------------------------------------------------------------------------------------


def _check_tau(tau: float, tau_by: str) -> None:
    check_choice("tau_by", tau_by, TAU_BY)
    high = 1.0 if tau_by == "quantile" else 1e30
    if not 0 <= tau <= high:
        raise ValueError(f"tau is {tau}, expected 0 to {high:g} with tau_by = {tau_by!r}")


def _plans(formats: Any, stats: Statistics) -> dict[str, LayerPlan]:
    one = isinstance(formats, (LayerPlan, Format, str))
    plans: dict[str, LayerPlan] = {}
    for format in [formats] if one else formats:
        plan = LayerPlan.parse(format, Rounding(method="rtn"))
        if str(plan) in plans:
            raise ValueError(f"formats has {str(plan)!r} twice")
        if plan.rounding.method == "gptq" and not stats.hessians:
            raise ValueError(
                f"{str(plan)!r} is rounded by gptq, but stats has no Hessians; "
                "use calibrate(..., hessians=True)"
            )
        plans[str(plan)] = plan
    if not plans:
        raise ValueError("formats is empty, expected at least one")
    return plans


def _check(model: Model, stats: Statistics) -> Tokens:
    """Return the windows of the statistics."""
    linears = dict(model.linears())
    if not all(isinstance(linear, Linear) for linear in linears.values()):
        raise ValueError("model is quantized already; score the float original")
    if different := sorted(linears.keys() ^ stats.mean_square.keys()):
        raise ValueError(f"stats is of another model: {different[0]!r} is in only one of them")
    for name, linear in linears.items():
        if stats.mean_square[name].shape != (linear.shape[1],):
            raise ValueError(
                f"stats is of another model: {name} has {linear.shape[1]} columns, "
                f"stats.mean_square {stats.mean_square[name].shape}"
            )
    check_finite(model)
    tokens = token_array(stats.tokens, model.config.vocab_size, name="stats.tokens", axes=(2,))
    check_positions(tokens.shape[1], model.config)
    return tokens


def _windows(measure: bool | int, there: int) -> int:
    """Return the number of windows to measure on."""
    if measure is False:
        return 0
    if measure is True:
        return there
    check_count("measure", measure, 1)
    if measure > there:
        raise ValueError(f"measure is {measure}, but stats has only {there} windows")
    return measure


# --- inputs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    """What some layers of a block read, as their weights see it."""

    tap: str
    linear: Linear  # one of them
    readers: list[str]

    def read(self, taps: Mapping[str, Array]) -> Array:
        return self.linear.rotate_input(taps[self.tap])


@dataclass(frozen=True)
class _Found:
    """What was found about an input; `mean_square` by channel is None if `Statistics` has it."""

    massive: float
    energy: float
    mean_square: Array | None


def _inputs(block: Block, index: int) -> list[_Input]:
    found: dict[tuple[str, int], _Input] = {}
    for slot in SLOTS:
        linear: Any = block.linears[slot.name]
        one = found.setdefault((slot.tap, id(linear.rotation)), _Input(slot.tap, linear, []))
        one.readers.append(name_in_block(index, slot))
    return list(found.values())


def _scan(
    model: Model, tokens: Tokens, tau: float, tau_by: str, step: Callable[[], None]
) -> dict[str, _Found]:
    """Walk over the inputs of all layers; relative thresholds take two runs of each block."""
    if tau_by == "quantile":
        counts = np.zeros(_MAGNITUDES, np.int64)
        stream = Stream(model, tokens)
        for index in stream:
            counts += sum(_counts(stream, _inputs(model.blocks[index], index), advance=True))
            step()
        tau = magnitude_quantile(counts, tau)
    found: dict[str, _Found] = {}
    stream = Stream(model, tokens)
    for index in stream:
        inputs = _inputs(model.blocks[index], index)
        thresholds = [tau] * len(inputs)
        if tau_by == "mean":
            first = _sums(stream, inputs, thresholds)
            thresholds = [tau * sums["magnitude"] / sums["numbers"] for sums in first]
        elif tau_by == "median":
            thresholds = [
                tau * magnitude_quantile(counts, 0.5) for counts in _counts(stream, inputs)
            ]
        for one, sums in zip(inputs, _sums(stream, inputs, thresholds, advance=True), strict=True):
            squares, columns = sums["squares"], sums["columns"]
            result = _Found(
                sums["above"] / sums["numbers"],
                sums["squares_above"] / squares if squares else 0.0,
                None if columns is None else (columns / sums["tokens"]).astype(np.float32),
            )
            found |= dict.fromkeys(one.readers, result)
        step()
    return found


def _sums(
    stream: Stream, inputs: list[_Input], thresholds: list[float], *, advance: bool = False
) -> list[dict[str, Any]]:
    """Sum over all windows what `_core.input_sums` finds, and squares by channel after rotation."""
    added = ("above", "magnitude", "squares", "squares_above", "numbers", "tokens")
    totals: list[dict[str, Any]] = [dict.fromkeys(added, 0) | {"columns": None} for _ in inputs]
    for taps in stream.taps(advance=advance):
        for one, threshold, total in zip(inputs, thresholds, totals, strict=True):
            x = one.read(taps)
            with _naming(f"the input of {one.readers[0]}"):
                found = _core.input_sums(x, tau=threshold)
            found |= {"numbers": x.size, "tokens": len(x)}
            for name in added:
                total[name] += found[name]
            if one.linear.rotation is not None:
                columns = np.square(x).sum(0, dtype=np.float64)
                total["columns"] = columns + (0 if total["columns"] is None else total["columns"])
    return totals


def _counts(
    stream: Stream, inputs: list[_Input], *, advance: bool = False
) -> list[NDArray[np.int64]]:
    """Count over all windows how many numbers of each input have each magnitude."""
    totals = [np.zeros(_MAGNITUDES, np.int64) for _ in inputs]
    for taps in stream.taps(advance=advance):
        for one, counts in zip(inputs, totals, strict=True):
            with _naming(f"the input of {one.readers[0]}"):
                _core.magnitude_counts(one.read(taps), counts)
    return totals


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


# --- weights --------------------------------------------------------------------------------------


def _each_weight(
    model: Model, stats: Statistics, tokens: Tokens, gradients: Gradients | None
) -> Iterator[tuple[str, Linear, LayerInputs, Array | None]]:
    """Yield the linear layers, each with its Hessian and gradient, in the order of the gradients.

    Neighbours with the same input share its factored Hessian.
    """
    linears: dict[str, Any] = dict(model.linears())
    found: Iterable[tuple[str, Array | None]] = (
        gradients(model, tokens) if gradients else ((name, None) for name in linears)
    )
    left = dict(linears)
    before, known = None, LayerInputs()
    for name, gradient in found:
        if name not in left:
            what = "twice" if name in linears else "which the model does not have"
            raise ValueError(f"gradients yielded {name!r} {what}")
        linear = left.pop(name)
        if gradient is not None and gradient.shape != linear.shape:
            raise ValueError(
                f"the gradient of {name} has shape {gradient.shape}, expected {linear.shape}"
            )
        key = id(stats.hessians.get(name)), id(linear.rotation)
        if key != before:
            before, known = key, LayerInputs(_hessian(stats, name, linear))
        yield name, linear, known, gradient
    if left:
        raise ValueError(f"gradients did not yield {next(iter(left))!r}")


def _hessian(stats: Statistics, name: str, linear: Linear) -> NDArray[np.float64] | None:
    """Return the Hessian of a layer's inputs as its weights see them, or None."""
    hessian = stats.hessians.get(name)
    if hessian is None or linear.rotation is None:
        return hessian
    rotation = linear.rotation.matrix().astype(np.float64)
    return np.ascontiguousarray(rotation @ hessian @ rotation.T)


def _row(
    name: str,
    format: str,
    linear: Linear,
    layer: QuantizedLinear,
    found: _Found,
    mean_square: Array,
    gradient: Array | None,
) -> LayerScore:
    """Return the metrics of a layer, without its score."""
    rounded = layer.to_float()
    assert rounded.rotation is linear.rotation
    with _naming(name):
        sums = _core.weight_sums(linear.weight, rounded.weight, mean_square, gradient)
    none = gradient is None
    return LayerScore(
        name,
        format,
        parameters=linear.weight.size,
        score=0.0,
        quant=_root_ratio(sums["error"], sums["weight"]),
        massive=found.massive,
        gradient=None if none else math.sqrt(sums["gradient"]) * math.sqrt(sums["error"]),
        fisher=None if none else sums["fisher"],
        output=_root_ratio(sums["weighted_error"], sums["weighted_weight"]),
        energy=found.energy,
    )


def _root_ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0
