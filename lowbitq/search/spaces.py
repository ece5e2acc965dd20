"""What is searched: parameters of the copies of a quantized model, by patterns of layer names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lowbitq._core import FormatError
from lowbitq.linears import Copy, QuantizedLinear
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.slots import SLOTS

# A range (low, high), or a list of values.
Values: TypeAlias = "tuple[float, float] | list[float]"
Point: TypeAlias = Mapping[str, Mapping[str, float]]

PARAMETERS = ("clip", "scale", "zero", "weight")

# How much of the inputs' range to keep, for each kind of layer.
CLIPS: dict[str, dict[str, Values]] = {f"*.{slot.name}": {"clip": (0.6, 1.0)} for slot in SLOTS}

# The 225 points of section 5.3.2: two copies, the same in all layers.
_SCALES, _CLIPS = [0.8, 0.9, 1.0, 1.1, 1.2], [0.9, 0.95, 0.99]
GRID: dict[str, dict[str, Values]] = {
    "*": {"scale1": _SCALES, "scale2": _SCALES, "clip1": _CLIPS, "clip2": _CLIPS}
}


def read_space(source: str | os.PathLike[str]) -> Mapping[str, Mapping[str, Values]]:
    """Return the space of a name or of a JSON file.

    Parameters
    ----------
    source : str or path
        ``"clips"`` or ``"grid"``: `CLIPS` or `GRID`. Otherwise a file with an object of patterns,
        each an object of parameters; a list has the values, ``{"low": 0.5, "high": 1}`` is a range.

    Raises
    ------
    FormatError
        If the file is something else.
    OSError
        If it cannot be read.
    """
    if source in ("clips", "grid"):
        return CLIPS if source == "clips" else GRID
    try:
        found = json.loads(Path(source).read_bytes())
        return {
            pattern: {name: _values_of(name, values) for name, values in names.items()}
            for pattern, names in found.items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{os.fspath(source)}: not a space: {error}") from error


def _values_of(name: str, values: Any) -> Values:
    if isinstance(values, dict):
        if values.keys() != {"low", "high"}:
            raise ValueError(f"{name} has {', '.join(values)}, expected low and high")
        return values["low"], values["high"]
    if not isinstance(values, list):
        raise ValueError(f"{name} is {values!r}, expected a list or low and high")
    return values


@dataclass(frozen=True)
class Parameter:
    """One number that is searched.

    Attributes
    ----------
    pattern, name : str
        As in the space.
    kind : str
        One of `PARAMETERS`.
    copy : int or None
        Index of the copy; None: all copies.
    values : (float, float) or list of float
    layers : tuple of str
        The layers that it changes.
    """

    pattern: str
    name: str
    kind: str
    copy: int | None
    values: Values
    layers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in a study."""
        return f"{self.pattern} {self.name}"


class Space:
    """A space of parameters of a model's copies.

    Parameters
    ----------
    model : QuantizedModel
        Left unchanged.
    space : mapping of str to mapping of str to tuple or list
        Patterns of layer names, with ``*`` and ``?``, to parameters, to their values: a range
        ``(low, high)`` or a list. All layers that match have the same value. The name of a
        parameter may end in the number of a copy, from 1; otherwise it is that of all copies.

        ``clip``
            Factor of the range of inputs that is kept: of `Activation.clip`, or of a static
            `Activation.scale`.
        ``scale``
            Factor of a static scale.
        ``zero``
            Added to the zero point, in steps of a static scale.
        ``weight``
            Factor of the copy's outputs: its weight in the sum, or the scale of its weights.

    Attributes
    ----------
    parameters : tuple of Parameter
        In the order of the space.

    Raises
    ------
    ValueError
        If a pattern matches no layer with such a copy, two patterns change the same number, a
        parameter is unknown, values are not finite numbers, or a copy has no static scale that a
        parameter could change.
    """

    def __init__(self, model: QuantizedModel, space: Mapping[str, Mapping[str, Values]]) -> None:
        self._model = model
        self._linears = dict(model.linears())
        self.parameters = tuple(
            self._parameter(pattern, name, values)
            for pattern, names in space.items()
            for name, values in names.items()
        )
        if not self.parameters:
            raise ValueError("space is empty, expected at least one parameter")
        taken: dict[tuple[str, int, str], str] = {}
        for parameter in self.parameters:
            for layer, index in self._places(parameter):
                key = layer, index, parameter.kind
                if key in taken:
                    raise ValueError(
                        f"{taken[key]!r} and {parameter.key!r} both change the {parameter.kind} of "
                        f"copy {index + 1} of {layer}"
                    )
                taken[key] = parameter.key
                self._check(layer, index, parameter)

    def _parameter(self, pattern: str, name: str, values: Any) -> Parameter:
        match = re.fullmatch(r"([a-z]+)([1-9][0-9]*)?", name)
        if match is None or match[1] not in PARAMETERS:
            expected = f"{', '.join(PARAMETERS)}, or one of these with the number of a copy"
            raise ValueError(f"parameter is {name!r}, expected {expected}")
        copy = None if match[2] is None else int(match[2]) - 1
        matches = [
            layer
            for layer, linear in self._linears.items()
            if fnmatchcase(layer, pattern)
            and isinstance(linear, QuantizedLinear)
            and (copy is None or copy < len(linear.copies))
        ]
        if not matches:
            which = "quantized layers" if copy is None else f"layers with a copy {copy + 1}"
            raise ValueError(
                f"pattern {pattern!r} matches no {which}, such as {next(iter(self._linears))!r}"
            )
        _check_values(f"{pattern} {name}", values)
        return Parameter(pattern, name, match[1], copy, values, tuple(matches))

    def _copies(self, layer: str) -> tuple[Copy, ...]:
        linear = self._linears[layer]
        assert isinstance(linear, QuantizedLinear)
        return linear.copies

    def _places(self, parameter: Parameter) -> list[tuple[str, int]]:
        """Layers and indices of the copies that a parameter changes."""
        return [
            (layer, index)
            for layer in parameter.layers
            for index in range(len(self._copies(layer)))
            if parameter.copy in (None, index)
        ]

    def _check(self, layer: str, index: int, parameter: Parameter) -> None:
        how = self._copies(layer)[index].activation
        place = f"copy {index + 1} of {layer}"
        if parameter.kind == "weight":
            return
        if how.bits is None:
            raise ValueError(f"{parameter.key!r}: {place} does not round its inputs")
        if parameter.kind != "clip" and how.scale is None:
            raise ValueError(
                f"{parameter.key!r}: {place} scales each token by itself; "
                "lowbitq.search.static makes scales static"
            )
        if parameter.kind == "zero" and isinstance(how.zero, str):
            raise ValueError(f"{parameter.key!r}: {place} has a zero point for each token")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that change, in the order of the model."""
        changed = {layer for parameter in self.parameters for layer in parameter.layers}
        return tuple(layer for layer in self._linears if layer in changed)

    def apply(self, values: Mapping[str, float]) -> QuantizedModel:
        """Return the model with these parameters.

        Parameters
        ----------
        values : mapping of str to float
            By `Parameter.key`. Parameters that are missing stay as they are.

        Returns
        -------
        QuantizedModel
            Packed weights are shared with the model.

        Raises
        ------
        ValueError
            If a clip or scale leaves the range of `Activation`.
        """
        changes: dict[tuple[str, int], dict[str, float]] = {}
        for parameter in self.parameters:
            if parameter.key in values:
                for place in self._places(parameter):
                    changes.setdefault(place, {})[parameter.kind] = values[parameter.key]
        model = self._model.copy()
        assert isinstance(model, QuantizedModel)
        for layer in dict.fromkeys(layer for layer, _ in changes):
            linear = self._linears[layer]
            copies = [
                _changed(copy, changes.get((layer, index), {}))
                for index, copy in enumerate(self._copies(layer))
            ]
            model.replace_linear(layer, linear.replace(copies=tuple(copies)))
        return model

    def key_values(self, point: Point) -> dict[str, float]:
        """Return a point, nested like the space, by the keys of its parameters.

        Raises
        ------
        ValueError
            If the space does not have a parameter or a value.
        """
        found = {}
        known = {parameter.key: parameter for parameter in self.parameters}
        for pattern, names in point.items():
            for name, value in names.items():
                key = f"{pattern} {name}"
                if key not in known:
                    raise ValueError(f"start has {key!r}, expected some of {', '.join(known)}")
                values = known[key].values
                low, high = min(values), max(values)
                inside = value in values if isinstance(values, list) else low <= value <= high
                if not inside:
                    raise ValueError(f"start has {key!r} = {value}, expected one of {values}")
                found[key] = value
        return found

    def describe(self) -> dict[str, Any]:
        """Return keys and values for JSON."""
        return {parameter.key: list(parameter.values) for parameter in self.parameters}


def _check_values(key: str, values: Any) -> None:
    fits = isinstance(values, (tuple, list)) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
        for value in values
    )
    if fits and isinstance(values, list):
        fits = len(set(values)) == len(values) > 0
    elif fits:
        fits = len(values) == 2 and values[0] < values[1]
    if not fits:
        raise ValueError(
            f"{key!r} has {values!r}, expected a range (low, high) or a list of different numbers"
        )


def _changed(copy: Copy, changes: Mapping[str, float]) -> Copy:
    if not changes:
        return copy
    how, factor = copy.activation, changes.get("clip", 1.0)
    if how.scale is None:
        activation = replace(how, clip=how.clip * factor)
    else:
        scale = how.scale * changes.get("scale", 1.0) * factor
        zero: Any = how.zero
        if "zero" in changes:
            zero = how.zero + changes["zero"] * how.scale  # type: ignore[operator]
        activation = replace(how, scale=scale, zero=zero)
    weight = copy.weight
    if "weight" in changes:
        before = np.ones(copy.tensor.shape[0], np.float32) if weight is None else weight
        weight = before * np.float32(changes["weight"])
    return replace(copy, activation=activation, weight=weight)
