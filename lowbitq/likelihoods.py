"""How likely a model finds continuations of contexts; what several have in common is run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.models.decoder import Model
from lowbitq.models.tokens import check_sliding_window, token_array

Tokens: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

_ROWS = 256  # of tokens that run, and of logits that are held, at a time


class Likelihood(NamedTuple):
    """What `log_likelihoods` says of one continuation.

    Attributes
    ----------
    nats : float
        Natural logarithm of its probability after the context.
    greedy : bool
        Whether each of its tokens is the most probable one, so that a temperature of 0 writes it.
    """

    nats: float
    greedy: bool


def log_likelihoods(
    model: Model, pairs: Sequence[tuple[Tokens, Tokens]]
) -> Iterator[tuple[int, Likelihood]]:
    """Score continuations of contexts.

    Tokens that sequences begin with in common are run once: a context with several continuations
    costs as much as with one, and so do the examples that precede every question of a task.

    Parameters
    ----------
    model : Model
    pairs : sequence of (context, continuation)
        Tokens, at least one of each. All but the last one of both together, which is not read, must
        fit the model's positions and its sliding window.

    Yields
    ------
    int
        Index of a pair, each once, in an order that keeps equal beginnings together.
    Likelihood
        Of its continuation.

    Raises
    ------
    ValueError
        If a context or a continuation is empty, they are too long, or a token is not in the
        vocabulary.
    TypeError
        If tokens are not integers.

    Examples
    --------
    >>> import lowbitq as lq
    >>> model = lq.load(lq.demo_model())  # doctest: +SKIP
    >>> pairs = [([1, 2, 3], [4]), ([1, 2, 3], [5, 6])]
    >>> sorted(log_likelihoods(model, pairs))  # doctest: +SKIP
    [(0, Likelihood(nats=-3.7, greedy=False)), (1, Likelihood(nats=-9.1, greedy=False))]
    """
    checked = [_checked(model, number, *pair) for number, pair in enumerate(pairs)]
    if not checked:
        return
    reader = _Reader(model, max(len(tokens) - 1 for tokens, _ in checked))
    inputs = [tokens[:-1].tolist() for tokens, _ in checked]
    for number in sorted(range(len(checked)), key=inputs.__getitem__):
        tokens, begin = checked[number]
        yield number, _score(model, reader.hidden(tokens[:-1])[begin - 1 :], tokens[begin:])


def _checked(
    model: Model, number: int, context: Tokens, continuation: Tokens
) -> tuple[NDArray[np.int32], int]:
    """Return the tokens of a pair, and where its continuation begins."""
    both = []
    for name, tokens in (("context", context), ("continuation", continuation)):
        name = f"the {name} of pair {number}"
        both.append(token_array(tokens, model.config.vocab_size, name=name))
        if not both[-1].size:
            raise ValueError(f"{name} is empty, expected at least one token")
    read = sum(map(len, both)) - 1
    if read > model.config.max_positions:
        raise ValueError(
            f"pair {number} has {read} tokens to read, but the model has "
            f"{model.config.max_positions} positions"
        )
    check_sliding_window(read, model.config)
    return np.concatenate(both), len(both[0])


class _Reader:
    """Runs sequences; of each, the tokens that it begins with like the one before are kept."""

    def __init__(self, model: Model, capacity: int) -> None:
        self._cache = model.new_cache(capacity)
        self._tokens = np.empty(0, np.int32)
        self._hidden = np.empty((capacity, model.config.hidden_size), np.float32)

    def hidden(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the input of the head at each token: (t, hidden), valid until the next call."""
        length = min(len(tokens), len(self._tokens))
        differ = np.flatnonzero(tokens[:length] != self._tokens[:length])
        known = int(differ[0]) if differ.size else length
        for start in range(known, len(tokens), _ROWS):
            piece = tokens[start : start + _ROWS]
            rows = self._hidden[start : start + len(piece)]
            _core.decoder_forward(
                self._cache.decoder, piece, self._cache.handle, rows, None, None, past=start
            )
        self._tokens = tokens
        return self._hidden[: len(tokens)]


def _score(model: Model, hidden: NDArray[np.float32], targets: NDArray[np.int32]) -> Likelihood:
    """Score the tokens that follow each row (t, hidden)."""
    nll = np.empty(len(targets))
    greedy = True
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        logits = model.head_logits(hidden[rows])
        _core.cross_entropy(logits, targets[rows], nll[rows])
        greedy = greedy and bool((logits.argmax(axis=1) == targets[rows]).all())
    return Likelihood(-float(nll.sum()), greedy)
