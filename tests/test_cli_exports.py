"""Commands that write models for other programs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import random_model
from command_line import run
from small_vocabularies import byte_level

import lowbitq as lq
from lowbitq.checkpoints import read_gguf
from lowbitq.linears import Linear
from lowbitq.models.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path):
    """A float model with a byte-level tokenizer, as `Model.save` writes it."""
    model, rng = random_model.random_model(), np.random.default_rng(0)
    model.tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
    model.config = dataclasses.replace(model.config, vocab_size=288)
    model.embedding = Linear(rng.standard_normal((288, 64), np.float32))
    model.save(tmp_path / "float")
    return tmp_path / "float"


def test_a_file_for_llama_cpp(capsys, folder, text_file, tmp_path):
    arguments = ["quantize", folder, tmp_path / "out", "--text", text_file, "--window", 64]
    arguments += ["--for", "llama.cpp", "--samples", 2]
    assert run(capsys, *arguments)[0] == 0
    plan = lq.load(tmp_path / "out").plan
    assert {str(layer) for layer in plan.layers.values()} == {"int4g32symz8"}
    assert (str(plan.embedding), plan.rotation) == ("int8g32symz128", "none")
    arguments = ["export", tmp_path / "out", tmp_path / "a.gguf", "--to", "gguf", "--json"]
    code, shown, _ = run(capsys, *arguments)
    assert code == 0
    assert json.loads(shown)["lossless"]
    types = {tensor.dtype for tensor in read_gguf(tmp_path / "a.gguf").tensors.values()}
    assert types == {"Q4_0", "Q8_0", "F32"}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--format", "int4g16"], "format is int4g16, which a file for llama.cpp cannot hold"),
        (["--format", "int4g32 + rank2"], "format is int4g32 + rank2, which"),
        (["--embedding", "int8g64"], "embedding is int8g64, which"),
        (["--rotation", "hadamard"], "llama.cpp does not rotate inputs of layers"),
    ],
)
def test_what_llama_cpp_cannot_hold_exits_2(capsys, option, said):
    code, _, err = run(capsys, "quantize", "m", "o", "--for", "llama.cpp", *option)
    assert code == 2
    assert said in err[0]


def test_export(capsys, folder, text_file, tmp_path):
    arguments = ["export", folder, tmp_path / "out", "--check", "--text", text_file]
    arguments += ["--window", 128, "--windows", 1]
    code, shown, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, [])
    result = json.loads(shown)
    assert result["lossless"]
    assert result["perplexity"]["before"] == result["perplexity"]["after"]
    assert result["perplexity"]["after"]["tokens"] == 127
    code, _, err = run(capsys, *arguments)
    assert (code, len(err)) == (1, 1)
    assert "--force replaces it" in err[0]
    assert run(capsys, *arguments, "--force")[0] == 0
