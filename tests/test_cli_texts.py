"""The command line: where its texts come from, and reports of what was done with them."""

from __future__ import annotations

import json

import pytest
from command_line import run


@pytest.mark.filterwarnings("default")
def test_a_text_of_last_resort_is_said(capsys, monkeypatch, tiny_folder, tmp_path):
    """By commands that use it: not where layers are rounded without a text."""
    monkeypatch.delenv("LOWBITQ_DATA", raising=False)
    said = "lowbitq: no text is given, so topics of Python's help are used"
    short = ["--window", 32, "--windows", 1]
    code, _, (line,) = run(capsys, "evaluate", tiny_folder, *short)
    assert code == 0
    assert line.startswith(said)
    quantize = ["quantize", tiny_folder, tmp_path / "small", "--samples", 2, "--window", 32]
    code, _, (line,) = run(capsys, *quantize)
    assert code == 0
    assert line.startswith(said)
    assert run(capsys, *quantize, "--method", "rtn")[2] == []


def test_text_of_a_jsonl_file(capsys, tiny_folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "It was a bright cold day in April. " * 9}) + "\n")
    code, out, err = run(capsys, "evaluate", tiny_folder, "--text", path, "--window", 64, "--json")
    assert (code, err) == (0, [])
    assert json.loads(out)["perplexity"]["tokens"] == 4 * 63
    path.write_text('{"content": "x"}\n')
    code, _, (line,) = run(capsys, "evaluate", tiny_folder, "--text", path)
    assert (code, line) == (1, f"lowbitq: {path}, line 1 has no 'text', but 'content'")


def test_reports_of_quantize_and_evaluate(capsys, quantize, text_file, tmp_path):
    command, out = quantize
    code, _, err = command("--report", tmp_path / "q.html")
    assert (code, err) == (0, [])
    page = (tmp_path / "q.html").read_text()
    for shown in ("int3g32", "model.layers.1.mlp.down_proj", str(text_file), "relative_error"):
        assert shown in page
    short = ["--text", text_file, "--window", 64, "--windows", 2]
    code, _, err = run(capsys, "evaluate", out, *short, "--report", tmp_path / "e.html")
    assert (code, err) == (0, [])
    page = (tmp_path / "e.html").read_text()
    for shown in ("perplexity", "95 % interval", "model.layers.1.mlp.down_proj"):
        assert shown in page
