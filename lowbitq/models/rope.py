"""Rotary frequencies: plain, and scaled for long contexts in all ways of published models."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

# Positions have 32 bits, and the decoder accepts no larger factor of sine and cosine.
_POSITIONS, _LARGEST_FACTOR = 2.0**31, 1e6


def rope_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None
) -> tuple[NDArray[np.float64], float]:
    """Return each pair's angle per position, and the factor of sine and cosine.

    Parameters
    ----------
    head_dim : int
    theta : float
        Base of the frequencies.
    scaling : mapping or None
        Hugging Face's dictionary, with ``"rope_type"``; None: plain frequencies.

    Returns
    -------
    frequencies : ndarray of shape (head_dim / 2,), float64
        Radians per position.
    factor : float
        Factor of sine and cosine.

    Raises
    ------
    ValueError
        If the settings give infinite angles or an invalid factor.

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
    try:
        with np.errstate(all="ignore"):
            angles, factor = _scaled(head_dim, theta, scaling or {"rope_type": "default"})
            finite = bool(np.isfinite(angles * _POSITIONS).all())
    except ArithmeticError as error:
        raise _refusal(theta, scaling, str(error)) from None
    if not finite:
        raise _refusal(theta, scaling, f"frequencies reach {angles.max()}")
    if not 0 < factor <= _LARGEST_FACTOR:
        found = f"the factor of sine and cosine is {factor}, expected 0 to {_LARGEST_FACTOR:.0f}"
        raise _refusal(theta, scaling, found)
    return angles, factor


def longrope_factor(stretch: float, positions: int) -> float:
    """Return LongRoPE's factor of sine and cosine for `stretch` times `positions` tokens."""
    return math.sqrt(1 + math.log(stretch) / math.log(positions)) if stretch > 1 else 1.0


def yarn_factor(stretch: float, weight: float = 1.0) -> float:
    """Return YaRN's factor of sine and cosine; `weight` scales its growth with `stretch`."""
    return 0.1 * weight * math.log(stretch) + 1 if stretch > 1 else 1.0


def _refusal(theta: float, scaling: Mapping[str, Any] | None, found: str) -> ValueError:
    return ValueError(f"rope_theta {theta} with rope_scaling {reprlib.repr(scaling)}: {found}")


def _scaled(
    head_dim: int, theta: float, scaling: Mapping[str, Any]
) -> tuple[NDArray[np.float64], float]:
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    match scaling["rope_type"]:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / scaling["factor"], 1.0
        case "longrope":
            factors = np.asarray(scaling["short_factor"], np.float64)
            if factors.shape != plain.shape:
                raise _refusal(theta, scaling, f"expected {plain.size} factors")
            return plain / factors, float(scaling["attention_factor"])
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(plain, theta, scaling)
        case kind:
            raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(ROPE_TYPES)}")


def _llama3(plain: NDArray[np.float64], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """Divide frequencies of long waves by `factor`, keep short waves, blend those between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    blended: NDArray[np.float64] = (keep + (1 - keep) / scaling["factor"]) * plain
    return blended


def _yarn(
    plain: NDArray[np.float64], theta: float, scaling: Mapping[str, Any]
) -> tuple[NDArray[np.float64], float]:
    """Scale as in llama3, with a blend that is linear in the frequency's index."""
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
    if low > high:  # transformers and llama.cpp disagree on what this means
        raise _refusal(theta, scaling, f"the ramp of YaRN runs from pair {low} down to {high}")
    if low == high:
        high += 0.001  # as the reference implementation does
    slow = np.clip((np.arange(pairs) - low) / (high - low), 0, 1)

    attention = scaling.get("attention_factor")
    if attention is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        numerator, denominator = scaling["mscale"], scaling["mscale_all_dim"]
        attention = yarn_factor(factor, numerator) / yarn_factor(factor, denominator)
    elif attention is None:
        attention = yarn_factor(factor)
    return (1 - slow) * plain + slow * plain / factor, float(attention)
