"""encode(): pack a float layer as a LayerPlan says, given statistics of its inputs."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.formats import Format
from lowbitq.gptq import Feedback, feedback, gptq
from lowbitq.linears import Linear, QuantizedLinear
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
        took; ``dead`` inputs; ``seconds``; ``sha256`` of the packed codes and scales.

    Raises
    ------
    ValueError
        If the weights have a NaN or an infinity, or shapes do not fit.

    Examples
    --------
    >>> linear = Linear(np.random.default_rng(0).standard_normal((16, 64), np.float32))
    >>> layer, record = encode(linear, LayerInputs(np.eye(64)), LayerPlan.parse("int4g64"))
    >>> layer.shape, record["relative_error"] < 0.01
    ((16, 64), True)
    """
    if len(plan.copies) != 1 or plan.rank or plan.copies[0].rotation is not None:
        raise ValueError(f"plan is '{plan}', expected one copy in the rotation of the model")
    started = time.perf_counter()
    [copy] = plan.copies
    tensor, record = _round(linear.weight, inputs, Format.parse(copy.format), plan.rounding)
    record |= {
        "seconds": round(time.perf_counter() - started, 4),
        "sha256": hashlib.sha256(tensor.panels.data).hexdigest(),
    }
    return QuantizedLinear.of(tensor, linear.bias, linear.rotation, copy.activation_bits), record


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
        sweeps=how.sweeps_for(format.rate),
    )
    record |= {"damping": known.damping, "retries": known.retries}
    return tensor, record | {"dead": int(known.dead.sum()), "relative_error": error}
