"""How well a model predicts, how far it is from another, and what it costs in bits and seconds.

A text is cut from its start into windows that do not overlap. Every token but a window's first is
predicted from the tokens before it in the window, and its loss counts. Everything is measured on
the model as it runs, with packed weights and quantized activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.estimates import Divergence, Estimate, Evaluation, Perplexity, mean_estimate
from lowbitq.models.decoder import Model
from lowbitq.models.finite import check_finite
from lowbitq.models.tokens import check_count
from lowbitq.texts import (
    Text,
    check_positions,
    is_tokens,
    plain_text,
    settled,
    tokenize,
)

Item = TypeVar("Item")
Progress: TypeAlias = Callable[[int, int], object]

_ROWS = 256  # of logits at a time: 150 MB for the largest vocabularies (152,000)

_PERCENTILES = (50.0, 90.0, 99.0, 99.9)


def perplexity(
    model: Model,
    text: Text,
    window: int = 2048,
    windows: int | None = None,
    *,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure how well a model predicts a text.

    ``exp(mean(-log p(token | the tokens before it in its window)))``

    Parameters
    ----------
    model : Model
    text : str, path, sequence of str or of paths, or array_like of int of shape (t,)
        As for `lowbitq.texts.windows`. A tokenizer that begins texts with a BOS token puts
        one at the start of the text; none is added to windows.
    window : int, default=2048
        Tokens per window. A remainder is not scored, unless the text is shorter than a window.
    windows : int, default=None
        Number of windows, taken from the start of the text. None: all.
    progress : callable, default=None
        Called as ``progress(windows done, windows)``.

    Returns
    -------
    Perplexity
        A float with ``nll``, ``interval``, ``tokens``, ``windows``, ``per_window``, ``protocol``.

    Raises
    ------
    ValueError
        If the text is empty, has fewer than two tokens or fewer than `windows` windows, `window`
        exceeds the model's positions, a token is outside its vocabulary, the model has no tokenizer
        for a text, or its weights or logits have a NaN or an infinity.
    TypeError
        If `text` is none of the above.
    OSError, FormatError
        If a file cannot be read or is not in UTF-8.

    Examples
    --------
    A model that knows nothing has a perplexity equal to its vocabulary size.

    >>> from types import SimpleNamespace
    >>> ignorant = SimpleNamespace(
    ...     config=SimpleNamespace(vocab_size=8, max_positions=64),
    ...     tokenizer=None,
    ...     hidden=lambda tokens: np.zeros((len(tokens), 1), np.float32),
    ...     head_logits=lambda hidden, out: np.zeros((len(hidden), 8), np.float32),
    ... )
    >>> result = perplexity(ignorant, np.arange(40) % 8, window=16)
    >>> round(result, 6), result.tokens, result.windows
    (8.0, 30, 2)
    """
    return _score(model, None, text, window, windows, progress).perplexity()


def kl_divergence(
    model: Model,
    reference: Model,
    text: Text,
    window: int = 2048,
    windows: int | None = None,
    *,
    progress: Progress | None = None,
) -> Divergence:
    """Measure how far a model's predictions are from a reference's.

    This is the mean over tokens of ``sum_v p(v) log(p(v) / q(v))``, where p is the reference's
    distribution of the next token and q the model's.

    Parameters
    ----------
    model, reference : Model
        Both need the same tokenizer, or, if `text` is tokens, the same vocabulary size.
    text, window, windows, progress
        As for `perplexity`.

    Returns
    -------
    Divergence
        A float, nats per token, with ``interval`` and ``percentiles``.

    Raises
    ------
    ValueError, TypeError
        As for `perplexity`, or if the reference has a different vocabulary or tokenizer, or fewer
        positions than `window`.

    References
    ----------
    S. Kullback, R. A. Leibler, "On information and sufficiency", Ann. Math. Stat. 22, 1951.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> def always(*logits):
    ...     row = np.array([logits], np.float32)
    ...     return SimpleNamespace(
    ...         config=SimpleNamespace(vocab_size=2, max_positions=64),
    ...         tokenizer=None,
    ...         hidden=lambda tokens: np.zeros((len(tokens), 1), np.float32),
    ...         head_logits=lambda hidden, out: np.repeat(row, len(hidden), axis=0),
    ...     )
    >>> far = kl_divergence(always(0, 0), always(np.log(3), 0), np.zeros(32, int), window=16)
    >>> bool(np.isclose(far, 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)))
    True
    """
    return _score(model, reference, text, window, windows, progress).kl()


def agreement(
    model: Model,
    reference: Model,
    text: Text,
    window: int = 2048,
    windows: int | None = None,
    *,
    progress: Progress | None = None,
) -> Estimate:
    """Measure how often two models find the same next token most likely.

    Parameters
    ----------
    model, reference : Model
        Both need the same tokenizer, or, if `text` is tokens, the same vocabulary size.
    text, window, windows, progress
        As for `perplexity`.

    Returns
    -------
    Estimate
        A float between 0 and 1, with ``interval``.

    Raises
    ------
    ValueError, TypeError
        As for `perplexity`, or if the reference has a different vocabulary or tokenizer, or fewer
        positions than `window`.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> counting = SimpleNamespace(
    ...     config=SimpleNamespace(vocab_size=4, max_positions=64),
    ...     tokenizer=None,
    ...     hidden=lambda tokens: np.eye(4, dtype=np.float32)[tokens],
    ...     head_logits=lambda hidden, out: np.roll(hidden, 1, axis=1),
    ... )
    >>> float(agreement(counting, counting, np.arange(32) % 4, window=16))
    1.0
    """
    return _score(model, reference, text, window, windows, progress).agreement()


def evaluate(
    model: Model,
    text: Text,
    reference: Model | None = None,
    window: int = 2048,
    windows: int | None = None,
    *,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model's perplexity, size and speed, and its distance from a reference, in one pass.

    Parameters
    ----------
    model : Model
    text, window, windows, progress
        As for `perplexity`.
    reference : Model, default=None
        Needs the same tokenizer, such as the model before quantization. If `text` is tokens or
        either model has no tokenizer, the same vocabulary size is enough.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError, TypeError
        As for `perplexity`, or if the reference has a different vocabulary or tokenizer, or fewer
        positions than `window`.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> ignorant = SimpleNamespace(
    ...     config=SimpleNamespace(vocab_size=8, max_positions=64),
    ...     tokenizer=None,
    ...     hidden=lambda tokens: np.zeros((len(tokens), 1), np.float32),
    ...     head_logits=lambda hidden, out: np.zeros((len(hidden), 8), np.float32),
    ...     bits_per_weight=2.5,
    ...     nbytes=400,
    ...     parameters=1000,
    ... )
    >>> found = evaluate(ignorant, np.arange(64) % 8, reference=ignorant, window=16)
    >>> found.bits_per_weight, found.bits_per_parameter, float(found.kl), float(found.agreement)
    (2.5, 3.2, 0.0, 1.0)
    """
    scores = _score(model, reference, text, window, windows, progress)
    quality: dict[str, Any] = {"perplexity": scores.perplexity()}
    if reference is not None:
        quality["reference"] = _perplexity(scores.reference_nll, scores.protocol)
        quality["log_ratio"] = scores.log_ratio()
        quality["kl"], quality["agreement"] = scores.kl(), scores.agreement()
    return Evaluation(
        **quality,
        bits_per_weight=model.bits_per_weight,
        bits_per_parameter=8 * model.nbytes / model.parameters,
        size_bytes=model.nbytes,
        seconds=scores.seconds,
        tokens_per_second=scores.tokens / scores.seconds,
    )


@dataclass(frozen=True)
class _Cut:
    """The windows of a text."""

    tokens: NDArray[np.int32]  # (windows, window)
    protocol: str

    @property
    def scored(self) -> int:
        """Number of predicted tokens per window."""
        return int(self.tokens.shape[1]) - 1


@dataclass(frozen=True)
class _Scores:
    """Per scored token (windows, window - 1), float64."""

    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64]
    divergence: NDArray[np.float64]
    same: NDArray[np.uint8]
    seconds: float
    tokens: int  # read by the model
    protocol: str

    def perplexity(self) -> Perplexity:
        return _perplexity(self.nll, self.protocol)

    def log_ratio(self) -> Estimate:
        return mean_estimate(Estimate, self.nll - self.reference_nll, self.protocol)

    def kl(self) -> Divergence:
        result = mean_estimate(Divergence, self.divergence, self.protocol)
        levels = [*_PERCENTILES, 100.0]
        found = np.percentile(self.divergence, levels)
        result.percentiles = {level: float(v) for level, v in zip(levels, found, strict=True)}
        return result

    def agreement(self) -> Estimate:
        return mean_estimate(Estimate, self.same.astype(np.float64), self.protocol)


def _score(
    model: Model,
    reference: Model | None,
    text: Text,
    window: int,
    windows: int | None,
    progress: Progress | None,
) -> _Scores:
    """Score the text with the model and, unless None, with the reference."""
    text = settled(text)
    cut = _cut(model, text, window, windows)
    if reference is not None:
        check_reference(model, reference, text, cut.tokens.shape[1])
    for one in (model, reference):
        if isinstance(one, Model):
            check_finite(one)
    shape = len(cut.tokens), cut.scored
    nll, reference_nll, divergence = np.zeros((3, *shape))
    same = np.zeros(shape, np.uint8)
    seconds: list[float] = []
    room = _room(model, cut.scored)
    their_room = room if reference is None else _room(reference, cut.scored)
    for done, tokens in enumerate(cut.tokens):
        pieces = _timed(_logits(model, tokens, room), seconds)
        theirs = repeat(None) if reference is None else _logits(reference, tokens, their_room)
        for (rows, logits), their in zip(pieces, theirs, strict=False):
            target = tokens[1:][rows]
            _core.cross_entropy(logits, target, nll[done, rows])
            if their is not None:
                _core.cross_entropy(their[1], target, reference_nll[done, rows])
                _core.kl_divergence(their[1], logits, divergence[done, rows], same[done, rows])
        if progress:
            progress(done + 1, len(cut.tokens))
    return _Scores(
        nll, reference_nll, divergence, same, sum(seconds), cut.tokens.size, cut.protocol
    )


def check_reference(model: Model, reference: Model, text: Text, window: int) -> None:
    """Raise ValueError unless the tokens of the text mean the same to both models."""
    if reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"reference has {reference.config.vocab_size} tokens in its vocabulary, "
            f"but the model has {model.config.vocab_size}"
        )
    check_positions(window, reference.config, of="reference")
    ours, theirs = model.tokenizer, reference.tokenizer
    if ours is None or theirs is None or ours is theirs or is_tokens(text):
        return
    # One of them may lack tokens that never occur in text: GGUF files pad the vocabulary.
    words, their_words = (
        {number: word for word, number in tokenizer.vocabulary().items()}
        for tokenizer in (ours, theirs)
    )
    for number in sorted(words.keys() & their_words.keys()):
        if words[number] != their_words[number]:
            raise ValueError(
                f"reference has a different tokenizer: its token {number} is "
                f"{their_words[number]!r}, the model's is {words[number]!r}"
            )
    plain = plain_text(text)
    if not np.array_equal(ours.encode(plain, add_bos=False), theirs.encode(plain, add_bos=False)):
        raise ValueError("reference has a different tokenizer: it cuts the text into other tokens")


def _room(model: Model, tokens: int) -> NDArray[np.float32]:
    """Return an array for the logits of some tokens.

    It is reused for every piece, because the system would clear the pages of a new array.
    """
    shape = min(_ROWS, tokens), model.config.vocab_size
    return _core.aligned_empty(bytes=4 * shape[0] * shape[1]).view(np.float32).reshape(shape)


def _logits(
    model: Model, tokens: NDArray[np.int32], room: NDArray[np.float32]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield the logits of every token but the last, up to ``len(room)`` rows at a time."""
    hidden = model.hidden(tokens)
    for start in range(0, len(tokens) - 1, len(room)):
        rows = slice(start, min(start + len(room), len(tokens) - 1))
        yield rows, model.head_logits(hidden[rows], room[: rows.stop - rows.start])


def _timed(pieces: Iterator[Item], seconds: list[float]) -> Iterator[Item]:
    """Yield the items of an iterator and append the time that each took."""
    while True:
        started = time.perf_counter()
        piece = next(pieces, None)
        seconds.append(time.perf_counter() - started)
        if piece is None:
            return
        yield piece


def _cut(model: Model, text: Text, window: int, windows: int | None) -> _Cut:
    """Check the arguments and cut the text."""
    check_count("window", window, 2)
    if windows is not None:
        check_count("windows", windows, 1)
    tokens = tokenize(model.tokenizer, text, model.config.vocab_size)
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, expected at least 2")
    length = min(window, len(tokens))
    check_positions(length, model.config)
    there = len(tokens) // length
    if windows is not None and windows > there:
        raise ValueError(
            f"the text has {len(tokens)} tokens, enough for {there} windows of {window}, "
            f"fewer than windows = {windows}"
        )
    count = there if windows is None else windows
    if is_tokens(text) or model.tokenizer is None:
        begin = "tokens as given"
    else:
        begins = model.tokenizer.adds_bos and tokens[0] == model.tokenizer.bos_id
        begin = "BOS at the start of the text" if begins else "no BOS"
    rest = len(tokens) - there * length
    if length < window:
        end = "the text is shorter than a window"
    elif windows is not None and windows < there:
        end = f"the text goes on for {there - count} more"
    else:
        end = f"the last {rest} tokens left out" if rest else "nothing left out"
    protocol = (
        f"{count} {'window' if count == 1 else 'windows'} of {length} tokens from the start of the "
        f"text, not overlapping, {begin}, every token after a window's first scored, {end}"
    )
    return _Cut(tokens[: count * length].reshape(count, length), protocol)


def _perplexity(nll: NDArray[np.float64], protocol: str) -> Perplexity:
    result = mean_estimate(Perplexity, nll, protocol, np.exp)
    result.nll = float(nll.mean())
    return result
