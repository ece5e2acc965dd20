"""Plans: how each layer of a model is quantized."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from lowbitq.formats import Format
from lowbitq.plan_options import (
    NEAREST,
    Rounding,
    RoundingOptions,
    Sampling,
    check_at_least_zero,
    check_choice,
)
from lowbitq.tables import as_frame, as_html

ROTATIONS = ("hadamard", "orthogonal", "none")
MODES = ("own", "shared", "residual")

# Options of a plan by the time they take.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"drift": False, "sweeps": 0},
    "balanced": {"drift": True},
}

_ACTIVATIONS = {"a4": 4, "a8": 8, "a32": None}
Value = TypeVar("Value")


@dataclass(frozen=True)
class CopyPlan:
    """One quantized copy of a layer.

    Parameters
    ----------
    format : Format or str
    rotation : {"hadamard", "orthogonal"} or None, default=None
        Rotation of this copy's input, in the place of the one that its layer has in the model (o
        and down have one). None: that of the layer.
    mode : {"own", "shared", "residual"}, default="own"
        ``"own"``: codes of the weights in this rotation. ``"shared"``: the codes of the first copy
        once more; its input is rounded in this rotation and rotated back. ``"residual"``: codes of
        the error that the previous copies leave.
    activation_bits : {8, 4, None}, default=8
        Bits of its input as the model runs; None: float32.

    Raises
    ------
    ValueError
        If a choice is none of these, or the format is unknown.

    Examples
    --------
    >>> CopyPlan.parse("int2g64 hadamard residual a4")
    CopyPlan(format='int2g64', rotation='hadamard', mode='residual', activation_bits=4)
    """

    format: str
    rotation: str | None = None
    mode: str = "own"
    activation_bits: int | None = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", str(Format.parse(self.format)))
        check_choice("rotation", self.rotation, (None, *ROTATIONS[:2]))
        check_choice("mode", self.mode, MODES)
        check_choice("activation_bits", self.activation_bits, (8, 4, None))

    @classmethod
    def parse(cls, text: str, *, activation_bits: int | None = 8) -> CopyPlan:
        """Parse a copy: a format, then a rotation, a mode, ``a4``, ``a8`` or ``a32``.

        Parameters
        ----------
        text : str
        activation_bits : {8, 4, None}, default=8
            Default where the text has none.

        Raises
        ------
        ValueError
            If a word is unknown, or two are of the same kind.
        """
        format, *words = text.split() or [""]
        found: dict[str, Any] = {}
        for word in words:
            for name, choices in (
                ("rotation", {key: key for key in ROTATIONS[:2]}),
                ("mode", {key: key for key in MODES}),
                ("activation_bits", _ACTIVATIONS),
            ):
                if word in choices and name not in found:
                    found[name] = choices[word]
                    break
            else:
                expected = ", ".join([*ROTATIONS[:2], *MODES, *_ACTIVATIONS])
                raise ValueError(f"copy {text!r} has {word!r}, expected one each of {expected}")
        return cls(format, **{"activation_bits": activation_bits, **found})

    def __str__(self) -> str:
        words = [self.format]
        if self.rotation is not None:
            words.append(self.rotation)
        if self.mode != "own":
            words.append(self.mode)
        if self.activation_bits != 8:
            words.append(f"a{self.activation_bits or 32}")
        return " ".join(words)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized: its copies, their rounding, the rank of its adapter.

    Parameters
    ----------
    copies : tuple of CopyPlan
        At least one; their outputs are summed.
    rounding : Rounding
    rank : int, default=0
        Rank of an adapter ``U V^T`` added to the copies; 0: none. It is the best for the error that
        rounding leaves in the layer's outputs, or with method ``"rtn"`` in its weights, and is
        stored in float16: 16 rank (rows + cols) bits.

    Raises
    ------
    ValueError
        If there is no copy, the first one's mode is not ``"own"``, or `rank` is negative.

    Examples
    --------
    >>> layer = LayerPlan.parse("int2g64 + int2g64 residual + rank8")
    >>> len(layer.copies), layer.copies[1].mode, layer.rank
    (2, 'residual', 8)
    >>> str(layer)
    'int2g64 + int2g64 residual + rank8'
    """

    copies: tuple[CopyPlan, ...]
    rounding: Rounding = Rounding()
    rank: int = 0

    def __post_init__(self) -> None:
        if not self.copies or self.copies[0].mode != "own":
            first = (
                f"the first has mode {self.copies[0].mode!r}" if self.copies else "there is none"
            )
            raise ValueError(f"copies: {first}, expected a first copy of mode 'own'")
        check_at_least_zero("rank", self.rank)

    @classmethod
    def parse(
        cls,
        text: LayerPlan | Format | str,
        rounding: Rounding | None = None,
        *,
        activation_bits: int | None = 8,
    ) -> LayerPlan:
        """Parse a layer: copies joined by ``+``, then optionally ``rankN``.

        Parameters
        ----------
        text : str, Format or LayerPlan
            A LayerPlan is returned as it is.
        rounding : Rounding, default=None
            None: the default one.
        activation_bits : {8, 4, None}, default=8
            Default for copies whose text has none.

        Raises
        ------
        ValueError
            If the text cannot be parsed.
        """
        if isinstance(text, LayerPlan):
            return text
        parts = [part.strip() for part in str(text).split("+")]
        rank = 0
        if len(parts) > 1 and parts[-1][:4] == "rank" and parts[-1][4:].isdecimal():
            rank = int(parts.pop()[4:])
        copies = (CopyPlan.parse(part, activation_bits=activation_bits) for part in parts)
        return cls(tuple(copies), rounding or Rounding(), rank)

    def __str__(self) -> str:
        return " + ".join([*map(str, self.copies), *[f"rank{self.rank}"] * (self.rank > 0)])


EMBEDDING = LayerPlan.parse("int8g64", NEAREST)


class PlanOptions(RoundingOptions, total=False):
    """What `lowbitq.compress` takes besides a format: fields of `Rounding`, `Sampling` and `Plan`.

    ``activation_bits`` is for copies whose text has none.
    """

    first_tokens: int
    first_weight: float
    clip: float
    rotation: str
    seed: int
    embedding: LayerPlan | Format | str | None
    drift: bool
    overrides: Mapping[str, LayerPlan | Format | str] | None
    activation_bits: int | None


@dataclass(frozen=True, repr=False)
class Plan:
    """What `compress` does to a model; made by `Plan.uniform` and kept with the result.

    Equal plans have equal hashes; do not modify a plan or its dictionary.

    Parameters
    ----------
    layers : dict of str to LayerPlan
        Plan of each linear layer by its Hugging Face name; a str means ``LayerPlan.parse(str)``.
    rotation : {"hadamard", "orthogonal", "none"}, default="hadamard"
        Rotation of the model before it is quantized; see `lowbitq.rotate`.
    seed : int, default=0
        Seed of the rotation and of the choice of calibration windows.
    sampling : Sampling
        Weights of the tokens of a window.
    drift : bool, default=False
        Whether each layer sees the inputs that all quantized layers before it make, those of its
        own block too, and makes up for their drift: see `lowbitq.drift`. Takes two to three times
        as long, and text.
    embedding : LayerPlan, str or None, default="int8g64"
        Plan of the embedding and the head, tied or not; a str means rounding to nearest. None: they
        stay as they are. With the default, SmolLM2's has a relative error of 3e-5, at 8.5 bits.

    Raises
    ------
    ValueError
        If a choice or number is none of these, or a format is unknown.

    Examples
    --------
    >>> plan = Plan.uniform(["a.up_proj", "a.down_proj"], "int2g64", damping=0.02)
    >>> str(plan.layers["a.up_proj"]), plan.layers["a.up_proj"].rounding.damping
    ('int2g64', 0.02)
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    layers: dict[str, LayerPlan]
    rotation: str = "hadamard"
    seed: int = 0
    sampling: Sampling = Sampling()
    embedding: LayerPlan | None = EMBEDDING
    drift: bool = False

    def __post_init__(self) -> None:
        check_choice("rotation", self.rotation, ROTATIONS)
        check_at_least_zero("seed", self.seed)
        layers = {name: LayerPlan.parse(layer) for name, layer in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        if self.embedding is not None:
            object.__setattr__(self, "embedding", LayerPlan.parse(self.embedding, NEAREST))

    def __hash__(self) -> int:
        layers = frozenset(self.layers.items())
        return hash((layers, self.rotation, self.seed, self.sampling, self.embedding, self.drift))

    def __repr__(self) -> str:
        kinds = Counter(map(str, self.layers.values()))
        mix = ", ".join(f"{count} x {text!r}" for text, count in kinds.most_common())
        return (
            f"{type(self).__name__}({mix}; rotation={self.rotation!r}, seed={self.seed}, "
            f"drift={self.drift}, embedding={str(self.embedding)!r})"
        )

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, a row for each layer; ImportError without pandas."""
        return as_frame({"layer": name, "plan": str(layer)} for name, layer in self.layers.items())

    def _repr_html_(self) -> str:
        rows = [{"layer": name, "plan": str(layer)} for name, layer in self.layers.items()]
        return as_html(["layer", "plan"], rows, caption=repr(self))

    @property
    def needs_text(self) -> bool:
        """Whether rounding any layer needs its inputs."""
        feedback = any(layer.rounding.method == "gptq" for layer in self.layers.values())
        return feedback or self.drift

    @classmethod
    def uniform(
        cls,
        names: Iterable[str],
        layer: LayerPlan | Format | str,
        *,
        overrides: Mapping[str, LayerPlan | Format | str] | None = None,
        **options: Any,
    ) -> Plan:
        """Plan the same for all linear layers, except those that match a pattern.

        Parameters
        ----------
        names : iterable of str
            The layers, such as ``dict(model.linears())``.
        layer : LayerPlan, Format or str
            Plan of every layer that matches no pattern.
        overrides : dict of str to LayerPlan, Format or str, default=None
            Plans by patterns of layer names, with ``*`` and ``?``; the last match applies.
        **options
            Fields of Rounding, Sampling and Plan, and ``activation_bits`` for copies whose text has
            none (if 4, the head still has 8).

        Returns
        -------
        Plan

        Raises
        ------
        ValueError
            If a pattern matches no layer, or an option is out of range.
        TypeError
            If an option is unknown.

        Examples
        --------
        >>> names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
        >>> plan = Plan.uniform(names, "int3g64", overrides={"*.down_proj": "int4g64"})
        >>> [str(layer) for layer in plan.layers.values()]
        ['int3g64', 'int4g64']
        """
        rounding = Rounding(**_take(options, Rounding))
        if sampled := _take(options, Sampling):
            options["sampling"] = Sampling(**sampled)
        bits = options.pop("activation_bits", 8)

        def parse(one: LayerPlan | Format | str) -> LayerPlan:
            return LayerPlan.parse(one, rounding, activation_bits=bits)

        layers = dict.fromkeys(names, parse(layer))
        for pattern, other in (overrides or {}).items():
            matches = [name for name in layers if fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(
                    f"override {pattern!r} matches none of {len(layers)} layers"
                    + (f", such as {next(iter(layers))!r}" if layers else "")
                )
            layers |= dict.fromkeys(matches, parse(other))
        outer = options.get("embedding", "int8g64")
        if isinstance(outer, (str, Format)):
            head_bits = None if bits is None else 8
            options["embedding"] = LayerPlan.parse(outer, NEAREST, activation_bits=head_bits)
        return Plan(layers, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dict for JSON.

        Returns
        -------
        dict
            ``layers`` and ``embedding`` are texts; ``rounding`` applies to most layers,
            ``roundings`` has the exceptions by layer.
        """
        common = Counter(layer.rounding for layer in self.layers.values()).most_common(1)
        rounding = common[0][0] if common else Rounding()
        others = {
            name: _differences(layer.rounding, rounding)
            for name, layer in self.layers.items()
            if layer.rounding != rounding
        }
        outer = self.embedding
        if outer is not None and outer.rounding != NEAREST:
            others["embedding"] = _differences(outer.rounding, NEAREST)
        return {
            "layers": {name: str(layer) for name, layer in self.layers.items()},
            "rotation": self.rotation,
            "seed": self.seed,
            "sampling": asdict(self.sampling),
            "embedding": None if outer is None else str(outer),
            "drift": self.drift,
            "rounding": asdict(rounding),
            "roundings": others,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Read what `to_dict` returned, or a plan of version 0.1, which has no nested fields.

        Parameters
        ----------
        values : mapping
            Missing fields have their defaults.

        Returns
        -------
        Plan

        Raises
        ------
        ValueError
            If there is an unknown field or a bad value.
        """
        left = dict(values)
        layers, roundings = _object(left, "layers"), _object(left, "roundings")
        rounding = _typed(Rounding, _object(left, "rounding") | _take(left, Rounding))
        sampling = _typed(Sampling, _object(left, "sampling") | _take(left, Sampling))
        bits, outer = left.pop("activation_bits", 8), left.pop("embedding", "int8g64")
        check_choice("activation_bits", bits, (8, 4, None))
        others = {"rotation": "hadamard", "seed": 0, "drift": False}
        for name, default in others.items():
            _check_type(name, left.get(name, default), default)
        if unknown := sorted(set(left) - set(others)):
            raise ValueError(f"a plan has no field {unknown[0]!r}")

        def parse(name: str, text: object, default: Rounding, bits: int | None) -> LayerPlan:
            if not isinstance(text, str):
                raise ValueError(f"{name} is {text!r}, expected str")
            own = _typed(Rounding, _object(roundings, name), default)
            return LayerPlan.parse(text, own, activation_bits=bits)

        parsed = {name: parse(name, text, rounding, bits) for name, text in layers.items()}
        if outer is not None:
            outer = parse("embedding", outer, NEAREST, None if bits is None else 8)
        if roundings:
            raise ValueError(
                f"roundings has {next(iter(roundings))!r}, which is not a layer of the plan"
            )
        return Plan(parsed, sampling=sampling, embedding=outer, **left)

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` returned; raises the errors of `from_dict`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the plan is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a plan is a JSON object, found {type(values).__name__}")
        return cls.from_dict(values)


def _take(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Remove the fields of a dataclass from `values` and return them."""
    return {f.name: values.pop(f.name) for f in fields(kind) if f.name in values}


def _differences(value: Any, other: Any) -> dict[str, Any]:
    before = asdict(other)
    return {name: now for name, now in asdict(value).items() if now != before[name]}


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Remove an object from `values` and return it, empty if it is missing."""
    found = values.pop(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name!r} is {found!r}, expected a JSON object")
    return dict(found)


def _typed(kind: type[Value], found: dict[str, Any], default: Value | None = None) -> Value:
    """Make a dataclass from JSON; every field must have the type of its default."""
    default = kind() if default is None else default
    known = asdict(default)  # type: ignore[call-overload]
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"a plan has no field {name!r}")
        if not (name == "sweeps" and value is None):
            _check_type(name, value, 0 if name == "sweeps" else known[name])
    return replace(default, **found)  # type: ignore[type-var]


def _check_type(name: str, value: object, default: object) -> None:
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if type(value) not in kinds:
        raise ValueError(f"{name} is {value!r}, expected {kinds[-1].__name__}")
