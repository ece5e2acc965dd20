"""Model families: the differences between the models that this decoder runs.

These are LLaMA 2 and 3, SmolLM2, Mistral and Ministral; SmolLM3, where every fourth layer lacks
rotary embeddings; Qwen2, with biases in query, key and value; and Qwen3, with norms in query and
key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Family:
    """The differences between a model family and the others.

    Attributes
    ----------
    name : str
        Hugging Face's ``model_type``.
    model_class : str
        Class of transformers, ``architectures`` in ``config.json``.
    architecture : str
        GGUF's ``general.architecture``.
    qkv_bias : bool or None
        Whether the query, key and value projections have biases; the output projection then has
        none. None: ``attention_bias`` decides for all four.
    mlp_bias : bool
        Whether ``mlp_bias`` decides if the layers of the MLP have biases; False: they never have.
    qk_norm : bool
        Whether each head of query and key is normalised.
    window : {"unless denied", "if asked", "always", "by layer"}
        When ``sliding_window`` applies: unless ``use_sliding_window`` is false; if it is true;
        always; or, if it is true, in the layers of ``layer_types`` or ``max_window_layers``.
    window_listed : bool
        Whether ``layer_types``, where present, decides alone which layers have the window.
    rope_interval : int or None
        Every layer whose number, from 1, is a multiple of this lacks rotary embeddings, unless
        ``no_rope_layers`` or ``no_rope_layer_interval`` say otherwise. None: all layers have them.
    rows_interleaved : bool
        Whether GGUF files hold the rows of query and key in pairs (2 i, 2 i + 1) that rotate
        together; Hugging Face's order is (i, i + head_dim / 2).
    defaults : mapping
        Values that transformers assumes for keys missing from ``config.json``.
    """

    name: str
    model_class: str
    architecture: str
    qkv_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    window: Literal["unless denied", "if asked", "always", "by layer"] = "unless denied"
    window_listed: bool = False
    rope_interval: int | None = None
    rows_interleaved: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_MISTRAL_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}

_ALL = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        mlp_bias=True,
        rows_interleaved=True,
        defaults={"max_position_embeddings": 2048},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "llama",
        qkv_bias=False,
        window="always",
        rows_interleaved=True,
        defaults=_MISTRAL_DEFAULTS,
    ),
    Family(
        "ministral",
        "MinistralForCausalLM",
        "llama",
        qkv_bias=False,
        window="always",
        window_listed=True,
        rows_interleaved=True,
        defaults=_MISTRAL_DEFAULTS,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        mlp_bias=True,
        window="if asked",
        window_listed=True,
        rope_interval=4,
        rows_interleaved=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        qkv_bias=True,
        window="by layer",
        defaults=_QWEN_DEFAULTS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        qk_norm=True,
        window="by layer",
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
)

FAMILIES = {family.name: family for family in _ALL}
# Two families may share an architecture name in GGUF; the first then represents both.
ARCHITECTURES = {family.architecture: family for family in reversed(_ALL)}


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo `uninterleave`; the rows may be packed.

    Examples
    --------
    >>> interleave(uninterleave(np.arange(8, dtype=np.float32), heads=2), heads=2)
    array([0., 1., 2., 3., 4., 5., 6., 7.], dtype=float32)
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def uninterleave(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the row order that llama.cpp's converter applies to query and key.

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
