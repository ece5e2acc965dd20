"""The first number of a model that is not finite is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from golden import tiny_models
from random_model import random_model

import lowbitq as lq
from lowbitq.checkpoints import open_checkpoint
from lowbitq.models.finite import check_finite


def models(tmp_path):
    """Models that have, together, every kind of tensor."""
    for family in ("qwen2", "qwen3", "llama3"):
        folder = tmp_path / family
        folder.mkdir()
        tiny_models.write_folder(family, folder)
        yield lq.load(folder), set(open_checkpoint(folder).tensors)


def break_at(model, name, value):
    """Put a value into the last place of the tensor of this name; return that place."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        owner, key = model.blocks[int(parts[2])], parts[-2]
    else:
        owner, key = model, parts[-2]
    norms = {
        "norm": "final_norm",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "q_norm": "query_norm",
        "k_norm": "key_norm",
    }
    if key in norms:
        array = getattr(owner, norms[key])
    elif owner is model:
        linear = {"embed_tokens": model.embedding, "lm_head": model.head}[key]
        array = linear.weight
    else:
        array = getattr(owner.linears[key], parts[-1])
    place = tuple(size - 1 for size in array.shape)
    array[place] = value
    return ", ".join(map(str, place))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_tensor_of_a_file_is_looked_at(tmp_path, value):
    checked = set()
    for fresh, names in models(tmp_path):
        check_finite(fresh)
        for name in sorted(names):
            model = lq.load(fresh.provenance["source"])
            place = break_at(model, name, value)
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                check_finite(model)
            assert str(caught.value) == f"{name} has a NaN or an infinity at [{place}]"
            checked.add(name.rpartition("layers.")[2])
    assert {"0.self_attn.k_proj.bias", "1.self_attn.q_norm.weight", "lm_head.weight"} <= checked


def test_the_first_of_several_is_named():
    model = random_model()
    model.blocks[2].mlp_norm[5] = np.nan
    model.final_norm[0] = np.inf
    with pytest.raises(
        ValueError, match=r"^model\.layers\.2\.post_attention_layernorm\.weight .*5"
    ):
        check_finite(model)


@pytest.mark.parametrize(
    "work",
    [
        lambda bad, good, tokens: lq.perplexity(bad, tokens, window=16),
        lambda bad, good, tokens: lq.evaluate(good, tokens, bad, window=16),
        lambda bad, good, tokens: lq.calibrate(bad, tokens, samples=2, window=16),
        lambda bad, good, tokens: lq.compress(bad, "int4g16", method="rtn"),
    ],
)
def test_it_is_named_before_work_starts(work):
    good, bad = random_model(layers=2), random_model(layers=2)
    bad.embedding.weight[7, 3] = np.nan  # of a token that the text does not have
    with pytest.raises(ValueError, match=r"embed_tokens.weight has a NaN .* at \[7, 3\]"):
        work(bad, good, np.arange(64) % 7)


def test_dense_rotations_are_looked_at():
    model = lq.rotate(random_model(), "orthogonal")
    check_finite(model)
    array = np.array(model.residual_rotation.to_arrays()["matrix"])
    array[3, 4] = np.nan
    broken = model.copy()
    fields = model.residual_rotation.to_dict()
    broken.residual_rotation = lq.Rotation.from_dict(fields, {"matrix": array})
    with pytest.raises(ValueError, match=r"residual_rotation\.matrix has .* at \[3, 4\]"):
        check_finite(broken)


@pytest.mark.parametrize("format", ["int4g32", "int4g32sym", "nf4g32"])
def test_scales_of_packed_layers_are_looked_at(format):
    small = lq.compress(random_model(), format, method="rtn")
    check_finite(small)
    tensor = small.blocks[1].linears["up_proj"].tensor
    panels = np.array(tensor.panels)
    halves = panels.view(np.float16)
    kept = halves.copy()
    for place in range(halves.size):  # until one of them is a scale of a row that exists
        halves[place] = np.inf
        scale = replace(tensor, panels=panels).scale
        if not np.isfinite(scale).all():
            break
        halves[place] = kept[place]
    linear = lq.QuantizedLinear.of(replace(tensor, panels=panels))
    small.replace_linear("model.layers.1.mlp.up_proj", linear)
    row, group = np.argwhere(~np.isfinite(scale))[0]
    with pytest.raises(
        ValueError, match=rf"up_proj\.copies\.0\.scale has .* at \[{row}, {group}\]"
    ):
        check_finite(small)
