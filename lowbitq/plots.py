"""Figures of results. matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


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


def as_svg(axes: Any) -> str:
    """Return the figure of some axes as an ``<svg>`` element, for a page of HTML.

    Examples
    --------
    >>> as_svg(new_axes())[:5]  # doctest: +SKIP
    '<svg '
    """
    from matplotlib import rc_context

    drawn = StringIO()
    with rc_context({"svg.fonttype": "none"}):  # letters as letters: a tenth of the size
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        axes.figure.savefig(drawn, format="svg", metadata=nothing)
    text = drawn.getvalue()
    return text[text.index("<svg ") :]


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


def by_layer(values: Mapping[str, float], label: str, axes: Any = None) -> Any:
    """Draw a number of each layer over the blocks, one line for each kind of layer.

    Parameters
    ----------
    values : mapping of str to float
        By the names of layers, ``"model.layers.3.mlp.up_proj"``; others are left out.
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
    >>> by_layer({"model.layers.0.mlp.up_proj": 1.0}, "error")  # doctest: +SKIP
    <Axes: xlabel='block', ylabel='error'>
    """
    lines: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        if name.startswith("model.layers."):
            _, _, index, *kind = name.split(".")
            lines.setdefault(".".join(kind), {})[int(index)] = value
    return over_blocks(lines, label, axes)


def magnitudes(inputs: Mapping[str, ArrayLike], axes: Any = None) -> Any:
    """Draw histograms of magnitudes on logarithmic axes, such as before and after a rotation.

    Parameters
    ----------
    inputs : mapping of str to array_like of numbers, of any shape
        Zeros are left out.
    axes : matplotlib.axes.Axes, default=None
        Where to draw. None: a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If an array has no number but zeros, or one that is not finite.
    ImportError
        If `axes` is None and matplotlib is not installed.

    Examples
    --------
    >>> x = np.eye(64)
    >>> magnitudes({"before": x, "after": Rotation(64).apply(x)})  # doctest: +SKIP
    <Axes: xlabel='magnitude', ylabel='numbers'>
    """
    found = {name: abs(np.asarray(x, np.float64).ravel()) for name, x in inputs.items()}
    for name, x in found.items():
        if not x.any() or not np.isfinite(x).all():
            raise ValueError(f"{name!r} has no magnitudes to show, expected finite numbers, not 0")
    found = {name: x[x > 0] for name, x in found.items()}
    high = max(float(x.max()) for x in found.values())
    low = max(min(float(x.min()) for x in found.values()), 1e-6 * high)
    axes = new_axes() if axes is None else axes
    bins = np.geomspace(low, high * (1 + 1e-9), 81)
    for name, x in found.items():
        axes.hist(np.maximum(x, low), bins, histtype="step", label=f"{name}, maximum {x.max():.3g}")
    axes.set(xscale="log", yscale="log", xlabel="magnitude", ylabel="numbers")
    axes.legend(fontsize="small")
    return axes


def percentiles(known: Mapping[str, Mapping[float, float]], label: str, axes: Any = None) -> Any:
    """Draw percentiles over tokens, the rarest to the right.

    Parameters
    ----------
    known : mapping of str to mapping of float to float
        By percentile (50, 99.9; 100 is the maximum), one line for each name.
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
    >>> percentiles({"int2g64": {50: 0.2, 99: 3.0, 100: 9.0}}, "KL")  # doctest: +SKIP
    <Axes: xlabel='percentile of tokens', ylabel='KL'>
    """
    axes = new_axes() if axes is None else axes
    names = sorted({percentile for values in known.values() for percentile in values})
    for name, values in known.items():
        places = [names.index(percentile) for percentile in values]
        axes.plot(places, list(values.values()), "o-", linewidth=1, label=name)
    axes.set(xlabel="percentile of tokens", ylabel=label, yscale="log")
    axes.set_xticks(range(len(names)), [f"{name:g}" for name in names])
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
