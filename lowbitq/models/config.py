"""ModelConfig: shape and constants of a network, and checks of the keys that define them."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.models.rope import rope_frequencies

# More is refused, which bounds the cost of a hostile file; models have heads of 64 to 512 and up to
# 126 layers.
_LONGEST_HEAD = _MOST_LAYERS = 1 << 16


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a LLaMA-like network.

    Attributes
    ----------
    family : str
        Hugging Face's ``model_type``: ``"llama"``, ``"mistral"``, ``"ministral"``, ``"smollm3"``,
        ``"qwen2"``, ``"qwen3"``.
    hidden_size, intermediate_size, layers, heads, kv_heads, head_dim, vocab_size : int
    norm_eps : float
        Added to the mean square in every RMSNorm.
    rope_theta : float
        Base of the rotary frequencies.
    rope_scaling : dict or None
        Hugging Face's dictionary, with ``"rope_type"``; None: plain frequencies.
    rope_layers : tuple of bool, or None
        For each layer whether it has rotary embeddings; None: all have.
    tie_embeddings : bool
        Whether the head is the embedding.
    attention_bias : bool
        Whether query, key and value have biases.
    mlp_bias : bool
        Whether the layers of the MLP have biases.
    qk_norm : bool
        Whether each head of query and key is normalised.
    max_positions : int
        Context length that the model was trained for.
    sliding_window : int or None
        Maximum distance of attention; longer inputs are refused.
    bos_token_id : int or None
    eos_token_ids : tuple of int
    name : str
        Name of the model in its file.

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
    rope_layers: tuple[bool, ...] | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
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
        if self.rope_layers is not None and len(self.rope_layers) != self.layers:
            raise ValueError(
                f"rope_layers has {len(self.rope_layers)} entries, expected {self.layers}, "
                "one for each layer"
            )
        if self.head_dim > _LONGEST_HEAD:
            raise ValueError(f"head_dim is {self.head_dim}, expected at most {_LONGEST_HEAD}")
        self.rope_frequencies()  # raises ValueError if there are none

    def rope_frequencies(self) -> tuple[NDArray[np.float64], float]:
        """Return each pair's angle per position, and the factor of sine and cosine."""
        return rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

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
            "mlp_bias": self.mlp_bias,
            "max_position_embeddings": self.max_positions,
            "sliding_window": self.sliding_window,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "_name_or_path": self.name,
        }
        if self.sliding_window:
            config |= {"use_sliding_window": True, "max_window_layers": 0}
        if self.rope_layers is not None:
            config["no_rope_layers"] = [int(rope) for rope in self.rope_layers]
        return config


def rope_layers(layers: int, interval: int | None) -> tuple[bool, ...] | None:
    """Return `ModelConfig.rope_layers` if every `interval`-th layer lacks rotary embeddings.

    Examples
    --------
    >>> rope_layers(5, 4)
    (True, True, True, False, True)
    >>> rope_layers(5, None)
    """
    if interval is None:
        return None
    if layers > _MOST_LAYERS:
        raise ValueError(f"there are {layers} layers, expected at most {_MOST_LAYERS}")
    return tuple(number % interval != 0 for number in range(1, layers + 1))


class Keys:
    """Checked values of a configuration; collects the settings that the decoder lacks."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix
        self.differences: list[str] = []

    def get(self, key: str) -> Any:
        return self.values.get(self.prefix + key)

    def size(self, key: str, default: int | None = None, *, smallest: int = 1) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not smallest <= value < 2**31:
            expected = "a positive integer" if smallest == 1 else f"an integer >= {smallest}"
            raise self.wrong(key, value, expected)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, value, "a positive number")
        if not 0 < value <= sys.float_info.max:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.get(key)
        return value if isinstance(value, str) else ""

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int and 0 <= v < 2**32 for v in values):
            raise self.wrong(key, value, "token numbers")
        return tuple(values)

    def is_off(self, key: str) -> bool:
        """Whether a key is missing, null, false, zero or empty, so that it has no effect."""
        value = self.get(key)
        return not value.any() if isinstance(value, np.ndarray) else not value

    def neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Record the keys that have a value other than these."""
        for key, values in neutral.items():
            value = self.get(key)
            if value is not None and not any(_same(value, v) for v in values):
                self.differs(key, value)

    def understood(self, known: Collection[str], subject: str = "") -> None:
        """Record the keys that match the pattern `subject` and are neither known nor off."""
        own = [name for name in self.values if name.startswith(self.prefix)]
        for key in (name.removeprefix(self.prefix) for name in own):
            if key not in known and re.search(subject, key) and not self.is_off(key):
                self.differs(key, self.get(key))

    def differs(self, key: str, value: Any) -> None:
        self.differences.append(f"{self.prefix + key:.99} is {_shown(value)}")

    def wrong(self, key: str, value: Any, expected: str) -> FormatError:
        found = f"{self.prefix}{key} is {_shown(value)}"
        return FormatError(f"{self.where}: {found}, expected {expected}")

    def checked(self, make: Callable[[], ModelConfig]) -> ModelConfig:
        """Call `make`; turn a ValueError of ModelConfig into a FormatError that names the file."""
        try:
            return make()
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{self.where}: {error}") from None

    def unsupported(self) -> ValueError:
        """Return the error that lists everything the decoder lacks."""
        found = "; ".join(self.differences)
        return ValueError(f"{self.where}: the model is not supported: {found}")


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values of a file are equal; True is not 1, and an array equals nothing."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return isinstance(value, (int, float, str)) and bool(value == neutral)


def _shown(value: Any) -> str:
    """Return a value, shortened for messages."""
    return f"an array of {value.size}" if isinstance(value, np.ndarray) else reprlib.repr(value)
