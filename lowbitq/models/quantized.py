"""QuantizedModel: a model whose linear layers are packed, its report, and how it is saved."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.checkpoints import PackedFolder, open_checkpoint
from lowbitq.checkpoints.packed import (
    narrowest,
    new_folder,
    quantization_config,
    write_arrays,
    write_json,
)
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.decoder import AnyLinear, Model
from lowbitq.models.llama import HF_BLOCK, NORM_NAMES, OUTER_NAMES
from lowbitq.rotations import Rotation
from lowbitq.tensors import QuantizedTensor

RESIDUAL_ROTATION = "model.residual_rotation"

# What `split_linear` may store of a layer, behind its name.
LINEAR_ARRAYS = ("weight", "panels", "levels", "bias", "rotation.matrix")


@dataclass(eq=False, repr=False)
class QuantizedModel(Model):
    """A model whose linear layers are packed.

    Attributes
    ----------
    plan : Plan, dict or None
        What `compress` was asked to do; of a loaded model a dict, of which ``Plan(**plan)`` makes
        the Plan again.
    records : dict of str to dict
        What `compress` noted about each matrix: ``format``, ``bits_per_weight``,
        ``relative_error``, ``seconds`` and whatever else.
    """

    plan: Any = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def report(self) -> Report:
        """Return the records of all matrices; prints as a table."""
        return Report(
            [
                {"layer": name, "bits_per_weight": linear.bits_per_weight}
                | self.records.get(name, {})
                for name, linear in self.matrices()
            ],
            self.bits_per_weight,
            self.nbytes,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as a folder that `load` opens, with the same logits to the last bit.

        It holds ``config.json``, ``model.safetensors``, the tokenizer's files, ``plan.json``,
        ``report.json``, ``provenance.json`` and ``checksums.json``, and appears complete or not
        at all; a model saved there before is replaced in one step.

        Parameters
        ----------
        path : str or path-like
            Absent, an empty folder, or a model saved before with nothing added to it.

        Raises
        ------
        FileExistsError
            If `path` is something else, which is left alone.
        OSError
            If something cannot be written; names it, and leaves nothing behind.
        """
        arrays = {OUTER_NAMES["final_norm"][0]: narrowest(self.final_norm)}
        for i, block in enumerate(self.blocks):
            for field_name, (name, _) in NORM_NAMES.items():
                if (gain := getattr(block, field_name)) is not None:
                    arrays[HF_BLOCK.format(i, name) + ".weight"] = narrowest(gain)
        layers = {name: split_linear(linear, name, arrays) for name, linear in self.matrices()}
        tied = replace(self.config, tie_embeddings=self.head is None)
        config = tied.to_hf() | quantization_config(
            bits_per_weight=self.bits_per_weight,
            residual_rotation=_split_rotation(self.residual_rotation, RESIDUAL_ROTATION, arrays),
            layers=layers,
        )
        report = self.report()
        with new_folder(path) as folder:
            write_arrays(folder / "model.safetensors", arrays)
            write_json(folder / "config.json", config)
            write_json(
                folder / "report.json",
                {
                    "bits_per_weight": report.bits_per_weight,
                    "nbytes": report.nbytes,
                    "layers": report.layers,
                },
            )
            write_json(folder / "provenance.json", _provenance(self.provenance))
            if self.plan is not None:
                plan = self.plan if isinstance(self.plan, dict) else asdict(self.plan)
                write_json(folder / "plan.json", plan)
            if self.tokenizer is not None:
                self.tokenizer.save(folder)


def split_linear(linear: AnyLinear, name: str, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Put the arrays of a layer into `arrays`, under its name; return the rest, fit for JSON."""
    if isinstance(linear, Linear):
        own: dict[str, NDArray[Any]] = {"weight": narrowest(linear.weight)}
        fields: dict[str, Any] = {}
    else:
        own, tensor = linear.tensor.to_arrays()
        fields = {"tensor": tensor, "activation_bits": linear.activation_bits}
    if linear.bias is not None:
        own["bias"] = narrowest(linear.bias)
    arrays |= {f"{name}.{part}": array for part, array in own.items()}
    if linear.rotation is not None:
        fields["rotation"] = _split_rotation(linear.rotation, f"{name}.rotation", arrays)
    return fields


def join_linear(folder: PackedFolder, name: str, fields: Mapping[str, Any]) -> AnyLinear:
    """Make the layer that `split_linear` split; packed arrays stay mapped.

    Raises
    ------
    AttributeError, KeyError, TypeError, ValueError
        If arrays and fields do not fit together.
    """
    bias = folder.load(f"{name}.bias") if f"{name}.bias" in folder.tensors else None
    linear: AnyLinear
    if "tensor" not in fields:
        linear = Linear(folder.load(f"{name}.weight"), bias)
    else:
        parts = [part for part in ("panels", "levels") if f"{name}.{part}" in folder.tensors]
        arrays = {part: folder.view(f"{name}.{part}") for part in parts}
        tensor = QuantizedTensor.from_arrays(arrays, fields["tensor"])
        linear = QuantizedLinear(tensor, bias, activation_bits=fields["activation_bits"])
    if fields.get("rotation") is None:
        return linear
    rotation = join_rotation(folder, f"{name}.rotation", fields["rotation"], linear.shape[1])
    rotated: AnyLinear = linear.replace(rotation=rotation)
    return rotated


def _split_rotation(
    rotation: Rotation | None, name: str, arrays: dict[str, NDArray[Any]]
) -> dict[str, Any] | None:
    if rotation is None:
        return None
    arrays |= {f"{name}.{part}": array for part, array in rotation.to_arrays().items()}
    return rotation.to_dict()


def join_rotation(
    folder: PackedFolder, name: str, fields: Mapping[str, Any] | None, n: int
) -> Rotation | None:
    """Make the rotation of order `n` that a saved folder describes; None of None."""
    if fields is None:
        return None
    if fields["n"] != n:  # checked first, because making a rotation takes memory
        raise ValueError(f"the rotation has order {fields['n']!r:.50}, expected {n}")
    matrix = f"{name}.matrix"
    arrays = {"matrix": folder.load(matrix)} if matrix in folder.tensors else {}
    return Rotation.from_dict(fields, arrays)


def _provenance(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of the weights' origin, their digest, and what this process runs on."""
    result = dict(known)
    if "source_sha256" not in result and os.path.exists(result.get("source", "")):
        result["source_sha256"] = open_checkpoint(result["source"]).sha256()
    config = _core.config()
    result["saved_by"] = {
        "lowbitq": _version(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "isa": config["isa"],
        "threads": config["threads"],
    }
    return result


def _version() -> str | None:
    try:
        return importlib.metadata.version("lowbitq")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return None


@dataclass(frozen=True)
class Report:
    """What became of each matrix: the embedding, the linear layers, an untied head.

    Attributes
    ----------
    layers : list of dict
        ``layer``, ``bits_per_weight`` and what `compress` noted.
    bits_per_weight : float
        Over the linear layers of the blocks.
    nbytes : int
        Of the whole model.
    """

    layers: list[dict[str, Any]]
    bits_per_weight: float
    nbytes: int

    def __str__(self) -> str:
        columns = list(
            dict.fromkeys(key for layer in self.layers for key in layer if key != "sha256")
        )
        rows = [columns] + [[_cell(layer.get(c)) for c in columns] for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        size = f"{self.nbytes / 1e6:.1f} MB"
        total = f"{self.bits_per_weight:.3f} bits per weight of the linear layers, {size} in all"
        return "\n".join([*lines, total])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
