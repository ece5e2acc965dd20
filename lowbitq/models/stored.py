"""Layers in a saved folder: arrays by name, and the rest as JSON.

The entry of a dense layer (arrays ``NAME.weight``, ``NAME.bias``) is ``{}``, with ``"rotation"`` if
it has one. The entry of a packed layer is

    {"copies": [{"tensor": {...}, "at": "NAME.copies.0", "rotation": {...},
                 "output_rotation": {...}, "activation": {...}, "rounding_rotation": {...}}, ...]}

with the arrays ``NAME.copies.0.panels``, ``.levels`` and ``.weight``, ``NAME.adapter.U`` and
``.V``. Copies that share a tensor have the same ``"at"``. A layer that occurs twice in a model is
``{"same_as": NAME}`` the second time. In version 2, the entry itself had the fields of one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from numpy.typing import NDArray

from lowbitq.checkpoints import PackedFolder
from lowbitq.checkpoints.archives import Arrays
from lowbitq.checkpoints.packed import narrowest
from lowbitq.linears import Activation, Copy, Linear, QuantizedLinear
from lowbitq.rotations import Rotation
from lowbitq.tensors import QuantizedTensor

AnyLinear = Linear | QuantizedLinear


class LayerWriter:
    """Splits layers into arrays and JSON; shared parts are stored once.

    Parameters
    ----------
    narrow : callable, default=narrowest
        What makes stored floats of float32 ones.

    Attributes
    ----------
    arrays : dict of str to ndarray
        All arrays so far.
    """

    def __init__(self, narrow: Callable[[Any], NDArray[Any]] = narrowest) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self._narrow = narrow
        self._layers: dict[int, str] = {}
        self._tensors: dict[int, str] = {}

    def layer(self, name: str, linear: AnyLinear) -> dict[str, Any]:
        """Add the arrays of a layer to `arrays`, under its name; return its entry."""
        if id(linear) in self._layers:
            return {"same_as": self._layers[id(linear)]}
        self._layers[id(linear)] = name
        if linear.bias is not None:
            self.arrays[f"{name}.bias"] = self._narrow(linear.bias)
        if isinstance(linear, Linear):
            self.arrays[f"{name}.weight"] = self._narrow(linear.weight)
            rotation = self.rotation(f"{name}.rotation", linear.rotation)
            return {} if rotation is None else {"rotation": rotation}
        for letter, array in zip("UV", linear.adapter or (), strict=False):
            self.arrays[f"{name}.adapter.{letter}"] = self._narrow(array)
        copies = enumerate(linear.copies)
        return {"copies": [self._copy(f"{name}.copies.{i}", copy) for i, copy in copies]}

    def _copy(self, name: str, copy: Copy) -> dict[str, Any]:
        arrays, metadata = copy.tensor.to_arrays()
        at = self._tensors.setdefault(id(copy.tensor), name)
        if at == name:
            self.arrays |= {f"{name}.{part}": array for part, array in arrays.items()}
        if copy.weight is not None:
            self.arrays[f"{name}.weight"] = self._narrow(copy.weight)
        how = asdict(replace(copy.activation, rotation=None))
        del how["rotation"]
        entry: dict[str, Any] = {"tensor": metadata, "at": at, "activation": how}
        if (basis := copy.activation.rotation) is not None:
            entry["rounding_rotation"] = self.rotation(f"{name}.rounding_rotation", basis)
        for kind in ("rotation", "output_rotation"):
            if (rotation := getattr(copy, kind)) is not None:
                entry[kind] = self.rotation(f"{name}.{kind}", rotation)
        return entry

    def rotation(self, name: str, rotation: Rotation | None) -> dict[str, Any] | None:
        """Add the arrays of a rotation to `arrays`; return its entry, None if it is None."""
        if rotation is None:
            return None
        arrays = rotation.to_arrays()
        self.arrays |= {f"{name}.{part}": array for part, array in arrays.items()}
        return rotation.to_dict()


class LayerReader:
    """Joins what `LayerWriter` split; packed arrays stay mapped.

    All methods raise AttributeError, KeyError, TypeError or ValueError if arrays and entries do not
    match.

    Attributes
    ----------
    used : set of str
        Names of the arrays that have been read.
    """

    def __init__(self, folder: PackedFolder | Arrays) -> None:
        self.folder = folder
        self.used: set[str] = set()
        self._layers: dict[str, AnyLinear] = {}
        self._tensors: dict[str, QuantizedTensor] = {}

    def layer(self, name: str, entry: Mapping[str, Any]) -> AnyLinear:
        """Make a layer; a layer that it refers to must have been made before."""
        same = entry.get("same_as")
        self._layers[name] = self._join(name, entry) if same is None else self._layers[same]
        return self._layers[name]

    def _join(self, name: str, entry: Mapping[str, Any]) -> AnyLinear:
        bias = self._array(f"{name}.bias")
        if "copies" in entry:
            copies = enumerate(entry["copies"])
            U, V = (self._array(f"{name}.adapter.{letter}") for letter in "UV")
            made = tuple(self._copy(f"{name}.copies.{i}", copy) for i, copy in copies)
            return QuantizedLinear(made, bias, None if U is None and V is None else (U, V))  # type: ignore[arg-type]
        at = f"{name}.rotation", entry.get("rotation")
        if "tensor" not in entry:
            weight = self._array(f"{name}.weight")
            if weight is None or weight.ndim != 2:
                raise ValueError("has no matrix of weights")
            return Linear(weight, bias, self.rotation(*at, weight.shape[1]))
        tensor = self._tensor(name, entry["tensor"])
        rotation = self.rotation(*at, tensor.cols)
        return QuantizedLinear.of(tensor, bias, rotation, entry["activation_bits"])

    def _copy(self, name: str, entry: Mapping[str, Any]) -> Copy:
        tensor = self._tensor(entry["at"], entry["tensor"])
        rotations = (
            self.rotation(f"{name}.{kind}", entry.get(kind), order)
            for kind, order in (
                ("rotation", tensor.cols),
                ("output_rotation", tensor.rows),
                ("rounding_rotation", tensor.cols),
            )
        )
        turn, output, basis = rotations
        activation = Activation(**entry["activation"], rotation=basis)
        return Copy(tensor, turn, output, activation, self._array(f"{name}.weight"))

    def _tensor(self, at: str, metadata: Mapping[str, Any]) -> QuantizedTensor:
        if at not in self._tensors:
            found = [part for part in ("panels", "levels") if f"{at}.{part}" in self.folder.tensors]
            self.used |= {f"{at}.{part}" for part in found}
            arrays = {part: self.folder.view(f"{at}.{part}") for part in found}
            self._tensors[at] = QuantizedTensor.from_arrays(arrays, metadata)
        return self._tensors[at]

    def rotation(self, name: str, entry: Mapping[str, Any] | None, n: int) -> Rotation | None:
        """Make the rotation of order `n` that an entry describes; None if it is None."""
        if entry is None:
            return None
        if entry["n"] != n:  # check first, because a rotation takes memory
            raise ValueError(f"the rotation has order {entry['n']!r:.50}, expected {n}")
        matrix = self._array(f"{name}.matrix")
        return Rotation.from_dict(entry, {} if matrix is None else {"matrix": matrix})

    def _array(self, name: str) -> NDArray[Any] | None:
        if name not in self.folder.tensors:
            return None
        self.used.add(name)
        return self.folder.load(name)
