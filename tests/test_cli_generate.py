"""The command line: generate."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from command_line import run

import lowbitq as lq
from lowbitq import cli

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def chatting(tiny_folder, monkeypatch):
    """The tiny model with a chat template."""
    model = lq.load(tiny_folder)
    model.tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(lq, "load", lambda path: model)
    return model


@pytest.fixture
def standard_input(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_text_is_continued(capsys, tiny_folder):
    arguments = ["generate", tiny_folder, "Hello", "--max-new-tokens", 5]
    text = lq.load(tiny_folder).generate("Hello", max_new_tokens=5)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (0, f"Hello{text}\n")
    [line] = err
    assert re.fullmatch(r"lowbitq: 5 tokens in \d+\.\d s, \d+\.\d tokens/s", line)
    found = json.loads(run(capsys, *arguments, "--json")[1])
    assert found.pop("tokens_per_second") > 0
    assert found == {"prompt": "Hello", "text": text, "tokens": 5}


@pytest.mark.parametrize(
    "options",
    [
        {"cache_bits": 8},
        {"temperature": 2, "seed": 3, "min_p": 0.1},
        {"temperature": 2, "top_k": 9, "top_p": 0.5},
        {"repetition_penalty": 5},
    ],
)
def test_options_are_those_of_the_library(capsys, tiny_folder, options):
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    arguments = [str(word).replace("_", "-") for word in arguments]
    out = run(capsys, "generate", tiny_folder, "Hello", "--max-new-tokens", 9, *arguments)[1]
    assert out == f"Hello{lq.load(tiny_folder).generate('Hello', max_new_tokens=9, **options)}\n"


def test_options_may_stand_before_the_prompt(capsys, tiny_folder):
    texts = lq.load(tiny_folder).generate(["Hello", "You"], max_new_tokens=4)
    out = run(capsys, "generate", tiny_folder, "--max-new-tokens", 4, "Hello", "You")[1]
    assert out == f"Hello{texts[0]}\n\nYou{texts[1]}\n"


def test_several_prompts(capsys, tiny_folder):
    arguments = ["generate", tiny_folder, "Hello", "You", "--max-new-tokens", 4]
    code, out, err = run(capsys, *arguments, "--json")
    texts = lq.load(tiny_folder).generate(["Hello", "You"], max_new_tokens=4)
    found = json.loads(out)
    assert code == 0
    assert [one["prompt"] for one in found["continuations"]] == ["Hello", "You"]
    assert [one["text"] for one in found["continuations"]] == texts
    assert "8 tokens in" in err[-1]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_prompt_from_standard_input(capsys, tiny_folder, standard_input, end):
    standard_input(f"two\nlines\n{end}")
    arguments = ["generate", tiny_folder, "-", "You", "--max-new-tokens", 4]
    found = json.loads(run(capsys, *arguments, "--json")[1])["continuations"]
    assert [one["prompt"] for one in found] == [f"two\nlines{end}", "You"]


def test_standard_input_is_read_once(capsys, tiny_folder):
    code, out, err = run(capsys, "generate", tiny_folder, "-", "-")
    assert (code, out) == (2, "")
    assert err == ["lowbitq: - is given twice, but there is one standard input"]


def test_a_message_is_answered(capsys, tiny_folder, chatting):
    arguments = ["generate", tiny_folder, "Hi", "--chat", "--max-new-tokens", 4]
    expected = chatting.generate([{"role": "user", "content": "Hi"}], max_new_tokens=4)
    assert run(capsys, *arguments)[1] == f"{expected}\n", "the prompt is not shown"
    found = json.loads(run(capsys, *arguments, "--json")[1])
    assert (found["prompt"], found["text"]) == ("[user] Hi\n", expected)


@pytest.mark.parametrize("place", ["file", "-"])
def test_a_conversation_from_a_file(capsys, tiny_folder, tmp_path, chatting, standard_input, place):
    path = place
    if place == "file":
        path = tmp_path / "talk.json"
        path.write_text(json.dumps(MESSAGES))
    standard_input(json.dumps(MESSAGES))
    code, out, _ = run(capsys, "generate", tiny_folder, "--messages", path, "--max-new-tokens", 4)
    expected = chatting.generate(MESSAGES, max_new_tokens=4)
    assert (code, out) == (0, f"{expected}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "talk.json: not JSON"),
        ("[]", "talk.json: expected a list of messages"),
        ('{"role": "user"}', "talk.json: expected a list of messages"),
        ('["Hi"]', "talk.json: expected a list of messages"),
        (None, "No such file"),
    ],
)
def test_damaged_messages_are_one_line(capsys, tiny_folder, tmp_path, text, said):
    path = tmp_path / "talk.json"
    if text is not None:
        path.write_text(text)
    code, out, err = run(capsys, "generate", tiny_folder, "--messages", path)
    assert (code, out, len(err)) == (1, "", 1)
    assert said in err[0]


@pytest.mark.parametrize(
    "option",
    [("--top-p", "1.5"), ("--temperature", "-1"), ("--min-p", "2"), ("--repetition-penalty", "0")],
)
def test_impossible_options_are_one_line(capsys, tiny_folder, option):
    code, out, err = run(capsys, "generate", tiny_folder, "Hello", *option)
    assert (code, out, len(err)) == (1, "", 1)
    assert option[0][2:].replace("-", "_") in err[0]


def test_it_goes_on_where_a_character_cannot_be_shown(monkeypatch, tiny_folder):
    shown = io.BytesIO()
    tokens = lq.load(tiny_folder).tokenizer.encode("a")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
        patched.setattr(lq.Tokenizer, "encode", lambda self, text: tokens)
        assert cli.main(["generate", str(tiny_folder), "\u00e9", "--max-new-tokens", "1"]) == 0
        sys.stdout.flush()
        assert shown.getvalue().startswith(b"?")


@pytest.mark.parametrize("prompt", ["h\u00e9", "\u4f60"])
def test_a_prompt_that_the_locale_cannot_decode_is_utf_8(prompt):
    escaped = prompt.encode().decode("ascii", "surrogateescape")
    for given in (escaped, prompt):
        options = cli._parser().parse_args(["generate", "m", given])
        assert options.prompts == [prompt]
