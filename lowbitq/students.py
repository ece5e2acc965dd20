"""Students: quantized models on their way through training.

A weight is scale * level + offset. Words give levels, and do not change unless they learn, too, by
`lowbitq.roundings`; training works on the dense weights that levels make with scales and offsets in
float32. Parameters have no unit, so that one learning rate serves all of a kind:

    scale    p in  scale = scale_0 p               starts at 1
    offset   r in  offset = offset_0 + scale_0 r   0
    level    r in  level = level_0 + deviation r   0, of a learned table; a level of 0 stays
    norm     p in  gain = gain_0 p                 1
    row      t in  y = t * (W x)                   1
    fusion   f in  weight = weight_0 f             1, of several copies; without weights, one number
    column   g in  W diag(g)                       1, of o and down
    bias     d in  bias = bias_0 + d               0
    adapter  U, V in  y = W x + U V^T x            what the model has
    weight   what words follow from                where a float weight is rounded to its word
    activation  p in  scale = scale_0 p            1, of rounded inputs: a scale that is given
                p in  clip = clip_0 p              1, or else the clip, of at most 1
                r in  zero = zero_0 + range r      0, and the zero point, if there is one
    rotation  R in  y = W R x                      what copies have, if it is dense; orthogonal

Inputs are rounded in training only if this last kind learns; copies that round a common input alike
share it, so that the model still rounds it once.

Each copy of a layer has its own, but copies of one tensor share its scales, offsets and levels. The
factors of a copy's outputs go into its scales; where these cannot take them, because other copies
share them, a rotation lies between, or the tensor has one scale, they become the copy's weight, of
16 bits a row.

Factors of columns are free where the network before a layer can take them, so that none is stored.
A layer whose inputs are rotated as the model runs has none: g cannot pass the rotation.

    q, k, v   gains of the attention norm, in the basis of the residual stream: kind `norm`, also in
              a rotated model, whose gains are ones before
    gate, up  those of the norm before them, likewise
    o         rows and bias of v, shared by the query heads of a key head, also in a rotated model,
              where the rotation of the heads is part of both layers
    down      rows and bias of up, unless down's inputs are rotated (`online_down`)

Hence `column` is `row` of v and up, together with their biases and adapters.

M. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
2024, trains the first two, end to end, with codes fixed, after all weights block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.gradients import Pass, block_sink
from lowbitq.linears import QuantizedLinear
from lowbitq.models.decoder import Block, Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.slots import NORMS, OUTER, SLOTS, Slot, name_in_block
from lowbitq.parameters import Parameter
from lowbitq.roundings import Latents, LearnedRounding, Progress, float_weights
from lowbitq.student_inputs import StudentInput
from lowbitq.student_layers import StudentLayer, StudentTensor, half
from lowbitq.student_rotations import StudentRotation
from lowbitq.tensors import QuantizedTensor

Array = NDArray[np.float32]

KINDS = (
    "scale",
    "offset",
    "level",
    "norm",
    "row",
    "fusion",
    "column",
    "bias",
    "adapter",
    "activation",
    "rotation",
    "weight",
)

# Layers whose inputs are sums and products of another layer's outputs with what does not depend on
# them: attention averages values, the gate multiplies.
_FEEDS = {"v_proj": "o_proj", "up_proj": "down_proj"}


@dataclass(eq=False)
class _Gain:
    """Gains of a norm: what they start from, what the model reads, and their gradient."""

    parameter: Parameter
    start: Array
    value: Array = field(init=False)
    gradient: Array = field(init=False)

    def __post_init__(self) -> None:
        self.value, self.gradient = self.start.copy(), np.zeros_like(self.start)


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
        The float model that was quantized. Its weights are where ``"weight"`` starts, but in layers
        of several copies; None: at the values of the words.

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
        If a kind is unknown, the model has no parameter of these kinds, a layer is not quantized,
        or weights are to learn whose words are chosen together.
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
        self._tensors: dict[int, StudentTensor] = {}
        self._inputs: dict[tuple[int, str], dict[Hashable, StudentInput]] = {}
        self._rotations: dict[tuple[int, str], dict[bytes, StudentRotation]] = {}
        self._gains: list[_Gain] = []
        self.parameters: list[Parameter] = []
        self._buffers: dict[tuple[str, int], Array] = {}
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
            self.parameters += [p for p in layer.parameters if p.kind in self._kinds]
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
                self._layers[id(linear)] = self._layer(index, block, slot)
            layer = self._layers[id(linear)]
            linears[slot.name] = layer
            sinks[slot.name] = layer.sink(self._kinds, self._buffers_of(slot.name, layer))
        return replace(block, **norms, linears=linears), block_sink(gradients, sinks)

    def _layer(self, index: int, block: Block, slot: Slot) -> StudentLayer:
        place, whole = (index, slot.tap), name_in_block(index, slot)
        linear = block.linears[slot.name]
        assert isinstance(linear, QuantizedLinear)

        def learn_words(name: str, tensor: QuantizedTensor, code: Any) -> Latents:
            weight = self._floats(whole, linear) if len(linear.copies) == 1 else None
            number = len(self._tensors)
            return Latents(name, tensor, code, self._rounding, weight, number=number)

        return StudentLayer(
            whole,
            linear,
            self._tensors,
            _fed_by(index, block, slot),
            self._inputs.setdefault(place, {}) if "activation" in self._kinds else None,
            self._rotations.setdefault(place, {}) if "rotation" in self._kinds else None,
            learn_words if "weight" in self._kinds else None,
        )

    def set_paces(self, paces: Mapping[str, float]) -> None:
        """Multiply learning rates of some layers and norms by factors.

        Parameters
        ----------
        paces : mapping of str to float
            By patterns of names, ``"*.down_proj"``, or of a layer's first format, ``"int2*"``. The
            last that matches holds.

        Raises
        ------
        ValueError
            If a factor is negative or not finite, or a pattern matches nothing.
        """
        groups = [
            (layer.name, str(layer.linear.copies[0].tensor.format), layer.parameters)
            for layer in self._layers.values()
        ]
        groups += [(g.parameter.name.removesuffix(".norm"), "", [g.parameter]) for g in self._gains]
        factors: dict[int, float] = {}
        for pattern, factor in paces.items():
            if not 0 <= factor < float("inf"):
                raise ValueError(
                    f"pace {pattern!r} is {factor}, expected a finite number of at least 0"
                )
            matches = [
                parameters
                for *names, parameters in groups
                if any(fnmatchcase(name, pattern) for name in names)
            ]
            if not matches:
                raise ValueError(f"pace {pattern!r} matches no layer, norm or format")
            factors |= {id(p): factor for parameters in matches for p in parameters}
        for p in self.parameters:
            p.pace *= factors.get(id(p), 1.0)

    def frozen(self, at: Progress) -> frozenset[str]:
        """Kinds of parameters that do not learn in this step."""
        return self._rounding.frozen(at)

    def _buffers_of(self, slot: str, layer: StudentLayer) -> list[Array]:
        """Return arrays for dL/dW of a layer's tensors; blocks take turns with them."""
        keys = [(slot, i) for i in range(len(layer.tensors))]
        for key in keys:
            if key not in self._buffers:
                self._buffers[key] = np.zeros(layer.shape, np.float32)
        return [self._buffers[key] for key in keys]

    def copies_alone(self, index: int, slot: str) -> list[tuple[Any, Any]]:
        """Return the copies of a layer, see `StudentLayer.copies_alone`."""
        layer = self.model.blocks[index].linears[slot]
        assert isinstance(layer, StudentLayer)
        return layer.copies_alone(self._kinds, self._buffers_of(slot, layer))

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

    def backward(
        self, runs: Sequence[Pass], also: Callable[[Pass, int], float] | None = None
    ) -> float:
        """Take passes whose loss is known back through the blocks; gradients are added.

        `also` adds those of another loss of a pass and a block. Returns the sum of what it returns.
        """
        total = 0.0
        for index in reversed(range(len(self.model.blocks))):
            with self.collecting(index) as sink:
                for run in runs:
                    total += 0.0 if also is None else also(run, index)
                    run.back(index, sink)
        return total

    @contextmanager
    def collecting(self, index: int) -> Iterator[Any]:
        """Yield the sink of a block; what it takes is added to the gradients of parameters."""
        for buffer in self._buffers.values():
            buffer[:] = 0
        yield self._sinks[index]
        for name, layer in self.model.blocks[index].linears.items():
            assert isinstance(layer, StudentLayer)
            layer.pull(self._kinds, self._buffers_of(name, layer))
        for gain in self._gains:
            gain.parameter.gradient += gain.gradient * gain.start
            gain.gradient[:] = 0

    def finish(self) -> QuantizedModel:
        """Return the quantized model with the parameters as they are stored."""
        self.compose()
        shared: dict[int, QuantizedTensor] = {}
        finished = {key: layer.finish(shared) for key, layer in self._layers.items()}
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


def _fed_by(index: int, block: Block, slot: Slot) -> str | None:
    """Name of the layer whose columns a layer's outputs are, where no rotation lies between."""
    for follower in SLOTS:
        if follower.name == _FEEDS.get(slot.name):
            linear = block.linears[follower.name]
            copies = linear.copies if isinstance(linear, QuantizedLinear) else ()
            if all(copy.rotation is None for copy in copies):
                return name_in_block(index, follower)
    return None


def _stored_gain(before: Array | None, now: Array | None) -> Array | None:
    """A gain in float16, or as it was (None: ones) if it has not changed."""
    if now is None or np.array_equal(now, np.ones_like(now) if before is None else before):
        return before
    return half(now)
