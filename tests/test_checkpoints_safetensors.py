"""Safetensors files and folders against the `safetensors` package, and damaged ones."""

from __future__ import annotations

import json
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from small_files import gguf_file, safetensors_file, write_folder, write_packed

from lowbitq import FormatError
from lowbitq.checkpoints import (
    GGUFFile,
    PackedFolder,
    SafetensorsFolder,
    open_checkpoint,
    read_folder,
)
from lowbitq.checkpoints.gguf import write_gguf
from lowbitq.checkpoints.safetensors import read_safetensors

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7, 5), (3, 2, 4)], ids=str)
def test_floats_load_exactly(tmp_path, dtype, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(FLOATS[dtype])
    path = tmp_path / "a.safetensors"
    save_file({"w": values}, path, metadata={"format": "pt"})

    file = read_safetensors(path)

    assert file.metadata == {"format": "pt"}
    assert file.tensors["w"].dtype == dtype
    loaded = file.load("w")
    assert loaded.dtype == np.float32
    assert loaded.flags.writeable
    assert loaded.shape == shape
    assert np.array_equal(loaded, values.astype(np.float32))


def test_every_half_widens_exactly(tmp_path):
    every = np.arange(1 << 16, dtype=np.uint16)
    path = tmp_path / "a.safetensors"
    save_file({"h": every.view(np.float16), "b": every.view(ml_dtypes.bfloat16)}, path)

    file = read_safetensors(path)

    for name, dtype in {"h": np.float16, "b": ml_dtypes.bfloat16}.items():
        with np.errstate(invalid="ignore"):
            expected = every.view(dtype).astype(np.float32)
        assert np.array_equal(file.load(name), expected, equal_nan=True)


def test_a_header_of_odd_length_is_read(tmp_path):
    header = {"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
    for spaces in range(4):
        raw = json.dumps(header).encode() + b" " * spaces
        path = tmp_path / f"{spaces}.safetensors"
        path.write_bytes(safetensors_file(raw, np.float16([1, 2]).tobytes()))
        assert read_safetensors(path).load("w").tolist() == [1, 2]


def test_views_are_mapped(tmp_path):
    arrays = {
        np.dtype(d).name: np.arange(4).astype(d)
        for d in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
    }
    path = tmp_path / "a.safetensors"
    save_file(arrays, path)

    file = read_safetensors(path)

    for name, array in arrays.items():
        view = file.view(name)
        assert view.dtype == array.dtype
        assert view.tolist() == array.tolist()
        assert not view.flags.writeable
        assert not view.flags.owndata


def test_other_dtypes_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros(2), "b": np.zeros(2, ml_dtypes.bfloat16)}, path)
    file = read_safetensors(path)
    with pytest.raises(FormatError, match="'w' is F64, expected F32, F16 or BF16"):
        file.load("w")
    with pytest.raises(FormatError, match="'b' is BF16, which NumPy does not have"):
        file.view("b")
    with pytest.raises(KeyError, match="no tensor 'q'"):
        file.load("q")


def one(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def pair(start, stop):
    return one() | {"v": {"dtype": "U8", "shape": [4], "data_offsets": [start, stop]}}


EIGHT = bytes(8)
ONE = len(safetensors_file(one()))  # where the data begins
PAIR = len(safetensors_file(pair(6, 10)))
DAMAGED = {
    "empty": (b"", 0, "the file is empty"),
    "short": (b"1234567", 0, "7 bytes, too few"),
    "length": (safetensors_file({}, length=2**63), 0, f"a header of {2**63} bytes in a file of 10"),
    "no utf-8": (safetensors_file(b'{"\xff"}'), 10, "not UTF-8"),
    "no json": (safetensors_file('{"é":}'.encode()), 14, "not JSON: Expecting value"),
    "no object": (safetensors_file([1]), 8, "not a JSON object"),
    "nested": (safetensors_file(b"[" * 10**6), 8, "not usable as JSON"),
    "digits": (safetensors_file(b"1" * 10**5), 8, "not usable as JSON"),
    "twice": (safetensors_file(b'{"a":1,"a":1}'), 8, "key 'a' appears twice"),
    "metadata": (safetensors_file({"__metadata__": {"a": 1}}), 8, "not an object of strings"),
    "entry": (safetensors_file({"w": 1}), 8, "entry of 'w' is not an object of"),
    "keys": (safetensors_file({"w": {"dtype": "F32"}}), 8, "entry of 'w' is not an object of"),
    "dtype": (safetensors_file(one(dtype="Q4")), 8, "'w' has unknown dtype 'Q4'"),
    "dtype type": (safetensors_file(one(dtype=[])), 8, "'w' has unknown dtype"),
    "shape": (safetensors_file(one(shape=[-1])), 8, r"'w' has shape \[-1\]"),
    "shape type": (safetensors_file(one(shape=[True, 2.0])), 8, r"'w' has shape \[True, 2.0\]"),
    "axes": (safetensors_file(one(shape=[2] * 10**5)), 8, r"'w' has shape \[2, 2"),
    "large": (safetensors_file(one(shape=[2**62, 2**62]), EIGHT), 8, "'w' takes 8 bytes, but F32"),
    "offsets": (safetensors_file(one(data_offsets=[0])), 8, r"'w' has data_offsets \[0\]"),
    "reversed": (safetensors_file(one(data_offsets=[8, 0]), EIGHT), 8, "'w' takes -8 bytes"),
    "bits": (safetensors_file(one(dtype="F4", shape=[3], data_offsets=[0, 1])), 8, "but F4 of"),
    "cut": (safetensors_file(one(), bytes(7)), ONE + 7, f"end at byte {ONE + 8}, the file at"),
    "tail": (safetensors_file(one(), bytes(9)), ONE + 8, f"end at byte {ONE + 8}, the file at"),
    "gap": (safetensors_file(pair(9, 13), bytes(13)), PAIR + 9, "'v' starts here, the one before"),
    "overlap": (safetensors_file(pair(6, 10), bytes(10)), PAIR + 6, "'v' starts here, the one"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_with_its_place(tmp_path, case):
    raw, offset, message = DAMAGED[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)

    with pytest.raises(FormatError, match=message) as error:
        read_safetensors(path)

    assert f"a.safetensors, byte {offset}: " in str(error.value)
    assert len(str(error.value)) < 500
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "numpy"):
        pass


@pytest.mark.parametrize("shards", [1, 3])
def test_folders(tmp_path, shards):
    rng = np.random.default_rng(shards)
    tensors = {f"layers.{i}": rng.standard_normal((4, i + 1)).astype("f4") for i in range(7)}
    path = write_folder(tmp_path / "model", tensors, shards=shards, model_type="llama")

    folder = open_checkpoint(path)

    assert isinstance(folder, SafetensorsFolder)
    assert folder.config == {"model_type": "llama"}
    assert folder.tensors.keys() == tensors.keys()
    for name, values in tensors.items():
        assert folder.tensors[name].shape == values.shape
        assert np.array_equal(folder.load(name), values)
    assert len(folder.stamps()) == shards
    with pytest.raises(KeyError, match="no tensor 'absent'"):
        folder.load("absent")


INDEXES = {
    "no map": ({}, "weight_map is not an object"),
    "no name": ({"weight_map": {"a": 1}}, "'a' lies in 1, not a file name"),
    "outside": ({"weight_map": {"a": "../b.safetensors"}}, "not a file name"),
    "absolute": ({"weight_map": {"a": "/b.safetensors"}}, "not a file name"),
    "nul": ({"weight_map": {"a": "\0.safetensors"}}, "not a file name"),
    "surrogate": ({"weight_map": {"a": "\ud800.safetensors"}}, "not a file name"),
    "pickle": ({"weight_map": {"a": "b.bin"}}, "not a file name"),
    "missing": ({"weight_map": {"a": "b.safetensors"}}, "lies in b.safetensors, which is missing"),
    "wrong": (
        {"weight_map": {"z": "model-00001-of-00002.safetensors"}},
        "model-00001-of-00002.safetensors has no tensor 'z'",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_damaged_indexes(tmp_path, case):
    index, message = INDEXES[case]
    path = write_folder(tmp_path / "m", {"a": np.zeros(2), "b": np.zeros(2)}, shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=message):
        read_folder(path)


def test_folders_that_hold_no_float_model(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_folder(path)
    (path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.i"
    ):
        read_folder(path)
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(FormatError, match="weights quantized by 'gptq', expected float weights"):
        read_folder(path)


def test_a_path_is_known_by_its_contents(tmp_path):
    (tmp_path / "a").write_bytes(gguf_file())
    assert isinstance(open_checkpoint(tmp_path / "a"), GGUFFile)
    write_packed(tmp_path / "b", {"w": np.zeros(3, np.float32)})
    assert isinstance(open_checkpoint(tmp_path / "b"), PackedFolder)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such file or folder"):
        open_checkpoint(tmp_path / "absent.gguf")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub's client that has one repository."""
    folder = write_folder(tmp_path / "cache", {"w": np.ones(2, np.float32)})

    gguf = tmp_path / "cached.gguf"
    write_gguf(gguf, {"general.architecture": "llama"}, {"w": ("F32", np.ones(2, np.float32))})

    def snapshot_download(name, *, allow_patterns, revision, token):
        if name != "owner/model" or revision not in (None, "v2"):
            raise ValueError("no network")
        assert "*.safetensors" in allow_patterns
        assert token in (None, "secret")
        return str(folder)

    def hf_hub_download(name, file, *, revision, token):
        assert (name, file, revision, token) == ("owner/model", "a/q4.gguf", "v2", "secret")
        return str(gguf)

    module = types.SimpleNamespace(
        snapshot_download=snapshot_download, hf_hub_download=hf_hub_download
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.mark.usefixtures("hub")
def test_names_of_the_hub():
    assert open_checkpoint("owner/model").load("w").tolist() == [1, 1]
    there = {"revision": "v2", "token": "secret"}
    assert open_checkpoint("owner/model", **there).load("w").tolist() == [1, 1]
    assert isinstance(open_checkpoint("owner/model:a/q4.gguf", **there), GGUFFile)
    with pytest.raises(FileNotFoundError, match=r"owner/other: no such file .* hub \(no network\)"):
        open_checkpoint("owner/other")
    for path in ("owner/file.gguf", "/owner/model", "./model", "model", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            open_checkpoint(path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, which could run any code; "):
        read_folder(tmp_path)


def test_a_revision_of_what_is_here_is_refused(tmp_path):
    write_folder(tmp_path / "model", {"w": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="revision and token are for the Hugging Face hub"):
        open_checkpoint(tmp_path / "model", revision="v2")
