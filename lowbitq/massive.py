"""Massive activations: the few numbers in a network that dwarf all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.calibration import Massive, Progress, Stream, reporter
from lowbitq.models.decoder import Model
from lowbitq.models.finite import check_finite
from lowbitq.models.slots import TAPS, name_in_block
from lowbitq.texts import Text, windows

Array = NDArray[np.float32]

PLACES = ("blocks", "inputs")
TYPICAL = ("median", "mean")
_LISTED = 5  # channels and positions in a line of the printed table


def magnitude_quantile(counts: NDArray[np.int64], share: float) -> float:
    """Return a quantile of magnitudes, rounded down to bfloat16: by at most one part in 128.

    Parameters
    ----------
    counts : ndarray of shape (32768,), int64
        From `_core.magnitude_counts`.
    share : float
        0 to 1.

    Examples
    --------
    >>> counts = np.zeros(1 << 15, np.int64)
    >>> _core.magnitude_counts(np.float32([[1, -2, 3, 4, 5]]), counts)
    >>> magnitude_quantile(counts, 0.5)
    3.0
    """
    total = np.cumsum(counts)
    place = np.searchsorted(total, share * total[-1])
    return float(np.array(place << 16, np.uint32).view(np.float32))


@dataclass(frozen=True, eq=False)
class MassiveActivations:
    """What `massive_activations` found.

    Attributes
    ----------
    rows : tuple of Massive
        In the order of layers, windows, positions and channels. A ratio is that to the typical
        magnitude of the layer in the same window.
    layers : dict of str to float
        All layers that were looked at, with the mean of their typical magnitudes.
    tokens : ndarray of shape (samples, window), int32
        The text.
    ratio, least, typical
        As given.
    """

    rows: tuple[Massive, ...]
    layers: dict[str, float]
    tokens: NDArray[np.int32] = field(repr=False)
    ratio: float
    least: float
    typical: str

    def to_frame(self) -> Any:
        """Return the rows as a pandas DataFrame; ImportError if pandas is missing.

        Its columns are the fields of `Massive`, and ``token``, the number of the token there.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ImportError("to_frame needs pandas; get it with: pip install pandas") from error
        names = ["layer", "sample", "position", "channel", "value", "ratio"]
        frame = pandas.DataFrame([asdict(row) for row in self.rows], columns=names)
        frame["token"] = [int(self.tokens[row.sample, row.position]) for row in self.rows]
        return frame

    def __str__(self) -> str:
        """Layers that have any: how many, the largest, and the most frequent places."""
        what = f"|x| >= {self.ratio:g} times the {self.typical}"
        if self.least:
            what += f" and >= {self.least:g}"
        samples, window = self.tokens.shape
        lines = [f"{what}, in {samples} windows of {window} tokens"]
        lines.append(f"{'layer':32} count    largest     ratio  channels; positions")
        found: dict[str, list[Massive]] = {}
        for row in self.rows:
            found.setdefault(row.layer, []).append(row)
        for layer, rows in found.items():
            top = max(rows, key=lambda row: abs(row.value))
            places = "; ".join(
                _frequent([getattr(row, name) for row in rows]) for name in ("channel", "position")
            )
            lines.append(f"{layer:32} {len(rows):5} {top.value:10.4g} {top.ratio:9.4g}  {places}")
        return "\n".join(lines if found else [*lines, "none"])


def _frequent(numbers: list[int]) -> str:
    counted = Counter(numbers).most_common()
    text = ", ".join(str(number) for number, _ in counted[:_LISTED])
    return text + (f" and {len(counted) - _LISTED} more" if len(counted) > _LISTED else "")


def massive_activations(
    model: Model,
    text: Text,
    *,
    samples: int = 8,
    window: int = 512,
    seed: int = 0,
    of: str = "blocks",
    ratio: float = 1000.0,
    typical: str = "median",
    least: float = 100.0,
    progress: bool | Progress = False,
) -> MassiveActivations:
    """List the massive activations of a model: layer, window, position, channel, value, ratio.

    Parameters
    ----------
    model : Model
        Not rotated: a rotation of the residual stream spreads what is looked for.
    text, samples, window, seed
        As for `lowbitq.texts.windows`.
    of : {"blocks", "inputs"}, default="blocks"
        Where to look. ``"blocks"``: the residual stream behind each block, ``"model.layers.3"``.
        ``"inputs"``: the inputs of linear layers, each by the first layer that reads it.
    ratio : float, default=1000
        Least magnitude, in typical magnitudes of the layer in the window.
    typical : {"median", "mean"}, default="median"
        What is typical: median, rounded down by at most one part in 128, or mean of the magnitudes.
    least : float, default=100
        Least magnitude.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the number of finished blocks
        and of all blocks.

    Returns
    -------
    MassiveActivations
        `print` shows a table by layer.

    Raises
    ------
    ValueError
        If the model or an activation is not finite, text and `window` do not fit the model, or an
        option is out of range.

    References
    ----------
    M. Sun, X. Chen, J. Z. Kolter, Z. Liu, "Massive Activations in Large Language Models", 2024,
    section 2: magnitudes above 100 and about 1000 medians of the hidden state, the defaults. A
    density of activations above 100 means is ``ratio=100, typical="mean", least=0``.

    Examples
    --------
    >>> print(massive_activations(model, "text.txt"))  # doctest: +SKIP
    """
    for name, value, choices in (("of", of, PLACES), ("typical", typical, TYPICAL)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
    for name, number in (("ratio", ratio), ("least", least)):
        if not 0 <= number < np.inf:
            raise ValueError(f"{name} is {number}, expected a finite number, at least 0")
    check_finite(model)
    tokens = windows(
        model.tokenizer, text, samples=samples, window=window, seed=seed, config=model.config
    )
    found: dict[str, list[Massive]] = {}
    sizes: dict[str, float] = {}
    blocks = len(model.blocks)
    report = reporter(progress, blocks, title="massive activations", unit="block")
    stream = Stream(model, tokens)
    for index in range(blocks):
        for sample, layer, x in _activations(stream, index, of):
            rows, size = _massive(x, layer, sample, ratio, typical, least)
            found.setdefault(layer, []).extend(rows)
            sizes[layer] = sizes.get(layer, 0.0) + size / len(tokens)
        report(index + 1, blocks)
    rows = [row for rows in found.values() for row in rows]
    return MassiveActivations(tuple(rows), sizes, tokens, ratio, least, typical)


def _activations(stream: Stream, index: int, of: str) -> Iterator[tuple[int, str, Array]]:
    """Take the windows past a block; yield sample, name and array (window, channels)."""
    for sample, taps in enumerate(stream.taps(advance=True)):
        if of == "blocks":
            yield sample, f"model.layers.{index}", stream.hidden[sample]
            continue
        for tap, x in taps.items():
            yield sample, name_in_block(index, TAPS[tap][0]), x


def _massive(
    x: Array, layer: str, sample: int, ratio: float, typical: str, least: float
) -> tuple[list[Massive], float]:
    """Return the massive activations of one window, and its typical magnitude."""
    try:
        sums = _core.input_sums(x, tau=least)
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error
    if typical == "mean":
        size = sums["magnitude"] / x.size
    else:
        counts = np.zeros(1 << 15, np.int64)
        _core.magnitude_counts(x, counts)
        size = magnitude_quantile(counts, 0.5)
    threshold = max(ratio * size, least)
    if not size or sums["largest"] < threshold:
        return [], size
    rows = []
    for position, channel in np.argwhere(abs(x) >= threshold).tolist():
        value = float(x[position, channel])
        rows.append(Massive(layer, sample, position, channel, value, abs(value) / size))
    return rows, size
