"""The divergence from a model's predictions that replacing some of its layers causes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.calibration import Stream
from lowbitq.models.decoder import AnyLinear, Model
from lowbitq.scores import part_of

Array = NDArray[np.float32]
Tokens = NDArray[np.int32]

_ROWS = 256  # of logits at a time


def each_alone(
    model: Model,
    tokens: Tokens,
    layers: Mapping[tuple[str, str], AnyLinear],
    level: str,
    step: Callable[[], object],
) -> dict[tuple[str, str], float]:
    """Return the divergence from a model that replacing each part of it alone causes.

    The model takes each window through its blocks once. Before each block, a copy of the residual
    stream goes on through a model in which a part of that block is replaced.

    Parameters
    ----------
    model : Model
    tokens : ndarray of shape (windows, window), int32
    layers : mapping of (str, str) to Linear or QuantizedLinear
        What replaces the linear layers, by a name of your choice, such as the format, and theirs.
    level : {"linear", "half", "block"}
        What is replaced together; see `lowbitq.scores.part_of`.
    step : callable
        Called without arguments for each window and part.

    Returns
    -------
    dict of (str, str) to float
        Mean Kullback-Leibler divergence in nats per token, by your name and that of the part.
    """
    parts: dict[int, dict[tuple[str, str], dict[str, AnyLinear]]] = {}
    for (format, name), layer in layers.items():
        own = parts.setdefault(int(name.split(".")[2]), {})
        own.setdefault((format, part_of(name, level)), {})[name.rsplit(".")[-1]] = layer
    totals = {key: 0.0 for own in parts.values() for key in own}
    for window in tokens:
        reference = Reference(model, window)
        stream = Stream(model, window[None])
        for index in stream:
            for key, changed in parts.get(index, {}).items():
                student = model.copy()
                student.blocks[index].linears.update(changed)
                hidden = stream.hidden[0].copy()
                for later in range(index, len(model.blocks)):
                    student.block_forward(later, hidden)
                totals[key] += reference.divergence(student.finish(hidden)) / len(tokens)
                step()
    return totals


class Reference:
    """The predictions of a model for a window, to compare others with.

    Parameters
    ----------
    model : Model
    window : ndarray of shape (t,), int32
    """

    def __init__(self, model: Model, window: Tokens) -> None:
        self._model = model
        self._logits = _room(len(window) - 1, model)
        self._own = _room(min(_ROWS, len(window) - 1), model)
        model.head_logits(model.hidden(window)[:-1], self._logits)

    def divergence(self, hidden: Array) -> float:
        """Return the mean KL divergence per token of predictions from other inputs of the head."""
        scored = len(self._logits)
        kl, same = np.empty(scored), np.empty(scored, np.uint8)
        for start in range(0, scored, _ROWS):
            rows = slice(start, min(start + _ROWS, scored))
            own = self._model.head_logits(hidden[rows], self._own[: rows.stop - start])
            _core.kl_divergence(self._logits[rows], own, kl[rows], same[rows])
        return float(kl.mean())


def _room(tokens: int, model: Model) -> Array:
    """Return an array for logits; aligned, as the head is fastest with it."""
    shape = tokens, model.config.vocab_size
    return _core.aligned_empty(bytes=4 * shape[0] * shape[1]).view(np.float32).reshape(shape)
