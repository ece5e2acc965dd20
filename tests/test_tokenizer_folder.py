"""Tokenizers of folders: merged as transformers merges them, damaged and unknown files refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_vocabularies import HERE, byte_level, sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from lowbitq import FormatError
from lowbitq.models.tokenizer import Tokenizer

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


def folder_with(tmp_path, tokenizer=None, **files):
    """A saved tokenizer whose configuration files are replaced or updated."""
    Tokenizer.from_gguf(byte_level() if tokenizer is None else tokenizer).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["added_tokens_decoder"]  # with it, files of older versions are not read
    path.write_text(json.dumps(config))
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
    ("key", "value"),
    [
        ("add_prefix_space", True),
        ("split_special_tokens", True),
        ("do_lower_case", True),
        ("normalizer", {"type": "NFKC"}),
        ("errors", "ignore"),
        ("fix_mistral_regex", True),
        ("fast_tokenizer_files", ["tokenizer.json", "tokenizer.5.0.0.json"]),
        ("sp_model_kwargs", {"enable_sampling": True}),
        ("auto_map", {"AutoTokenizer": ["tokenization_x.X", None]}),
        ("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True),
        ("of_the_future", 1),
    ],
)
def test_keys_that_may_change_tokens_are_refused(tmp_path, key, value):
    folder = folder_with(tmp_path, tokenizer_config={key: value})
    with pytest.raises(FormatError, match=rf"tokenizer_config\.json: {key} is .*not supported"):
        Tokenizer.from_folder(folder)
    for neutral in (None, False):
        folder_with(tmp_path, tokenizer_config={key: neutral})
        Tokenizer.from_folder(folder)


def test_keys_of_published_models_load(tmp_path):
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {"1": {"content": "<|im_end|>", "special": True}},
        "additional_special_tokens": ["<|im_end|>"],
        "auto_map": {"AutoProcessor": "x.X"},
        "clean_up_tokenization_spaces": True,
        "errors": "replace",
        "legacy": False,
        "max_length": 1024,
        "model_input_names": ["input_ids"],
        "model_max_length": 10**30,
        "padding_side": "left",
        "pad_token_id": 0,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "split_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "truncation_side": "left",
        "unk_token": None,
        "use_default_system_prompt": True,
        "vocab_file": "tokenizer.model",
    }
    Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config=config))
    folder_with(tmp_path, sentencepiece(), tokenizer_config={"add_prefix_space": True})
    Tokenizer.from_folder(tmp_path)
    config = {"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer"}
    with pytest.raises(FormatError, match="puts a space before"):
        Tokenizer.from_folder(folder_with(tmp_path, sentencepiece(), tokenizer_config=config))


@pytest.mark.parametrize(
    ("single", "message"),
    [
        ("$A <|im_end|>", r"puts \[\] before a text and \['<\|im_end\|>'\] after"),
        ("<|im_end|> <|im_end|> $A", "before a text"),
        ("<|im_end|> $A", "only bos_token"),
    ],
)
def test_other_post_processors_are_refused(tmp_path, single, message):
    folder = folder_with(tmp_path)
    file = tmp_path / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<|im_end|>", 1)]
    )
    backend.save(str(file))
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "bos", "eos"),
    [
        ("GPT2Tokenizer", 0, 0),
        ("Qwen2TokenizerFast", None, 0),
        ("LlamaTokenizer", None, None),
        ("PreTrainedTokenizerFast", None, None),
        (None, None, None),
    ],
)
def test_roles_that_only_the_class_has(tmp_path, name, bos, eos):
    folder = folder_with(tmp_path, tokenizer_config={"tokenizer_class": name}, generation_config={})
    found = Tokenizer.from_folder(folder)
    assert (found.bos_id, found.eos_ids) == (bos, () if eos is None else (eos,))
    config = {"tokenizer_class": name, "bos_token": "", "eos_token": "<|im_end|>"}
    found = Tokenizer.from_folder(
        folder_with(tmp_path, tokenizer_config=config, generation_config={})
    )
    assert (found.bos_id, found.eos_ids) == (None, (1,))


def test_padding_and_truncation_are_switched_off(tmp_path):
    folder = folder_with(tmp_path, byte_level(ggml__add_bos_token=True))
    description = json.loads((folder / "tokenizer.json").read_text())
    fixed = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    description |= {"padding": fixed | pad, "truncation": cut}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert Tokenizer.from_folder(folder).encode("low").size == 2


def test_a_role_does_not_make_a_token_special_when_it_is_saved(tmp_path):
    config = {"image_token": "<|im_end|>", "added_tokens_decoder": {}}
    folder = folder_with(tmp_path, tokenizer_config=config)
    description = json.loads((folder / "tokenizer.json").read_text())
    [token] = [t for t in description["added_tokens"] if t["content"] == "<|im_end|>"]
    token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(description))
    for _ in range(2):
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.decode([token["id"]], skip_special=True) == "<|im_end|>"
        tokenizer.save(folder)


def test_a_post_processor_names_bos_where_no_file_does(tmp_path):
    folder = folder_with(tmp_path, byte_level(ggml__add_bos_token=True), tokenizer_config={})
    assert Tokenizer.from_folder(folder).encode("low")[0] == 0


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"a": 0, "b": 2**31 - 2}, "numbers reach 2147483646, too high for 2 tokens"),
        ({"a": 0, "b": 1, "c": 1}, "tokens 'b' and 'c' both have number 1"),
        ({}, "no tokens"),
    ],
)
def test_numbers_of_tokens(tmp_path, vocabulary, message):
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("config", [{}, {"added_tokens_decoder": {}}])
def test_numbers_of_added_tokens(tmp_path, config):
    folder = folder_with(tmp_path, tokenizer_config=config)
    description = json.loads((folder / "tokenizer.json").read_text())
    description["added_tokens"][1]["id"] = 2**31 - 2
    (folder / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(FormatError, match="has number 2147483646, but the vocabulary has 1"):
        Tokenizer.from_folder(folder)


def test_unused_numbers_are_allowed(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 900}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("ab", special=False).tolist() == [0, 900]
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).vocab_size == 901


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"vocab": [[[[]]]] * 3}, "tokenizer.json"),
    ],
)
def test_wrong_models(tmp_path, change, message):
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []} | change
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "added_tokens"])
def test_deeply_nested_json(tmp_path, name):
    folder = folder_with(tmp_path)
    (tmp_path / f"{name}.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(FormatError, match=f"{name}.json"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": []}, "tokenizer_config.json, byte 0: not a JSON object"),
        ({"tokenizer_config": {"bos_token": 1}}, "bos_token is 1"),
        ({"tokenizer_config": {"bos_token": "\ud800"}}, "surrogate"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token is 'yes'"),
        ({"tokenizer_config": {"bos_token": {"content": "a", "what": 1}}}, "bos_token is"),
        ({"tokenizer_config": {"extra_special_tokens": "<s>"}}, "expected a list or an object"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder is"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "<s>"}}}, "has number 'x'"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"7": "<new>"}}},
            "number 7, but the vocabulary has",
        ),
        ({"added_tokens": {"<|im_end|>": 700}}, "added_tokens.json: .* number 700, but .* 1"),
        ({"special_tokens_map": {"eos_token": 5}}, "special_tokens_map.json: eos_token is 5"),
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
