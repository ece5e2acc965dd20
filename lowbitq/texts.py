"""Text to windows: a text in any form becomes tokens, and tokens become windows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq.models.tokenizer import Tokenizer

Text = str | os.PathLike[str] | Sequence[str] | NDArray[np.integer[Any]]


def windows(
    tokenizer: Tokenizer | None,
    text: Text,
    *,
    samples: int = 128,
    window: int = 2048,
    seed: int = 0,
) -> NDArray[np.int32]:
    """Cut a text into windows at random places, spread evenly over it.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None is enough if `text` is tokens.
    text : str, path, sequence of str or ndarray of int
        The text itself; the path of a file in UTF-8 (a str that ends in ``.txt``); several texts,
        which are joined; or tokens: one long row, or windows of shape (samples, window) as they
        are to be used.
    samples, window : int
        How many windows of how many tokens. A tokenizer that begins texts with a token of its own
        has it begin each window.
    seed : int, default=0
        The same seed gives the same tokens.

    Returns
    -------
    ndarray of shape (samples, window), int32

    Raises
    ------
    ValueError
        If the text is empty or has too few tokens.

    Examples
    --------
    >>> windows(None, np.arange(100), samples=2, window=4, seed=1)
    array([[24, 25, 26, 27],
           [94, 95, 96, 97]], dtype=int32)
    """
    if samples < 1 or window < 2:
        raise ValueError(f"samples = {samples}, window = {window}: expected at least 1 and 2")
    if isinstance(text, np.ndarray) and text.ndim == 2:
        return np.ascontiguousarray(text, np.int32)
    tokens = tokenize(tokenizer, text)
    begins = tokenizer is not None and tokenizer.adds_bos and not isinstance(text, np.ndarray)
    length = window - begins
    needed = length + samples - 1
    if len(tokens) < needed:
        raise ValueError(
            f"text has {len(tokens)} tokens; {samples} windows of {window} need at least {needed}"
        )
    # One window begins in each of `samples` equal parts of the places where one can.
    places = len(tokens) - length + 1
    parts = np.arange(samples) + np.random.default_rng(seed).random(samples)
    starts = (parts * places / samples).astype(np.int64)
    cut = np.asarray(tokens, np.int32)[starts[:, None] + np.arange(length)]
    if begins:
        assert tokenizer is not None
        assert tokenizer.bos_id is not None
        cut = np.insert(cut, 0, tokenizer.bos_id, axis=1)
    return np.ascontiguousarray(cut, np.int32)


def tokenize(tokenizer: Tokenizer | None, text: Text) -> NDArray[np.integer[Any]]:
    """Return the tokens (t,) of a text in any of the forms that `windows` takes."""
    if isinstance(text, np.ndarray):
        if text.ndim != 1 or text.dtype.kind not in "iu":
            raise ValueError(
                f"tokens have shape {text.shape} and dtype {text.dtype}, expected (t,) integers"
            )
        return text
    if isinstance(text, os.PathLike) or (isinstance(text, str) and text.endswith(".txt")):
        text = Path(text).read_text(encoding="utf-8")
    if not isinstance(text, str):
        parts = list(text) if isinstance(text, Sequence) else [text]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(
                f"text is {type(text).__name__}, expected str, path, sequence of str or ndarray"
            )
        text = "\n\n".join(parts)
    if not text.strip():
        raise ValueError("text is empty")
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: give tokens instead of text")
    return tokenizer.encode(text)


def default_text() -> str:
    """Return the calibration text for want of any other: the topics of Python's own help.

    Returns
    -------
    str
        About 700 kB of English and code.
    """
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


@dataclass(frozen=True)
class Texts:
    """What to calibrate on and what to predict, with their names for people."""

    calibration: str
    held_out: str
    calibrated_on: str
    predicted: str


def read_texts(path: Path | None, *, halves: bool = False) -> Texts:
    """Text from a file (in two halves, or the same for both), LOWBITQ_DATA or Python's help."""
    if path is not None:
        text = path.read_text(encoding="utf-8")
        if not halves:
            return Texts(text, text, str(path), str(path))
        middle = len(text) // 2
        return Texts(
            text[:middle], text[middle:], f"the first half of {path}", f"the second half of {path}"
        )
    folder = os.environ.get("LOWBITQ_DATA")
    if folder:
        calibration, held_out = (
            (Path(folder) / name).read_text(encoding="utf-8")
            for name in ("wikitext2-valid.txt", "wikitext2-test.txt")
        )
        return Texts(calibration, held_out, "wikitext2-valid.txt", "wikitext2-test.txt")
    from pydoc_data import topics

    paragraphs = [
        [paragraph.strip("\n") for paragraph in text.split("\n\n")]
        for _, text in sorted(topics.topics.items())
    ]
    # Topics share a fifth of their paragraphs: what was calibrated on is not predicted.
    first = [paragraph for topic in paragraphs[::2] for paragraph in topic]
    second = [paragraph for topic in paragraphs[1::2] for paragraph in topic]
    seen = set(first)
    return Texts(
        "\n\n".join(first),
        "\n\n".join(paragraph for paragraph in second if paragraph not in seen),
        "one half of Python's help topics",
        "the other half of Python's help topics",
    )
