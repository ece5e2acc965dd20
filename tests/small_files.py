"""Small model files for the tests of the readers: byte by byte, and by the formats' own writers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import gguf
import numpy as np

STRING, ARRAY = 8, 9


def text(string: str | bytes) -> bytes:
    """Return a GGUF string."""
    raw = string.encode() if isinstance(string, str) else string
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    """Return one entry of a GGUF file's metadata."""
    return text(name) + struct.pack("<I", kind) + payload


def entry(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """Return one tensor's entry; `shape` in the order of the file, innermost axis first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_file(
    keys: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a GGUF file that may lie about itself."""
    counts = (
        len(entries) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(entries)
    return header + bytes(-len(header) % alignment) + data


def write_gguf(path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]], **metadata):
    """Write quantized blocks and metadata with `gguf.GGUFWriter`."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, (blocks, kind) in tensors.items():
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
