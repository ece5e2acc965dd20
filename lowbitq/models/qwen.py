"""The Qwen family: Qwen2 has biases in query, key and value, Qwen3 norms in query and key."""

from __future__ import annotations

from lowbitq.models.config import Family

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES = (
    Family("qwen2", "qwen2", qkv_bias=True, window="by layer", defaults=_DEFAULTS),
    Family(
        "qwen3", "qwen3", qk_norm=True, window="by layer", defaults=_DEFAULTS | {"head_dim": 128}
    ),
)
