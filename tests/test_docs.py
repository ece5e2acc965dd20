"""The pages of docs/ tell the truth: their Python runs, their names are public.

`.ci/run` builds the site, with warnings as errors.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import lowbitq as lq

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page, section=""):
    text = (DOCS / page).read_text(encoding="utf-8")
    text = text[text.index(section) :]
    found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return [block for block in found if ">>>" not in block]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_give_what_they_print(page):
    assert doctest.testfile(str(page), module_relative=False).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_are_public(page):
    for name in set(re.findall(r"\blq\.(\w+)", page.read_text(encoding="utf-8"))):
        assert name in lq.__all__


def test_how_to_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    """From top to bottom as printed, but on a tiny model, with few windows and steps."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        Path(f"{name}.txt").write_text(f"The {name} of rivers, fords and bridges. " * 1600)
    names = {"lq": lq, "Path": Path}
    for block in blocks("how-to.md"):
        block = block.replace("SmolLM2-135M-Instruct.Q4_1.gguf", str(tiny_folder))
        block = block.replace('Path("train.txt")', 'Path("train.txt"), window=64')
        block = block.replace('"test.txt"), ', '"test.txt"), window=64, ')
        block = block.replace("samples=32", "samples=8").replace("steps=120", "steps=2, batch=2")
        block = block.replace("bits=2.5", "bits=5").replace(
            "bits=2.3", "bits=9, samples=8, steps=2"
        )
        exec(block, names)
    assert (tmp_path / "smollm2-3bit" / "config.json").exists()
    assert (tmp_path / "smollm2-hf" / "config.json").exists()
    assert "perplexity" in capsys.readouterr().out
