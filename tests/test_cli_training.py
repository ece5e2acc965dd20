"""The command line's training: distill and reconstruct on a saved model."""

from __future__ import annotations

import json

import pytest
from command_line import run

import lowbitq as lq
from lowbitq.optimizers import RATES


def test_distill_trains_a_saved_model(capsys, quantize, tiny_folder, text_file, tmp_path):
    command, small = quantize
    assert command()[0] == 0
    out = tmp_path / "trained"
    options = ["--text", text_file, "--steps", 3, "--window", 64, "--learn", "scale,norm"]
    code, shown, err = run(capsys, "distill", small, tiny_folder, out, *options, "--json")
    assert (code, err) == (0, [])
    result, trained = json.loads(shown), lq.load(out)
    assert result["steps"] == 3
    assert result["held_back_kl"]["after"] <= result["held_back_kl"]["before"]
    assert trained.bits_per_weight == lq.load(small).bits_per_weight
    assert not out.with_name("trained.work").exists()
    code, _, err = run(capsys, "distill", tiny_folder, tiny_folder, out, *options)
    assert (code, err) == (
        1,
        [f"lowbitq: {tiny_folder} is a float model, expected a quantized one"],
    )
    code, _, err = run(capsys, "distill", small, tiny_folder, out, "--learn", "codes")
    assert code == 2
    assert "unknown kinds codes; expected some of scale, offset" in err[-1]


@pytest.mark.parametrize("plot", [False, True])
def test_distill_with_everything(capsys, quantize, tiny_folder, text_file, tmp_path, plot):
    if plot:
        pytest.importorskip("matplotlib")
    command, small = quantize
    assert command()[0] == 0
    out, log, kept, loss = (tmp_path / n for n in ("trained", "run.json", "teacher", "loss.svg"))
    options = [
        "--text",
        text_file,
        "--steps",
        3,
        "--window",
        64,
        "--learn",
        "norm",
        "--blocks",
        "0",
    ]
    options += [
        "--features",
        0.5,
        "--attention",
        0.1,
        "--temperatures",
        "3,1",
        "--batch",
        "auto",
        "--memory",
        100,
    ]
    options += ["--pace", "int*=2", "--pace", "*norm=0.5"]
    options += ["--teacher-dir", kept, "--log", log, "--find-rates"] + ["--plot", loss] * plot
    code, shown, err = run(capsys, "distill", small, tiny_folder, out, *options, "--json")
    assert (code, err) == (0, [])
    result, known = json.loads(shown), json.loads(log.read_bytes())
    assert json.loads(json.dumps(lq.load(out).provenance["distillation"])) == known
    assert known["options"]["hints"] == {
        "blocks": [0],
        "features": 0.5,
        "relations": 0.0,
        "attention": 0.1,
    }
    assert known["options"]["temperatures"] == [3, 1]
    assert known["options"]["paces"] == [["int*", 2], ["*norm", 0.5]]
    assert result["batch"] == known["options"]["batch"] > 2
    assert result["rates"] == dict(known["options"]["rates"]) != RATES
    assert all(one["features"] > 0 < one["attention"] for one in known["steps"])
    assert (kept / "hidden.npy").is_file()
    assert not plot or "divergence" in loss.read_text()


def test_reconstruct_trains_a_saved_model(capsys, quantize, tiny_folder, text_file, tmp_path):
    command, small = quantize
    assert command("--preset", "fast")[0] == 0
    out = tmp_path / "trained"
    options = ["--text", text_file, "--steps", 3, "--window", 64, "--learn", "scale,norm"]
    code, shown, err = run(capsys, "reconstruct", small, tiny_folder, out, *options, "--json")
    assert (code, err) == (0, [])
    result, trained = json.loads(shown), lq.load(out)
    assert result["blocks"] == trained.provenance["reconstruction"]["blocks"]
    assert len(result["blocks"]) == len(trained.blocks)
    assert result["blocks"][0]["after"] < result["blocks"][0]["before"]
    assert trained.provenance["reconstruction"]["options"]["learn"] == ["norm", "scale"]
    assert all(trained.records[name]["trained"] for name, _ in trained.linears())
    code, shown, _ = run(capsys, "reconstruct", small, tiny_folder, out, *options)
    assert "error behind the last block" in shown
    code, _, err = run(capsys, "reconstruct", tiny_folder, tiny_folder, out, *options)
    expected = f"lowbitq: {tiny_folder} is a float model, expected a quantized one"
    assert (code, err) == (1, [expected])
