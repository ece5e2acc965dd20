"""ModelConfig from Hugging Face's keys, as transformers 5 reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbitq.models.config import Keys, ModelConfig, rope_layers
from lowbitq.models.families import Family
from lowbitq.models.rope import ROPE_TYPES, longrope_factor

# Keys that change the forward pass in a way that the decoder lacks, with the only values allowed.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_ratio": (1,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "clip_qkv": (),
    "is_causal": (True,),
    "use_rope": (True,),
    "position_embedding_type": ("rope", "rotary"),
    "alibi": (False,),
    "use_parallel_residual": (False,),
    "per_layer_config": (),
}

# Unknown keys on these subjects are refused unless they are off.
_SUBJECTS = "rope|rotary|norm|attn|attention|bias|window|softcap|tokenizer"

# Keys on these subjects that are read below.
_READ = {
    "num_attention_heads",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "no_rope_layers",
    "no_rope_layer_interval",
}

# What the decoder lacks for families that resemble others.
_LACKS = {
    "ministral3": "its queries grow with their position (llama_4_scaling_beta)",
    "mistral3": "it reads images too",
}

# Keys on these subjects that do not change what the network computes: training, the attention
# implementation, LayerNorm, the tokenizer (its own files describe it).
_HARMLESS = {
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "output_attentions",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
    "dual_chunk_attention_config",  # Qwen2.5-1M beyond 262,144 tokens; transformers ignores it
    "layer_norm_eps",
    "layer_norm_epsilon",
    "tokenizer_class",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
}

# Rope type -> its settings besides the common ones.
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
_COMMON_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",
}


def config_from_hf(
    values: Mapping[str, Any], families: Mapping[str, Family], where: str = "config.json"
) -> ModelConfig:
    """Read the contents of a Hugging Face ``config.json``.

    Null means that a key is missing. Unknown keys on rope, norms, attention, biases, windows or the
    tokenizer are refused unless they are false, zero or empty.

    Parameters
    ----------
    values : mapping
    families : mapping of str to Family
        Families by ``model_type``.
    where : str, default="config.json"
        Prefix of every message.

    Returns
    -------
    ModelConfig

    Raises
    ------
    ValueError
        If the decoder cannot run such a model; the message lists all differences.
    FormatError
        If a key is missing or has an invalid value.

    Examples
    --------
    >>> config_from_hf({"model_type": "phi3", "hidden_act": "gelu"}, {}, "phi/config.json")
    Traceback (most recent call last):
    ValueError: phi/config.json: the model is not supported: model_type is 'phi3', \
expected one of (); hidden_act is 'gelu'
    """
    model_type = _model_type(Keys(values, where))
    family = families.get(model_type)
    keys = Keys({**(family.defaults if family else {}), **values}, where)
    if family is None:
        keys.differs("model_type", keys.get("model_type"))
        keys.differences[-1] += f", expected one of ({', '.join(families)})"
        if model_type in _LACKS:
            keys.differences[-1] += f": {_LACKS[model_type]}"
    keys.neutral(_NEUTRAL)
    keys.understood(_READ | _HARMLESS | _NEUTRAL.keys(), _SUBJECTS)
    if family is not None and family.qkv_bias is False:
        keys.neutral({"attention_bias": (False,)})
    if family is not None and not family.mlp_bias:
        keys.neutral({"mlp_bias": (False,)})
    if family is None or family.rope_interval is None:
        keys.neutral({"no_rope_layers": (), "no_rope_layer_interval": (0,)})
    types = _layer_types(keys)
    max_positions = keys.size("max_position_embeddings", 2048)
    theta, scaling = _rope(keys, max_positions)
    if keys.differences or family is None:
        raise keys.unsupported()

    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    head_dim = family.defaults.get("head_dim", max(1, hidden // heads))
    layers, attention_bias = keys.size("num_hidden_layers"), keys.flag("attention_bias")
    return keys.checked(
        lambda: ModelConfig(
            family=family.name,
            hidden_size=hidden,
            intermediate_size=keys.size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=keys.size("num_key_value_heads", heads),
            head_dim=keys.size("head_dim", head_dim),
            vocab_size=keys.size("vocab_size"),
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_layers=_rope_layers(keys, family, layers),
            tie_embeddings=bool(keys.flag("tie_word_embeddings")),
            attention_bias=bool(attention_bias if family.qkv_bias is None else family.qkv_bias),
            mlp_bias=bool(family.mlp_bias and keys.flag("mlp_bias")),
            qk_norm=family.qk_norm,
            max_positions=max_positions,
            sliding_window=_sliding_window(keys, family, layers, types),
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=keys.token_ids("eos_token_id"),
            name=keys.text("_name_or_path"),
        )
    )


def _model_type(keys: Keys) -> str:
    """Return the family's name; as in transformers, a mistral with layer_types is a ministral."""
    name = keys.text("model_type")
    return "ministral" if name == "mistral" and "layer_types" in keys.values else name


def _rope_layers(keys: Keys, family: Family, layers: int) -> tuple[bool, ...] | None:
    """Return whether each layer has rotary embeddings; the list may be longer than needed."""
    if family.rope_interval is None:
        return None
    listed = keys.get("no_rope_layers")
    if listed is None:
        return rope_layers(layers, keys.size("no_rope_layer_interval", family.rope_interval))
    if (
        not isinstance(listed, list)
        or len(listed) < layers
        or not all(type(rope) in (int, bool) and rope in (0, 1) for rope in listed)
    ):
        expected = f"{layers} numbers, one for each layer: 1 if it has rope, 0 if not"
        raise keys.wrong("no_rope_layers", listed, expected)
    return tuple(bool(rope) for rope in listed[:layers])


def _layer_types(keys: Keys) -> list[str] | None:
    """Return each layer's kind of attention, or None if the file does not list them."""
    types = keys.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise keys.wrong("layer_types", types, "a list of names, one for each layer")
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        keys.differences.append(
            f"layer_types has {', '.join(f'{kind:.50}' for kind in unknown[:5])}"
        )
    return types


def _sliding_window(keys: Keys, family: Family, layers: int, types: list[str] | None) -> int | None:
    """Return the shortest attention window of all layers; None: every layer attends to all."""
    if types is not None and len(types) != layers:
        raise keys.wrong("layer_types", types, f"{layers} names, one for each layer")
    window, used = keys.get("sliding_window"), keys.flag("use_sliding_window")
    named = types is not None and "sliding_attention" in types
    if family.window_listed and types is not None:
        slides = named
    elif family.window == "always":
        slides = True
    elif family.window == "if asked":
        slides = used is True
    elif family.window == "unless denied":
        slides = used is not False
    else:
        first = keys.size("max_window_layers", smallest=0)
        slides = used is True and (named if types is not None else first < layers)
    if named and (window is None or not slides):
        raise keys.wrong("layer_types", types, "only full_attention without a sliding window")
    return keys.size("sliding_window") if slides and window is not None else None


def _rope(keys: Keys, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling; ``rope_scaling`` overrides ``rope_parameters``."""
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    found = keys.get(name) or {}
    if not isinstance(found, dict):
        raise keys.wrong(name, found, "an object")
    rope = Keys({f"{name}.{key}": value for key, value in found.items()}, keys.where, f"{name}.")
    rope.differences = keys.differences
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    if name == "rope_scaling":
        _check_other_parameters(keys, found, theta)
    kind = found.get("rope_type", found.get("type", "default"))
    if "type" in found and found["type"] != kind:
        rope.differs("type", found["type"])
    rope.neutral({"partial_rotary_factor": (1,)})
    if kind not in ROPE_TYPES:
        rope.differs("rope_type", kind)
        keys.differences[-1] += f", expected one of ({', '.join(ROPE_TYPES)})"
        return theta, None
    rope.understood(_COMMON_ROPE_KEYS | _ROPE_KEYS[kind])
    if kind == "default":
        return theta, None
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind != "linear":
        # In transformers, the outer key overrides the inner one.
        inner = rope.size("original_max_position_embeddings", max_positions)
        scaling["original_max_position_embeddings"] = keys.size(
            "original_max_position_embeddings", inner
        )
    scaling |= _SETTINGS[kind](rope, max_positions, scaling)
    return theta, scaling


def _check_other_parameters(keys: Keys, scaling: Mapping[str, Any], theta: float) -> None:
    """Record settings of ``rope_parameters`` that contradict the overriding ``rope_scaling``."""
    other = keys.get("rope_parameters")
    if other is None:
        return
    if not isinstance(other, dict):
        raise keys.wrong("rope_parameters", other, "an object")
    plain = {
        "rope_type": "default",
        "type": "default",
        "rope_theta": theta,
        "partial_rotary_factor": 1,
    }
    for key, value in other.items():
        if key == "rope_theta" and "rope_theta" in scaling:
            continue
        if value not in (None, plain.get(key), scaling.get(key)):
            keys.differs(f"rope_parameters.{key}", value)
            keys.differences[-1] += ", which contradicts rope_scaling"


def _linear(rope: Keys, max_positions: int, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"factor": rope.number("factor")}


def _llama3(rope: Keys, max_positions: int, known: Mapping[str, Any]) -> dict[str, Any]:
    settings = {k: rope.number(k) for k in ("factor", "low_freq_factor", "high_freq_factor")}
    if settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise rope.wrong("low_freq_factor", settings["low_freq_factor"], "less than the high one")
    return settings


def _yarn(rope: Keys, max_positions: int, known: Mapping[str, Any]) -> dict[str, Any]:
    stretch = max_positions / known["original_max_position_embeddings"]
    settings: dict[str, Any] = {"factor": rope.number("factor", stretch)}
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None and (rope.get(key) != 0 or key == "attention_factor"):
            settings[key] = rope.number(key)  # for the other keys, 0 means the default
    if (truncate := rope.flag("truncate")) is not None:
        settings["truncate"] = truncate
    return settings


def _longrope(rope: Keys, max_positions: int, known: Mapping[str, Any]) -> dict[str, Any]:
    positions = known["original_max_position_embeddings"]
    if positions < 2:
        raise rope.wrong("original_max_position_embeddings", positions, "at least 2")
    stretch = rope.number("factor", max_positions / positions)
    factors = {key: _factors(rope, key) for key in ("short_factor", "long_factor")}
    if factors["short_factor"] != factors["long_factor"]:
        rope.differences.append("rope type is 'longrope' with factors that depend on length")
    factor = rope.number("attention_factor", longrope_factor(stretch, positions))
    return {**factors, "attention_factor": factor}


def _factors(rope: Keys, key: str) -> list[float]:
    value = rope.get(key)
    if not isinstance(value, list):
        raise rope.wrong(key, value, "a list of positive numbers")
    numbers = Keys({f"{key}[{i}]": number for i, number in enumerate(value)}, rope.where)
    return [numbers.number(name) for name in numbers.values]


_SETTINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
