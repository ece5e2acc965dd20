"""NumPy archives (.npz) that are written atomically and checked when they are read."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.checkpoints.writing import new_file


class Arrays:
    """Arrays in memory that are read like those of a saved model's folder.

    Attributes
    ----------
    tensors : mapping of str to ndarray
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.tensors = tensors

    def view(self, name: str) -> NDArray[Any]:
        """Return an array; KeyError if there is none of this name."""
        return self.tensors[name]

    def load(self, name: str) -> NDArray[np.float32]:
        """Return an array of floats as float32."""
        return np.asarray(self.tensors[name], np.float32)


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write arrays to an ``.npz`` file, atomically and synced to disk.

    Raises
    ------
    OSError
        If the file cannot be written; the message names it.
    """
    with new_file(path) as file:
        np.savez(file, **arrays)


def load_arrays(path: str | os.PathLike[str], only: str | None = None) -> dict[str, NDArray[Any]]:
    """Read what `save_arrays` wrote, or one array of it.

    Raises
    ------
    OSError
        If there is no such file or the disk fails.
    FormatError
        If it is damaged or not an archive of plain arrays. Contradictory sizes are found before
        memory is allocated, other damage by the checksum of each array.

    Examples
    --------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "a.npz")
    >>> save_arrays(path, {"a": np.arange(3)})
    >>> load_arrays(path)
    {'a': array([0, 1, 2])}
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                # zipfile also accepts an archive that does not start at the file's first byte.
                if min((member.header_offset for member in members), default=0):
                    raise ValueError("bytes before the first array")
                if any(member.comment for member in members):  # may hide entries after it
                    raise ValueError("an entry has a comment, expected none")
                named = {member.filename.removesuffix(".npy"): member for member in members}
                chosen = named if only is None else {only: named[only]}
                return {name: _array(archive, member) for name, member in chosen.items()}
        except MemoryError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # raised by a seek to an invalid offset
                raise
            raise FormatError(f"{path}: damaged: {error.strerror}") from error
        except Exception as error:  # zipfile and NumPy raise anything on damaged files
            raise FormatError(f"{path}: {error}") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"{member.filename} is not an array of version 1.0")
        shape, _, dtype = npy.read_array_header_1_0(file)
        size, expected = member.file_size - file.tell(), dtype.itemsize
        for length in shape:
            expected *= length
        if dtype.hasobject or size != expected or member.compress_size != member.file_size:
            found = f"{dtype} of shape {shape} in {size} bytes"
            raise ValueError(f"{member.filename} is damaged or not a plain array: {found}")
    with archive.open(member) as file:
        array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
        file.read()  # zipfile compares the checksum at the end
        return array


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256, in hexadecimal, of names, dtypes, shapes and contents.

    Examples
    --------
    >>> digest({"a": np.zeros((2, 3))}) == digest({"a": np.zeros((3, 2))})
    False
    """
    total = hashlib.sha256()
    for name, array in arrays.items():
        total.update(repr((name, array.dtype.str, array.shape)).encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()
