"""Tokenizers: GGUF metadata, Hugging Face folders, round trips, damaged files."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbitq import FormatError
from lowbitq.models.tokenizer import Tokenizer
from lowbitq.models.vocabulary import PRE_TOKENIZERS

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


def pieces(tokenizer, text):
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=TEXT)
def test_decode_inverts_encode(pre, text):
    tokenizer = Tokenizer.from_gguf(byte_level(pre))
    expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == expected


@given(text=TEXT)
def test_stream_is_decode_in_pieces(text):
    tokenizer = Tokenizer.from_gguf(byte_level())
    tokens = tokenizer.encode(text)
    assert "".join(tokenizer.stream(tokens)) == tokenizer.decode(tokens)


def test_save_keeps_behaviour(tmp_path):
    tokenizer = Tokenizer.from_gguf(byte_level(ggml__add_bos_token=True))
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    text = "low lower <|im_end|>\n 123  456"
    for special in (True, False):
        expected = tokenizer.encode(text, special=special)
        np.testing.assert_array_equal(again.encode(text, special=special), expected)
    messages = [{"role": "user", "content": "hi"}]
    assert again.chat(messages) == tokenizer.chat(messages)
    assert (again.bos_id, again.eos_ids, again.adds_bos) == (0, (1, 0), True)
    assert again.vocab_size == tokenizer.vocab_size


def test_special_tokens_in_a_text():
    tokenizer = Tokenizer.from_gguf(byte_level())
    assert tokenizer.encode("<|im_end|>").tolist() == [1]
    plain = tokenizer.encode("<|im_end|>", special=False)
    assert len(plain) == 10
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert tokenizer.decode([1, *plain], skip_special=True) == "<|im_end|>"


def test_bos_is_added_once():
    tokenizer = Tokenizer.from_gguf(byte_level(ggml__add_bos_token=True))
    assert tokenizer.encode("low")[0] == 0
    assert tokenizer.encode("<|endoftext|>low").tolist() == tokenizer.encode("low").tolist()
    assert 0 not in tokenizer.encode("low", add_bos=False)
    assert Tokenizer.from_gguf(byte_level()).encode("").tolist() == []


def test_unknown_pre_tokenizer_is_refused():
    for pre in ("no-such-rule", None):
        with pytest.raises(FormatError, match=r"a\.gguf: tokenizer\.ggml\.pre .*smollm"):
            Tokenizer.from_gguf(byte_level(pre), source="a.gguf")


def test_broken_json_names_file_and_offset(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"é": 1, }', encoding="utf-8")
    with pytest.raises(FormatError, match=r"tokenizer\.json: byte 10"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff')
    with pytest.raises(FormatError, match=r"tokenizer\.json: byte 2"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
