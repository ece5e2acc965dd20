"""Folders for transformers and vLLM hold the integers and scales of packed layers."""

from __future__ import annotations

import json
import os

import exported_models
import numpy as np
import pytest
import random_model

import lowbitq as lq
from lowbitq.checkpoints.safetensors import read_safetensors


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def packed(*formats):
    """A model whose layers have these formats in turn."""
    model = exported_models.packed(random_model.random_model(), formats[0])
    for i, (name, _) in enumerate(list(model.linears())):
        weight = dict(random_model.random_model().linears())[name].weight
        tensor = lq.quantize(weight, formats[i % len(formats)], range="minmax")
        model.replace_linear(name, lq.QuantizedLinear.of(tensor))
    return model


def test_a_compressed_tensors_folder(tmp_path):
    model = packed("int4g32symz8")
    found = lq.export(model, tmp_path / "out", "compressed-tensors")
    assert found.changes == ("decoded and rounded to float16: model.embed_tokens",)
    entry = config_of(tmp_path / "out")["quantization_config"]
    assert (entry["quant_method"], entry["format"]) == ("compressed-tensors", "pack-quantized")
    assert entry["ignore"] == ["lm_head"]
    [group] = entry["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights = group["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, True)
    file = read_safetensors(tmp_path / "out" / "model.safetensors")
    words = file.view("model.layers.1.mlp.up_proj.weight_packed").view(np.uint32)
    codes = words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    tensor = model.blocks[1].linears["up_proj"].tensor
    assert np.array_equal(codes.reshape(96, 64), tensor.codes)
    assert "model.layers.1.mlp.up_proj.weight" not in file.tensors


def test_layers_of_several_kinds(tmp_path):
    model = packed("int4g32symz8", "int8g32symz128", "nf4g32")
    found = lq.export(model, tmp_path / "out", "compressed-tensors", dtype="float32")
    assert found.lossless
    entry = config_of(tmp_path / "out")["quantization_config"]
    groups = entry["config_groups"].values()
    assert [group["weights"]["num_bits"] for group in groups] == [4, 8]
    named = [name for group in groups for name in group["targets"]]
    assert {*named, *entry["ignore"]} == {*dict(model.linears()), "lm_head"}
    file = read_safetensors(tmp_path / "out" / "model.safetensors")
    for name in entry["ignore"][:-1]:
        layer = dict(model.linears())[name]
        assert np.array_equal(file.load(f"{name}.weight"), layer.dequantize())
    with pytest.raises(ValueError, match=r"no matrices of integers, as GPTQ needs: model\.layers"):
        lq.export(model, tmp_path / "b", "gptq")
    with pytest.raises(ValueError, match="2 pairs of bits and group, expected one with GPTQ"):
        lq.export(packed("int4g32symz8", "int8g32symz128"), tmp_path / "b", "gptq")
    assert os.listdir(tmp_path) == ["out"]


def test_a_gptq_folder(tmp_path):
    lq.export(packed("int4g32symz8"), tmp_path / "out", "gptq")
    entry = config_of(tmp_path / "out")["quantization_config"]
    assert (entry["quant_method"], entry["bits"], entry["group_size"]) == ("gptq", 4, 32)
    assert not entry["desc_act"]
    names = read_safetensors(tmp_path / "out" / "model.safetensors").tensors
    at = "model.layers.0.self_attn.q_proj"
    parts = {name.removeprefix(f"{at}.") for name in names if name.startswith(at)}
    assert parts == {"qweight", "qzeros", "scales", "g_idx"}


def test_what_cannot_be_written_or_measured_is_said(tmp_path):
    model = packed("nf4g32")
    with pytest.raises(ValueError, match="no layer is a matrix of integers; int4g32symz8"):
        lq.export(model, tmp_path / "a", "compressed-tensors")
    with pytest.raises(ValueError, match="check reads the export back, which lowbitq cannot"):
        lq.export(model, tmp_path / "a", "gptq", check=[1, 2, 3])
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int4g32symz8", "int8g32symz128", "int4symz8"])
def test_transformers_computes_the_same(format, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model, tokens = packed(format), exported_models.TOKENS
    lq.export(model, tmp_path / "out", "compressed-tensors", dtype="float32")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = other(torch.tensor(tokens.astype(int))[None]).logits[0].numpy()
    for name, layer in list(model.linears()):
        model.replace_linear(name, layer.to_float())
    assert abs(found - model.logits(tokens)).max() < 1e-4
