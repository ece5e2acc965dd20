"""QuantizedModel: a model whose linear layers are packed, and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lowbitq.models.decoder import Model


@dataclass(eq=False, repr=False)
class QuantizedModel(Model):
    """A model whose linear layers are packed.

    Attributes
    ----------
    plan : Plan or None
        What `compress` was asked to do.
    records : dict of str to dict
        What `compress` noted about each linear layer: ``format``, ``bits_per_weight``,
        ``relative_error``, ``seconds`` and whatever else.
    """

    plan: Any = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def report(self) -> Report:
        """Return the records of all layers; prints as a table."""
        return Report(
            [
                {"layer": name, "bits_per_weight": linear.bits_per_weight}
                | self.records.get(name, {})
                for name, linear in self.linears()
            ],
            self.bits_per_weight,
            self.nbytes,
        )


@dataclass(frozen=True)
class Report:
    """What became of each linear layer.

    Attributes
    ----------
    layers : list of dict
        ``layer``, ``bits_per_weight`` and what `compress` noted.
    bits_per_weight : float
        Over the linear layers.
    nbytes : int
        Of the whole model.
    """

    layers: list[dict[str, Any]]
    bits_per_weight: float
    nbytes: int

    def __str__(self) -> str:
        columns = list(dict.fromkeys(key for layer in self.layers for key in layer))
        rows = [columns] + [[_cell(layer.get(c)) for c in columns] for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        total = f"{self.bits_per_weight:.3f} bits per weight, {self.nbytes / 1e6:.1f} MB"
        return "\n".join([*lines, total])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
