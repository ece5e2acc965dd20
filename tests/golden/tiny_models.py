"""Tiny random models: a recipe that the golden script and the tests follow alike.

Weights are not stored: both sides draw them from the same seeded generator and write the same
Hugging Face folder, with NumPy alone, or the same GGUF file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

TOKENS, VOCAB = 40, 96

_BASE = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# SmolLM3's default is beyond the vocabulary. The input lacks this token, whose row of the embedding
# torch would leave out of gradients.
_PADDING = 91

# Name -> what differs from _BASE, dtype of the weights, number of files.
MODELS = {
    "llama": ({"model_type": "llama", "tie_word_embeddings": True}, "F32", 1),
    "llama3": ({"model_type": "llama", "rope_scaling": _LLAMA3}, "F32", 3),
    "llama_linear": (
        {
            "model_type": "llama",
            "rope_scaling": {"type": "linear", "factor": 2.5},
            "attention_bias": True,
            "mlp_bias": True,
        },
        "BF16",
        1,
    ),
    "mistral": ({"model_type": "mistral", "sliding_window": 64, "head_dim": 16}, "F32", 1),
    "ministral": (
        {
            "model_type": "ministral",
            "sliding_window": 64,
            "layer_types": ["full_attention", "sliding_attention"],
            "head_dim": 16,
        },
        "F32",
        1,
    ),
    "smollm3": (
        {
            "model_type": "smollm3",
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "pad_token_id": _PADDING,
        },
        "F32",
        1,
    ),
    "smollm3_listed": (
        {
            "model_type": "smollm3",
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "pad_token_id": _PADDING,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "F32",
        1,
    ),
    "qwen2": ({"model_type": "qwen2", "tie_word_embeddings": True}, "F32", 1),
    "qwen2_yarn": (
        {
            "model_type": "qwen2",
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "F16",
        1,
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "head_dim": 16,
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
        "F32",
        1,
    ),
    "qwen3_bias": (
        {
            "model_type": "qwen3",
            "head_dim": 8,
            "num_key_value_heads": 6,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        "F32",
        2,
    ),
}

# Those that llama.cpp runs: it leaves out rope in every fourth layer of SmolLM3.
IN_GGUF = [name for name in MODELS if name != "smollm3_listed"]


def config_of(name):
    """Contents of config.json."""
    merged = _BASE | MODELS[name][0]
    return {key: value for key, value in merged.items() if value is not None}


def tokens_of(name):
    """The input of the golden logits."""
    return np.random.default_rng(len(name)).integers(0, VOCAB, TOKENS)


def weights_of(name):
    """Hugging Face names and float32 arrays, rounded to what the file's dtype can hold."""
    c, dtype = config_of(name), MODELS[name][1]
    rng = np.random.default_rng([ord(letter) for letter in name])
    hidden, ffn, kind = c["hidden_size"], c["intermediate_size"], c["model_type"]
    head = c.get("head_dim", hidden // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    arrays = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, hidden))}

    def linear(full, rows, cols, bias):
        arrays[f"{full}.weight"] = 1.5 / math.sqrt(cols) * rng.standard_normal((rows, cols))
        if bias:
            arrays[f"{full}.bias"] = 0.5 * rng.standard_normal(rows)

    def norm(full, size):
        arrays[f"{full}.weight"] = 1 + 0.2 * rng.standard_normal(size)

    every = c.get("attention_bias", False)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        norm(f"{at}.input_layernorm", hidden)
        linear(f"{at}.self_attn.q_proj", q, hidden, every or kind == "qwen2")
        linear(f"{at}.self_attn.k_proj", kv, hidden, every or kind == "qwen2")
        linear(f"{at}.self_attn.v_proj", kv, hidden, every or kind == "qwen2")
        linear(f"{at}.self_attn.o_proj", hidden, q, every)
        if kind == "qwen3":
            norm(f"{at}.self_attn.q_norm", head)
            norm(f"{at}.self_attn.k_norm", head)
        norm(f"{at}.post_attention_layernorm", hidden)
        linear(f"{at}.mlp.gate_proj", ffn, hidden, c.get("mlp_bias", False))
        linear(f"{at}.mlp.up_proj", ffn, hidden, c.get("mlp_bias", False))
        linear(f"{at}.mlp.down_proj", hidden, ffn, c.get("mlp_bias", False))
    norm("model.norm", hidden)
    if not c["tie_word_embeddings"]:
        linear("lm_head", VOCAB, hidden, False)
    return {name: _stored(array.astype(np.float32), dtype)[1] for name, array in arrays.items()}


def _stored(array, dtype):
    """The bytes of a file, and the numbers that they stand for."""
    if dtype == "F16":
        half = array.astype("<f2")
        return half.tobytes(), half.astype(np.float32)
    if dtype == "BF16":  # to nearest, halves up
        bits = (array.view(np.uint32) + 0x8000) >> 16
        return bits.astype("<u2").tobytes(), (bits << 16).view(np.float32)
    return array.astype("<f4").tobytes(), array


def write_safetensors(path, arrays, dtype="F32"):
    """Write one file."""
    header, data = {}, b""
    for name, array in arrays.items():
        raw = _stored(array, dtype)[0]
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(name, folder):
    """Write config.json and the weights, in as many files as the recipe says."""
    _, dtype, count = MODELS[name]
    folder = Path(folder)
    weights = weights_of(name)
    (folder / "config.json").write_text(json.dumps(config_of(name)))
    if count == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    names, weight_map = list(weights), {}
    for i in range(count):
        part = {n: weights[n] for n in names[i::count]}
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        write_safetensors(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


_GGUF_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_tensors(name, architecture):
    """The weights as llama.cpp's converter names and orders them."""
    c, tensors = config_of(name), {}
    heads = {"attn_q": c["num_attention_heads"], "attn_k": c["num_key_value_heads"]}
    for source, array in weights_of(name).items():
        target = _GGUF_OUTER.get(source)
        if target is None:
            _, _, block, rest = source.split(".", 3)
            full, _, part = rest.rpartition(".")
            layer = _GGUF_LAYERS[full]
            target = f"blk.{block}.{layer}.{part}"
            if (
                architecture in ("llama", "smollm3") and layer in heads
            ):  # rows 2 i and 2 i + 1 rotate together
                halves = array.reshape(heads[layer], 2, -1, *array.shape[1:])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        tensors[target] = np.ascontiguousarray(array)
    return tensors


def _gguf_keys(name):
    """The configuration in llama.cpp's words, without the architecture's name."""
    c = config_of(name)
    head = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    scaling = c.get("rope_scaling", {})
    keys = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "block_count": c["num_hidden_layers"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": c.get("rope_parameters", c)["rope_theta"],
    }
    if "factor" in scaling and scaling.get("rope_type") != "llama3":
        keys["rope.scaling.type"] = scaling.get("rope_type", scaling.get("type"))
        keys["rope.scaling.factor"] = scaling["factor"]
        positions = scaling.get("original_max_position_embeddings", 256)
        keys["rope.scaling.original_context_length"] = positions
    return keys


def write_gguf(name, path, keys=None, tensors=None, **more):
    """Write a GGUF file as llama.cpp's converter does.

    `keys` stand behind the architecture's name and go before the recipe's; `more` are whole ones.
    """
    import gguf

    c = config_of(name)
    architecture = {"mistral": "llama", "ministral": "llama"}.get(c["model_type"], c["model_type"])
    arrays = _gguf_tensors(name, architecture) | (tensors or {})
    scaling = c.get("rope_scaling", {})
    if scaling.get("rope_type") == "llama3":
        head = c["hidden_size"] // c["num_attention_heads"]
        plain = c["rope_theta"] ** (-np.arange(0, head, 2) / head)
        turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        arrays["rope_freqs.weight"] = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    own = {f"{architecture}.{k}": v for k, v in (_gguf_keys(name) | (keys or {})).items()}
    add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (own | more).items():
        getattr(writer, add[type(value)])(key, value)
    for target, array in arrays.items():
        writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
