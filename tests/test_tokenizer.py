"""Tokenizers: equal to transformers', sentencepiece's and llama.cpp's, round trips, refusals."""

from __future__ import annotations

import hashlib
import json
import signal
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import GOLDEN, HERE, byte_level, sentencepiece

from lowbitq import FormatError
from lowbitq.checkpoints.gguf import read_gguf
from lowbitq.models.chat import render_chat
from lowbitq.models.tokenizer import Tokenizer
from lowbitq.models.vocabulary import PRE_TOKENIZERS, refusing

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
    assert (smollm.bos_id, smollm.eos_ids, smollm.adds_bos) == (1, (2, 0, 4), False)
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


VOCABULARIES = json.loads((HERE / "vocabularies.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", VOCABULARIES["cases"])
def test_vocabularies_equal_llama_cpp(case):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in case["metadata"].items()}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert sorted(tokenizer.eos_ids) == case["ends"]
    for text, ids in zip(VOCABULARIES["texts"], case["ids"], strict=True):
        assert tokenizer.encode(text).tolist() == ids


def test_llama_cpp_was_asked_about_every_pre_tokenizer():
    asked = {case["metadata"].get("pre") for case in VOCABULARIES["cases"]}
    aliases = {"llama3", "llama-v3"}
    assert asked - {None} == PRE_TOKENIZERS.keys() - aliases


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("name", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|fim_pad|>"])
def test_ends_of_text_are_known_by_name(name, kind):
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], name]
    metadata["tokenizer.ggml.tokens"][1] = "</s>"
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:-1]
    metadata["tokenizer.ggml.token_type"][-1] = kind
    tokenizer = Tokenizer.from_gguf(metadata)
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert set(tokenizer.eos_ids) == {0, 1, last}
    assert tokenizer.encode(name).tolist() == [last]
    assert tokenizer.decode([last], skip_special=True) == ""


def test_defaults_of_sentencepiece():
    metadata = sentencepiece()
    del metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_eos_token", True),
        ("add_sep_token", True),
        ("add_space_prefix", True),
        ("remove_extra_whitespaces", True),
        ("precompiled_charsmap", np.ones(4, np.uint8)),
        ("suppress_tokens", [3]),
        ("normalizer.lowercase", True),
        ("of_the_future", "yes"),
    ],
)
def test_gguf_keys_that_may_change_tokens_are_refused(key, value):
    metadata = byte_level() | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(FormatError, match=rf"tokenizer\.ggml\.{key} is .* not supported"):
        Tokenizer.from_gguf(metadata)
    neutral = {bool: False, str: "", list: [], np.ndarray: np.empty(0, np.uint8)}[type(value)]
    Tokenizer.from_gguf(byte_level() | {f"tokenizer.ggml.{key}": neutral})


def test_a_long_token_takes_no_quadratic_time():
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b" * 2_000_000],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
        "tokenizer.ggml.add_bos_token": False,
    }
    started = time.process_time()
    Tokenizer.from_gguf(metadata)
    assert time.process_time() - started < 2  # all cuts would take an hour


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


def test_an_interrupt_stays_an_interrupt():
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        with pytest.raises(error), refusing("here"):
            raise error
    with pytest.raises(FormatError, match="here: what"), refusing("here"):
        raise BaseException("what")


def test_unknown_pre_tokenizer_is_refused():
    for pre in ("no-such-rule", None):
        with pytest.raises(FormatError, match=r"a\.gguf: tokenizer\.ggml\.pre .*smollm"):
            Tokenizer.from_gguf(byte_level(pre), source="a.gguf")


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


def test_ctrl_c_does_not_wait_for_a_long_text():
    tokenizer = Tokenizer.from_gguf(byte_level())
    text = "low lower, " * 300_000
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode(text)
        assert time.monotonic() - started < 0.6
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("room", [True, False])
def test_long_texts_have_the_same_tokens(monkeypatch, room):
    def start(thread):
        raise RuntimeError("can't start new thread")

    if not room:
        monkeypatch.setattr("threading.Thread.start", start)
    tokenizer = Tokenizer.from_gguf(byte_level())
    piece = "low lower, <|im_end|> é\n"
    assert tokenizer.encode(piece * 9000).tolist() == tokenizer.encode(piece).tolist() * 9000
