"""The command line: chat, and what serve refuses."""

from __future__ import annotations

import json
import sys

import pytest
from command_line import run

import lowbitq as lq
from lowbitq.commands_generation import newest_that_fit

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
    steps = []
    step = lq.QuantizedModel.step

    def interrupted(self, tokens, cache):
        steps.append(tokens)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, tokens, cache)

    monkeypatch.setattr(lq.QuantizedModel, "step", interrupted)
    code, shown, _ = run(capsys, "chat", folder, "--max-new-tokens", 4, "--json")
    found = json.loads(shown.splitlines()[-1])
    assert (code, found["answers"]) == (0, 2)
    assert [len(one["content"]) for one in found["messages"]] == [3, 2 * 2, 3, 2 * 4]  # with spaces


def test_serve_needs_a_token_for_others(capsys, folder, monkeypatch):
    monkeypatch.delenv("LOWBITQ_TOKEN", raising=False)
    code, _, err = run(capsys, "serve", folder, "--host", "0.0.0.0")
    assert code == 2
    assert "--host 0.0.0.0 can be reached by others; give --token" in err[-1]


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.routing"])
def test_serve_says_what_it_needs(capsys, folder, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "lowbitq.serving", raising=False)
    code, out, err = run(capsys, "serve", folder)
    assert (code, out) == (1, "")
    assert err[-1].endswith("get them with: pip install 'lowbitq[serve]'")


def test_a_message_that_is_too_long_is_not_remembered(capsys, folder, say):
    say("first", "x" * 5000, "short")
    code, shown, err = run(capsys, "chat", folder, "--max-new-tokens", 2, "--json")
    found = json.loads(shown.splitlines()[-1])
    assert (code, found["answers"]) == (0, 2)
    said = [one["content"] for one in found["messages"] if one["role"] == "user"]
    assert said == ["first", "short"]
    assert any("/reset begins anew" in line for line in err)


def test_a_full_context_forgets_the_oldest_exchanges(capsys, folder, say):
    say("a" * 1500, "b" * 1500, "c" * 1500, "d" * 1500)
    more = ["--max-new-tokens", 2, "--system", "be brief", "--json"]
    code, shown, err = run(capsys, "chat", folder, *more)
    found = json.loads(shown.splitlines()[-1])
    assert (code, found["answers"]) == (0, 4)
    assert [one["role"] for one in found["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [one["content"][0] for one in found["messages"] if one["role"] == "user"] == ["c", "d"]
    said = "lowbitq: the context of 4096 tokens is full: forgot the oldest 2 messages"
    assert err.count(said) == 2


def test_as_few_exchanges_as_need_be_are_forgotten():
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "assistant", "user"]
    messages = [{"role": role, "at": at} for at, role in enumerate(roles)]

    def kept(most):
        return [one["at"] for one in newest_that_fit(messages, lambda some: len(some) <= most)]

    assert kept(8) == list(range(8))
    assert kept(7) == kept(6) == [0, 3, 4, 5, 6, 7]
    assert kept(5) == kept(2) == kept(0) == [0, 7], "the last one stays"
    assert len(messages) == 8
