"""A small random LLaMA in memory, without a tokenizer."""

from __future__ import annotations

import numpy as np

from lowbitq.linears import Linear
from lowbitq.models.config import ModelConfig
from lowbitq.models.decoder import Block, Model


def random_model(seed=0, layers=3):
    """Hidden 64, feed-forward 96, 4 heads, 2 key heads, 100 words; the same for the same seed."""
    config = ModelConfig(
        "llama", 64, 96, layers=layers, heads=4, kv_heads=2, head_dim=16, vocab_size=100
    )
    rng = np.random.default_rng(seed)

    def matrix(rows, cols):
        return rng.standard_normal((rows, cols), dtype=np.float32) / np.float32(cols**0.5)

    def gain():
        return rng.uniform(0.5, 1.5, 64).astype(np.float32)

    shapes = {
        "q_proj": (64, 64),
        "k_proj": (32, 64),
        "v_proj": (32, 64),
        "o_proj": (64, 64),
        "gate_proj": (96, 64),
        "up_proj": (96, 64),
        "down_proj": (64, 96),
    }
    blocks = [
        Block(gain(), gain(), {name: Linear(matrix(*shape)) for name, shape in shapes.items()})
        for _ in range(layers)
    ]
    return Model(config, None, Linear(8 * matrix(100, 64)), blocks, gain())


def random_tokens(count, seed=0):
    """Tokens that repeat themselves, as text does."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.05, count), 100).astype(np.int32) - 1
