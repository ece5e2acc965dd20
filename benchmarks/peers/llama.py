"""llama.cpp's prefill and decode, through llama-cpp-python."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import find

LABEL = "llama.cpp Q4_0"


class Llama:
    """A model file as Q4_0, with llama.cpp's default settings except the threads.

    Parameters
    ----------
    source : path
        A GGUF file; tensors of other types are rounded to Q4_0, in a temporary file.
    threads : int
    context : int
        Capacity of the cache in tokens.
    """

    def __init__(self, source: Path, *, threads: int, context: int) -> None:
        module = _module()
        with tempfile.TemporaryDirectory() as folder, _silence():
            target = Path(folder) / "q4_0.gguf"
            options = module.llama_model_quantize_default_params()
            options.ftype = module.LLAMA_FTYPE_MOSTLY_Q4_0
            options.allow_requantize = True
            options.nthread = threads
            paths = [os.fsencode(path) for path in (source, target)]
            if module.llama_model_quantize(*paths, ctypes.byref(options)):
                raise RuntimeError(f"llama.cpp cannot quantize {source}")
            self._model = module.Llama(
                str(target),
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                n_batch=512,
                n_ubatch=512,
                use_mmap=False,  # the file is deleted
                verbose=False,
            )

    def prefill(self, tokens: Sequence[int]) -> Callable[[], object]:
        """Return a call that runs `tokens` with an empty cache."""
        return lambda: self._eval(0, tokens)

    def decode(self, past: Sequence[int]) -> Callable[[], object]:
        """Return a call that runs one token after the tokens `past`."""
        self._eval(0, past)
        return lambda: self._eval(len(past), past[:1])

    def _eval(self, past: int, tokens: Sequence[int]) -> None:
        self._model.n_tokens = past  # drops later tokens from the cache
        self._model.eval(tokens)


def load(source: Path, *, threads: int, context: int) -> Llama | None:
    """Return the model, if llama-cpp-python is found."""
    return Llama(source, threads=threads, context=context) if find("llama_cpp/lib") else None


def _module() -> Any:
    folder = find("llama_cpp")
    if folder is None:
        raise FileNotFoundError("llama-cpp-python is not found; see benchmarks/peers/README.md")
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))  # last, so NumPy and others stay ours
    import llama_cpp

    return llama_cpp


@contextlib.contextmanager
def _silence() -> Any:
    """Discard standard output and error, including C's."""
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
