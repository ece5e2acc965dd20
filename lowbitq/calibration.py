"""Calibration: statistics of the inputs of a model's linear layers when it runs on text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq._core import FormatError, NumericalError
from lowbitq.checkpoints.archives import load_arrays, save_arrays
from lowbitq.fisher import output_squares, token_weights
from lowbitq.models.config import ModelConfig
from lowbitq.models.decoder import Model
from lowbitq.models.finite import check_finite
from lowbitq.models.slots import FROM, TAPS, TO, name_in_block
from lowbitq.models.tokens import check_count
from lowbitq.plan_options import Sampling
from lowbitq.tables import as_frame, as_html, columns_of
from lowbitq.texts import Text, windows

Array = NDArray[np.float32]

# An activation is massive if it exceeds its layer's typical magnitude by this factor. Sun et al.
# require a magnitude of 100 and 1000 times the median; the root mean square is about 1.5 medians.
MASSIVE = 500

# Fields of Statistics that hold one array for each layer.
_BY_LAYER = ("mean_square", "max_abs", "hessians", "token_weights", "output_squares")


@dataclass(frozen=True)
class Massive:
    """One massive activation.

    Attributes
    ----------
    layer : str
        A linear layer that reads it, or the block that it leaves.
    sample, position, channel : int
        Index of the window, of the token in it, and of the column.
    value : float
        `calibrate` lists the one of largest magnitude in a channel and window.
    ratio : float
        Its magnitude over the typical one: of `calibrate`, the median of the channels' root mean
        squares; of `massive_activations`, median or mean of the magnitudes.
    """

    layer: str
    sample: int
    position: int
    channel: int
    value: float
    ratio: float


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `calibrate` found.

    Attributes
    ----------
    tokens : ndarray of shape (samples, window), int32
        The calibration windows.
    mean_square : dict of str to ndarray of shape (in,), float32
        Mean square of each linear layer's inputs, by channel.
    max_abs : dict of str to ndarray of shape (in,), float32
        Maximum magnitude of these inputs.
    massive : list of Massive
        Channels whose activations far exceed all others.
    hessians : dict of str to ndarray of shape (in, in), float64
        ``sum w x x^T`` over the inputs of each layer, symmetric; empty unless asked for. Layers
        with the same input share one array, unless `token_weights` give each its own.
    token_weights : dict of str to ndarray of shape (samples, window), float32
        Mean over each layer's outputs of the squared gradient of ``-log p(label)``, not yet
        clipped; empty unless asked for. See `lowbitq.fisher`.
    output_squares : dict of str to ndarray of shape (out,), float32
        Mean over all tokens of the same squares, by output; empty unless asked for.
    """

    tokens: NDArray[np.int32] = field(repr=False)
    mean_square: dict[str, Array] = field(repr=False)
    max_abs: dict[str, Array] = field(repr=False)
    massive: list[Massive]
    hessians: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    token_weights: dict[str, Array] = field(default_factory=dict, repr=False)
    output_squares: dict[str, Array] = field(default_factory=dict, repr=False)

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, a row for each layer; ImportError without pandas."""
        return as_frame(self._rows())

    def _repr_html_(self) -> str:
        rows = self._rows()
        caption = f"{len(self.tokens)} windows of {self.tokens.shape[1]} tokens, "
        caption += f"{len(self.massive)} massive activations"
        return as_html(columns_of(rows), rows, caption=caption, bars=["root mean square"])

    def _rows(self) -> list[dict[str, Any]]:
        """What is known of the inputs of each layer, in numbers."""
        return [
            {
                "layer": name,
                "inputs": len(square),
                "root mean square": float(np.sqrt(square.mean())),
                "maximum": float(self.max_abs[name].max()),
            }
            for name, square in self.mean_square.items()
        ]

    @property
    def token_count(self) -> int:
        """Number of tokens that were run."""
        return self.tokens.size

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one ``.npz`` file, atomically.

        Parameters
        ----------
        path : str or path
            ``.npz`` is appended if it has no suffix; ``stats-2.5bit`` has one.

        Raises
        ------
        OSError
            If the file cannot be written; the message names it.
        """
        arrays: dict[str, Any] = {"tokens": self.tokens}
        for kind in _BY_LAYER:
            for name, array in getattr(self, kind).items():
                arrays[f"{kind}/{name}"] = array
        names = [m.layer for m in self.massive]
        arrays["massive_layers"] = np.array(names, dtype=str)
        arrays["massive"] = np.array(
            [(m.sample, m.position, m.channel, m.value, m.ratio) for m in self.massive]
        ).reshape(-1, 5)
        save_arrays(_with_suffix(path), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote; of an older version, too.

        Raises
        ------
        FormatError
            If the file is not a complete ``.npz`` with the right arrays.
        """
        parts: dict[str, dict[str, Any]] = {kind: {} for kind in _BY_LAYER}
        arrays = load_arrays(_with_suffix(path))
        try:
            for key, array in arrays.items():
                kind, _, name = key.partition("/")
                if name:
                    parts[kind][name] = array
            massive = [
                Massive(str(layer), int(s), int(p), int(c), float(v), float(r))
                for layer, (s, p, c, v, r) in zip(
                    arrays["massive_layers"], arrays["massive"], strict=True
                )
            ]
            return cls(arrays["tokens"], massive=massive, **parts)
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError(f"{path}: not lowbitq statistics: {error}") from error


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix else path.with_suffix(".npz")


class Stream:
    """Windows of text passing through the blocks of a model.

    All code that inspects layers while the model runs uses this walk over blocks. It holds the
    residual stream at the entrance of a block, ``4 samples window hidden`` bytes. Layers of `model`
    may be replaced during the walk, so a later tap sees the outputs of the quantized layers before
    it. Two streams can run a model and its quantized prefix in lockstep.

    Parameters
    ----------
    model : Model
    tokens : ndarray of shape (samples, window), integers

    Attributes
    ----------
    model : Model
    index : int
        The block that the windows enter next.
    hidden : ndarray of shape (samples, window, hidden), float32
        The residual stream there.

    Examples
    --------
    >>> stream = Stream(model, tokens)  # doctest: +SKIP
    >>> for index in stream:  # doctest: +SKIP
    ...     for taps in stream.taps():
    ...         print(index, taps["down"].max())
    """

    def __init__(self, model: Model, tokens: NDArray[np.int32]) -> None:
        self.model = model
        self.index = 0
        self.hidden = np.stack([model.embed(row) for row in tokens])
        self._kept: dict[int, dict[str, Array]] = {}

    def __iter__(self) -> Iterator[int]:
        """Yield the index of each block, then advance unless the caller has done so."""
        blocks = len(self.model.blocks)
        for here in range(self.index, blocks):
            yield here
            if self.index == here and here + 1 < blocks:
                self.advance()

    def taps(self, *, advance: bool = False) -> Iterator[dict[str, Array]]:
        """Run the block on each window.

        Parameters
        ----------
        advance : bool, default=False
            Whether to move the windows past the block. False: they stay at its entrance.

        Yields
        ------
        dict of str to ndarray of shape (window, in), float32
            Inputs of the layers, by their names in `TAPS`, before a layer's own rotation. The
            arrays are reused for the next window.
        """
        taps: dict[str, Array] = {}
        scratch = None if advance else np.empty_like(self.hidden[0])
        for hidden in self.hidden:
            if scratch is not None:
                scratch[:] = hidden
                hidden = scratch
            self.model.block_forward(self.index, hidden, taps)
            yield taps
        self.index += advance

    def run(self, steps: int) -> Iterator[tuple[Array, dict[str, Array]]]:
        """Run steps of the block on each window, in place.

        Parameters
        ----------
        steps : int
            As for `Model.block_forward`. Inputs from which a later step goes on are kept: 4 samples
            window in bytes.

        Yields
        ------
        hidden : ndarray of shape (window, hidden), float32
            The residual stream of the window.
        taps : dict of str to ndarray of shape (window, in), float32
            The inputs that the steps have reached.
        """
        for sample, hidden in enumerate(self.hidden):
            taps = self._kept.setdefault(sample, {})
            self.model.block_forward(self.index, hidden, taps, steps=steps)
            yield hidden, taps
            self._kept[sample] = {
                tap: x
                for tap, x in taps.items()
                if tap in FROM and steps & TO[tap] and not steps & FROM[tap]
            }

    def advance(self) -> None:
        """Take all windows through the block."""
        for hidden in self.hidden:
            self.model.block_forward(self.index, hidden)
        self.index += 1


class Hessians:
    """Sums of ``w x x^T`` over the inputs of a block's layers, with a weight w for each token.

    Parameters
    ----------
    config : ModelConfig
    index : int
        Index of the block.
    shape : (int, int)
        Number of windows, and tokens per window.
    sampling : Sampling
    squares : mapping of str to ndarray of shape (samples, window), float32
        By layer: `Statistics.token_weights`, from which `sampling` makes the weights, a sum for
        each layer. Empty: layers with the same input share a sum, and only the first tokens of a
        window have another weight.

    Attributes
    ----------
    totals : dict of str to ndarray of shape (in, in), float64
        Upper triangles, by the names of `Block.linears`; `complete` fills in the lower ones.

    Raises
    ------
    ValueError
        If there are squares, but none of that shape for a layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        shape: tuple[int, int],
        sampling: Sampling,
        squares: Mapping[str, Array],
    ) -> None:
        self.totals: dict[str, NDArray[np.float64]] = {}
        self._sums: dict[str, list[tuple[NDArray[np.float64], Array | None]]] = {}
        for tap, slots in TAPS.items():
            sums: list[tuple[NDArray[np.float64], Array | None]] = []
            for slot in slots:
                if squares or not sums:
                    columns = slot.shape(config)[1]
                    name = name_in_block(index, slot)
                    weights = weights_of_tokens(squares, name, shape, sampling)
                    sums.append((np.zeros((columns, columns)), weights))
                self.totals[slot.name] = sums[-1][0]
            self._sums[tap] = sums

    def add(self, sample: int, tap: str, x: Array) -> None:
        """Add the inputs x (window, in) of one window; the layers that read it have this tap."""
        for total, weights in self._sums[tap]:
            _core.hessian_add(x, None if weights is None else weights[sample], total)

    def complete(self) -> dict[str, NDArray[np.float64]]:
        """Fill in the lower triangles and return `totals`."""
        for sums in self._sums.values():
            for total, _ in sums:
                rows, columns = np.tril_indices(len(total), -1)
                total[rows, columns] = total[columns, rows]
        return self.totals


def weights_of_tokens(
    squares: Mapping[str, Array], name: str, shape: tuple[int, int], sampling: Sampling
) -> Array | None:
    """Return the weights (samples, window) of tokens in a layer's Hessian; None: all 1.

    Parameters are those of `Hessians`, and the name of the layer.
    """
    if not squares:
        return _first_weights(shape, sampling)
    found = squares.get(name)
    if found is None or found.shape != shape:
        seen = None if found is None else found.shape
        raise ValueError(f"token_weights[{name!r}] has shape {seen}, expected {shape}")
    return token_weights(found, first_tokens=sampling.first_tokens, clip=sampling.clip)


def _first_weights(shape: tuple[int, int], sampling: Sampling) -> Array | None:
    if sampling.first_tokens == 0 or sampling.first_weight == 1:
        return None
    weights = np.ones(shape[1], np.float32)
    weights[: sampling.first_tokens] = sampling.first_weight
    return np.broadcast_to(weights, shape)


Progress = Callable[[int, int], object]


def calibrate(
    model: Model,
    text: Text,
    *,
    samples: int = 128,
    window: int = 2048,
    seed: int = 0,
    hessians: bool = False,
    first_tokens: int = 4,
    first_weight: float = 16.0,
    fisher: bool = False,
    clip: float = 20.0,
    progress: bool | Progress = False,
) -> Statistics:
    """Run a model on text and collect statistics of each linear layer's inputs.

    It runs block by block and holds the activations of one: ``4 samples window hidden`` bytes.

    Parameters
    ----------
    model : Model
    text, samples, window, seed
        As for `windows`. The text should be formatted like the text of the intended use. `seed`
        also draws the labels of `fisher`.
    hessians : bool, default=False
        Also keep ``sum x x^T`` of every layer: 8 in^2 bytes each.
    first_tokens, first_weight : int, float
        The first `first_tokens` tokens of a window count `first_weight` times in these sums.
    fisher : bool, default=False
        Also take every window back through the model, whose layers must be dense, and keep the
        squared gradients at the outputs of the layers. Tokens of Hessians are then weighted by
        these, each layer by its own, instead of by `first_weight`: ``sum w x x^T`` is the
        curvature of the model's loss rather than of the layer's squared error.
    clip : float, default=20.0
        Largest of these weights, in medians, after the first `first_tokens` tokens of a window.
    progress : bool or callable, default=False
        True: a bar with the remaining time. A function is called with the number of finished blocks
        and of all blocks, where each window that is taken back counts as a block.

    Returns
    -------
    Statistics

    Raises
    ------
    ValueError
        If the model has a NaN or an infinity, text and `window` do not fit the model (as for
        `windows`), or an option is out of range.
    NumericalError
        If the input of a layer, or a gradient at its output, has a NaN, an infinity or a number too
        large to square in float32.

    References
    ----------
    J. Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss
    Guidance", 2025.

    Examples
    --------
    >>> stats = calibrate(model, "wikitext2-valid.txt", samples=32)  # doctest: +SKIP
    >>> stats.max_abs["model.layers.11.mlp.down_proj"].max()  # doctest: +SKIP
    """
    check_count("first_tokens", first_tokens, 0)
    sampling = Sampling(first_tokens, first_weight, clip)
    check_finite(model)
    tokens = windows(
        model.tokenizer, text, samples=samples, window=window, seed=seed, config=model.config
    )
    stats = Statistics(tokens, {}, {}, [])
    back, blocks = len(tokens) * fisher, len(model.blocks)
    report = reporter(progress, back + blocks, title="calibrate", unit="block")
    if fisher:
        found = output_squares(
            model, tokens, seed=seed, progress=lambda done: report(done, back + blocks)
        )
        stats.token_weights.update(found[0])
        stats.output_squares.update(found[1])
    stream = Stream(model, tokens)
    for index in stream:
        seen: dict[str, _Seen] = {}
        sums = None
        if hessians:
            sums = Hessians(model.config, index, tokens.shape, sampling, stats.token_weights)
        for sample, taps in enumerate(stream.taps(advance=True)):
            for tap, x in taps.items():
                if tap not in seen:
                    seen[tap] = _Seen(name_in_block(index, TAPS[tap][0]), x.shape[1])
                seen[tap].add(sample, x)
                if sums:
                    sums.add(sample, tap, x)
        totals = sums.complete() if sums else {}
        for tap, known in seen.items():
            for slot in TAPS[tap]:
                reader = name_in_block(index, slot)
                stats.mean_square[reader] = known.mean_square()
                stats.max_abs[reader] = known.max_abs
                if totals:
                    stats.hessians[reader] = totals[slot.name]
            stats.massive.extend(known.massive)
        report(back + index + 1, back + blocks)
    return stats


def reporter(progress: bool | Progress, total: int, *, title: str, unit: str) -> Progress:
    """Return the function to call after each step: the caller's, one that moves a bar, or none.

    Parameters
    ----------
    progress : bool or callable
        True: a bar with the remaining time on standard error.
    total : int
        Number of steps. The bar closes after the last one.
    title, unit : str
        Texts of the bar.
    """
    if callable(progress):
        return progress
    if not progress:
        return lambda done, total: None
    from tqdm.auto import tqdm  # here, because it takes a tenth of the package's import time

    bar = tqdm(total=total, unit=unit, desc=title)

    def report(done: int, total: int) -> None:
        bar.update()
        if done == total:
            bar.close()

    return report


class _Seen:
    """Running statistics of one input."""

    def __init__(self, layer: str, columns: int) -> None:
        self.layer = layer
        self.tokens = 0
        self.squares = np.zeros(columns)
        self.max_abs = np.zeros(columns, np.float32)
        self.massive: list[Massive] = []

    def add(self, sample: int, x: Array) -> None:
        with np.errstate(over="ignore"):
            squares = np.square(x).sum(0, dtype=np.float64)
        if not (finite := np.isfinite(squares)).all():
            raise NumericalError(
                f"the input of {self.layer} has a NaN, an infinity or a number too large to square "
                f"in channel {finite.argmin()} of sample {sample}"
            )
        largest = abs(x).max(0)
        typical = float(np.sqrt(np.median(squares) / len(x)))
        for channel in np.flatnonzero(largest > MASSIVE * typical):
            position = int(abs(x[:, channel]).argmax())
            value = float(x[position, channel])
            ratio = abs(value) / typical if typical else float("inf")
            self.massive.append(Massive(self.layer, sample, position, int(channel), value, ratio))
        self.tokens += len(x)
        self.squares += squares
        np.maximum(self.max_abs, largest, out=self.max_abs)

    def mean_square(self) -> Array:
        return (self.squares / self.tokens).astype(np.float32)
