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
from lowbitq.copies import LayerInputs, Record, check_copies, round_copies
from lowbitq.formats import Format
from lowbitq.gptq import product
from lowbitq.linears import Adapter, Copy, Linear, QuantizedLinear
from lowbitq.models.quantized import QuantizedModel
from lowbitq.models.stored import LayerWriter
from lowbitq.plans import LayerPlan


def check_plan(plan: LayerPlan, shape: tuple[int, int], name: str = "the layer") -> None:
    """Raise ValueError unless `encode` can follow the plan for weights of this shape."""
    check_copies(plan, name)
    if plan.rank > min(shape):
        raise ValueError(
            f"{name}: rank is {plan.rank}, expected at most {min(shape)} for {shape[0]} x "
            f"{shape[1]} weights"
        )


def encode(
    linear: Linear, inputs: LayerInputs, plan: LayerPlan, seed: int = 0
) -> tuple[QuantizedLinear, Record]:
    """Quantize one layer.

    Parameters
    ----------
    linear : Linear
        Left unchanged; bias and rotation are kept.
    inputs : LayerInputs
        After the layer's rotation, as the weights see them.
    plan : LayerPlan
    seed : int, default=0
        Of the rotations of copies that have their own.

    Returns
    -------
    layer : QuantizedLinear
    record : dict
        ``format``; ``relative_error`` of the outputs on the calibration inputs (of the weights if
        they are rounded to nearest); the ``damping`` added to the diagonal and the ``retries`` it
        took (by the first copy); ``dead`` inputs; ``errors`` and ``correlation`` of several copies,
        see `lowbitq.copies.round_copies`; ``rank`` of the adapter, if there is one; ``seconds``;
        ``sha256`` of the packed codes and scales, and the adapter.

    Raises
    ------
    ValueError
        If the weights have a NaN or an infinity, shapes do not fit, or the plan has a rank above
        ``min(rows, cols)``, a shared copy in another format or rotation than the first, or another
        copy after a residual one.

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
        copies, adapter, record = _round_with_adapter(linear, inputs, plan, seed)
    else:
        copies, _, record = round_copies(linear, inputs, plan, seed)
    layer = QuantizedLinear(copies, linear.bias, adapter)
    record |= {"seconds": round(time.perf_counter() - started, 4), "sha256": layer_digest(layer)}
    return layer, record


def layer_digest(layer: QuantizedLinear) -> str:
    """Return the SHA-256 of the packed codes and scales, fusion weights and adapter of a layer."""
    total = hashlib.sha256()
    for copy in layer.copies:
        total.update(copy.tensor.panels.data)
        if copy.weight is not None:
            total.update(copy.weight.data)
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


def _round_with_adapter(
    linear: Linear, inputs: LayerInputs, plan: LayerPlan, seed: int
) -> tuple[tuple[Copy, ...], Adapter, Record]:
    """Round and fit the adapter in turns; return the turn with the smallest recorded error.

    A turn may increase the error: rounding does not minimise it exactly.
    """
    how = plan.rounding
    weight, hessian, damped = linear.weight, None, None
    if how.method != "rtn":
        known = inputs.feedback(Format.parse(plan.copies[0].format), how)
        weight = np.where(known.dead, np.float32(0), weight)
        hessian, damped = known.hessian, known.damped
    size = _squares(weight, hessian)
    best: tuple[tuple[Copy, ...], Adapter, Record] | None = None
    rest = weight
    for _ in range(1 + how.alternations):
        copies, total, record = round_copies(linear.replace(weight=rest), inputs, plan, seed)
        error = weight - total
        adapter = _adapter(error, damped, plan.rank, linear)
        fitted = _as_weights(adapter, linear)
        found = _squares(error - fitted, hessian) / size if size > 0 else 0.0
        if best is not None and found >= best[2]["relative_error"]:
            break
        best = copies, adapter, record | {"rank": plan.rank, "relative_error": found}
        rest = weight - fitted
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
