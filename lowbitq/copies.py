"""Copies: a layer as a sum of quantized copies of its weights, each in a rotation of its own.

    y = sum_i weight_i (W_i act_i(R_i x))

A copy is planned in one of three modes. ``own``: W_i rounds the weights themselves, W R_i^T.
``shared``: it has the words of the first copy, and its rotation T is where it rounds its input, so
that W_1 R_1 multiplies R_1^T T^T round(T R_1 x): no bits, and errors of 4-bit inputs average out.
Copies of both modes are averaged, with the weights that least squares gives each output.
``residual``: W_i rounds what the sum of the copies before it leaves, so that error feedback
minimises the error of the sum; its weights are ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.formats import Format
from lowbitq.gptq import Feedback, feedback, gptq, product, symmetric
from lowbitq.linears import Activation, Copy, Linear
from lowbitq.plan_options import Rounding
from lowbitq.plans import CopyPlan, LayerPlan
from lowbitq.quantizers import quantize, relative_error
from lowbitq.rotations import Rotation
from lowbitq.tensors import QuantizedTensor

Record = dict[str, Any]
Wide = NDArray[np.float64]

# Rotations of copies are drawn from other streams than those of the model.
_STREAM = 1 << 20


class LayerInputs:
    """What rounding needs to know about a layer's inputs; layers with the same input share it.

    Parameters
    ----------
    hessian : ndarray of shape (cols, cols), float64, or None
        ``sum_t x_t x_t^T`` over the inputs, upper triangle. None: unknown; only rounding to nearest
        is possible.

    Examples
    --------
    >>> inputs = LayerInputs(np.eye(64))
    >>> inputs.feedback(Format("int4"), Rounding()) is inputs.feedback(Format("int2"), Rounding())
    True
    """

    def __init__(self, hessian: Wide | None = None) -> None:
        self.hessian = hessian
        self._factors: dict[tuple[object, ...], Feedback] = {}
        self._turned: dict[tuple[object, ...], LayerInputs] = {}

    def feedback(self, format: Format, rounding: Rounding) -> Feedback:
        """Return the factored Hessian, computed once for each group, run and way to factor it.

        Raises
        ------
        ValueError
            If there is no Hessian.
        """
        if self.hessian is None:
            raise ValueError("method 'gptq' needs the Hessian of the layer's inputs, found None")
        options = {
            name: getattr(rounding, name)
            for name in ("order", "damping", "damping_by", "arithmetic")
        }
        key = (format.group, format.run, *options.values())
        if key not in self._factors:
            self._factors[key] = feedback(
                self.hessian, group=format.group, run=format.run, **options
            )
        return self._factors[key]

    def turned(self, turn: Turn) -> LayerInputs:
        """Return what is known of the inputs T x; in float64, since H may be badly conditioned."""
        if turn.key not in self._turned:
            hessian = None
            if self.hessian is not None:
                hessian = product(product(turn.matrix, symmetric(self.hessian)), turn.matrix)
            self._turned[turn.key] = LayerInputs(hessian)
        return self._turned[turn.key]


@dataclass(frozen=True, eq=False)
class Turn:
    """The rotation R_i of a copy, and T = R_i R^T, R being that of the layer's weights.

    Attributes
    ----------
    rotation : Rotation
    matrix : ndarray of shape (cols, cols), float64
        T.
    key : tuple
        Equal for equal rotations.
    """

    rotation: Rotation
    matrix: Wide = field(repr=False)
    key: tuple[object, ...]

    @classmethod
    def of(cls, kind: str, seed: int, index: int, linear: Linear) -> Turn:
        """Make the rotation of copy number `index`."""
        cols = linear.shape[1]
        rotation = Rotation(cols, kind, seed, stream=_STREAM + index)
        T = rotation.matrix().astype(np.float64)
        if linear.rotation is not None:
            T = product(T, linear.rotation.matrix().astype(np.float64))
        return cls(rotation, T, (kind, seed, index))


def check_copies(plan: LayerPlan, name: str) -> None:
    """Raise ValueError unless `round_copies` can follow the plan."""
    averaged = True
    for copy in plan.copies:
        if copy.mode == "shared" and copy.format != plan.copies[0].format:
            raise ValueError(
                f"{name}: copy is '{copy}', but a shared copy has the words of the first one: "
                f"expected format {plan.copies[0].format}"
            )
        if copy.mode == "shared" and copy.rotation and copy.activation_bits is None:
            raise ValueError(
                f"{name}: copy is '{copy}', but a shared copy rotates for rounding its input: "
                "expected a4 or a8"
            )
        if copy.mode != "residual" and not averaged:
            raise ValueError(f"{name}: copy '{copy}' follows a residual copy in plan '{plan}'")
        averaged = copy.mode != "residual"


def round_copies(
    linear: Linear, inputs: LayerInputs, plan: LayerPlan, seed: int = 0
) -> tuple[tuple[Copy, ...], NDArray[np.float32], Record]:
    """Round the weights of a layer to the copies of its plan.

    Parameters
    ----------
    linear : Linear
    inputs : LayerInputs
        After the layer's rotation, as the weights see them.
    plan : LayerPlan
        Its rank is ignored.
    seed : int, default=0
        Of the copies' rotations.

    Returns
    -------
    copies : tuple of Copy
    sum : ndarray of shape (rows, cols), float32
        What they stand for, in the basis of the layer's weights.
    record : dict
        As of `round_matrix`. For several copies also ``errors``, the relative error after each of
        them, and ``correlation``: of the error that the first one leaves with the next one's
        outputs (``residual``: 1 if that is all it carries) or with the next one's error (``own``: 0
        if averaging halves the error, 1 if it is useless); ``output_correlation``: of the outputs
        of the first two. A residual compensates if the one is high and the other at most 0.
    """
    how = plan.rounding
    if len(plan.copies) == 1 and plan.copies[0].rotation is None:
        [only] = plan.copies
        tensor, record = round_matrix(linear.weight, inputs, Format.parse(only.format), how)
        copy = Copy(tensor, linear.rotation, activation=Activation(only.activation_bits))
        return (copy,), tensor.dequantize(), record
    metric = _Metric(linear.weight, None if how.method == "rtn" else inputs)
    made: list[Copy] = []
    parts: list[NDArray[np.float32]] = []  # what each stands for, without its fusion weights
    total = np.zeros_like(linear.weight)
    weights: NDArray[np.float32] | None = None
    errors: list[float] = []
    record = {}
    for index, one in enumerate(plan.copies):
        if one.mode == "shared":
            made.append(_shared(made[0], one, seed, index))
            value = parts[0]
        else:
            turn = None if one.rotation is None else Turn.of(one.rotation, seed, index, linear)
            target = linear.weight - total if one.mode == "residual" else linear.weight
            tensor, value, found = _round_turned(target, inputs, one, how, turn)
            record = found | record
            rotation = linear.rotation if turn is None else turn.rotation
            made.append(Copy(tensor, rotation, activation=Activation(one.activation_bits)))
        parts.append(value)
        if one.mode == "residual":
            total = total + value
        elif index:
            weights = fusion_weights(metric, parts)
            total = np.einsum("ir,irk->rk", weights, np.stack(parts))
        else:
            total = value
        errors.append(metric.relative(linear.weight - total))
    if weights is not None:
        for index, weight in enumerate(weights):
            made[index] = replace(made[index], weight=weight)
    record["format"] = " + ".join(map(str, plan.copies))
    record["relative_error"] = errors[-1]
    if len(made) > 1:
        first = linear.weight - parts[0]
        other = parts[1] if plan.copies[1].mode == "residual" else linear.weight - parts[1]
        record |= {
            "errors": errors,
            "correlation": metric.correlation(first, other),
            "output_correlation": metric.correlation(*parts[:2]),
        }
    return tuple(made), total, record


def _shared(first: Copy, plan: CopyPlan, seed: int, index: int) -> Copy:
    """The first copy again, which rounds its input in a rotation of its own."""
    cols = first.tensor.cols
    basis = plan.rotation and Rotation(cols, plan.rotation, seed, stream=_STREAM + index)
    return replace(first, activation=Activation(plan.activation_bits, rotation=basis or None))


def _round_turned(
    weight: NDArray[np.float32],
    inputs: LayerInputs,
    copy: CopyPlan,
    how: Rounding,
    turn: Turn | None,
) -> tuple[QuantizedTensor, NDArray[np.float32], Record]:
    """Round W T^T; return also what it stands for in the basis of W."""
    format = Format.parse(copy.format)
    if turn is None:
        tensor, record = round_matrix(weight, inputs, format, how)
        return tensor, tensor.dequantize(), record
    turned = product(weight.astype(np.float64), turn.matrix).astype(np.float32)
    tensor, record = round_matrix(turned, inputs.turned(turn), format, how)
    back = np.ascontiguousarray(turn.matrix.T)
    value = product(tensor.dequantize().astype(np.float64), back).astype(np.float32)
    return tensor, value, record


def round_matrix(
    weight: NDArray[np.float32], inputs: LayerInputs, format: Format, how: Rounding
) -> tuple[QuantizedTensor, Record]:
    """Round one matrix for its inputs; the record is that of `encoding.encode`."""
    record: Record = {"format": str(format)}
    if how.method == "rtn":
        tensor = quantize(weight, format, range=how.range, norm=how.norm)
        error = float(relative_error(weight, tensor.dequantize())) if weight.any() else 0.0
        return tensor, record | {"relative_error": error}
    known = inputs.feedback(format, how)
    tensor, error = gptq(
        weight,
        known,
        format,
        range=how.range,
        norm=how.norm,
        importance=how.importance,
        sweeps=how.sweeps_for(format),
    )
    record |= {"damping": known.damping, "retries": known.retries}
    return tensor, record | {"dead": int(known.dead.sum()), "relative_error": error}


class _Metric:
    """The inner product <A, B> = tr(A H B^T) of errors of the weights; H = I if it is unknown."""

    def __init__(self, weight: NDArray[np.float32], inputs: LayerInputs | None) -> None:
        self.weight = weight
        hessian = None if inputs is None else inputs.hessian
        self._hessian = None if hessian is None else symmetric(hessian)

    def times(self, matrix: NDArray[np.float32]) -> Wide:
        """Return A H."""
        wide = matrix.astype(np.float64)
        return wide if self._hessian is None else product(wide, self._hessian)

    def relative(self, error: NDArray[np.float32]) -> float:
        """Return <E, E> / <W, W>; 0 if W is zero."""
        size = float((self.weight * self.times(self.weight)).sum())
        return float((error * self.times(error)).sum()) / size if size > 0 else 0.0

    def correlation(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        """Return <A, B> / (|A| |B|); 0 if one is zero."""
        of_a, of_b = self.times(a), self.times(b)
        size = float((a * of_a).sum()) * float((b * of_b).sum())
        return float((a * of_b).sum()) / size**0.5 if size > 0 else 0.0


def fusion_weights(metric: _Metric, parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the weights (copies, rows) of the sum that comes nearest to W, row by row.

    They solve ``G w = b``, ``G_ij = q_i H q_j^T``, ``b_i = q_i H w^T``, and are rounded to float16.
    A row for which equal weights are no worse has these; so have all if the parts are one matrix.
    """
    if all(part is parts[0] for part in parts):
        return np.full((len(parts), len(parts[0])), np.float16(1 / len(parts)), np.float32)
    matrices = np.stack(parts)
    of_parts = np.stack([metric.times(part) for part in parts])
    gram = np.einsum("irk,jrk->rij", matrices, of_parts)
    right = np.einsum("rk,irk->ri", metric.weight, of_parts)
    best = np.einsum("rij,rj->ri", np.linalg.pinv(gram, hermitian=True), right)
    equal = np.full_like(best, 1 / len(parts))
    choices = [w.astype(np.float16).astype(np.float64) for w in (best, equal)]
    costs = [
        np.einsum("ri,rij,rj->r", w, gram, w) - 2 * np.einsum("ri,ri->r", w, right) for w in choices
    ]
    chosen = np.where((costs[0] < costs[1])[:, None], *choices)
    return np.ascontiguousarray(chosen.T, np.float32)
