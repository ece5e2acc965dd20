"""What other programs read computes what the model computes."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
import random_model
import test_models_quantized
from golden import tiny_models

import lowbitq as lq
from lowbitq.linears import Activation, Copy, Linear, QuantizedLinear
from lowbitq.models.rotating import rotate
from lowbitq.rotations import Rotation


def tiny(name, folder, kind="none"):
    """A quantized tiny model."""
    (folder / "source").mkdir()
    model = lq.load(tiny_models.write_folder(name, folder / "source"))
    return test_models_quantized.compress(rotate(model, kind, seed=3))


def with_float_inputs(model):
    """The model with decoded weights, as exports that are not packed compute."""
    result = model.copy()
    for name, linear in list(model.linears()):
        result.replace_linear(name, linear.to_float())
    return result


def largest_difference(found, expected):
    return abs(found - expected).max() / abs(expected).max()


@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_an_unrotated_model_has_the_weights_of_the_original(name, tmp_path):
    """Those of the recipe; the gains that rotation multiplied into the layers are there now."""
    source = lq.load(tiny_models.write_folder(name, tmp_path))
    lq.export(rotate(source, seed=3), tmp_path / "out", dtype="float32")
    found, weights = lq.load(tmp_path / "out"), tiny_models.weights_of(name)
    tokens = tiny_models.tokens_of(name)
    assert found.config == source.config
    assert largest_difference(found.logits(tokens), source.logits(tokens)) < 1e-5
    for index, block in enumerate(found.blocks):
        at = f"model.layers.{index}"
        for name, norm in [
            ("self_attn.q_proj", "input_layernorm"),
            ("mlp.up_proj", "post_attention_layernorm"),
        ]:
            expected = weights[f"{at}.{name}.weight"] * weights[f"{at}.{norm}.weight"]
            layer = block.linears[name.split(".")[1]]
            np.testing.assert_allclose(layer.weight, expected, atol=1e-6)
        expected = weights[f"{at}.mlp.down_proj.weight"]
        np.testing.assert_allclose(block.linears["down_proj"].weight, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["hadamard", "none"])
@pytest.mark.parametrize("name", ["llama_linear", "qwen2", "qwen3"])
def test_a_float_folder_computes_what_the_packed_model_does(name, kind, tmp_path):
    model, tokens = tiny(name, tmp_path, kind), tiny_models.tokens_of(name)
    found = lq.export(model, tmp_path / "out")
    expected = with_float_inputs(model).logits(tokens)
    assert found.lossless == (kind == "none")
    assert largest_difference(lq.load(tmp_path / "out").logits(tokens), expected) < 1e-5
    assert found.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_copies_adapters_scales_and_trained_gains_are_in_the_weights(tmp_path):
    rng = np.random.default_rng(0)
    model = rotate(random_model.random_model(), seed=2)
    quantized = test_models_quantized.compress(model)
    tensor = lq.quantize(rng.standard_normal((96, 64)).astype(np.float32), "int4g32")
    weight = rng.uniform(0.5, 1, 96).astype(np.float32)
    copies = (
        Copy(tensor, Rotation(64, seed=5), Rotation(96, seed=6), Activation(None), weight),
        Copy(tensor, activation=Activation(None)),
    )
    adapter = tuple(rng.standard_normal((n, 3)).astype(np.float32) for n in (96, 64))
    first = quantized.blocks[0]
    first.linears["up_proj"] = QuantizedLinear(copies, None, adapter)
    first.mlp_norm = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    first.attention_scale, first.mlp_scale = 0.5, 0.75
    tokens = random_model.random_tokens(20)

    lq.export(quantized, tmp_path / "out")

    expected = with_float_inputs(quantized).logits(tokens)
    assert largest_difference(lq.load(tmp_path / "out").logits(tokens), expected) < 1e-5


def test_a_float_model_is_saved_exactly_in_its_own_precision(tmp_path):
    for name, dtype in [("llama", "F32"), ("llama_linear", "BF16"), ("qwen2_yarn", "F16")]:
        (tmp_path / name).mkdir()
        model = lq.load(tiny_models.write_folder(name, tmp_path / name))
        model.save(tmp_path / f"{name}-out")
        again = lq.load(tmp_path / f"{name}-out")
        tokens = tiny_models.tokens_of(name)
        assert np.array_equal(again.logits(tokens), model.logits(tokens))
        header = (tmp_path / f"{name}-out" / "model.safetensors").read_bytes()[8:500]
        assert f'"{dtype}"'.encode() in header
        names = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        assert names["architectures"] == [f"{model.config.family.capitalize()}ForCausalLM"]


def test_smollm3_tells_transformers_which_layers_have_rope(tmp_path):
    """Also where a block was repeated."""
    model = lq.load(tiny_models.write_folder("smollm3_listed", tmp_path))
    deeper = lq.repeat_blocks(model, 1)
    lq.export(deeper, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["no_rope_layers"] == [0, 1, 1, 0]
    assert config["architectures"] == ["SmolLM3ForCausalLM"]
    tokens = tiny_models.tokens_of("smollm3_listed")
    found = lq.load(tmp_path / "out")
    assert [block.rope for block in found.blocks] == [False, True, True, False]
    assert np.array_equal(found.logits(tokens), deeper.logits(tokens))


def test_a_block_without_rope_needs_a_family_that_has_some(tmp_path):
    model = random_model.random_model()
    model.blocks[1].rope = False
    with pytest.raises(ValueError, match="block 1 lacks rotary embeddings, for which llama models"):
        lq.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="block 1 lacks rotary embeddings, for which llama models"):
        test_models_quantized.compress(model).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rounding_is_said(tmp_path):
    model = random_model.random_model()
    assert lq.export(model, tmp_path / "a").lossless
    found = lq.export(model, tmp_path / "b", dtype="bfloat16")
    assert found.changes == ("weights are rounded to bfloat16",)
    assert "rounded to bfloat16" in str(found)
    assert found.nbytes < 0.6 * lq.export(model, tmp_path / "c").nbytes
    model.blocks[0].linears["up_proj"].weight[3, 4] = 1e5
    with pytest.raises(ValueError, match=r"up_proj.weight has a weight of 1e\+05, too large"):
        lq.export(model, tmp_path / "d", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_an_export_replaces_only_exports_and_only_when_told(tmp_path):
    model, out = random_model.random_model(), tmp_path / "out"
    lq.export(model, out)
    with pytest.raises(FileExistsError, match="exists; overwrite=True or --force replaces it"):
        lq.export(model, out)
    lq.export(model, out, overwrite=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt, which no export writes"):
        lq.export(model, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(FileExistsError, match="is a file"):
        lq.export(model, out / "thesis.txt", overwrite=True)


def test_bad_arguments_are_refused(tmp_path):
    model = random_model.random_model()
    with pytest.raises(ValueError, match="to is 'onnx', expected one of hf"):
        lq.export(model, tmp_path / "a", "onnx")
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of auto"):
        lq.export(model, tmp_path / "a", dtype="int8")
    layer = model.blocks[1].linears["o_proj"]
    model.config = dataclasses.replace(model.config, family="qwen2")
    model.blocks[1].linears["o_proj"] = Linear(layer.weight, np.ones(64, np.float32))
    with pytest.raises(ValueError, match="o_proj have biases, for which qwen2 models"):
        lq.export(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_perplexity_is_measured_before_and_after(tmp_path):
    tokens = random_model.random_tokens(128)
    model = test_models_quantized.compress(random_model.random_model(), ["int8g32"])
    found = lq.export(model, tmp_path / "a", check=tokens, window=64)
    assert found.before == lq.perplexity(model, tokens, 64)
    assert found.after == lq.perplexity(lq.load(tmp_path / "a"), tokens, 64)
    assert "before" in str(found)
    assert found.to_dict()["perplexity"]["after"]["value"] == found.after


def test_transformers_refuses_a_packed_folder_by_name_of_its_weights(tmp_path):
    """As transformers 5.24 does: no other file name may stand there, and it is shown."""
    test_models_quantized.compress(random_model.random_model()).save(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "lowbitq export FOLDER OUT --to hf" in config["transformers_weights"]
    assert not config["transformers_weights"].endswith((".safetensors", ".json"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hadamard", "none"])
@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_transformers_computes_the_same(name, kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny(name, tmp_path, kind), tiny_models.tokens_of(name)
    lq.export(model, tmp_path / "out")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = other(torch.tensor(tokens)[None]).logits[0].numpy()
    assert abs(found - with_float_inputs(model).logits(tokens)).max() < 1e-4
    model.save(tmp_path / "packed")
    with pytest.raises(ValueError, match="lowbitq export FOLDER OUT --to hf"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
