"""Logits of llama.cpp under every way to set the rotary frequencies in a GGUF file.

    pip install llama-cpp-python==0.3.36 gguf
    python tests/golden/make_ggml_rope.py

Writes ggml_rope.npz: by the name of a setting, the last ROWS rows of logits of the tiny model
MODEL. Only the numbers of SETTINGS are used by the tests, which need neither of the packages.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MODEL, HEAD_DIM, ROWS = "mistral", 16, 4
FACTORS = {"rope_freqs.weight": np.linspace(1, 6, HEAD_DIM // 2).astype(np.float32)}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
ORIGINAL = {"rope.scaling.original_context_length": 64}
ATTENTION = {"rope.scaling.attn_factor": 0.8}

# Name -> keys behind the architecture's name, further tensors.
SETTINGS = {
    "plain": ({}, {}),
    "factor": ({"rope.scaling.factor": 4.0}, {}),
    "scale_linear": ({"rope.scale_linear": 3.0}, {}),
    "factor_and_scale_linear": ({"rope.scaling.factor": 4.0, "rope.scale_linear": 3.0}, {}),
    "zero_and_scale_linear": ({"rope.scaling.factor": 0.0, "rope.scale_linear": 3.0}, {}),
    "zero": ({"rope.scaling.factor": 0.0}, {}),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "none_scale_linear": ({"rope.scaling.type": "none", "rope.scale_linear": 3.0}, {}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, {}),
    "linear_scale_linear": ({"rope.scaling.type": "linear", "rope.scale_linear": 2.5}, {}),
    "linear_faster": ({"rope.scaling.factor": 0.5}, {}),
    "yarn": (YARN | ORIGINAL, {}),
    "yarn_long": (YARN | {"rope.scaling.original_context_length": 4096}, {}),
    "yarn_context": (YARN, {}),
    "yarn_context_zero": (YARN | {"rope.scaling.original_context_length": 0}, {}),
    "yarn_scale_linear": (
        {"rope.scaling.type": "yarn", "rope.scale_linear": 4.0} | ORIGINAL,
        {},
    ),
    "yarn_without_factor": ({"rope.scaling.type": "yarn"} | ORIGINAL, {}),
    "yarn_faster": (YARN | ORIGINAL | {"rope.scaling.factor": 0.5}, {}),
    "yarn_base": (YARN | ORIGINAL | {"rope.freq_base": 20.0}, {}),
    "yarn_bound": (
        # The ramp ends beyond the last index that there is.
        YARN | {"rope.scaling.original_context_length": 300, "rope.freq_base": 5.0},
        {},
    ),
    "attention": (ATTENTION, {}),
    "attention_none": (ATTENTION | {"rope.scaling.type": "none"}, {}),
    "attention_linear": (ATTENTION | {"rope.scaling.factor": 4.0}, {}),
    "attention_yarn": (ATTENTION | YARN | ORIGINAL, {}),
    "attention_yarn_faster": (ATTENTION | YARN | ORIGINAL | {"rope.scaling.factor": 0.5}, {}),
    "factors": ({}, FACTORS),
    "factors_linear": ({"rope.scaling.factor": 2.0}, FACTORS),
    "factors_none": ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, FACTORS),
    "factors_attention": (ATTENTION, FACTORS),
    "factors_yarn": (YARN | ORIGINAL, FACTORS),
    "finetuned": (YARN | ORIGINAL | {"rope.scaling.finetuned": True}, {}),
    "beta_fast": (YARN | ORIGINAL | {"rope.scaling.yarn_beta_fast": 4.0}, {}),
    "ext_factor": (YARN | ORIGINAL | {"rope.scaling.yarn_ext_factor": 0.5}, {}),
    "yarn_attn_factor": (YARN | ORIGINAL | {"rope.scaling.yarn_attn_factor": 0.5}, {}),
    "log_multiplier": (YARN | ORIGINAL | {"rope.scaling.yarn_log_multiplier": 0.1}, {}),
    "alpha": ({"rope.scaling.alpha": 2.0}, {}),
    "attention_scale": ({"attention.scale": 0.5}, {}),
    "layer_norm_epsilon": ({"attention.layer_norm_epsilon": 0.1}, {}),
    "clamp": ({"attention.clamp_kqv": 0.1}, {}),
    "window": ({"attention.sliding_window": 8}, {}),
}


def logits_of(name):
    import tiny_models
    from llama_cpp import Llama

    keys, tensors = SETTINGS[name]
    tokens = tiny_models.tokens_of(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        vocabulary = {"tokenizer.ggml.model": "none", "llama.vocab_size": tiny_models.VOCAB}
        tiny_models.write_gguf(MODEL, path, keys, tensors, **vocabulary)
        model = Llama(
            str(path),
            n_ctx=256,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=0,  # float32
            type_v=0,
            verbose=False,
        )
        model.eval(tokens.tolist())
        return np.array(model.scores[len(tokens) - ROWS : len(tokens)], np.float32)


if __name__ == "__main__":
    np.savez_compressed(HERE / "ggml_rope.npz", **{name: logits_of(name) for name in SETTINGS})
