"""Uniform grids on arrays of any shape: zero points, ranges, and how many values share a grid.

What the literature calls a uniform quantizer, with each of its conventions by name. Use it to fit
static grids for the inputs of layers (`lowbitq.linears.Activation.of_grid`) and to compare methods.
Weights of a model go through `lowbitq.quantize`, which packs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core

Array = NDArray[Any]

_ZERO_MODES: dict[str, Callable[[Array], Array]] = {
    "round": np.rint,
    "floor": np.floor,
    "float": np.asarray,
}


@dataclass(frozen=True, eq=False)
class UniformGrid:
    """A uniform grid: whole codes from `low` to `high`, a step and a zero point.

    Two conventions are in use for the sign of the zero point. ``"subtract"``:
    ``code = round(x / scale + zero)`` and ``value = scale * (code - zero)``, as ONNX, PyTorch and
    GPTQ have it. ``"add"``: ``code = round(x / scale) - zero`` and
    ``value = scale * (code + zero)``. The zero of one is minus the zero of the other.
    Halves are rounded to the even number.

    Parameters
    ----------
    scale : array_like
        Positive step between neighbouring values, in the unit of x; its shape broadcasts against
        x.
    zero : array_like
        Zero point, in steps; whole or not.
    low, high : int
        Smallest and largest code.
    convention : {"subtract", "add"}, default="subtract"
        Where the zero point stands, see above.

    Raises
    ------
    ValueError
        If a scale is not positive, or `low` exceeds `high`, or the convention is unknown.

    References
    ----------
    B. Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-
    only inference", CVPR 2018.

    Examples
    --------
    A worked example from slides: 8 bits, the zero point rounded down and added. (The slides print
    it as -152, but ``scale * (code + zero)`` needs +152, and they print 13.58 for the last value,
    13.567: rounding down leaves 13.6 just outside.)

    >>> x = np.array([[1.2, 2.4, 3.6], [11.2, 12.4, 13.6]])
    >>> grid = UniformGrid.of_range(1.2, 13.6, bits=8, signed=True, include_zero=False,
    ...                             zero_mode="floor", convention="add")
    >>> round(float(grid.scale), 6), float(grid.zero)
    (0.048627, 152.0)
    >>> grid.encode(x).tolist()
    [[-127, -103, -78], [78, 103, 127]]
    >>> grid(x).round(3).tolist()
    [[1.216, 2.383, 3.598], [11.184, 12.4, 13.567]]
    >>> bool(grid.value_of(0) == grid.scale * 152)
    True
    """

    scale: Array
    zero: Array
    low: int
    high: int
    convention: str = "subtract"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", np.asarray(self.scale))
        object.__setattr__(self, "zero", np.asarray(self.zero))
        if not (self.scale > 0).all():
            raise ValueError(f"scale has {self.scale.min()}, expected positive numbers")
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high = {self.high}")
        _choose("convention", self.convention, ("subtract", "add"))

    @classmethod
    def of_range(
        cls,
        minimum: ArrayLike,
        maximum: ArrayLike,
        bits: int,
        *,
        symmetric: bool = False,
        signed: bool = False,
        restricted: bool = False,
        include_zero: bool = True,
        zero_mode: str = "round",
        convention: str = "subtract",
    ) -> UniformGrid:
        """Lay a grid over a range of values.

        Parameters
        ----------
        minimum, maximum : array_like
            Ends of the range, one pair for each group of values that share a grid.
        bits : int
            1 to 16.
        symmetric : bool, default=False
            Zero point 0, codes of both signs, step ``max(|minimum|, |maximum|) / high``. Else the
            step is ``(maximum - minimum) / (2**bits - 1)``.
        signed : bool, default=False
            Codes from ``-2**(bits-1)`` instead of 0; a symmetric grid always has them.
        restricted : bool, default=False
            Leave out the code ``-2**(bits-1)``, so that the codes lie evenly around zero.
        include_zero : bool, default=True
            Widen the range until it holds zero.
        zero_mode : {"round", "floor", "float"}, default="round"
            How the zero point is rounded. A whole one represents zero exactly; rounding to nearest
            keeps both ends within half a step, rounding down does not.
        convention : {"subtract", "add"}, default="subtract"
            See the class.

        Returns
        -------
        UniformGrid
            A range of one point gets a step of 1; if that point is 0, the range becomes -1 to 1,
            as in GPTQ's code.

        Raises
        ------
        ValueError
            If an option is unknown, `bits` does not fit, or a minimum exceeds its maximum.

        Examples
        --------
        >>> UniformGrid.of_range(-1.0, 2.0, bits=2).encode(np.array([-1.0, 0.0, 0.9, 5.0])).tolist()
        [0, 1, 2, 3]
        """
        _choose("zero_mode", zero_mode, tuple(_ZERO_MODES))
        _choose("convention", convention, ("subtract", "add"))
        if not 1 <= bits <= 16 or (bits == 1 and restricted):
            raise ValueError(f"bits is {bits}, expected {'2' if restricted else '1'} to 16")
        minimum, maximum = np.asarray(minimum), np.asarray(maximum)
        if not (minimum <= maximum).all():
            raise ValueError("minimum exceeds maximum, or one is a NaN")
        half = 1 << (bits - 1) if signed or symmetric else 0
        low, high = -half + restricted, (1 << bits) - 1 - half
        # float32 ranges stay float32, in which GPTQ's code computes.
        dtype = np.result_type(minimum, maximum, np.float32)
        smallest = np.finfo(dtype).tiny
        if symmetric:
            largest = np.maximum(abs(minimum), abs(maximum)).astype(dtype)
            scale = np.maximum(np.where(largest > 0, largest, 1) / max(high, 1), smallest)
            return cls(scale, np.zeros_like(scale), low, high, convention)
        if include_zero:
            minimum, maximum = np.minimum(minimum, 0), np.maximum(maximum, 0)
        nothing = (minimum == 0) & (maximum == 0)
        minimum, maximum = np.where(nothing, -1, minimum), np.where(nothing, 1, maximum)
        scale = np.maximum((maximum - minimum) / (high - low), smallest)
        scale = np.where(maximum > minimum, scale, 1).astype(dtype, copy=False)
        added = minimum / scale - low if convention == "add" else low - minimum / scale
        return cls(scale, _ZERO_MODES[zero_mode](added), low, high, convention)

    def encode(self, x: ArrayLike) -> NDArray[np.int32]:
        """Return the codes nearest to x.

        Parameters
        ----------
        x : array_like
            Finite numbers, of a shape that broadcasts against `scale`.

        Returns
        -------
        ndarray of int32

        Raises
        ------
        ValueError
            If x has a NaN or an infinity.
        """
        x = np.asarray(x)
        if not np.isfinite(x).all():
            raise ValueError("x has a NaN or an infinity")
        zero = self.zero if self.convention == "subtract" else -self.zero
        # An integer zero is added after rounding, so that ties do not depend on whether it is even.
        whole = np.rint(zero)
        codes = np.rint(x / self.scale + (zero - whole)) + whole
        return np.asarray(np.clip(codes, self.low, self.high), np.int32)

    def value_of(self, codes: ArrayLike) -> Array:
        """Return the values of codes, in the unit of x.

        Parameters
        ----------
        codes : array_like of int

        Returns
        -------
        ndarray

        Examples
        --------
        >>> float(UniformGrid(0.5, 3, 0, 15).value_of(0))
        -1.5
        """
        zero = self.zero if self.convention == "subtract" else -self.zero
        codes = np.asarray(codes).astype(self.scale.dtype)
        return np.asarray(self.scale * (codes - zero.astype(self.scale.dtype)))

    def __call__(self, x: ArrayLike) -> Array:
        """Return the values nearest to x: ``value_of(encode(x))``."""
        return self.value_of(self.encode(x))

    def to_convention(self, convention: str) -> UniformGrid:
        """Return the same grid with its zero point written in the other convention.

        Examples
        --------
        >>> float(UniformGrid(0.5, 3, 0, 15).to_convention("add").zero)
        -3.0
        """
        zero = self.zero if convention == self.convention else -self.zero
        return UniformGrid(self.scale, zero, self.low, self.high, convention)


def fit_grid(
    x: ArrayLike,
    bits: int,
    *,
    granularity: str = "tensor",
    axis: str = "out",
    group: int | None = None,
    range: str = "minmax",
    percentile: float = 99.9,
    clip_ratio: float = 1.0,
    norm: float = 2.4,
    shrink: float = 0.8,
    candidates: int = 80,
    **grid: Any,
) -> UniformGrid:
    """Find the uniform grid, or grids, for an array.

    Parameters
    ----------
    x : array_like
        Finite numbers; two axes (out, in), as a weight matrix has, unless the granularity is
        ``"tensor"``.
    bits : int
        1 to 16.
    granularity : {"tensor", "channel", "group"}, default="tensor"
        What shares a grid: everything, a channel, or `group` neighbours within a channel (the last
        group of a channel may be shorter).
    axis : {"out", "in"}, default="out"
        Which channels: the output rows of ``y = W x`` or its input columns. (Where a text
        multiplies from the right, ``y = x W``, rows and columns of the array swap their roles.)
    group : int or None
        Values per group, with granularity ``"group"``.
    range : {"minmax", "percentile", "mse", "kl"}, default="minmax"
        ``"percentile"`` leaves out ``100 - percentile`` percent on either side. ``"mse"`` takes, of
        `candidates` factors from 1 down to ``1 - shrink`` by which the range may shrink, the one
        with the least sum of ``|x - value|**norm``; the defaults are those of GPTQ's code.
        ``"kl"`` clips where the histogram loses least information.
    percentile : float, default=99.9
        50 to 100, with range ``"percentile"``.
    clip_ratio : float, default=1.0
        The part of a ``"minmax"`` or ``"percentile"`` range that is kept.
    norm, shrink, candidates
        Options of range ``"mse"``.
    **grid
        Options of `UniformGrid.of_range`.

    Returns
    -------
    UniformGrid
        Its scale has the shape (), (out, 1), (1, in), or that of x.

    Raises
    ------
    ValueError
        If an option is unknown or x does not fit it, is empty, or has a NaN or an infinity.

    References
    ----------
    E. Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained
    transformers", 2022 (ranges by the p-norm, in its code).
    S. Migacz, "8-bit inference with TensorRT", GTC 2017 (ranges by divergence).

    Examples
    --------
    >>> x = np.array([[1.0, -2.0, 0.5, 100.0], [0.1, 0.2, 0.3, 0.4]])
    >>> fit_grid(x, 4, granularity="channel", symmetric=True).scale.shape
    (2, 1)
    >>> fit_grid(x, 4, granularity="group", group=2).scale[0].round(3).tolist()
    [0.2, 0.2, 6.667, 6.667]
    """
    _choose("range", range, ("minmax", "percentile", "mse", "kl"))
    x = np.asarray(x)
    if x.size == 0:
        raise ValueError(f"x of shape {x.shape} is empty")
    if not np.isfinite(x).all():
        raise ValueError("x has a NaN or an infinity")
    blocks, widen = _blocks(x, granularity, axis, group)
    if range == "percentile":
        if not 50 <= percentile <= 100:
            raise ValueError(f"percentile is {percentile}, expected 50 to 100")
        low, high = np.nanpercentile(blocks, [100 - percentile, percentile], axis=1)
    else:
        low, high = np.nanmin(blocks, axis=1), np.nanmax(blocks, axis=1)
    if range == "mse":
        if grid.get("include_zero", True) and not grid.get("symmetric", False):
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        factors = 1 - shrink * np.arange(candidates) / candidates
        factor = _least_norm(blocks, low, high, factors.tolist(), norm, bits, grid)
    elif range == "kl":
        levels = 1 << (bits - 1)
        factor = np.array([entropy_clip(b[~np.isnan(b)], levels) for b in blocks])
        limit = factor * np.maximum(abs(low), abs(high))
        low, high, factor = np.maximum(low, -limit), np.minimum(high, limit), np.ones(())
    else:
        factor = np.asarray(clip_ratio)
    factor = factor.astype(low.dtype)
    return UniformGrid.of_range(widen(factor * low), widen(factor * high), bits, **grid)


def entropy_clip(x: ArrayLike, levels: int, bins: int = 2048) -> float:
    """Return the part of ``max |x|`` at which clipping loses the least information.

    Parameters
    ----------
    x : array_like
        Many finite numbers.
    levels : int
        Magnitudes that a code can express: ``2**(bits-1)``. At least 2, since a single magnitude
        loses no information wherever it clips.
    bins : int, default=2048
        Of the histogram of ``|x|``; at least `levels`.

    Returns
    -------
    float
        Above 0, at most 1.

    References
    ----------
    S. Migacz, "8-bit inference with TensorRT", GTC 2017.

    Examples
    --------
    >>> entropy_clip(np.linspace(-1, 1, 4096), levels=128)
    1.0
    """
    if levels < 2:
        raise ValueError(f"levels is {levels}, expected at least 2")
    magnitude = abs(np.asarray(x, np.float64)).ravel()
    largest = magnitude.max()
    if largest == 0:
        return 1.0
    counts = np.histogram(magnitude, bins=bins, range=(0, largest))[0].astype(np.float64)
    kept = np.zeros(1, np.int64)
    _core.entropy_range(counts, kept, levels=levels)
    return float(kept[0]) / bins


class MovingRange:
    """Minimum and maximum of a stream of arrays, as moving averages.

    The first array sets them, each later one moves them by `rate` of the difference:
    ``r = rate * new + (1 - rate) * r``.

    Parameters
    ----------
    rate : float
        Above 0; 1 keeps the last array only.

    Attributes
    ----------
    minimum, maximum : float or None
        None before the first array.
    frozen : bool
        Whether `update` does nothing; False at first.

    Examples
    --------
    >>> moving = MovingRange(rate=0.5)
    >>> for batch in ([0.0, 1.0], [-1.0, 3.0]):
    ...     moving.update(batch)
    >>> moving.minimum, moving.maximum
    (-0.5, 2.0)
    >>> float(UniformGrid.of_range(moving.minimum, moving.maximum, bits=2).scale)
    0.8333333333333334
    """

    def __init__(self, rate: float) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate is {rate}, expected above 0 and at most 1")
        self.rate = rate
        self.minimum: float | None = None
        self.maximum: float | None = None
        self.frozen = False

    def update(self, x: ArrayLike) -> None:
        """Take one array, of any shape, into account.

        Raises
        ------
        ValueError
            If x is empty or has a NaN or an infinity.
        """
        x = np.asarray(x, np.float64)
        if x.size == 0 or not np.isfinite(x).all():
            raise ValueError("x is empty" if x.size == 0 else "x has a NaN or an infinity")
        if self.frozen:
            return
        low, high = float(x.min()), float(x.max())
        if self.minimum is None or self.maximum is None:
            self.minimum, self.maximum = low, high
        else:
            self.minimum = self.rate * low + (1 - self.rate) * self.minimum
            self.maximum = self.rate * high + (1 - self.rate) * self.maximum


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _blocks(
    x: Array, granularity: str, axis: str, group: int | None
) -> tuple[Array, Callable[[Array], Array]]:
    """x as rows that share a grid, padded with NaN, and the function that restores its shape."""
    _choose("granularity", granularity, ("tensor", "channel", "group"))
    _choose("axis", axis, ("out", "in"))
    if (granularity == "group") != (group is not None):
        raise ValueError(f"group is {group} with granularity {granularity!r}")
    if granularity == "tensor":
        return x.reshape(1, -1), lambda value: value.reshape(())
    if x.ndim != 2:
        raise ValueError(f"x has {x.ndim} axes, expected 2 (out, in)")
    channels = x if axis == "out" else x.T
    if group is None:
        return channels, lambda value: value[:, None] if axis == "out" else value[None, :]
    rows, cols = channels.shape
    groups = -(-cols // group)
    padded = np.full((rows, groups * group), np.nan, x.dtype)
    padded[:, :cols] = channels

    def widen(value: Array) -> Array:
        wide = np.repeat(value.reshape(rows, groups), group, axis=1)[:, :cols]
        return wide if axis == "out" else wide.T

    return padded.reshape(rows * groups, group), widen


def _least_norm(
    blocks: Array,
    low: Array,
    high: Array,
    factors: list[float],
    norm: float,
    bits: int,
    grid: dict[str, Any],
) -> Array:
    """For each block, the first factor with the least error, as in GPTQ's code."""
    padding = np.isnan(blocks)
    x = np.where(padding, 0, blocks)
    best = np.full(len(x), np.inf, x.dtype)
    chosen = np.ones(len(x))
    for factor in factors:
        values = UniformGrid.of_range(
            (factor * low)[:, None], (factor * high)[:, None], bits, **grid
        )(x)
        error = np.where(padding, 0, abs(values - x) ** norm).sum(axis=1)
        better = error < best
        best[better] = error[better]
        chosen[better] = factor
    return chosen
