"""Tokenizers: equal to transformers' and sentencepiece's, round trips, damaged files."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbitq import FormatError
from lowbitq.checkpoints.gguf import read_gguf
from lowbitq.models.chat import render_chat
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


HERE = Path(__file__).parent / "golden"
GOLDEN = json.loads((HERE / "tokens.json").read_text(encoding="utf-8"))
MIXED = (HERE / "mixed.txt").read_bytes().decode()


def assert_golden(tokens, golden):
    """Equal to the ids that make_tokens.py summed up; the sample says where they part."""
    np.testing.assert_array_equal(tokens[::499], golden["every_499th"])
    assert tokens.dtype == np.int32
    assert tokens.size == golden["count"]
    assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() == golden["sha256"]


def test_the_text_is_the_one_the_golden_tokens_are_of():
    assert hashlib.sha256(MIXED.encode()).hexdigest() == GOLDEN["text"]
    assert len(MIXED.encode()) > 99_000


@pytest.fixture(scope="module")
def smollm(smollm2):
    return Tokenizer.from_gguf(read_gguf(smollm2).metadata, source=str(smollm2))


@pytest.mark.model
def test_smollm_equals_transformers(smollm):
    tokens = smollm.encode(MIXED)
    assert_golden(tokens, GOLDEN["smollm"])
    assert smollm.decode(tokens) == MIXED
    letters = "".join(
        c for c in MIXED if (c < "\x80" and not c.isdigit()) or "\u4e00" <= c <= "\u9fff"
    )
    assert_golden(smollm.encode(letters), GOLDEN["smollm, transformers unchanged"])


@pytest.mark.model
def test_smollm_knows_its_ends_and_its_chat(smollm):
    assert (smollm.bos_id, smollm.eos_ids, smollm.adds_bos) == (1, (2, 0), False)
    assert smollm.vocab_size == 49152
    assert smollm.chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("pre", GOLDEN["byte level"])
def test_byte_level_equals_transformers(pre, tmp_path):
    golden = GOLDEN["byte level"][pre]
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": golden["tokens"],
            "tokenizer.ggml.token_type": np.array(golden["token_type"], np.int32),
            "tokenizer.ggml.merges": golden["merges"],
        }
    )
    assert_golden(tokenizer.encode(MIXED), golden["text"])
    tokenizer.save(tmp_path)
    assert_golden(Tokenizer.from_folder(tmp_path).encode(MIXED), golden["text"])


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


def test_sentencepiece_equals_its_reference():
    golden = GOLDEN["sentencepiece"]
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    tokens = tokenizer.encode(MIXED, special=False, add_bos=False)
    assert_golden(tokens, golden["text"])
    assert tokenizer.decode(tokens) == MIXED
    for text, expected in golden["starts"]:
        assert tokenizer.encode(text, add_bos=False).tolist() == expected, text
        assert tokenizer.decode(expected) == text.replace("▁", " ")


def test_sentencepiece_special_tokens():
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)
    tokens = tokenizer.encode("the end</s>")
    assert tokens[0] == 1
    assert tokens[-1] == 2
    without = Tokenizer.from_gguf(sentencepiece(add_space_prefix=False, add_bos_token=False))
    np.testing.assert_array_equal(without.encode(" the end</s>"), tokens[1:])


@pytest.mark.parametrize("golden", GOLDEN["chats"])
def test_chat_equals_transformers(golden):
    text = render_chat(
        golden["template"],
        GOLDEN["conversation"],
        add_generation_prompt=golden["add_generation_prompt"],
        variables=GOLDEN["names"] | {"enable_thinking": True},
    )
    assert text == golden["text"]


SIDE_FILES = json.loads((HERE / "side_files.json").read_text())


@pytest.mark.parametrize("case", SIDE_FILES["cases"])
def test_side_files_are_merged_as_transformers_merges_them(tmp_path, case):
    changes = dict(case["files"]["tokenizer"])
    if begins := changes.pop("begins_with", None):
        text, first = {"Sequence": {"id": "A", "type_id": 0}}, {"id": begins, "type_id": 0}
        changes["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": first}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {begins: {"id": begins, "ids": [0], "tokens": [begins]}},
        }
    files = case["files"] | {"tokenizer": SIDE_FILES["tokenizer"] | changes}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    for _ in range(2):  # as it was, and as it is saved
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.bos_id == case["bos"]
        assert tokenizer.eos_ids == (() if case["eos"] is None else (case["eos"],))
        assert tokenizer.vocab_size == 1 + max(261, *(n or 0 for n in case["numbers"].values()))
        for text, ids, shown in zip(SIDE_FILES["texts"], case["ids"], case["shown"], strict=True):
            assert tokenizer.encode(text).tolist() == ids
            assert tokenizer.decode(ids, skip_special=True) == shown
        roles = [f"{role}={name}" for role, name in case["names"].items()]
        template = " ".join(f"{role}={{{{ {role} }}}}" for role in case["names"])
        tokenizer.chat_template = template
        assert tokenizer.chat([]).split(" ") == (roles or [""])
        tokenizer.save(tmp_path)


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


def test_stream_keeps_the_space_that_a_text_does_not_begin_with():
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    prompt, rest = tokenizer.encode("The nation"), tokenizer.encode("and 你好 🙂", add_bos=False)
    assert "".join(tokenizer.stream(rest)) == "and 你好 🙂"
    assert "".join(tokenizer.stream(rest, after=prompt)) == " and 你好 🙂"
    assert "".join(tokenizer.stream(rest, after=[1], skip_special=True)) == "and 你好 🙂"
    half = tokenizer.encode("🙂", add_bos=False)[:-1]
    assert "".join(tokenizer.stream(half)) == tokenizer.decode(half) == "\ufffd" * 3


def test_numbers_without_a_token_are_nothing():
    tokenizer = Tokenizer.from_gguf(byte_level())
    assert tokenizer.decode([10_000_000]) == tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("tokens", "error"), [([-1], ValueError), ([[1]], ValueError), ([0.5], TypeError)]
)
def test_decode_refuses(tokens, error):
    with pytest.raises(error, match="tokens"):
        Tokenizer.from_gguf(byte_level()).decode(tokens)


def test_encode_refuses():
    tokenizer = Tokenizer.from_gguf(byte_level(ggml__bos_token_id=None))
    with pytest.raises(ValueError, match="character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(ValueError, match="names no bos_token"):
        tokenizer.encode("a", add_bos=True)
    with pytest.raises(TypeError, match="expected str"):
        tokenizer.encode(b"a")


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", ValueError, "roles must alternate"),
        ("a\n{% if %}", FormatError, "line 2"),
        ("{{ missing.name }}", ValueError, "missing"),
        ("{{ messages.append(1) }}", ValueError, "append"),
        ("{{ ''.__class__.__mro__ }}", ValueError, "unsafe"),
        ("{{ 1 // 0 }}", ValueError, "ZeroDivisionError"),
        (None, ValueError, "no chat template"),
    ],
)
def test_chat_refuses(template, error, message):
    tokenizer = Tokenizer.from_gguf(byte_level(chat_template=template))
    with pytest.raises(error, match=message):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_chat_takes_messages_only():
    with pytest.raises(TypeError, match="list of mappings"):
        Tokenizer.from_gguf(byte_level()).chat("hi")


def folder_with(tmp_path, tokenizer=None, **files):
    """A saved tokenizer whose configuration files are replaced or updated."""
    Tokenizer.from_gguf(byte_level() if tokenizer is None else tokenizer).save(tmp_path)
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def test_folder_as_transformers_writes_them(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    config = {
        "bos_token": {"content": "<|endoftext|>", "special": True},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "chat_template": [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}],
    }
    tokenizer = byte_level("llama-bpe", ggml__add_bos_token=True, chat_template=None)
    folder = folder_with(
        tmp_path, tokenizer, tokenizer_config=config, generation_config={"eos_token_id": [0, 1]}
    )
    found = Tokenizer.from_folder(folder)
    # No add_bos_token, but tokenizer.json begins a text with the token, as LLaMA 3's does.
    assert found.adds_bos
    assert found.eos_ids == (1, 0)
    assert found.chat([]) == "a"


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("begins", [True, False])
def test_post_processor_decides_about_bos(tmp_path, begins, flag):
    tokenizer = byte_level(ggml__add_bos_token=begins)
    config = {"bos_token": "<|endoftext|>", "add_bos_token": flag, "add_eos_token": flag}
    found = Tokenizer.from_folder(folder_with(tmp_path, tokenizer, tokenizer_config=config))
    assert found.adds_bos is begins
    assert (
        found.encode("low").tolist() == [0] * begins + found.encode("low", add_bos=False).tolist()
    )
    found.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).adds_bos is begins


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": []}, "tokenizer_config.json, byte 0: not a JSON object"),
        ({"tokenizer_config": {"bos_token": 1}}, "bos_token is 1"),
        ({"tokenizer_config": {"bos_token": "\ud800"}}, "surrogate"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token is 'yes'"),
        ({"generation_config": {"eos_token_id": ["1"]}}, "generation_config.json: eos_token_id"),
        ({"generation_config": {"eos_token_id": -1}}, r"\[1, -1\]"),
    ],
)
def test_folder_with_wrong_configuration(tmp_path, files, message):
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_folder(folder_with(tmp_path, **files))


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_unknown_pre_tokenizer_is_refused():
    for pre in ("no-such-rule", None):
        with pytest.raises(FormatError, match=r"a\.gguf: tokenizer\.ggml\.pre .*smollm"):
            Tokenizer.from_gguf(byte_level(pre), source="a.gguf")


def test_broken_json_names_file_and_offset(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"é": 1, }', encoding="utf-8")
    with pytest.raises(FormatError, match=r"tokenizer\.json, byte 10"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff')
    with pytest.raises(FormatError, match=r"tokenizer\.json, byte 2"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@given(data=st.data())
def test_damaged_folders(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    Tokenizer.from_gguf(byte_level("qwen2", ggml__add_bos_token=True)).save(folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place : place + data.draw(st.integers(1, 40))]
    else:
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    refusal = str(folder)
    try:
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.decode(tokenizer.encode("low 123 é"))
    except FormatError as error:
        refusal = str(error)
    assert str(folder) in refusal


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=50)
@given(data=st.data())
def test_hostile_metadata(data):
    metadata = dict(data.draw(st.sampled_from([byte_level(), sentencepiece()])))
    key = data.draw(st.sampled_from(sorted(metadata)))
    value = metadata[key]
    if isinstance(value, (list, np.ndarray)) and data.draw(st.booleans()):
        value = list(value)
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(VALUES)
        metadata[key] = value
    else:
        metadata[key] = data.draw(VALUES)
    refusal = "hostile.gguf: "
    try:
        tokenizer = Tokenizer.from_gguf(metadata, source="hostile.gguf")
        tokenizer.decode(tokenizer.encode("low 123 é"))
    except FormatError as error:
        refusal = str(error)
    assert refusal.startswith("hostile.gguf: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "bert"}, "'bert'; known: 'gpt2'"),
        ({"ggml__tokens": []}, "empty"),
        ({"ggml__tokens": ["a", "b", "a"]}, r"tokens\[2\] is 'a' again, already token 0"),
        ({"ggml__tokens": ["a", 1]}, "list of strings"),
        ({"ggml__token_type": [1, 2]}, r"token_type is list .* expected \d+ finite numbers"),
        ({"ggml__merges": ["low"]}, r"merges\[0\] is 'low', not two tokens"),
        ({"ggml__merges": ["no where"]}, "merges: .*no"),
        ({"ggml__eos_token_id": 10_000}, "eos_token_id is int 10000; expected a token below"),
        ({"ggml__bos_token_id": None, "ggml__add_bos_token": True}, "without a"),
        ({"ggml__add_bos_token": 1}, "true or false"),
        ({"chat_template": 5}, "tokenizer.chat_template is int 5; expected a string"),
    ],
)
def test_wrong_metadata(changes, message):
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_gguf(byte_level(**changes))


def test_scores_must_be_numbers():
    with pytest.raises(FormatError, match="scores"):
        Tokenizer.from_gguf(sentencepiece(scores=np.full(3, np.nan)))
