"""Where a search of several copies' parameters begins, and making scales of inputs static."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import cos, pi

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq.calibration import Stream
from lowbitq.linears import Activation, Copy, QuantizedLinear
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.slots import SLOTS, name_in_block
from lowbitq.models.tokens import check_count, token_array

RAMPS = ("linear", "cosine")

_CLIPS = np.geomspace(0.02, 1, 40)  # of `complementary`; each is 10 % above the one before
_MOST_NUMBERS = 1 << 16


def symmetric(copies: int = 2) -> dict[str, float]:
    """Return parameters that lie evenly around those of a single copy.

    Parameters
    ----------
    copies : int, default=2

    Returns
    -------
    dict of str to float
        Scales from 0.9 to 1.1, whose mean is 1, and clips from 0.95 to 0.99.

    Examples
    --------
    >>> symmetric()
    {'scale1': 0.9, 'clip1': 0.95, 'scale2': 1.1, 'clip2': 0.99}
    """
    check_count("copies", copies, 2)
    scales, clips = np.linspace(0.9, 1.1, copies), np.linspace(0.95, 0.99, copies)
    found: dict[str, float] = {}
    for number, (scale, clip) in enumerate(zip(scales.tolist(), clips.tolist(), strict=True), 1):
        found |= {f"scale{number}": round(scale, 12), f"clip{number}": round(clip, 12)}
    return found


def progressive(
    target: Mapping[str, float], steps: int, *, ramp: str = "linear"
) -> list[dict[str, float]]:
    """Return points from equal copies to different ones.

    Parameters
    ----------
    target : mapping of str to float
        Parameters of the copies, such as from `symmetric`.
    steps : int
        Number of steps after the first point.
    ramp : {"linear", "cosine"}, default="linear"
        ``"cosine"`` leaves and arrives slowly.

    Returns
    -------
    list of dict of str to float
        ``steps + 1`` points. In the first, all copies have the mean of each parameter; the last one
        is the target.

    Raises
    ------
    ValueError
        If an option is out of range.

    Examples
    --------
    >>> progressive({"clip1": 0.5, "clip2": 1.0}, steps=1)
    [{'clip1': 0.75, 'clip2': 0.75}, {'clip1': 0.5, 'clip2': 1.0}]
    """
    check_count("steps", steps, 1)
    if ramp not in RAMPS:
        raise ValueError(f"ramp is {ramp!r}, expected one of {', '.join(map(repr, RAMPS))}")
    kinds: dict[str, list[float]] = {}
    for name, value in target.items():
        kinds.setdefault(name.rstrip("0123456789"), []).append(value)
    start = {name: float(np.mean(kinds[name.rstrip("0123456789")])) for name in target}
    points = []
    for step in range(steps + 1):
        share = step / steps if ramp == "linear" else (1 - cos(pi * step / steps)) / 2
        points.append({n: (1 - share) * start[n] + share * target[n] for n in target})
    return [*points[:-1], dict(target)]


def complementary(inputs: ArrayLike, bits: int, copies: int = 2) -> dict[str, float]:
    """Return clips whose mean over copies represents these inputs best.

    Each copy rounds the inputs to ``2^bits - 1`` levels within its clip times the largest
    magnitude. A small clip is fine for the bulk, a large one keeps the tail. From the Gram matrix
    of the rounding errors of 40 clips, the best one is chosen for the first copy, then the one for
    each further copy with which the mean errs least, and at last each again given the others.

    Parameters
    ----------
    inputs : array_like of numbers, of any shape
        Of a layer, such as from `inputs_of`; at most 65,536 of them are used, evenly spaced.
    bits : int
        2 to 8.
    copies : int, default=2

    Returns
    -------
    dict of str to float
        ``clip1``, ``clip2`` and so on, rising.

    Raises
    ------
    ValueError
        If a number is not finite, all are zero, or an option is out of range.

    Examples
    --------
    >>> inputs = np.random.default_rng(0).standard_t(3, 10000)
    >>> complementary(inputs, bits=4)["clip1"] < 0.3
    True
    """
    check_count("bits", bits, 2)
    check_count("copies", copies, 2)
    x = np.asarray(inputs, np.float64).ravel()
    x = x[:: max(1, -(-x.size // _MOST_NUMBERS))]
    largest = abs(x).max(initial=0)
    if not 0 < largest < np.inf:
        raise ValueError(f"inputs have the largest magnitude {largest}, expected a number above 0")
    limit = (1 << (bits - 1)) - 1
    steps = (_CLIPS * largest / limit)[:, None]
    errors = np.clip(np.round(x / steps), -limit, limit) * steps - x
    G = errors @ errors.T
    chosen: list[int] = []

    def best(others: list[int]) -> int:
        """The clip with which the sum of errors has the least square."""
        cross = 2 * G[others].sum(0) if others else 0.0
        return int((G.diagonal() + cross).argmin())

    for _ in range(copies):
        chosen.append(best(chosen))
    for place in range(copies):
        chosen[place] = best(chosen[:place] + chosen[place + 1 :])
    return {f"clip{n}": float(_CLIPS[c]) for n, c in enumerate(sorted(chosen), 1)}


def static(model: QuantizedModel, tokens: ArrayLike, *, share: float = 1.0) -> QuantizedModel:
    """Return a model whose inputs are rounded with static scales.

    Parameters
    ----------
    model : QuantizedModel
        Left unchanged.
    tokens : array_like of shape (windows, window), integers
        What the scales are found on.
    share : float, default=1.0
        Share of the inputs that are not clipped. 1: the scale is that of the largest magnitude,
        which a massive activation can make useless for the others; 0.999 and less keep to the rest.

    Returns
    -------
    QuantizedModel
        Float layers and copies that did not round their inputs still do not. Zero points are
        removed.

    Raises
    ------
    ValueError
        If tokens do not fit the model, `share` is not above 0 and at most 1, or the inputs of a
        layer are all zeros.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected more than 0, at most 1")
    result = model.copy()
    assert isinstance(result, QuantizedModel)
    largest: dict[tuple[str, int], list[float]] = {}
    for name, index, x in _each_input(model, tokens):
        size = abs(x)
        found = size.max() if share == 1 else np.quantile(size, share)
        largest.setdefault((name, index), []).append(float(found))
    for name, linear in model.linears():
        if not isinstance(linear, QuantizedLinear):
            continue
        copies = []
        for index, copy in enumerate(linear.copies):
            found = largest[name, index]
            # The mean over windows of a quantile; the largest magnitude of all.
            top = max(found) if share == 1 else float(np.mean(found))
            copies.append(_with_range(name, copy, top))
        result.replace_linear(name, linear.replace(copies=tuple(copies)))
    return result


def _with_range(name: str, copy: Copy, top: float) -> Copy:
    bits = copy.activation.bits
    if bits is None:
        return copy
    if not top > 0:
        raise ValueError(f"the inputs of {name} are zeros, which have no scale")
    scale = top / ((1 << (bits - 1)) - 1)
    how = Activation(bits, scale=scale, rotation=copy.activation.rotation)
    return replace(copy, activation=how)


def inputs_of(
    model: QuantizedModel, tokens: ArrayLike, layer: str, *, copy: int = 0
) -> NDArray[np.float32]:
    """Return the inputs of a layer as a copy rounds them, in its rotation.

    Parameters
    ----------
    model : QuantizedModel
    tokens : array_like of shape (windows, window), integers
    layer : str
    copy : int, default=0
        Index of the copy.

    Returns
    -------
    ndarray of shape (windows * window, cols), float32

    Raises
    ------
    ValueError
        If tokens do not fit the model, or it has no such layer or copy.
    """
    found = [x for name, index, x in _each_input(model, tokens) if (name, index) == (layer, copy)]
    if not found:
        raise ValueError(f"the model has no copy {copy} of a layer {layer!r}")
    return np.concatenate(found)


def _each_input(
    model: QuantizedModel, tokens: ArrayLike
) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
    """Yield a layer's name, a copy's index and what it rounds (window, cols), by windows."""
    windows = token_array(tokens, model.config.vocab_size, axes=(2,))
    stream = Stream(model, windows)
    for block in stream:
        linears = model.blocks[block].linears
        for taps in stream.taps(advance=True):
            for slot in SLOTS:
                linear = linears[slot.name]
                copies = linear.copies if isinstance(linear, QuantizedLinear) else ()
                for index, copy in enumerate(copies):
                    x = taps[slot.tap].copy()
                    for rotation in (copy.rotation, copy.activation.rotation):
                        x = x if rotation is None else rotation.apply(x)
                    yield name_in_block(block, slot), index, x
