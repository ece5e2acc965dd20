"""GGUF files: llama.cpp computes what the model computes, and `load` reads the same weights."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import exported_models
import numpy as np
import pytest
import random_model
import test_models_quantized
from golden import tiny_models
from small_vocabularies import byte_level, sentencepiece

import lowbitq as lq
from lowbitq.checkpoints import read_gguf
from lowbitq.llama_cpp import holds
from lowbitq.models.rotating import rotate
from lowbitq.models.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "llama_cpp.npz"
# llama.cpp rounds inputs of packed layers to 8 bits in groups of 32: 0.6 to 1.3 % of a logit here.
LIMITS = {"float": 1e-5, "packed": 0.02}


def largest_difference(found, expected):
    return abs(found - expected).max() / abs(expected).max()


def types_of(path):
    return {name: tensor.dtype for name, tensor in read_gguf(path).tensors.items()}


@pytest.mark.parametrize("name", exported_models.MODELS)
def test_llama_cpp_computes_what_the_model_does(name, tmp_path):
    """The golden logits are llama.cpp's for the file that export writes here."""
    model, dtype = exported_models.model_of(name)
    found = lq.export(model, tmp_path / "a.gguf", "gguf", dtype=dtype)
    kind = "float" if exported_models.MODELS[name][1] is None else "packed"
    limit, expected = LIMITS[kind], np.load(GOLDEN)[name]
    assert largest_difference(expected, model.logits(exported_models.TOKENS)) < limit
    read = lq.load(found.path)
    assert largest_difference(read.logits(exported_models.TOKENS), expected) < limit
    layer = types_of(found.path)["blk.1.attn_q.weight"]
    assert layer == ("F32" if kind == "float" else name.split()[0])


@pytest.mark.parametrize("name", [name for name in tiny_models.IN_GGUF if name != "qwen3_bias"])
def test_a_float_file_has_the_same_logits(name, tmp_path):
    model = lq.load(tiny_models.write_folder(name, tmp_path))
    found = lq.export(model, tmp_path / "a.gguf", "gguf", dtype="float32")
    tokens = tiny_models.tokens_of(name)
    assert found.lossless
    assert largest_difference(lq.load(found.path).logits(tokens), model.logits(tokens)) < 1e-6


def test_packed_weights_come_back_to_the_bit(tmp_path):
    model = test_models_quantized.compress(
        random_model.random_model(), ["int4g32symz8", "int4g32", "int3g64", "int8g32symz128"]
    )
    found = lq.export(model, tmp_path / "a.gguf", "gguf", dtype="float32")
    assert found.lossless
    assert "lossless" in str(found)
    for (name, before), (_, after) in zip(
        model.linears(), lq.load(found.path).linears(), strict=True
    ):
        assert np.array_equal(before.dequantize(), after.weight), name


def test_what_no_block_holds_is_decoded_and_named(tmp_path):
    model = test_models_quantized.compress(random_model.random_model(), ["nf4g32", "int4g32"])
    model.embedding = lq.QuantizedLinear.of(lq.quantize(model.embedding.weight, "int8g64"))
    found = lq.export(model, tmp_path / "a.gguf", "gguf")
    [change] = found.changes
    assert change.startswith("decoded and rounded to float16: token_embd, blk.0.attn_q, blk.0.")
    assert types_of(found.path)["blk.0.attn_q.weight"] == "F16"
    assert types_of(found.path)["blk.0.attn_k.weight"] == "Q4_1"
    tokens = random_model.random_tokens(20)
    expected = model.copy()  # with float inputs, as the file is read
    for name, layer in list(expected.matrices()):
        expected.replace_linear(name, layer.to_float())
    read = lq.load(found.path)
    assert largest_difference(read.logits(tokens), expected.logits(tokens)) < 2e-3


def test_a_rotated_model_keeps_its_packed_layers(tmp_path):
    """But those that rotate their inputs as the model runs, which no such file can."""
    model = test_models_quantized.compress(rotate(random_model.random_model()), ["int4g32symz8"])
    found = lq.export(model, tmp_path / "a.gguf", "gguf", dtype="float32")
    types = types_of(found.path)
    assert types["blk.0.attn_output.weight"] == "Q4_0"
    assert types["blk.0.ffn_down.weight"] == "F32"
    assert types["output.weight"] == "F32"
    assert "embedding and the head" in found.changes[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tokenizer_comes_back(kind):
    before = Tokenizer.from_gguf(byte_level() if kind == "gpt2" else sentencepiece())
    metadata = before.to_gguf(before.vocab_size + 5)
    after = Tokenizer.from_gguf(metadata)
    assert len(metadata["tokenizer.ggml.tokens"]) == before.vocab_size + 5
    for text in ["low lower lowest", "  low", "Wörter, 123!\n\n", "low<|im_end|>"]:
        assert after.encode(text).tolist() == before.encode(text).tolist()
    assert (after.bos_id, after.eos_ids) == (before.bos_id, before.eos_ids)
    assert after.adds_bos == before.adds_bos
    assert after.chat_template == before.chat_template


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "default"])
def test_a_rule_is_found_by_what_it_does(pre):
    before = Tokenizer.from_gguf(byte_level(pre))
    after = Tokenizer.from_gguf(before.to_gguf())
    text = "low lower 12 123 1234 low12\n\n  low 'low' LOW's"
    assert after.encode(text).tolist() == before.encode(text).tolist()


@pytest.mark.model
def test_smollm2s_tokenizer_has_its_rule_again(smollm2):
    before = Tokenizer.from_gguf(read_gguf(smollm2).metadata)
    metadata = before.to_gguf()
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert Tokenizer.from_gguf(metadata).vocabulary() == before.vocabulary()


def test_a_rule_without_a_name_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    words = Tokenizer(Backend(models.WordLevel({"low": 0})))
    with pytest.raises(ValueError, match="is a WordLevel tokenizer, expected BPE"):
        words.to_gguf()
    letters = {chr(code): code - 33 for code in range(33, 127)}
    pairs = Backend(models.BPE(letters | {"d,": 94}, [("d", ",")]))  # no rule keeps these together
    with pytest.raises(ValueError, match="cuts text by a rule that has no name in GGUF files"):
        Tokenizer(pairs).to_gguf()


def test_other_rotary_frequencies_are_refused(tmp_path):
    model = random_model.random_model()
    llama3 = exported_models.MODELS["llama3"][0]
    model.config = dataclasses.replace(model.config, family="qwen2", **llama3)
    with pytest.raises(ValueError, match=r"llama\.cpp has no rope_scaling .* for qwen2 models"):
        lq.export(model, tmp_path / "a.gguf", "gguf")
    assert not os.listdir(tmp_path)


def test_biases_that_llama_cpp_does_not_read_are_refused(tmp_path):
    """It finds a wrong number of tensors in such a file."""
    model = lq.load(tiny_models.write_folder("qwen3_bias", tmp_path))
    with pytest.raises(
        ValueError, match=r"o_proj have biases, but llama\.cpp has none there in qw"
    ):
        lq.export(model, tmp_path / "a.gguf", "gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_rope_in_other_layers_is_refused(tmp_path):
    model = lq.load(tiny_models.write_folder("smollm3_listed", tmp_path))
    with pytest.raises(ValueError, match=r"leaves out rope in every 4th layer of smollm3 models"):
        lq.export(model, tmp_path / "a.gguf", "gguf")
    small = lq.load(tiny_models.write_folder("smollm3", tmp_path))
    small.blocks = small.blocks[:3]  # the fourth lacks it
    lq.export(small, tmp_path / "a.gguf", "gguf")
    small.blocks[2] = dataclasses.replace(small.blocks[2], rope=False)
    with pytest.raises(ValueError, match=r"rope_layers is \(True, True, False\), but llama\.cpp"):
        lq.export(small, tmp_path / "b.gguf", "gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_a_file_is_replaced_only_when_told(tmp_path):
    model, path = random_model.random_model(), tmp_path / "a.gguf"
    lq.export(model, path, "gguf")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; overwrite=True"):
        lq.export(model, path, "gguf")
    lq.export(model, path, "gguf", overwrite=True)
    assert path.read_bytes() == before
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="not a GGUF file"):
        lq.export(model, tmp_path / "letter.txt", "gguf", overwrite=True)
    with pytest.raises(FileExistsError, match="is a folder"):
        lq.export(model, tmp_path, "gguf", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "letter.txt"]


def test_formats_that_a_file_holds():
    exact = ["int4g32symz8", "int4g32", "int4g64", "int3g32symz4", "int8g32symz128", "ternaryg32"]
    others = ["int4g16", "int8g64", "nf4g64", "kmeans3g64", "int2g16s4"]
    assert [format for format in exact + others if holds(format)] == exact
