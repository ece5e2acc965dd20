"""Calibration: what the linear layers of a model read when it runs on text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq._core import FormatError
from lowbitq.checkpoints.archives import load_arrays, save_arrays
from lowbitq.models.decoder import Model
from lowbitq.models.tokenizer import Tokenizer

Text = str | os.PathLike[str] | Sequence[str] | NDArray[np.integer[Any]]
Array = NDArray[np.float32]

# The linear layers of a block by the tap that holds their input.
READERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

# An activation is massive if it is this many times the typical one of its layer: Sun et al. ask for
# a magnitude of 100 and 1000 times the median; the root mean square is about 1.5 medians.
MASSIVE = 500


@dataclass(frozen=True)
class Massive:
    """One massive activation.

    Attributes
    ----------
    layer : str
        A linear layer that reads it.
    sample, position, channel : int
        Which window, token of the window, and column.
    value : float
        The largest magnitude of that channel in that window, with its sign.
    ratio : float
        Its magnitude divided by the median over channels of their root mean square.
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
        Mean of the squared inputs of each linear layer, by channel.
    max_abs : dict of str to ndarray of shape (in,), float32
        Their largest magnitude.
    massive : list of Massive
        Channels whose activations stand far above all others.
    hessians : dict of str to ndarray of shape (in, in), float64
        ``sum x x^T`` over the inputs of each layer, symmetric; empty unless asked for. Layers with
        the same input share one array.
    """

    tokens: NDArray[np.int32] = field(repr=False)
    mean_square: dict[str, Array] = field(repr=False)
    max_abs: dict[str, Array] = field(repr=False)
    massive: list[Massive]
    hessians: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @property
    def token_count(self) -> int:
        """Number of tokens that were run."""
        return self.tokens.size

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one ``.npz`` file, atomically.

        Parameters
        ----------
        path : str or path
            Gets the suffix ``.npz`` if it has none; ``stats-2.5bit`` has one.

        Raises
        ------
        OSError
            If it cannot be written; names it.
        """
        arrays: dict[str, Any] = {"tokens": self.tokens}
        for kind in ("mean_square", "max_abs", "hessians"):
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
        """Read what `save` wrote.

        Raises
        ------
        FormatError
            If the file is not a whole ``.npz`` with the right arrays.
        """
        parts: dict[str, dict[str, Any]] = {"mean_square": {}, "max_abs": {}, "hessians": {}}
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
            raise FormatError(f"{path}: not statistics of lowbitq: {error}") from error


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix else path.with_suffix(".npz")


def windows(
    tokenizer: Tokenizer | None,
    text: Text,
    *,
    samples: int = 128,
    window: int = 2048,
    seed: int = 0,
) -> NDArray[np.int32]:
    """Cut a text into windows at random places, spread evenly over it.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None is enough if `text` is tokens.
    text : str, path, sequence of str or ndarray of int
        The text itself; the path of a file in UTF-8 (a str that ends in ``.txt``); several texts,
        which are joined; or tokens: one long row, or windows of shape (samples, window) as they
        are to be used.
    samples, window : int
        How many windows of how many tokens. A tokenizer that begins texts with a token of its own
        has it begin each window.
    seed : int, default=0
        The same seed gives the same tokens.

    Returns
    -------
    ndarray of shape (samples, window), int32

    Raises
    ------
    ValueError
        If the text is empty or has too few tokens.

    Examples
    --------
    >>> windows(None, np.arange(100), samples=2, window=4, seed=1)
    array([[24, 25, 26, 27],
           [94, 95, 96, 97]], dtype=int32)
    """
    if samples < 1 or window < 2:
        raise ValueError(f"samples = {samples}, window = {window}: expected at least 1 and 2")
    if isinstance(text, np.ndarray) and text.ndim == 2:
        return np.ascontiguousarray(text, np.int32)
    tokens = tokenize(tokenizer, text)
    begins = tokenizer is not None and tokenizer.adds_bos and not isinstance(text, np.ndarray)
    length = window - begins
    needed = length + samples - 1
    if len(tokens) < needed:
        raise ValueError(
            f"text has {len(tokens)} tokens; {samples} windows of {window} need at least {needed}"
        )
    # One window begins in each of `samples` equal parts of the places where one can.
    places = len(tokens) - length + 1
    parts = np.arange(samples) + np.random.default_rng(seed).random(samples)
    starts = (parts * places / samples).astype(np.int64)
    cut = np.asarray(tokens, np.int32)[starts[:, None] + np.arange(length)]
    if begins:
        assert tokenizer is not None
        assert tokenizer.bos_id is not None
        cut = np.insert(cut, 0, tokenizer.bos_id, axis=1)
    return np.ascontiguousarray(cut, np.int32)


def tokenize(tokenizer: Tokenizer | None, text: Text) -> NDArray[np.integer[Any]]:
    """Return the tokens (t,) of a text in any of the forms that `windows` takes."""
    if isinstance(text, np.ndarray):
        if text.ndim != 1 or text.dtype.kind not in "iu":
            raise ValueError(
                f"tokens have shape {text.shape} and dtype {text.dtype}, expected (t,) integers"
            )
        return text
    if isinstance(text, os.PathLike) or (isinstance(text, str) and text.endswith(".txt")):
        text = Path(text).read_text(encoding="utf-8")
    if not isinstance(text, str):
        parts = list(text) if isinstance(text, Sequence) else [text]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(
                f"text is {type(text).__name__}, expected str, path, sequence of str or ndarray"
            )
        text = "\n\n".join(parts)
    if not text.strip():
        raise ValueError("text is empty")
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: give tokens instead of text")
    return tokenizer.encode(text)


class Hessian:
    """Sum of ``w x x^T`` over the inputs of a layer, the first tokens of a window weighted."""

    def __init__(self, columns: int, window: int, first_tokens: int, first_weight: float) -> None:
        self.total = np.zeros((columns, columns))
        self._weights: Array | None = None
        if first_tokens > 0 and first_weight != 1:
            self._weights = np.ones(window, np.float32)
            self._weights[:first_tokens] = first_weight

    def add(self, x: Array) -> None:
        """Add the inputs x (window, columns) of one window."""
        _core.hessian_add(x, self._weights, self.total)

    def complete(self) -> NDArray[np.float64]:
        """Fill in what lies below the diagonal, and return the matrix."""
        rows, columns = np.tril_indices(len(self.total), -1)
        self.total[rows, columns] = self.total[columns, rows]
        return self.total


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
    progress: bool | Progress = False,
) -> Statistics:
    """Run a model on text and note what each linear layer reads.

    Goes block by block; memory holds the activations of one: ``4 samples window hidden`` bytes.

    Parameters
    ----------
    model : Model
    text, samples, window, seed
        As for `windows`. Text should be formatted like the text that matters.
    hessians : bool, default=False
        Also keep ``sum x x^T`` of every layer: 8 in^2 bytes each.
    first_tokens, first_weight : int, float
        In these sums the first tokens of a window count this often.
    progress : bool or callable, default=False
        True: a bar with the time that is left. A function is called with the number of blocks done
        and of all blocks.

    Returns
    -------
    Statistics

    Raises
    ------
    ValueError
        If the text is empty or has too few tokens.

    Examples
    --------
    >>> stats = calibrate(model, "wikitext2-valid.txt", samples=32)  # doctest: +SKIP
    >>> stats.max_abs["model.layers.11.mlp.down_proj"].max()  # doctest: +SKIP
    """
    tokens = windows(model.tokenizer, text, samples=samples, window=window, seed=seed)
    residual = np.stack([model.embed(row) for row in tokens])
    stats = Statistics(tokens, {}, {}, [])
    report = _reporter(progress, len(model.blocks))
    for index in range(len(model.blocks)):
        prefix = f"model.layers.{index}."
        taps: dict[str, Array] = {}
        seen: dict[str, _Seen] = {}
        for sample, hidden in enumerate(residual):
            model.block_forward(index, hidden, taps)
            for tap, x in taps.items():
                if tap not in seen:
                    seen[tap] = _Seen(prefix + READERS[tap][0], x.shape[1])
                    if hessians:
                        seen[tap].hessian = Hessian(x.shape[1], len(x), first_tokens, first_weight)
                seen[tap].add(sample, x)
        for tap, found in seen.items():
            for reader in READERS[tap]:
                stats.mean_square[prefix + reader] = found.mean_square()
                stats.max_abs[prefix + reader] = found.max_abs
                if found.hessian:
                    stats.hessians[prefix + reader] = found.hessian.complete()
            stats.massive.extend(found.massive)
        report(index + 1, len(model.blocks))
    return stats


def _reporter(progress: bool | Progress, blocks: int) -> Progress:
    if callable(progress):
        return progress
    if not progress:
        return lambda done, total: None
    from tqdm import tqdm  # only now: it costs a tenth of the import of the package

    bar = tqdm(total=blocks, unit="block", desc="calibrate")

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
        self.hessian: Hessian | None = None

    def add(self, sample: int, x: Array) -> None:
        squares = np.square(x).sum(0, dtype=np.float64)
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
        if self.hessian:
            self.hessian.add(x)

    def mean_square(self) -> Array:
        return (self.squares / self.tokens).astype(np.float32)
