"""rotate(): fold rotations into a float model without changing what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.linears import Linear
from lowbitq.models.decoder import Block, Model
from lowbitq.models.slots import SLOTS
from lowbitq.rotations import Rotation

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def rotate(
    model: Model, kind: str = "hadamard", seed: int = 0, *, online_down: bool = True
) -> Model:
    """Rotate a float model without changing what it computes.

    Let R rotate the residual stream, P each value head of a block, and Q a block's inner
    activations. The weights of a block become

        q, k          W diag(gain) R^T
        v             P W diag(gain) R^T,  P b   (P on every head)
        o             R W P^T,  R b              (P on every head)
        gate, up      W diag(gain) R^T
        down          R W Q^T,  R b, with Q applied to its input as the model runs

    and the norm gains become ones (None). The embedding, the final norm and the head do not change:
    the model applies R after the embedding and R^T before the final norm.

    Parameters
    ----------
    model : Model
        In float32 and not yet rotated. Left unchanged.
    kind : {"hadamard", "orthogonal", "none"}, default="hadamard"
        Kind of the residual rotation R; P and Q are Hadamard. ``"none"``: an equal model with
        unchanged norm gains.
    seed : int, default=0
        Seed of all rotations; each draws its own signs.
    online_down : bool, default=True
        Whether to use Q. It costs one fast transform per token and block, and reduces outliers in
        the activations that are hardest to quantize.

    Returns
    -------
    Model
        Its logits equal the original's up to rounding.

    Raises
    ------
    ValueError
        If `kind` is unknown, or the model is rotated or quantized already.

    References
    ----------
    S. Ashkboos et al., "QuaRot: Outlier-free 4-bit inference in rotated LLMs", 2024, section 4.

    Examples
    --------
    >>> rotate(model, seed=1).residual_rotation  # doctest: +SKIP
    Rotation(576, 'hadamard', seed=1, stream=0)
    """
    if kind not in ("hadamard", "orthogonal", "none"):
        raise ValueError(f"kind is {kind!r}, expected 'hadamard', 'orthogonal' or 'none'")
    linears = [linear for block in model.blocks for linear in block.linears.values()]
    if model.residual_rotation is not None or any(x.rotation is not None for x in linears):
        raise ValueError("model is rotated already; rotate the original")
    if not all(hasattr(linear, "weight") for linear in linears):
        raise ValueError("model is quantized already; rotate the float original")
    rotated = model.copy()
    if kind == "none":
        return rotated
    residual = Rotation(model.config.hidden_size, kind, seed)
    rotated.residual_rotation = residual
    for index, block in enumerate(rotated.blocks):
        inner = Rotation(model.config.intermediate_size, seed=seed, stream=2 * index + 2)
        head = _head_rotation(model, index, seed)
        _rotate_block(block, residual, head, inner if online_down else None)
    return rotated


def rotate_hessians(
    model: Model, rotated: Model, index: int, hessians: Mapping[str, Float64], seed: int
) -> dict[str, Float64]:
    """Return the Hessians of a block in a rotated model, given those in the original.

    Parameters
    ----------
    model, rotated : Model
        Argument and result of `rotate` with `seed`.
    index : int
        Index of the block.
    hessians : mapping of str to ndarray of shape (in, in), float64
        ``sum x x^T`` over the inputs of layers in `model`, symmetric, by the names of
        `Block.linears`.
    seed : int

    Returns
    -------
    dict of str to ndarray of shape (in, in), float64
        Hessians of the rotated layers' inputs: ``A H A^T`` with ``A = R diag(1 / gain)`` for q, k,
        v, gate and up, P for o, Q for down.

    Raises
    ------
    ValueError
        If a gain is zero, because that channel's value before the gain is unknown.
    """
    if rotated.residual_rotation is None:
        return dict(hessians)
    block, residual = model.blocks[index], _matrix(rotated.residual_rotation)
    changes: dict[str, Float64] = {}
    for tap, gain in (("qkv", block.attention_norm), ("mlp", block.mlp_norm)):
        if gain is not None and not gain.all():
            raise ValueError(f"a norm of block {index} has gains of 0: give text, not Hessians")
        changes[tap] = residual if gain is None else residual / gain
    head = _matrix(_head_rotation(model, index, seed))
    changes["o"] = np.asarray(np.kron(np.eye(model.config.heads), head), np.float64)
    inner = rotated.blocks[index].linears["down_proj"].rotation
    changes["down"] = np.eye(model.config.intermediate_size) if inner is None else _matrix(inner)
    by_layer = {slot.name: changes[slot.tap] for slot in SLOTS}
    return {
        name: np.ascontiguousarray(by_layer[name] @ hessian @ by_layer[name].T)
        for name, hessian in hessians.items()
    }


def _head_rotation(model: Model, index: int, seed: int) -> Rotation:
    return Rotation(model.config.head_dim, seed=seed, stream=2 * index + 1)


def _matrix(rotation: Rotation) -> Float64:
    return rotation.matrix().astype(np.float64)


def _rotate_block(block: Block, residual: Rotation, head: Rotation, inner: Rotation | None) -> None:
    linears: dict[str, Any] = block.linears
    for name in ("q_proj", "k_proj", "v_proj"):
        linears[name] = _fused(linears[name], block.attention_norm, residual)
    for name in ("gate_proj", "up_proj"):
        linears[name] = _fused(linears[name], block.mlp_norm, residual)
    block.attention_norm = block.mlp_norm = None
    v, o, down = linears["v_proj"], linears["o_proj"], linears["down_proj"]
    linears["v_proj"] = v.replace(weight=_outputs(head, v.weight), bias=_outputs(head, v.bias))
    linears["o_proj"] = o.replace(
        weight=_outputs(residual, _inputs(head, o.weight)), bias=_outputs(residual, o.bias)
    )
    down_weight = down.weight if inner is None else inner.apply(down.weight)
    linears["down_proj"] = down.replace(
        weight=_outputs(residual, down_weight), bias=_outputs(residual, down.bias), rotation=inner
    )


def _fused(linear: Linear, gain: Float32 | None, rotation: Rotation) -> Any:
    """Return W diag(gain) R^T, a layer for rotated activations not yet multiplied by `gain`."""
    weight = linear.weight if gain is None else linear.weight * gain
    return linear.replace(weight=rotation.apply(weight))


def _inputs(rotation: Rotation, weight: Float32) -> Float32:
    """Return W R^T, applied to each head (R's order) of W's columns."""
    return rotation.apply(weight.reshape(-1, rotation.n)).reshape(weight.shape)


def _outputs(rotation: Rotation, weight: Float32 | None) -> Float32 | None:
    """Return R W or R b, applied to each head (R's order) of the rows; None if there is no bias."""
    if weight is None:
        return None
    return np.ascontiguousarray(_inputs(rotation, np.ascontiguousarray(weight.T)).T)
