"""Damaged model files of every kind: only FormatError comes out, soon and without much memory."""

from __future__ import annotations

import json
import re
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from golden import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_files import write_folder, write_gguf, write_packed
from test_models import to_gguf

from lowbitq import FormatError, compress
from lowbitq.calibration import Massive, Statistics
from lowbitq.checkpoints import packed, read_folder, read_gguf, read_packed
from lowbitq.checkpoints.blocks import Blocks
from lowbitq.models import load

# The intact files have a few kB. What hypothesis and NumPy keep for themselves is below this.
PEAK_BYTES = 16 << 20
SECONDS = 5

EXAMPLES = [100, pytest.param(2000, marks=pytest.mark.slow)]

HOSTILE = [
    0,
    1,
    7,
    31,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63,
    2**64 - 8,
    2**64 - 1,
]
FOREIGN = [
    b"GGUF\3\0\0\0",
    b"\x89PNG\r\n",
    b"PK\3\4",
    b"{}",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xff" * 64,
]


@st.composite
def damaged(draw, intact: bytes) -> bytes:
    """Draw what may become of a file: cut, flipped, overwritten, grown, with hostile numbers."""
    raw = bytearray(intact)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        match draw(st.sampled_from(["cut", "flip", "number", "digits", "paste", "insert", "drop"])):
            case "cut":
                del raw[at:]
            case "flip" if raw:
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                width = draw(st.sampled_from([4, 8]))
                value = draw(st.sampled_from(HOSTILE)) % 256**width
                raw[at : at + width] = value.to_bytes(width, "little")
            case "digits":
                raw = replace_digits(draw, raw)
            case "paste":
                piece = draw(st.sampled_from(FOREIGN) | st.binary(min_size=1, max_size=40))
                raw[at : at + len(piece)] = piece
            case "insert":
                raw[at:at] = draw(st.sampled_from(FOREIGN) | st.binary(min_size=1, max_size=40))
            case "drop":
                del raw[at : at + draw(st.integers(1, 16))]
    return bytes(raw)


def replace_digits(draw, raw: bytearray) -> bytearray:
    """Put a hostile value in the place of a number in a text, and keep a header's length true."""
    numbers = list(re.finditer(rb"\d+", raw))
    if not numbers:
        return raw
    number = draw(st.sampled_from(numbers))
    hostile = [str(value).encode() for value in HOSTILE]
    hostile += [b"-1", b"1e999", b"NaN", b"null", b"{}", b"[]", b'"a"', b"9" * 5000, b"0.5"]
    value = draw(st.sampled_from(hostile))
    changed = raw[: number.start()] + value + raw[number.end() :]
    length = int.from_bytes(raw[:8], "little")
    if raw[8:9] == b"{" and number.start() < 8 + length:
        changed[:8] = struct.pack("<Q", length + len(value) - len(number[0]))
    return changed


def read_everything(read, path, contents: dict) -> None:
    """Open `path` and load its tensors under a limit of time and memory."""
    for file, raw in contents.items():
        file.write_bytes(raw)
    start = time.monotonic()
    tracemalloc.start()
    try:
        read(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < PEAK_BYTES
        assert time.monotonic() - start < SECONDS


def load_all(checkpoint) -> None:
    for name in checkpoint.tensors:
        checkpoint.load(name)


def fuzz(read, path, examples: int, *, harmless: bool, place: bool = True) -> None:
    """Damage the files of `path`, one at a time.

    Some changes may go unnoticed if `harmless`; each error names a byte if `place`.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    intact = {file: file.read_bytes() for file in files}
    read_everything(read, path, intact)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples <= 100,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        file = data.draw(st.sampled_from(files))
        raw = data.draw(damaged(intact[file]))
        message = None
        try:
            read_everything(read, path, intact | {file: raw})
        except FormatError as error:
            message = str(error)
        if message is None:
            assert harmless or raw == intact[file]
        else:
            assert not place or re.search(r", byte \d+: ", message)
            assert len(message) < 10_000

    run()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("version", [2, 3])
def test_gguf(tmp_path, examples, version):
    rng = np.random.default_rng(0)
    tensors = {"norm": (rng.standard_normal(8).astype("f4"), Kind.F32)}
    for kind in (Kind.F16, Kind.BF16, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.IQ2_XS, Kind.TQ1_0):
        size = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
        tensors[kind.name] = (blocks.view(np.float16) if kind == Kind.F16 else blocks, kind)
    metadata = {"n": 1, "x": 0.5, "text": "é", "yes": True, "tokens": ["a", "b"], "types": [1, 2]}
    path = write_gguf(tmp_path / "a.gguf", tensors, **metadata)
    raw = bytearray(path.read_bytes())
    raw[4] = version
    path.write_bytes(raw)

    fuzz(lambda path: load_all(read_gguf(path)), path, examples // 2, harmless=True)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors(tmp_path, examples, shards):
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.w": rng.standard_normal((3, i)).astype("f2") for i in range(4)}
    path = write_folder(tmp_path / "model", tensors, shards=shards, model_type="llama")

    fuzz(lambda path: load_all(read_folder(path)), path, examples // 2, harmless=True)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_packed(tmp_path, examples):
    arrays = {"panels": np.arange(80, dtype=np.uint8), "gains": np.ones((3, 4), np.float32)}
    path = write_packed(tmp_path / "model", arrays, plan={"layers": [1, 2]})

    def read(path):
        folder = read_packed(path)
        for name in list(folder.tensors):
            folder.view(name)
        folder.json("plan.json")

    fuzz(read, path, examples, harmless=False)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_packed_without_verification(tmp_path, examples):
    """Damage that is not looked for may pass, but must not crash."""
    path = write_packed(tmp_path / "model", {"gains": np.ones((3, 4), np.float32)})

    def read(path):
        folder = read_packed(path, verify=False)
        for name in list(folder.tensors):
            folder.view(name)
            folder.load(name)

    fuzz(read, path, examples, harmless=True)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_statistics(tmp_path, examples):
    arrays = {f"layer {i}": np.ones(i, np.float32) for i in range(4)}
    massive = [Massive("layer 1", 0, 1, 2, 3.0, 4.0)]
    path = tmp_path / "stats.npz"
    Statistics(np.zeros((2, 3), np.int32), arrays, arrays, massive).save(path)

    fuzz(Statistics.load, path, examples // 2, harmless=True, place=False)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_blocks(tmp_path, examples):
    arrays = {"panels": np.arange(200, dtype=np.uint8), "U": np.ones((3, 2), np.float32)}
    Blocks(tmp_path, {"seed": 1}).save(0, arrays, {"up": {"relative_error": 0.0}})

    def read(path):
        try:
            found = Blocks(path, {"seed": 1}).load(0, ["up"])
        except FormatError:
            raise
        except ValueError as error:  # a changed fingerprint may still be one
            if "is from another run" not in str(error):
                raise
        else:
            assert found is not None
            assert all(np.array_equal(found[0][name], array) for name, array in arrays.items())

    fuzz(read, tmp_path, examples // 2, harmless=True, place=False)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", ["gguf", "folder", "packed"])
def test_models(tmp_path, examples, kind, monkeypatch):
    """What still is a file of its format may describe no model, or one that does not run here."""
    if kind == "gguf":
        path = to_gguf("llama3", tmp_path / "a.gguf")
    else:
        path = tmp_path / "model"
        path.mkdir()
        tiny_models.write_folder("llama3", path)
    if kind == "packed":
        small = compress(load(path), "int4g16", method="rtn")
        path = tmp_path / "packed"
        small.save(path)
        monkeypatch.setattr(packed, "_verify", lambda *files: None)  # let the damage through

    def read(path):
        try:
            model = load(path)
        except FormatError:
            raise
        except ValueError as error:
            if "the model is not supported: " not in str(error):
                raise
        else:
            model.logits([model.config.vocab_size - 1])

    fuzz(read, path, examples // 4, harmless=True, place=False)


def test_json_in_a_folder_is_checked(tmp_path):
    path = write_packed(tmp_path / "model", {})
    (path / "report.json").write_text(json.dumps([1]))
    with pytest.raises(FormatError, match="not a JSON object"):
        read_packed(path, verify=False).json("report.json")
