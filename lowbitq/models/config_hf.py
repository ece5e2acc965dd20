"""ModelConfig from Hugging Face's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbitq._core import FormatError
from lowbitq.models.config import Family, Keys, ModelConfig, token_ids, unsupported
from lowbitq.models.rope import ROPE_TYPES

# Keys that change the forward pass in a way that the decoder does not have, and what they must be.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "num_experts": (0, 1, None),
    "num_local_experts": (0, 1, None),
    "n_routed_experts": (0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "clip_qkv": (None,),
    "no_rope_layers": (None,),
}


def config_from_hf(
    values: Mapping[str, Any], families: Mapping[str, Family], where: str = "config.json"
) -> ModelConfig:
    """Read the contents of a Hugging Face ``config.json``.

    Parameters
    ----------
    values : mapping
    families : mapping of str to Family
        By ``model_type``.
    where : str, default="config.json"
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

    Examples
    --------
    >>> config_from_hf({"model_type": "phi3", "hidden_act": "gelu"}, {}, "phi/config.json")
    Traceback (most recent call last):
    ValueError: phi/config.json: the model is not supported: model_type is 'phi3', \
expected one of (); hidden_act is 'gelu'
    """
    keys = Keys(values, where)
    family = families.get(str(keys.get("model_type")))
    if family is None:
        keys.differences.append(
            f"model_type is {keys.get('model_type')!r}, expected one of ({', '.join(families)})"
        )
    keys.neutral(_NEUTRAL)
    layer_types = set(values.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if layer_types:
        keys.differences.append(f"layer_types has {', '.join(sorted(layer_types))}")
    max_positions = keys.size("max_position_embeddings", 2048)
    theta, scaling = _rope_from_hf(keys, max_positions)
    if keys.differences or family is None:
        raise unsupported(where, keys.differences)

    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    head_dim = keys.size("head_dim", family.head_dim or max(1, hidden // heads))
    slides = keys.get("sliding_window") is not None and keys.get("use_sliding_window") is not False
    if family.name.startswith("qwen"):
        slides = slides and keys.get("use_sliding_window") is True
    bias = family.qkv_bias
    try:
        return ModelConfig(
            family=family.name,
            hidden_size=hidden,
            intermediate_size=keys.size("intermediate_size"),
            layers=keys.size("num_hidden_layers"),
            heads=heads,
            kv_heads=keys.size("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=keys.size("vocab_size"),
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=keys.get("tie_word_embeddings") is True,
            attention_bias=bool(keys.get("attention_bias")) if bias is None else bias,
            qk_norm=family.qk_norm,
            max_positions=max_positions,
            sliding_window=keys.size("sliding_window") if slides else None,
            bos_token_id=next(iter(token_ids(keys, "bos_token_id")), None),
            eos_token_ids=token_ids(keys, "eos_token_id"),
            name=str(keys.get("_name_or_path") or ""),
        )
    except ValueError as error:
        raise (
            error if isinstance(error, FormatError) else FormatError(f"{where}: {error}")
        ) from None


def _rope_from_hf(keys: Keys, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling; transformers 5 keeps both in ``rope_parameters``."""
    found = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise keys.wrong("rope_scaling", found, "an object")
    rope = Keys(found, keys.where, "")
    rope.differences = keys.differences
    kind = found.get("rope_type", found.get("type", "default"))
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    if found.get("partial_rotary_factor") not in (None, 1):
        keys.differences.append(f"partial_rotary_factor is {found['partial_rotary_factor']!r}")
    if kind == "default":
        return theta, None
    if kind not in ROPE_TYPES:
        keys.differences.append(f"rope type is {kind!r}, expected one of ({', '.join(ROPE_TYPES)})")
        return theta, None
    scaling = {k: v for k, v in found.items() if k not in ("type", "rope_theta")}
    scaling["rope_type"] = kind
    if kind != "linear":
        outer = keys.get("original_max_position_embeddings")
        default = outer if isinstance(outer, int) else max_positions
        scaling["original_max_position_embeddings"] = rope.size(
            "original_max_position_embeddings", default
        )
    if kind == "longrope":
        factors = scaling.get("short_factor")
        if factors != scaling.get("long_factor") or not isinstance(factors, list):
            keys.differences.append("rope type is 'longrope' with factors that depend on length")
        scaling["attention_factor"] = rope.number("attention_factor", 1.0)
        return theta, scaling
    if kind == "yarn" and found.get("factor") is None:
        scaling["factor"] = max_positions / scaling["original_max_position_embeddings"]
    else:
        scaling["factor"] = rope.number("factor")
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            scaling[key] = rope.number(key)
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise rope.wrong(
                "low_freq_factor", scaling["low_freq_factor"], "less than the high one"
            )
    return theta, scaling
