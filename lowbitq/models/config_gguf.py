"""ModelConfig from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.models.config import Family, Keys, ModelConfig, token_ids, unsupported

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0, None),
    "attn_logit_softcapping": (0, None),
    "final_logit_softcapping": (0, None),
    "logit_scale": (0, 1, None),
    "embedding_scale": (0, 1, None),
    "residual_scale": (0, 1, None),
    "attention.scale": (0, None),
    "attention.causal": (True, None),
    "attention.clamp_kqv": (0, None),
}


def config_from_gguf(
    metadata: Mapping[str, Any],
    families: Mapping[str, Family],
    *,
    vocab_size: int,
    tie_embeddings: bool,
    attention_bias: bool,
    rope_factors: NDArray[np.float32] | None = None,
    where: str = "GGUF metadata",
) -> ModelConfig:
    """Read the metadata of a GGUF file.

    Parameters
    ----------
    metadata : mapping
        Keys as llama.cpp writes them: ``"llama.block_count"``.
    families : mapping of str to Family
        By ``general.architecture``.
    vocab_size, tie_embeddings, attention_bias
        As the file's tensors have it: not all files say it in their metadata.
    rope_factors : ndarray of shape (head_dim / 2,), float32, default=None
        Tensor ``rope_freqs.weight``: what each frequency is divided by.
    where : str, default="GGUF metadata"
        Opens every message.

    Returns
    -------
    ModelConfig

    Raises
    ------
    ValueError
        If the decoder cannot run such a model; lists all that differs.
    FormatError
        If a key is missing or has no sensible value.

    References
    ----------
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    architecture = str(metadata.get("general.architecture"))
    family = families.get(architecture)
    keys = Keys(metadata, where, f"{architecture}.")
    if family is None:
        keys.differences.append(
            f"general.architecture is {architecture!r}, expected one of ({', '.join(families)})"
        )
    keys.neutral(_NEUTRAL)
    hidden, heads = keys.get("embedding_length"), keys.get("attention.head_count")
    if isinstance(heads, np.ndarray) or isinstance(keys.get("attention.head_count_kv"), np.ndarray):
        keys.differences.append("attention.head_count differs between blocks")
        raise unsupported(where, keys.differences)
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            keys.differences.append(f"{keys.prefix}{key} is {keys.get(key)}, not {head_dim}")
    scaling = _rope_from_gguf(keys, rope_factors, head_dim)
    if keys.differences or family is None:
        raise unsupported(where, keys.differences)
    tokens = Keys(metadata, where, "tokenizer.ggml.")
    window = keys.get("attention.sliding_window")
    try:
        return ModelConfig(
            family=family.name,
            hidden_size=hidden,
            intermediate_size=keys.size("feed_forward_length"),
            layers=keys.size("block_count"),
            heads=heads,
            kv_heads=keys.size("attention.head_count_kv", heads),
            head_dim=head_dim,
            vocab_size=vocab_size,
            # Written as float32: 1e-05 comes back as 9.999999747378752e-06.
            norm_eps=float(str(np.float32(keys.number("attention.layer_norm_rms_epsilon")))),
            rope_theta=keys.number("rope.freq_base", 10000.0),
            rope_scaling=scaling,
            tie_embeddings=tie_embeddings,
            attention_bias=attention_bias,
            qk_norm=family.qk_norm,
            max_positions=keys.size("context_length", 2048),
            sliding_window=keys.size("attention.sliding_window") if window else None,
            bos_token_id=next(iter(token_ids(tokens, "bos_token_id")), None),
            eos_token_ids=token_ids(tokens, "eos_token_id"),
            name=str(metadata.get("general.name", "")),
        )
    except ValueError as error:
        raise (
            error if isinstance(error, FormatError) else FormatError(f"{where}: {error}")
        ) from None


def _rope_from_gguf(
    keys: Keys, factors: NDArray[np.float32] | None, head_dim: int
) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type") or "none"
    if keys.get("rope.scale_linear"):
        kind = "linear"
    if factors is not None:
        if factors.shape != (head_dim // 2,) or not (factors > 0).all():
            raise FormatError(
                f"{keys.where}: rope_freqs.weight has shape {factors.shape}, "
                f"expected ({head_dim // 2},) positive numbers"
            )
        if kind != "none":
            keys.differences.append(f"rope scaling {kind!r} together with rope_freqs.weight")
        # What converters make of llama3; in Hugging Face's words, one set of factors for all
        # lengths.
        listed = [float(f) for f in factors]
        return {
            "rope_type": "longrope",
            "short_factor": listed,
            "long_factor": listed,
            "attention_factor": 1.0,
            "original_max_position_embeddings": keys.size("context_length", 2048),
        }
    if kind == "none":
        return None
    if kind == "linear":
        factor = keys.number("rope.scaling.factor", keys.get("rope.scale_linear"))
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": keys.number("rope.scaling.factor"),
            "original_max_position_embeddings": keys.size(
                "rope.scaling.original_context_length", keys.size("context_length", 2048)
            ),
        }
    keys.differences.append(f"rope scaling is {kind!r}, expected none, linear or yarn")
    return None
