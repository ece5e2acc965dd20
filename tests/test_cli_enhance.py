"""The command line: enhance."""

from __future__ import annotations

import json

import pytest
from command_line import run

import lowbitq as lq


@pytest.fixture
def enhance(capsys, tiny_folder, text_file, tmp_path):
    """The enhance command on the tiny model, and the folder it writes."""
    out = tmp_path / "small"
    arguments = ["enhance", tiny_folder, out, "--formats", "int2g32, int3g32", "--steps", 2]
    arguments += ["--text", text_file, "--samples", 6, "--window", 64]
    return lambda *more: run(capsys, *arguments, *more), out


def test_enhance_saves_a_model_within_the_budget(enhance):
    command, out = enhance
    code, shown, err = command("--bits", 4.6, "--json")
    assert (code, err) == (0, [])
    found, saved = json.loads(shown), lq.load(out)
    assert [stage["name"] for stage in found["stages"]] == ["plan", "compress", "train"]
    assert saved.bits_per_weight == found["bits_per_weight"] <= 4.6
    assert not out.with_name("small.work").exists()


def test_enhance_shows_its_stages_and_keeps_its_work_if_told(enhance, tmp_path):
    command, _ = enhance
    code, shown, _ = command("--bits", 4.6, "--steps", 0, "--work-dir", tmp_path / "work")
    assert code == 0
    assert "held-back KL" in shown
    assert "train" not in shown
    assert list((tmp_path / "work" / "blocks").iterdir())


def test_a_budget_too_small_is_one_line(enhance):
    command, out = enhance
    code, _, err = command("--bits", 1)
    assert code == 1
    assert len(err) == 1
    assert "bits is 1.0, but the smallest candidates take 4" in err[0]
    assert not out.exists()


def test_a_progressive_model_is_evaluated_at_a_width(capsys, tiny_folder, text_file, tmp_path):
    out = tmp_path / "small"
    arguments = ["quantize", tiny_folder, out, "--text", text_file, "--samples", 4, "--window", 64]
    assert run(capsys, *arguments, "--format", "int2g32 + int2g32 hadamard residual")[0] == 0
    bits = []
    for width in (2, 4):
        more = ["--bits", width, "--text", text_file, "--window", 64, "--windows", 2, "--json"]
        code, shown, err = run(capsys, "evaluate", out, *more)
        assert (code, err) == (0, [])
        bits.append(json.loads(shown)["bits_per_weight"])
    assert bits[1] > 1.9 * bits[0]
    code, _, err = run(capsys, "evaluate", tiny_folder, "--bits", 2, "--text", text_file)
    assert code != 0
    assert "is not a saved quantized model" in err[0]
