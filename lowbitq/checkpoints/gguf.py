"""GGUF files, versions 2 and 3: metadata, and every tensor as float32; writing them.

The header is parsed here because `gguf.GGUFReader` makes one array per string: 4 to 6 s on a
vocabulary of 49,152 tokens against 0.1 s. `gguf.quants` decodes blocks of quantized weights.
`gguf` is imported with the first file, because it takes a sixth of this package's import time.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.checkpoints.mapping import MappedFile, TensorInfo, elements, little_endian
from lowbitq.checkpoints.writing import new_file

if TYPE_CHECKING:
    import gguf

# Larger headers are refused, which bounds the cost of a hostile file of any size. The largest
# vocabularies in use (256k tokens with merges) make headers of about 20 MB.
_HEADER_LIMIT = 1 << 28

# Weights decoded at a time, so that decoding needs little more memory than its result. On SmolLM2,
# times were equal from 2^16 to 2^19, and rose towards 2^14 and 2^22.
_CHUNK = 1 << 17

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file.

    Attributes
    ----------
    path : Path
    metadata : dict
        Key to bool, int, float, str, list of str, or ndarray (an array of numbers).
    tensors : dict of str to TensorInfo
        In the order of the file. Shapes are in NumPy's order, ``(rows, cols)`` for a matrix.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _file: MappedFile = field(repr=False)
    _start: int = field(repr=False)

    @property
    def file_type(self) -> str | None:
        """What the weights are mostly, such as ``"MOSTLY_Q4_1"``; None if the file does not say."""
        import gguf

        try:
            return str(gguf.LlamaFileType(int(self.metadata["general.file_type"])).name)
        except (KeyError, TypeError, ValueError):
            return None

    def check(self) -> None:
        """Raise FormatError if tensors overlap or exceed the file."""
        self._file.check_tensors(self.tensors, self._start)

    def load(self, name: str) -> NDArray[np.float32]:
        """Decode one tensor.

        Parameters
        ----------
        name : str
            A key of `tensors`, such as ``"blk.0.attn_q.weight"``.

        Returns
        -------
        ndarray of the tensor's shape, float32
            A new array.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        FormatError
            If `gguf` cannot decode the tensor's type.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        tensor = self.tensors[name]
        try:
            weights = decode(self._file.bytes_of(tensor), tensor.dtype)
        except NotImplementedError as error:
            found = f"tensor {name!r} is {tensor.dtype}, which gguf cannot turn into numbers"
            raise self._file.damaged(tensor.offset, found) from error
        return weights.reshape(tensor.shape)

    def stamps(self) -> dict[str, dict[str, int]]:
        """Return the path of the file and `MappedFile.stamp`."""
        return {os.path.abspath(self.path): self._file.stamp}


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and read its header.

    Parameters
    ----------
    path : str or path-like
        A little-endian file of version 2 or 3.

    Returns
    -------
    GGUFFile
        The data stays on disk until `GGUFFile.load` asks for it.

    Raises
    ------
    OSError
        If the file cannot be opened.
    FormatError
        If it is damaged or not a GGUF file; the message names the byte of the first error.

    References
    ----------
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Examples
    --------
    >>> import gguf, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "small.gguf")
    >>> writer = gguf.GGUFWriter(path, "llama")
    >>> writer.add_tensor("output.weight", np.eye(2, 3, dtype=np.float32))
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file()
    >>> writer.close()
    >>> file = read_gguf(path)
    >>> file.metadata["general.architecture"], file.tensors["output.weight"].shape
    ('llama', (2, 3))
    >>> file.load("output.weight")
    array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)
    """
    found = read_gguf_header(path)
    found.check()
    return found


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFFile:
    """Read the header of a GGUF file whose data may be cut off; otherwise as `read_gguf`."""
    file = MappedFile(path)
    header = _Header(file)
    tensor_count, key_count = header.preamble()
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        at = header.at
        key = header.string()
        if key in metadata:
            raise header.damaged(at, f"key {key!r} appears twice")
        metadata[key] = header.value(key)
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        found = f"one of {parts} parts; join them with llama-gguf-split --merge"
        raise header.damaged(header.at, found)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.damaged(
            header.at, f"alignment is {reprlib.repr(alignment)}, not a power of two"
        )
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        at = header.at
        tensor = header.tensor(alignment)
        if tensor.name in tensors:
            raise header.damaged(at, f"tensor {tensor.name!r} appears twice")
        tensors[tensor.name] = tensor
    start = -(-header.at // alignment) * alignment
    tensors = {
        t.name: TensorInfo(t.name, t.shape, t.dtype, start + t.offset, t.nbytes)
        for t in tensors.values()
    }
    return GGUFFile(file.path, metadata, tensors, file, start)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, NDArray[Any]]],
    *,
    overwrite: bool = False,
) -> None:
    """Write a GGUF file, version 3, atomically.

    Parameters
    ----------
    path : str or path-like
    metadata : mapping
        Key to bool, int, float, str, or a list of these; ``general.architecture`` is required.
        Numbers have 32 bits.
    tensors : mapping of str to (str, ndarray)
        Type and contents: float32 or float16 of the tensor's shape for ``"F32"`` and ``"F16"``,
        bytes (rows, bytes) for the other types.
    overwrite : bool, default=False
        Whether a GGUF file at `path` may be replaced.

    Raises
    ------
    FileExistsError
        If there is a file that may not be replaced; it is not touched.
    OSError
        If the file cannot be written; nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.gguf"
    >>> write_gguf(path, {"general.architecture": "llama"}, {"w": ("F16", np.eye(2, dtype="f2"))})
    >>> read_gguf(path).load("w")
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    import gguf

    path = Path(path)
    _check_free(path, overwrite=overwrite)
    add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    with new_file(path) as file:
        writer = gguf.GGUFWriter(file.name, metadata["general.architecture"])
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif key != "general.architecture":  # the writer has added it
                getattr(writer, add[type(value)])(key, value)
        for name, (type_name, array) in tensors.items():
            kind = gguf.GGMLQuantizationType[type_name]
            writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_free(path, overwrite=overwrite)  # again, because writing takes a while


def _check_free(path: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if a new file at `path` would delete anything but a GGUF file."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, expected a file")
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; overwrite=True or --force replaces it")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise FileExistsError(f"{path} is not a GGUF file, so it is not replaced")


class _Header:
    """A cursor over the header; reading beyond its end is an error."""

    def __init__(self, file: MappedFile) -> None:
        self.buffer = file.buffer
        self.damaged = file.damaged
        self.at = 0
        self.end = min(file.data.size, _HEADER_LIMIT)

    def take(self, size: int, what: str) -> int:
        """Skip the next `size` bytes and return where they start."""
        start = self.at
        if size > self.end - start:
            raise self.damaged(start, f"{what} takes {size} bytes, but {self.end - start} are left")
        self.at = start + size
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, what))[0])

    def preamble(self) -> tuple[int, int]:
        """Check magic and version; return how many tensors and keys follow."""
        magic = self.buffer[self.take(4, "the magic") : self.at]
        if magic != b"GGUF":
            raise self.damaged(0, f"magic is {magic!r}, expected b'GGUF': not a GGUF file")
        version = self.u32("the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            why = "a big-endian file" if swapped else f"version {version}"
            raise self.damaged(4, f"{why}; little-endian versions 2 and 3 can be read")
        return self.count(24, "tensors"), self.count(13, "keys")

    def count(self, least_bytes: int, what: str) -> int:
        """Return the number of items that follow; each takes at least `least_bytes` of the rest."""
        at = self.at
        count = self.u64(f"the number of {what}")
        if count * least_bytes > self.end - self.at:
            raise self.damaged(at, f"{count} {what} do not fit in {self.end - self.at} bytes")
        return count

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Return the next strings. The loop is flat because vocabularies have 10^5 of them."""
        buffer, length_at, at, end = self.buffer, _U64.unpack_from, self.at, self.end
        result = []
        try:
            for _ in range(count):
                start = at + 8
                stop = start + length_at(buffer, at)[0]
                if stop > end:
                    raise self.damaged(
                        at, f"a string of {stop - start} bytes, but {end - start} are left"
                    )
                result.append(buffer[start:stop].decode())
                at = stop
        except struct.error:
            raise self.damaged(at, "the file ends inside a string") from None
        except UnicodeDecodeError as error:
            raise self.damaged(
                start + error.start, f"a string that is not UTF-8: {error.reason}"
            ) from None
        self.at = at
        return result

    def value(self, key: str) -> Any:
        kind = self.u32("a value's type")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        return self.numbers(key, kind, 1)[0].item()

    def array(self, key: str) -> list[str] | NDArray[Any]:
        kind = self.u32("an array's type")
        if kind == _STRING:
            return self.strings(self.count(8, f"strings of {key!r}"))
        return self.numbers(key, kind, self.u64("an array's length"))

    def numbers(self, key: str, kind: int, count: int) -> NDArray[Any]:
        # Arrays of arrays are refused here too: the format allows them, but no model has one, and
        # llama.cpp refuses them as well.
        if kind not in _SCALARS:
            raise self.damaged(self.at, f"{key!r} has a value of unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize, f"{key!r}")
        values = np.frombuffer(self.buffer, dtype, count, start)
        return values != 0 if kind == _BOOL else values.copy()

    def tensor(self, alignment: int) -> TensorInfo:
        """Return one tensor's entry; its offset is relative to the start of the data."""
        import gguf

        name = self.string()
        at = self.at
        axes = self.u32("the number of axes")
        if not 1 <= axes <= 4:
            raise self.damaged(at, f"tensor {name!r} has {axes} axes, expected 1 to 4")
        shape = tuple(self.u64(f"an axis of {name!r}") for _ in range(axes))[::-1]
        if min(shape) < 1:
            raise self.damaged(at + 4, f"tensor {name!r} has shape {shape}")
        at = self.at
        number = self.u32(f"the type of {name!r}")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            found = f"tensor {name!r} has type {number}, which the installed gguf does not know"
            raise self.damaged(at, found) from None
        if shape[-1] % block:
            raise self.damaged(
                at,
                f"tensor {name!r} has rows of {shape[-1]}, not whole {kind.name} blocks of {block}",
            )
        at = self.at
        offset = self.u64(f"the offset of {name!r}")
        if offset % alignment:
            raise self.damaged(
                at, f"tensor {name!r} starts at {offset}, not a multiple of {alignment}"
            )
        return TensorInfo(name, shape, kind.name, offset, elements(shape) // block * block_bytes)


def decode(raw: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    """Return the weights in whole blocks of a type such as ``"Q4_0"``.

    Parameters
    ----------
    raw : ndarray of shape (bytes,) or (rows, bytes), uint8
    type : str

    Returns
    -------
    ndarray of shape (weights,) or (rows, weights / rows), float32

    Raises
    ------
    NotImplementedError
        If `gguf` cannot decode the type.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty(len(blocks) * block, np.float32)
    count = max(1, _CHUNK // block)
    for start in range(0, len(blocks), count):
        chunk = out[start * block : (start + count) * block]
        _decode(blocks[start : start + count].reshape(-1), kind, chunk)
    return out.reshape(*raw.shape[:-1], -1)


def _decode(
    raw: NDArray[np.uint8], kind: gguf.GGMLQuantizationType, out: NDArray[np.float32]
) -> None:
    """Write the weights of whole blocks to `out`."""
    import gguf

    if kind == gguf.GGMLQuantizationType.F32:
        out[:] = raw.view("<f4")
    elif kind == gguf.GGMLQuantizationType.F16:
        _core.half_to_float(little_endian(raw, "<u2"), out)
    elif kind == gguf.GGMLQuantizationType.BF16:
        _core.bfloat_to_float(little_endian(raw, "<u2"), out)
    else:
        # Damaged scales may be infinite; the caller checks the weights.
        with np.errstate(all="ignore"):
            out[:] = gguf.quants.dequantize(raw.reshape(1, -1), kind)[0]
