"""Fold rotations into a float model without changing what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.linears import Linear
from lowbitq.models.decoder import Block, Model
from lowbitq.models.slots import SLOTS, TAPS, name_in_block
from lowbitq.rotations import Rotation

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_TAP_OF = {slot.name: slot.tap for slot in SLOTS}


def rotate(
    model: Model, kind: str | Rotation = "hadamard", seed: int = 0, *, online_down: bool = True
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
        In float32, and not yet rotated unless `kind` is ``"none"``. Left unchanged.
    kind : {"hadamard", "orthogonal", "none"} or Rotation, default="hadamard"
        R itself, such as `optimize_rotation` returns it, or its kind; P and Q are Hadamard.
        ``"none"``: an equal model, whether rotated or not, with unchanged norm gains.
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
        If `kind` is unknown or of another order than the residual stream, or the model is rotated
        or quantized already.

    References
    ----------
    S. Ashkboos et al., "QuaRot: Outlier-free 4-bit inference in rotated LLMs", 2024, section 4.

    Examples
    --------
    >>> rotate(model, seed=1).residual_rotation  # doctest: +SKIP
    Rotation(576, 'hadamard', seed=1, stream=0)
    """
    if not isinstance(kind, Rotation) and kind not in ("hadamard", "orthogonal", "none"):
        raise ValueError(
            f"kind is {kind!r}, expected 'hadamard', 'orthogonal', 'none' or a Rotation"
        )
    _check_float(model)
    rotated = model.copy()
    if kind == "none":
        return rotated
    if model.residual_rotation is not None or any(x.rotation for _, x in model.linears()):
        raise ValueError("model is rotated already; rotate the original, or with kind 'none'")
    hidden = model.config.hidden_size
    residual = kind if isinstance(kind, Rotation) else Rotation(hidden, kind, seed)
    if residual.n != hidden:
        raise ValueError(f"kind has order {residual.n}, expected {hidden}, the residual stream's")
    rotated.residual_rotation = residual
    for index, block in enumerate(rotated.blocks):
        inner = Rotation(model.config.intermediate_size, seed=seed, stream=2 * index + 2)
        head = _head_rotation(model, index, seed)
        _rotate_block(block, residual, head, inner if online_down else None)
    return rotated


def rotate_inputs(model: Model, rotations: Mapping[str, Rotation | None]) -> Model:
    """Let layers of a float model rotate their inputs, without changing what it computes.

    Parameters
    ----------
    model : Model
        In float32. Left unchanged.
    rotations : mapping of str to Rotation or None
        By the name of a layer, whose weights W become W R^T; None: stays as it is. Layers with the
        same input, such as q, k and v, have the same rotation, so that it is rotated once.

    Returns
    -------
    Model
        Its logits equal the original's up to rounding. `compress` it with ``rotation="none"``.

    Raises
    ------
    KeyError
        If the model has no layer of a name.
    ValueError
        If a rotation has another order, layers with the same input differ, or a layer rotates its
        input already, or is quantized.

    Examples
    --------
    >>> turn = {"model.layers.0.mlp.down_proj": Rotation(1536)}
    >>> rotate_inputs(model, turn).linears()  # doctest: +SKIP
    """
    _check_float(model)
    rotated = model.copy()
    known = dict(model.linears())
    if unknown := [name for name in rotations if name not in known]:
        raise KeyError(f"the model has no linear layer {unknown[0]!r}")
    for index in range(len(model.blocks)):
        for slots in TAPS.values():
            names = [name_in_block(index, slot) for slot in slots]
            found = [rotations.get(name) for name in names]
            if any(rotation is not found[0] for rotation in found):
                raise ValueError(f"{', '.join(names)} read the same input, expected one rotation")
            for name in names if found[0] is not None else ():
                rotated.replace_linear(name, _rotating(known[name], found[0], name))
    return rotated


def _rotating(linear: Any, rotation: Any, name: str) -> Any:
    if linear.rotation is not None:
        raise ValueError(f"{name} rotates its input already")
    if rotation.n != linear.shape[1]:
        raise ValueError(f"rotation of {name} has order {rotation.n}, expected {linear.shape[1]}")
    return linear.replace(weight=rotation.apply(linear.weight), rotation=rotation)


def _check_float(model: Model) -> None:
    if not all(isinstance(linear, Linear) for _, linear in model.linears()):
        raise ValueError("model is quantized already; rotate the float original")


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
        v, gate and up, P for o, Q for down; a layer's own rotation comes on top.

    Raises
    ------
    ValueError
        If a gain is zero, because that channel's value before the gain is unknown.
    """
    changes: dict[str, Float64] = {}  # by tap; the others stay
    turn = rotated.residual_rotation
    if turn is not None and turn is not model.residual_rotation:
        block, residual = model.blocks[index], _matrix(turn)
        for tap, gain in (("qkv", block.attention_norm), ("mlp", block.mlp_norm)):
            if gain is not None and not gain.all():
                raise ValueError(f"a norm of block {index} has gains of 0: give text, not Hessians")
            changes[tap] = residual if gain is None else residual / gain
        head = _matrix(_head_rotation(model, index, seed))
        changes["o"] = np.asarray(np.kron(np.eye(model.config.heads), head), np.float64)
    for tap, slots in TAPS.items():
        own = rotated.blocks[index].linears[slots[0].name].rotation
        if own is not None:
            changes[tap] = _matrix(own) @ changes[tap] if tap in changes else _matrix(own)
    found = dict(hessians)
    for name in found.keys() & {slot.name for tap in changes for slot in TAPS[tap]}:
        change = changes[_TAP_OF[name]]
        found[name] = np.ascontiguousarray(change @ hessians[name] @ change.T)
    return found


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
