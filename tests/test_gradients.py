"""lowbitq.gradients: names, kinds and sums over windows; tests/core has the arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import tiny_models
from random_model import random_model, random_tokens

from lowbitq.gradients import gradients
from lowbitq.models.loading import load
from lowbitq.models.rotating import rotate
from lowbitq.quantizers import quantize

GOLDEN = np.load(Path(__file__).parent / "golden" / "gradients.npz")
STRIDE = 7  # of the numbers kept by make_gradients.py


def all_of(model, tokens, **options):
    found = {}
    for part in model.gradients(tokens, **options):
        found |= part
    return found


def loss_of(model, tokens):
    logits = model.logits(tokens).astype(float)[:-1]
    logits -= logits.max(1, keepdims=True)
    chosen = logits[np.arange(len(logits)), tokens[1:]]
    return (np.log(np.exp(logits).sum(1)) - chosen).mean()


@pytest.mark.parametrize("name", dict.fromkeys(key.split("/")[0] for key in GOLDEN))
def test_gradients_are_those_of_torch(name, tmp_path):
    model = load(tiny_models.write_folder(name, tmp_path))
    kinds = ["weight", "bias", "norm", "embedding", "head"]
    found = all_of(model, tiny_models.tokens_of(name), of=kinds)
    stored = {
        key.removeprefix(f"{name}/"): GOLDEN[key] for key in GOLDEN if key.startswith(f"{name}/")
    }
    largest = {key: stored.pop(f"{key}/largest") for key in found}
    assert stored.keys() == found.keys()
    for key, gradient in found.items():
        assert abs(gradient).max() == pytest.approx(largest[key], rel=1e-4)
        assert abs(gradient.reshape(-1)[::STRIDE] - stored[key]).max() <= 1e-4 * largest[key], key


def test_names_are_those_of_a_checkpoint():
    model, tokens = random_model(layers=2), random_tokens(20)
    parts = list(gradients(model, tokens, of=["weight", "norm", "embedding"]))
    assert list(parts[0]) == ["model.norm.weight"]
    assert list(parts[-1]) == ["model.embed_tokens.weight"]
    assert all(name.startswith("model.layers.1.") for name in parts[1])
    shapes = {name: linear.shape for name, linear in model.linears()}
    found = all_of(model, tokens, of=["weight"])
    assert {name.removesuffix(".weight"): g.shape for name, g in found.items()} == shapes


@pytest.mark.parametrize("rotation", ["none", "orthogonal", "hadamard"])
def test_gradient_predicts_the_loss_of_a_step(rotation):
    model, tokens = rotate(random_model(layers=2), rotation), random_tokens(40)
    for name, gradient in all_of(model, tokens, of=["weight", "norm", "embedding"]).items():
        size = np.linalg.norm(gradient)
        step = np.float32(1e-2) * gradient / size
        changes = []
        for sign in (1, -1):
            changed = stepped(model, name, sign * step)
            changes.append(loss_of(changed, tokens))
        assert (changes[0] - changes[1]) / 2e-2 == pytest.approx(size, rel=0.02)


def stepped(model, name, step):
    changed = model.copy()
    key = name.removesuffix(".weight")
    layers = dict(model.matrices())
    if key in layers:
        changed.replace_linear(key, layers[key].replace(weight=layers[key].weight + step))
    elif key == "model.norm":
        changed.final_norm = model.final_norm + step
    else:
        index, kind = key.split(".")[2:]
        field = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}[kind]
        block = changed.blocks[int(index)]
        setattr(block, field, getattr(block, field) + step)
    return changed


def test_windows_add_up():
    model, tokens = random_model(layers=2), random_tokens(60).reshape(3, 20)
    of = ["weight", "norm", "embedding", "output"]
    together = all_of(model, tokens, of=of, mean=False)
    alone = [all_of(model, row, of=of, mean=False) for row in tokens]
    for name, gradient in together.items():
        parts = [one[name] for one in alone]
        expected = np.concatenate(parts) if name.endswith("output") else sum(parts)
        assert np.allclose(gradient, expected, atol=1e-4 * abs(expected).max())


def test_outputs_make_up_the_weights_gradient():
    model, tokens = random_model(layers=1), random_tokens(20)
    found = all_of(model, tokens, of=["weight", "output"])
    taps = {}
    model.block_forward(0, model.embed(tokens), taps)
    name = "model.layers.0.mlp.gate_proj"
    expected = found[f"{name}.output"][0].T @ taps["mlp"]
    assert np.allclose(found[f"{name}.weight"], expected, atol=1e-6)


def test_a_teacher_that_agrees_has_no_gradient():
    model, tokens = random_model(layers=1), random_tokens(20)
    found = all_of(model, tokens, loss="kl", teacher=model)
    assert max(abs(gradient).max() for gradient in found.values()) < 1e-6


def test_drawn_labels_are_a_function_of_the_seed():
    model, tokens = random_model(layers=1), random_tokens(300)
    first, again, other = (all_of(model, tokens, of=["norm"], seed=seed) for seed in (1, 1, 2))
    name = "model.norm.weight"
    assert (first[name] == again[name]).all()
    assert (first[name] != other[name]).any()


def test_what_does_not_fit_is_refused():
    model = random_model(layers=1)
    with pytest.raises(ValueError, match=r"of has \['scale'\], expected some of weight"):
        next(gradients(model, [1, 2], of=["scale"]))
    packed = model.copy()
    from lowbitq.linears import QuantizedLinear

    name, linear = next(iter(model.linears()))
    packed.replace_linear(name, QuantizedLinear.of(quantize(linear.weight, "int4g64")))
    with pytest.raises(ValueError, match="copy 0 is packed"):
        list(gradients(packed, [1, 2, 3]))
