"""Saved models come back with the same bits, or an error that says what is wrong with them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import random_model
import test_models
from golden import tiny_models

import lowbitq
from lowbitq import FormatError, Plan, _core, quantize
from lowbitq.checkpoints import packed
from lowbitq.checkpoints.safetensors import read_safetensors
from lowbitq.linears import Activation, Copy, Linear, QuantizedLinear
from lowbitq.models import Model, QuantizedModel, load
from lowbitq.models.rotating import rotate
from lowbitq.rotations import Rotation

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

FORMATS = ["int4g64", "int2g32sym", "int3", "ternaryg64", "kmeans4g16", "int4g64s8", "nf4g64"]


def compress(model, formats=FORMATS, keep=(), **options):
    """Round every layer to one of the formats in turn; those named in `keep` stay as they are."""
    parts = {
        field.name: getattr(model.copy(), field.name)
        for field in dataclasses.fields(Model)
        if field.init
    }
    result = QuantizedModel(**parts | options)
    for i, (name, linear) in enumerate(list(model.linears())):
        if name.split(".")[-1] not in keep:
            tensor = quantize(linear.weight, formats[i % len(formats)], range="minmax")
            result.replace_linear(name, QuantizedLinear.of(tensor, linear.bias, linear.rotation))
    return result


def tiny(name, folder, kind="hadamard", **options):
    (folder / "source").mkdir()
    model = load(tiny_models.write_folder(name, folder / "source"))
    return compress(rotate(model, kind, seed=3), **options)


def bits_of(array):
    return np.asarray(array, np.float32).view(np.uint32)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal", "none"])
@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_logits_come_back_to_the_last_bit(tmp_path, name, kind):
    model, tokens = tiny(name, tmp_path, kind, keep=["k_proj"]), tiny_models.tokens_of(name)

    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert isinstance(loaded, QuantizedModel)
    assert loaded.config == model.config
    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))
    assert loaded.bits_per_weight == model.bits_per_weight
    assert repr(loaded) == repr(model)


def test_a_packed_head_comes_back(tmp_path):
    model, tokens = tiny("llama3", tmp_path), tiny_models.tokens_of("llama3")
    model.head = QuantizedLinear.of(quantize(model.head.weight, "int8g16"))
    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert isinstance(loaded.head, QuantizedLinear)
    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))


def test_what_the_head_is_decides_whether_it_is_tied(tmp_path):
    """A model put together by hand: its configuration says untied, but it has no head."""
    model, tokens = compress(random_model.random_model()), random_model.random_tokens(9)
    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.config.tie_embeddings
    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))


def test_saving_what_was_loaded_changes_nothing(tmp_path):
    tiny("qwen3", tmp_path, plan=Plan({}, seed=1)).save(tmp_path / "a")
    load(tmp_path / "a").save(tmp_path / "b")
    load(tmp_path / "b").save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_packed_weights_stay_mapped(tmp_path):
    tiny("llama", tmp_path).save(tmp_path / "saved")
    for _, linear in load(tmp_path / "saved").linears():
        panels = linear.tensor.panels
        assert not panels.flags.owndata
        assert panels.ctypes.data % 64 == 0


def test_what_is_known_of_a_model_comes_back(tmp_path):
    name = "model.layers.0.mlp.up_proj"
    records = {name: {"relative_error": np.float32(0.25), "seconds": 1.5, "format": "int2g32sym"}}
    plan = Plan({name: "int2g32sym"}, seed=7)
    model = tiny("llama", tmp_path, plan=plan, records=records)
    model.provenance["seed"] = 7

    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert loaded.plan == plan
    assert str(loaded.report()) == str(model.report())
    assert loaded.provenance["seed"] == 7
    assert loaded.provenance["source"] == str(tmp_path / "source")
    digest = hashlib.sha256((tmp_path / "source" / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.provenance["source_sha256"] == {"model.safetensors": digest}
    assert loaded.provenance["saved_by"]["numpy"] == np.__version__


def replaced(path):
    path.with_name("other").write_bytes(path.read_bytes()[::-1])
    path.with_name("other").replace(path)


def overwritten(path):
    """In place, with the old size and time of change."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


SOURCES = {
    "replaced": replaced,
    "overwritten": overwritten,
    "cut": lambda path: path.write_bytes(b"GGUF"),
    "removed": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "the same": Path.touch,
}


@pytest.mark.parametrize("gguf", [False, True])
@pytest.mark.parametrize("case", SOURCES)
def test_the_digest_is_that_of_what_was_loaded(tmp_path, case, gguf):
    """Or unknown, if the file is not certainly the same."""
    if gguf:
        source = test_models.to_gguf("llama", tmp_path / "a.gguf")
    else:
        (tmp_path / "source").mkdir()
        source = tiny_models.write_folder("llama", tmp_path / "source")
    file = source if gguf else source / "model.safetensors"
    model = compress(load(source))
    model.save(tmp_path / "saved")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load(tmp_path / "saved").provenance["source_sha256"] == {file.name: digest}

    SOURCES[case](file)
    model.save(tmp_path / "saved")

    assert load(tmp_path / "saved").provenance["source_sha256"] == {file.name: "unknown"}
    assert "source_files" not in load(tmp_path / "saved").provenance


def test_a_source_that_changes_while_it_is_hashed_is_unknown(tmp_path, monkeypatch):
    source = test_models.to_gguf("llama", tmp_path / "a.gguf")
    model = compress(load(source))
    sha256 = hashlib.sha256

    def changing():
        with open(source, "ab") as file:
            file.write(b"more")
        return sha256()

    monkeypatch.setattr(hashlib, "sha256", changing)
    model.save(tmp_path / "saved")
    assert load(tmp_path / "saved").provenance["source_sha256"] == {"a.gguf": "unknown"}


@pytest.mark.parametrize(
    "provenance",
    [
        {"source": 5, "source_files": 5},
        {"source": "/etc", "source_files": {"/dev/zero": {}, "\0": None, "": 1}},
        {"source_files": {"/dev/zero": {"inode": 1}}, "source_sha256": None},
        {1: {2, 3}, ("a",): Path("/x"), "b": np.arange(3), "c": b"\0", "d": "\ud800"},
        {"a": reduce(lambda inner, _: [inner], range(500), 1)},
        [1, 2],
        None,
    ],
)
def test_a_strange_provenance_does_not_keep_a_model_from_being_saved(tmp_path, provenance):
    model = compress(random_model.random_model(), provenance=provenance)
    model.save(tmp_path / "saved")
    assert load(tmp_path / "saved").provenance["saved_by"]["lowbitq"] == lowbitq.__version__
    assert model.provenance == provenance or provenance is not model.provenance


def test_a_provenance_in_circles_is_saved(tmp_path):
    model = compress(random_model.random_model())
    model.provenance["self"] = model.provenance
    model.save(tmp_path / "saved")
    assert "self" in load(tmp_path / "saved").provenance


def test_what_compress_makes_can_be_kept(tmp_path):
    (tmp_path / "source").mkdir()
    source = load(tiny_models.write_folder("llama", tmp_path / "source"))
    tokens = tiny_models.tokens_of("llama")
    model = lowbitq.compress(source, "int4g32", method="rtn", seed=5)

    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))
    assert loaded.plan == model.plan
    assert str(loaded.report()) == str(model.report())


def test_copies_of_layers_come_back(tmp_path):
    """With rotations, activations, weights and an adapter of their own; one tensor lies once."""
    model, tokens = tiny("llama", tmp_path), tiny_models.tokens_of("llama")
    rng = np.random.default_rng(0)
    for name, linear in list(model.linears()):
        rows, cols = linear.shape
        turns = Rotation(cols, seed=5), Rotation(rows, "orthogonal", seed=6)
        tensor = quantize(rng.standard_normal((rows, cols), np.float32), "kmeans2g64")
        copies = [
            linear.copies[0],
            Copy(tensor, turns[0], turns[1], Activation(4, clip=0.9, zero="token")),
            Copy(tensor, weight=rng.standard_normal(rows, np.float32) / 8),
        ]
        adapter = tuple(rng.standard_normal((n, 2), np.float32) / 8 for n in (rows, cols))
        model.replace_linear(name, QuantizedLinear(copies, linear.bias, adapter))

    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))
    assert loaded.nbytes == model.nbytes
    for _, linear in loaded.linears():
        assert linear.copies[1].tensor is linear.copies[2].tensor
    arrays = read_safetensors(tmp_path / "saved" / "model.safetensors").tensors
    assert sum(name.endswith(".panels") for name in arrays) == 2 * len(list(model.linears()))
    # The first copies have groups of 64, 32 and 64 columns; the others go together, as in memory,
    # although no two layers have one object.
    for block in (model.blocks[0].linears, loaded.blocks[0].linears):
        handles = tuple(block[name].handle for name in ("q_proj", "k_proj", "v_proj"))
        assert _core.linears_inputs(handles) == 2 + 1 + 1


def test_a_block_may_stand_twice(tmp_path):
    """Its layers are stored once; each place has its own keys and values."""
    model, tokens = tiny("llama", tmp_path), tiny_models.tokens_of("llama")
    once = model.nbytes
    half = dataclasses.replace(model.blocks[1], attention_scale=0.5, mlp_scale=0.25)
    model.blocks = [model.blocks[0], half, model.blocks[1], *model.blocks[2:]]
    expected = model.logits(tokens)
    assert model.nbytes == once

    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert len(loaded.blocks) == len(model.blocks) == loaded.config.layers
    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(expected))
    assert loaded.nbytes == once
    assert loaded.bits_per_weight == model.bits_per_weight
    assert [block.mlp_scale for block in loaded.blocks[:3]] == [1, 0.25, 1]
    for name, linear in loaded.blocks[1].linears.items():
        assert loaded.blocks[2].linears[name] is linear
    cache = loaded.new_cache(len(tokens))
    steps = [loaded.step([token], cache) for token in tokens]
    np.testing.assert_allclose(steps, expected, rtol=0.02, atol=0.02 * abs(expected).max())


def test_the_embedding_takes_no_more_than_it_must(tmp_path):
    model = tiny("llama", tmp_path)
    whole = model.embedding.weight
    for dtype, values in {
        "F32": whole,
        "F16": whole.astype(np.float16).astype(np.float32),
        "BF16": (bits_of(whole) & np.uint32(0xFFFF0000)).view(np.float32) * 2.0**100,
    }.items():
        model.embedding = Linear(values)
        model.save(tmp_path / "saved")
        folder = packed.read_packed(tmp_path / "saved")
        assert folder.tensors["model.embed_tokens.weight"].dtype == dtype
        assert np.array_equal(bits_of(load(tmp_path / "saved").embedding.weight), bits_of(values))


@pytest.mark.parametrize("name", ["llama", "llama3"])
@pytest.mark.parametrize("format", ["int8g64", "int8g16sym", "int4g32", "nf4g64"])
def test_a_packed_embedding_comes_back(tmp_path, name, format):
    (tmp_path / "source").mkdir()
    source = load(tiny_models.write_folder(name, tmp_path / "source"))
    tokens = tiny_models.tokens_of(name)
    model = lowbitq.compress(source, "int4g32", method="rtn", embedding=format)

    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert (loaded.head is None) == (source.head is None)
    for before, after in zip(model.matrices(), loaded.matrices(), strict=True):
        assert before[0] == after[0]
        assert np.array_equal(before[1].tensor.panels, after[1].tensor.panels)
        assert not after[1].tensor.panels.flags.owndata
        assert after[1].activation_bits == before[1].activation_bits
    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))
    assert loaded.nbytes == model.nbytes < source.nbytes / 3


def test_folders_that_do_not_describe_their_embedding_are_read(tmp_path):
    """As they were written while it was always dense."""
    model, tokens = tiny("llama", tmp_path), tiny_models.tokens_of("llama")
    model.save(tmp_path / "saved")
    forge(tmp_path / "saved", lambda entry: entry["layers"].pop("model.embed_tokens"))
    loaded = load(tmp_path / "saved")
    assert np.array_equal(bits_of(loaded.embedding.weight), bits_of(model.embedding.weight))
    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))


def test_an_embedding_with_a_bias_is_refused(tmp_path):
    model = tiny("llama", tmp_path)
    model.embedding = model.embedding.replace(bias=np.ones(len(model.embedding.weight), "f4"))
    model.save(tmp_path / "saved")
    with pytest.raises(FormatError, match="embed_tokens: has a bias, expected none"):
        load(tmp_path / "saved")


def test_another_process_reads_the_same(tmp_path):
    model, tokens = tiny("qwen2", tmp_path), tiny_models.tokens_of("qwen2")
    model.save(tmp_path / "saved")
    program = """
import sys, numpy as np, lowbitq
from lowbitq.models import load
logits = load(sys.argv[1]).logits(np.array(sys.argv[2].split(), np.int32))
sys.stdout.buffer.write(logits.tobytes())
"""
    arguments = [str(tmp_path / "saved"), " ".join(map(str, tokens))]
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert result.stdout == model.logits(tokens).tobytes()


def test_format_version_2_is_read_for_ever():
    """A folder as the first release writes it; made once, by golden/make_packed_v2.py."""
    expected = np.load(GOLDEN / "packed_v2.npz")
    model = load(GOLDEN / "packed_v2")
    for name, linear in model.linears():
        tensor = linear.tensor
        assert np.array_equal(tensor.codes, expected[f"{name}.codes"])
        assert np.array_equal(tensor.scale, expected[f"{name}.scale"])
        assert np.array_equal(tensor.offset, expected[f"{name}.offset"])
        if tensor.levels is not None:
            assert np.array_equal(tensor.levels, expected[f"{name}.levels"])
    # The same sums in float32, perhaps on another machine: 1e-4 as between two implementations.
    difference = abs(model.logits(expected["tokens"]) - expected["logits"]).max()
    assert difference < 1e-4 * abs(expected["logits"]).max()
    assert model.residual_rotation is not None
    assert model.plan == Plan({}, seed=3)


# Damage


def test_every_damaged_file_is_named(tmp_path):
    saved = tmp_path / "saved"
    tiny("llama", tmp_path, plan=Plan({}, seed=1)).save(saved)
    for path in sorted(saved.iterdir()):
        intact = path.read_bytes()
        for damaged in (intact[: len(intact) // 2], b"", b"\x89PNG" + intact[4:]):
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match=rf"{path.name}, byte \d+: "):
                load(saved)
        path.unlink()
        with pytest.raises((FormatError, FileNotFoundError), match=path.name):
            load(saved)
        path.write_bytes(intact)
    load(saved)


LAYER = "model.layers.1.mlp.down_proj"


def copy_of(entry):
    return entry["layers"][LAYER]["copies"][0]


FORGERIES = {
    "no layers": (lambda entry: entry.pop("layers"), "'layers'"),
    "no layer": (lambda entry: entry["layers"].pop(LAYER), LAYER),
    "no object": (lambda entry: entry["layers"].update({LAYER: 3}), LAYER),
    "no fields": (lambda entry: copy_of(entry).pop("activation"), "activation"),
    "other rows": (
        lambda entry: copy_of(entry)["tensor"].update(rows=47),
        rf"{LAYER}: shape is \(47, 88\), expected \(48, 88\)",
    ),
    "other size": (lambda entry: copy_of(entry)["tensor"].update(cols=9), LAYER),
    "format": (lambda entry: copy_of(entry)["tensor"].update(format="int9"), LAYER),
    "rotation": (lambda entry: copy_of(entry)["rotation"].update(n=7), LAYER),
    "large rotation": (
        lambda entry: entry["residual_rotation"].update(n=2**40, orders=[]),
        "residual_rotation: the rotation has order 1099511627776, expected 48",
    ),
    "scales": (lambda entry: entry["blocks"][1].update(mlp_scale=1e9), r"blocks\[1\]: is"),
    "no scales": (lambda entry: entry["blocks"].pop(), "blocks"),
    "residual": (lambda entry: entry["residual_rotation"].pop("n"), "residual_rotation"),
    "embedding": (
        lambda entry: entry["layers"].update({"model.embed_tokens": entry["layers"][LAYER]}),
        "model.embed_tokens",
    ),
}


def forge(saved, change, file="config.json"):
    """Change the entry of the configuration, or another file, and make the checksums fit."""
    contents = json.loads((saved / file).read_text())
    change(contents["quantization_config"] if file == "config.json" else contents)
    (saved / file).write_text(json.dumps(contents))
    (saved / "checksums.json").unlink()
    files = {file.name: packed._sections(file) for file in sorted(saved.iterdir())}
    packed.write_json(saved / "checksums.json", packed._listing(files))


@pytest.mark.parametrize("case", FORGERIES)
def test_contradictions_are_named(tmp_path, case):
    """Even where someone made the checksums fit."""
    change, message = FORGERIES[case]
    tiny("llama", tmp_path, formats=["int4g64"]).save(tmp_path / "saved")
    forge(tmp_path / "saved", change)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "saved")


@pytest.mark.parametrize("layers", [3, [3], ["layer"], [{}], [{"layer": []}]])
def test_a_report_that_is_none_is_named(tmp_path, layers):
    tiny("llama", tmp_path).save(tmp_path / "saved")
    forge(tmp_path / "saved", lambda report: report.update(layers=layers), "report.json")
    with pytest.raises(FormatError, match=r"report\.json: layers: "):
        load(tmp_path / "saved")


def test_a_disk_that_fails_loses_nothing(tmp_path, monkeypatch):
    model = tiny("llama", tmp_path)
    model.save(tmp_path / "saved")
    monkeypatch.setattr(packed.os, "fsync", failing)

    for path in (tmp_path / "saved", tmp_path / "fresh"):
        with pytest.raises(OSError, match="No space left on device") as error:
            model.save(path)
        assert error.value.filename == str(path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]
    load(tmp_path / "saved")


def failing(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.model
def test_smollm2_comes_back_to_the_last_bit(smollm2, tmp_path):
    model = compress(rotate(load(smollm2), seed=1), formats=["int4g64"])
    tokens = model.tokenizer.encode("The capital of France is")

    model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")

    assert np.array_equal(bits_of(loaded.logits(tokens)), bits_of(model.logits(tokens)))
    text = "Grüße, 世界 🙂\n  def f(x):"
    assert np.array_equal(loaded.tokenizer.encode(text), model.tokenizer.encode(text))
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.tokenizer.chat(messages) == model.tokenizer.chat(messages)
    assert loaded.tokenizer.eos_ids == model.tokenizer.eos_ids
    # 4.5 bits for each of 106 million weights, 2 bytes for each of 28 million of the embedding
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size < 1.01 * (106_168_320 * 4.5 / 8 + 28_311_552 * 4)
