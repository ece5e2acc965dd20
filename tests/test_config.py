"""Configurations: keys in, numbers out, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from golden import tiny_models

import lowbitq
from lowbitq.models import llama, qwen
from lowbitq.models.config import ModelConfig
from lowbitq.models.config_gguf import config_from_gguf
from lowbitq.models.config_hf import config_from_hf

FAMILIES = {f.name: f for f in (*llama.FAMILIES, *qwen.FAMILIES)}
LLAMA = tiny_models.config_of("llama")
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 48,
    "llama.feed_forward_length": 88,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
}


def from_hf(**changes):
    values = {k: v for k, v in (LLAMA | changes).items() if v is not ...}
    return config_from_hf(values, FAMILIES)


def from_gguf(rope_factors=None, **changes):
    keys = {"llama." + k.replace("__", "."): v for k, v in changes.items()}
    return config_from_gguf(
        {k: v for k, v in (GGUF | keys).items() if v is not ...},
        {"llama": FAMILIES["llama"]},
        vocab_size=96,
        tie_embeddings=True,
        attention_bias=False,
        rope_factors=rope_factors,
    )


@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_to_hf_is_read_back(name):
    config = config_from_hf(tiny_models.config_of(name), FAMILIES)
    assert config_from_hf(config.to_hf(), FAMILIES) == config


def test_gguf_and_hf_agree():
    config = from_gguf()
    expected = dataclasses.replace(
        from_hf(), max_positions=128, bos_token_id=None, eos_token_ids=()
    )
    assert config == expected
    assert config_from_hf(config.to_hf(), FAMILIES) == config


def test_defaults_where_a_file_says_nothing():
    missing = dict.fromkeys(
        ["num_key_value_heads", "rope_theta", "tie_word_embeddings", "eos_token_id"], ...
    )
    config = from_hf(**missing)
    assert config.kv_heads == config.heads == 6
    assert config.head_dim == 8
    assert config.rope_theta == 10000
    assert not config.tie_embeddings
    assert config.eos_token_ids == ()
    assert config_from_hf(LLAMA | {"model_type": "qwen3"}, FAMILIES).head_dim == 128


def test_several_tokens_may_end_a_text():
    assert from_hf(eos_token_id=[5, 7]).eos_token_ids == (5, 7)


def test_a_sliding_window_counts_where_it_is_used():
    assert from_hf(model_type="mistral", sliding_window=64).sliding_window == 64
    assert from_hf(model_type="mistral", sliding_window=None).sliding_window is None
    assert from_hf(model_type="qwen2", sliding_window=64).sliding_window is None
    used = from_hf(model_type="qwen2", sliding_window=64, use_sliding_window=True)
    assert used.sliding_window == 64


def test_all_that_differs_is_in_one_error():
    with pytest.raises(ValueError, match="the model is not supported") as caught:
        from_hf(
            model_type="gemma2",
            hidden_act="gelu",
            num_experts=8,
            attn_logit_softcapping=50.0,
            rope_scaling={"rope_type": "dynamic", "factor": 2.0},
            layer_types=["full_attention", "chunked_attention"],
            hidden_size="not even read",
        )
    assert not isinstance(caught.value, lowbitq.FormatError)
    for part in [
        "model_type is 'gemma2', expected one of (llama, mistral, qwen2, qwen3)",
        "hidden_act is 'gelu'",
        "num_experts is 8",
        "attn_logit_softcapping is 50.0",
        "rope type is 'dynamic', expected one of (default, linear, llama3, yarn, longrope)",
        "layer_types has chunked_attention",
    ]:
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="the model is not supported") as caught:
        from_gguf(
            expert_count=4, rope__scaling__type="longrope", rope__dimension_count=4, logit_scale=2.0
        )
    for part in [
        "llama.expert_count is 4",
        "rope scaling is 'longrope', expected none, linear or yarn",
        "llama.rope.dimension_count is 4, not 8",
        "llama.logit_scale is 2.0",
    ]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is None, expected a positive integer"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, expected a positive integer"),
        ({"vocab_size": True}, "vocab_size is True, expected a positive integer"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776, expected a positive integer"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', expected a positive number"),
        ({"rope_theta": math.inf}, "rope_theta is inf, expected a positive number"),
        ({"eos_token_id": ["a"]}, r"eos_token_id is \['a'\], expected token numbers"),
        ({"num_key_value_heads": 4}, "6 heads do not share 4 key-value heads evenly"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None, expected a positive number"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}},
            "high_freq_factor is None, expected a positive number",
        ),
    ],
)
def test_damaged_values_are_named(change, message):
    with pytest.raises(lowbitq.FormatError, match=f"^config.json: .*{message}"):
        from_hf(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": ...}, "llama.block_count is None, expected a positive integer"),
        ({"attention__head_count": 0}, "llama.attention.head_count is 0"),
        ({"attention__head_count_kv": 4}, "6 heads do not share 4 key-value heads evenly"),
        ({"rope_factors": np.ones(3, np.float32)}, r"rope_freqs.weight has shape \(3,\)"),
        ({"rope_factors": np.zeros(4, np.float32)}, "positive numbers"),
    ],
)
def test_damaged_metadata_is_named(change, message):
    with pytest.raises(lowbitq.FormatError, match=message):
        from_gguf(**change)


def test_heads_that_differ_between_blocks_are_not_supported():
    with pytest.raises(ValueError, match="head_count differs between blocks"):
        from_gguf(attention__head_count_kv=np.array([2, 3]))


def frequencies(**scaling):
    config = ModelConfig(
        "llama", 64, 128, 2, 2, 2, 64, 100, rope_theta=5e5, rope_scaling=scaling or None
    )
    return config.rope_frequencies()


def test_plain_frequencies_fall_geometrically():
    plain, factor = frequencies()
    assert factor == 1
    assert plain[0] == 1
    assert np.allclose(plain[1:] / plain[:-1], 5e5 ** (-2 / 64), rtol=1e-12)


def test_linear_scaling_slows_all_alike():
    assert (frequencies(rope_type="linear", factor=4.0)[0] == frequencies()[0] / 4).all()


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_scaling_keeps_short_waves_and_slows_long_ones(kind):
    scaled, factor = frequencies(
        rope_type=kind,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    plain = frequencies()[0]
    slowed = plain / scaled
    assert slowed[0] == 1
    assert abs(slowed[-1] - 8) < 1e-12
    assert (np.diff(slowed) >= -1e-12).all()
    assert factor == (1 if kind == "llama3" else 0.1 * math.log(8) + 1)


def test_llama3_blends_where_its_paper_says():
    """Waves of more than original / low are slowed fully, of less than original / high not."""
    scaled, _ = frequencies(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    plain = frequencies()[0]
    wave = 2 * math.pi / plain
    assert (scaled == plain)[wave < 8192 / 4].all()
    assert np.allclose((plain / scaled)[wave > 8192], 8, rtol=1e-12)
    between = (wave > 8192 / 4) & (wave < 8192)
    assert between.any()
    assert ((plain / 8 < scaled) & (scaled < plain))[between].all()


def test_factors_of_a_gguf_file_divide_the_frequencies():
    factors = np.array([1, 2, 4, 8], np.float32)
    config = from_gguf(rope_factors=factors)
    assert np.allclose(from_gguf().rope_frequencies()[0] / config.rope_frequencies()[0], factors)
    assert config_from_hf(config.to_hf(), FAMILIES) == config
