"""Plain models: dense layers without rotations, as other programs run them; their folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.checkpoints.folders import new_folder_for_others
from lowbitq.checkpoints.packed import write_json
from lowbitq.checkpoints.safetensors import are_exact, narrowest_of_all, write_safetensors
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models.config import ModelConfig
from lowbitq.models.families import FAMILIES
from lowbitq.models.slots import NORMS, OUTER, SLOTS, TAPS, name_in_block, sizes_of
from lowbitq.rotations import Rotation

AnyLinear = Linear | QuantizedLinear
Float32 = NDArray[np.float32]

DTYPES = ("auto", "float32", "bfloat16", "float16")

# The norm whose gain an input of a block was multiplied by, and the layers that end a half.
_GAINS = {"qkv": "attention_norm", "mlp": "mlp_norm"}
_HALVES = {"o_proj": "attention_scale", "down_proj": "mlp_scale"}


def plain(model: Any) -> Any:
    """Return a copy with dense layers that computes the same in any LLaMA-like program.

    Rotations of layers and of the residual stream are multiplied into the weights, and so are the
    scales of the halves of a block. Rotations of value heads, which v and o hold between them, and
    gains that `rotate` has multiplied into the layers stay where they are.

    Parameters
    ----------
    model : Model
        Float or quantized. Left unchanged.

    Returns
    -------
    Model
        Its logits equal those of `model` with float32 activations, up to rounding.
    """
    residual = model.residual_rotation
    result = model.copy()
    result.residual_rotation = None
    result.embedding = dense(model.embedding)
    result.head = None if model.head is None else dense(model.head)
    for block in result.blocks:
        for slot in SLOTS:
            layer = dense(block.linears[slot.name])
            if residual is not None and slot.tap in _GAINS:
                gain = getattr(block, _GAINS[slot.tap])
                weight = layer.weight if gain is None else layer.weight * gain
                layer = replace(layer, weight=residual.inverse(weight))
            block.linears[slot.name] = _ending(layer, slot.name, block, residual)
        _without_scales(block)
        if residual is not None:
            block.attention_norm = block.mlp_norm = None
    return result


def folded(model: Any) -> Any:
    """Return a copy in which the embedding and the head hold the rotation of the residual stream.

    The layers of the blocks stay packed. A head that was the embedding becomes a matrix of its own,
    because the gain of the final norm is multiplied into it.

    Parameters
    ----------
    model : Model
        Float or quantized. Left unchanged.

    Returns
    -------
    Model
        Without a rotation of the residual stream; its layers may still rotate their inputs.
    """
    result = model.copy()
    for block in result.blocks:
        for name, scale in _HALVES.items():
            if getattr(block, scale) != 1:
                block.linears[name] = _ending(dense(block.linears[name]), name, block, None)
        _without_scales(block)
    residual = model.residual_rotation
    if residual is not None:
        embedding = dense(model.embedding).weight
        head = embedding if model.head is None else dense(model.head).weight
        result.residual_rotation = None
        result.embedding = Linear(residual.apply(embedding))
        result.head = Linear(residual.apply(head * model.final_norm))
        result.final_norm = np.ones_like(model.final_norm)
    return result


def dense(layer: AnyLinear) -> Linear:
    """Return a layer with its weights decoded and without a rotation."""
    if isinstance(layer, Linear) and layer.rotation is None:
        return layer
    return Linear(layer.dequantize(), layer.bias)


def _ending(layer: Linear, name: str, block: Any, residual: Rotation | None) -> Linear:
    """Return the last layer of a half with its scale, and with outputs turned back."""
    if name not in _HALVES:
        return layer
    scale = np.float32(getattr(block, _HALVES[name]))
    weight, bias = layer.weight * scale, None if layer.bias is None else layer.bias * scale
    if residual is not None:
        weight = np.ascontiguousarray(residual.inverse(np.ascontiguousarray(weight.T)).T)
        bias = None if bias is None else residual.inverse(bias[None])[0]
    return Linear(weight, bias)


def _without_scales(block: Any) -> None:
    block.attention_scale = block.mlp_scale = 1.0


def config_now(model: Any, **changes: Any) -> ModelConfig:
    """Return the configuration of a model with the blocks that it has now, for its files.

    Parameters
    ----------
    model : Model
        Its blocks may have been repeated, and its head replaced, since it was loaded.
    **changes
        Other fields of `ModelConfig`.

    Raises
    ------
    ValueError
        If a block lacks rotary embeddings, for which the model's family has no place.
    """
    config: ModelConfig = model.config
    family = FAMILIES[config.family]
    rope = tuple(block.rope for block in model.blocks)
    if family.rope_interval is None and not all(rope):
        raise ValueError(
            f"block {rope.index(False)} lacks rotary embeddings, for which {family.name} models "
            "have no place"
        )
    return replace(
        config,
        layers=len(rope),
        rope_layers=None if family.rope_interval is None else rope,
        tie_embeddings=model.head is None,
        **changes,
    )


def hf_config(model: Any, dtype: str) -> dict[str, Any]:
    """Return the ``config.json`` of a plain model.

    Raises
    ------
    ValueError
        If the model has a bias, or a block without rotary embeddings, for which its family has no
        place.
    """
    family, present = FAMILIES[model.config.family], taps_with_bias(model)
    biases = {
        "attention_bias": bool(present & {"qkv", "o"}),
        "mlp_bias": bool(present - {"qkv", "o"}),
    }
    allowed = {
        "qkv": family.qkv_bias is not False,
        "o": family.qkv_bias is None,
        "mlp": family.mlp_bias,
        "down": family.mlp_bias,
    }
    if wrong := sorted(tap for tap in present if not allowed[tap]):
        names = ", ".join(slot.name for tap in wrong for slot in TAPS[tap])
        raise ValueError(f"{names} have biases, for which {family.name} models have no place")
    values = config_now(model, **biases).to_hf()
    # Null, since the default of some classes is beyond a small vocabulary.
    others = {"architectures": [family.model_class], "torch_dtype": dtype, "pad_token_id": None}
    return values | others


def taps_with_bias(model: Any) -> set[str]:
    """Return the taps of `lowbitq.models.slots.TAPS` at which a layer of any block has a bias."""
    return {
        slot.tap
        for block in model.blocks
        for slot in SLOTS
        if block.linears[slot.name].bias is not None
    }


def hf_vectors(model: Any) -> dict[str, Float32]:
    """Return gains and biases by their Hugging Face names; absent ones are ones and zeros."""
    c = model.config
    family, present, sizes = FAMILIES[c.family], taps_with_bias(model), sizes_of(c)
    if family.qkv_bias is None and present & {"qkv", "o"}:
        present |= {"qkv", "o"}
    if family.qkv_bias:
        present |= {"qkv"}
    if present & {"mlp", "down"}:
        present |= {"mlp", "down"}
    vectors = {f"{OUTER['final_norm'].hf}.weight": model.final_norm}
    for index, block in enumerate(model.blocks):
        for norm in NORMS:
            gain = getattr(block, norm.name)
            if gain is None and (norm.size == "hidden" or c.qk_norm):
                gain = np.ones(sizes[norm.size], np.float32)
            if gain is not None:
                vectors[f"{name_in_block(index, norm)}.weight"] = gain
        for slot in SLOTS:
            if slot.tap in present:
                layer = block.linears[slot.name]
                zeros = np.zeros(layer.shape[0], np.float32)
                bias = zeros if layer.bias is None else layer.bias
                vectors[f"{name_in_block(index, slot)}.bias"] = bias
    return vectors


def write_hf(
    model: Any,
    path: str | os.PathLike[str],
    dtype: str,
    *,
    packed: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> bool:
    """Write a model without rotations as a Hugging Face folder, atomically.

    Parameters
    ----------
    model : Model
        From `plain` or `folded`.
    path : str or path-like
        See `new_folder_for_others`.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the float arrays. ``"auto"``: the narrowest that holds all of them exactly.
    packed : mapping, default=None
        Arrays that replace the weight of a layer, by the layer's name and their own.
    config : mapping, default=None
        Added to ``config.json``.
    overwrite : bool, default=False
        Whether a folder of this kind may be replaced.

    Returns
    -------
    bool
        Whether the float arrays are exact in this dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    packed = packed or {}
    floats = {
        f"{name}.weight": layer.weight for name, layer in model.matrices() if name not in packed
    } | hf_vectors(model)
    dtype = narrowest_of_all(floats.values()) if dtype == "auto" else dtype
    exact = are_exact(floats.values(), dtype)
    integers = {
        f"{name}.{part}": array for name, parts in packed.items() for part, array in parts.items()
    }
    with new_folder_for_others(path, overwrite=overwrite) as folder:
        write_json(folder / "config.json", hf_config(model, dtype) | dict(config or {}))
        write_safetensors(folder / "model.safetensors", floats | integers, dtype)
        if model.tokenizer is not None:
            model.tokenizer.save(folder)
    return exact
