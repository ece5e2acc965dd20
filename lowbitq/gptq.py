"""GPTQ of one matrix: rounding in which later columns absorb the error of earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.quantizers import diagonal_importance, fit_shared, hold_zeros, search_options
from lowbitq.tensors import QuantizedTensor

ORDERS = ("none", "act", "group")

Codes = NDArray[np.uint8]

# Columns between two matrix products: their square of R stays in the first-level cache.
_BLOCK = 128

# Powers of two between which a Hessian's sums with squares of float32 weights stay in float64.
_EXPONENT = 400


@dataclass(frozen=True, eq=False)
class Feedback:
    """What error feedback needs to know about a layer's inputs; made by `feedback`.

    Attributes
    ----------
    hessian : ndarray of shape (cols, cols), float64
        As given, not copied; but times a power of two if sums of it could leave float64.
    order : ndarray of shape (cols,), int64, or None
        The order in which columns are rounded.
    factor : ndarray of shape (cols, cols), float32 or float64
        R of ``H + damping I = R D R^T`` in that order, unit upper triangular.
    keeps_groups : bool
        Whether the order keeps the columns of a group together.
    damping : float
        What was added to the diagonal of `hessian`, in its unit.
    retries : int
        How often the damping was raised tenfold before the factorisation succeeded.
    dead : ndarray of shape (cols,), bool
        Columns whose input is always zero.
    """

    hessian: NDArray[np.float64] = field(repr=False)
    order: NDArray[np.int64] | None = field(repr=False)
    factor: NDArray[np.float32] | NDArray[np.float64] = field(repr=False)
    keeps_groups: bool
    damping: float
    retries: int
    dead: NDArray[np.bool_] = field(repr=False)

    @cached_property
    def damped(self) -> NDArray[np.float64]:
        """H + damping I, both triangles."""
        full = symmetric(self.hessian)
        full[np.diag_indices_from(full)] += self.damping
        return full


def symmetric(upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return both triangles of a symmetric matrix of which the upper one is known."""
    return np.triu(upper) + np.triu(upper, 1).T


def product(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a b^T, for C-contiguous a (m, k) and b (n, k), by the threads of _core.

    Next to them, NumPy's own threads made the rank-16 adapters of SmolLM2 take 31 s instead
    of 12.
    """
    c = np.empty((len(a), len(b)))
    _core.product(a, b, c)
    return c


def feedback(
    hessian: NDArray[np.float64],
    *,
    group: int | None = None,
    run: int = 1,
    order: str = "group",
    damping: float = 0.01,
    damping_by: str = "median",
    arithmetic: str = "float32",
) -> Feedback:
    """Factor the Hessian of a layer; all layers that read the same input share the result.

    Parameters
    ----------
    hessian : ndarray of shape (cols, cols), float64, C-contiguous
        ``sum_t x_t x_t^T`` over inputs x_t, on and above the diagonal; the rest is not read. Its
        scale does not matter.
    group : int or None, default=None
        Columns that share a scale in the format to come.
    run : int, default=1
        Columns whose words are chosen together, ``Format.run``: the order keeps them together.
    order : {"group", "act", "none"}, default="group"
        ``"act"``: columns by falling diagonal, so that those that matter most are rounded while
        most others can still absorb their error; scales are then fitted beforehand. ``"group"``:
        groups by the sum of their diagonal, columns by diagonal within each, so that a group's
        scale is fitted when its turn comes. ``"none"``: as they stand.
    damping : float, default=0.01
        What is added to the diagonal, relative to a typical entry of it. Raised tenfold until the
        factorisation succeeds.
    damping_by : {"median", "mean"}, default="median"
        The typical entry. The median is not misled by a few massive inputs.
    arithmetic : {"float32", "float64"}, default="float32"
        Of the factorisation and of the feedback. A Hessian that float32 cannot factor well, such as
        one without damping, is factored in float64 in any case.

    Returns
    -------
    Feedback

    Raises
    ------
    TypeError
        If the Hessian is not a float64 array.
    ValueError
        If the Hessian is not square or has a NaN, an infinity or a negative diagonal entry.
    NumericalError
        If no damping makes it positive definite.

    References
    ----------
    E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization
    for Generative Pre-trained Transformers", 2023.

    Examples
    --------
    >>> feedback(np.diag([4.0, 1.0, 9.0]), order="act").order
    array([2, 0, 1])
    """
    if not isinstance(hessian, np.ndarray) or hessian.dtype != np.float64:
        raise TypeError("hessian is not an ndarray of float64")
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian has shape {hessian.shape}, expected (cols, cols)")
    if damping_by not in ("mean", "median"):
        raise ValueError(f"damping_by is {damping_by!r}, expected 'mean' or 'median'")
    if arithmetic not in ("float32", "float64"):
        raise ValueError(f"arithmetic is {arithmetic!r}, expected 'float32' or 'float64'")
    exponent = int(np.frexp(np.diagonal(hessian).max(initial=0.0))[1])
    if abs(exponent) > _EXPONENT:
        hessian = np.ldexp(hessian, -exponent)
    diagonal = np.diagonal(hessian)
    padded = np.pad(hessian, (0, -len(hessian) % run)) if len(hessian) % run else hessian
    columns = _order(np.diagonal(padded), group or len(padded), run, order)
    factor = np.empty(padded.shape, arithmetic)
    report = _core.gptq_factor(
        padded, columns, factor, damping=damping, median=damping_by == "median"
    )
    keeps = order != "act"
    return Feedback(
        hessian, columns, factor, keeps, report["damping"], report["retries"], diagonal == 0
    )


def _order(
    diagonal: NDArray[np.float64], group: int, run: int, order: str
) -> NDArray[np.int64] | None:
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {', '.join(map(repr, ORDERS))}")
    if order == "none":
        return None
    mean = diagonal.reshape(-1, run).mean(1)
    by_run = np.argsort(-mean, kind="stable")
    if order == "group" and group < len(diagonal):
        of_group = np.arange(len(mean)) * run // group
        mean = np.bincount(of_group, mean) / np.bincount(of_group)
        rank = np.argsort(np.argsort(-mean, kind="stable"), kind="stable")
        by_run = by_run[np.argsort(rank[of_group[by_run]], kind="stable")]
    return (by_run[:, None] * run + np.arange(run)).ravel()


def gptq(
    weight: NDArray[np.float32],
    inputs: Feedback,
    format: Format | str,
    *,
    range: str = "mse",
    norm: float = 2.0,
    importance: bool = True,
    sweeps: int = 0,
) -> tuple[QuantizedTensor, float]:
    """Round a weight matrix so that the layer's outputs change least.

    Minimises ``tr(E H E^T)``, E the error of the weights, column by column.

    Parameters
    ----------
    weight : ndarray of shape (rows, cols), float32, C-contiguous
        Left unchanged.
    inputs : Feedback
        Of the layer's inputs, made for the same group and run.
    format : Format or str
        For example ``"int3g64"``.
    range : str, default="mse"
        How scales are found; see `lowbitq.quantize`.
    norm : float, default=2.0
        Exponent of the errors that ``range="mse"`` sums.
    importance : bool, default=True
        Whether those errors are weighted by the diagonal of the Hessian.
    sweeps : int, default=0
        Passes of coordinate descent over the finished codes. Two take 4 to 5 % off the error of
        SmolLM2 at 2 bits and more off its perplexity; see `lowbitq.Plan`. A pass over a trellis
        takes as long as the rounding itself.

    Returns
    -------
    tensor : QuantizedTensor
    error : float
        ``tr(E H E^T) / tr(W H W^T)``, the relative squared error of the outputs.

    Raises
    ------
    ValueError
        If shapes do not fit, or `weight` has a NaN, an infinity or a number whose scale would not
        fit, as it is or with the errors fed back to it.

    References
    ----------
    P. Nair, A. Suggala, "CDQuant: Greedy Coordinate Descent for Accurate LLM Quantization", 2024
    (the sweeps).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64))
    >>> weight = rng.standard_normal((8, 64), dtype=np.float32)
    >>> tensor, error = gptq(weight, feedback(x.T @ x), "int3g64")
    >>> tensor.shape, error < 0.03
    ((8, 64), True)
    """
    format = Format.parse(format)
    cols = len(inputs.dead)
    if weight.ndim != 2 or weight.shape[1] != cols:
        raise ValueError(f"weight has shape {weight.shape}, inputs have {cols} columns")
    _core.check_weight(np.ascontiguousarray(weight), None, scale_bits=format.scale_bits)
    live = np.where(inputs.dead, np.float32(0), weight)
    diagonal = diagonal_importance(inputs.hessian) if importance else None
    shared = fit_shared(live, format, range=range, importance=diagonal, norm=norm)
    code, group = shared.code(format), format.group or len(inputs.factor)
    options = search_options(shared.clip, range, norm=norm)
    scale = np.full((len(live), format.groups(cols)), shared.unit, np.float32)
    offset = -np.float32(shared.zero) * scale
    fixed = format.per_tensor
    if not (fixed or inputs.keeps_groups):
        _core.quantize(
            code, live, diagonal, None, scale, offset, group=group, fixed=False, **options
        )
        fixed = True
    pad = len(inputs.factor) - cols
    padded = np.pad(live, [(0, 0), (0, pad)]) if pad else live
    if pad and diagonal is not None:
        diagonal = np.pad(diagonal, (0, pad))

    def rounded(factor: NDArray[Any], start: NDArray[Any] | None, fixed: bool) -> Codes:
        codes = np.empty(format.code_shape(*live.shape), np.uint8)
        _core.gptq(
            code,
            factor,
            inputs.order,
            start,
            padded,
            diagonal,
            codes,
            scale,
            offset,
            group=group,
            fixed=fixed,
            block=_BLOCK,
            **options,
        )
        return codes

    def packed(codes: Codes) -> QuantizedTensor:
        return QuantizedTensor.pack(
            format,
            codes,
            None if format.per_tensor else scale,
            offset if format.has_offsets else None,
            levels=shared.levels,
            unit=shared.unit,
            zero=shared.zero,
            shape=live.shape,
        )

    codes = rounded(inputs.factor, None, fixed)
    if sweeps and format.ordered:
        hold_zeros(live, format, scale, offset)
        _core.refine(
            code,
            inputs.hessian,
            live,
            scale,
            offset,
            codes,
            group=group,
            damping=inputs.damping,
            sweeps=sweeps,
        )
    elif sweeps:
        _sweep(codes, sweeps, live, inputs, format, rounded, packed)
    tensor = packed(codes)
    size = _core.hessian_error(inputs.hessian, live)
    error = _core.hessian_error(inputs.hessian, live - tensor.dequantize())
    return tensor, error / size if size > 0 else 0.0


def _sweep(
    codes: Codes,
    sweeps: int,
    weight: NDArray[np.float32],
    inputs: Feedback,
    format: Format,
    rounded: Callable[[NDArray[Any], NDArray[Any], bool], Codes],
    packed: Callable[[Codes], QuantizedTensor],
) -> None:
    """Choose the words of each column again, in place, given all other columns.

    Column j is rounded from ``W_j + sum_i E_i H_ij / H_jj`` over all other columns i: the errors of
    this sweep before it, the old ones after it. Rows whose words are chosen together keep the old
    ones where these are better.
    """
    kind, pad = inputs.factor.dtype, len(inputs.factor) - weight.shape[1]
    order = slice(None) if inputs.order is None else inputs.order
    H = np.ascontiguousarray(np.pad(inputs.damped, (0, pad))[order][:, order])
    diagonal = np.diagonal(H).copy()
    diagonal[diagonal == 0] = 1
    word = np.arange(len(H)) // format.run
    before = word[:, None] < word
    factor = np.where(before, H / diagonal, np.eye(len(H))).astype(kind)
    others = np.where(before.T, 0, H / diagonal[:, None])
    others[np.diag_indices_from(others)] = 0

    strips = np.arange(0, len(weight), format.strip)

    def errors(codes: Codes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        error = np.float64(weight) - packed(codes).dequantize()
        size = np.einsum("rk,rk->r", error, product(error, inputs.damped))
        return error, np.add.reduceat(size, strips)

    error, size = errors(codes)
    for _ in range(sweeps):
        ordered = np.ascontiguousarray(np.pad(error, [(0, 0), (0, pad)])[:, order])
        new = rounded(factor, product(others, ordered).astype(kind), True)
        other, its_size = errors(new)
        better = np.repeat(its_size < size, format.strip)
        if not better.any():
            break
        codes[better[: len(codes)]] = new[better[: len(codes)]]
        here = better[: len(weight)]
        error[here] = other[here]
        size = np.minimum(size, its_size)
