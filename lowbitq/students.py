"""Students: quantized models on their way through training.

A weight is scale * level + offset. Words give levels, and do not change unless they learn, too, by
`lowbitq.roundings`; training works on the dense weights that levels make with scales and offsets in
float32. Parameters have no unit, so that one learning rate serves all of a kind:

    scale    p in  scale = scale_0 p               starts at 1
    offset   r in  offset = offset_0 + scale_0 r   0
    level    r in  level = level_0 + deviation r   0, of a learned table; a level of 0 stays
    norm     p in  gain = gain_0 p                 1
    row      t in  y = t * (W x)                   1
    bias     d in  bias = bias_0 + d               0
    adapter  U, V in  y = W x + U V^T x            what the model has
    weight   what words follow from                where a float weight is rounded to its word

M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
2024, trains the first two, end to end, with codes fixed, after all weights block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.gradients import Pass, block_sink, linear_sink
from lowbitq.linears import QuantizedLinear
from lowbitq.models.decoder import Block, Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.slots import NORMS, OUTER, SLOTS, name_in_block
from lowbitq.roundings import Latents, LearnedRounding, Progress, float_weights
from lowbitq.tensors import QuantizedTensor, code_of

Array = NDArray[np.float32]

KINDS = ("scale", "offset", "level", "norm", "row", "bias", "adapter", "weight")
_OF_WEIGHTS = {"scale", "offset", "level", "weight"}  # which need dL/dW


@dataclass(eq=False)
class Parameter:
    """An array that training changes in place.

    Attributes
    ----------
    name, kind : str
        Such as ``"model.layers.3.mlp.up_proj.scale"`` and ``"scale"``.
    value, gradient, start : ndarray of one shape, float32
        `start` is the value before training.
    pace : float, default=1.0
        Factor of its kind's learning rate.
    """

    name: str
    kind: str
    value: Array
    pace: float = 1.0
    gradient: Array = field(init=False)
    start: Array = field(init=False)

    def __post_init__(self) -> None:
        self.gradient = np.zeros_like(self.value)
        self.start = self.value.copy()


@dataclass(eq=False)
class _Gain:
    """Gains of a norm: what they start from, what the model reads, and their gradient."""

    parameter: Parameter
    start: Array
    value: Array = field(init=False)
    gradient: Array = field(init=False)

    def __post_init__(self) -> None:
        self.value, self.gradient = self.start.copy(), np.zeros_like(self.start)


class StudentLayer:
    """A quantized layer of one copy, as training sees it; a model can call it.

    Parameters
    ----------
    name : str
    linear : QuantizedLinear
    learn_words : callable, default=None
        From the name, the packed matrix and the handle of its code, makes the `Latents` that the
        words follow from; None: words stay.

    Attributes
    ----------
    weight : ndarray of shape (rows, cols), float32
        What scales, offsets and levels make; `compose` rewrites it.
    parameters : dict of str to Parameter
        By kind, ``"adapter.U"`` and ``"adapter.V"``; only what the layer has.

    Raises
    ------
    ValueError
        If the layer has several copies.
    """

    def __init__(
        self,
        name: str,
        linear: QuantizedLinear,
        learn_words: Callable[[str, QuantizedTensor, Any], Latents] | None = None,
    ) -> None:
        if len(linear.copies) != 1:
            raise ValueError(f"{name} has {len(linear.copies)} copies, expected one")
        [copy] = linear.copies
        self.linear, self.bias, self._tensor = linear, linear.bias, copy.tensor
        self.weight = copy.tensor.dequantize()
        format, rows = copy.tensor.format, linear.shape[0]
        self._scale = copy.tensor.scale
        self._offset = copy.tensor.offset if format.has_offsets else None
        self._row = np.ones(rows, np.float32) if copy.weight is None else copy.weight
        self.parameters: dict[str, Parameter] = {}
        shared = (1, 1) if format.per_tensor else self._scale.shape
        self._add(name, "scale", np.ones(shared, np.float32))
        if self._offset is not None:
            self._add(name, "offset", np.zeros_like(self._scale))
        self._levels: Array | None = None
        if copy.tensor.levels is not None and format.learns_levels:
            self._levels = copy.tensor.levels.copy()
            self._add(name, "level", np.zeros_like(self._levels))
        tensor = copy.tensor
        levels = tensor.levels if self._levels is None else self._levels
        self._code = code_of(format, levels, tensor.unit, tensor.zero)  # reads them in place
        self._latents = learn_words(name, tensor, self._code) if learn_words else None
        if self._latents is not None:
            self._add(name, "weight", self._latents.value, self._latents.pace)
        self._add(name, "row", np.ones(rows, np.float32))
        if linear.bias is not None:
            self.bias = linear.bias.copy()
            self._add(name, "bias", np.zeros_like(linear.bias))
        for letter, array in zip("UV", linear.adapter or (), strict=False):
            self._add(name, f"adapter.{letter}", array.copy())
        self._fusion, self._fusion_gradient = self._row.copy(), np.zeros_like(self._row)
        R, P = (None if r is None else r.handle for r in (copy.rotation, copy.output_rotation))
        dense = _core.copy_dense(self.weight, R, P, self._fusion)
        U, V = (self._value(f"adapter.{letter}") for letter in "UV")
        self.handle = _core.linear((dense,), self.bias, U, V)

    def _add(self, name: str, key: str, value: Array, pace: float = 1.0) -> None:
        kind = key.partition(".")[0]
        self.parameters[key] = Parameter(f"{name}.{key}", kind, value, pace)

    def _value(self, key: str) -> Array | None:
        return self.parameters[key].value if key in self.parameters else None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.linear.shape

    def sink(self, kinds: set[str], weight: Array) -> Any:
        """Make the handle that takes gradients of these kinds; `weight` is a buffer for dL/dW."""
        wanted = {key: p.gradient for key, p in self.parameters.items() if p.kind in kinds}
        adapter = wanted.get("adapter.U"), wanted.get("adapter.V")
        return linear_sink(
            weight if _OF_WEIGHTS & set(wanted) else None,
            wanted.get("bias"),
            fusion=self._fusion_gradient if "row" in wanted else None,
            adapter=None if adapter[0] is None else adapter,  # type: ignore[arg-type]
        )

    def compose(self, at: Progress | None = None) -> None:
        """Write the layer's arrays as the parameters have them now; see `Student.compose`."""
        scale, offset = self._grids()
        if self._levels is not None and self._tensor.levels is not None:
            start = self._tensor.levels
            self._levels[:] = start + start.std() * self.parameters["level"].value
        if self._latents is None:
            self._call("compose", scale, offset, self.weight)
        else:
            self._latents.compose(scale, offset, self.weight, at)
        self._fusion[:] = self._row * self.parameters["row"].value
        if self.bias is not None and self.linear.bias is not None:
            self.bias[:] = self.linear.bias + self.parameters["bias"].value

    def pull(self, kinds: set[str], weight: Array) -> None:
        """Add to the gradients of scale, offset, level and row what a pass has left behind."""
        if _OF_WEIGHTS & kinds & set(self.parameters):
            self._pull_code(kinds, weight)
        if "row" in kinds:
            self.parameters["row"].gradient += self._fusion_gradient * self._row
            self._fusion_gradient[:] = 0

    def _pull_code(self, kinds: set[str], weight: Array) -> None:
        dscale = np.empty_like(self._scale)
        doffset = None if self._offset is None else np.empty_like(self._scale)
        learns = "level" in kinds and self._levels is not None
        dlevels = np.empty_like(self._levels) if learns and self._levels is not None else None
        grids = self._grids()
        if self._latents is None:
            self._call("code_gradient", weight, grids[0], dscale, doffset, dlevels)
        else:
            gradient = self.parameters["weight"].gradient
            self._latents.pull(*grids, weight, gradient, dscale, doffset, dlevels)
        scale = self.parameters["scale"].gradient
        if self._tensor.format.per_tensor:
            scale += (dscale * self._scale).sum()
        else:
            scale += dscale * self._scale
        if doffset is not None:
            self.parameters["offset"].gradient += doffset * self._scale
        if dlevels is not None and self._tensor.levels is not None:
            dlevels[self._tensor.levels == 0] = 0
            self.parameters["level"].gradient += dlevels * self._tensor.levels.std()

    def finish(self) -> QuantizedLinear:
        """Return the layer with its parameters as they are stored; rows go into the scales.

        What has not changed keeps its bits.
        """
        [copy] = self.linear.copies
        changed = {p.kind for p in self.parameters.values() if (p.value != p.start).any()}
        scale, offset = self._grids()
        words = self._tensor.codes
        if self._latents is not None and _OF_WEIGHTS & changed:
            words = self._latents.words(scale, offset)
        if "row" in changed:
            # A factor of each output is one of the weights' row only if nothing lies between.
            if self._tensor.format.per_tensor or copy.output_rotation is not None:
                copy = replace(copy, weight=_half(self._fusion))
            else:
                row = self.parameters["row"].value[:, None]
                scale, offset = scale * row, None if offset is None else offset * row
                changed.add("scale")
        if _OF_WEIGHTS & changed:
            levels = None if self._levels is None else self._levels.copy()
            copy = replace(copy, tensor=_stored(self._tensor, words, scale, offset, levels))
        adapter, bias = self.linear.adapter, self.linear.bias
        if "adapter" in changed:
            U, V = (_half(self.parameters[f"adapter.{letter}"].value) for letter in "UV")
            adapter = U, V
        if "bias" in changed and self.bias is not None:
            bias = self.bias.copy()
        return QuantizedLinear((copy,), bias, adapter)

    def _grids(self) -> tuple[Array, Array | None]:
        scale = self._scale * self.parameters["scale"].value
        if self._offset is None:
            return scale, None
        return scale, self._offset + self._scale * self.parameters["offset"].value

    def _call(self, name: str, *arrays: Array | None) -> None:
        group = self._tensor.format.group or max(self._tensor.cols, 1)
        getattr(_core, name)(self._code, self._tensor.panels, *arrays, group=group)


def _half(x: Array) -> Array:
    limit = np.finfo(np.float16).max
    return np.clip(x, -limit, limit).astype(np.float16).astype(np.float32)


def _stored(
    tensor: QuantizedTensor,
    words: NDArray[np.uint8],
    scale: Array,
    offset: Array | None,
    levels: Array | None,
) -> QuantizedTensor:
    """Words with other scales, offsets and levels than `tensor`, as its format stores them."""
    format, unit = tensor.format, tensor.unit
    stored: Array | None
    if format.per_tensor:
        stored, unit = None, float(scale[0, 0])
    elif format.scale_bits == 16:
        stored = _half(scale)
    else:
        most = (1 << format.scale_bits) - 1
        least = scale != 0  # a group of zeros stays one, others do not become one
        multiple = np.clip(np.rint(scale / np.float32(unit)), least, most)
        stored = multiple.astype(np.float32) * np.float32(unit)
    return QuantizedTensor.pack(
        format,
        words,
        stored,
        None if offset is None else _half(offset),
        levels=tensor.levels if levels is None else levels,
        unit=unit,
        zero=tensor.zero,
        shape=tensor.shape,
    )


class Student:
    """A quantized model on its way through training.

    Parameters
    ----------
    quantized : QuantizedModel
        Left unchanged.
    learn : iterable of str
        Kinds of parameters, of `KINDS`.
    rounding : LearnedRounding or str, default="nearest"
        How words learn, if ``"weight"`` does; see `lowbitq.roundings`.
    teacher : Model or None, default=None
        The float model that was quantized. Its weights are where ``"weight"`` starts; None: at the
        values of the words.

    Attributes
    ----------
    model : Model
        The dense model that is trained, in float32; it shares the arrays of the parameters.
    parameters : list of Parameter
        What learns.
    final_norm_gradient : ndarray of shape (hidden,), float32, or None
        Where a pass adds the gradient of the last norm's gains; None: they do not learn.

    Raises
    ------
    ValueError
        If a kind is unknown, the model has no parameter of these kinds, a layer is not quantized
        or has several copies, or weights are to learn whose words are chosen together.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        learn: Iterable[str],
        *,
        rounding: LearnedRounding | str = "nearest",
        teacher: Model | None = None,
    ) -> None:
        self._kinds = set(learn)
        if unknown := self._kinds - set(KINDS):
            raise ValueError(f"learn has {sorted(unknown)}, expected some of {', '.join(KINDS)}")
        self._quantized = quantized
        self._rounding = LearnedRounding.parse(rounding)
        self._floats = float_weights(quantized, teacher if "weight" in self._kinds else None)
        self._layers: dict[int, StudentLayer] = {}
        self._gains: list[_Gain] = []
        self.parameters: list[Parameter] = []
        self._buffers: dict[str, Array] = {}
        pairs = [self._block(i, block) for i, block in enumerate(quantized.blocks)]
        blocks, self._sinks = [b for b, _ in pairs], [s for _, s in pairs]
        final, self.final_norm_gradient = self._gain(OUTER["final_norm"].hf, quantized.final_norm)
        self.model = Model(
            quantized.config,
            quantized.tokenizer,
            quantized.embedding.to_float(),
            blocks,
            final,
            None if quantized.head is None else quantized.head.to_float(),
            quantized.residual_rotation,
        )
        del self._floats  # as large as the model
        for layer in self._layers.values():
            self.parameters += [p for p in layer.parameters.values() if p.kind in self._kinds]
        if not self.parameters:
            found = ", ".join(sorted(self._kinds)) or "nothing"
            raise ValueError(f"learn is {found}, but the model has no such parameter")

    def _gain(self, name: str, start: Array) -> tuple[Array, Array | None]:
        """Return the array of a norm's gains and, if they learn, that of their gradient."""
        if "norm" not in self._kinds:
            return start, None
        gain = _Gain(Parameter(f"{name}.norm", "norm", np.ones_like(start)), start)
        self.parameters.append(gain.parameter)
        self._gains.append(gain)
        return gain.value, gain.gradient

    def _block(self, index: int, block: Block) -> tuple[Block, Any]:
        norms: dict[str, Any] = {}
        gradients: dict[str, Array] = {}
        hidden = np.ones(self._quantized.config.hidden_size, np.float32)
        for norm, gain in zip(NORMS, block.norms, strict=True):
            if gain is None and "norm" in self._kinds and norm.size == "hidden":
                gain = hidden  # was fused into the layers
            if gain is not None:
                gain, gradient = self._gain(name_in_block(index, norm), gain)
                if gradient is not None:
                    gradients[norm.name] = gradient
            norms[norm.name] = gain
        linears: dict[str, Any] = {}
        sinks: dict[str, Any] = {}
        for slot in SLOTS:
            linear = block.linears[slot.name]
            name = name_in_block(index, slot)
            if not isinstance(linear, QuantizedLinear):
                raise ValueError(f"{name} is a {type(linear).__name__}, expected a quantized layer")
            if id(linear) not in self._layers:
                self._layers[id(linear)] = self._layer(name, linear)
            layer = self._layers[id(linear)]
            buffer = self._buffers.setdefault(slot.name, np.zeros(linear.shape, np.float32))
            linears[slot.name], sinks[slot.name] = layer, layer.sink(self._kinds, buffer)
        return replace(block, **norms, linears=linears), block_sink(gradients, sinks)

    def _layer(self, name: str, linear: QuantizedLinear) -> StudentLayer:
        if "weight" not in self._kinds:
            return StudentLayer(name, linear)

        def learn_words(name: str, tensor: QuantizedTensor, code: Any) -> Latents:
            weight, number = self._floats(name, linear), len(self._layers)
            return Latents(name, tensor, code, self._rounding, weight, number=number)

        return StudentLayer(name, linear, learn_words)

    def frozen(self, at: Progress) -> frozenset[str]:
        """Kinds of parameters that do not learn in this step."""
        return self._rounding.frozen(at)

    def block_parameters(self, index: int) -> list[Parameter]:
        """What learns in a block."""
        prefix = f"model.layers.{index}."
        return [p for p in self.parameters if p.name.startswith(prefix)]

    def compose(self, index: int | None = None, at: Progress | None = None) -> None:
        """Write the arrays of the model, or of one block, as the parameters have them now.

        `at` says how far weights that learn are rounded; None: as in the end.
        """
        blocks = self.model.blocks if index is None else [self.model.blocks[index]]
        layers = {id(x): x for block in blocks for x in block.linears.values()}
        for layer in layers.values():
            assert isinstance(layer, StudentLayer)
            layer.compose(at)
        for gain in self._gains:
            gain.value[:] = gain.start * gain.parameter.value

    def backward(self, runs: Sequence[Pass]) -> None:
        """Take passes whose loss is known back through the blocks; gradients are added."""
        for index in reversed(range(len(self.model.blocks))):
            with self.collecting(index) as sink:
                for run in runs:
                    run.back(index, sink)

    @contextmanager
    def collecting(self, index: int) -> Iterator[Any]:
        """Yield the sink of a block; what it takes is added to the gradients of parameters."""
        for buffer in self._buffers.values():
            buffer[:] = 0
        yield self._sinks[index]
        for name, layer in self.model.blocks[index].linears.items():
            assert isinstance(layer, StudentLayer)
            layer.pull(self._kinds, self._buffers[name])
        for gain in self._gains:
            gain.parameter.gradient += gain.gradient * gain.start
            gain.gradient[:] = 0

    def finish(self) -> QuantizedModel:
        """Return the quantized model with the parameters as they are stored."""
        self.compose()
        finished = {key: layer.finish() for key, layer in self._layers.items()}
        blocks = []
        for before, now in zip(self._quantized.blocks, self.model.blocks, strict=True):
            changes: dict[str, Any] = {
                norm.name: _stored_gain(getattr(before, norm.name), getattr(now, norm.name))
                for norm in NORMS
            }
            changes["linears"] = {name: finished[id(x)] for name, x in before.linears.items()}
            blocks.append(replace(before, **changes))
        final = _stored_gain(self._quantized.final_norm, self.model.final_norm)
        assert final is not None
        return replace(self._quantized, blocks=blocks, final_norm=final)


def _stored_gain(before: Array | None, now: Array | None) -> Array | None:
    """A gain in float16, or as it was (None: ones) if it has not changed."""
    if now is None or np.array_equal(now, np.ones_like(now) if before is None else before):
        return before
    return _half(now)
