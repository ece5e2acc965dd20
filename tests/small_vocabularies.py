"""Small vocabularies as GGUF metadata, for the tests of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "golden"
GOLDEN = json.loads((HERE / "tokens.json").read_text(encoding="utf-8"))

# GPT-2's alphabet: a byte that prints is itself, the others follow each other from U+0100.
PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTS]
ALPHABET = [chr(b if b in PRINTS else 256 + OTHERS.index(b)) for b in range(256)]


def byte_level(pre="gpt-2", **changes):
    """Metadata of a vocabulary with every byte, a few merges and two control tokens."""
    merges = ["l o", "lo w", "Ġ low", "Ġ Ġ", "1 2", "12 3"]
    tokens = ["<|endoftext|>", "<|im_end|>", *ALPHABET, *(m.replace(" ", "") for m in merges)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role }}: "
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    }
    metadata |= {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def sentencepiece(**changes):
    golden = GOLDEN["sentencepiece"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": golden["tokens"],
        "tokenizer.ggml.scores": np.array(golden["scores"], np.float32),
        "tokenizer.ggml.token_type": np.array(golden["token_type"], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
