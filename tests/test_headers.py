"""Models described by their headers: as the models that load, and where these do not load."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from golden import tiny_models
from small_files import write_folder, write_gguf

import lowbitq as lq
from lowbitq.headers import read_header

CONFIG = tiny_models.config_of("llama")
KEYS = {
    "general.name": "Tiny",
    "general.file_type": 7,
    "llama.block_count": 1,
    "llama.context_length": 512,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.chat_template": "{{ messages }}",
}


@pytest.fixture
def small_gguf(tmp_path):
    """96 tokens in F32, one layer of 64 x 32 in Q8_0: 34 bytes for 32 weights."""
    f32, q8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
    tensors = {
        "token_embd.weight": (np.zeros((96, 32), np.float32), f32),
        "output_norm.weight": (np.zeros(32, np.float32), f32),
        "blk.0.ffn_up.weight": (np.zeros((64, 34), np.uint8), q8),
    }
    return write_gguf(tmp_path / "small.gguf", tensors, **KEYS)


def test_gguf(small_gguf):
    found = read_header(small_gguf)
    assert (found.kind, found.file_type, found.name) == ("GGUF", "MOSTLY_Q8_0", "Tiny")
    assert (found.architecture, found.context_length) == ("llama", 512)
    assert found.rope == {"theta": 50000.0}
    assert found.tokenizer == "byte-level BPE, rule smollm, 3 tokens"
    assert found.chat_template
    assert found.tensors == [
        {"type": "F32", "tensors": 2, "bytes": 4 * 97 * 32},
        {"type": "Q8_0", "tensors": 1, "bytes": 64 * 34},
    ]
    assert found.parameters == (96 + 1 + 64) * 32
    assert found.bits_per_weight == 8.5
    assert found.problems == []
    assert "1 layers, hidden 32, ffn 64, heads 4/4" in str(found)
    assert "rope         theta 50000\n" in str(found)


def test_gguf_whose_data_is_cut_off(small_gguf, tmp_path):
    whole = read_header(small_gguf).to_dict()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small_gguf.read_bytes()[:-1000])
    found = read_header(cut).to_dict()
    (problem,) = found["problems"]
    assert "tensor 'blk.0.ffn_up.weight'" in problem
    assert "exceeds the file" in problem
    different = {"path", "problems"}
    assert {k: found[k] for k in set(found) - different} == {
        k: whole[k] for k in set(whole) - different
    }
    with pytest.raises(lq.FormatError, match="exceeds the file"):
        lq.load(cut)


def test_gguf_of_an_unknown_architecture(tmp_path):
    f32 = gguf.GGMLQuantizationType.F32
    tensors = {"token_embd.weight": (np.zeros((4, 8), np.float32), f32)}
    keys = {"mamba.context_length": 99}
    found = read_header(write_gguf(tmp_path / "m.gguf", tensors, "mamba", **keys))
    assert (found.architecture, found.context_length, found.config) == ("mamba", 99, None)
    assert (found.tokenizer, found.chat_template, found.bits_per_weight) == ("", False, None)
    assert "expected one of" in found.problems[0]
    assert "does not load: " in str(found)
    assert json.dumps(found.to_dict())


def test_damaged_header_is_an_error(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(lq.FormatError, match=r"m\.gguf, byte"):
        read_header(path)


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS))
def test_folder_as_the_model_that_loads(name, tmp_path):
    folder = tiny_models.write_folder(name, tmp_path)
    found, model = read_header(folder), lq.load(folder)
    assert (found.kind, found.problems, found.tokenizer) == ("Hugging Face", [], "")
    assert found.config.max_positions == found.context_length == model.config.max_positions
    assert found.rope["theta"] == model.config.rope_theta
    assert ("scaling" in found.rope) == (model.config.rope_scaling is not None)
    kinds = {row["type"] for row in found.tensors}
    assert kinds == {tiny_models.MODELS[name][1]}
    assert found.bits_per_weight == pytest.approx(16 if "F32" not in kinds else 32, rel=0.02)
    assert found.parameters == model.parameters


def test_tokenizer_of_a_folder(tiny_folder):
    found = read_header(tiny_folder)
    assert (found.tokenizer, found.chat_template) == ("BPE", False)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_of_a_folder(tmp_path, where):
    folder = write_folder(tmp_path / "m", {"w": np.zeros((2, 2), np.float32)}, **CONFIG)
    assert not read_header(folder).chat_template
    (folder / where).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert read_header(folder).chat_template


def test_folder_with_a_missing_and_a_cut_off_file(tmp_path):
    arrays = {name: np.ones((8, 8), np.float16) for name in "abc"}
    folder = write_folder(tmp_path / "m", arrays, shards=3, **CONFIG)
    (folder / "model-00001-of-00003.safetensors").unlink()
    cut = folder / "model-00002-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    found = read_header(folder)
    assert found.tensors == [{"type": "F16", "tensors": 2, "bytes": 256}]
    assert "00001-of-00003.safetensors is missing" in found.problems[0]
    assert "00002-of-00003.safetensors" in found.problems[1]


def test_folder_quantized_by_another_program(tmp_path):
    config = CONFIG | {"quantization_config": {"quant_method": "gptq"}, "torch_dtype": "float16"}
    folder = write_folder(tmp_path / "m", {"w": np.zeros((2, 2), np.int32)}, **config)
    found = read_header(folder)
    assert found.file_type == "float16"
    assert found.problems == ["its weights are quantized by 'gptq'"]


def test_saved_model(tiny_folder, tmp_path):
    model = lq.load(tiny_folder)
    small = lq.compress(model, "int4g16", rotation="none", method="rtn")
    small.save(tmp_path / "small")
    found = read_header(tmp_path / "small")
    assert (found.kind, found.tokenizer, found.problems) == ("lowbitq", "BPE", [])
    assert found.file_type.startswith("int4g16")
    assert found.bits_per_weight == small.bits_per_weight
    assert found.parameters == small.parameters
    assert found.layers == json.loads((tmp_path / "small" / "report.json").read_text())["layers"]
    assert found.context_length == 4096
    assert "lowbitq" in found.provenance["saved_by"]
    assert "model.layers.0.mlp.up_proj" in str(found)


def test_weights_are_not_read(tiny_folder, tmp_path):
    """A saved model with damaged weights is described, though it does not load."""
    lq.compress(lq.load(tiny_folder), "int4g16", method="rtn").save(tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert read_header(tmp_path / "small").layers
    with pytest.raises(lq.FormatError, match="CRC-32"):
        lq.load(tmp_path / "small")


def test_absent_file():
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such file or folder"):
        read_header("absent.gguf")
