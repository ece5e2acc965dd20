"""Logits of llama.cpp for files that `lowbitq.export` writes, for test_llama_cpp.py.

    pip install xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11548
    PYTHONPATH=.:tests python tests/golden/make_llama_cpp.py

The second package has the headers for cffi. Its own library needs glibc 2.38; where that is older,
rename its libllama.so and set LLAMA_CPP_LIB to xllamacpp.abi3.so, which has the same functions.

Writes llama_cpp.npz: float32 logits for 16 tokens of each model of exported_models.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import exported_models
import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from llama_cpp_py_sync.llama import Llama

import lowbitq as lq


def logits_of(path, tokens):
    ffi, lib, count = get_ffi(), get_lib(), len(tokens)
    options = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, "n_threads": 1, "n_threads_batch": 1}
    model = Llama(str(path), **options, type_k="f32", type_v="f32", flash_attn_type=0)
    batch = lib.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert lib.llama_decode(model._ctx, batch) == 0
    raw = ffi.buffer(lib.llama_get_logits(model._ctx), 4 * count * exported_models.VOCAB)
    logits = np.frombuffer(raw, np.float32).reshape(count, -1).copy()
    lib.llama_batch_free(batch)
    return logits


def main():
    found = {}
    for name in exported_models.MODELS:
        model, dtype = exported_models.model_of(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            lq.export(model, path, "gguf", dtype=dtype)
            found[name] = logits_of(path, exported_models.TOKENS)
    np.savez_compressed(Path(__file__).parent / "llama_cpp.npz", **found)


if __name__ == "__main__":
    main()
