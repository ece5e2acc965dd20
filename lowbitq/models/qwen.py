"""The Qwen family: Qwen2 has biases in query, key and value, Qwen3 norms in query and key."""

from __future__ import annotations

from lowbitq.models.config import Family

FAMILIES = (
    Family("qwen2", "qwen2", qkv_bias=True),
    Family("qwen3", "qwen3", qk_norm=True, head_dim=128),
)
