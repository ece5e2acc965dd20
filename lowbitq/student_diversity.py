"""Diversity of copies in training: errors of the copies of a layer that average out.

A layer that is the average of copies errs by the sum of what they err by. With W its float weights
and x its inputs, copy i errs by ``e_i = weight_i (W_i act_i(R_i x) - W x)``, and the loss is the
mean over such layers of ``-log det C``, C the correlations of e_1, e_2, ... on a window. Inputs are
taken as they are: the loss teaches the copies of a layer, not the layers before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq._core import NumericalError
from lowbitq.gradients import Pass
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.losses import diversity_loss
from lowbitq.models.decoder import Model
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.rotating import rotate
from lowbitq.models.slots import SLOTS, name_in_block
from lowbitq.students import Student

Array = NDArray[np.float32]


def averaged_layers(model: QuantizedModel) -> list[tuple[int, str]]:
    """Return the block and slot name of each layer that averages copies with words of their own.

    Copies of mode ``own`` have fusion weights and words of their own; those of mode ``residual``
    have no weights, and those of mode ``shared`` the words of the first.
    """
    return [
        (index, slot.name)
        for index, block in enumerate(model.blocks)
        for slot in SLOTS
        if _averages(block.linears[slot.name])
    ]


def check_diversity(model: QuantizedModel, diversity: float) -> None:
    """Raise ValueError unless copies can be taught with this weight of their diversity."""
    if not 0 <= diversity < float("inf"):
        raise ValueError(f"diversity is {diversity}, expected a finite number of at least 0")
    if not diversity:
        return
    if not averaged_layers(model):
        raise ValueError(
            f"diversity is {diversity}, but no layer averages copies with words of their own, as "
            "'int2g64 + int2g64 hadamard' makes them"
        )
    if model.plan is None:
        raise ValueError(f"diversity is {diversity}, but the model has no plan with its rotations")


@dataclass(frozen=True)
class _Copy:
    """A copy of a layer in training, as a layer of its own."""

    layer: Any
    sink: Any
    weight: Array  # that it started with

    def error(self, x: Array, float_outputs: Array) -> Array:
        y = np.empty_like(float_outputs)
        _core.linear_forward(self.layer, x, y)
        return np.asarray(y - self.weight * float_outputs)


class Diversity:
    """The diversity of a student's copies, and its way back.

    Parameters
    ----------
    student : Student
    quantized : QuantizedModel
        That the student was made of; see `check_diversity`.
    teacher : Model
        The float model, as it was loaded.
    weight : float
        Of the mean over layers.

    Raises
    ------
    ValueError
        If the teacher's layers do not fit.
    """

    def __init__(
        self, student: Student, quantized: QuantizedModel, teacher: Model, weight: float
    ) -> None:
        assert quantized.plan is not None
        self._student, self._weight = student, weight
        floats = dict(rotate(teacher, quantized.plan.rotation, quantized.plan.seed).linears())
        self._copies: dict[tuple[int, str], list[_Copy]] = {}
        self._floats: dict[tuple[int, str], Linear] = {}
        slots = {slot.name: slot for slot in SLOTS}
        for place in averaged_layers(quantized):
            index, name = place
            linear, whole = quantized.blocks[index].linears[name], name_in_block(index, slots[name])
            known = floats[whole]
            assert isinstance(linear, QuantizedLinear)
            if not isinstance(known, Linear) or known.shape != linear.shape:
                raise ValueError(
                    f"{whole} of the teacher is {known.shape}, expected {linear.shape}"
                )
            self._floats[place] = known.replace(bias=None)
            self._copies[place] = [
                _Copy(layer, sink, copy.weight)
                for copy, (layer, sink) in zip(
                    linear.copies, student.copies_alone(index, name), strict=True
                )
                if copy.weight is not None
            ]
        self._taps = {slot.name: slot.tap for slot in SLOTS}

    def pull(self, run: Pass, index: int, share: float) -> float:
        """Add the gradients of a block's copies to the student's; return the block's part.

        Parameters
        ----------
        run : Pass
            Of the student, inside `Student.collecting`.
        index : int
            The block.
        share : float
            Of this window in the loss of a step.

        Returns
        -------
        float
            The sum over the block's layers, divided by the number of all; before weight and share.

        Raises
        ------
        NumericalError
            If errors are linearly dependent.
        """
        names = [name for block, name in self._copies if block == index]
        if not names:
            return 0.0
        taps: dict[str, Array] = {}
        self._student.model.block_forward(index, run.before(index).copy(), taps)
        return sum(self._pull((index, n), taps[self._taps[n]], share) for n in names)

    def _pull(self, place: tuple[int, str], x: Array, share: float) -> float:
        copies, float_outputs = self._copies[place], self._floats[place].forward(x)
        try:
            value, gradients = diversity_loss([c.error(x, float_outputs) for c in copies])
        except NumericalError as error:
            raise NumericalError(f"block {place[0]}, {place[1]}: {error}") from error
        part = self._weight * share / len(self._copies)
        for copy, gradient in zip(copies, gradients, strict=True):
            g = np.ascontiguousarray(part * gradient, np.float32)
            _core.linear_backward(copy.layer, x, g, copy.sink, None)
        return value / len(self._copies)


def _averages(linear: Any) -> bool:
    if not isinstance(linear, QuantizedLinear) or len(linear.copies) < 2:
        return False
    own = {id(copy.tensor) for copy in linear.copies}
    return len(own) == len(linear.copies) and all(c.weight is not None for c in linear.copies)
