"""GGUF files against `gguf`'s writer and dequantizer, and what damaged headers answer."""

from __future__ import annotations

import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from small_files import ARRAY, STRING, entry, gguf_file, key, text, write_gguf

from lowbitq import FormatError
from lowbitq.checkpoints.gguf import read_gguf

U8, U32, F32, BOOL, F64 = 0, 4, 6, 7, 12  # types of metadata values

UNREADABLE = {Kind.Q8_1, Kind.Q8_K, Kind.I8, Kind.I16, Kind.I32, Kind.I64, Kind.F64}
UNREADABLE |= {Kind[name] for name in ("Q1_0",) if name in Kind.__members__}
READABLE = [kind for kind in Kind if kind not in UNREADABLE]


def random_blocks(kind, rows, blocks):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng([int(kind), rows, blocks])
    return rng.integers(0, 256, (rows, blocks * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 5), (17, 40)])
def test_every_type_loads_as_gguf_decodes_it(tmp_path, kind, rows, blocks):
    # Any bytes are valid blocks; their scales may be infinite or NaN, which must survive.
    raw = random_blocks(kind, rows, blocks)
    path = write_gguf(tmp_path / "a.gguf", {"w": (raw, kind)})

    file = read_gguf(path)
    loaded = file.load("w")

    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
    assert loaded.dtype == np.float32
    assert file.tensors["w"].shape == loaded.shape
    assert loaded.shape == (rows, blocks * gguf.GGML_QUANT_SIZES[kind][0])
    assert np.array_equal(loaded, expected, equal_nan=True)


def test_a_tensor_of_many_chunks_has_no_seams(tmp_path):
    raw = random_blocks(Kind.Q4_K, 33, 41)  # 346,368 weights, no multiple of a chunk
    path = write_gguf(tmp_path / "a.gguf", {"w": (raw, Kind.Q4_K)})

    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, Kind.Q4_K)

    assert np.array_equal(read_gguf(path).load("w"), expected, equal_nan=True)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_simple_types_follow_the_formula(tmp_path, kind):
    rng = np.random.default_rng(int(kind))
    weight = rng.standard_normal((5, 96)).astype(np.float32)
    raw = gguf.quants.quantize(weight, kind)
    blocks = raw.reshape(5, 3, -1)
    halves = blocks[..., :4].copy().view(np.float16).astype(np.float32)
    scale, minimum = halves[..., :1], halves[..., 1:2]
    nibbles = blocks[..., -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.float32)
    expected = {
        Kind.Q4_0: scale * (codes - 8),
        Kind.Q4_1: scale * codes + minimum,
        Kind.Q8_0: scale * blocks[..., 2:].view(np.int8)[..., -32:],
    }[kind]

    loaded = read_gguf(write_gguf(tmp_path / "a.gguf", {"w": (raw, kind)})).load("w")

    # The product and the sum are rounded once each.
    assert (abs(loaded - expected.reshape(5, 96)) <= 2**-23 * abs(expected.reshape(5, 96))).all()


def test_halves_widen_exactly(tmp_path):
    every = np.arange(1 << 16, dtype=np.uint16)
    halves, bfloats = every.view(np.float16), every.view(np.uint8).reshape(1, -1)
    path = write_gguf(tmp_path / "a.gguf", {"h": (halves, Kind.F16), "b": (bfloats, Kind.BF16)})

    file = read_gguf(path)

    assert np.array_equal(file.load("h"), halves.astype(np.float32), equal_nan=True)
    wide = (every.astype(np.uint32) << 16).view(np.float32).reshape(1, -1)
    assert np.array_equal(file.load("b"), wide, equal_nan=True)


def test_metadata_and_order(tmp_path):
    metadata = {
        "a.int": 7,
        "a.float": 0.5,
        "a.text": "é\n",
        "a.yes": True,
        "a.texts": ["x", "", "漢字"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, 0.25],
        "a.flags": [True, False],
    }
    eye = np.eye(3, 2, dtype=np.float32)
    path = tmp_path / "a.gguf"
    write_gguf(path, {"z": (eye, Kind.F32), "a": (eye[0], Kind.F32)}, **metadata)

    file = read_gguf(path)

    got = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
    assert got == {"general.architecture": "llama", **metadata}
    assert type(got["a.yes"]) is bool
    assert list(file.tensors) == ["z", "a"]
    assert file.load("z").shape == (3, 2)
    assert file.load("a").tolist() == [1, 0]
    with pytest.raises(KeyError, match="no tensor 'q'"):
        file.load("q")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_versions_and_alignments(tmp_path, version, alignment):
    data = np.arange(3, dtype=np.float16).tobytes()
    raw = gguf_file(
        [key("general.alignment", U32, struct.pack("<I", alignment))],
        [entry("w", (3,), Kind.F16, 0)],
        data,
        version=version,
        alignment=alignment,
    )
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)

    assert read_gguf(path).load("w").tolist() == [0, 1, 2]


def test_a_loaded_tensor_outlives_its_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"w": (np.ones((2, 2), np.float32), Kind.F32)})
    loaded = read_gguf(path).load("w")
    path.unlink()
    loaded += 1
    assert (loaded == 2).all()


ONE = entry("w", (4,), Kind.F32, 0)
HUGE = 2**63
DAMAGED = {
    "empty": (b"", 0, "the file is empty"),
    "short": (b"GG", 0, "the magic takes 4 bytes, but 2 are left"),
    "foreign": (b"\x89PNG" + bytes(60), 0, "not a GGUF file"),
    "version 1": (gguf_file(version=1), 4, "version 1; little-endian versions 2 and 3"),
    "version 4": (gguf_file(version=4), 4, "version 4"),
    "big-endian": (gguf_file(version=3 << 24), 4, "a big-endian file"),
    "no counts": (gguf_file()[:12], 8, "the number of tensors takes 8 bytes"),
    "tensor count": (gguf_file(tensor_count=HUGE), 8, f"{HUGE} tensors do not fit"),
    "key count": (gguf_file(key_count=HUGE), 16, f"{HUGE} keys do not fit"),
    "key length": (gguf_file([struct.pack("<Q", HUGE) + bytes(20)]), 24, f"string of {HUGE} bytes"),
    "key bytes": (gguf_file([key(b"\xff", BOOL, b"\1")]), 32, "not UTF-8: invalid start byte"),
    "key twice": (gguf_file([key("a", BOOL, b"\1")] * 2), 38, "key 'a' appears twice"),
    "value type": (gguf_file([key("a", 99, bytes(8))]), 37, "'a' has a value of unknown type 99"),
    "value cut": (gguf_file([key("a", F64, b"1234")], alignment=1), 37, "'a' takes 8 bytes, but 4"),
    "array length": (
        gguf_file([key("a", ARRAY, struct.pack("<IQ", U8, HUGE))]),
        49,
        f"'a' takes {HUGE} bytes",
    ),
    "array overflow": (
        gguf_file([key("a", ARRAY, struct.pack("<IQ", F32, 2**62))]),
        49,
        f"'a' takes {2**64} bytes",
    ),
    "strings": (
        gguf_file([key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))]),
        41,
        f"{HUGE} strings of 'a' do not fit",
    ),
    "string in array": (
        gguf_file([key("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("b") + b"\xff" * 8)]),
        58,
        f"a string of {2**64 - 1} bytes",
    ),
    "array of arrays": (
        gguf_file([key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, U8, 0))]),
        49,
        "unknown type 9",
    ),
    "alignment": (
        gguf_file([key("general.alignment", U32, struct.pack("<I", 48))]),
        57,
        "alignment is 48, not a power of two",
    ),
    "alignment type": (
        gguf_file([key("general.alignment", STRING, text("32"))]),
        63,
        "alignment is '32'",
    ),
    "part": (
        gguf_file([key("split.count", 2, struct.pack("<H", 3))]),
        49,
        "one of 3 parts; join them with llama-gguf-split --merge",
    ),
    "name twice": (gguf_file((), [ONE, ONE], bytes(16)), 57, "tensor 'w' appears twice"),
    "no axes": (gguf_file((), [entry("w", (), Kind.F32, 0)]), 33, "has 0 axes, expected 1 to 4"),
    "axes": (gguf_file((), [entry("w", (1,) * 5, Kind.F32, 0)]), 33, "has 5 axes"),
    "axis of 0": (gguf_file((), [entry("w", (4, 0), Kind.F32, 0)]), 37, r"has shape \(0, 4\)"),
    "type": (gguf_file((), [entry("w", (4,), 250, 0)]), 45, "has type 250, which the installed"),
    "ragged": (gguf_file((), [entry("w", (33,), Kind.Q4_0, 0)]), 45, "not whole Q4_0 blocks of 32"),
    "offset": (
        gguf_file((), [entry("w", (4,), Kind.F32, 4)]),
        49,
        "starts at 4, not a multiple of 32",
    ),
    "data": (
        gguf_file((), [ONE], bytes(15)),
        64,
        "'w' at bytes 64:80 exceeds the file of 79 bytes",
    ),
    "far": (gguf_file((), [entry("w", (4,), 0, HUGE)]), HUGE + 64, "exceeds the file of 64 bytes"),
    "large": (gguf_file((), [entry("w", (HUGE, HUGE), 0, 0)]), 96, "exceeds the file of 96 bytes"),
    "overlap": (
        gguf_file((), [entry("w", (12,), Kind.F32, 0), entry("v", (4,), Kind.F32, 32)], bytes(64)),
        128,
        "'v' at bytes 128:144 overlaps tensor 'w', which ends at 144",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_with_its_place(tmp_path, case):
    raw, offset, message = DAMAGED[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)

    with pytest.raises(FormatError, match=message) as error:
        read_gguf(path)

    assert f"a.gguf, byte {offset}: " in str(error.value)


@pytest.mark.parametrize("kind", [Kind.Q8_K, Kind.I32], ids=lambda kind: kind.name)
def test_a_type_without_decoder_is_refused_on_loading(tmp_path, kind):
    size = gguf.GGML_QUANT_SIZES[kind]
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_file((), [entry("w", (size[0],), kind, 0)], bytes(size[1])))
    with pytest.raises(FormatError, match=f"'w' is {kind.name}, which gguf cannot turn"):
        read_gguf(path).load("w")


def test_a_header_without_end_is_refused_in_time(tmp_path):
    # A sparse file of 1 TiB: 2^36 empty strings would fit in it.
    path = tmp_path / "a.gguf"
    strings = key("a", ARRAY, struct.pack("<IQ", STRING, 2**36))
    with open(path, "wb") as file:
        file.write(gguf_file([strings]))
        file.truncate(1 << 40)
    start = time.monotonic()
    with pytest.raises(FormatError, match="strings of 'a' do not fit"):
        read_gguf(path)
    assert time.monotonic() - start < 5


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        read_gguf(tmp_path)


@pytest.mark.model
def test_the_demo_model_opens_at_once(smollm2):
    start = time.monotonic()
    file = read_gguf(smollm2)
    seconds = time.monotonic() - start

    assert seconds < 2  # 0.05 s on a Zen 2 when idle; `gguf.GGUFReader` needs 4 to 6
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(file.tensors) == 272
    assert file.load("blk.3.ffn_up.weight").shape == (1536, 576)
