"""The LLaMA family: LLaMA 2 and 3, SmolLM2, Mistral; and the names that all families share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowbitq.models.config import Family

FAMILIES = (
    Family(
        "llama",
        "llama",
        mlp_bias=True,
        rows_interleaved=True,
        defaults={"max_position_embeddings": 2048},
    ),
    Family(
        "mistral",
        "llama",
        qkv_bias=False,
        window="always",
        rows_interleaved=True,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
)

# Linear layer of a block -> its name within Hugging Face's block, and in GGUF's.
LINEAR_NAMES = {
    "q_proj": ("self_attn.q_proj", "attn_q"),
    "k_proj": ("self_attn.k_proj", "attn_k"),
    "v_proj": ("self_attn.v_proj", "attn_v"),
    "o_proj": ("self_attn.o_proj", "attn_output"),
    "gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "up_proj": ("mlp.up_proj", "ffn_up"),
    "down_proj": ("mlp.down_proj", "ffn_down"),
}

# Norm of a block (field of Block) -> the same.
NORM_NAMES = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "query_norm": ("self_attn.q_norm", "attn_q_norm"),
    "key_norm": ("self_attn.k_norm", "attn_k_norm"),
}

# Tensors outside the blocks.
OUTER_NAMES = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}

HF_BLOCK, GGUF_BLOCK = "model.layers.{}.{}", "blk.{}.{}"


def uninterleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the row order that llama.cpp's converter gives to query and key.

    Parameters
    ----------
    rows : ndarray of shape (heads * head_dim,) or (heads * head_dim, cols), float32
        In each head, rows 2 i and 2 i + 1 rotate together.
    heads : int

    Returns
    -------
    ndarray of the same shape, float32
        In each head, rows i and i + head_dim / 2 rotate together.

    Examples
    --------
    >>> uninterleave(np.arange(8, dtype=np.float32), heads=2)
    array([0., 2., 1., 3., 4., 6., 5., 7.], dtype=float32)
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
