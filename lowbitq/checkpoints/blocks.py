"""Finished blocks of a model that is being quantized, kept in a folder for a second run.

    fingerprint.json   everything that determines the blocks
    block_NNNN.npz     arrays of a block and what is said of them, the same fingerprint, a digest

Each file is written atomically and synced to disk, so a process may be killed at any time, and two
may share the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq._core import FormatError
from lowbitq.checkpoints.archives import digest, load_arrays, save_arrays
from lowbitq.checkpoints.mapping import MappedFile
from lowbitq.checkpoints.packed import json_text
from lowbitq.checkpoints.writing import make_folder, new_file, remove
from lowbitq.tensors import aligned

FINGERPRINT = "fingerprint.json"

_BLOCK = r"block_\d{4,}\.npz"
_OWN = re.compile(rf"fingerprint\.json|{_BLOCK}|\.(fingerprint\.json|{_BLOCK})\.[0-9a-f]{{8}}\.new")


class Blocks:
    """Finished blocks in a folder.

    Parameters
    ----------
    folder : path
        Created if it is missing. Nothing is written to it if all blocks exist.
    fingerprint : mapping
        Everything that determines the blocks, serializable to JSON.

    Raises
    ------
    ValueError
        If the folder, or a block in it, has a different fingerprint.
    FormatError
        If something in it is damaged.
    OSError
        If it cannot be read or written.

    Examples
    --------
    >>> import tempfile
    >>> blocks = Blocks(tempfile.mkdtemp(), {"seed": 1})
    >>> blocks.load(0, ["q_proj"]) is None
    True
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(os.path.realpath(folder))
        self._fingerprint = json.loads(json_text(fingerprint))  # as it reads back
        make_folder(self.folder)
        path = self.folder / FINGERPRINT
        found = read_fingerprint(self.folder)
        if found is None:
            with new_file(path) as file:
                file.write(json_text(self._fingerprint))
        else:
            self._compare(path, found)
        for path in block_files(self.folder):  # fail now, not after hours
            with _naming(path), contextlib.suppress(FileNotFoundError):  # cleared by another run
                self._check(path, load_arrays(path, only="fingerprint"))

    def save(self, index: int, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keep a block.

        Parameters
        ----------
        index : int
        arrays : mapping of str to ndarray
            Of dtypes that NumPy knows; not named ``about``, ``fingerprint`` or ``sha256``.
        about : mapping
            What JSON can hold of each layer, by its name.
        """
        kept = dict(arrays)
        kept["about"] = np.array(json.dumps(about))
        kept["fingerprint"] = np.array(json.dumps(self._fingerprint))
        kept["sha256"] = np.array(digest(kept))
        make_folder(self.folder)  # another process may have finished and removed it
        save_arrays(self._path(index), kept)

    def load(
        self, index: int, names: Sequence[str]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """Return a block as it was given to `save`; None if it does not exist.

        Parameters
        ----------
        index : int
        names : sequence of str
            Its layers.
        """
        path = self._path(index)
        try:
            arrays, about = self._read(path)
        except FileNotFoundError:
            return None
        if list(about) != list(names):
            raise FormatError(f"{path}: holds {list(about)}, expected {list(names)}")
        packed = {name: array for name, array in arrays.items() if array.dtype == np.uint8}
        return arrays | {name: aligned(array) for name, array in packed.items()}, about

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:04}.npz"

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arrays of a block and their descriptions, checked."""
        arrays = load_arrays(path)
        with _naming(path):
            self._check(path, arrays)
            if str(arrays.pop("sha256")) != digest(arrays):
                raise FormatError(f"{path}: not as it was saved; remove it to recompute it")
            arrays.pop("fingerprint")
            return arrays, dict(json.loads(str(arrays.pop("about"))))

    def _check(self, path: Path, arrays: Mapping[str, Any]) -> None:
        """Compare a block's fingerprint with this run's."""
        fingerprint = json.loads(str(arrays["fingerprint"]))
        if not isinstance(fingerprint, dict):
            raise TypeError("its fingerprint is not a JSON object")
        self._compare(path, fingerprint)

    def _compare(self, path: Path, found: Mapping[str, Any]) -> None:
        if different := differences(found, self._fingerprint):
            raise ValueError(
                f"{path} is from another run, with different {' and '.join(different)}; "
                f"remove {self.folder} or choose another work_dir"
            )


def read_fingerprint(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the fingerprint of the blocks in a folder; None if there is none.

    Raises
    ------
    FormatError
        If it is damaged.
    """
    try:
        return MappedFile(Path(folder) / FINGERPRINT).json()
    except FileNotFoundError:
        return None


def block_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the paths of the blocks in a folder, in order; none if there is no such folder."""
    return sorted(p for p in Path(folder).glob("block_*.npz") if re.fullmatch(_BLOCK, p.name))


def remove_blocks(folder: str | os.PathLike[str]) -> None:
    """Remove the files of `Blocks` from a folder, and the folder if it is then empty."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if _OWN.fullmatch(name):
                remove(Path(folder) / name)
    with contextlib.suppress(OSError):  # not empty, or a link
        os.rmdir(folder)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, with the first few differing keys within them.

    Examples
    --------
    >>> differences({"plan": {"seed": 1, "norm": 2}, "isa": "avx2"}, {"plan": {"seed": 1}})
    ['plan (norm)', 'isa']
    """
    result = []
    for key in dict.fromkeys([*expected, *found]):
        old, new = found.get(key), expected.get(key)
        if old != new:
            within: list[str] = []
            if isinstance(old, dict) and isinstance(new, dict):
                within = differences(old, new)[:3]
            result.append(f"{key} ({', '.join(within)})" if within else key)
    return result


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an error caused by wrong contents into one that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a finished block: {error}") from error
