"""QuantizedModel: a model whose linear layers are packed; its report, and saving it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lowbitq import _core, plots
from lowbitq.checkpoints.mapping import sha256_of_unchanged
from lowbitq.checkpoints.packed import (
    json_text,
    narrowest,
    new_folder,
    quantization_config,
    write_arrays,
    write_json,
)
from lowbitq.linears import QuantizedLinear
from lowbitq.models.decoder import Model
from lowbitq.models.plain import config_now
from lowbitq.models.slots import NORMS, OUTER, name_in_block
from lowbitq.models.stored import LayerWriter
from lowbitq.plans import Plan
from lowbitq.tables import as_frame, as_html, as_text, columns_of
from lowbitq.version import __version__

RESIDUAL_ROTATION = "model.residual_rotation"


@dataclass(eq=False, repr=False)
class QuantizedModel(Model):
    """A model whose linear layers are packed.

    Attributes
    ----------
    plan : Plan or None
        What `compress` was asked to do.
    records : dict of str to dict
        What `compress` recorded about each matrix: ``format``, ``bits_per_weight``,
        ``relative_error``, ``seconds`` and more.
    """

    plan: Plan | None = None
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

    def with_copies(self, count: int | Mapping[str, int]) -> QuantizedModel:
        """Return a model that runs only the first copies of its layers.

        Arrays are shared, so this takes no memory and a millisecond. A progressive model, whose
        later copies are residuals, is thereby a narrower one.

        Parameters
        ----------
        count : int or mapping of str to int
            Copies to keep, 1 or more: of all layers, or by names of `linears`; others keep all.
            Layers with no more copies than that stay as they are, and all others lose their
            adapter, which makes up for what the last copy left.

        Returns
        -------
        QuantizedModel
            The one that a plan of only these copies gives, bit for bit, if no layer has an adapter
            and drift was not corrected.

        Raises
        ------
        KeyError
            If there is no layer of such a name.
        ValueError
            If `count` is less than 1, or copies to be left out are averaged with others.

        Examples
        --------
        >>> small = compress(model, "trellis2 + trellis2 hadamard residual")  # doctest: +SKIP
        >>> small.with_copies(1).bits_per_weight  # doctest: +SKIP
        2.02
        """
        linears = dict(self.linears())
        counts = count if isinstance(count, Mapping) else dict.fromkeys(linears, count)
        result = self.copy()
        assert isinstance(result, QuantizedModel)
        result.records = dict(self.records)
        layers = {} if self.plan is None else dict(self.plan.layers)
        for name, kept in counts.items():
            if kept < 1:
                raise ValueError(f"count of {name} is {kept}, expected at least 1")
            linear = linears[name]
            if not isinstance(linear, QuantizedLinear) or kept >= len(linear.copies):
                continue
            if any(copy.weight is not None for copy in linear.copies[kept:]):
                raise ValueError(
                    f"{name}: its {len(linear.copies)} copies are averaged, and {kept} of them are "
                    "another layer"
                )
            first = linear.replace(copies=linear.copies[:kept], adapter=None)
            result.replace_linear(name, first)
            if name in layers:
                layers[name] = replace(layers[name], copies=layers[name].copies[:kept], rank=0)
            result.records[name] = _narrower(self.records.get(name, {}), kept)
        if self.plan is not None:
            result.plan = replace(self.plan, layers=layers)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:  # type: ignore[override]
        """Write the model to a folder; `load` restores it with bit-identical logits.

        The folder holds ``config.json``, ``model.safetensors``, the tokenizer's files,
        ``plan.json``, ``report.json``, ``provenance.json`` and ``checksums.json``. It is written
        atomically; a model saved there before is replaced in one step. Other programs refuse it:
        `lowbitq.export` writes folders and files for them.

        Parameters
        ----------
        path : str or path-like
            Missing, an empty folder, or a saved model with nothing added to it.

        Raises
        ------
        FileExistsError
            If `path` is anything else; it is not touched.
        OSError
            If something cannot be written; the message names it, and nothing is left behind.
        """
        writer = LayerWriter()
        arrays = writer.arrays
        arrays[f"{OUTER['final_norm'].hf}.weight"] = narrowest(self.final_norm)
        for i, block in enumerate(self.blocks):
            for norm in NORMS:
                if (gain := getattr(block, norm.name)) is not None:
                    arrays[f"{name_in_block(i, norm)}.weight"] = narrowest(gain)
        layers = {name: writer.layer(name, linear) for name, linear in self.matrices()}
        config = config_now(self).to_hf() | quantization_config(
            bits_per_weight=self.bits_per_weight,
            residual_rotation=writer.rotation(RESIDUAL_ROTATION, self.residual_rotation),
            layers=layers,
            blocks=[
                {"attention_scale": block.attention_scale, "mlp_scale": block.mlp_scale}
                for block in self.blocks
            ],
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
                write_json(folder / "plan.json", self.plan.to_dict())
            if self.tokenizer is not None:
                self.tokenizer.save(folder)


def _narrower(record: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """Return what a record says of a layer's first copies alone."""
    result = {
        k: v
        for k, v in record.items()
        if k not in ("sha256", "rank", "correlation", "output_correlation")
    }
    if errors := result.pop("errors", None):
        result["relative_error"] = errors[kept - 1]
        result["format"] = " + ".join(str(result["format"]).split(" + ")[:kept])
        if kept > 1:
            result["errors"] = errors[:kept]
    return result


def _provenance(known: Any) -> dict[str, Any]:
    """Return the known origin of the weights, their digest, and the versions and machine in use.

    A file that has changed since the weights were loaded has the digest ``"unknown"``.
    """
    if not isinstance(known, Mapping):
        known = {"provenance": known}
    result = {str(key): _fit_for_json(value) for key, value in known.items()}
    stamps = result.pop("source_files", None)
    if "source_sha256" not in result and isinstance(stamps, dict):
        result["source_sha256"] = {
            os.path.basename(path): sha256_of_unchanged(path, stamp) or "unknown"
            for path, stamp in stamps.items()
        }
    config = _core.config()
    result["saved_by"] = {
        "lowbitq": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "isa": config["isa"],
        "threads": config["threads"],
    }
    return result


def _fit_for_json(value: Any) -> Any:
    """Return a value as JSON can hold it, or else a short description."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        plain = json.loads(json_text({"": value}))[""]
        if _levels(plain) <= 32:  # readers limit the depth
            return plain
    return reprlib.repr(value)


def _levels(value: Any) -> int:
    """Return the nesting depth of objects and lists."""
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(_levels, value.values() if isinstance(value, dict) else value), default=0)


@dataclass(frozen=True)
class Report:
    """The records of all matrices: the embedding, the linear layers, an untied head.

    Attributes
    ----------
    layers : list of dict
        ``layer``, ``bits_per_weight`` and what `compress` recorded.
    bits_per_weight : float
        Mean over the linear layers of the blocks.
    nbytes : int
        Size of the whole model.
    """

    layers: list[dict[str, Any]]
    bits_per_weight: float
    nbytes: int

    def __str__(self) -> str:
        columns = columns_of(self.layers, without=["sha256"])
        return f"{as_text(columns, self.layers)}\n{self._total()}"

    def _repr_html_(self) -> str:
        columns = columns_of(self.layers, without=["sha256"])
        bars = {"bits_per_weight", "relative_error", "seconds"} & set(columns)
        return as_html(columns, self.layers, caption=self._total(), bars=bars)

    def _total(self) -> str:
        size = f"{self.nbytes / 1e6:.1f} MB"
        return f"{self.bits_per_weight:.3f} bits per weight of the linear layers, {size} in all"

    def plot(self, of: str = "relative_error", axes: Any = None) -> Any:
        """Draw a column over the blocks, one line for each kind of layer.

        Parameters
        ----------
        of : str, default="relative_error"
            Such as ``"bits_per_weight"`` or ``"seconds"``.
        axes : matplotlib.axes.Axes, default=None
            Where to draw. None: a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ValueError
            If there is no such column of numbers.
        ImportError
            If `axes` is None and matplotlib is not installed.
        """
        found = {
            row["layer"]: row[of] for row in self.layers if isinstance(row.get(of), (int, float))
        }
        if not found:
            columns = ", ".join(columns_of(self.layers))
            raise ValueError(f"of is {of!r}, expected a column of numbers of {columns}")
        return plots.by_layer(found, of, axes)

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, a row for each matrix; ImportError without pandas."""
        return as_frame(self.layers)
