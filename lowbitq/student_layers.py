"""The layers of a student: packed matrices, whose words may learn, and what is trained around them.

`lowbitq.students` has the list of parameters and their formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.gradients import CopyGradient, linear_sink
from lowbitq.linears import Copy, QuantizedLinear
from lowbitq.parameters import Parameter
from lowbitq.roundings import Latents, Progress
from lowbitq.student_inputs import StudentInput, reading
from lowbitq.student_rotations import StudentRotation
from lowbitq.tensors import QuantizedTensor, code_of

Array = NDArray[np.float32]

# Makes what the words of a matrix follow from, of a layer's name, the matrix and its code.
LearnWords = Callable[[str, QuantizedTensor, Any], Latents]

_OF_OUTPUTS = {"row", "fusion", "column"}  # factors of a copy's outputs


class StudentTensor:
    """A packed matrix as training sees it; the copies that share one share its parameters.

    Parameters
    ----------
    name : str
        Of the first copy that has the tensor.
    tensor : QuantizedTensor
    in_bytes : bool
        Whether levels of a table are rounded to bytes, as products with integers have them.
    learn_words : callable, default=None
        None: the words stay.

    Attributes
    ----------
    weight : ndarray of shape (rows, cols), float32
        What scales, offsets and levels make; `compose` rewrites it.
    copies : int
        That have this tensor, counted by `StudentCopy`.
    parameters : dict of str to Parameter
        By kind; only what the format has.
    """

    def __init__(
        self,
        name: str,
        tensor: QuantizedTensor,
        *,
        in_bytes: bool = False,
        learn_words: LearnWords | None = None,
    ) -> None:
        self.tensor, self.copies, self._in_bytes = tensor, 0, in_bytes
        self.weight = tensor.dequantize()
        format = tensor.format
        self._scale = tensor.scale
        self._offset = tensor.offset if format.has_offsets else None
        self._levels: Array | None = None
        starts = {"scale": np.ones((1, 1) if format.per_tensor else self._scale.shape, np.float32)}
        if self._offset is not None:
            starts["offset"] = np.zeros_like(self._scale)
        if tensor.levels is not None and format.learns_levels:
            self._levels = tensor.levels.copy()
            starts["level"] = np.zeros_like(self._levels)
        self.parameters = {
            kind: Parameter(f"{name}.{kind}", kind, start) for kind, start in starts.items()
        }
        self._seen = None if tensor.levels is None else self._as_seen(tensor.levels)
        self._code = code_of(format, self._seen, tensor.unit, tensor.zero)  # reads them in place
        self._latents = None if learn_words is None else learn_words(name, tensor, self._code)
        if self._latents is not None:
            found, pace = self._latents.value, self._latents.pace
            self.parameters["weight"] = Parameter(f"{name}.weight", "weight", found, pace)

    def learns(self, kinds: set[str]) -> bool:
        """Whether a parameter is of one of these kinds, so that dL/dW is wanted."""
        return not kinds.isdisjoint(self.parameters)

    def compose(self, at: Progress | None = None) -> None:
        """Write the weights as the parameters have them now; see `Student.compose`."""
        if self._levels is not None and self.tensor.levels is not None:
            start = self.tensor.levels
            self._levels[:] = start + start.std() * self.parameters["level"].value
            assert self._seen is not None
            self._seen[:] = self._as_seen(self._levels)
        if self._latents is None:
            self._call("compose", *self._grids(), self.weight)
        else:
            self._latents.compose(*self._grids(), self.weight, at)

    def pull(self, kinds: set[str], weight: Array) -> None:
        """Add dL/dW to the gradients of scales, offsets and levels."""
        dscale = np.empty_like(self._scale)
        doffset = None if self._offset is None else np.empty_like(self._scale)
        dlevels = None
        if "level" in kinds and self._levels is not None:
            dlevels = np.empty_like(self._levels)
        grids = self._grids()
        if self._latents is None:
            self._call("code_gradient", weight, grids[0], dscale, doffset, dlevels)
        else:
            gradient = self.parameters["weight"].gradient
            self._latents.pull(*grids, weight, gradient, dscale, doffset, dlevels)
        scale = self.parameters["scale"].gradient
        if self.tensor.format.per_tensor:
            scale += (dscale * self._scale).sum()
        else:
            scale += dscale * self._scale
        if doffset is not None:
            self.parameters["offset"].gradient += doffset * self._scale
        if dlevels is not None and self.tensor.levels is not None:
            dlevels[self.tensor.levels == 0] = 0
            self.parameters["level"].gradient += dlevels * self.tensor.levels.std()

    def finish(self, row: Array | None) -> QuantizedTensor:
        """Return the tensor with its parameters as they are stored.

        Parameters
        ----------
        row : ndarray of shape (rows,) or (1,), float32, or None
            A factor of its rows, which goes into the scales and offsets.
        """
        if row is None and not any(p.changed for p in self.parameters.values()):
            return self.tensor
        scale, offset = self._grids()
        words = self.tensor.codes
        if self._latents is not None:
            words = self._latents.words(scale, offset)
        if row is not None:
            scale, offset = scale * row[:, None], None if offset is None else offset * row[:, None]
        return _stored(self.tensor, words, scale, offset, self._levels)

    def _as_seen(self, levels: Array) -> Array:
        """Levels as products have them; `lbq_byte_levels` in csrc/codes has the rule for bytes."""
        step = abs(levels).max() / np.float32(127)
        if not self._in_bytes or len(levels) == 2 or step == 0:
            return levels.copy()
        return np.asarray(np.rint(levels / step) * step)

    def _grids(self) -> tuple[Array, Array | None]:
        scale = self._scale * self.parameters["scale"].value
        if self._offset is None:
            return scale, None
        return scale, self._offset + self._scale * self.parameters["offset"].value

    def _call(self, name: str, *arrays: Array | None) -> None:
        group = self.tensor.format.group or max(self.tensor.cols, 1)
        getattr(_core, name)(self._code, self.tensor.panels, *arrays, group=group)


class StudentCopy:
    """A copy of a layer as training sees it: a tensor, and factors of what it gives.

    Parameters
    ----------
    name : str
    copy : Copy
    tensor : StudentTensor
        Of the copy's tensor.
    input : StudentInput or None
        How it rounds its input; None: it does not.
    rotation : StudentRotation or None
        How it rotates its input; None: as the copy does.
    fused : bool
        Whether the layer has several copies, whose weights learn.

    Attributes
    ----------
    parameters : dict of str to Parameter
        ``"row"`` and, if there is something to fuse, ``"fusion"``.
    gradient : ndarray of shape (rows,), float32
        Where a pass adds the gradient of the factors of the outputs.
    handle : capsule
        For `_core.linear`.
    """

    def __init__(
        self,
        name: str,
        copy: Copy,
        tensor: StudentTensor,
        input: StudentInput | None,
        rotation: StudentRotation | None,
        *,
        fused: bool,
    ) -> None:
        self.copy, self.tensor = copy, tensor
        self.input, self.rotation = input, rotation
        tensor.copies += 1
        ones = np.ones(copy.tensor.rows, np.float32)
        self.parameters = {"row": Parameter(f"{name}.row", "row", ones.copy())}
        if fused or copy.weight is not None:
            start = ones[:1].copy() if copy.weight is None else ones.copy()
            self.parameters["fusion"] = Parameter(f"{name}.fusion", "fusion", start)
        self._start = ones if copy.weight is None else copy.weight
        self._factor, self.gradient = self._start.copy(), np.zeros_like(self._start)
        R, P = (None if r is None else r.handle for r in (copy.rotation, copy.output_rotation))
        parts = tensor.weight, R if rotation is None else rotation.handle, P, self._factor
        if input is None:
            self.handle = _core.copy_dense(*parts)
        else:
            self.handle = _core.copy_rounding(*parts, copy.handle, input.values)

    def compose(self, output: Array) -> None:
        """Write the factors as the parameters have them now; `output` is one of the whole layer."""
        self._factor[:] = self._start * self._own() * output
        for part in (self.input, self.rotation):
            if part is not None:
                part.compose()

    def pull(self, kinds: set[str], output: Array) -> Array:
        """Add to the gradients of the factors; return the gradient of `output`."""
        row, fusion = self.parameters["row"], self.parameters.get("fusion")
        by_own = self.gradient * self._start * output
        by_output = self.gradient * self._start * self._own()
        self.gradient[:] = 0
        if "row" in kinds:
            row.gradient += by_own if fusion is None else by_own * fusion.value
        if "fusion" in kinds and fusion is not None:
            by_fusion = by_own * row.value
            fusion.gradient += by_fusion if len(fusion.value) > 1 else by_fusion.sum()
        for part in (self.input, self.rotation):
            if part is not None:
                part.pull()
        return by_output

    def finish(self, output: Array | None, shared: dict[int, QuantizedTensor]) -> Copy:
        """Return the copy with its parameters as they are stored.

        Factors go into the scales of a tensor that no other copy has: one for all rows always,
        factors of each row if there are scales of each row and no output rotation lies between.
        Others become the copy's weight, which is stored and counted. `shared` collects the tensors
        of several copies.
        """
        row, fusion = self.parameters["row"], self.parameters.get("fusion")
        weight = self.copy.weight
        factors = [row.value] if row.changed else []
        if output is not None:
            factors.append(output)
        if fusion is not None and fusion.changed:
            if weight is None:
                factors.append(fusion.value)
            else:
                weight = weight * fusion.value
        factor = _product(factors) if factors else None
        if factor is not None and not self._takes(factor):
            weight, factor = factor * (self._start if weight is None else weight), None
        if weight is not None and weight is not self.copy.weight:
            weight = half(weight)
        if self.tensor.copies == 1:
            tensor = self.tensor.finish(factor)
        else:
            tensor = shared.setdefault(id(self.tensor), self.tensor.finish(None))
        changes: dict[str, Any] = {"tensor": tensor, "weight": weight}
        if self.input is not None:
            changes["activation"] = self.input.finish()
        if self.rotation is not None:
            changes["rotation"] = self.rotation.finish()
        return replace(self.copy, **changes)

    def _takes(self, factor: Array) -> bool:
        """Whether the scales can take a factor of the outputs."""
        plain = self.copy.output_rotation is None and not self.copy.tensor.format.per_tensor
        return self.tensor.copies == 1 and (plain or len(factor) == 1)

    def _own(self) -> Array:
        return _product([p.value for p in self.parameters.values()])


class _Scaled:
    """A layer's bias or U: what the network reads is ``output * (start + parameter)``, by rows."""

    def __init__(self, parameter: Parameter, start: Array | float = 0) -> None:
        self.parameter, self._start = parameter, start
        self.value = start + parameter.value
        self.gradient = np.zeros_like(self.value)

    def compose(self, output: Array) -> None:
        self.value[:] = ((self._start + self.parameter.value).T * output).T

    def pull(self, kinds: set[str], output: Array) -> Array:
        """Add to the parameter's gradient; return that of `output`, by rows."""
        if self.parameter.kind in kinds:
            self.parameter.gradient += (self.gradient.T * output).T
        by_output = self.gradient * (self._start + self.parameter.value)
        self.gradient[:] = 0
        return np.asarray(by_output.reshape(len(by_output), -1).sum(1))


class StudentLayer:
    """A quantized layer as training sees it; a model can call it.

    Parameters
    ----------
    name : str
    linear : QuantizedLinear
    tensors : dict of int to StudentTensor
        The tensors known so far, by the identity of the packed ones; new ones are added.
    feeds : str or None, default=None
        Name of the layer whose inputs are this one's outputs but for what commutes with factors of
        them, so that such factors are factors of its columns.
    inputs : dict of Hashable to StudentInput, or None, default=None
        How the copies that have this layer's input round it, so far; new ones are added. None:
        inputs are not rounded.
    rotations : dict of bytes to StudentRotation, or None, default=None
        How they rotate it, likewise, by the bytes of dense matrices. None: as they do.
    learn_words : callable, default=None
        For `StudentTensor`.

    Attributes
    ----------
    parameters : list of Parameter
        What the layer has; those of a tensor or an input are the first layer's that has it.
    tensors : list of StudentTensor
        Of its copies, each once.
    """

    def __init__(
        self,
        name: str,
        linear: QuantizedLinear,
        tensors: dict[int, StudentTensor],
        feeds: str | None = None,
        inputs: dict[Hashable, StudentInput] | None = None,
        rotations: dict[bytes, StudentRotation] | None = None,
        learn_words: LearnWords | None = None,
    ) -> None:
        self.name, self.linear, self._learn_words = name, linear, learn_words
        self.parameters: list[Parameter] = []
        self.tensors: list[StudentTensor] = []
        self._copies: list[StudentCopy] = []
        fused = len(linear.copies) > 1
        for index, copy in enumerate(linear.copies):
            part = f"{name}.copies.{index}" if fused else name
            input, rotation = self._input(part, copy, inputs), self._rotation(part, copy, rotations)
            tensor = self._tensor(part, copy, tensors, in_bytes=input is not None)
            if tensor not in self.tensors:
                self.tensors.append(tensor)
            self._copies.append(StudentCopy(part, copy, tensor, input, rotation, fused=fused))
            self.parameters += self._copies[-1].parameters.values()
        self._column: Parameter | None = None
        if feeds is not None:
            self._column = self._add(f"{feeds}.column", np.ones(self.shape[0], np.float32))
        self._bias = self._U = self._V = None
        if linear.bias is not None:
            bias = self._add(f"{name}.bias", np.zeros_like(linear.bias))
            self._bias = _Scaled(bias, linear.bias)
        if linear.adapter is not None:
            U, V = (array.copy() for array in linear.adapter)
            self._U = _Scaled(self._add(f"{name}.adapter.U", U))
            self._V = self._add(f"{name}.adapter.V", V)
        self.handle = _core.linear(
            tuple(copy.handle for copy in self._copies),
            self.bias,
            None if self._U is None else self._U.value,
            None if self._V is None else self._V.value,
        )

    def _tensor(
        self, name: str, copy: Copy, known: dict[int, StudentTensor], *, in_bytes: bool
    ) -> StudentTensor:
        key = id(copy.tensor)
        if key not in known:
            known[key] = StudentTensor(
                name, copy.tensor, in_bytes=in_bytes, learn_words=self._learn_words
            )
            self.parameters += known[key].parameters.values()
        return known[key]

    def _input(
        self, name: str, copy: Copy, known: dict[Hashable, StudentInput] | None
    ) -> StudentInput | None:
        if known is None or copy.activation.bits is None:
            return None
        key = reading(copy)
        if key not in known:
            known[key] = StudentInput(name, copy.activation)
            self.parameters += known[key].parameters
        return known[key]

    def _rotation(
        self, name: str, copy: Copy, known: dict[bytes, StudentRotation] | None
    ) -> StudentRotation | None:
        if known is None or copy.rotation is None or copy.rotation.kind == "hadamard":
            return None
        key = copy.rotation.matrix().tobytes()
        if key not in known:
            known[key] = StudentRotation(name, copy.rotation)
            self.parameters.append(known[key].parameter)
        return known[key]

    def _add(self, name: str, value: Array) -> Parameter:
        kind = "adapter" if ".adapter." in name else name.rpartition(".")[2]
        self.parameters.append(Parameter(name, kind, value))
        return self.parameters[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.linear.shape

    @property
    def bias(self) -> Array | None:
        """The bias as the network reads it."""
        return None if self._bias is None else self._bias.value

    @property
    def _output(self) -> Array:
        """Factors of the outputs."""
        return np.ones(1, np.float32) if self._column is None else self._column.value

    def sink(self, kinds: set[str], weights: Sequence[Array]) -> Any:
        """Make the handle that takes gradients of these kinds.

        `weights` has a buffer for dL/dW of each of `tensors`.
        """
        wanted = {p.kind for p in self.parameters if p.kind in kinds}
        bias = adapter = None
        if self._bias is not None and {"bias", "column"} & wanted:
            bias = self._bias.gradient
        if self._U is not None and self._V is not None and {"adapter", "column"} & wanted:
            adapter = self._U.gradient, self._V.gradient if "adapter" in wanted else None
        return linear_sink(bias=bias, copies=self._copy_gradients(kinds, weights), adapter=adapter)

    def copies_alone(self, kinds: set[str], weights: Sequence[Array]) -> list[tuple[Any, Any]]:
        """Return each copy as the handle of a layer of its own, and what takes its gradients.

        These are added to those of `sink` in the same arrays.
        """
        return [
            (_core.linear((copy.handle,), None, None, None), linear_sink(copies=[gradient]))
            for copy, gradient in zip(
                self._copies, self._copy_gradients(kinds, weights), strict=True
            )
        ]

    def _copy_gradients(self, kinds: set[str], weights: Sequence[Array]) -> list[CopyGradient]:
        dense = {
            tensor: weight if tensor.learns(kinds) else None
            for tensor, weight in zip(self.tensors, weights, strict=True)
        }
        factors = any(p.kind in kinds & _OF_OUTPUTS for p in self.parameters)
        return [
            CopyGradient(
                dense[copy.tensor],
                copy.gradient if factors else None,
                None if copy.input is None else copy.input.gradient,
                None if copy.rotation is None else copy.rotation.gradient,
            )
            for copy in self._copies
        ]

    def compose(self, at: Progress | None = None) -> None:
        """Write the layer's arrays as the parameters have them now; see `Student.compose`."""
        output = self._output
        for part in (*self._copies, self._bias, self._U):
            if part is not None:
                part.compose(output)
        for tensor in self.tensors:
            tensor.compose(at)

    def pull(self, kinds: set[str], weights: Sequence[Array]) -> None:
        """Add to the gradients of the parameters what a pass has left in the arrays of `sink`."""
        output = self._output
        for tensor, weight in zip(self.tensors, weights, strict=True):
            if tensor.learns(kinds):
                tensor.pull(kinds, weight)
        for part in (*self._copies, self._bias, self._U):
            if part is not None:
                by_output = part.pull(kinds, output)
                if self._column is not None:
                    self._column.gradient += by_output

    def finish(self, shared: dict[int, QuantizedTensor]) -> QuantizedLinear:
        """Return the layer with its parameters as they are stored.

        What has not changed keeps its bits. `shared` collects the tensors of several copies.
        """
        scaled = self._column is not None and self._column.changed
        output = self._output if scaled else None
        copies = tuple(copy.finish(output, shared) for copy in self._copies)
        adapter, bias = self.linear.adapter, self.linear.bias
        if self._bias is not None and (scaled or self._bias.parameter.changed):
            bias = self._bias.value.copy()
        U, V = self._U, self._V
        if U is not None and V is not None and (scaled or U.parameter.changed or V.changed):
            adapter = half(U.value), half(V.value)
        return QuantizedLinear(copies, bias, adapter)


def half(x: Array) -> Array:
    """Round to float16, saturating."""
    limit = np.finfo(np.float16).max
    return np.clip(x, -limit, limit).astype(np.float16).astype(np.float32)


def _product(factors: Iterable[Array]) -> Array:
    return np.asarray(reduce(np.multiply, factors))


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
        stored = half(scale)
    else:
        most = (1 << format.scale_bits) - 1
        least = scale != 0  # a group of zeros stays one, others do not become one
        multiple = np.clip(np.rint(scale / np.float32(unit)), least, most)
        stored = multiple.astype(np.float32) * np.float32(unit)
    return QuantizedTensor.pack(
        format,
        words,
        stored,
        None if offset is None else half(offset),
        levels=tensor.levels if levels is None else levels.copy(),
        unit=unit,
        zero=tensor.zero,
        shape=tensor.shape,
    )
