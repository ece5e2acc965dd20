"""Figures of results. matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbitq.roofline import KINDS, Roofline


def new_axes() -> Any:
    """Return the axes of a new, empty figure.

    Returns
    -------
    matplotlib.axes.Axes
        The figure is not shown in a window.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> new_axes()  # doctest: +SKIP
    <Axes: >
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("plots need matplotlib; get it with: pip install matplotlib") from error
    return Figure(figsize=(8, 5), layout="constrained").add_subplot()


def roofline(found: Roofline, axes: Any = None) -> Any:
    """Draw the limits of a machine and the performance of its layers.

    Parameters
    ----------
    found : Roofline
    axes : matplotlib.axes.Axes, default=None
        Where to draw. None: a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        Its ``figure.savefig`` writes a file.

    Raises
    ------
    ImportError
        If `axes` is None and matplotlib is not installed.

    Examples
    --------
    >>> from lowbitq.roofline import measure
    >>> roofline(measure()).figure.savefig("roofline.svg")  # doctest: +SKIP
    """
    axes = new_axes() if axes is None else axes
    intensity = np.geomspace(1, 1e4, 200)
    for bandwidth, text in [
        (found.memory_gigabytes, "memory"),
        (found.cache_gigabytes, "cache"),
    ]:
        roof = np.minimum(bandwidth * intensity, found.peak_gigaops)
        axes.plot(intensity, roof, color="0.5", linewidth=1)
        label = f"{text} {bandwidth:.0f} GB/s"
        axes.annotate(label, (1, bandwidth), (2, 4), textcoords="offset points", color="0.3")
    peak = f"int8 {found.peak_gigaops:.0f} Gop/s"
    at = (1e4, found.peak_gigaops)
    axes.annotate(peak, at, (-2, 4), textcoords="offset points", color="0.3", ha="right")
    formats = list(dict.fromkeys(point.format for point in found.points))
    for kind, marker in zip(KINDS, "osD", strict=True):
        for point in (point for point in found.points if point.kind == kind):
            color = f"C{formats.index(point.format)}"
            axes.plot(point.intensity, point.gigaops, marker, color=color)
    for number, format in enumerate(formats):
        axes.plot([], [], "o", color=f"C{number}", label=format)
    for text, marker in zip(KINDS.values(), "osD", strict=True):
        axes.plot([], [], marker, color="0.5", label=text)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="10^9 operations per second",
        title="{isa}, threads {threads}".format(**found.machine),
    )
    axes.legend(loc="lower right", fontsize="small")
    return axes


def over_blocks(lines: Mapping[str, Mapping[int, float]], label: str, axes: Any = None) -> Any:
    """Draw numbers of a model's layers over the blocks.

    Parameters
    ----------
    lines : mapping of str to mapping of int to float
        Values by block, one line for each name; no legend if it is empty.
    label : str
        Of the vertical axis.
    axes : matplotlib.axes.Axes, default=None
        Where to draw. None: a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ImportError
        If `axes` is None and matplotlib is not installed.

    Examples
    --------
    >>> over_blocks({"mlp": {0: 1.0, 1: 0.5}}, "score")  # doctest: +SKIP
    <Axes: xlabel='block', ylabel='score'>
    """
    axes = new_axes() if axes is None else axes
    for name, values in lines.items():
        axes.plot(list(values), list(values.values()), ".-", linewidth=1, label=name)
    axes.set(xlabel="block", ylabel=label)
    if any(lines):
        axes.legend(fontsize="small")
    return axes
