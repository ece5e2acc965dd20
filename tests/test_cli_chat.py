"""The command line: chat, and what serve refuses."""

from __future__ import annotations

import json

import pytest
from command_line import run

import lowbitq as lq

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A tiny model that has a chat template."""
    small = lq.compress(lq.load(tiny_folder), "int4g32", method="rtn")
    small.tokenizer.chat_template = TEMPLATE
    small.save(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def say(monkeypatch):
    """Sets the lines that input() returns; KeyboardInterrupt is raised."""

    def set_lines(*lines):
        left = iter(lines)

        def line(prompt):
            found = next(left, None)
            if found is None:
                raise EOFError
            return found

        monkeypatch.setattr("builtins.input", line)

    return set_lines


def test_a_conversation_goes_on(capsys, folder, say):
    say("hello", "", " and then? ")
    more = ["--max-new-tokens", 5, "--system", "be brief", "--json"]
    code, shown, err = run(capsys, "chat", folder, *more)
    assert code == 0
    found = json.loads(shown.splitlines()[-1])
    said = found["messages"]
    assert [one["role"] for one in said] == ["system", *["user", "assistant"] * 2]
    assert said[3]["content"] == "and then?"
    model = lq.load(folder)
    for end in (2, 4):
        prompt = model.tokenizer.chat(said[:end])
        assert said[end]["content"] == model.generate(prompt, max_new_tokens=5)
        assert said[end]["content"] in shown
    assert sum("tokens/s" in line for line in err) == sum(bool(said[i]["content"]) for i in (2, 4))


def test_reset_forgets_and_exit_ends(capsys, folder, say):
    say("one", "/reset", "two", "/exit", "three")
    code, shown, _ = run(capsys, "chat", folder, "--max-new-tokens", 2, "--json")
    found = json.loads(shown.splitlines()[-1])
    assert (code, found["answers"]) == (0, 2)
    assert [one["content"] for one in found["messages"] if one["role"] == "user"] == ["two"]


def test_an_interrupt_ends_only_the_answer(capsys, folder, say, monkeypatch):
    say("one", "two")
    calls = []
    generate = lq.QuantizedModel.generate

    def interrupted(self, prompt, **options):
        calls.append(prompt)
        if len(calls) == 1:
            options["on_token"]("half")
            raise KeyboardInterrupt
        return generate(self, prompt, **options)

    monkeypatch.setattr(lq.QuantizedModel, "generate", interrupted)
    code, shown, _ = run(capsys, "chat", folder, "--max-new-tokens", 2, "--json")
    found = json.loads(shown.splitlines()[-1])
    assert (code, found["answers"]) == (0, 2)
    assert found["messages"][1]["content"] == "half"


def test_serve_needs_a_token_for_others(capsys, folder, monkeypatch):
    monkeypatch.delenv("LOWBITQ_TOKEN", raising=False)
    code, _, err = run(capsys, "serve", folder, "--host", "0.0.0.0")
    assert code == 2
    assert "--host 0.0.0.0 can be reached by others; give --token" in err[-1]


def test_a_conversation_that_is_too_long_goes_on_without_its_last_words(capsys, folder, say):
    say("x" * 5000, "short")
    code, shown, err = run(capsys, "chat", folder, "--max-new-tokens", 2, "--json")
    found = json.loads(shown.splitlines()[-1])
    assert (code, found["answers"]) == (0, 1)
    assert found["messages"][0]["content"] == "short"
    assert any("/reset begins anew" in line for line in err)
