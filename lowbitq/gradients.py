"""Gradients of a loss with respect to a model's parameters, block by block.

The way there keeps the input of each block; the way back computes the rest of a block again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowbitq import _core
from lowbitq.attention_maps import AttentionMap
from lowbitq.losses import Loss
from lowbitq.models.slots import (
    EMBEDDING,
    HEAD,
    NORMS,
    OUTER,
    SLOTS,
    WHOLE_BLOCK,
    name_in_block,
    sizes_of,
)

Array = NDArray[np.float32]

KEEP = ("all", "attention", "nothing")
KINDS = ("weight", "bias", "norm", "output", "embedding", "head")


class Differentiable(Protocol):
    """The interface that gradients need; a `lowbitq.Model` of dense layers has it."""

    config: Any
    blocks: list[Any]
    embedding: Any
    head: Any
    final_norm: Array
    residual_rotation: Any

    @property
    def handle(self) -> Any: ...
    def embed(self, tokens: ArrayLike) -> Array: ...
    def finish(self, hidden: Array) -> Array: ...
    def hidden(self, tokens: ArrayLike) -> Array: ...


class CopyGradient(NamedTuple):
    """Arrays to which the gradients of one copy of a layer are added; None: not wanted.

    Attributes
    ----------
    weight : ndarray of shape (rows, cols), float32, or None
    fusion : ndarray of shape (rows,), float32, or None
        Of the fusion weights.
    rounding : ndarray of shape (3,), float32, or None
        Of how the input is rounded: clip, scale and zero.
    rotation : ndarray of shape (cols, cols), float32, or None
        Of a dense rotation of the input, as if its entries were free.
    """

    weight: Array | None = None
    fusion: Array | None = None
    rounding: Array | None = None
    rotation: Array | None = None


class Target(NamedTuple):
    """An attention map to imitate.

    Attributes
    ----------
    map : AttentionMap
    weight : float
        Of its divergence from the block's, summed over tokens and heads, in the loss.
    """

    map: AttentionMap
    weight: float


class BlockPass:
    """One window's way through one block, kept for the way back.

    Parameters
    ----------
    model : Model
        Of dense layers. Its arrays are read again on the way back and must not change before.
    index : int
        The block.
    x : ndarray of shape (t, hidden), float32
        The residual stream, which is taken through the block in place; its input is kept.
    keep : {"all", "attention", "nothing"}, default="all"
        What is kept of the way there. ``"all"``: the outputs of the layers, so that only norms and
        products with elements are computed again on the way back. ``"attention"``: a fifth of that
        memory; layers run again, attention does not. ``"nothing"``: attention runs again, too.

    Attributes
    ----------
    input : ndarray of shape (t, hidden), float32
        The residual stream before the block.
    nbytes : int
        Size of what is kept.
    """

    def __init__(self, model: Differentiable, index: int, x: Array, *, keep: str = "all") -> None:
        tokens, hidden = x.shape
        widths = [hidden, *(width or 0 for width in kept_widths(model.config, keep))]
        # One array: malloc leaves holes between many, an eighth of a batch's memory.
        room = np.empty(tokens * sum(widths), np.float32)
        parts = np.split(room, tokens * np.cumsum(widths[:-1]))
        found: list[Any] = [part.reshape(tokens, -1) if part.size else None for part in parts]
        self.model, self.index, self.nbytes = model, index, room.nbytes
        self.input: Array = found[0]
        self._known = found[1:]
        self.input[:] = x
        seen = [x, None, self._known[0], None, None, *self._known[1:]]
        _core.decoder_block(model.handle, *seen, block=index, steps=WHOLE_BLOCK)

    def attention(self) -> AttentionMap:
        """Return the block's attention map."""
        _, log_sum, _, query, key, *_ = self._known
        if log_sum is None or query is None or key is None:
            return AttentionMap.of(self.model, self.index, self.input)
        return AttentionMap.turned(self.model, self.index, query.copy(), key.copy(), log_sum)

    def back(
        self,
        sink: Any,
        dx: Array,
        outputs: dict[str, Array] | None = None,
        target: Target | None = None,
    ) -> None:
        """Take the gradient of the residual stream through the block, in place.

        Parameters
        ----------
        sink : capsule
            Where gradients of the block's parts are added, from `block_sink`.
        dx : ndarray of shape (t, hidden), float32
            Behind the block; on return, before it.
        outputs : dict of str to ndarray of shape (t, rows), float32, default=None
            By slot name: where the gradients of layers' outputs are written.
        target : Target, default=None
            An attention map that the block's is pulled towards.
        """
        towards, weight = target or (None, 0.0)
        seen = [(outputs or {}).get(slot.name) for slot in SLOTS]
        handle = None if towards is None else towards.handle
        arrays: list[Any] = [self.input, *self._known, sink, *seen, handle, dx]
        _core.block_backward(self.model.handle, *arrays, block=self.index, weight=weight)


def kept_widths(config: Any, keep: str) -> list[int | None]:
    """Return the floats per token of each part that `BlockPass` keeps; None: it is not kept.

    Raises
    ------
    ValueError
        If `keep` is none of its choices.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}, expected one of {', '.join(map(repr, KEEP))}")
    sizes = sizes_of(config)
    attention = [sizes["query"], config.heads, sizes["hidden"]]
    layers = [sizes[name] for name in ("query", "key", "key", "inner", "inner")]
    known = {"all": attention + layers, "attention": attention, "nothing": []}[keep]
    return [*known, *[None] * (len(attention + layers) - len(known))]


class Pass:
    """One window's way through a model, kept for the way back.

    Parameters
    ----------
    model : Model
        Of dense layers. Its arrays are read again on the way back and must not change before.
    tokens : array_like of shape (t,), integers
    keep : {"all", "attention", "nothing"}, default="all"
        As for `BlockPass`; the inputs of all blocks alone take ``4 t hidden blocks`` bytes. All of
        2048 tokens of SmolLM2 are 1.2 GB.

    Attributes
    ----------
    hidden : ndarray of shape (t, hidden), float32
        What the head reads.
    dx : ndarray of shape (t, hidden), float32
        Gradient of the residual stream where the way back has got to.

    Examples
    --------
    >>> run = Pass(model, tokens)  # doctest: +SKIP
    >>> losses = run.loss(Loss.parse("ce"), targets=targets)  # doctest: +SKIP
    >>> for index in reversed(range(len(model.blocks))):  # doctest: +SKIP
    ...     run.back(index, sink)
    """

    def __init__(self, model: Differentiable, tokens: ArrayLike, *, keep: str = "all") -> None:
        self.model = model
        self.tokens = np.ascontiguousarray(tokens, np.int32)
        x = model.embed(self.tokens)
        self._blocks = [BlockPass(model, i, x, keep=keep) for i in range(len(model.blocks))]
        self._last = x
        self.hidden = model.finish(x)
        self.dx = np.empty_like(x)
        self._injected: dict[int, Array] = {}
        self._targets: dict[int, Target] = {}

    @property
    def nbytes(self) -> int:
        """Size of what is kept."""
        outer = self._last.nbytes + self.hidden.nbytes + self.dx.nbytes
        hints = sum(gradient.nbytes for gradient in self._injected.values())
        hints += sum(target.map.nbytes for target in self._targets.values())
        return outer + hints + sum(block.nbytes for block in self._blocks)

    def behind(self, index: int) -> Array:
        """Return the residual stream (t, hidden) behind block `index`, to be read only."""
        return self._last if index + 1 == len(self._blocks) else self._blocks[index + 1].input

    def before(self, index: int) -> Array:
        """Return the residual stream (t, hidden) before block `index`, to be read only."""
        return self._blocks[index].input

    def inject(self, index: int, gradient: Array) -> None:
        """Add a gradient of the residual stream behind block `index` when the way back is there."""
        before = self._injected.get(index)
        self._injected[index] = gradient if before is None else before + gradient

    def attention(self, index: int) -> AttentionMap:
        """Return the attention map of block `index`."""
        return self._blocks[index].attention()

    def imitate(self, index: int, target: Target) -> None:
        """Pull the attention map of block `index` towards another when the way back is there."""
        self._targets[index] = target

    def loss(
        self,
        loss: Loss,
        *,
        targets: ArrayLike | None = None,
        uniform: ArrayLike | None = None,
        teacher: Differentiable | None = None,
        teacher_hidden: Array | None = None,
        weights: ArrayLike | None = None,
        head: Array | None = None,
        final_norm: Array | None = None,
    ) -> NDArray[np.float64]:
        """Compare the predictions and begin the way back.

        Parameters
        ----------
        loss : Loss
        targets : array_like of shape (t,), integers, default=None
            The token that each position should predict; -1: none.
        uniform : array_like of shape (t,), float64, default=None
            Numbers in [0, 1) that draw the targets from the model's own prediction instead.
        teacher, teacher_hidden : Model, ndarray of shape (t, hidden), float32, default=None
            The model to come near to, and what its head reads for these tokens.
        weights : array_like of shape (t,), default=None
            Of each token's loss in the sum that is differentiated; None: ones.
        head, final_norm : ndarray, float32, default=None
            Where gradients of the head's weights (the embedding's, if there is no head) and of the
            last norm's gains are added.

        Returns
        -------
        ndarray of shape (t,), float64
            The loss of each token, before its weight.

        Raises
        ------
        ValueError
            If arrays do not fit, or a logit is not finite.
        """
        losses = np.empty(len(self.tokens))
        dy = np.empty_like(self.hidden)
        _core.head_backward(
            self.model.handle,
            self.hidden,
            None if teacher is None else teacher.handle,
            teacher_hidden,
            _given(targets, np.int32),
            _given(uniform, np.float64),
            _given(weights, np.float32),
            linear_sink(head),
            losses,
            dy,
            **vars(loss),
        )
        self.begin(dy, final_norm)
        return losses

    def begin(self, dy: Array, final_norm: Array | None = None) -> None:
        """Begin the way back with the gradient (t, hidden) of `hidden`, from another loss."""
        _core.finish_backward(self.model.handle, self._last, dy, final_norm, self.dx)

    def back(self, index: int, sink: Any, outputs: dict[str, Array] | None = None) -> None:
        """Take `dx` through block `index`, the last one first; see `BlockPass.back`."""
        if (gradient := self._injected.pop(index, None)) is not None:
            self.dx += gradient
        self._blocks[index].back(sink, self.dx, outputs, self._targets.pop(index, None))

    def back_to_embedding(self, gradient: Array) -> None:
        """Add the gradient of the rows that were looked up to `gradient` (vocab, hidden)."""
        _core.embed_backward(self.model.handle, self.tokens, self.dx.copy(), gradient)


def linear_sink(
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    copies: Sequence[CopyGradient] = (),
    adapter: tuple[Array | None, Array | None] | None = None,
) -> Any:
    """Make the handle of arrays to which the gradients of one layer are added.

    Parameters
    ----------
    weight : ndarray of shape (rows, cols), float32, or None
        Of a layer of one copy; None: not wanted, as everywhere below.
    bias : ndarray of shape (rows,), float32, or None
    copies : sequence of CopyGradient
        Of the copies, in their order, instead of `weight`.
    adapter : (ndarray of shape (rows, rank), ndarray of shape (cols, rank)), float32, or None
        Of U and V.
    """
    handles = tuple(_core.copy_gradient(*copy) for copy in copies or [CopyGradient(weight)])
    return _core.linear_gradient(handles, bias, *(adapter or (None, None)))


def block_sink(norms: dict[str, Array] | None = None, layers: dict[str, Any] | None = None) -> Any:
    """Make the handle of a block's sinks: gains by their names in `NORMS`, layers by slot name."""
    norms, layers = norms or {}, layers or {}
    return _core.block_gradient(
        *(norms.get(norm.name) for norm in NORMS), *(layers.get(slot.name) for slot in SLOTS)
    )


def gradients(
    model: Differentiable,
    tokens: ArrayLike,
    loss: Loss | str = "ce",
    *,
    of: Iterable[str] = ("weight", "bias", "norm"),
    teacher: Differentiable | None = None,
    seed: int | None = None,
    mean: bool = True,
) -> Iterator[dict[str, Array]]:
    """Yield gradients of a loss over windows of text, from the last layers to the first.

    Parameters
    ----------
    model : Model
        Of dense layers (see `QuantizedLinear.to_float`).
    tokens : array_like of shape (t,) or (windows, t), integers
        The next token is each position's target; the last position has none.
    loss : Loss or str, default="ce"
        As `Loss.parse` reads it; divergences need a teacher.
    of : iterable of str, default=("weight", "bias", "norm")
        ``"weight"``, ``"bias"`` of the blocks' layers, ``"norm"``, ``"embedding"`` (with the tied
        head), ``"head"``; ``"output"``: of the outputs of each layer, of shape (windows, t, rows).
    teacher : Model or None
    seed : int or None, default=None
        Not None: targets are drawn from the model's own prediction, which makes the outer product
        of gradients the Fisher information.
    mean : bool, default=True
        Divide by the number of predicted tokens; False: the gradient of the sum.

    Yields
    ------
    dict of str to ndarray, float32
        By name, as in a Hugging Face checkpoint (``"model.layers.3.mlp.up_proj.weight"``): the last
        norm and an untied head first, then block after block from the last one, then the embedding.
        Outputs end in ``".output"``. A dict is the caller's to keep.

    Raises
    ------
    ValueError
        If a layer is not dense, a kind is unknown, or tokens do not fit the model.

    Examples
    --------
    >>> for found in gradients(model, tokens, of=["weight"]):  # doctest: +SKIP
    ...     for name, dw in found.items():
    ...         print(name, np.linalg.norm(dw))
    """
    kinds = set(of)
    if unknown := kinds - set(KINDS):
        raise ValueError(f"of has {sorted(unknown)}, expected some of {', '.join(KINDS)}")
    loss = Loss.parse(loss)
    batch = np.atleast_2d(np.ascontiguousarray(tokens, np.int32))
    scored = batch.shape[0] * (batch.shape[1] - 1)
    keep = "all" if len(batch) == 1 else "nothing"
    runs = [Pass(model, row, keep=keep) for row in batch]
    tied = model.head is None
    table = np.zeros(model.embedding.shape, np.float32) if "embedding" in kinds else None
    head = np.zeros(model.head.shape, np.float32) if "head" in kinds and not tied else None
    last = np.zeros_like(model.final_norm) if "norm" in kinds else None
    random = np.random.default_rng(seed)
    for run in runs:
        targets = np.append(run.tokens[1:], np.int32(-1))
        weights = (targets >= 0) / np.float32(scored if mean else 1)
        run.loss(
            loss,
            targets=targets if seed is None and loss.needs_targets else None,
            uniform=None if seed is None else random.random(len(targets)),
            teacher=teacher,
            teacher_hidden=None if teacher is None else teacher.hidden(run.tokens),
            weights=weights,
            head=table if tied else head,
            final_norm=last,
        )
    outer = {f"{OUTER['final_norm'].hf}.weight": last, f"{HEAD}.weight": head}
    if found := {name: array for name, array in outer.items() if array is not None}:
        yield found
    for index in reversed(range(len(model.blocks))):
        yield _block_gradients(model, runs, index, kinds)
    if table is not None:
        for run in runs:
            run.back_to_embedding(table)
        yield {f"{EMBEDDING}.weight": table}


def weight_gradients(model: Differentiable, tokens: ArrayLike) -> Iterator[tuple[str, Array]]:
    """Yield the name and the gradient of each linear layer's weight, for `lowbitq.sensitivity`.

    Examples
    --------
    >>> found = sensitivity(model, stats, gradients=weight_gradients)  # doctest: +SKIP
    """
    for found in gradients(model, tokens, of=["weight"]):
        for name, gradient in found.items():
            yield name.removesuffix(".weight"), gradient


def _block_gradients(
    model: Differentiable, runs: list[Pass], index: int, kinds: set[str]
) -> dict[str, Array]:
    block = model.blocks[index]
    found: dict[str, Array] = {}
    norms: dict[str, Array] = {}
    layers: dict[str, Any] = {}
    outputs: dict[str, Array] = {}
    for norm in NORMS:
        gain = getattr(block, norm.name)
        if "norm" in kinds and gain is not None:
            norms[norm.name] = found[f"{name_in_block(index, norm)}.weight"] = np.zeros_like(gain)
    for slot in SLOTS:
        linear, name = block.linears[slot.name], name_in_block(index, slot)
        weight = bias = None
        if "weight" in kinds:
            weight = found[f"{name}.weight"] = np.zeros(linear.shape, np.float32)
        if "bias" in kinds and linear.bias is not None:
            bias = found[f"{name}.bias"] = np.zeros_like(linear.bias)
        layers[slot.name] = linear_sink(weight, bias)
        if "output" in kinds:
            shape = len(runs), len(runs[0].tokens), linear.shape[0]
            outputs[slot.name] = found[f"{name}.output"] = np.empty(shape, np.float32)
    sink = block_sink(norms, layers)
    for sample, run in enumerate(runs):
        run.back(index, sink, {name: array[sample] for name, array in outputs.items()})
    return found


def _given(array: ArrayLike | None, dtype: Any) -> Any:
    return None if array is None else np.ascontiguousarray(array, dtype)
