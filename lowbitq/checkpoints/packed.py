"""Saved quantized models: a folder that appears whole or not at all, and is checked when read.

    config.json        Hugging Face's fields and quantization_config: {quant_method: lowbitq, ...}
    model.safetensors  every tensor at a multiple of 64 bytes, used where it is mapped
    checksums.json     CRC-32 of every section of every other file
    tokenizer.json, plan.json, report.json, provenance.json, ...

A CRC-32 finds every damage of up to four neighbouring bytes, others but for one in 2^32, and is
read at 2.9 GB/s where SHA-256 takes 0.37 (Zen 2); it does not protect from forgery.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import reprlib
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq._core import FormatError
from lowbitq.checkpoints.mapping import MappedFile, TensorInfo
from lowbitq.checkpoints.safetensors import (
    CONFIG,
    NUMPY_DTYPES,
    SINGLE,
    SafetensorsFile,
    read_safetensors,
)

FORMAT_VERSION = 2

_CHECKSUMS = "checksums.json"
_ALIGNMENT = 64
_PADDING = "_padding."  # names of the tensors that fill the gaps; safetensors allows no holes

_SAFETENSORS_DTYPES = {np.dtype(numpy): name for name, numpy in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class PackedFolder:
    """An open folder of a saved quantized model.

    Attributes
    ----------
    path : Path
    config : dict
        Contents of ``config.json``.
    """

    path: Path
    config: dict[str, Any]
    _file: SafetensorsFile = field(repr=False)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Names of the arrays, in the order in which they were saved, and where they lie."""
        tensors = self._file.tensors
        return {name: tensors[name] for name in tensors if not name.startswith(_PADDING)}

    def sha256(self) -> dict[str, str]:
        """Return the name and digest in hexadecimal of the file that holds the arrays."""
        return self._file.sha256()

    def view(self, name: str) -> NDArray[Any]:
        """Return an array as it was saved: read-only, mapped, 64-byte aligned.

        Raises
        ------
        KeyError
            If there is no such array.
        """
        return self._file.view(name)

    def load(self, name: str) -> NDArray[np.float32]:
        """Return an array of float32, float16 or bfloat16 as a new float32 array.

        Raises
        ------
        KeyError
            If there is no such array.
        FormatError
            If it has another dtype.
        """
        return self._file.load(name)

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in one of the folder's files.

        Raises
        ------
        OSError
            If there is no such file.
        FormatError
            If it does not hold a JSON object.
        """
        return MappedFile(self.path / name).json()


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give out a hidden sibling of `path` to write into; at the end it becomes `path`.

    The folder appears under its name complete, on disk and with ``checksums.json``, or, after any
    exception, not at all. A model saved there before is replaced in one step and kept until then;
    where the file system cannot exchange two names, there is an instant in which it is only found
    as ``.NAME.HEX.old``. A killed process leaves at most a hidden ``.NAME.HEX.new`` behind.

    Parameters
    ----------
    path : str or path-like
        Absent, an empty folder, or a model saved before with nothing added to it.

    Yields
    ------
    Path
        An empty folder.

    Raises
    ------
    FileExistsError
        If `path` is something else, which is left alone.
    OSError
        If something cannot be written; names the file.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model"
    >>> with new_folder(path) as folder:
    ...     write_json(folder / "config.json", quantization_config())
    ...     write_arrays(folder / "model.safetensors", {"gain": np.ones(3, np.float32)})
    >>> sorted(file.name for file in path.iterdir())
    ['checksums.json', 'config.json', 'model.safetensors']
    >>> read_packed(path).view("gain")
    array([1., 1., 1.], dtype=float32)
    """
    path = Path(path).resolve()
    _check_replaceable(path)
    mark = f".{path.name}.{secrets.token_hex(4)}"
    fresh, old = path.with_name(f"{mark}.new"), path.with_name(f"{mark}.old")
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        files = {file.name: _sections(file) for file in sorted(fresh.iterdir())}
        write_json(fresh / _CHECKSUMS, _listing(files))
        for file in [*sorted(fresh.iterdir()), fresh]:
            _sync(file)
        _check_replaceable(path)
        if not path.exists() or not any(path.iterdir()):
            fresh.rename(path)
        elif not _exchange(fresh, path):
            path.rename(old)
            try:
                fresh.rename(path)
            except BaseException:
                old.rename(path)
                raise
            old.rename(fresh)
        _sync(path.parent)
    except OSError as error:
        if error.filename is None:  # a failing write does not know its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        # By now this is an unfinished folder, the model that was replaced, or nothing.
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, in ASCII, to a new file; NumPy's numbers may be in it."""
    with open(path, "xb") as file:
        file.write(_json_text(value))


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to a new safetensors file in which each one starts at a multiple of 64 bytes.

    Parameters
    ----------
    path : str or path-like
    arrays : mapping of str to ndarray
        Any shape; integers, float16, float32, float64, or `ml_dtypes.bfloat16`. Written in this
        order; where a size is no multiple of 64, a tensor ``_padding.N`` of bytes follows.

    Raises
    ------
    OSError
        If the file exists or cannot be written.
    TypeError
        If safetensors has no such dtype.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write_arrays(path, {"a": np.zeros(3, np.uint8), "b": np.zeros((2, 8), np.float32)})
    >>> file = read_safetensors(path)
    >>> {name: (t.offset % 64, t.shape) for name, t in file.tensors.items()}
    {'a': (0, (3,)), '_padding.1': (3, (61,)), 'b': (0, (2, 8))}
    """
    header: dict[str, Any] = {"__metadata__": {"format": "lowbitq"}}
    pieces: list[NDArray[np.uint8]] = []
    end = 0

    def append(name: str, dtype: str, shape: tuple[int, ...], raw: NDArray[np.uint8]) -> None:
        nonlocal end
        offsets = [end, end + raw.size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        pieces.append(raw)
        end += raw.size

    for name, array in arrays.items():
        if name.startswith(_PADDING) or name == "__metadata__":
            raise ValueError(f"array name {name!r} is reserved")
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        append(name, _dtype_name(name, array.dtype), array.shape, raw)
        if gap := -end % _ALIGNMENT:
            append(f"{_PADDING}{len(pieces)}", "U8", (gap,), np.zeros(gap, np.uint8))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for raw in pieces:
            file.write(raw.data)


def narrowest(values: NDArray[np.float32]) -> NDArray[Any]:
    """Return the same values as float16, else bfloat16, else float32, whichever holds all exactly.

    Parameters
    ----------
    values : ndarray of any shape, float32

    Returns
    -------
    ndarray of the same shape
        `PackedFolder.load` gives back the same bits.

    Examples
    --------
    >>> [narrowest(np.float32([x])).dtype.name for x in (0.5, 2.0**100, 1 + 2.0**-20)]
    ['float16', 'bfloat16', 'float32']
    """
    import ml_dtypes

    flat = np.ascontiguousarray(values).reshape(-1)
    half, back = np.empty(flat.size, np.uint16), np.empty(flat.size, np.float32)
    _core.float_to_half(flat, half)
    _core.half_to_float(half, back)
    bits = flat.view(np.uint32)
    if np.array_equal(back.view(np.uint32), bits):
        return half.view(np.float16).reshape(values.shape)
    if not (bits & 0xFFFF).any():
        upper: NDArray[Any] = (bits >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
        return upper.reshape(values.shape)
    return values


def quantization_config(**fields: Any) -> dict[str, Any]:
    """Return the entry of ``config.json`` that marks a folder as saved by this package."""
    marks = {"quant_method": "lowbitq", "format_version": FORMAT_VERSION}
    return {"quantization_config": {**marks, **fields}}


def is_packed(config: Mapping[str, Any]) -> bool:
    """Return whether the contents of a ``config.json`` are those of a saved quantized model."""
    entry = config.get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == "lowbitq"


def read_packed(path: str | os.PathLike[str], *, verify: bool = True) -> PackedFolder:
    """Open a folder that `new_folder` made.

    Parameters
    ----------
    path : str or path-like
    verify : bool, default=True
        Read every file once and compare checksums, so that no damage goes unnoticed.

    Returns
    -------
    PackedFolder
        Its arrays are mapped, not read.

    Raises
    ------
    OSError
        If a file is missing or cannot be opened.
    FormatError
        If a file is not as it was saved: names the file, the section and its first byte; if the
        format is newer than this version of the package.

    Examples
    --------
    See `new_folder`.
    """
    path = Path(path)
    config_file = MappedFile(path / CONFIG)
    config = config_file.json()
    if not is_packed(config):
        raise config_file.damaged(0, "no quantization_config of quant_method 'lowbitq'")
    version = config["quantization_config"].get("format_version")
    if version != FORMAT_VERSION:
        found = f"format_version is {reprlib.repr(version)}, expected {FORMAT_VERSION}"
        raise config_file.damaged(0, f"{found}: another lowbitq may read it")
    if verify:
        _verify(path)
    return PackedFolder(path, config, read_safetensors(path / SINGLE))


def _json_text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    """Return a NumPy number as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _dtype_name(name: str, dtype: np.dtype[Any]) -> str:
    if dtype.name == "bfloat16":
        return "BF16"
    if dtype not in _SAFETENSORS_DTYPES:
        raise TypeError(f"array {name!r} has dtype {dtype}, which safetensors does not have")
    return _SAFETENSORS_DTYPES[dtype]


def _listing(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``checksums.json`` says: the sections of each file, and its own checksum."""
    return {"crc32": f"{zlib.crc32(_json_text(files)):08x}", "files": files}


def _sections(path: Path) -> list[dict[str, Any]]:
    """Return the sections that cover a file: name, bytes, CRC-32."""
    file = MappedFile(path)
    cuts = [("file", 0)]
    if path.suffix == ".safetensors":
        tensors = sorted(read_safetensors(path).tensors.values(), key=lambda t: t.offset)
        cuts = [("header", 0)] + [(t.name, t.offset) for t in tensors if t.nbytes]
    ends = [start for _, start in cuts[1:]] + [file.data.size]
    return [
        {"section": name, "bytes": end - start, "crc32": file.crc32(start, end)}
        for (name, start), end in zip(cuts, ends, strict=True)
    ]


def _verify(folder: Path) -> None:
    """Raise FormatError unless every file is as its checksums say."""
    listing = MappedFile(folder / _CHECKSUMS)
    files = listing.json().get("files")
    if not isinstance(files, dict):
        raise listing.damaged(0, "'files' is not an object")
    present = {file.name for file in folder.iterdir() if file.is_file()}
    for name, sections in files.items():
        if name != os.path.basename(name) or not isinstance(sections, list):
            raise listing.damaged(0, f"{name!r} is no file with a list of sections")
        if name not in present:
            raise listing.damaged(0, f"{reprlib.repr(name)} is missing")
        file = MappedFile(folder / name)
        start = 0
        for number, entry in enumerate(sections):
            match entry:
                case {"section": str(section), "bytes": int(size), "crc32": str(expected)}:
                    end = start + size
                case _:
                    raise listing.damaged(0, f"section {number} of {name!r} is malformed")
            if not start <= end <= file.data.size:
                found = f"{section!r} ends at byte {end}, the file at byte {file.data.size}"
                raise file.damaged(file.data.size, found)
            found = file.crc32(start, end)
            if found != expected:
                found = f"{section!r} has CRC-32 {found}, it had {expected} when it was saved"
                raise file.damaged(start, found)
            start = end
        if start != file.data.size:
            raise file.damaged(start, f"{file.data.size - start} bytes too many")
    # Only one text stands for these checksums, so that a change of this file itself shows too.
    if listing.buffer[:] != _json_text(_listing(files)):
        raise listing.damaged(0, "not as it was saved")


def _check_replaceable(path: Path) -> None:
    """Raise FileExistsError if putting a folder at `path` would lose something."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file")
    present = {file.name for file in path.iterdir()}
    if not present:
        return
    known = None
    with contextlib.suppress(OSError, FormatError):
        if is_packed(MappedFile(path / CONFIG).json()):
            known = MappedFile(path / _CHECKSUMS).json().get("files")
    if not isinstance(known, dict):
        raise FileExistsError(f"{path} is neither empty nor a model saved by lowbitq")
    if added := sorted(present - {_CHECKSUMS, *known}):
        raise FileExistsError(f"{path} holds {added[0]}, which is no part of the model saved there")


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
