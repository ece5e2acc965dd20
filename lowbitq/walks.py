"""Walks: what each layer is rounded for while a model is quantized, block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.calibration import Hessians, Statistics, Stream, weights_of_tokens
from lowbitq.copies import LayerInputs
from lowbitq.drift import Moments, correct
from lowbitq.linears import Linear
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.rotating import rotate_hessians
from lowbitq.models.slots import FROM, SLOTS, TAPS, TO, Slot, name_in_block
from lowbitq.plan_options import Sampling

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Task:
    """A layer to be rounded.

    Attributes
    ----------
    slot : Slot
        Its place in the block.
    linear : Linear
        Its weights, in float32.
    inputs : LayerInputs
    about : dict
        What its record should say of how the weights were changed.
    """

    slot: Slot
    linear: Linear
    inputs: LayerInputs
    about: dict[str, Any] = field(default_factory=dict)


class Walk(ABC):
    """Visits the blocks of a model in order.

    Parameters
    ----------
    source : Model
        The float model, as it is rotated.
    """

    def __init__(self, source: Model) -> None:
        self._source = source

    @abstractmethod
    def tasks(self, index: int) -> Iterator[Task]:
        """Yield the layers of a block; the caller rounds one before it asks for the next."""

    def leave(self, index: int) -> None:  # noqa: B027
        """Go on to the next block; this one's layers are quantized."""

    def _linear(self, index: int, slot: Slot) -> Linear:
        linear = self._source.blocks[index].linears[slot.name]
        assert isinstance(linear, Linear)
        return linear


class WithoutInputs(Walk):
    """Nothing is known of the inputs: layers are rounded to nearest."""

    def tasks(self, index: int) -> Iterator[Task]:
        for slot in SLOTS:
            yield Task(slot, self._linear(index, slot), LayerInputs())


class Known(Walk):
    """The Hessians that `calibrate` found in the float model, rotated.

    Parameters
    ----------
    model : Model
        Before its rotation.
    source, stats, seed
        As for `compress`.
    """

    def __init__(self, model: Model, source: Model, stats: Statistics, seed: int) -> None:
        super().__init__(source)
        self._model, self._stats, self._seed = model, stats, seed

    def tasks(self, index: int) -> Iterator[Task]:
        inputs = _shared(self._rotated(index))
        for slot in SLOTS:
            yield Task(slot, self._linear(index, slot), inputs[slot.name])

    def _rotated(self, index: int) -> dict[str, NDArray[np.float64]]:
        stats, config = self._stats, self._model.config
        hessians = {}
        for slots in TAPS.values():
            for slot in slots if stats.token_weights else slots[:1]:
                name, columns = name_in_block(index, slot), slot.shape(config)[1]
                found = stats.hessians.get(name)
                if found is None or found.shape != (columns, columns):
                    shape = None if found is None else found.shape
                    expected = f"({columns}, {columns})"
                    raise ValueError(
                        f"stats.hessians[{name!r}] has shape {shape}, expected {expected}"
                    )
                hessians[slot.name] = found
        turned = rotate_hessians(self._model, self._source, index, hessians, self._seed)
        for slots in TAPS.values():
            for slot in slots:
                turned.setdefault(slot.name, turned[slots[0].name])
        return turned


class Behind(Walk):
    """Inputs as the quantized blocks before make them; those in a block, as its float layers do.

    Parameters
    ----------
    source : Model
    result : QuantizedModel
        Receives the quantized layers while the walk goes on; its embedding is quantized already.
    tokens : ndarray of shape (samples, window), int32
    squares : mapping of str to ndarray of shape (samples, window)
        Token weights, as for `Hessians`.
    """

    def __init__(
        self,
        source: Model,
        result: QuantizedModel,
        tokens: NDArray[np.int32],
        squares: Mapping[str, Array],
    ) -> None:
        super().__init__(source)
        assert result.plan is not None
        self._result, self._squares = result, squares
        self._sampling: Sampling = result.plan.sampling
        prefix = source.copy()
        prefix.embedding = result.embedding
        self._stream = Stream(prefix, tokens)

    def tasks(self, index: int) -> Iterator[Task]:
        stream = self._stream
        shape = stream.hidden.shape[:2]
        sums = Hessians(stream.model.config, index, shape, self._sampling, self._squares)
        for sample, taps in enumerate(stream.taps()):
            for tap, slots in TAPS.items():
                sums.add(sample, tap, self._linear(index, slots[0]).rotate_input(taps[tap]))
        inputs = _shared(sums.totals)
        for slot in SLOTS:
            yield Task(slot, self._linear(index, slot), inputs[slot.name])

    def leave(self, index: int) -> None:
        """Take the windows through the block as it is in the result.

        Its weights are decoded once and multiplied in float32. Unlike the packed path, this does
        not round activations to 8 bits; for long windows it is no slower.
        """
        block = self._stream.model.blocks[index]
        floats = block.linears
        self._decode(index, SLOTS)
        if index + 1 < len(self._source.blocks):
            self._stream.advance()
        block.linears = floats

    def _decode(self, index: int, slots: tuple[Slot, ...]) -> None:
        """Let the stream run through the quantized layers in these slots."""
        packed = self._result.blocks[index].linears
        block = self._stream.model.blocks[index]
        block.linears = block.linears | {s.name: packed[s.name].to_float() for s in slots}


class Drifting(Behind):
    """Inputs as all quantized layers before make them; weights are corrected for their drift.

    The float and the quantized stream run in lockstep and stop at the inputs of q, k, v, of o, of
    gate and up, and of down; see `lowbitq.drift`. One window in twelve is held back from the
    regression.
    """

    def __init__(
        self,
        source: Model,
        result: QuantizedModel,
        tokens: NDArray[np.int32],
        squares: Mapping[str, Array],
    ) -> None:
        if len(tokens) < 2:
            raise ValueError("there is one window of text; drift correction needs at least two")
        super().__init__(source, result, tokens, squares)
        self._float = Stream(source, tokens)
        self._train = len(tokens) - -(-len(tokens) // 12)
        self._floats: dict[str, Any] = {}

    def tasks(self, index: int) -> Iterator[Task]:
        self._floats = self._stream.model.blocks[index].linears
        before: tuple[Slot, ...] = ()
        for tap, slots in TAPS.items():
            self._decode(index, before)
            sums = self._sums(index, tap, slots)
            inputs: dict[int, LayerInputs] = {}
            for slot in slots:
                linear, (train, held) = self._linear(index, slot), sums[slot.name]
                weight, found = correct(linear.weight, train, held, of_inputs=tap not in FROM)
                if id(train) not in inputs:
                    inputs[id(train)] = LayerInputs(train.hessian + held.hessian)
                about = {"alpha": round(found.alpha, 4), "ridge": found.ridge}
                yield Task(slot, linear.replace(weight=weight), inputs[id(train)], about)
            before = slots

    def _sums(
        self, index: int, tap: str, slots: tuple[Slot, ...]
    ) -> dict[str, tuple[Moments, Moments]]:
        """Run both streams to the inputs of these layers; return sums for training and held back.

        Layers whose tokens are weighted alike share their sums.
        """
        first, shape = self._linear(index, slots[0]), self._stream.hidden.shape[:2]
        found: dict[str, tuple[Moments, Moments]] = {}
        weights = {}
        for slot in slots if self._squares else slots[:1]:
            name, (rows, cols) = name_in_block(index, slot), first.shape
            rows = rows if tap in FROM else cols
            found[slot.name] = Moments(cols, rows), Moments(cols, rows)
            weights[slot.name] = weights_of_tokens(self._squares, name, shape, self._sampling)
        for sample, (x, target) in enumerate(self._pairs(index, tap, first)):
            for name, parts in found.items():
                given = weights[name]
                weight = None if given is None else given[sample]
                parts[sample >= self._train].add(x, target, weight)
        if (turn := first.rotation) is not None:
            for name, (train, held) in found.items():
                found[name] = tuple(  # type: ignore[assignment]
                    part.rotated(turn, of_inputs=tap not in FROM) for part in (train, held)
                )
        return {slot.name: found.get(slot.name, found[slots[0].name]) for slot in slots}

    def _pairs(self, index: int, tap: str, first: Linear) -> Iterator[tuple[Array, Array]]:
        """Yield the input x^ of the layers behind a tap, not yet rotated, and their target."""
        steps = TO[tap]
        there = self._float.run(steps | FROM.get(tap, 0))
        here = self._stream.run(steps | (FROM["o"] if tap == "mlp" else 0))
        block = self._source.blocks[index]
        scale = np.float32(block.attention_scale if tap == "o" else block.mlp_scale)
        for (after, floats), (before, taps) in zip(there, here, strict=True):
            x = taps[tap]
            if tap not in FROM:
                yield x, floats[tap] - x
                continue
            lack = (after - before) / scale
            yield x, lack if first.bias is None else lack - first.bias

    def leave(self, index: int) -> None:
        """Take both streams to the next block."""
        if not self._floats:  # nothing was asked of this block
            super().leave(index)
            if index + 1 < len(self._source.blocks):
                self._float.advance()
            return
        self._decode(index, TAPS["down"])
        for _ in self._stream.run(FROM["down"]):
            pass
        self._stream.model.blocks[index].linears = self._floats
        self._floats = {}
        self._stream.index += 1
        self._float.index += 1


def _shared(hessians: dict[str, NDArray[np.float64]]) -> dict[str, LayerInputs]:
    """Layers with the same Hessian share what is made of it."""
    made = {id(hessian): LayerInputs(hessian) for hessian in hessians.values()}
    return {name: made[id(hessian)] for name, hessian in hessians.items()}
