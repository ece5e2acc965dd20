"""Safetensors files, and the Hugging Face folders made of them.

A file is the header's length (8 bytes), a JSON header and the tensors, one after the other. It is
parsed here because the NumPy interface of `safetensors` lacks BF16 and copies instead of mapping.

Specification: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.checkpoints.mapping import MappedFile, TensorInfo, elements, little_endian

# Bits of an element.
_BITS = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
}

# NumPy dtypes of the tensors that `SafetensorsFile.view` can return.
NUMPY_DTYPES = {
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}

_WIDEN: dict[str, Callable[[NDArray[np.uint16], NDArray[np.float32]], None]] = {
    "F16": _core.half_to_float,
    "BF16": _core.bfloat_to_float,
}

# Numbers converted at a time, which bounds the scratch.
_CHUNK = 1 << 20

_SHARD = re.compile(r"[\w .+()-]{1,200}\.safetensors")

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsFile:
    """An open safetensors file.

    Attributes
    ----------
    path : Path
    metadata : dict of str to str
    tensors : dict of str to TensorInfo
        In the order of the header.
    """

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    _file: MappedFile = field(repr=False)
    _end: int = field(repr=False)

    def check(self) -> None:
        """Raise FormatError unless the file ends where its tensors do."""
        end, size = self._end, self._file.data.size
        if end != size:
            found = f"the tensors end at byte {end}, the file at byte {size}"
            raise self._file.damaged(min(end, size), found)

    def view(self, name: str) -> NDArray[Any]:
        """Return a tensor as it is in the file: read-only, mapped, not copied.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        FormatError
            If NumPy has no such dtype.
        """
        tensor = self._find(name)
        if tensor.dtype not in NUMPY_DTYPES:
            found = f"tensor {name!r} is {tensor.dtype}, which NumPy does not have"
            raise self._file.damaged(tensor.offset, found)
        raw = self._file.bytes_of(tensor)
        return raw.view(NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)

    def load(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of F32, F16 or BF16 as a new float32 array of its shape.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        FormatError
            If the tensor is of another dtype.
        """
        tensor = self._find(name)
        raw = self._file.bytes_of(tensor)
        out = np.empty(elements(tensor.shape), np.float32)
        if tensor.dtype == "F32":
            out[:] = raw.view("<f4")
        elif tensor.dtype in _WIDEN:
            _WIDEN[tensor.dtype](little_endian(raw, "<u2"), out)
        else:
            found = f"tensor {name!r} is {tensor.dtype}, expected F32, F16 or BF16"
            raise self._file.damaged(tensor.offset, found)
        return out.reshape(tensor.shape)

    def stamps(self) -> dict[str, dict[str, int]]:
        """Return the path of the file and `MappedFile.stamp`."""
        return {os.path.abspath(self.path): self._file.stamp}

    def _find(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]


def read_safetensors(path: str | os.PathLike[str] | MappedFile) -> SafetensorsFile:
    """Open a safetensors file and read its header.

    Parameters
    ----------
    path : str, path-like or MappedFile

    Returns
    -------
    SafetensorsFile
        The data stays on disk until it is asked for.

    Raises
    ------
    OSError
        If the file cannot be opened.
    FormatError
        If it is damaged; the message names the byte. As in the reference implementation, tensors
        must follow each other without gaps and end where the file ends.

    References
    ----------
    https://github.com/huggingface/safetensors#format

    Examples
    --------
    >>> import os, tempfile
    >>> from safetensors.numpy import save_file
    >>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
    >>> save_file({"w": np.array([[1, 2]], np.float16)}, path)
    >>> read_safetensors(path).load("w")
    array([[1., 2.]], dtype=float32)
    """
    found = read_safetensors_header(path)
    found.check()
    return found


def read_safetensors_header(path: str | os.PathLike[str] | MappedFile) -> SafetensorsFile:
    """Read the header of a file whose data may be cut off; otherwise as `read_safetensors`."""
    file = path if isinstance(path, MappedFile) else MappedFile(path)
    size = file.data.size
    if size < 8:
        raise file.damaged(0, f"{size} bytes, too few for the length of a header")
    length = struct.unpack_from("<Q", file.buffer, 0)[0]
    if length > size - 8:
        raise file.damaged(0, f"a header of {length} bytes in a file of {size}")
    start = 8 + length
    header = file.json(8, start)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise file.damaged(8, "__metadata__ is not an object of strings")
    tensors = {name: _tensor(file, start, name, entry) for name, entry in header.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            found = f"tensor {tensor.name!r} starts here, the one before it ends at byte {end}"
            raise file.damaged(tensor.offset, found)
        end += tensor.nbytes
    return SafetensorsFile(file.path, metadata, tensors, file, end)


def _tensor(file: MappedFile, start: int, name: str, entry: Any) -> TensorInfo:
    """Check and return the header's entry of one tensor; the data begins at `start`."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise file.damaged(8, f"the entry of {name!r} is not an object of {sorted(keys)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise file.damaged(8, f"tensor {name!r} has unknown dtype {reprlib.repr(dtype)}")
    if not _are_sizes(shape) or len(shape) > 8:
        raise file.damaged(8, f"tensor {name!r} has shape {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise file.damaged(8, f"tensor {name!r} has data_offsets {reprlib.repr(offsets)}")
    nbytes, rest = divmod(elements(shape) * _BITS[dtype], 8)
    if rest or offsets[1] - offsets[0] != nbytes:
        found = f"tensor {name!r} takes {offsets[1] - offsets[0]} bytes"
        raise file.damaged(8, f"{found}, but {dtype} of shape {shape} takes {nbytes}")
    return TensorInfo(name, tuple(shape), dtype, start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    # The bound keeps products of hostile sizes cheap.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], dtype: str = "float32"
) -> None:
    """Write a new file as other programs expect it: no padding, metadata ``{"format": "pt"}``.

    Parameters
    ----------
    path : str or path-like
    arrays : mapping of str to ndarray
        Of any shape. Those of float32 are rounded to `dtype`, the others stay as they are.
    dtype : {"float32", "bfloat16", "float16"}, default="float32"

    Raises
    ------
    OSError
        If the file exists or cannot be written.
    ValueError
        If a number is too large for `dtype`.

    Examples
    --------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
    >>> write_safetensors(path, {"w": np.float32([[1, 0.1]])}, "bfloat16")
    >>> read_safetensors(path).load("w")
    array([[1.        , 0.10009766]], dtype=float32)
    """
    floats = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    names = {np.dtype(numpy): name for name, numpy in NUMPY_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        stored = floats if array.dtype == np.float32 else names[array.dtype]
        start, end = end, end + array.size * _BITS[stored] // 8
        entry = {"dtype": stored, "shape": list(array.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays.items():
            flat = np.ascontiguousarray(array).reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                piece = flat[start : start + _CHUNK]
                if array.dtype == np.float32:
                    piece = rounded(piece, dtype, name)
                file.write(piece.view(np.uint8).data)


def rounded(values: NDArray[np.float32], dtype: str, name: str) -> NDArray[Any]:
    """Return values to nearest in ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises
    ------
    ValueError
        If a finite number becomes an infinity; the message has the tensor's `name`.
    """
    import ml_dtypes

    if dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        result = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    if np.isinf(result).any() and np.isfinite(values).all():
        largest = np.abs(values).max()
        raise ValueError(f"{name} has a weight of {largest:.4g}, too large for {dtype}")
    return result


def narrowest_of_all(arrays: Iterable[NDArray[np.float32]]) -> str:
    """Return the first of ``"bfloat16"``, ``"float16"``, ``"float32"`` that holds all exactly.

    Examples
    --------
    >>> narrowest_of_all([np.float32([1, 2.0**100])]), narrowest_of_all([np.float32([1 / 3])])
    ('bfloat16', 'float32')
    """
    arrays = list(arrays)
    return next(dtype for dtype in ("bfloat16", "float16", "float32") if are_exact(arrays, dtype))


def are_exact(arrays: Iterable[NDArray[np.float32]], dtype: str) -> bool:
    """Return whether ``"float32"``, ``"bfloat16"`` or ``"float16"`` holds all numbers exactly."""
    if dtype == "float32":
        return True
    if dtype == "bfloat16":
        return not any((array.view(np.uint32) & 0xFFFF).any() for array in arrays)
    with np.errstate(over="ignore"):
        return all(
            (piece.astype(np.float16) == piece).all()
            for array in arrays
            for piece in np.array_split(array.reshape(-1), 1 + array.size // _CHUNK)
        )


@dataclass(frozen=True)
class SafetensorsFolder:
    """An open Hugging Face folder.

    Attributes
    ----------
    path : Path
    config : dict
        Contents of ``config.json``.
    tensors : dict of str to TensorInfo
        Tensors of all files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _files: dict[str, SafetensorsFile] = field(repr=False)

    def load(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of F32, F16 or BF16 as a new float32 array of its shape.

        Parameters
        ----------
        name : str
            A key of `tensors`, such as ``"model.layers.0.self_attn.q_proj.weight"``.

        Returns
        -------
        ndarray of the tensor's shape, float32

        Raises
        ------
        KeyError
            If the folder has no such tensor.
        FormatError
            If the tensor is of another dtype.
        """
        if name not in self._files:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self._files[name].load(name)

    def stamps(self) -> dict[str, dict[str, int]]:
        """Return the paths of the weight files, and `MappedFile.stamp` of each."""
        files = {file.path: file for file in self._files.values()}
        return {path: stamp for p in sorted(files) for path, stamp in files[p].stamps().items()}


def read_folder(path: str | os.PathLike[str]) -> SafetensorsFolder:
    """Open a Hugging Face folder: ``config.json`` and one or more safetensors files.

    Parameters
    ----------
    path : str or path-like
        Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names.

    Returns
    -------
    SafetensorsFolder
        The data stays on disk until `SafetensorsFolder.load` asks for it.

    Raises
    ------
    OSError
        If a file is missing or cannot be opened.
    FormatError
        If a file is damaged (the message names the byte), or if the weights are quantized already.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from safetensors.numpy import save_file
    >>> path = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (path / "config.json").write_text('{"model_type": "llama"}')
    >>> save_file({"w": np.zeros((2, 3), np.float32)}, path / "model.safetensors")
    >>> folder = read_folder(path)
    >>> folder.config["model_type"], folder.tensors["w"].shape
    ('llama', (2, 3))
    """
    path = Path(path)
    config_file = MappedFile(path / CONFIG)
    config = config_file.json()
    if method := config.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise config_file.damaged(
            0, f"weights quantized by {reprlib.repr(method)}, expected float weights"
        )
    if (path / SINGLE).exists():
        file = read_safetensors(path / SINGLE)
        return SafetensorsFolder(path, config, file.tensors, dict.fromkeys(file.tensors, file))
    if not (path / INDEX).exists():
        missing = f"{path} has neither {SINGLE} nor {INDEX}"
        if pickled := sorted(file.name for file in path.glob("*.bin")):
            missing += (
                f", but {pickled[0]}, which could run any code; with transformers, "
                f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(FOLDER) "
                "writes safetensors"
            )
        raise FileNotFoundError(missing)
    index = MappedFile(path / INDEX)
    weight_map = read_index(index)
    opened: dict[str, SafetensorsFile] = {}
    for name, file_name in weight_map.items():
        if not (path / file_name).is_file():
            raise index.damaged(0, f"tensor {name!r} lies in {file_name}, which is missing")
        if file_name not in opened:
            opened[file_name] = read_safetensors(path / file_name)
        if name not in opened[file_name].tensors:
            raise index.damaged(0, f"{file_name} has no tensor {name!r}")
    files = {name: opened[file_name] for name, file_name in weight_map.items()}
    tensors = {name: file.tensors[name] for name, file in files.items()}
    return SafetensorsFolder(path, config, tensors, files)


def read_index(index: MappedFile) -> dict[str, str]:
    """Return the file name of each tensor, from ``model.safetensors.index.json``."""
    weight_map = index.json().get("weight_map")
    if not isinstance(weight_map, dict):
        raise index.damaged(0, "weight_map is not an object")
    for name, file_name in weight_map.items():
        # Only files in this folder: an index must not reach other files of the machine.
        if not isinstance(file_name, str) or not _SHARD.fullmatch(file_name):
            raise index.damaged(
                0, f"tensor {name!r} lies in {reprlib.repr(file_name)}, not a file name"
            )
    return weight_map
