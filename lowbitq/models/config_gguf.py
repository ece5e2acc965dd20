"""ModelConfig from the metadata of a GGUF file, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.models.config import Keys, ModelConfig, rope_layers
from lowbitq.models.families import Family
from lowbitq.models.rope import yarn_factor

# Keys that change the forward pass in a way that the decoder lacks, with the only values allowed.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
    "attention.scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
}

# Unknown keys on these subjects are refused unless they are off.
_SUBJECTS = "rope|attention|attn|norm|bias|softcap"

# Keys on these subjects that are read below, and two that do not change the forward pass.
_KNOWN = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "attention.layer_norm_epsilon",  # for norms that these architectures lack
}

# Keys that hold an array, one number per block, if blocks differ.
_PER_BLOCK = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")


def config_from_gguf(
    metadata: Mapping[str, Any],
    families: Mapping[str, Family],
    *,
    vocab_size: int,
    tie_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool = False,
    rope_factors: NDArray[np.float32] | None = None,
    where: str = "GGUF metadata",
) -> ModelConfig:
    """Read the metadata of a GGUF file.

    Unknown keys on rope, attention, norms or biases are refused unless they are false, zero or
    empty.

    Parameters
    ----------
    metadata : mapping
        Keys as llama.cpp writes them: ``"llama.block_count"``.
    families : mapping of str to Family
        Families by ``general.architecture``.
    vocab_size, tie_embeddings, attention_bias, mlp_bias
        From the file's tensors, because not all files have them in their metadata.
    rope_factors : ndarray of shape (head_dim / 2,), float32, default=None
        Tensor ``rope_freqs.weight``, the divisors of the frequencies.
    where : str, default="GGUF metadata"
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

    References
    ----------
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    general, tokens = Keys(metadata, where, "general."), Keys(metadata, where, "tokenizer.ggml.")
    architecture = general.text("architecture")
    family = families.get(architecture)
    keys = Keys(metadata, where, f"{architecture}.")
    if family is None:
        general.differs("architecture", general.get("architecture"))
        keys.differences.append(
            f"{general.differences[0]}, expected one of ({', '.join(families)})"
        )
    keys.neutral(_NEUTRAL)
    keys.understood(_KNOWN | _NEUTRAL.keys(), _SUBJECTS)
    by_block = [key for key in _PER_BLOCK if isinstance(keys.get(key), np.ndarray)]
    keys.differences += [f"{keys.prefix}{key} differs between blocks" for key in by_block]
    if family is None or by_block:
        raise keys.unsupported()
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            keys.differences.append(f"{keys.prefix}{key} is {keys.get(key)}, not {head_dim}")
    scaling = _rope(keys, rope_factors, head_dim)
    if keys.differences:
        raise keys.unsupported()
    window = keys.size("attention.sliding_window", 0, smallest=0)
    return keys.checked(
        lambda: ModelConfig(
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
            rope_layers=rope_layers(keys.size("block_count"), family.rope_interval),
            tie_embeddings=tie_embeddings,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias and family.mlp_bias,
            qk_norm=family.qk_norm,
            max_positions=keys.size("context_length", 2048),
            sliding_window=window or None,
            bos_token_id=next(iter(tokens.token_ids("bos_token_id")), None),
            eos_token_ids=tokens.token_ids("eos_token_id"),
            name=general.text("name"),
        )
    )


def _rope(keys: Keys, factors: NDArray[np.float32] | None, head_dim: int) -> dict[str, Any] | None:
    """Return the scaling, with ggml's precedence and defaults.

    The default type is linear. Its factor is ``rope.scaling.factor``, or else
    ``rope.scale_linear``; 0 means 1. ``rope.scaling.attn_factor`` multiplies sine and cosine for
    every type.
    """
    kind = keys.get("rope.scaling.type")
    kind = "linear" if kind is None else kind
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        keys.differs("rope.scaling.type", kind)
        keys.differences[-1] += ", expected none, linear or yarn"
        return None
    given = keys.get("rope.scaling.factor") is not None
    name = "rope.scaling.factor" if given else "rope.scale_linear"
    factor = 1.0 if keys.is_off(name) else keys.number(name)
    magnitude = keys.number("rope.scaling.attn_factor", 1.0)
    positions = keys.size("context_length", 2048)
    if kind == "yarn":
        if factors is not None:
            keys.differences.append("rope scaling 'yarn' together with rope_freqs.weight")
        original = keys.size("rope.scaling.original_context_length", positions, smallest=0)
        yarn = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or positions,
        }
        if magnitude != 1:
            yarn["attention_factor"] = magnitude * yarn_factor(factor)
        return yarn
    if kind == "none":
        factor = 1.0
    if factors is None and magnitude == 1:
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if factors is None:
        factors = np.ones(head_dim // 2, np.float32)
    if factors.shape != (head_dim // 2,) or not ((factors > 0) & np.isfinite(factors)).all():
        raise FormatError(
            f"{keys.where}: rope_freqs.weight has shape {factors.shape}, "
            f"expected ({head_dim // 2},) positive numbers"
        )
    # In Hugging Face's terms: one set of factors for all lengths. Converters write llama3 this way.
    listed = [factor * float(f) for f in factors]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": magnitude,
        "original_max_position_embeddings": positions,
    }


def config_to_gguf(
    config: ModelConfig, families: Mapping[str, Family]
) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Return the metadata that `config_from_gguf` and llama.cpp read back.

    Parameters
    ----------
    config : ModelConfig
    families : mapping of str to Family
        By Hugging Face's ``model_type``.

    Returns
    -------
    metadata : dict
    rope_factors : ndarray of shape (head_dim / 2,), float32, or None
        Tensor ``rope_freqs.weight``; None: there is none.

    Raises
    ------
    ValueError
        If llama.cpp has no such scaling of rotary frequencies, or has them in other layers.
    """
    family = families[config.family]
    architecture = family.architecture
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.rope_layers != rope_layers(config.layers, family.rope_interval):
        where = f"every {family.rope_interval}th" if family.rope_interval else "no"
        raise ValueError(
            f"rope_layers is {config.rope_layers}, but llama.cpp leaves out rope in {where} layer "
            f"of {family.name} models"
        )
    if config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    scaling, factors = config.rope_scaling or {"rope_type": "default"}, None
    kind = scaling["rope_type"]
    frequencies, magnitude = config.rope_frequencies()
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    elif kind == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.attn_factor": magnitude / yarn_factor(scaling["factor"]),
        }
    elif kind != "default":
        plain, _ = replace(config, rope_scaling=None).rope_frequencies()
        factors = (plain / frequencies).astype(np.float32)
        keys |= {"rope.scaling.type": "none", "rope.scaling.attn_factor": magnitude}
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    metadata = {"general.architecture": architecture, "general.name": config.name} | metadata
    # llama.cpp reads factors in this architecture only.
    if (factors is not None and architecture != "llama") or not _same_rope(
        config, metadata, {architecture: family}, factors
    ):
        raise ValueError(f"llama.cpp has no rope_scaling {scaling} for {config.family} models")
    return metadata, factors


def _same_rope(
    config: ModelConfig,
    metadata: Mapping[str, Any],
    families: Mapping[str, Family],
    factors: NDArray[np.float32] | None,
) -> bool:
    """Return whether the metadata gives the frequencies of a configuration back."""
    found = config_from_gguf(
        metadata,
        families,
        vocab_size=config.vocab_size,
        tie_embeddings=config.tie_embeddings,
        attention_bias=config.attention_bias,
        rope_factors=factors,
    )
    (found_angles, found_factor), (angles, factor) = (
        one.rope_frequencies() for one in (found, config)
    )
    close = np.allclose(found_angles, angles, rtol=1e-6, atol=0)
    return close and math.isclose(found_factor, factor, rel_tol=1e-6)
