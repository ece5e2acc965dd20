"""encode(): pack a float layer as a LayerPlan says, given statistics of its inputs."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.adapters import as_stored, low_rank
from lowbitq.checkpoints.archives import digest
from lowbitq.formats import Format
from lowbitq.gptq import Feedback, feedback, gptq, product
from lowbitq.linears import Activation, Adapter, Copy, Linear, QuantizedLinear
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.stored import LayerWriter
from lowbitq.plans import LayerPlan, Rounding
from lowbitq.quantizers import quantize, relative_error
from lowbitq.tensors import QuantizedTensor

Record = dict[str, Any]


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

    def __init__(self, hessian: NDArray[np.float64] | None = None) -> None:
        self.hessian = hessian
        self._factors: dict[tuple[object, ...], Feedback] = {}

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


def check_plan(plan: LayerPlan, shape: tuple[int, int], name: str = "the layer") -> None:
    """Raise ValueError unless `encode` can follow the plan for weights of this shape."""
    if len(plan.copies) != 1 or plan.copies[0].rotation is not None:
        raise ValueError(
            f"{name}: plan is '{plan}', expected one copy in the rotation of the model"
        )
    if plan.rank > min(shape):
        raise ValueError(
            f"{name}: rank is {plan.rank}, expected at most {min(shape)} for {shape[0]} x "
            f"{shape[1]} weights"
        )


def encode(linear: Linear, inputs: LayerInputs, plan: LayerPlan) -> tuple[QuantizedLinear, Record]:
    """Quantize one layer.

    Parameters
    ----------
    linear : Linear
        Left unchanged; bias and rotation are kept.
    inputs : LayerInputs
        After the layer's rotation, as the weights see them.
    plan : LayerPlan

    Returns
    -------
    layer : QuantizedLinear
    record : dict
        ``format``; ``relative_error`` of the outputs on the calibration inputs (of the weights if
        they are rounded to nearest); the ``damping`` added to the diagonal and the ``retries`` it
        took; ``dead`` inputs; ``rank`` of the adapter, if there is one; ``seconds``; ``sha256`` of
        the packed codes and scales, and the adapter.

    Raises
    ------
    ValueError
        If the weights have a NaN or an infinity, shapes do not fit, or the plan has several copies
        or a rank above ``min(rows, cols)``.

    References
    ----------
    R. Saha et al., "Compressing Large Language Models using Low Rank and Low Precision
    Decomposition" (CALDERA), 2024 (the alternation; its factors are quantized, ours float16).

    Examples
    --------
    >>> linear = Linear(np.random.default_rng(0).standard_normal((16, 64), np.float32))
    >>> layer, record = encode(linear, LayerInputs(np.eye(64)), LayerPlan.parse("int4g64"))
    >>> layer.shape, record["relative_error"] < 0.01
    ((16, 64), True)
    """
    check_plan(plan, linear.shape)
    started = time.perf_counter()
    adapter = None
    if plan.rank:
        tensor, adapter, record = _round_with_adapter(linear, inputs, plan)
    else:
        tensor, record = _round(linear.weight, inputs, _format(plan), plan.rounding)
    layer = layer_of(tensor, adapter, linear, plan)
    record |= {"seconds": round(time.perf_counter() - started, 4), "sha256": layer_digest(layer)}
    return layer, record


def layer_digest(layer: QuantizedLinear) -> str:
    """Return the SHA-256 of a layer's packed codes and scales, and of its adapter."""
    total = hashlib.sha256()
    for copy in layer.copies:
        total.update(copy.tensor.panels.data)
    for array in layer.adapter or ():
        total.update(array.data)
    return total.hexdigest()


def trained_records(before: QuantizedModel, after: QuantizedModel) -> dict[str, Record]:
    """Return the records of a model, true again after training has changed some of its matrices.

    Parameters
    ----------
    before, after : QuantizedModel
        With the same matrices. What has changed has a new ``sha256``, no ``relative_error``, which
        was of the arrays before, and the mark ``trained``.
    """
    found = {name: dict(record) for name, record in before.records.items()}
    for (name, old), (_, new) in zip(before.matrices(), after.matrices(), strict=True):
        if name in found and isinstance(new, QuantizedLinear) and _stored(old) != _stored(new):
            found[name].pop("relative_error", None)
            found[name] |= {"sha256": layer_digest(new), "trained": True}
    return found


def _stored(layer: Any) -> str:
    """The digest of everything that is stored of a layer."""
    writer = LayerWriter()
    about = np.array(json.dumps(writer.layer("", layer)))
    return digest(writer.arrays | {"about": about})


def layer_of(
    tensor: QuantizedTensor, adapter: Adapter | None, linear: Linear, plan: LayerPlan
) -> QuantizedLinear:
    """Return the layer that `encode` makes of a tensor and an adapter."""
    [copy] = plan.copies
    activation = Activation(copy.activation_bits)
    return QuantizedLinear(
        (Copy(tensor, linear.rotation, activation=activation),), linear.bias, adapter
    )


def _format(plan: LayerPlan) -> Format:
    return Format.parse(plan.copies[0].format)


def _round(
    weight: NDArray[np.float32], inputs: LayerInputs, format: Format, how: Rounding
) -> tuple[QuantizedTensor, Record]:
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


def _round_with_adapter(
    linear: Linear, inputs: LayerInputs, plan: LayerPlan
) -> tuple[QuantizedTensor, Adapter, Record]:
    """Round and fit the adapter in turns; return the turn with the smallest recorded error.

    A turn may increase the error: rounding does not minimise it exactly.
    """
    how, format = plan.rounding, _format(plan)
    weight, hessian, damped = linear.weight, None, None
    if how.method != "rtn":
        known = inputs.feedback(format, how)
        weight = np.where(known.dead, np.float32(0), weight)
        hessian, damped = known.hessian, known.damped
    size = _squares(weight, hessian)
    best: tuple[QuantizedTensor, Adapter, Record] | None = None
    rest = weight
    for _ in range(1 + how.alternations):
        tensor, record = _round(rest, inputs, format, how)
        error = weight - tensor.dequantize()
        adapter = _adapter(error, damped, plan.rank, linear)
        product = _as_weights(adapter, linear)
        found = _squares(error - product, hessian) / size if size > 0 else 0.0
        if best is not None and found >= best[2]["relative_error"]:
            break
        best = tensor, adapter, record | {"rank": plan.rank, "relative_error": found}
        rest = weight - product
    assert best is not None
    return best


def _adapter(
    error: NDArray[np.float32], hessian: NDArray[np.float64] | None, rank: int, linear: Linear
) -> Adapter:
    """Fit an adapter to the error of the weights; V is turned back, for the layer's raw input."""
    U, V = low_rank(error, hessian, rank)
    rows = np.ascontiguousarray(V.T, np.float32)
    if linear.rotation is not None:
        rows = linear.rotation.inverse(rows)
    return as_stored(U), as_stored(rows.T)


def _as_weights(adapter: Adapter, linear: Linear) -> NDArray[np.float32]:
    """Return U V^T for inputs as the weights see them."""
    U, V = adapter
    seen = linear.rotate_input(np.ascontiguousarray(V.T)).T
    wide = (np.ascontiguousarray(x, np.float64) for x in (U, seen))
    return product(*wide).astype(np.float32)


def _squares(error: NDArray[np.float32], hessian: NDArray[np.float64] | None) -> float:
    """Return tr(E H E^T)."""
    if hessian is None:
        return float(np.square(error, dtype=np.float64).sum())
    return _core.hessian_error(hessian, error)
