"""A model and its evaluation as one HTML page that needs no other file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from lowbitq import _core, plots
from lowbitq.checkpoints.writing import new_file
from lowbitq.estimates import Evaluation
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel, Report
from lowbitq.tables import as_html, columns_of
from lowbitq.version import __version__

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 90% }
th, td { padding: .15em .7em; border-bottom: 1px solid #ddd; white-space: pre-wrap }
svg { max-width: 100%; height: auto }
""".strip()

# Columns of a report that are drawn over the blocks.
_DRAWN = ("bits_per_weight", "relative_error")


def write_report(
    path: str | os.PathLike[str],
    model: Model,
    evaluation: Evaluation | None = None,
    *,
    title: str = "lowbitq",
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write what is known about a model as a page, atomically.

    Figures are drawn if matplotlib is installed. Without it there are the tables, whose bars show
    the same numbers.

    Parameters
    ----------
    path : str or path-like
        An existing file is replaced.
    model : Model
        The records of a quantized model are shown layer by layer.
    evaluation : Evaluation, default=None
    title : str, default="lowbitq"
    about : mapping of str to object, default=None
        Further lines of the first table, such as options and texts.

    Raises
    ------
    OSError
        If the file cannot be written; what was there is left unchanged.

    Examples
    --------
    >>> write_report("small.html", small, lq.evaluate(small, text))  # doctest: +SKIP
    """
    parts = "\n".join(_page(model, evaluation, title, about or {}))
    with new_file(path) as file:
        file.write(parts.encode())


def _page(
    model: Model, evaluation: Evaluation | None, title: str, about: Mapping[str, Any]
) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">'
    yield f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n<h1>{escape(title)}</h1>"
    yield _pairs(
        {
            "network": repr(model),
            "bits per weight": f"{model.bits_per_weight:.3f} of the linear layers",
            "size": f"{model.nbytes / 1e6:.1f} MB",
            "weights from": model.provenance.get("source"),
            **about,
            "made by": "lowbitq {}, {isa}, threads {threads}".format(__version__, **_core.config()),
        }
    )
    if evaluation is not None:
        yield f"<h2>Evaluation</h2>\n{evaluation._repr_html_()}"
    if isinstance(model, QuantizedModel):
        yield from _layers(model)


def _layers(model: QuantizedModel) -> Iterator[str]:
    """Yield figures and a table of all layers."""
    report = model.report()
    rows, columns = report.layers, columns_of(report.layers, without=["sha256"])
    yield "<h2>Layers</h2>"
    for column in _DRAWN:
        if column in columns:
            yield _figure(report, column)
    bars = {*_DRAWN, "seconds"} & set(columns)
    yield as_html(columns, rows, bars=bars, most=len(rows))
    if model.plan is not None:
        yield f"<h2>Plan</h2>\n{_pairs(_flat(model.plan.to_dict()))}"


def _figure(report: Report, column: str) -> str:
    """Return a drawing; nothing without matplotlib."""
    try:
        return plots.as_svg(report.plot(column))
    except ImportError:
        return ""


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a plan but those of its layers, which the table has."""
    return {key: value for key, value in plan.items() if key != "layers"}


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [{"": key, "value": _shown(v)} for key, v in values.items() if v is not None]
    return as_html(["", "value"], rows, most=len(rows))


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
