"""Configurations: keys in, numbers out, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from golden import tiny_models

import lowbitq
from lowbitq.models.config import ModelConfig
from lowbitq.models.config_gguf import config_from_gguf
from lowbitq.models.config_hf import config_from_hf
from lowbitq.models.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
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
    assert from_hf(model_type="mistral", use_sliding_window=False).sliding_window == 4096
    assert from_hf(sliding_window=64).sliding_window == 64
    assert from_hf(sliding_window=64, use_sliding_window=False).sliding_window is None
    assert from_hf(model_type="qwen2", sliding_window=64).sliding_window is None
    used = from_hf(
        model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=1
    )
    assert used.sliding_window == 64
    assert config_from_hf(used.to_hf(), FAMILIES) == used


def test_mistral_with_layer_types_is_ministral():
    """As in transformers; only layers that are listed as sliding have the window."""
    kinds = ["full_attention", "sliding_attention"]
    listed = from_hf(model_type="mistral", sliding_window=64, layer_types=kinds)
    assert (listed.family, listed.sliding_window) == ("ministral", 64)
    full = from_hf(model_type="mistral", sliding_window=64, layer_types=kinds[:1] * 2)
    assert (full.family, full.sliding_window) == ("ministral", None)
    assert from_hf(model_type="ministral").sliding_window == 4096
    assert from_hf(model_type="ministral", layer_types=kinds).sliding_window == 4096
    for config in (listed, full):
        assert config_from_hf(config.to_hf(), FAMILIES) == config


def smollm3(**changes):
    return from_hf(model_type="smollm3", num_hidden_layers=5, **changes)


def test_smollm3_says_which_layers_have_rope():
    assert smollm3().rope_layers == (True, True, True, False, True)
    assert smollm3(no_rope_layer_interval=2).rope_layers == (True, False, True, False, True)
    mixed = smollm3(no_rope_layers=[0, 1, 1, 0, 0, 1], no_rope_layer_interval=2)
    assert mixed.rope_layers == (False, True, True, False, False)
    assert config_from_hf(mixed.to_hf(), FAMILIES) == mixed
    assert from_hf().rope_layers is None
    missing = config_from_hf({k: v for k, v in LLAMA.items() if k != "rope_theta"}, FAMILIES)
    assert missing.rope_theta == 1e4
    assert smollm3(rope_theta=..., tie_word_embeddings=...).rope_theta == 2e6
    assert smollm3(tie_word_embeddings=...).tie_embeddings


@pytest.mark.parametrize("found", [5, [], [1] * 4, [1, 1, 1, 2, 1], [1, 1, 1, "0", 1], [[1]] * 5])
def test_lists_of_layers_with_rope_are_checked(found):
    expected = "expected 5 numbers, one for each layer: 1 if it has rope, 0 if not"
    with pytest.raises(lowbitq.FormatError, match=f"no_rope_layers is .*, {expected}"):
        smollm3(no_rope_layers=found)


def test_layers_without_end_are_refused():
    with pytest.raises(lowbitq.FormatError, match="there are 2147483647 layers, expected at most"):
        from_hf(model_type="smollm3", num_hidden_layers=2**31 - 1)
    with pytest.raises(ValueError, match="rope_layers has 2 entries, expected 5, one for each"):
        dataclasses.replace(smollm3(), rope_layers=(True, False))


@pytest.mark.parametrize(
    ("name", "reason"), [("ministral3", "queries grow with their position"), ("mistral3", "images")]
)
def test_relatives_of_mistral_are_refused_with_a_reason(name, reason):
    with pytest.raises(ValueError, match=f"model_type is '{name}', expected one of .*: .*{reason}"):
        from_hf(model_type=name)


def test_all_that_differs_is_in_one_error():
    with pytest.raises(ValueError, match="the model is not supported") as caught:
        from_hf(
            model_type="gemma2",
            hidden_act="gelu",
            num_experts=8,
            attn_logit_softcapping=50.0,
            use_rope=False,
            position_embedding_type="alibi",
            rope_scaling={"rope_type": "dynamic", "factor": 2.0},
            layer_types=["full_attention", "chunked_attention"],
            hidden_size="not even read",
        )
    assert not isinstance(caught.value, lowbitq.FormatError)
    for part in [
        "model_type is 'gemma2', expected one of (llama, mistral, ministral, smollm3, qwen2, ",
        "hidden_act is 'gelu'",
        "num_experts is 8",
        "attn_logit_softcapping is 50.0",
        "use_rope is False",
        "position_embedding_type is 'alibi'",
        "rope_scaling.rope_type is 'dynamic', expected one of (default, linear, llama3, yarn, ",
        "layer_types has chunked_attention",
    ]:
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="the model is not supported") as caught:
        from_gguf(
            expert_count=4, rope__scaling__type="longrope", rope__dimension_count=4, logit_scale=2.0
        )
    for part in [
        "llama.expert_count is 4",
        "llama.rope.scaling.type is 'longrope', expected none, linear or yarn",
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
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000000.*, expected a positive number"),
        ({"rope_theta": True}, "rope_theta is True, expected a positive number"),
        ({"head_dim": 1 << 20}, "head_dim is 1048576, expected at most 65536"),
        ({"eos_token_id": [-5]}, r"eos_token_id is \[-5\], expected token numbers"),
        ({"bos_token_id": 10**30}, "bos_token_id is 1000.*, expected token numbers"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"layer_types": 5}, "layer_types is 5, expected a list of names, one for each layer"),
        ({"layer_types": [["full_attention"]]}, "expected a list of names, one for each layer"),
        ({"layer_types": ["full_attention"]}, "expected 2 names, one for each layer"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "expected only full_attention without a sliding window",
        ),
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
        ({"rope_factors": np.full(4, np.inf, np.float32)}, "positive numbers"),
    ],
)
def test_damaged_metadata_is_named(change, message):
    with pytest.raises(lowbitq.FormatError, match=message):
        from_gguf(**change)


def test_heads_that_differ_between_blocks_are_not_supported():
    with pytest.raises(ValueError, match="head_count_kv differs between blocks"):
        from_gguf(attention__head_count_kv=np.array([2, 3]))


YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (YARN | {"beta_fast": "x"}, "rope_scaling.beta_fast is 'x', expected a positive number"),
        (YARN | {"beta_fast": -1}, "rope_scaling.beta_fast is -1"),
        (YARN | {"beta_fast": 1e-320}, "cannot convert float infinity"),
        (YARN | {"mscale": "x", "mscale_all_dim": 1}, "rope_scaling.mscale is 'x'"),
        (YARN | {"attention_factor": 0}, "rope_scaling.attention_factor is 0"),
        (YARN | {"attention_factor": 1e9}, "factor of sine and cosine is 1000000000.0"),
        (YARN | {"truncate": "no"}, "rope_scaling.truncate is 'no', expected true or false"),
        (YARN | {"factor": 1e-308}, r"frequencies reach 5.0\d*e\+306"),
        (YARN | {"rope_theta": 1.0}, "division by zero"),
        (
            YARN | {"beta_fast": 1.0, "beta_slow": 1000.0},
            "the ramp of YaRN runs from pair 1 down to -1",
        ),
        (LONGROPE | {"short_factor": ["a"] * 4}, r"short_factor\[0\] is 'a'"),
        (LONGROPE | {"long_factor": 4}, "long_factor is 4, expected a list of positive numbers"),
        (LONGROPE | {"short_factor": [1], "long_factor": [1]}, "expected 4 factors"),
        (LONGROPE | {"short_factor": [], "long_factor": []}, "expected 4 factors"),
        (LONGROPE | {"original_max_position_embeddings": 1}, "is 1, expected at least 2"),
        ({"type": "linear", "factor": 1e-320}, "frequencies reach inf"),
        ({"type": "linear", "factor": math.nan}, "rope_scaling.factor is nan"),
    ],
)
def test_senseless_rope_scaling_is_refused_on_reading(scaling, message):
    with pytest.raises(lowbitq.FormatError, match=f"^config.json: .*{message}"):
        from_hf(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0"),
        ({"rotary_dim": 4}, "rotary_dim is 4"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]"),
        ({"no_rope_layer_interval": 4}, "no_rope_layer_interval is 4"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"attention_out_bias": True}, "attention_out_bias is True"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192"),
        ({"attn_temperature_tuning": 4}, "attn_temperature_tuning is 4"),
        ({"is_causal": False}, "is_causal is False"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern is 6"),
        ({"num_experts": True}, "num_experts is True"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": YARN | {"attn_factor": 2.0}}, "rope_scaling.attn_factor is 2.0"),
        ({"rope_scaling": YARN | {"low_freq_factor": 2.0}}, "rope_scaling.low_freq_factor is 2.0"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "rope_scaling.type is 'linear'"),
        ({"rope_scaling": LONGROPE | {"long_mscale": 1.2}}, "rope_scaling.long_mscale is 1.2"),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            r"rope_scaling.mrope_section is \[1, 1, 2\]",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"rope_parameters.full_attention is \{'rope_type': 'default'\}",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": ..., "rope_scaling": YARN},
            "rope_parameters.rope_theta is 500000.0, which contradicts rope_scaling",
        ),
    ],
)
def test_keys_that_are_not_understood_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=f"^config.json: the model is not supported: {named}"):
        from_hf(**change)


def test_rope_scaling_overrides_plain_rope_parameters():
    yarn = YARN | {"original_max_position_embeddings": 64}
    plain = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    expected = from_hf(rope_scaling=yarn)
    for parameters in (plain, yarn, yarn | plain | {"rope_type": "yarn"}, {}, None):
        assert from_hf(rope_scaling=yarn, rope_parameters=parameters) == expected
    slow = from_hf(rope_scaling=yarn | {"rope_theta": 5e5}, rope_parameters=plain)
    assert slow == dataclasses.replace(expected, rope_theta=5e5)


def test_keys_of_published_models_are_no_obstacle():
    """What files of LLaMA, Mistral, Qwen, SmolLM2 and their descendants have besides."""
    plain = from_hf()
    assert plain == from_hf(
        _attn_implementation_autoset=True,
        architectures=["LlamaForCausalLM"],
        attention_dropout=0.1,
        dtype="bfloat16",
        initializer_range=0.02,
        is_llama_config=True,
        layer_norm_eps=1e-5,
        layer_types=["full_attention", "full_attention"],
        max_window_layers=28,
        mlp_bias=False,
        pad_token_id=-1,
        partial_rotary_factor=1.0,
        pretraining_tp=1,
        quantization={"bits": 4},
        rope_interleaved=False,
        rope_parameters=None,
        rope_scaling=None,
        sliding_window=None,
        tokenizer_class="LlamaTokenizer",
        torch_dtype="float16",
        transformers_version="4.46.1",
        use_cache=True,
        use_mrope=False,
        use_sliding_window=False,
    )
    scaled = from_hf(rope_scaling=YARN)
    assert scaled == from_hf(rope_scaling=YARN | {"finetuned": True, "rope_theta": 1e4})
    metadata = from_gguf()
    assert metadata == from_gguf(
        attention__causal=True,
        attention__layer_norm_epsilon=1e-5,
        attention__sliding_window=0,
        expert_count=0,
        expert_used_count=0,
        pooling_type=3,
        rope__dimension_count=8,
        rope__scaling__finetuned=False,
        rope__scaling__type="none",
        tensor_data_layout="Meta AI original pth",
        vocab_size=96,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", [0, 1]),
        ("rope__scale_linear", [2.0]),
        ("attention__sliding_window", [4, 4]),
        ("rope__scaling__type", [1]),
        ("attention__scale", [0.5]),
        ("attention__head_count", [6, 6]),
        ("feed_forward_length", [88, 88]),
        ("context_length", [128]),
        ("rope__freq_base", [1e4]),
    ],
)
def test_arrays_in_the_place_of_numbers_are_named(key, value):
    with pytest.raises(ValueError, match=f"llama.{key.replace('__', '.')} "):
        from_gguf(**{key: np.array(value)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope__freq_base_swa", 1e4),
        ("rope__dimension_sections", np.array([4, 2, 2])),
        ("attention__temperature_length", 8192),
        ("attention__sliding_window_pattern", np.array([True, False])),
        ("rope__scaling__yarn_log_multiplier", 0.1),
        ("swin_norm", True),
    ],
)
def test_metadata_that_is_not_understood_is_refused_by_name(key, value):
    named = f"llama.{key.replace('__', '.')} is "
    with pytest.raises(ValueError, match=f"the model is not supported: {named}"):
        from_gguf(**{key: value})
    assert from_gguf(**{key: np.zeros_like(value) if isinstance(value, np.ndarray) else 0})


@pytest.mark.parametrize(("values", "expected"), json.loads((GOLDEN / "configs.json").read_text()))
def test_configurations_are_read_as_transformers_reads_them(values, expected):
    """Or refused. What transformers refuses may be read."""
    try:
        config = config_from_hf(values, FAMILIES)
    except ValueError:
        return
    if expected is None:
        return
    frequencies, factor = config.rope_frequencies()
    # Theirs are float32, rounded once more to 7 digits; a power loses some of them.
    assert np.allclose(frequencies, expected["frequencies"], rtol=2e-5, atol=0)
    assert abs(factor - expected["factor"]) < 1e-6
    found = {
        "head_dim": config.head_dim,
        "kv_heads": config.kv_heads,
        "norm_eps": config.norm_eps,
        "max_positions": config.max_positions,
        "tied": config.tie_embeddings,
        "window": config.sliding_window,
        "rope_layers": [*(config.rope_layers or [True] * config.layers)],
    }
    assert found == {key: expected[key] for key in found}
    assert config.attention_bias == ("q_proj" in expected["biases"])
    assert config.mlp_bias == ("up_proj" in expected["biases"])
    assert config_from_hf(config.to_hf(), FAMILIES) == config


def test_hardly_any_configuration_of_transformers_is_refused():
    """Those with dynamic or partial rotation, two kinds of scaling, or too few heads are."""
    configs = json.loads((GOLDEN / "configs.json").read_text())
    known = [values for values, expected in configs if expected is not None]
    refused = []
    for values in known:
        try:
            config_from_hf(values, FAMILIES)
        except ValueError as error:
            refused.append(str(error))
    reasons = (
        "'dynamic'|partial_rotary_factor is 0.5|factors that depend on length|"
        "contradicts rope_scaling|heads do not share|the ramp of YaRN runs from"
    )
    assert [reason for reason in refused if not re.search(reasons, reason)] == []
    assert len(refused) < 0.4 * len(known)


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


def test_the_ramp_of_yarn_may_be_a_step():
    yarn = YARN | {"original_max_position_embeddings": 8192, "truncate": False}
    scaled, _ = frequencies(**yarn, beta_fast=2.0, beta_slow=2.0)
    plain = frequencies()[0]
    turns = 8192 * plain / (2 * math.pi)
    assert np.array_equal(scaled, np.where(turns > 2, plain, plain / 4))


def test_biases_in_the_mlp_of_a_gguf_file_are_no_key_of_other_families():
    """Else the configuration of the saved model could not be read back."""
    for family in (FAMILIES["llama"], FAMILIES["qwen2"]):
        keys = {k.replace("llama", family.architecture): v for k, v in GGUF.items()}
        config = config_from_gguf(
            keys | {"general.architecture": family.architecture},
            {family.architecture: family},
            vocab_size=96,
            tie_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        )
        assert config.mlp_bias == family.mlp_bias
        assert config_from_hf(config.to_hf(), FAMILIES) == config


def test_factors_of_a_gguf_file_divide_the_frequencies():
    factors = np.array([1, 2, 4, 8], np.float32)
    config = from_gguf(rope_factors=factors)
    assert np.allclose(from_gguf().rope_frequencies()[0] / config.rope_frequencies()[0], factors)
    assert config_from_hf(config.to_hf(), FAMILIES) == config
