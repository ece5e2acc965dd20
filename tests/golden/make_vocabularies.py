"""Makes vocabularies.json: what llama.cpp makes of random GGUF vocabularies.

    python tests/golden/make_vocabularies.py

Needs llama-cpp-python and gguf. A vocabulary has an alphabet, merges or scores, and tokens with
names that llama.cpp knows, whose types and roles are drawn at random. Texts are in composed form,
because llama.cpp does not normalise where published tokenizers do.
"""

from __future__ import annotations

import ctypes
import json
import random
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import tokenizers

HERE = Path(__file__).parent
CASES = 30
PRE = ["default", "gpt-2", "smollm", "starcoder", "refact", "llama-bpe", "qwen2", "tekken"]
NAMES = [
    *("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"),
    *("<|end|>", "<|return|>", "<|call|>", "<|tool_response>", "<eos>", "[EOS]", "<EOT>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool>"),
]
KEYS = ["eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep"]
TEXTS = [
    "The low lows of 12345 lower-than-low tokens, it's I'LL DON'T <|im_end|> end</s>.",
    "  two  spaces\n\n\tand\r\n lines  <tool>x<|endoftext|> low ",
    "你好,世界!low 2024年 Привет мир <s>x = [1,22,333];  // 1,000.5 $+<=>^~|`a",
    "a<unk>low<|eot_id|> <|fim_pad|>\n<EOT>[EOS] _under_ (low)…— low\u3000low",
]
PIECES = ["▁low", "low", "lo", "er", "▁", "▁the", "12", "▁▁", "en", "end"]
BPE = ["l o", "lo w", "Ġ low", "Ġ Ġ", "1 2", "12 3", "e r", "Ġ t", "ä ½", "Ċ Ċ", ", 1", "= >"]

quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))


def vocabulary(chance: random.Random, pre: str) -> dict:
    """Metadata of a random vocabulary."""
    names = chance.sample(NAMES, chance.randrange(4, 14))
    if chance.random() < 0.3:
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        letters = sorted({c for text in TEXTS[:2] for c in text if c.isalnum()} | {"<", ">", "|"})
        pieces = list(dict.fromkeys([*PIECES, *letters]))
        tokens = ["<unk>", "<s>", "</s>", *alphabet, *pieces]
        tokens += [name for name in names if name not in tokens]
        types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
        scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
        kind = {"model": "llama", "scores": scores}
    else:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokens = [*alphabet, *(merge.replace(" ", "") for merge in BPE), *names]
        types = [1] * len(tokens)
        kind = {"model": "gpt2", "merges": BPE, "pre": pre}
    for name in names:
        types[tokens.index(name)] = chance.choice([1, 2, 3, 3, 3] + [4] * (name != "</s>"))
    keys = {key: chance.choice(names) for key in chance.sample(KEYS, chance.randrange(5))}
    # Roles make tokens special and ends here even where llama.cpp makes exceptions of these names.
    plain = [name for name in names if name not in ("<|end|>", "</s>")]
    if kind["model"] == "llama" or chance.random() < 0.5:
        keys["bos"] = chance.choice(plain)
    keys["eos"] = chance.choice(plain)
    for key in {"bos", "eos"} & keys.keys():
        types[tokens.index(keys[key])] = 3
    ids = {f"{key}_token_id": tokens.index(name) for key, name in keys.items()}
    flags = {"add_bos_token": "bos" in keys and chance.random() < 0.5}
    return {**kind, "tokens": tokens, "token_type": types, **ids, **flags}


def load(path: Path) -> ctypes.c_void_p:
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    return llama_cpp.llama_model_load_from_file(str(path).encode(), options)


def write(path: Path, metadata: dict) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def outcome(metadata: dict) -> dict:
    """The ends of text and the tokens of each text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write(path, metadata)
        model = load(path)
        vocab = llama_cpp.llama_model_get_vocab(model)
        ends = [i for i in range(len(metadata["tokens"])) if llama_cpp.llama_vocab_is_eog(vocab, i)]
        ids = [tokenize(vocab, text) for text in TEXTS]
        llama_cpp.llama_model_free(model)
    return {"ends": ends, "ids": ids}


def tokenize(vocab: ctypes.c_void_p, text: str) -> list[int]:
    raw = text.encode()
    ids = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), True, True)
    return list(ids[:count])


def main() -> None:
    chance = random.Random(4)
    rows = []
    for index in range(CASES):
        metadata = vocabulary(chance, PRE[index % len(PRE)])
        row = {"metadata": metadata, **outcome(metadata)}
        rows.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
    made = json.dumps(f"llama-cpp-python {llama_cpp.__version__}")
    texts, cases = json.dumps(TEXTS, ensure_ascii=False), ",\n".join(rows)
    text = f'{{\n"made with": {made},\n"texts": {texts},\n"cases": [\n{cases}\n]\n}}\n'
    (HERE / "vocabularies.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
