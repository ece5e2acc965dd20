"""Small models that are exported to llama.cpp, alike in the golden script and in the test."""

from __future__ import annotations

import dataclasses

import numpy as np
import random_model

import lowbitq as lq
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.models import Model, QuantizedModel

TOKENS = random_model.random_tokens(16, seed=4)
VOCAB = 100

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# Name -> what differs in the configuration, the format of the layers (None: float), their rotation.
MODELS = {
    "llama": ({}, None, "none"),
    "llama linear": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None, "none"),
    "llama3": ({"rope_scaling": _LLAMA3}, None, "none"),
    "llama rotated": ({}, None, "hadamard"),
    "qwen2": ({"family": "qwen2", "attention_bias": True}, None, "none"),
    "qwen2 yarn": (
        {"family": "qwen2", "attention_bias": True, "rope_scaling": _YARN},
        None,
        "none",
    ),
    "qwen3": ({"family": "qwen3", "qk_norm": True}, None, "none"),
    "smollm3": (
        {"family": "smollm3", "layers": 5, "rope_layers": (True, True, True, False, True)},
        None,
        "none",
    ),
    "Q4_0": ({}, "int4g32symz8", "none"),
    "Q4_1": ({}, "int4g32", "none"),
    "Q8_0": ({}, "int8g32symz128", "none"),
    "Q4_0 rotated": ({}, "int4g32symz8", "hadamard"),
}


def model_of(name):
    """A model, and the dtype of its float matrices in the file."""
    changes, format, rotation = MODELS[name]
    model = random_model.random_model(seed=len(name), layers=changes.get("layers", 3))
    rng = np.random.default_rng(7)
    model.config = dataclasses.replace(model.config, **changes)
    for index, block in enumerate(model.blocks):
        block.rope = model.config.rope_layers is None or model.config.rope_layers[index]
        if model.config.attention_bias:
            for key in ("q_proj", "k_proj", "v_proj"):
                layer = block.linears[key]
                bias = rng.standard_normal(layer.shape[0], np.float32)
                block.linears[key] = Linear(layer.weight, bias)
        if model.config.qk_norm:
            block.query_norm, block.key_norm = rng.uniform(0.5, 1.5, (2, 16)).astype(np.float32)
    model = lq.rotate(model, rotation, seed=1)
    return (model if format is None else packed(model, format)), "float32"


def packed(model, format):
    """The model with its layers rounded to nearest."""
    fields = {field.name for field in dataclasses.fields(Model) if field.init}
    result = QuantizedModel(**{name: getattr(model.copy(), name) for name in fields})
    for name, layer in list(model.linears()):
        tensor = lq.quantize(layer.weight, format, range="minmax")
        result.replace_linear(name, QuantizedLinear.of(tensor, layer.bias, layer.rotation))
    return result
