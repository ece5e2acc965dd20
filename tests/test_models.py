"""Loading and running models: logits of transformers, caches, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden import make_ggml_rope, tiny_models

import lowbitq
from lowbitq import _core
from lowbitq.linears import Linear
from lowbitq.models import load

GOLDEN = Path(__file__).parent / "golden"
NAMES = list(tiny_models.MODELS)
LIMIT = 1e-4  # of the largest logit of a row; what the library promises


def tiny(name, folder):
    return load(tiny_models.write_folder(name, folder))


def largest_difference(found, expected):
    return (abs(found - expected).max(-1) / abs(expected).max(-1)).max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, tmp_path):
    expected = np.load(GOLDEN / "logits_tiny.npz")[name]
    model = tiny(name, tmp_path)
    assert largest_difference(model.logits(tiny_models.tokens_of(name)), expected) < LIMIT


@pytest.mark.model
def test_smollm2_logits_are_those_of_transformers(smollm2):
    golden = np.load(GOLDEN / "logits_smollm2.npz")
    model = load(smollm2)
    logits = model.logits(golden["tokens"])
    found = np.take_along_axis(logits, golden["top"].astype(int), 1)
    assert largest_difference(found, golden["logits"]) < LIMIT
    log_sum = np.log(np.exp(logits.astype(float)).sum(1))
    assert (abs(log_sum - golden["log_sum"]) < LIMIT * abs(golden["logits"]).max(1)).all()
    assert repr(model) == (
        "Model(llama: 30 layers, hidden 576, ffn 1536, heads 9/3, 134.5M parameters)"
    )


@pytest.mark.parametrize("bias", [0, 150])
def test_smollm2_hardly_notices_a_cache_of_8_bits(smollm2, bias):
    """0.0002 nats on average over a text, with and without biases of keys, as Qwen2 has them, in
    the channels that turn most slowly; ten times as much would show."""
    model = load(smollm2)
    for block in model.blocks:
        biases = np.zeros((3, 64), np.float32)
        biases[:, [30, 31, 63]] = bias, -bias, bias / 2
        block.linears["k_proj"] = Linear(block.linears["k_proj"].weight, biases.reshape(-1))
    tokens = model.tokenizer.encode(
        "The capital of France is Paris, and that of Italy is Rome. " * 4
    )
    p, q = np.empty((2, 10, model.config.vocab_size), np.float32)
    for logits, bits in ((p, 32), (q, 8)):
        cache = model.new_cache(tokens.size, bits=bits)
        model.step(tokens[:-10], cache)
        logits[:] = [model.step(tokens[[i]], cache) for i in range(-10, 0)]
    kl, same = np.empty(10), np.empty(10, np.uint8)
    _core.kl_divergence(p, q, kl, same)
    assert 0 < kl.mean() < 0.002
    assert same.mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_steps_give_the_logits_of_the_whole(name, tmp_path):
    model = tiny(name, tmp_path)
    tokens = tiny_models.tokens_of(name)
    whole = model.logits(tokens)
    cache = model.new_cache(len(tokens))
    steps = [model.step(tokens[:7], cache)]
    steps += [model.step(tokens[i : i + 1], cache) for i in range(7, len(tokens))]
    assert cache.length == len(tokens)
    assert largest_difference(np.array(steps), whole[6:]) < LIMIT
    with pytest.raises(ValueError, match="holds 40 of at most 40 tokens, no room for 1"):
        model.step([0], cache)
    cache.length = 20
    assert largest_difference(model.step(tokens[20:], cache), whole[-1]) < LIMIT


def test_a_cache_of_8_bits_is_small_and_close(tmp_path):
    model = tiny("llama3", tmp_path)
    tokens = np.random.default_rng(1).integers(0, tiny_models.VOCAB, 200)
    large, small = model.new_cache(200), model.new_cache(200, bits=8)
    assert small.nbytes < 0.4 * large.nbytes  # heads of 16: the scales are a fifth of it
    assert small.bits == 8
    exact = model.step(tokens, large)
    assert LIMIT < largest_difference(model.step(tokens, small), exact) < 1 / 127
    with pytest.raises(ValueError, match="bits is 16, expected 8 or 32"):
        model.new_cache(200, bits=16)


def test_a_long_prompt_is_cut_into_pieces(tmp_path):
    model = tiny("llama3", tmp_path)
    tokens = np.random.default_rng(0).integers(0, tiny_models.VOCAB, 1100)
    last = model.step(tokens, model.new_cache(1100))
    assert largest_difference(last, model.logits(tokens)[-1]) < LIMIT


@pytest.mark.parametrize("name", ["llama_linear", "qwen3"])
def test_blocks_one_by_one_give_the_hidden_state(name, tmp_path):
    model = tiny(name, tmp_path)
    tokens = tiny_models.tokens_of(name)
    x = model.embed(tokens)
    for i, block in enumerate(model.blocks):
        before, taps = x.copy(), {}
        model.block_forward(i, x, taps)
        tapped = before + block.linears["o_proj"].forward(taps["o"])
        tapped += block.linears["down_proj"].forward(taps["down"])
        assert largest_difference(tapped, x) < LIMIT
        gate, up = (block.linears[n].forward(taps["mlp"]) for n in ("gate_proj", "up_proj"))
        assert largest_difference(gate / (1 + np.exp(-gate)) * up, taps["down"]) < LIMIT
        norm = np.sqrt((before**2).mean(1, keepdims=True) + model.config.norm_eps)
        assert largest_difference(before / norm * block.attention_norm, taps["qkv"]) < LIMIT
    hidden = model.finish(x)
    assert largest_difference(hidden, model.hidden(tokens)) < LIMIT
    logits = model.head_logits(hidden)
    assert largest_difference(logits, model.logits(tokens)) < LIMIT
    out = np.full_like(logits, np.nan)
    assert model.head_logits(hidden, out) is out
    assert np.array_equal(out, logits)


def test_tapping_changes_nothing(tmp_path):
    model = tiny("qwen2", tmp_path)
    x = model.embed(tiny_models.tokens_of("qwen2"))
    y = x.copy()
    model.block_forward(0, x)
    model.block_forward(0, y, {})
    assert (x == y).all()


def test_a_replaced_layer_runs_at_once(tmp_path):
    model = tiny("llama", tmp_path)
    tokens = tiny_models.tokens_of("llama")
    before, copy = model.logits(tokens), model.copy()
    name, linear = next(iter(copy.linears()))
    assert name == "model.layers.0.self_attn.q_proj"
    copy.replace_linear(name, Linear(np.zeros_like(linear.weight)))
    assert largest_difference(copy.logits(tokens), before) > LIMIT
    assert (model.logits(tokens) == before).all(), "the original changed with its copy"
    copy.replace_linear(name, linear)
    assert (copy.logits(tokens) == before).all()
    with pytest.raises(
        ValueError, match=r"linear has shape \(1, 2\), but model.layers.0.* \(48, 48\)"
    ):
        copy.replace_linear(name, Linear(np.zeros((1, 2), np.float32)))
    with pytest.raises(KeyError, match="no linear layer 'lm_head'"):
        copy.replace_linear("lm_head", linear)


@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_embedding_and_head_are_replaced_like_any_layer(name, tmp_path):
    model = tiny(name, tmp_path)
    tied = name == "llama"
    tokens, (vocab, hidden) = tiny_models.tokens_of(name), model.embedding.shape
    names = [name for name, _ in model.matrices()]
    assert names[1:-1] == [name for name, _ in model.linears()][: -1 if tied else None]
    assert (names[0], names[-1] == "lm_head") == ("model.embed_tokens", not tied)
    assert model.parameters == sum(a.size for a in tiny_models.weights_of(name).values())
    before = model.logits(tokens)
    model.replace_linear("model.embed_tokens", Linear(np.zeros((vocab, hidden), np.float32)))
    assert (model.embed(tokens) == 0).all()
    if not tied:
        model.replace_linear("lm_head", Linear(-model.head.weight))
    assert largest_difference(model.logits(tokens), before) > LIMIT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_a_rotated_model_has_the_same_logits(name, kind, tmp_path):
    model = tiny(name, tmp_path)
    tokens = tiny_models.tokens_of(name)
    rotated = lowbitq.rotate(model, kind, seed=1)
    assert largest_difference(rotated.logits(tokens), model.logits(tokens)) < LIMIT


def test_generation_is_greedy_by_default(tmp_path):
    model = tiny("mistral", tmp_path)
    tokens = list(tiny_models.tokens_of("mistral")[:5])
    made = model.generate(tokens, max_new_tokens=6)
    for token in made:
        assert token == model.logits(tokens)[-1].argmax()
        tokens.append(token)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"tokens has shape \(0,\)"),
        ([[1, 2]], r"tokens has shape \(1, 2\)"),
        ([1, 96], "tokens has 96, expected 0 to 95"),
        ([-1], "tokens has -1, expected 0 to 95"),
        ([1] * 65, "65 tokens exceed the sliding window of 64"),
    ],
)
def test_bad_tokens_are_refused(tokens, message, tmp_path):
    model = tiny("mistral", tmp_path)
    with pytest.raises(ValueError, match=message):
        model.logits(tokens)
    with pytest.raises(TypeError if not tokens else ValueError, match="tokens"):
        model.step(tokens if tokens else np.array([1.5]), model.new_cache(100))


def test_bad_arguments_are_refused(tmp_path):
    model = tiny("qwen2", tmp_path)
    with pytest.raises(TypeError, match="tokens has dtype float64, expected integers"):
        model.logits([0.5])
    with pytest.raises(ValueError, match="capacity is 0"):
        model.new_cache(0)
    with pytest.raises(ValueError, match="block is 2, expected 0 to 1"):
        model.block_forward(2, np.zeros((1, 48), np.float32))
    with pytest.raises(ValueError, match="axis 1 of x has size 47, expected hidden = 48"):
        model.block_forward(0, np.zeros((1, 47), np.float32))
    with pytest.raises(ValueError, match="there are no tokens"):
        model.block_forward(0, np.zeros((0, 48), np.float32))
    model.embedding = model.embedding.weight
    with pytest.raises(TypeError, match="embedding is a ndarray, expected a Linear"):
        model.logits([0])


def damaged(tmp_path, change):
    """Write the tiny llama with other weights."""
    weights = tiny_models.weights_of("llama")
    change(weights)
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.config_of("llama")))
    tiny_models.write_safetensors(tmp_path / "model.safetensors", weights)
    return tmp_path


def test_a_missing_tensor_is_named(tmp_path):
    folder = damaged(tmp_path, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(lowbitq.FormatError, match=r"layers\.1\.mlp\.up_proj\.weight' is missing"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    folder = damaged(tmp_path, lambda w: w.update({name: w[name][:8]}))
    with pytest.raises(lowbitq.FormatError, match=r"\(8, 48\), expected \(16, 48\)"):
        load(folder)


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path):
    name = "model.layers.0.self_attn.q_norm.weight"
    folder = damaged(tmp_path, lambda w: w.update({name: np.ones(8, np.float32)}))
    with pytest.raises(ValueError, match="not supported: 1 tensors have no place in a llama model"):
        load(folder)


def test_a_head_that_repeats_the_embedding_is_ignored(tmp_path):
    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    assert load(damaged(tmp_path, add)).head is None


def test_a_tied_head_that_differs_from_the_embedding_is_the_head(tmp_path):
    """As in transformers; saved again, it is no longer tied."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((tiny_models.VOCAB, 48), dtype=np.float32)

    def add(weights):
        weights["lm_head.weight"] = head

    model = load(damaged(tmp_path, add))
    assert np.array_equal(model.head.weight, head)
    assert not model.config.tie_embeddings
    tokens = tiny_models.tokens_of("llama")
    logits = model.logits(tokens)
    assert largest_difference(logits, model.hidden(tokens) @ head.T) < LIMIT
    small = lowbitq.compress(model, "int8g16", method="rtn", rotation="none", embedding=None)
    small.save(tmp_path / "small")
    assert np.array_equal(load(tmp_path / "small").logits(tokens), small.logits(tokens))


BIASED = [
    ("llama", False, False),
    ("llama", True, False),
    ("llama", False, True),
    ("llama", True, True),
    ("mistral", False, False),
    ("qwen2", False, False),
    ("qwen3", False, False),
    ("qwen3", True, False),
]


@pytest.mark.parametrize(("family", "attention", "mlp"), BIASED)
def test_biases_are_those_of_transformers(family, attention, mlp, tmp_path):
    """What the configuration denies is left out, what it promises must be there."""
    configs = json.loads((GOLDEN / "configs.json").read_text())
    expected = next(
        found["biases"]
        for values, found in configs
        if found is not None
        and values["model_type"] == family
        and values.get("attention_bias", False) == attention
        and values.get("mlp_bias", False) == mlp
    )
    config = tiny_models.config_of("qwen3_bias") | {"model_type": family}
    config |= {"attention_bias": attention, "mlp_bias": mlp, "tie_word_embeddings": True}
    weights = tiny_models.weights_of("qwen3_bias")
    for name, array in list(weights.items()):
        if name.endswith("_proj.weight"):
            weights[name.replace(".weight", ".bias")] = array[:, 0].copy()
        if family != "qwen3" and name.endswith(("q_norm.weight", "k_norm.weight")):
            del weights[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_models.write_safetensors(tmp_path / "model.safetensors", weights)
    for block in load(tmp_path).blocks:
        assert sorted(n for n, x in block.linears.items() if x.bias is not None) == expected
    if expected:
        folder = "mlp" if expected[-1] == "up_proj" else "self_attn"
        del weights[f"model.layers.1.{folder}.{expected[-1]}.bias"]
        tiny_models.write_safetensors(tmp_path / "model.safetensors", weights)
        with pytest.raises(lowbitq.FormatError, match="bias' is missing"):
            load(tmp_path)


def to_gguf(name, path):
    """Write a tiny model as llama.cpp's converter does."""
    return tiny_models.write_gguf(name, path)


@pytest.mark.parametrize("name", tiny_models.IN_GGUF)
def test_gguf_gives_the_same_logits(name, tmp_path):
    expected = np.load(GOLDEN / "logits_tiny.npz")[name]
    model = load(to_gguf(name, tmp_path / "tiny.gguf"))
    tokens = tiny_models.tokens_of(name)
    assert largest_difference(model.logits(tokens), expected) < LIMIT
    assert model.tokenizer is None


@pytest.mark.parametrize("name", make_ggml_rope.SETTINGS)
def test_rope_settings_of_gguf_give_the_logits_of_llama_cpp(name, tmp_path):
    """Or are refused, where llama.cpp ignores a key, or the decoder lacks what it asks for."""
    model_name, rows = make_ggml_rope.MODEL, make_ggml_rope.ROWS
    keys, tensors = make_ggml_rope.SETTINGS[name]
    path = tiny_models.write_gguf(model_name, tmp_path / "a.gguf", keys, tensors)
    refused = {
        "factors_yarn": "'yarn' together with rope_freqs.weight",
        "beta_fast": "yarn_beta_fast is 4.0",
        "ext_factor": "yarn_ext_factor is 0.5",
        "yarn_attn_factor": "yarn_attn_factor is 0.5",
        "log_multiplier": "yarn_log_multiplier is 0.1",
        "alpha": "rope.scaling.alpha is 2.0",
        "attention_scale": "attention.scale is 0.5",
        "clamp": "clamp_kqv is 0.1",
        "window": "sliding window of 8",
    }
    tokens = tiny_models.tokens_of(model_name)
    if name in refused:
        with pytest.raises(ValueError, match=refused[name]):
            load(path).logits(tokens)
        return
    expected = np.load(GOLDEN / "ggml_rope.npz")[name]
    assert largest_difference(load(path).logits(tokens)[-rows:], expected) < LIMIT
