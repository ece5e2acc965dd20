"""Rotary frequencies: plain, and slowed for long contexts in each way that published models use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None
) -> tuple[NDArray[np.float64], float]:
    """Return the angle per position of each pair, and the factor of sine and cosine.

    Parameters
    ----------
    head_dim : int
    theta : float
        Base of the frequencies.
    scaling : mapping or None
        Hugging Face's dictionary, with ``"rope_type"``; None: the plain frequencies.

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

    Examples
    --------
    >>> rope_frequencies(4, 10000.0, {"rope_type": "linear", "factor": 4.0})
    (array([0.25  , 0.0025]), 1.0)
    """
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scaling = scaling or {"rope_type": "default"}
    kind = scaling["rope_type"]
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "longrope":
        return plain / np.asarray(scaling["short_factor"]), float(scaling["attention_factor"])
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, theta, scaling)


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
