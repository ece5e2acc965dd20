"""prices(): what each layer costs in quality, bytes and multiplications, for each format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq._core import FormatError
from lowbitq.calibration import Progress, Statistics, calibrate, reporter
from lowbitq.checkpoints.writing import new_file
from lowbitq.costs import multiplications, stored_bytes
from lowbitq.divergences import each_alone
from lowbitq.encoding import check_plan, encode
from lowbitq.formats import Format
from lowbitq.linearity import noisy
from lowbitq.linears import Linear
from lowbitq.models.decoder import AnyLinear, Model
from lowbitq.models.finite import check_finite
from lowbitq.models.rotating import rotate
from lowbitq.models.slots import name_in_block
from lowbitq.models.tokens import check_count, token_array
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan, Plan
from lowbitq.tables import as_frame
from lowbitq.texts import Text
from lowbitq.walks import Known, Task, Walk, WithoutInputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lowbitq.plans import PlanOptions

    class PriceOptions(PlanOptions, total=False):
        """Options of `prices`, with those of the plan."""

        by: LayerPlan | Format | str
        noise: float
        rows: int | None
        measure: int
        samples: int
        window: int


_TO_NEAREST = Rounding(method="rtn")


@dataclass(frozen=True, eq=False)
class Prices:
    """What `prices` found: a table of layers (L) and candidates (C).

    Attributes
    ----------
    layers : tuple of str
        In the order of the model.
    candidates : tuple of LayerPlan
        Ways to plan any of them.
    kl : ndarray of shape (L, C), float64
        Divergence from the float model, in nats per token, if only that layer is quantized.
    nbytes, multiplications : ndarray of shape (L, C), int64
        See `lowbitq.costs`.
    parameters : ndarray of shape (L,), int64
        Weights of each layer.
    outside : int
        Bytes of the rest of the model: embedding and head as planned, norms and biases.
    template : Plan
        Rotation, seed and the like of the plans to be made; it has no layers.
    by : str
        Where `kl` is from: see `prices`.
    """

    layers: tuple[str, ...]
    candidates: tuple[LayerPlan, ...]
    kl: NDArray[np.float64]
    nbytes: NDArray[np.int64]
    multiplications: NDArray[np.int64]
    parameters: NDArray[np.int64]
    outside: int
    template: Plan
    by: str

    def __post_init__(self) -> None:
        shape = len(self.layers), len(self.candidates)
        for name in ("kl", "nbytes", "multiplications", "parameters"):
            array = getattr(self, name)
            wanted = shape[:1] if name == "parameters" else shape
            if array.shape != wanted:
                raise ValueError(f"{name} has shape {array.shape}, expected {wanted}")
            if not np.isfinite(array).all() or (name != "kl" and array.min(initial=0) < 0):
                raise ValueError(f"{name} has numbers that are negative or not finite")
        if not all(shape):
            raise ValueError(f"there are {shape[0]} layers and {shape[1]} candidates")
        if len(set(map(str, self.candidates))) < shape[1]:
            raise ValueError(
                f"candidates are {', '.join(map(str, self.candidates))}: two are equal"
            )
        if self.template.layers:
            raise ValueError("template has layers, expected none")

    def plan(self, choice: Sequence[int]) -> Plan:
        """Return the plan that gives each layer the candidate of this index."""
        layers = {
            name: self.candidates[index] for name, index in zip(self.layers, choice, strict=True)
        }
        return replace(self.template, layers=layers)

    def without_copies(self) -> NDArray[np.intp]:
        """Return the indices of the candidates of a single copy; they may have an adapter."""
        return np.flatnonzero([len(candidate.copies) == 1 for candidate in self.candidates])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, texts, lists and dicts, for JSON."""
        # A plan of the candidates keeps their roundings.
        named = dict(zip(map(str, self.candidates), self.candidates, strict=True))
        return {
            "layers": list(self.layers),
            "candidates": replace(self.template, layers=named).to_dict(),
            "kl": self.kl.tolist(),
            "nbytes": self.nbytes.tolist(),
            "multiplications": self.multiplications.tolist(),
            "parameters": self.parameters.tolist(),
            "outside": self.outside,
            "by": self.by,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Prices:
        """Restore what `to_dict` returned; ValueError if a field is missing or does not fit."""
        try:
            known = Plan.from_dict(values["candidates"])
            return cls(
                tuple(map(_text, values["layers"])),
                tuple(known.layers.values()),
                np.array(values["kl"], np.float64),
                np.array(values["nbytes"], np.int64),
                np.array(values["multiplications"], np.int64),
                np.array(values["parameters"], np.int64),
                int(values["outside"]),
                replace(known, layers={}),
                _text(values["by"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not prices: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, atomically; OSError if that fails."""
        with new_file(path) as file:
            file.write(json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prices:
        """Read what `save` wrote; FormatError if the file is something else."""
        try:
            values = json.loads(Path(path).read_bytes())
            if not isinstance(values, dict):
                raise ValueError(f"expected a JSON object, found {type(values).__name__}")
            return cls.from_dict(values)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{os.fspath(path)}: {error}") from error

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, a row for each layer and candidate; ImportError without it."""
        pairs = [(name, str(plan)) for name in self.layers for plan in self.candidates]
        names = ("kl", "nbytes", "multiplications")
        columns = {name: getattr(self, name).ravel() for name in names}
        return as_frame(pairs, ["layer", "candidate"]).assign(**columns)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"all layers planned alike, {len(self.layers)} layers, prices by {self.by}"
        width = max(9, *(len(str(one)) for one in self.candidates))
        yield f"{'candidate':{width}} {'bits':>7} {'KL':>9} {'multiplications':>16}"
        bits = 8 * self.nbytes.sum(0) / self.parameters.sum()
        times = self.multiplications.sum(0) / self.parameters.sum()
        for one, *numbers in zip(self.candidates, bits, self.kl.sum(0), times, strict=True):
            cells = "{:7.3f} {:9.4g} {:16.3f}".format(*numbers)
            yield f"{one!s:{width}} {cells}"


def prices(
    model: Model,
    data: Statistics | Text,
    formats: Sequence[LayerPlan | Format | str],
    *,
    by: LayerPlan | Format | str = "int2g64",
    noise: float = 0.3,
    rows: int | None = 128,
    measure: int = 2,
    samples: int = 16,
    window: int = 512,
    progress: bool | Progress = False,
    **options: Unpack[PlanOptions],
) -> Prices:
    """Find what each layer of a model costs in each of several formats.

    The price is the KL divergence that quantizing this layer alone causes. It is measured once for
    each layer, in a format that is quick to make, and scaled by errors: ``alpha_l t_l^2``, where
    t_l^2 is the relative squared error of the layer's outputs. So a further format costs no run of
    the model.

    Parameters
    ----------
    model : Model
        In float32, not rotated. Left unchanged.
    data : Statistics, or text as for `calibrate`
        Text is calibrated on here, with Hessians. Statistics are of this model; if they have no
        Hessians, layers are rounded to nearest to price them, and errors are of the weights.
    formats : sequence of LayerPlan, Format or str
        Candidates, for example ``["trellis2", "trellis3", "trellis2 + trellis2 residual"]``.
    by : LayerPlan, Format or str, default="int2g64"
        The format that is measured. ``"noise"``: Gaussian noise on the weights is, as in the paper.
        ``"measured"``: all candidates are, which takes a run for each layer and candidate, and
        memory for all of them.
    noise : float, default=0.3
        Relative size of the noise; the formats of 2 bits err by about this much.
    rows : int or None, default=128
        Errors are found on that many rows of a layer, drawn by `seed`: within 1 % for 128 x 576
        weights. Adapters need all rows, and so does ``"measured"``. None: all rows.
    measure : int, default=2
        Number of windows that the divergence is measured on, the first ones.
    samples, window : int
        Number and length of the windows of a text.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the numbers of finished steps
        and of all steps.
    **options
        Fields of Rounding, Sampling and Plan, as for `Plan.uniform`: rotation, seed, embedding.
        Plans that are made of the prices correct for drift, unless told ``drift=False``, given
        statistics with Hessians, or rounded to nearest.

    Returns
    -------
    Prices

    Raises
    ------
    ValueError
        If the model is quantized or not finite, data does not fit it, a candidate does not fit a
        layer, candidates round activations differently, which only ``"measured"`` sees, or an
        option is out of range.

    Notes
    -----
    Memory holds the changed weights of all layers, 4 bytes each. SmolLM2-135M takes five minutes of
    one thread for four scalar formats, half of them runs of the model on 512 tokens.

    How well the measured divergence of GPTQ-rounded layers is predicted: Spearman's correlation
    over 42 layers of SmolLM2-135M, 256 tokens, and the sum of predicted over that of measured
    prices. Noise on weights predicts rounding to nearest (0.95) but not GPTQ, whose errors avoid
    what inputs have in common; errors of the weights, instead of the outputs, miss a factor of 10.

    =============  ===========  ===========  ===========
    by             int2g64      int3g64      trellis1w10
    =============  ===========  ===========  ===========
    int2g64                     0.98, 1.08   0.91, 0.99
    int3g64        0.98, 0.92                0.94, 0.86
    noise          0.80, 1.15   0.85, 1.27   0.81, 1.04
    =============  ===========  ===========  ===========

    References
    ----------
    V. Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the
    Linearity Theorem", 2024, sections 4 and 5.

    Examples
    --------
    >>> found = prices(model, text, ["int2g64", "int3g64", "int4g64"])  # doctest: +SKIP
    >>> print(found)  # doctest: +SKIP
    """
    if not 0 < noise < 1:
        raise ValueError(f"noise is {noise}, expected more than 0 and less than 1")
    if rows is not None:
        check_count("rows", rows, 1)
    check_count("measure", measure, 1)
    linears = dict(model.linears())
    measured = by == "measured"
    candidates = _candidates(formats, measured, options)
    probe = None if measured or by == "noise" else _layer_plan(by, options)
    for name, linear in linears.items():
        if not isinstance(linear, Linear):
            raise ValueError(f"{name} is quantized already; price the float original")
        for candidate in candidates:
            check_plan(candidate, linear.shape, name)
    check_finite(model)
    plan = Plan.uniform(linears, candidates[0], **options)
    template = replace(plan, layers={})
    stats = data
    if not isinstance(stats, Statistics):
        stats = calibrate(
            model, stats, samples=samples, window=window, seed=template.seed, hessians=True
        )
    if measure > len(stats.tokens):
        raise ValueError(f"measure is {measure}, but data has only {len(stats.tokens)} windows")
    if "drift" not in options:
        known = stats is data and bool(stats.hessians)
        template = replace(template, drift=plan.needs_text and not known and len(stats.tokens) > 1)
    tokens = token_array(stats.tokens[:measure], model.config.vocab_size, axes=(2,))

    source = rotate(model, template.rotation, template.seed)
    walk: Walk = WithoutInputs(source)
    rounded = candidates
    if stats.hessians:
        walk = Known(model, source, stats, template.seed)
    else:
        rounded = [replace(plan, rounding=_TO_NEAREST) for plan in candidates]
        probe = None if probe is None else replace(probe, rounding=_TO_NEAREST)
    total = len(linears) * (1 + (len(candidates) if measured else 1) * len(tokens))
    report, steps = reporter(progress, total, title="prices", unit="step"), count(1)
    work = _Work(source, walk, rounded, tokens, template.seed, lambda: report(next(steps), total))
    kl = work.measured() if measured else work.scaled(probe, noise, rows)

    shapes = [linear.shape for linear in linears.values()]
    return Prices(
        tuple(linears),
        tuple(candidates),
        kl,
        np.array([[stored_bytes(plan, shape) for plan in candidates] for shape in shapes]),
        np.array([[multiplications(plan, shape) for plan in candidates] for shape in shapes]),
        np.array([rows * cols for rows, cols in shapes]),
        _outside(source, template),
        template,
        str(by),
    )


def _layer_plan(one: LayerPlan | Format | str, options: PlanOptions) -> LayerPlan:
    return Plan.uniform(["layer"], one, **options).layers["layer"]


def _candidates(formats: Any, measured: bool, options: PlanOptions) -> list[LayerPlan]:
    if isinstance(formats, (LayerPlan, Format, str)):
        raise ValueError(f"formats is {str(formats)!r}, expected a sequence of them")
    found = [_layer_plan(one, options) for one in formats]
    if not found:
        raise ValueError("formats is empty, expected at least one")
    texts = [str(one) for one in found]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ValueError(f"formats has {twice[0]!r} twice")
    bits = [tuple(copy.activation_bits for copy in one.copies) for one in found]
    if not measured and len({*map(frozenset, bits)}) > 1:
        raise ValueError(
            f"formats {', '.join(texts)} round activations differently, which errors of weights "
            "do not price; use by='measured'"
        )
    return found


def _outside(source: Model, template: Plan) -> int:
    """Bytes of a quantized model besides its linear layers."""
    floats = dict(source.matrices())
    linears = dict(source.linears())
    total = source.nbytes - sum(linear.nbytes for linear in floats.values())
    for name in floats.keys() - linears.keys():
        plan = template.embedding
        total += floats[name].nbytes if plan is None else stored_bytes(plan, floats[name].shape)
    return total


@dataclass(frozen=True)
class _Work:
    """Finding prices of the layers of a rotated model."""

    source: Model
    walk: Walk
    candidates: list[LayerPlan]
    tokens: NDArray[np.int32]
    seed: int
    step: Callable[[], object]

    def measured(self) -> NDArray[np.float64]:
        layers: dict[tuple[str, str], AnyLinear] = {}
        for name, task in self._tasks():
            for plan in self.candidates:
                made, _ = encode(task.linear, task.inputs, plan, self.seed)
                layers[str(plan), name] = made
        found = each_alone(self.source, self.tokens, layers, "linear", self.step)
        names = [name for name, _ in self.source.linears()]
        kl = [[found[str(plan), name] for plan in self.candidates] for name in names]
        return np.array(kl, np.float64)

    def scaled(
        self, probe: LayerPlan | None, noise: float, rows: int | None
    ) -> NDArray[np.float64]:
        """Measure the probe, or noise in its place, and scale by errors."""
        layers: dict[tuple[str, str], AnyLinear] = {}
        ratios = []
        for number, (name, task) in enumerate(self._tasks()):
            place = [self.seed, number]
            if probe is None:
                changed = noisy(task.linear, noise, place)
            else:
                changed = self._rounded(task.linear, task, probe)
            layers["", name] = changed
            size = _relative_error(task.linear, changed, task)
            part = _some_rows(task.linear, rows, place)
            found = [self._error(part, task, plan) for plan in self.candidates]
            ratios.append([error / size if size else 0.0 for error in found])
        kl = each_alone(self.source, self.tokens, layers, "linear", self.step)
        alone = [kl["", name] for name, _ in self.source.linears()]
        scaled: NDArray[np.float64] = np.array(ratios) * np.array(alone)[:, None]
        return scaled

    def _error(self, part: Linear, task: Task, plan: LayerPlan) -> float:
        before = task.linear if plan.rank else part
        return _relative_error(before, self._rounded(before, task, plan), task)

    def _rounded(self, linear: Linear, task: Task, plan: LayerPlan) -> Linear:
        """Return the layer with quantized weights, decoded, for inputs that are rotated alike."""
        weight = encode(linear, task.inputs, plan, self.seed)[0].dequantize()
        if linear.rotation is not None:
            weight = linear.rotation.apply(weight)
        return replace(linear, weight=weight)

    def _tasks(self) -> Iterator[tuple[str, Task]]:
        for index in range(len(self.source.blocks)):
            for task in self.walk.tasks(index):
                yield name_in_block(index, task.slot), task
                self.step()
            self.walk.leave(index)


def _some_rows(linear: Linear, rows: int | None, seed: list[int]) -> Linear:
    """Return a layer of some of the rows, drawn at random."""
    if rows is None or rows >= linear.shape[0]:
        return linear
    drawn = np.random.default_rng(seed).choice(linear.shape[0], rows, replace=False)
    return replace(linear, weight=linear.weight[np.sort(drawn)], bias=None)


def _relative_error(before: Linear, after: Linear, task: Task) -> float:
    """Return tr(E H E^T) / tr(W H W^T) for the rows of a layer; H = 1 if it is not known."""

    def squares(weight: NDArray[np.float32]) -> float:
        if task.inputs.hessian is None:
            return float(np.square(weight, dtype=np.float64).sum())
        return _core.hessian_error(task.inputs.hessian, weight)

    size = squares(before.weight)
    return squares(before.weight - after.weight) / size if size else 0.0


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value
