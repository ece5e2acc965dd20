"""How transformers reads random configurations, for test_config.py.

    pip install torch==2.13.0 transformers==5.24.0
    python tests/golden/make_configs.py

Writes configs.json: a list of the contents of ``config.json``, and for each one the frequencies
and the factor of sine and cosine, sizes, biases and window of the model that transformers makes
of it, or null where it makes none.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
COUNT, LAYERS, HEADS = 600, 3, 4

FIXED = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": 32,
    "hidden_act": "silu",
}
ABSENT = object()

# What the random configurations are drawn from. A key is absent where it draws ABSENT.
OUTER = {
    "head_dim": [ABSENT, ABSENT, 8, 16, 24],
    "num_key_value_heads": [1, 2, 2, 4, 4, None, ABSENT],
    "rms_norm_eps": [1e-5, ABSENT],
    "rope_theta": [1e4, 1e4, 5e5, 7.0, ABSENT],
    "max_position_embeddings": [512, 4096, 300, ABSENT],
    "original_max_position_embeddings": [ABSENT, ABSENT, ABSENT, ABSENT, 128],
    "tie_word_embeddings": [True, False, ABSENT],
}
OWN = {
    "llama": {"attention_bias": [True, False, ABSENT], "mlp_bias": [True, False, ABSENT]},
    "mistral": {"sliding_window": [8, None, ABSENT], "use_sliding_window": [False, ABSENT]},
    "ministral": {},
    "smollm3": {
        "attention_bias": [True, False, ABSENT],
        "mlp_bias": [True, False, ABSENT],
        "no_rope_layers": [ABSENT, ABSENT, None, [0, 1, 1], [1, 1, 1], [1, 0, 1, 0]],
        "no_rope_layer_interval": [ABSENT, 1, 2, 5],
        "pad_token_id": [0],
    },
    "qwen2": {},
    "qwen3": {"attention_bias": [True, False, ABSENT]},
}
WINDOWS = {
    "sliding_window": [8, None, ABSENT],
    "use_sliding_window": [True, True, False, ABSENT],
    "max_window_layers": [0, 2, LAYERS, ABSENT],
    "layer_types": [
        ABSENT,
        ABSENT,
        ["full_attention"] * LAYERS,
        [*["full_attention"] * (LAYERS - 1), "sliding_attention"],
    ],
}
ROPE = {
    "factor": [0.5, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0, 40.0, ABSENT],
    "original_max_position_embeddings": [64, 128, 300, 8192, ABSENT],
    "rope_theta": [ABSENT, ABSENT, 1e5],
    "partial_rotary_factor": [*[ABSENT] * 8, 1.0, 0.5],
}
TYPES = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": [1.0, 2], "high_freq_factor": [4.0, 8]},
    "yarn": {
        "attention_factor": [ABSENT, ABSENT, ABSENT, 1.25, 0.7],
        "beta_fast": [ABSENT, ABSENT, 16, 4.0, 0, None],
        "beta_slow": [ABSENT, ABSENT, 2, 0.5, None],
        "mscale": [ABSENT, ABSENT, 0.707, 1, 0],
        "mscale_all_dim": [ABSENT, ABSENT, 1.3, 0],
        "truncate": [ABSENT, ABSENT, True, False],
    },
    "longrope": {"attention_factor": [ABSENT, ABSENT, 1.25, None]},
    "dynamic": {},
}


def drawn(rng, choices):
    values = {key: rng.choice(options) for key, options in choices.items()}
    return {key: value for key, value in values.items() if value is not ABSENT}


def rope(rng, pairs):
    kind = rng.choice([*TYPES, "linear", "llama3", "yarn", "yarn", "yarn", "yarn", "longrope"])
    settings = drawn(rng, ROPE) | drawn(rng, TYPES[kind])
    if kind == "default":
        settings.pop("factor", None)
    if kind == "longrope":
        short = [rng.choice([1.0, 1.5, 2]) + i for i in range(pairs)]
        long = short if rng.random() < 0.8 else [2 * factor for factor in short]
        settings |= {"short_factor": short, "long_factor": long}
    name = rng.choice(["rope_type", "rope_type", "type"])
    return settings | ({} if kind == "default" and rng.random() < 0.3 else {name: kind})


def config(seed):
    rng = random.Random(seed)
    family = rng.choice([*OWN])
    values = {"model_type": family} | FIXED | drawn(rng, OUTER) | drawn(rng, OWN[family])
    if family not in ("llama", "mistral"):
        values |= drawn(rng, WINDOWS)
    pairs = values.get("head_dim", 128 if family == "qwen3" else 16) // 2
    where = rng.choice(["none", "rope_scaling", "rope_scaling", "rope_parameters", "both"])
    if where in ("rope_scaling", "both"):
        values["rope_scaling"] = rope(rng, pairs)
    if where == "rope_parameters":
        values["rope_parameters"] = rope(rng, pairs)
    if where == "both":
        plain = {"rope_type": "default", "rope_theta": values.get("rope_theta", 1e4)}
        values["rope_parameters"] = rng.choice([plain, plain, plain, rope(rng, pairs)])
    if rng.random() < 0.1:
        values["rope_scaling"] = rng.choice([None, {}])
    return values


def reading(values):
    """Return what the model of a configuration is like; None if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        try:
            found = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(found, attn_implementation="eager")
            rotary = type(model.model.rotary_emb)(config=found)
        except Exception as error:
            print(type(error).__name__, str(error)[:100].replace("\n", " "))
            return None
    layers = model.model.layers
    parts = {**dict(layers[0].self_attn.named_children()), **dict(layers[0].mlp.named_children())}
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in layers}
    if values["model_type"] == "mistral":
        windows = {found.sliding_window}
    elif values["model_type"] in ("ministral", "smollm3"):  # masks have it, if attention has not
        sliding = "sliding_attention" in found.layer_types
        windows = {found.sliding_window if sliding else None}
        if sliding and windows == {None}:
            return None  # the model cannot run
    elif "sliding_attention" in (getattr(found, "layer_types", None) or []) and windows == {None}:
        return None  # the model cannot run
    return {
        "frequencies": [float(f"{f:.7g}") for f in rotary.inv_freq],
        "factor": float(rotary.attention_scaling),
        "head_dim": layers[0].self_attn.head_dim,
        "kv_heads": found.num_key_value_heads,
        "norm_eps": found.rms_norm_eps,
        "max_positions": found.max_position_embeddings,
        "tied": found.tie_word_embeddings,
        "biases": sorted(n for n, part in parts.items() if getattr(part, "bias", None) is not None),
        "rope_layers": [bool(getattr(layer.self_attn, "use_rope", True)) for layer in layers],
        "window": min((w for w in windows if w is not None), default=None),
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    configs = [config(seed) for seed in range(COUNT)]
    lines = [json.dumps([values, reading(values)], separators=(",", ":")) for values in configs]
    (HERE / "configs.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
