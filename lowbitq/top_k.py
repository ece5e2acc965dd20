"""The loss against a teacher of whom only the most probable tokens are known.

Beside its k most probable tokens, a teacher's prediction p has a mass r for all others. It is taken
to lie there as the student's prediction q does, r q_v / sum of q over the rest: no pull within the
rest, and the right one on its mass. KL(p || q) is then that of k + 1 outcomes,

    sum over the top of p log(p / q)  +  r log(r / (1 - sum over the top of q)),

which falls short of the whole by r times the divergence within the rest, and approaches it as k
grows (data processing inequality).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.losses import Loss
from lowbitq.models.decoder import Model

Array = NDArray[np.float32]

_TILE = 128  # tokens whose logits are there at once: 25 MB for a vocabulary of 50,000
_LEAST = 1e-30  # mass of a rest that rounding has made 0 or less


class Top(NamedTuple):
    """The most probable tokens of a window.

    Attributes
    ----------
    tokens : ndarray of shape (t, k), int32
    logs : ndarray of shape (t, k), float32
        Logarithms of their probabilities.
    """

    tokens: NDArray[np.int32]
    logs: Array


def most_probable(model: Model, hidden: Array, k: int) -> Top:
    """Return the `k` most probable tokens of each prediction.

    Parameters
    ----------
    model : Model
    hidden : ndarray of shape (t, hidden), float32
        What its head reads.
    k : int

    Raises
    ------
    ValueError
        If `k` is not between 1 and one less than the vocabulary.
    """
    vocab = model.config.vocab_size
    if not 1 <= k < vocab:
        raise ValueError(f"top_k is {k}, expected 1 to {vocab - 1}")
    tokens, logs = np.empty((len(hidden), k), np.int32), np.empty((len(hidden), k), np.float32)
    for start in range(0, len(hidden), _TILE):
        logits = model.head_logits(hidden[start : start + _TILE])
        found = np.argpartition(logits, vocab - k, axis=1)[:, vocab - k :]
        tokens[start : start + _TILE] = found
        normal = _log_sum(logits.astype(np.float64))
        logs[start : start + _TILE] = np.take_along_axis(logits, found, 1) - normal
    return Top(tokens, logs)


def top_k_backward(
    model: Model,
    hidden: Array,
    loss: Loss,
    top: Top,
    *,
    targets: NDArray[np.int32] | None = None,
    weights: Array | None = None,
) -> tuple[NDArray[np.float64], Array]:
    """Loss of each token and the gradient by what the head reads, as `Pass.loss` has them.

    Parameters
    ----------
    model : Model
        The student; its head is dense.
    hidden : ndarray of shape (t, hidden), float32
    loss : Loss
        Of temperature 1: at another, probabilities of the rest are not known.
    top : Top
        Of the teacher.
    targets, weights
        As for `Pass.loss`.

    Returns
    -------
    losses : ndarray of shape (t,), float64
    dy : ndarray of shape (t, hidden), float32

    Raises
    ------
    ValueError
        If the temperature is not 1 or arrays do not fit.
    """
    if loss.temperature != 1:
        raise ValueError(f"temperature is {loss.temperature}, expected 1 with top_k")
    losses, dy = np.empty(len(hidden)), np.empty_like(hidden)
    head = model.embedding if model.head is None else model.head
    nothing = _core.linear_gradient((_core.copy_gradient(None, None),), None, None, None)
    for start in range(0, len(hidden), _TILE):
        part = slice(start, min(start + _TILE, len(hidden)))
        logits = model.head_logits(hidden[part])
        losses[part], gradient = loss.evaluate(
            logits,
            _completed(logits, Top(top.tokens[part], top.logs[part])),
            None if targets is None else targets[part],
            weights=None if weights is None else weights[part],
            overwrite=True,
        )
        _core.linear_backward(head.handle, hidden[part], gradient, nothing, dy[part])
    return losses, dy


def _completed(logits: Array, top: Top) -> Array:
    """A teacher's log-probabilities: its top, and its remaining mass as the student spreads it."""
    own = logits.astype(np.float64)
    mass = np.maximum(1 - np.exp(top.logs, dtype=np.float64).sum(1, keepdims=True), _LEAST)
    rest = own.copy()
    np.put_along_axis(rest, top.tokens, -np.inf, 1)
    own += np.log(mass) - _log_sum(rest)
    np.put_along_axis(own, top.tokens, top.logs.astype(np.float64), 1)
    return own.astype(np.float32)


def _log_sum(x: NDArray[np.float64]) -> NDArray[np.float64]:
    most = x.max(1, keepdims=True)
    return np.asarray(most + np.log(np.exp(x - most).sum(1, keepdims=True)))
