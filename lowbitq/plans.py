"""Plan: what becomes of each layer of a model, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lowbitq.formats import Format
from lowbitq.gptq import ORDERS
from lowbitq.quantizers import RANGES

if TYPE_CHECKING:
    from lowbitq.models.decoder import Model

_CHOICES: dict[str, tuple[object, ...]] = {
    "rotation": ("hadamard", "orthogonal", "none"),
    "method": ("gptq", "rtn"),
    "range": RANGES,
    "damping_by": ("mean", "median"),
    "order": ORDERS,
    "arithmetic": ("float32", "float64"),
    "activation_bits": (8, 4, None),
}


@dataclass(frozen=True)
class Plan:
    """What `compress` does to a model; made by `Plan.uniform` and kept with the result.

    Parameters
    ----------
    layers : dict of str to str
        Format of each linear layer by its Hugging Face name.
    rotation : {"hadamard", "orthogonal", "none"}, default="hadamard"
        Of the model before it is quantized; see `lowbitq.rotations.rotate`.
    seed : int, default=0
        Of the rotation, and of the choice of calibration windows.
    method : {"gptq", "rtn"}, default="gptq"
        ``"rtn"``: round to nearest, without calibration.
    range : str, default="mse"
        How scales are found; see `lowbitq.quantize`.
    norm : float, default=2.0
        Exponent of the error that range ``"mse"`` sums.
    importance : bool, default=True
        Whether the diagonal of the Hessian weighs these errors (``"gptq"`` only).
    damping : float, default=0.01
        Relative addition to the diagonal of the Hessian.
    damping_by : {"median", "mean"}, default="median"
        What it is relative to. SmolLM2 at 2 bits, 8 windows of calibration: perplexity 70.2 by the
        median, 73.2 by the mean, which one massive channel can lift above all others.
    order : {"group", "act", "none"}, default="group"
        Of the columns; see `lowbitq.gptq.feedback`.
    first_tokens : int, default=4
        This many tokens at the start of a window ...
    first_weight : float, default=16.0
        ... count this often in the Hessian. They carry the massive activation that all later
        tokens attend to.
    sweeps : int or None, default=None
        Passes of coordinate descent over what error feedback has found (``"gptq"`` only). None: two
        for codes of 1 and 2 bits, none for others. SmolLM2 at 2 bits, 16 windows of calibration: ln
        perplexity 4.19, 4.08, 4.04 after 0, 1, 2 of them, 4.11, 4.02, 4.00 by another seed. After 0
        and 2: 3.218 and 3.203 at 3 bits, but 3.016 and 3.028 at 4.
    arithmetic : {"float32", "float64"}, default="float32"
        Of the error feedback.
    activation_bits : {8, 4, None}, default=8
        Of the layers' inputs as the model runs; None: float32. The head's have 8 where these
        have 4.
    embedding : str or None, default="int8g64"
        Format of the embedding and of the head, tied or not: both are rounded to nearest. None:
        they stay as they are. The default leaves SmolLM2's a relative error of 3e-5, at 8.5 bits.

    Raises
    ------
    ValueError
        If a choice or number is none of these, or a format is unknown.

    Examples
    --------
    >>> plan = Plan({"model.layers.0.mlp.up_proj": "int4g64"}, damping=0.02)
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    layers: dict[str, str]
    rotation: str = "hadamard"
    seed: int = 0
    method: str = "gptq"
    range: str = "mse"
    norm: float = 2.0
    importance: bool = True
    damping: float = 0.01
    damping_by: str = "median"
    order: str = "group"
    first_tokens: int = 4
    first_weight: float = 16.0
    sweeps: int | None = None
    arithmetic: str = "float32"
    activation_bits: int | None = 8
    embedding: str | None = "int8g64"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")
        for name in ("seed", "damping", "first_tokens", "first_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.sweeps is not None and not self.sweeps >= 0:
            raise ValueError(f"sweeps is {self.sweeps}, expected at least 0 or None")
        if not self.norm > 0:
            raise ValueError(f"norm is {self.norm}, expected a positive number")
        layers = {name: str(Format.parse(format)) for name, format in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        if self.embedding is not None:
            object.__setattr__(self, "embedding", str(Format.parse(self.embedding)))

    def sweeps_of(self, name: str) -> int:
        """How many sweeps a layer gets.

        Parameters
        ----------
        name : str
            A key of `layers`.

        Returns
        -------
        int

        Examples
        --------
        >>> Plan({"gate": "int2g64", "down": "int4g64"}).sweeps_of("gate")
        2
        """
        if self.sweeps is not None:
            return self.sweeps
        return 2 if Format.parse(self.layers[name]).bits <= 2 else 0

    @classmethod
    def uniform(
        cls,
        model: Model,
        format: Format | str,
        *,
        overrides: Mapping[str, Format | str] | None = None,
        **options: Any,
    ) -> Plan:
        """Plan one format for all linear layers, but for those that a pattern names.

        Parameters
        ----------
        model : Model
        format : Format or str
            Of every layer that no pattern matches.
        overrides : dict of str to Format or str, default=None
            Patterns of layer names, with ``*`` and ``?``; the last that matches decides.
        **options
            Fields of Plan.

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
        >>> plan = Plan.uniform(model, "int3g64", overrides={"*.down_proj": "int4g64"})
        ... # doctest: +SKIP
        """
        layers = {name: str(Format.parse(format)) for name, _ in model.linears()}
        for pattern, other in (overrides or {}).items():
            matches = [name for name in layers if fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(
                    f"override {pattern!r} matches none of {len(layers)} layers, "
                    f"such as {next(iter(layers))!r}"
                )
            layers |= dict.fromkeys(matches, str(Format.parse(other)))
        return cls(layers, **options)

    def to_json(self) -> str:
        """Write the plan as JSON.

        Returns
        -------
        str
            Indented, with the fields in their order here.
        """
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Parameters
        ----------
        text : str
            Fields may be missing, but for ``layers``: they have their defaults.

        Returns
        -------
        Plan

        Raises
        ------
        ValueError
            If `text` is no JSON object, or has an unknown field or a bad value.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the plan is not JSON: {error}") from error
        if not isinstance(values, dict) or not isinstance(values.get("layers"), dict):
            raise ValueError("a plan is a JSON object with an object named 'layers'")
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"a plan has no field {unknown[0]!r}; it has {', '.join(known)}")
        for name, value in values.items():
            default = known[name].default
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            optional = name in ("activation_bits", "embedding") and value is None
            if name != "layers" and not optional and type(value) not in kinds:
                raise ValueError(f"{name} is {value!r}, expected {kinds[-1].__name__}")
        for layer, format in values["layers"].items():
            if type(format) is not str:
                raise ValueError(f"layers has {format!r} for {layer}, expected str")
        return cls(**values)
