"""Logits of transformers, for test_models.py.

    pip install torch==2.13.0 transformers==5.24.0 gguf
    python tests/golden/make_logits.py SmolLM2-135M-Instruct.Q4_1.gguf

Writes logits_tiny.npz, the logits of every model of tiny_models.py, and logits_smollm2.npz: of 32
tokens the 64 largest logits, where they are, and the logarithm of the sum of all exponentials.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
TEXT = (
    "The tower is 324 metres tall, about the same height as an 81-storey building, and the "
    "tallest structure in Paris. Its base is square."
)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None]).logits[0].float().numpy()


def tiny(name):
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_folder(name, folder)
        # One element of attention at a time, as written, rather than a fused kernel.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        return logits_of(model, tiny_models.tokens_of(name))


def smollm2(path):
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokens = AutoTokenizer.from_pretrained(**where)(TEXT)["input_ids"][:32]
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    logits = logits_of(model, tokens)
    top = np.argsort(-logits, axis=1)[:, :64].astype(np.uint16)
    return {
        "tokens": np.array(tokens, np.int32),
        "top": top,
        "logits": np.take_along_axis(logits, top.astype(int), 1),
        "log_sum": np.log(np.exp(logits.astype(float)).sum(1)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.savez_compressed(HERE / "logits_tiny.npz", **{n: tiny(n) for n in tiny_models.MODELS})
    np.savez_compressed(HERE / "logits_smollm2.npz", **smollm2(Path(sys.argv[1])))
