"""Figures of results. matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def training(known: Mapping[str, Any], axes: Any = None) -> Any:
    """Draw the losses of a run of training over its steps.

    Parameters
    ----------
    known : mapping
        ``provenance["distillation"]`` of a model, or the object in the log of ``lowbitq distill``.
    axes : matplotlib.axes.Axes, default=None
        Where to draw. None: a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        A thin line for the loss of each step (and for each of its terms, if there are several), a
        thick one for the divergence on held-back text, a circle at the parameters that were kept.

    Raises
    ------
    ValueError
        If `known` is something else.
    ImportError
        If `axes` is None and matplotlib is not installed.

    Examples
    --------
    >>> known = {"steps": [{"step": 1, "loss": 0.9, "norm": 2.0}], "validation": [(0, 1), (1, 0.8)]}
    >>> training(known)  # doctest: +SKIP
    <Axes: xlabel='step', ylabel='loss'>
    """
    try:
        steps, validation = (
            list(known["steps"]),
            [(int(s), float(v)) for s, v in known["validation"]],
        )
        names = [name for name in steps[0] if name not in ("step", "norm")] if steps else []
        lines = {name: [(int(one["step"]), float(one[name])) for one in steps] for name in names}
        best = min(validation, key=lambda pair: pair[1])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"known is not of a run of training: {error!r}") from error
    axes = new_axes() if axes is None else axes
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), linewidth=0.8, label=f"{name}, training text")
    axes.plot(*zip(*validation, strict=True), linewidth=2, color="k", label="divergence, held back")
    axes.plot(*best, "o", color="k", fillstyle="none", label=f"{best[1]:.4g} at step {best[0]}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(fontsize="small")
    return axes


def front(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    points: Mapping[str, tuple[float, float]],
    axes: Any = None,
) -> Any:
    """Draw divergence over bits: a line for each way to choose plans, a point for each plan.

    Parameters
    ----------
    lines : mapping of str to sequence of (float, float)
        Bits per weight and divergence of the plans of each way.
    points : mapping of str to (float, float)
        The same for single plans.
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
    >>> front({"per layer": [(2, 0.5), (3, 0.1)]}, {"int2": (2.5, 0.4)})  # doctest: +SKIP
    <Axes: xlabel='bits per weight', ylabel='predicted KL, nats per token'>
    """
    axes = new_axes() if axes is None else axes
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), ".-", linewidth=1, label=name)
    for name, point in points.items():
        axes.plot(*point, "o", color="0.5", fillstyle="none")
        axes.annotate(name, point, (4, 4), textcoords="offset points", color="0.3")
    axes.set(xlabel="bits per weight", ylabel="predicted KL, nats per token", yscale="log")
    axes.legend(fontsize="small")
    return axes
