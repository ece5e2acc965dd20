"""Checks of token numbers, before they index an embedding, and of counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.models.config import ModelConfig

_SHAPES = {1: "(t,)", 2: "(samples, window)"}


def token_array(
    tokens: Any, vocab_size: int | None = None, *, name: str = "tokens", axes: Sequence[int] = (1,)
) -> NDArray[np.int32]:
    """Check token numbers and return them as the C core expects them.

    Parameters
    ----------
    tokens : array_like of integers
        May be empty.
    vocab_size : int, default=None
        Every token must be below it. None: below 2^31.
    name : str, default="tokens"
        Name of the argument in error messages.
    axes : sequence of int, default=(1,)
        Allowed numbers of axes, 1 or 2.

    Returns
    -------
    ndarray of int32, C-contiguous
        `tokens` itself if it already is one.

    Raises
    ------
    TypeError
        If the numbers are not integers; booleans are refused too.
    ValueError
        If the number of axes is wrong, or a token is masked, negative or not in the vocabulary.

    Examples
    --------
    >>> token_array([1, 2], vocab_size=3)
    array([1, 2], dtype=int32)
    >>> token_array([1, 3], vocab_size=3)
    Traceback (most recent call last):
    ValueError: tokens has 3, expected 0 to 2
    """
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise ValueError(f"{name} has rows of different lengths") from error
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}, expected integers")
    if array.ndim not in axes:
        expected = " or ".join(_SHAPES[count] for count in axes)
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    if np.ma.is_masked(tokens):
        raise ValueError(f"{name} has masked tokens, expected all of them")
    if array.size:
        limit = 2**31 if vocab_size is None else vocab_size
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} has {low if low < 0 else high}, expected 0 to {limit - 1}")
    return np.ascontiguousarray(array, np.int32)


def check_count(name: str, value: int, least: int) -> None:
    """Raise TypeError or ValueError unless an integer is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")


def check_sliding_window(count: int, config: ModelConfig) -> None:
    """Raise ValueError if a model would attend to more tokens than its sliding window."""
    window = config.sliding_window
    if window is not None and count > window:
        raise ValueError(
            f"{count} tokens exceed the sliding window of {window}, "
            "beyond which attention is not implemented"
        )
