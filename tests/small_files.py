"""Small model files for the tests of the readers: byte by byte, and by the formats' own writers."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import gguf
import numpy as np
from safetensors.numpy import save_file

from lowbitq.checkpoints import packed

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


def write_gguf(
    path,
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
    architecture: str = "llama",
    **metadata,
):
    """Write quantized blocks and metadata with `gguf.GGUFWriter`."""
    writer = gguf.GGUFWriter(path, architecture)
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


def safetensors_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file that may lie about itself; `header` is an object or its text."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write_folder(path, tensors: dict[str, np.ndarray], *, shards: int = 1, **config):
    """Write a Hugging Face folder with the `safetensors` package."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t, n in weight_map.items() if n == name}, path / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_packed(path, arrays: dict[str, np.ndarray], **files: dict):
    """Write a folder as a saved model has it; `files` are further JSON files."""
    with packed.new_folder(path) as folder:
        packed.write_json(folder / "config.json", packed.quantization_config())
        packed.write_arrays(folder / "model.safetensors", arrays)
        for name, value in files.items():
            packed.write_json(folder / f"{name}.json", value)
    return path
