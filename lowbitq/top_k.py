"""The divergence from a teacher of whom only some tokens of each prediction are known.

Of a prediction p are kept its k most probable tokens, and k more drawn from the rest, which has the
mass r. With p' = p at the top and r / k at each draw, KL(p || q) = -sum p log q + sum p log p is
estimated by

    -sum p' log q  +  sum p log p,

the second sum kept as it is. Value and gradient are right on average over the draws: the top alone,
or the rest as one token more, falls short by what the student does within the rest. The rest is
drawn systematically in the order of probabilities, each k-th of its mass once, because students err
alike on tokens that are alike.

SmolLM2-135M rounded to nearest (divergence 0.45 and 2.16), 512 tokens of text: the difference of
the mean divergence in nats, and the error of the gradient by the head's input relative to its norm,
beside the rest as one token more:

=========  ====  ==========  ==============  =========================
format        k  difference  gradient error  one token more: difference
=========  ====  ==========  ==============  =========================
int4g64      16      0.0022            0.22
int4g64      64      0.0001           0.063  -0.07
int4g64     256      0.0000           0.016  -0.03
int3g64      16     -0.0038            0.12
int3g64      64      0.0014           0.035  -0.25
int3g64     256     -0.0000           0.009  -0.12
=========  ====  ==========  ==============  =========================

A. Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025,
draws all tokens and shows the bias of the top alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.gradients import linear_sink
from lowbitq.losses import Loss
from lowbitq.models.decoder import Model

Array = NDArray[np.float32]

_TILE = 64  # tokens whose logits are there at once, in float64: 25 MB for a vocabulary of 50,000
_NOTHING = np.float32(-1e30)  # the logarithm of a probability of 0, but finite


class Top(NamedTuple):
    """Some tokens of each prediction of a window: k at the top, then k drawn.

    Attributes
    ----------
    tokens : ndarray of shape (t, 2 k), int32
    logs : ndarray of shape (t, 2 k), float32
        Logarithms of their p'; a token that was drawn twice has twice the mass each time.
    excess : ndarray of shape (t,), float32
        ``sum p log p - sum p' log p'``.
    """

    tokens: NDArray[np.int32]
    logs: Array
    excess: Array


def most_probable(model: Model, hidden: Array, k: int, *, seed: int = 0) -> Top:
    """Return the `k` most probable tokens of each prediction, and `k` drawn from the rest.

    Parameters
    ----------
    model : Model
    hidden : ndarray of shape (t, hidden), float32
        What its head reads.
    k : int
    seed : int, default=0
        Of the draws.

    Raises
    ------
    ValueError
        If `k` is not between 1 and one less than the vocabulary.
    """
    vocab = model.config.vocab_size
    if not 1 <= k < vocab:
        raise ValueError(f"top_k is {k}, expected 1 to {vocab - 1}")
    starts = np.random.default_rng(seed).random((len(hidden), 1))
    tiles = [
        _some(model.head_logits(hidden[start : start + _TILE]), k, starts[start : start + _TILE])
        for start in range(0, len(hidden), _TILE)
    ]
    tokens, logs, excess = (np.concatenate(parts) for parts in zip(*tiles, strict=True))
    return Top(tokens, logs, excess)


def _some(logits: Array, k: int, start: NDArray[np.float64]) -> Top:
    order = np.argsort(-logits, axis=1)
    log_p = np.take_along_axis(logits, order, 1).astype(np.float64)
    log_p -= log_p[:, :1]
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    above = np.cumsum(p[:, k:], axis=1)
    mass = above[:, -1:]
    marks = (np.arange(k) + start) / k * mass
    found = [np.searchsorted(*row, side="right") for row in zip(above, marks, strict=True)]
    places = np.minimum(np.stack(found), above.shape[1] - 1)
    drawn = (places[:, :, None] == places[:, None, :]).sum(2)
    logs = np.log(np.maximum(mass, 1e-300) * drawn / k)
    tokens = np.concatenate([order[:, :k], np.take_along_axis(order, k + places, 1)], axis=1)
    kept = (np.exp(logs) * logs / drawn).sum(1)  # each token once
    excess = (p[:, k:] * log_p[:, k:]).sum(1) - kept
    every = np.concatenate([log_p[:, :k], logs], axis=1)
    return Top(tokens.astype(np.int32), every.astype(np.float32), excess.astype(np.float32))


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
        Of ``kl`` and ``ce`` at temperature 1.
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
        If the loss has other terms, or arrays do not fit.
    """
    if loss.temperature != 1 or loss.reverse or loss.jensen_shannon:
        raise ValueError(f"loss is '{loss}', expected kl and ce at temperature 1 with top_k")
    losses, dy = np.empty(len(hidden)), np.empty_like(hidden)
    head = model.embedding if model.head is None else model.head
    nothing = linear_sink()
    for start in range(0, len(hidden), _TILE):
        part = slice(start, min(start + _TILE, len(hidden)))
        logits = model.head_logits(hidden[part])
        teacher = np.full_like(logits, _NOTHING)
        np.put_along_axis(teacher, top.tokens[part], top.logs[part], 1)
        losses[part], gradient = loss.evaluate(
            logits,
            teacher,
            None if targets is None else targets[part],
            weights=None if weights is None else weights[part],
            overwrite=True,
        )
        _core.linear_backward(head.handle, hidden[part], gradient, nothing, dy[part])
    losses += loss.forward * top.excess.astype(np.float64)
    return losses, dy
