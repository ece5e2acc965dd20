"""Students in float64, from the formulas of lowbitq.students, and derivatives by differences."""

from __future__ import annotations

import numpy as np
import oracle

from lowbitq.linears import QuantizedLinear
from lowbitq.models.slots import NORMS, OUTER, SLOTS, name_in_block
from lowbitq.student_inputs import reading

FEEDS = {"v_proj": "o_proj", "up_proj": "down_proj"}


class StudentOracle:
    """A student as a function of its parameters' values.

    Parameters
    ----------
    small : QuantizedModel
    student : Student
        Its parameters' values are read on each call.
    teacher : Model
    """

    def __init__(self, small, student, teacher):
        self.small = small
        self.values = {p.name: p.value for p in student.parameters}
        self.layers = {
            name: LayerOracle(name, linear, self.value) for name, linear in small.linears()
        }
        first = {}  # copy that reads an input in a way
        for layer in self.layers.values():
            tap = next(slot.tap for slot in SLOTS if layer.name.endswith(slot.name))
            layer.inputs = [
                first.setdefault((layer.name.split(".")[2], tap, reading(copy)), part)
                for part, copy in zip(layer.parts, layer.linear.copies, strict=True)
            ]
        self.teacher = plain_network(teacher, {})
        self._teacher = {}

    def value(self, name, otherwise):
        """A parameter's value; `otherwise` if there is no such parameter."""
        return self.values[name].astype(float) if name in self.values else otherwise

    def network(self):
        """The student for oracle.decoder."""
        found = plain_network(self.small, self.layers)
        found["final_norm"] = found["final_norm"] * self.value(f"{OUTER['final_norm'].hf}.norm", 1)
        for i, block in enumerate(found["blocks"]):
            for norm in NORMS:
                factor = self.value(f"{name_in_block(i, norm)}.norm", None)
                if factor is not None:
                    gain = block[norm.name]
                    block[norm.name] = factor if gain is None else gain * factor
            for slot in SLOTS:
                layer = self.layers[name_in_block(i, slot)]
                if slot.name in FEEDS:
                    follower = next(s for s in SLOTS if s.name == FEEDS[slot.name])
                    layer.column = f"{name_in_block(i, follower)}.column"
        return found

    def logits(self, tokens):
        return oracle.decoder(self.network(), tokens)

    def loss(self, tokens):
        """Mean KL divergence of the student from its teacher, nats."""
        q = log_softmax(self.logits(tokens))
        if tokens.tobytes() not in self._teacher:
            self._teacher[tokens.tobytes()] = log_softmax(oracle.decoder(self.teacher, tokens))
        p = self._teacher[tokens.tobytes()]
        return (np.exp(p) * (p - q)).sum(1).mean()

    def slope(self, name, direction, tokens, step=1e-3):
        """Derivative of the loss along a direction of one parameter, to step^2."""
        start, losses = self.values[name], []
        for h in (step, -step):
            self.values[name] = start.astype(float) + h * direction
            losses.append(self.loss(tokens))
        self.values[name] = start
        return (losses[0] - losses[1]) / (2 * step)


class LayerOracle:
    """A layer in float64, with values of its parameters by name."""

    def __init__(self, name, linear, value):
        self.name, self.linear, self.value = name, linear, value
        self.column, self.inputs = "", []
        self.held = {}  # roundings of the first call, which derivatives take as constant
        several = len(linear.copies) > 1
        self.parts = [f"{name}.copies.{i}" if several else name for i in range(len(linear.copies))]
        tensors = [copy.tensor for copy in linear.copies]
        self.first = [self.parts[tensors.index(tensor)] for tensor in tensors]

    def matrix(self, part, tensor):
        """Scale * level + offset."""
        groups = tensor.scale.shape[1]
        scale, offset = tensor.scale.astype(float), tensor.offset.astype(float)
        group = -(-tensor.cols // groups)

        def wide(x):
            return np.repeat(np.broadcast_to(x, scale.shape), group, axis=1)[:, : tensor.cols]

        deviation = self.value(f"{part}.level", None)
        if deviation is not None:
            start = tensor.levels.astype(float)
            table = start + start.std() * deviation
            if self.rounds:
                step = abs(table).max() / 127
                table += self.held.setdefault(part, np.rint(table / step) * step - table)
            level = table[tensor.codes]
        else:
            level = tensor.dequantize().astype(float)
            if tensor.format.has_offsets:
                level = level - wide(offset)
            level = level / wide(np.where(scale == 0, 1, scale))
        found = wide(scale * self.value(f"{part}.scale", 1)) * level
        if tensor.format.has_offsets:
            found += wide(offset + scale * self.value(f"{part}.offset", 0))
        return found

    @property
    def rounds(self):
        """Whether inputs are rounded, as they are where their parameters learn."""
        values = [
            self.value(f"{name}.activation.{key}", None)
            for name in self.inputs
            for key in ("clip", "scale")
        ]
        return any(value is not None for value in values)

    def rounded(self, x, part, name, copy):
        """The input of a copy whose activation's parameters are called `name`."""
        how = copy.activation
        clip, scale = (
            start and start * float(self.value(f"{name}.activation.{key}", np.ones(1))[0])
            for key, start in (("clip", how.clip), ("scale", how.scale))
        )
        limit = (1 << (how.bits - 1)) - 1
        unit = limit * how.scale if how.scale else abs(how.zero)
        zero = how.zero + unit * float(self.value(f"{name}.activation.zero", np.zeros(1))[0])
        rounding = {"bits": how.bits, "step": copy.tensor.format.group or 64}
        y, held = oracle.fake_quantize(
            x, clip, scale, zero, **rounding, rounding=self.held.get(f"{part}.x")
        )
        self.held[f"{part}.x"] = held
        return y

    def __call__(self, x):
        y = 0
        names = zip(self.parts, self.first, self.inputs, self.linear.copies, strict=True)
        for part, first, name, copy in names:
            seen = x
            if copy.rotation is not None:
                turn = copy.rotation.matrix().astype(float)
                seen = x @ self.value(f"{part}.rotation", turn).T
            if self.rounds:
                seen = self.rounded(seen, part, name, copy)
            z = seen @ self.matrix(first, copy.tensor).T
            if copy.output_rotation is not None:
                z = z @ copy.output_rotation.matrix().astype(float)
            factor = self.value(f"{part}.row", 1) * self.value(f"{part}.fusion", 1)
            y = y + z * (factor if copy.weight is None else factor * copy.weight)
        if self.linear.adapter is not None:
            U, V = (
                self.value(f"{self.name}.adapter.{letter}", array)
                for letter, array in zip("UV", self.linear.adapter, strict=True)
            )
            y = y + x @ V @ U.T
        if self.linear.bias is not None:
            y = y + self.linear.bias + self.value(f"{self.name}.bias", 0)
        return y * self.value(self.column, 1)


def plain_network(model, layers):
    """A model for oracle.decoder; layers by name are functions."""
    config = model.config
    d = config.head_dim
    rotation = model.residual_rotation
    return {
        "embedding": matrix_of(model.embedding),
        "final_norm": model.final_norm.astype(float),
        "head": None if model.head is None else matrix_of(model.head),
        "frequency": config.rope_theta ** (-np.arange(0, d, 2) / d),
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "epsilon": config.norm_eps,
        "rotation": np.eye(config.hidden_size) if rotation is None else rotation.matrix(),
        "blocks": [
            {norm.name: getattr(block, norm.name) for norm in NORMS}
            | {
                slot.name: layers.get(name_in_block(i, slot)) or dense(block.linears[slot.name])
                for slot in SLOTS
            }
            for i, block in enumerate(model.blocks)
        ],
    }


def matrix_of(linear):
    return linear.dequantize() if isinstance(linear, QuantizedLinear) else linear.weight


def dense(linear):
    return linear.weight, linear.bias


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
