"""Gradients by torch's autograd, for test_gradients.py.

    pip install torch==2.13.0 transformers==5.24.0
    python tests/golden/make_gradients.py

Writes gradients.npz: for some models of tiny_models.py, of the mean cross entropy of the next token
by every parameter, every seventh number (`STRIDE`) of the flattened gradient, and its largest
magnitude. Weights are float64, but transformers computes norms, softmax and rotary angles in
float32 all the same: about 1e-6 of an array's largest magnitude.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tiny_models
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
NAMES = ("llama", "llama_linear", "qwen2", "qwen3", "qwen3_bias", "smollm3")
STRIDE = 7  # no divisor of any size, so that every row and column of a matrix is met


def gradients_of(name):
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_folder(name, folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
    tokens = torch.tensor(tiny_models.tokens_of(name))
    logits = model(tokens[None]).logits[0]
    assert logits.dtype == torch.float64
    torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    return {key: value.grad.numpy() for key, value in model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    arrays = {}
    for name in NAMES:
        for key, gradient in gradients_of(name).items():
            arrays[f"{name}/{key}"] = gradient.reshape(-1)[::STRIDE].astype(np.float32)
            arrays[f"{name}/{key}/largest"] = np.float32(abs(gradient).max())
    np.savez_compressed(HERE / "gradients.npz", **arrays)
