"""The command line: plans under a budget, and models made by a plan."""

from __future__ import annotations

import json

import pytest
from command_line import run

import lowbitq as lq


@pytest.fixture
def plan(capsys, tiny_folder, text_file, tmp_path):
    """The plan command on the tiny model, and the file it writes."""
    out = tmp_path / "plan.json"
    arguments = [
        "plan",
        tiny_folder,
        "--out",
        out,
        "--formats",
        "int2g32, int3g32,int2g32 + int2g32 hadamard residual",
    ]
    arguments += ["--text", text_file, "--samples", 4, "--window", 64, "--by", "int2g32"]
    return lambda *more: run(capsys, *arguments, *more), out


@pytest.fixture
def small(capsys, tiny_folder, text_file, tmp_path):
    """The quantize command on the tiny model, and the folder it writes."""
    out = tmp_path / "small"
    arguments = ["quantize", tiny_folder, out, "--text", text_file, "--samples", 4, "--window", 64]
    return lambda *more: run(capsys, *arguments, *more), out


def test_a_plan_is_what_quantize_makes(plan, small):
    (command, path), (quantize, out) = plan, small
    code, shown, err = command("--bits", 5.2, "--json")
    assert (code, err) == (0, [])
    found = json.loads(shown)
    assert found["plan"]["bits"] <= 5.2
    assert found["plan"]["kl"] <= found["uniform"]["kl"]
    code, shown, err = quantize("--plan", path, "--json")
    assert (code, err) == (0, [])
    result, saved = json.loads(shown), lq.load(out)
    assert saved.plan == lq.Plan.from_json(path.read_text())
    assert saved.bits_per_weight == pytest.approx(found["plan"]["bits"])
    assert (result["format"], result["plan"], result["embedding"]) == (None, str(path), "int8g64")
    assert saved.nbytes == found["plan"]["size"]


def test_a_plan_is_shown_beside_its_rivals(plan):
    command, path = plan
    code, shown, _ = command("--size", 30000, "--seed", 2)
    assert code == 0
    assert "without copies, same bytes" in shown
    assert "bits per weight" in shown.splitlines()[-1]
    assert lq.Plan.from_json(path.read_text()).seed == 2


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ([], 2, "one of the arguments --bits --size is required"),
        (["--bits", "3", "--size", "9"], 2, "not allowed with argument"),
        (["--bits", "3", "--formats", "int2g32,int9"], 2, "unknown format 'int9'"),
        (["--bits", "1"], 1, "bits is 1.0, but the smallest candidates take"),
        (["--bits", "3", "--measure", "99"], 1, "measure is 99, but data has only"),
    ],
)
def test_wrong_plans_are_refused(plan, more, code, said):
    command, path = plan
    found = command(*more)
    assert found[0] == code
    assert said in found[2][-1]
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "plan.json: the plan is not JSON"),
        (b"\xff\xfe{", "plan.json: "),
        (b"[1]", "plan.json: a plan is a JSON object, found list"),
        (b'{"layer": {}}', "plan.json: a plan has no field 'layer'"),
        (b'{"layers": {"a": "int9"}}', "plan.json: unknown format"),
        (b'{"layers": {"a": "int4"}}', "the plan is for another model"),
    ],
)
def test_bad_plan_files_are_refused(small, tmp_path, content, said):
    quantize, out = small
    (tmp_path / "plan.json").write_bytes(content)
    code, _, err = quantize("--plan", tmp_path / "plan.json")
    assert code == 1
    assert len(err) == 1
    assert said in err[0]
    assert not out.exists()


@pytest.mark.parametrize(
    "option",
    [["--format", "int4g64"], ["--rotation", "none"], ["--seed", "1"], ["--preset", "fast"]],
)
def test_what_the_plan_says_is_not_said_twice(small, tmp_path, option):
    quantize, _ = small
    code, _, err = quantize("--plan", tmp_path / "plan.json", *option)
    assert code == 2
    assert err[0].startswith(f"lowbitq: {option[0]} is given beside --plan; set it in")


def test_an_absent_plan_is_one_line(small, tmp_path):
    quantize, _ = small
    code, _, err = quantize("--plan", tmp_path / "absent.json")
    assert code == 1
    assert "absent.json" in err[0]


def test_fisher_takes_the_seed_of_the_plan(plan, small):
    (command, path), (quantize, out) = plan, small
    assert command("--bits", 5.2, "--seed", 3)[0] == 0
    code, _, err = quantize("--plan", path, "--fisher")
    assert (code, err) == (0, [])
    assert lq.load(out).plan.seed == 3


def test_overrides_are_plans_of_matching_layers(small):
    command, out = small
    more = ["--format", "int2g32", "--override", "*.down_proj=int4g32"]
    more += ["--override", "*.0.*=int3g32"]
    assert command(*more)[0] == 0
    found = {name: str(layer) for name, layer in lq.load(out).plan.layers.items()}
    assert found["model.layers.0.mlp.down_proj"] == "int3g32", "the last match applies"
    assert {text for name, text in found.items() if ".0." not in name} == {"int2g32", "int4g32"}
    code, _, err = command("--override", "nothing=int4g32")
    assert code == 1
    assert "override 'nothing' matches none of" in err[0]
    assert command("--override", "int4g32")[0] == 2


def test_a_dry_run_says_what_would_be_stored(small):
    command, out = small
    more = ["--format", "int2g32", "--override", "*.down_proj=int4g32"]
    code, shown, err = command(*more, "--dry-run", "--json")
    assert (code, err) == (0, [])
    assert not out.exists()
    assert command(*more)[0] == 0
    saved = lq.load(out)
    found = json.loads(shown)
    assert found["bits_per_weight"] == pytest.approx(saved.bits_per_weight)
    assert found["size_bytes"] == sum(linear.nbytes for _, linear in saved.linears())
    assert sum(found["layers"].values()) == len(saved.plan.layers)
