"""Forged model files, each piece of which is well formed while what it says is wrong.

Random bytes (test_fuzz_checkpoints.py) rarely pass the first check of a reader. These files are
made by an author who knows the formats: keys that the intact file lacks, numbers that nearly fit,
values of another type, tensors that lie elsewhere.
"""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections import Counter

import gguf
import numpy as np
import pytest
from golden import tiny_models
from small_files import ARRAY, STRING, entry, gguf_file, key, safetensors_file, text

from lowbitq import FormatError
from lowbitq.checkpoints import read_gguf
from lowbitq.models import load

SECONDS = 2
SLACK_BYTES = 1 << 20  # beside four times the file: what Python and NumPy keep for themselves

NUMBERS = [0, 1, 2, 7, 31, 96, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62]
NUMBERS += [2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
FLOATS = [0.0, 0.5, 1.0, -1.0, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("nan")]
TEXTS = ["", "a", "0", "nan", "llama", "yarn", "../x", "a" * 3000, "\0", "é"]


class Raw(str):
    """JSON that Python does not write."""


JSON_VALUES = [*NUMBERS, *FLOATS, *TEXTS, -1, -(2**63), 0.1, None, True, False]
JSON_VALUES += [[], {}, [[]], [0], [-1], [None], ["a"], [1.5] * 4, [[1, [2]]], {"a": 1}, {"": None}]
JSON_VALUES += [Raw("1e999"), Raw("9" * 5000), Raw("-" + "9" * 400), Raw('"\\ud800"')]
JSON_VALUES += [Raw("[" * n + "]" * n) for n in (60, 200, 5000)]


def dumps(value) -> str:
    """Write JSON in which a Raw stands as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(k))}:{dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def try_all(seeds, forge, path, *, finite: bool) -> None:
    """Forge a file with each seed and load it; some must be accepted and some refused."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        size = forge(random.Random(seed))
        start = time.thread_time()  # other processes do not count
        tracemalloc.start()
        try:
            outcomes[outcome_of(path, finite)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak <= 4 * size + SLACK_BYTES, f"seed {seed}: {peak} bytes for a file of {size}"
        assert time.thread_time() - start < SECONDS, f"seed {seed}"
    assert outcomes["accepted"], outcomes
    assert outcomes["damaged"] > 0.1 * len(seeds), outcomes


def outcome_of(path, finite: bool) -> str:
    try:
        model = load(path)
    except ValueError as error:
        message = str(error)
        unsupported = "the model is not supported: " in message
        if len(message) > 10_000 or not (unsupported or isinstance(error, FormatError)):
            raise
        return "unsupported" if unsupported else "damaged"
    tokens = [0, model.config.vocab_size - 1][: model.config.sliding_window]
    logits = model.logits(tokens)
    assert not finite or np.isfinite(logits).all()
    if model.tokenizer is not None:
        model.tokenizer.decode(model.tokenizer.encode("t1 t2 9"))
    return "accepted"


def seeds(quick: int, slow: int):
    """The default suite takes the first seeds, the slow one those that follow."""
    return [
        pytest.param(range(quick), id="quick"),
        pytest.param(range(quick, quick + slow), id="slow", marks=pytest.mark.slow),
    ]


# --- GGUF ------------------------------------------------------------------------------------

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q"}
FORMATS |= {12: "d"}
EXTRA = [
    "general.alignment",
    "general.name",
    "split.count",
    "llama.expert_count",
    "llama.attn_logit_softcapping",
    "llama.logit_scale",
    "llama.vocab_size",
    "llama.attention.causal",
    "llama.attention.scale",
    "llama.attention.sliding_window",
    "llama.attention.value_length",
    "llama.rope.dimension_count",
    "llama.rope.scale_linear",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.yarn_beta_fast",
    "tokenizer.chat_template",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
]
TENSOR_NAMES = ["", "a\0b", "x" * 200, "output.weight", "rope_freqs.weight", "blk.0.attn_q.bias"]


def number(rng, kind: int) -> bytes:
    if kind in (6, 12):
        value = rng.choice(FLOATS)
        return struct.pack("<" + FORMATS[kind], value if kind == 12 or abs(value) < 1e38 else 3e38)
    size = struct.calcsize(FORMATS[kind])
    return (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")


def value(rng) -> tuple[int, bytes]:
    """Return type and bytes of a value, which may claim to be longer than it is."""
    kind = rng.choice([*FORMATS, STRING, ARRAY, ARRAY, 13, 255, 2**31])
    if kind == STRING:
        raw = rng.choice([*(t.encode() for t in TEXTS), b"\xff\xfe"])
        return kind, struct.pack("<Q", claim(rng, len(raw))) + raw
    if kind != ARRAY:
        return kind, number(rng, kind) if kind in FORMATS else rng.randbytes(8)
    of, count = rng.choice([*FORMATS, STRING, STRING, ARRAY, 13]), rng.choice([0, 1, 2, 96])
    if of == STRING:
        body = b"".join(text(rng.choice(TEXTS)) for _ in range(count))
    else:
        body = b"".join(number(rng, of) for _ in range(count)) if of in FORMATS else bytes(count)
    return kind, struct.pack("<IQ", of, claim(rng, count)) + body


def claim(rng, count: int) -> int:
    """Return the count, or now and then another one."""
    return count if rng.random() < 0.8 else rng.choice(NUMBERS)


def stored(value) -> tuple[int, bytes]:
    """Return type and bytes of a value of an intact file."""
    match value:
        case bool():
            return 7, struct.pack("<B", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return STRING, text(value)
        case [str(), *_]:
            return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(text, value))
    return ARRAY, struct.pack("<IQ", 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def vocabulary() -> dict:
    words = ["t", "1", "2", "9", "t1", "t2", *(f"v{i}" for i in range(tiny_models.VOCAB))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<end>", "<b>", *words[: tiny_models.VOCAB - 2]],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (tiny_models.VOCAB - 2),
        "tokenizer.ggml.merges": ["t 1", "t 2"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


class Author:
    """Writes one GGUF file after another, each with one to three lies."""

    def __init__(self, intact) -> None:
        file = read_gguf(intact)
        self.keys = {name: stored(v) for name, v in (file.metadata | vocabulary()).items()}
        self.tensors = [
            (t.name, t.shape, 0, file.load(t.name).tobytes()) for t in file.tensors.values()
        ]

    def forge(self, rng) -> bytes:
        self.rng, self.alignment, self.cut = rng, 32, 0
        self.written = [(name, *v) for name, v in self.keys.items()]
        self.parts, self.lies = list(self.tensors), {}
        self.counts: dict[str, int] = {}
        lies = [self.change_key, self.add_key, self.add_key, self.rename, self.miscount]
        lies += [self.lie_about_tensor] * 4 + [self.swap_tensors, self.align, self.shorten]
        for lie in rng.sample(lies, rng.choice([1, 1, 2, 3])):
            lie()
        entries, data = self.entries()
        keys = [key(*k) for k in self.written]
        raw = gguf_file(keys, entries, data, alignment=self.alignment, **self.counts)
        return raw[: len(raw) - self.cut]

    def change_key(self) -> None:
        at = self.rng.randrange(len(self.written))
        self.written[at] = (self.written[at][0], *value(self.rng))

    def add_key(self) -> None:
        self.written.append((self.rng.choice(EXTRA), *value(self.rng)))

    def rename(self) -> None:
        at = self.rng.randrange(len(self.written))
        name = self.rng.choice(["", "\0", "x" * 500, *EXTRA, self.written[0][0]])
        self.written[at] = (name, *self.written[at][1:])

    def miscount(self) -> None:
        name = self.rng.choice(["key_count", "tensor_count"])
        self.counts[name] = self.rng.choice(NUMBERS)

    def lie_about_tensor(self) -> None:
        what = self.rng.choice(["shape", "kind", "offset"])
        self.lies[self.rng.randrange(len(self.parts))] = what

    def swap_tensors(self) -> None:
        at = self.rng.randrange(len(self.parts))
        match self.rng.choice(["drop", "repeat", "rename"]):
            case "drop":
                del self.parts[at]
            case "repeat":
                self.parts.append(self.parts[at])
            case "rename":
                self.parts[at] = (self.rng.choice(TENSOR_NAMES), *self.parts[at][1:])

    def align(self) -> None:
        alignment = self.rng.choice([0, 1, 3, 8, 64, 4096, 2**31])
        self.written.append(("general.alignment", 4, struct.pack("<I", alignment)))
        self.alignment = alignment if alignment in (8, 64, 4096) else 32

    def shorten(self) -> None:
        self.cut = self.rng.choice([1, 31, 32, 100, 4096])

    def entries(self) -> tuple[list[bytes], bytes]:
        entries, data = [], b""
        for at, (name, shape, kind, raw) in enumerate(self.parts):
            axes, offset = list(shape[::-1]), len(data)
            match self.lies.get(at):
                case "shape":
                    axes[self.rng.randrange(len(axes))] = self.rng.choice(NUMBERS)
                    axes = self.rng.choice([axes, axes[::-1], [1, *axes], [2**32] * 4])
                case "kind":
                    kind = self.rng.choice([*(k.value for k in gguf.GGML_QUANT_SIZES), 4, 99])
                case "offset":
                    near = self.rng.choice([0, offset + self.alignment, offset - self.alignment])
                    offset = self.rng.choice([near, *NUMBERS]) % 2**64
            entries.append(entry(name, axes, kind, offset))
            data += raw + bytes(-len(raw) % self.alignment)
        return entries, data


@pytest.mark.parametrize("chosen", seeds(600, 50_000))
def test_gguf_files_of_a_forger(tmp_path, chosen):
    names = ("llama", "llama3", "qwen2", "qwen3", "smollm3")
    authors = [Author(tiny_models.write_gguf(name, tmp_path / name)) for name in names]
    path = tmp_path / "a.gguf"

    def forge(rng):
        return path.write_bytes(rng.choice(authors).forge(rng))

    try_all(chosen, forge, path, finite=False)


# --- Hugging Face folders --------------------------------------------------------------------

ROPE_KEYS = ["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"]
ROPE_KEYS += ["truncate", "original_max_position_embeddings", "low_freq_factor", "rope_theta"]
ROPE_KEYS += ["high_freq_factor", "short_factor", "long_factor", "type", "partial_rotary_factor"]
CONFIG_KEYS = {
    "attention_bias": True,
    "bos_token_id": [1],
    "eos_token_id": [2, 3],
    "head_dim": 8,
    "hidden_act": "silu",
    "layer_types": ["full_attention", "sliding_attention"],
    "logits_scaling": 1,
    "max_window_layers": 0,
    "mlp_bias": False,
    "model_type": "qwen3",
    "no_rope_layer_interval": 1,
    "no_rope_layers": [0, 1, 1],
    "num_experts": 0,
    "original_max_position_embeddings": 8,
    "partial_rotary_factor": 1,
    "quantization_config": {"quant_method": "gptq"},
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "llama3"},
    "rope_theta": 1.0,
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
}


def forge_config(rng, config: dict) -> dict:
    """Return a configuration with one to three lies."""
    config = json.loads(json.dumps(config))
    for _ in range(rng.choice([1, 1, 2, 3])):
        hostile = rng.choice(JSON_VALUES)
        match rng.choice(["change", "add", "add", "rope", "rope", "drop"]):
            case "change":
                config[rng.choice([*config])] = hostile
            case "add":
                name = rng.choice([*CONFIG_KEYS])
                config[name] = CONFIG_KEYS[name] if rng.random() < 0.3 else hostile
            case "rope":
                rope = config.setdefault("rope_scaling", {"factor": 2.0})
                if isinstance(rope, dict):
                    kinds = ["yarn", "llama3", "longrope", "linear", "default"]
                    rope["rope_type"] = rng.choice(kinds)
                    rope[rng.choice(ROPE_KEYS)] = rng.choice([hostile, 2.0, [1.5] * 4])
            case "drop":
                config.pop(rng.choice([*config]))
    return config


def forge_header(rng, raw: bytes) -> bytes:
    """Return a safetensors file whose header lies."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([*header])
        field = rng.choice(["shape", "data_offsets", "dtype", "whole", "name", "drop"])
        if not isinstance(header[name], dict) or field == "whole":
            header[name] = rng.choice(JSON_VALUES)
        elif field == "name":
            header[rng.choice(["", "__metadata__", "lm_head.weight", name + " "])] = header[name]
        elif field == "drop":
            del header[name]
        elif field == "dtype":
            header[name]["dtype"] = rng.choice(["F64", "BF16", "F4", "BOOL", "I8", "f32", "", 5])
        else:
            numbers = header[name].get(field)
            near = (
                [numbers[::-1], [*numbers, 1], [0, len(data)]] if isinstance(numbers, list) else []
            )
            header[name][field] = rng.choice([*near, [2**32] * 2, [0, 2**63], *JSON_VALUES])
    data = data if rng.random() < 0.9 else data[: rng.randrange(len(data))]
    encoded = dumps(header).encode()
    return safetensors_file(encoded, data, length=claim(rng, len(encoded)))


def forge_index(rng, raw: bytes) -> bytes:
    """Return an index that sends tensors elsewhere."""
    index = json.loads(raw)
    tensors = index["weight_map"]
    for _ in range(rng.choice([1, 1, 2])):
        name, files = rng.choice([*tensors]), sorted(set(map(str, tensors.values())))
        match rng.choice(["file", "value", "drop", "add", "map"]):
            case "file":
                tensors[name] = rng.choice([*files, "absent.safetensors", "../x.safetensors"])
            case "value":
                tensors[name] = rng.choice(JSON_VALUES)
            case "drop":
                del tensors[name]
            case "add":
                tensors[rng.choice(["lm_head.weight", "x", ""])] = rng.choice(files)
            case "map" if rng.random() < 0.3:
                index["weight_map"] = rng.choice(JSON_VALUES)
    return dumps(index).encode()


FOLDER_FILES = {
    "config.json": (lambda rng, raw: dumps(forge_config(rng, json.loads(raw))).encode(), True),
    "safetensors": (forge_header, False),
    "model.safetensors.index.json": (forge_index, False),
}


@pytest.mark.parametrize("file", FOLDER_FILES)
@pytest.mark.parametrize("chosen", seeds(300, 17_000))
def test_folders_of_a_forger(tmp_path, chosen, file):
    change, finite = FOLDER_FILES[file]
    names = ["llama3", "qwen3_bias"]  # in several files
    if file == "config.json":
        names += ["llama_linear", "qwen2_yarn", "mistral", "llama", "smollm3_listed"]
    folder = tmp_path / "model"
    intact = {}
    for name in names:
        folder.mkdir()
        tiny_models.write_folder(name, folder)
        intact[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    folder.mkdir()

    def forge(rng):
        files = dict(intact[rng.choice(names)])
        target = file if file in files else rng.choice([n for n in files if n.endswith(file)])
        files[target] = change(rng, files[target])
        for old in set(folder.iterdir()):
            old.unlink()
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        return sum(map(len, files.values()))

    try_all(chosen, forge, folder, finite=finite)
