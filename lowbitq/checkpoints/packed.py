"""Saved quantized models: a folder that is written atomically and checked when it is read.

    config.json        Hugging Face's fields and quantization_config: {quant_method: lowbitq, ...}
    model.safetensors  every tensor at a multiple of 64 bytes, mapped and used in place
    checksums.json     CRC-32 of every section of every other file
    tokenizer.json, plan.json, report.json, provenance.json, ...

A CRC-32 detects all damage of up to four neighbouring bytes and misses one in 2^32 of the rest. It
runs at 2.9 GB/s, SHA-256 at 0.37 (Zen 2). It does not protect from forgery.

A reader opens the folder once and all files through it, so it sees one model even while another
process replaces it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import reprlib
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
from lowbitq.checkpoints.writing import hidden_sibling, replace_folder, sync

FORMAT_VERSION = 3
_READ = (2, 3)

_CHECKSUMS = "checksums.json"
_ALIGNMENT = 64
_CHUNK = 1 << 20  # numbers tried at once, which bounds the scratch
_PADDING = "_padding."  # names of the tensors that fill the gaps; safetensors allows no holes

_FOR_TRANSFORMERS = (
    "the weights are packed by lowbitq; write a folder for transformers with: "
    "lowbitq export FOLDER OUT --to hf"
)

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
    _files: dict[str, MappedFile] = field(repr=False)
    _arrays: SafetensorsFile = field(repr=False)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Names and positions of the arrays, in the order in which they were saved."""
        tensors = self._arrays.tensors
        return {name: tensors[name] for name in tensors if not name.startswith(_PADDING)}

    def view(self, name: str) -> NDArray[Any]:
        """Return an array as it was saved: read-only, mapped, 64-byte aligned.

        Raises
        ------
        KeyError
            If there is no such array.
        """
        return self._arrays.view(name)

    def load(self, name: str) -> NDArray[np.float32]:
        """Return an array of float32, float16 or bfloat16 as a new float32 array.

        Raises
        ------
        KeyError
            If there is no such array.
        FormatError
            If it has another dtype.
        """
        return self._arrays.load(name)

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in one of the folder's files; see `PackedEntry.json`."""
        return (self / name).json()

    def __truediv__(self, name: str) -> PackedEntry:
        """Return an entry that acts as ``path / name`` but reads the opened file."""
        return PackedEntry(self.path / name, self._files.get(name))

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class PackedEntry:
    """A file of a `PackedFolder`, with the methods of a path that readers need."""

    path: Path
    _file: MappedFile | None = field(repr=False)

    def is_file(self) -> bool:
        """Return whether there is such a file."""
        return self._file is not None

    def read_bytes(self) -> bytes:
        """Return the contents; FileNotFoundError if there is no such file."""
        return self._there().buffer[:]

    def read_text(self, encoding: str) -> str:
        """Return the contents, decoded; FileNotFoundError if there is no such file."""
        return self.read_bytes().decode(encoding)

    def json(self) -> dict[str, Any]:
        """Return the JSON object in the file.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        FormatError
            If it does not hold a JSON object.
        """
        return self._there().json()

    def _there(self) -> MappedFile:
        if self._file is None:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(self.path))
        return self._file

    def __str__(self) -> str:
        return str(self.path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden sibling of `path` to write into; at the end it becomes `path`.

    The folder appears under its name complete, synced to disk and with ``checksums.json``, or,
    after any exception, not at all. A model saved there before is replaced in one step and kept
    until then. If the file system cannot exchange two names, the old model is named
    ``.NAME.HEX.old`` for an instant. A killed process leaves at most a hidden ``.NAME.HEX.new``,
    which the next save to `path` removes.

    Parameters
    ----------
    path : str or path-like
        Missing, an empty folder, or a saved model with nothing added to it.

    Yields
    ------
    Path
        An empty folder.

    Raises
    ------
    FileExistsError
        If `path` is anything else; it is not touched.
    OSError
        If something cannot be written; the message names the file.

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
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    with hidden_sibling(path, folder=True) as fresh:
        yield fresh
        files = {file.name: _sections(file) for file in sorted(fresh.iterdir())}
        write_json(fresh / _CHECKSUMS, _listing(files))
        for file in [*sorted(fresh.iterdir()), fresh]:
            sync(file)
        check_replaceable(path)  # again, because writing takes a while
        replace_folder(fresh, path)


def check_replaceable(path: Path) -> None:
    """Raise FileExistsError if `new_folder` at `path` would delete anything but a saved model."""
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
        raise FileExistsError(
            f"{path} holds {added[0]}, which is not part of the model saved there"
        )


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object, which may hold NumPy numbers, to a new file as indented ASCII."""
    with open(path, "xb") as file:
        file.write(json_text(value))


def json_text(value: Mapping[str, Any]) -> bytes:
    """Return the text that `write_json` writes."""
    return (json.dumps(value, indent=1, default=_plain) + "\n").encode()


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to a new safetensors file in which each one starts at a multiple of 64 bytes.

    Parameters
    ----------
    path : str or path-like
    arrays : mapping of str to ndarray
        Any shape; integers, float16, float32, float64, or `ml_dtypes.bfloat16`. They are written in
        this order; if a size is not a multiple of 64, a tensor ``_padding.N`` of bytes follows.

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
    """Return the values in the first of float16, bfloat16, float32 that holds all of them exactly.

    Parameters
    ----------
    values : ndarray of any shape, float32

    Returns
    -------
    ndarray of the same shape
        `PackedFolder.load` restores the same bits.

    Examples
    --------
    >>> [narrowest(np.float32([x])).dtype.name for x in (0.5, 2.0**100, 1 + 2.0**-20)]
    ['float16', 'bfloat16', 'float32']
    """
    import ml_dtypes

    flat = np.ascontiguousarray(values).reshape(-1)
    pieces = [flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK)]
    if all(map(_fits_half, pieces)):
        half = np.empty(flat.size, np.uint16)
        _core.float_to_half(flat, half)
        return half.view(np.float16).reshape(values.shape)
    lower, upper = flat.view("<u2").reshape(-1, 2).T
    if not lower.any():
        bfloat: NDArray[Any] = upper.copy().view(ml_dtypes.bfloat16)
        return bfloat.reshape(values.shape)
    return values


def _fits_half(values: NDArray[np.float32]) -> bool:
    """Return whether float16 holds every value exactly, to the bit."""
    half, back = np.empty(values.size, np.uint16), np.empty(values.size, np.float32)
    _core.float_to_half(values, half)
    _core.half_to_float(half, back)
    return np.array_equal(back.view(np.uint32), values.view(np.uint32))


def quantization_config(**fields: Any) -> dict[str, Any]:
    """Return the entries of ``config.json`` that mark a folder as saved by this package.

    transformers only warns of an unknown ``quant_method`` and would run random weights. It refuses
    a file name of weights that does not end in ``.safetensors``, and shows it.
    """
    marks = {"quant_method": "lowbitq", "format_version": FORMAT_VERSION}
    return {"quantization_config": {**marks, **fields}, "transformers_weights": _FOR_TRANSFORMERS}


def is_packed(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` with these contents belongs to a saved quantized model."""
    entry = config.get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == "lowbitq"


def read_packed(path: str | os.PathLike[str], *, verify: bool = True) -> PackedFolder:
    """Open a folder written by `new_folder`.

    Parameters
    ----------
    path : str or path-like
    verify : bool, default=True
        Read every file once and compare checksums to detect damage.

    Returns
    -------
    PackedFolder
        Its arrays are mapped, not read.

    Raises
    ------
    OSError
        If a file is missing or cannot be opened.
    FormatError
        If a file is not as it was saved (the message names the file, the section and its first
        byte), or if the format is newer than this version of the package.

    Examples
    --------
    See `new_folder`.
    """
    path = Path(path)
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return _read(path, descriptor, verify)
        except (FileNotFoundError, FormatError):
            if not _is_replaced(path, descriptor):
                raise
        finally:
            os.close(descriptor)


def _is_replaced(path: Path, descriptor: int) -> bool:
    """Return whether `path` is now another folder, so that the open one is being removed."""
    with contextlib.suppress(OSError):
        return not os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _read(path: Path, descriptor: int, verify: bool) -> PackedFolder:
    """Read the open folder, even if another one now has its name."""
    config_file = MappedFile(path / CONFIG, folder=descriptor)
    config = config_file.json()
    if not is_packed(config):
        raise config_file.damaged(0, "no quantization_config of quant_method 'lowbitq'")
    version = config["quantization_config"].get("format_version")
    if version not in _READ:
        found = f"format_version is {reprlib.repr(version)}, expected 2 or {FORMAT_VERSION}"
        raise config_file.damaged(0, f"{found}: another version of lowbitq may read it")
    # Hidden files belong to tools such as git; nothing here reads them.
    names = sorted(name for name in os.listdir(descriptor) if not name.startswith("."))
    listing = MappedFile(path / _CHECKSUMS, folder=descriptor) if verify else None
    listed = _listed(listing, names) if listing else dict.fromkeys(names)
    files = {
        name: config_file if name == CONFIG else MappedFile(path / name, folder=descriptor)
        for name in listed
    }
    if listing:
        _verify(listing, listed, files)
    if SINGLE not in files:
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path / SINGLE))
    return PackedFolder(path, config, files, read_safetensors(files[SINGLE]))


def _plain(value: Any) -> Any:
    """Return a NumPy number as a Python number."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _dtype_name(name: str, dtype: np.dtype[Any]) -> str:
    if dtype.name == "bfloat16":
        return "BF16"
    if dtype not in _SAFETENSORS_DTYPES:
        raise TypeError(f"array {name!r} has dtype {dtype}, which safetensors does not have")
    return _SAFETENSORS_DTYPES[dtype]


def _listing(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of ``checksums.json``: sections of each file, and its own checksum."""
    return {"crc32": f"{zlib.crc32(json_text(files)):08x}", "files": files}


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


def _listed(listing: MappedFile, names: list[str]) -> dict[str, Any]:
    """Return the sections of each file; FormatError unless the files listed are `names`."""
    files = listing.json().get("files")
    if not isinstance(files, dict):
        raise listing.damaged(0, "'files' is not an object")
    for name, sections in files.items():
        if name != os.path.basename(name) or not isinstance(sections, list):
            raise listing.damaged(0, f"{name!r} is not a file with a list of sections")
        if name not in names:
            raise listing.damaged(0, f"{reprlib.repr(name)} is missing")
    if added := sorted(set(names) - {_CHECKSUMS, *files}):
        raise listing.damaged(0, f"{added[0]!r} was added to the saved model; remove it")
    return files


def _verify(listing: MappedFile, listed: dict[str, Any], files: dict[str, MappedFile]) -> None:
    """Raise FormatError unless every file is as its checksums say."""
    for name, sections in listed.items():
        file = files[name]
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
                found = f"{section!r} has CRC-32 {found}, but had {expected} when it was saved"
                raise file.damaged(start, found)
            start = end
        if start != file.data.size:
            raise file.damaged(start, f"{file.data.size - start} bytes too many")
    # These checksums have only one valid text, so any change of this file is detected too.
    if listing.buffer[:] != json_text(_listing(listed)):
        raise listing.damaged(0, "not as it was saved")
