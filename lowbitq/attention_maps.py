"""Attention maps: the weights with which the queries of a block attend to its keys.

A map of t tokens has heads t^2 / 2 weights, so none is stored: queries, keys and the logarithms of
the softmax's sums say the same, and C makes weights of them tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.models.slots import TO, sizes_of

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The causal attention of one block over one window.

    Parameters
    ----------
    q : ndarray of shape (t, heads, head_dim), float32
        Queries, normed and turned.
    k : ndarray of shape (t, kv_heads, head_dim), float32
        Keys, likewise.
    log_sum : ndarray of shape (t, heads), float32
        Logarithm of base 2 of the softmax's sum: a weight is ``exp(q k / sqrt(head_dim)) /
        2^log_sum``.

    Raises
    ------
    ValueError
        If shapes do not fit.
    """

    q: Array
    k: Array
    log_sum: Array
    handle: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        handle = _core.attention_map(self.q, self.k, self.log_sum)
        object.__setattr__(self, "handle", handle)

    @staticmethod
    def of(model: Any, index: int, x: Array) -> AttentionMap:
        """Run the attention of block `index` for its input.

        Parameters
        ----------
        model : Model
        index : int
        x : ndarray of shape (t, hidden), float32
            The residual stream before the block, as the model has it; left unchanged.
        """
        sizes = sizes_of(model.config)
        shapes = [(len(x), n) for n in (model.config.heads, sizes["query"], sizes["key"])]
        log_sum, query, key = (np.empty(shape, np.float32) for shape in shapes)
        seen: list[Any] = [None, None, None, None, log_sum, None, query, key, None, None, None]
        _core.decoder_block(model.handle, x.copy(), *seen, block=index, steps=TO["o"])
        return AttentionMap.turned(model, index, query, key, log_sum)

    @staticmethod
    def turned(model: Any, index: int, query: Array, key: Array, log_sum: Array) -> AttentionMap:
        """Make a map of the outputs of the layers of queries and keys, which are overwritten.

        Parameters
        ----------
        model : Model
        index : int
        query : ndarray of shape (t, heads * head_dim), float32
        key : ndarray of shape (t, kv_heads * head_dim), float32
        log_sum : ndarray of shape (t, heads), float32
        """
        _core.block_turn(model.handle, query, key, block=index)
        q, k = (part.reshape(len(part), -1, model.config.head_dim) for part in (query, key))
        return AttentionMap(q, k, log_sum)

    @property
    def nbytes(self) -> int:
        """Size of its arrays."""
        return self.q.nbytes + self.k.nbytes + self.log_sum.nbytes

    def divergence(self, target: AttentionMap) -> NDArray[np.float64]:
        """Return how far the map is from a target's: ``KL(target || self)`` of each query, in nats.

        Parameters
        ----------
        target : AttentionMap
            Of as many tokens and heads; the number of key heads and their size may differ.

        Returns
        -------
        ndarray of shape (t, heads), float64

        Raises
        ------
        ValueError
            If tokens or heads differ.

        References
        ----------
        W. Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
        Pre-Trained Transformers", 2020, equation 6. `lowbitq.losses.attention_loss` is the same of
        scores in an array.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> q, k = (rng.standard_normal((1, 4, 8), np.float32) for _ in range(2))
        >>> one = AttentionMap(q, k[:, :2].copy(), np.ones((1, 4), np.float32))
        >>> one.divergence(one)  # one token attends to itself
        array([[0., 0., 0., 0.]])
        """
        found = np.empty(self.log_sum.shape)
        _core.attention_divergence(self.handle, target.handle, found)
        return found
