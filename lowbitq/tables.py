"""Tables of results: aligned text, HTML for notebooks, pandas frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# A cell's background shows its share of the column's maximum.
_BAR = "linear-gradient(90deg, rgba(70, 130, 180, .3) {0:.0%}, transparent {0:.0%})"


def columns_of(rows: Sequence[Row], without: Iterable[str] = ()) -> list[str]:
    """Return all keys of the rows, in the order in which they first occur."""
    left_out = set(without)
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key not in left_out]


def as_text(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Return a table; the first column is aligned to the left, the others to the right.

    Examples
    --------
    >>> print(as_text(["layer", "bits"], [{"layer": "up", "bits": 2.5}, {"layer": "down"}]))
    layer  bits
    up      2.5
    down      -
    """
    cells = [list(columns)] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def as_html(
    columns: Sequence[str],
    rows: Sequence[Row],
    *,
    caption: str = "",
    bars: Iterable[str] = (),
    most: int = 40,
) -> str:
    """Return a table for a notebook.

    Parameters
    ----------
    columns : sequence of str
    rows : sequence of mapping
    caption : str, default=""
    bars : iterable of str, default=()
        Columns of numbers >= 0 whose cells are shaded by their share of the maximum.
    most : int, default=40
        Rows to show; a last line says how many are left out.

    Examples
    --------
    >>> as_html(["a"], [{"a": "<b>"}])
    '<table><tr><th>a</th></tr><tr><td style="text-align:left">&lt;b&gt;</td></tr></table>'
    """
    return "".join(_html(columns, rows, caption, set(bars), most))


def _html(
    columns: Sequence[str], rows: Sequence[Row], caption: str, bars: set[str], most: int
) -> Iterator[str]:
    from html import escape  # here, because its entities take a hundredth of the import time

    yield "<table>"
    if caption:
        yield f'<caption style="text-align:left">{escape(caption)}</caption>'
    yield "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in columns) + "</tr>"
    tops = {name: max((row.get(name) or 0 for row in rows), default=0) for name in bars}
    for row in rows[:most]:
        yield "<tr>"
        for number, name in enumerate(columns):
            style = "text-align:left" if number == 0 else "text-align:right"
            value = row.get(name)
            if value is not None and tops.get(name, 0) > 0:
                style += ";background:" + _BAR.format(value / tops[name])
            yield f'<td style="{style}">{escape(_cell(value))}</td>'
        yield "</tr>"
    if len(rows) > most:
        yield f'<tr><td colspan="{len(columns)}">and {len(rows) - most} more</td></tr>'
    yield "</table>"


def as_frame(rows: Iterable[Any], columns: Sequence[str] | None = None) -> Any:
    """Return a pandas DataFrame; ImportError if pandas is missing."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ImportError("to_frame needs pandas; get it with: pip install pandas") from error
    return pandas.DataFrame(list(rows), columns=columns)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
