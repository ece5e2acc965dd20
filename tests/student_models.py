"""Small quantized models with every kind of parameter that training changes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from random_model import random_model, random_tokens

from lowbitq.compression import compress
from lowbitq.linears import Activation, Copy, Linear
from lowbitq.models.slots import SLOTS
from lowbitq.quantizers import quantize
from lowbitq.rotations import Rotation

TEXT = random_tokens(12 * 48, seed=3).reshape(12, 48)


def biased_model(seed=0, layers=2):
    """A random model whose layers have biases."""
    model = random_model(seed, layers)
    rng = np.random.default_rng(seed + 1)
    for name, linear in list(model.linears()):
        assert isinstance(linear, Linear)
        bias = rng.normal(size=linear.shape[0]).astype(np.float32) / 4
        model.replace_linear(name, linear.replace(bias=bias))
    return model


def with_head_norms(model):
    """The model with norms of queries and keys in its last block."""
    model, rng = model.copy(), np.random.default_rng(7)
    for norm in ("query_norm", "key_norm"):
        setattr(model.blocks[-1], norm, rng.uniform(0.5, 1.5, 16).astype(np.float32))
    return model


def pair(format="int2g32 a32 + rank2", **options):
    """A quantized model and its teacher; activations are not rounded unless the format says so."""
    small, teacher = _pair(format, **options)
    return small.copy(), teacher


@cache
def _pair(format, *, biases=True, layers=2, **options):
    teacher = biased_model(layers=layers) if biases else random_model(layers=layers)
    options = {"drift": False} | options
    return compress(teacher, format, text=TEXT, embedding="int8g64 a32", **options), teacher


def with_copies(small):
    """The model with layers of several copies in block 0: own, residual and shared ones."""
    small = small.copy()
    for name, kind in {
        "self_attn.q_proj": "residual",
        "self_attn.k_proj": "shared",
        "self_attn.v_proj": "weighted",
        "self_attn.o_proj": "rotated",
        "mlp.up_proj": "residual",
    }.items():
        name = f"model.layers.0.{name}"
        linear = dict(small.linears())[name]
        [copy] = linear.copies
        small.replace_linear(name, linear.replace(copies=_copies(copy, kind)))
    return small


def _copies(copy, kind):
    rows, cols = copy.tensor.shape
    rng = np.random.default_rng(rows)
    matrix = copy.tensor.dequantize()
    error = rng.normal(0, matrix.std() / 4, matrix.shape).astype(np.float32)
    rest = quantize(error, copy.tensor.format)
    how = {"activation": copy.activation}
    weights = [rng.uniform(0.3, 0.7, rows).astype(np.float16).astype(np.float32) for _ in range(2)]
    if kind == "residual":
        return copy, Copy(rest, copy.rotation, **how)
    if kind == "shared":
        return tuple(Copy(copy.tensor, copy.rotation, **how, weight=w) for w in (*weights, None))
    if kind == "weighted":
        tensors = (copy.tensor, copy.tensor, rest)
        weights.append(None)
        return tuple(Copy(t, **how, weight=w) for t, w in zip(tensors, weights, strict=True))
    turn = Rotation(cols, "orthogonal", seed=6)
    turned = quantize(turn.apply(error), copy.tensor.format)
    return copy, Copy(rest, None, Rotation(rows, seed=5), **how), Copy(turned, turn, **how)


def with_activations(small, bits):
    """The model with a quantizer of another kind at each input of a block."""
    small = small.copy()
    ways = {
        "qkv": Activation(bits, clip=0.8),
        "o": Activation(bits, scale=6 / (1 << bits)),
        "mlp": Activation(bits, clip=0.9, zero=0.1),
        "down": Activation(bits, scale=2 / (1 << bits), zero=-0.2),
    }
    for name, linear in small.linears():
        [slot] = (slot for slot in SLOTS if name.endswith(slot.name))
        copies = tuple(replace(copy, activation=ways[slot.tap]) for copy in linear.copies)
        small.replace_linear(name, linear.replace(copies=copies))
    return small


def tensors_of(model):
    """The packed tensors of a model's blocks, each once."""
    layers = [linear for _, linear in model.linears()]
    return list({id(c.tensor): c.tensor for linear in layers for c in linear.copies}.values())


def content(model):
    """Bytes of everything a quantized model stores, by kind."""
    kinds = ("codes", "grid", "weight", "norm", "bias", "adapter", "activation", "rotation")
    found = {kind: [] for kind in kinds}
    found["norm"].append(model.final_norm)
    for block in model.blocks:
        found["norm"] += [gain for gain in block.norms if gain is not None]
        for linear in block.linears.values():
            for copy in linear.copies:
                found["codes"].append(copy.tensor.codes)
                parts = [copy.tensor.scale, copy.tensor.offset, copy.tensor.levels]
                found["grid"] += [part for part in parts if part is not None]
                found["activation"].append(np.array(repr(copy.activation)))
                found["rotation"] += [] if copy.rotation is None else [copy.rotation.matrix()]
                found["weight"] += [] if copy.weight is None else [copy.weight]
            found["bias"] += [] if linear.bias is None else [linear.bias]
            found["adapter"] += linear.adapter or ()
    return {kind: b"".join(x.tobytes() for x in arrays) for kind, arrays in found.items()}
