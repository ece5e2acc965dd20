"""Small quantized models with every kind of parameter that training changes."""

from __future__ import annotations

from functools import cache

import numpy as np
from random_model import random_model, random_tokens

from lowbitq.compression import compress
from lowbitq.linears import Linear

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


def pair(format="int2g32 a32 + rank2", **options):
    """A quantized model and its teacher; activations are not rounded unless the format says so."""
    small, teacher = _pair(format, **options)
    return small.copy(), teacher


@cache
def _pair(format, *, biases=True, layers=2, **options):
    teacher = biased_model(layers=layers) if biases else random_model(layers=layers)
    return compress(teacher, format, text=TEXT, embedding="int8g64 a32", **options), teacher


def content(model):
    """Bytes of everything a quantized model stores, by kind."""
    found = {"codes": [], "grid": [], "norm": [model.final_norm], "bias": [], "adapter": []}
    for block in model.blocks:
        found["norm"] += [gain for gain in block.norms if gain is not None]
        for linear in block.linears.values():
            [copy] = linear.copies
            found["codes"].append(copy.tensor.codes)
            parts = [copy.tensor.scale, copy.tensor.offset, copy.tensor.levels, copy.weight]
            found["grid"] += [part for part in parts if part is not None]
            found["bias"] += [] if linear.bias is None else [linear.bias]
            found["adapter"] += linear.adapter or ()
    return {kind: b"".join(x.tobytes() for x in arrays) for kind, arrays in found.items()}
