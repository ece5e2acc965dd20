"""ModelConfig: the numbers that shape a network, from Hugging Face's keys or from GGUF's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Family:
    """What tells the model families apart that share this decoder.

    Attributes
    ----------
    name : str
        Hugging Face's ``model_type``.
    architecture : str
        GGUF's ``general.architecture``.
    qkv_bias : bool or None
        Whether the projections of query, key and value have biases; None: ``attention_bias`` says.
    qk_norm : bool
        Whether each head of query and key is normalised.
    head_dim : int or None
        Where the configuration has none; None: hidden_size / heads.
    rows_interleaved : bool
        Whether GGUF files hold the rows of query and key in pairs (2 i, 2 i + 1) that rotate
        together; Hugging Face's order is (i, i + head_dim / 2).
    """

    name: str
    architecture: str
    qkv_bias: bool | None = None
    qk_norm: bool = False
    head_dim: int | None = None
    rows_interleaved: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a LLaMA-like network.

    Attributes
    ----------
    family : str
        Hugging Face's ``model_type``: ``"llama"``, ``"mistral"``, ``"qwen2"``, ``"qwen3"``.
    hidden_size, intermediate_size, layers, heads, kv_heads, head_dim, vocab_size : int
    norm_eps : float
        Added to the mean square in every RMSNorm.
    rope_theta : float
        Base of the rotary frequencies.
    rope_scaling : dict or None
        Hugging Face's dictionary, with ``"rope_type"``; None: the plain frequencies.
    tie_embeddings : bool
        The head is the embedding.
    attention_bias : bool
        Query, key and value have biases.
    qk_norm : bool
        Each head of query and key is normalised.
    max_positions : int
        Context length that the model was made for.
    sliding_window : int or None
        Longest distance that the model attends over; longer inputs are refused.
    bos_token_id : int or None
    eos_token_ids : tuple of int
    name : str
        Of the model, as the file gives it.

    Raises
    ------
    ValueError
        If the numbers do not fit together.

    Examples
    --------
    >>> config = ModelConfig("llama", 64, 128, layers=2, heads=4, kv_heads=2, head_dim=16,
    ...                      vocab_size=100)
    >>> config.rope_frequencies()[0][:2]
    array([1.        , 0.31622777])
    >>> config.to_hf()["num_key_value_heads"]
    2
    """

    family: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads do not share {self.kv_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number")
        if not 0 <= self.norm_eps <= 1:
            raise ValueError(f"norm_eps is {self.norm_eps}, expected 0 to 1")

    def rope_frequencies(self) -> tuple[NDArray[np.float64], float]:
        """Return the angle per position of each pair, and the factor of sine and cosine.

        Returns
        -------
        frequencies : ndarray of shape (head_dim / 2,), float64
            Radians per position.
        factor : float

        References
        ----------
        B. Peng et al., "YaRN: efficient context window extension of large language models", 2023,
        equations 16-22, for ``"yarn"``; A. Dubey et al., "The Llama 3 herd of models", 2024, for
        ``"llama3"``; Y. Ding et al., "LongRoPE", 2024, for ``"longrope"``.
        """
        plain = self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        scaling = self.rope_scaling or {"rope_type": "default"}
        kind = scaling["rope_type"]
        if kind == "default":
            return plain, 1.0
        if kind == "linear":
            return plain / scaling["factor"], 1.0
        if kind == "longrope":
            return plain / np.asarray(scaling["short_factor"]), float(scaling["attention_factor"])
        if kind == "llama3":
            return _llama3(plain, scaling), 1.0
        return _yarn(plain, self.rope_theta, scaling)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a ``config.json`` that `config_from_hf` reads back."""
        config: dict[str, Any] = {
            "model_type": self.family,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "max_position_embeddings": self.max_positions,
            "sliding_window": self.sliding_window,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "_name_or_path": self.name,
        }
        if self.sliding_window:
            config["use_sliding_window"] = True
        return config


def _llama3(plain: NDArray[np.float64], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """Long waves slowed by `factor`, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    blended: NDArray[np.float64] = (keep + (1 - keep) / scaling["factor"]) * plain
    return blended


def _yarn(
    plain: NDArray[np.float64], theta: float, scaling: Mapping[str, Any]
) -> tuple[NDArray[np.float64], float]:
    """As for llama3, with a blend that is linear in the index of the frequency."""
    pairs = len(plain)
    positions = scaling["original_max_position_embeddings"]
    factor = scaling["factor"]

    def index_of(turns: float) -> float:
        return pairs * math.log(positions / (turns * 2 * math.pi)) / math.log(theta)

    low = index_of(scaling.get("beta_fast") or 32)
    high = index_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001  # as the reference implementation does
    slow = np.clip((np.arange(pairs) - low) / (high - low), 0, 1)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    elif attention is None:
        attention = magnitude(1)
    return (1 - slow) * plain + slow * plain / factor, float(attention)


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
_GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
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


class _Keys:
    """Values of a configuration, each checked; what the decoder lacks is collected."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix
        self.differences: list[str] = []

    def get(self, key: str) -> Any:
        return self.values.get(self.prefix + key)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        for key, values in neutral.items():
            if self.get(key) not in values:
                self.differences.append(f"{self.prefix}{key} is {self.get(key)!r}")

    def wrong(self, key: str, value: Any, expected: str) -> FormatError:
        return FormatError(f"{self.where}: {self.prefix}{key} is {value!r}, expected {expected}")


def _unsupported(where: str, differences: Sequence[str]) -> ValueError:
    return ValueError(f"{where}: the model is not supported: {'; '.join(differences)}")


def _token_ids(keys: _Keys, key: str) -> tuple[int, ...]:
    value = keys.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int for v in values):
        raise keys.wrong(key, value, "token numbers")
    return tuple(values)


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
    keys = _Keys(values, where)
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
        raise _unsupported(where, keys.differences)

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
            bos_token_id=next(iter(_token_ids(keys, "bos_token_id")), None),
            eos_token_ids=_token_ids(keys, "eos_token_id"),
            name=str(keys.get("_name_or_path") or ""),
        )
    except ValueError as error:
        raise (
            error if isinstance(error, FormatError) else FormatError(f"{where}: {error}")
        ) from None


def _rope_from_hf(keys: _Keys, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling; transformers 5 keeps both in ``rope_parameters``."""
    found = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise keys.wrong("rope_scaling", found, "an object")
    rope = _Keys(found, keys.where, "")
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
    keys = _Keys(metadata, where, f"{architecture}.")
    if family is None:
        keys.differences.append(
            f"general.architecture is {architecture!r}, expected one of ({', '.join(families)})"
        )
    keys.neutral(_GGUF_NEUTRAL)
    hidden, heads = keys.get("embedding_length"), keys.get("attention.head_count")
    if isinstance(heads, np.ndarray) or isinstance(keys.get("attention.head_count_kv"), np.ndarray):
        keys.differences.append("attention.head_count differs between blocks")
        raise _unsupported(where, keys.differences)
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            keys.differences.append(f"{keys.prefix}{key} is {keys.get(key)}, not {head_dim}")
    scaling = _rope_from_gguf(keys, rope_factors, head_dim)
    if keys.differences or family is None:
        raise _unsupported(where, keys.differences)
    tokens = _Keys(metadata, where, "tokenizer.ggml.")
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
            bos_token_id=next(iter(_token_ids(tokens, "bos_token_id")), None),
            eos_token_ids=_token_ids(tokens, "eos_token_id"),
            name=str(metadata.get("general.name", "")),
        )
    except ValueError as error:
        raise (
            error if isinstance(error, FormatError) else FormatError(f"{where}: {error}")
        ) from None


def _rope_from_gguf(
    keys: _Keys, factors: NDArray[np.float32] | None, head_dim: int
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
