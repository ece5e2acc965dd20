"""Memory-mapped files, and the positions of tensors in them."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import reprlib
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError

# Without git-lfs, git writes this in place of a large file.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# Deeper JSON is refused: comparing or printing it would exceed Python's recursion limit. Models'
# files have up to 10 levels.
_JSON_DEPTH = 64

# Larger JSON is refused, which bounds the cost of a hostile header: its objects take up to twenty
# times its bytes. The index of a model with 100,000 tensors has 8 MB.
_JSON_LIMIT = 1 << 26


@dataclass(frozen=True)
class TensorInfo:
    """The position, shape and dtype of a tensor in a file.

    Attributes
    ----------
    name : str
    shape : tuple of int
        In NumPy's order: the last axis is contiguous.
    dtype : str
        In the file format's terms: ``"F32"``, ``"BF16"``, ``"Q4_1"``.
    offset : int
        First byte, from the start of the file.
    nbytes : int
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class MappedFile:
    """A whole file as a read-only array of bytes, paged in by the system on access.

    Views of `data` keep the mapping alive. The file must not be truncated while it is mapped.

    Parameters
    ----------
    path : str or path-like
        A regular file.
    folder : int, default=None
        Descriptor of the folder that holds the file; None: the folder in `path`.

    Attributes
    ----------
    path : Path
    buffer : mmap or bytes
        For `struct`; slices are copies.
    data : ndarray of shape (size,), uint8
        The same bytes as an array; starts at a page boundary.
    stamp : dict of str to int
        State of the file when it was opened, for `sha256_of_unchanged`.

    Raises
    ------
    OSError
        If the file cannot be opened.
    FormatError
        If it is not a regular file, has no bytes, or is a git-lfs pointer.
    MemoryError
        If there is not enough memory to map it.
    """

    def __init__(self, path: str | os.PathLike[str], *, folder: int | None = None) -> None:
        self.path = Path(path)

        def opened(path: str, flags: int) -> int:
            name = path if folder is None else self.path.name
            try:
                return os.open(name, flags | os.O_NONBLOCK, dir_fd=folder)  # do not wait for a pipe
            except OSError as error:
                error.filename = path
                raise

        with open(self.path, "rb", buffering=0, opener=opened) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise self.damaged(0, "not a regular file but a device, a pipe or a socket")
            if status.st_size == 0:
                raise self.damaged(0, "the file is empty")
            self.stamp = _stamp(status)
            try:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    found = f"{self.path}: no memory to map {status.st_size} bytes"
                    raise MemoryError(found) from error
                raise
        if self.buffer[: len(_LFS_POINTER)] == _LFS_POINTER:
            raise self.damaged(0, "a git-lfs pointer, not the file itself; run git lfs pull")
        self.data: NDArray[np.uint8] = np.frombuffer(self.buffer, np.uint8)

    def damaged(self, offset: int, found: str) -> FormatError:
        """Return an error that names this file, the byte and what was found there."""
        return FormatError(f"{self.path}, byte {offset}: {found}")

    def bytes_of(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        """Return a view of the tensor's bytes."""
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]

    def json(self, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Return the JSON object in the bytes from `start` to `stop`.

        Raises
        ------
        FormatError
            If they are not UTF-8, not JSON, not an object, nested too deeply, larger than 64 MiB,
            or name a key twice.
        """
        stop = self.data.size if stop is None else stop
        if stop - start > _JSON_LIMIT:
            raise self.damaged(
                start, f"{stop - start} bytes of JSON, expected at most {_JSON_LIMIT}"
            )
        text = ""
        try:
            text = self.buffer[start:stop].decode()
            value = json.loads(text, object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            raise self.damaged(start + error.start, f"not UTF-8: {error.reason}") from None
        except json.JSONDecodeError as error:
            at = start + len(text[: error.pos].encode())
            raise self.damaged(at, f"not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise self.damaged(start, f"not usable as JSON: {error}") from None
        if not isinstance(value, dict):
            raise self.damaged(start, "not a JSON object")
        if _depth(value) > _JSON_DEPTH:
            raise self.damaged(start, f"JSON of more than {_JSON_DEPTH} levels")
        return value

    def check_tensors(self, tensors: dict[str, TensorInfo], start: int) -> None:
        """Raise FormatError if tensors overlap or lie outside of `start` to the end of file."""
        end, before = start, "the header"
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            what = (
                f"tensor {tensor.name!r} at bytes {tensor.offset}:{tensor.offset + tensor.nbytes}"
            )
            if tensor.offset < end:
                raise self.damaged(tensor.offset, f"{what} overlaps {before}, which ends at {end}")
            end, before = tensor.offset + tensor.nbytes, f"tensor {tensor.name!r}"
            if end > self.data.size:
                raise self.damaged(
                    tensor.offset, f"{what} exceeds the file of {self.data.size} bytes"
                )

    def crc32(self, start: int, stop: int) -> str:
        """Return the checksum of the bytes from `start` to `stop` as eight hexadecimal digits."""
        with memoryview(self.buffer)[start:stop] as section:
            return f"{zlib.crc32(section):08x}"


def sha256_of_unchanged(path: str | os.PathLike[str], stamp: Any) -> str | None:
    """Return the hexadecimal digest of a file; None if it has changed since `stamp` was taken.

    Parameters
    ----------
    path : str or path-like
    stamp : dict
        `MappedFile.stamp`; anything else matches no file.
    """
    try:
        if _stamp(os.stat(path)) != stamp:  # before opening it: it may be a device by now
            return None
        total = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                total.update(piece)
            unchanged = _stamp(os.fstat(file.fileno())) == stamp
    except (OSError, ValueError):
        return None
    return total.hexdigest() if unchanged else None


def _stamp(status: os.stat_result) -> dict[str, int]:
    """Return numbers that change if the file is replaced or modified."""
    return {
        "inode": status.st_ino,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of these pairs; refuse equal keys, because readers disagree on which counts."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {reprlib.repr(name)} appears twice")
        result[name] = value
    return result


def _depth(value: Any) -> int:
    """Return the nesting depth of objects and lists, counted up to one beyond the limit."""
    depth, level = 0, [value]
    while level and depth <= _JSON_DEPTH:
        depth += 1
        inner: list[Any] = []
        for node in level:
            children = node.values() if isinstance(node, dict) else node
            inner += [child for child in children if isinstance(child, (dict, list))]
        level = inner
    return depth


def elements(shape: tuple[int, ...]) -> int:
    """Return the exact number of elements; NumPy's product could overflow."""
    count = 1
    for size in shape:
        count *= size
    return count


def little_endian(raw: NDArray[np.uint8], dtype: Any) -> NDArray[Any]:
    """Return the bytes as an aligned array of `dtype`; they are copied only if unaligned."""
    return np.require(raw.view(dtype), requirements="A")
