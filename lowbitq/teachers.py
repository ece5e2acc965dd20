"""Teachers: what a float model says about windows of text, computed when asked for or kept on disk.

A folder of a kept teacher has its fingerprint (the model and the text) and, for all windows,

    hidden.npy       (windows, window, hidden) float32, what the head reads
    block_NNNN.npy   alike, the residual stream behind block NNNN
    top_tokens.npy, top_logs.npy, top_excess.npy   instead of hidden.npy, the parts of a
                     `lowbitq.top_k.Top`: (windows, window, 2 k) int32, float32; without the last

all mapped. The input of the head takes 4 hidden bytes a token and says everything: the same bits as
a live teacher. A Top takes 16 k bytes, which is less if k is below hidden / 4; it saves the
product with the teacher's head, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq._core import FormatError
from lowbitq.checkpoints.archives import digest
from lowbitq.checkpoints.blocks import differences
from lowbitq.checkpoints.writing import hidden_sibling, replace_folder, sync
from lowbitq.models.decoder import Model
from lowbitq.models.stored import LayerWriter
from lowbitq.top_k import Top, most_probable
from lowbitq.version import __version__

Array = NDArray[np.float32]
Tokens = NDArray[np.int32]

_FINGERPRINT = "teacher.json"


@dataclass(frozen=True)
class Seen:
    """What a teacher says about a window.

    Attributes
    ----------
    hidden : ndarray of shape (t, hidden), float32, or None
        What its head reads; None: there is `top` instead.
    top : Top or None
        Its most probable tokens.
    states : dict of int to ndarray of shape (t, hidden), float32
        By block: the residual stream behind it, not rotated unless the teacher is.
    """

    hidden: Array | None
    top: Top | None = None
    states: dict[int, Array] = field(default_factory=dict)


class Teacher:
    """A float model that is run when it is asked.

    Parameters
    ----------
    model : Model
    rows : ndarray of shape (windows, window), int32
    blocks : sequence of int, default=()
        The blocks whose states are wanted.
    remember : collection of int, default=()
        Windows that are asked for again and again; what it says about them stays in memory.
    """

    def __init__(
        self, model: Model, rows: Tokens, blocks: Sequence[int] = (), remember: Iterable[int] = ()
    ) -> None:
        self.model, self.rows, self.blocks = model, rows, tuple(blocks)
        self._remember = frozenset(remember)
        self._known: dict[int, Seen] = {}

    def see(self, window: int) -> Seen:
        """Run a window, given by its index."""
        if window in self._known:
            return self._known[window]
        states: dict[int, Array] = {}
        if self.blocks:
            x = self.model.embed(self.rows[window])
            for index in range(len(self.model.blocks)):
                self.model.block_forward(index, x)
                if index in self.blocks:
                    states[index] = x.copy()
            found = Seen(self.model.finish(x), states=states)
        else:
            found = Seen(self.model.hidden(self.rows[window]))
        if window in self._remember:
            self._known[window] = found
        return found


class KeptTeacher:
    """A teacher whose states are on disk; its model is not run again.

    Parameters
    ----------
    teacher : Teacher
    folder : path
        Made by the first run, atomically, and read by later ones.
    top_k : int, default=None
        Keep this many of the most probable tokens, and as many others, instead of what the head
        reads.
    progress : callable, default=None
        Called with the number of finished windows and of all, if they have to be run.

    Raises
    ------
    ValueError
        If the folder is of another teacher or text, or has other states.
    FormatError
        If it is damaged.

    Examples
    --------
    >>> kept = KeptTeacher(Teacher(model, rows), "teacher")  # doctest: +SKIP
    >>> kept.see(0).hidden.shape  # doctest: +SKIP
    (512, 576)
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | os.PathLike[str],
        *,
        top_k: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        folder = Path(folder)
        self.model, self.rows, self.blocks = teacher.model, teacher.rows, teacher.blocks
        fingerprint = _fingerprint(teacher, top_k)
        if not (folder / _FINGERPRINT).exists():
            _write(teacher, folder, fingerprint, top_k, progress)
        found = _read_json(folder / _FINGERPRINT)
        if different := differences(found, fingerprint):
            raise ValueError(
                f"{folder} keeps what another teacher said, with different "
                f"{' and '.join(different)}; remove it or choose another folder"
            )
        shapes = _shapes(teacher, top_k)
        self._arrays = {name: _mapped(folder / f"{name}.npy", *shapes[name]) for name in shapes}

    def see(self, window: int) -> Seen:
        """Return what is kept of a window, given by its index."""
        arrays = {name: array[window] for name, array in self._arrays.items()}
        states = {index: arrays[_block(index)] for index in self.blocks}
        if "hidden" in arrays:
            return Seen(arrays["hidden"], states=states)
        return Seen(None, Top(*(arrays[f"top_{part}"] for part in Top._fields)), states)


def arrays_of(model: Model) -> dict[str, NDArray[Any]]:
    """Return all arrays of a model, by name; their `digest` identifies it."""
    writer = LayerWriter()
    entries = {name: writer.layer(name, linear) for name, linear in model.matrices()}
    arrays = writer.arrays | {"final_norm": model.final_norm}
    for index, block in enumerate(model.blocks):
        gains = {f"{index}.{i}": gain for i, gain in enumerate(block.norms) if gain is not None}
        arrays |= gains
    about = [entries, repr(model.config), repr(model.residual_rotation)]
    return arrays | {"about": np.array(json.dumps(about))}


def _block(index: int) -> str:
    return f"block_{index:04}"


def _shapes(teacher: Teacher, top_k: int | None) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each kept array."""
    windows = teacher.rows.shape
    states = (*windows, teacher.model.config.hidden_size), np.float32
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {_block(i): states for i in teacher.blocks}
    if top_k is None:
        return {"hidden": states} | shapes
    some = (*windows, 2 * top_k)
    top: dict[str, tuple[tuple[int, ...], Any]] = {
        "top_tokens": (some, np.int32),
        "top_logs": (some, np.float32),
        "top_excess": (windows, np.float32),
    }
    return top | shapes


def _fingerprint(teacher: Teacher, top_k: int | None) -> dict[str, Any]:
    known = {
        "version": __version__,
        "instruction set": _core.config()["isa"],
        "teacher": digest(arrays_of(teacher.model)),
        "text": digest({"rows": teacher.rows}),
        "blocks": teacher.blocks,
        "top_k": top_k,
    }
    return dict(json.loads(json.dumps(known)))


def _write(
    teacher: Teacher,
    folder: Path,
    fingerprint: dict[str, Any],
    top_k: int | None,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Run all windows, one at a time."""
    folder = Path(os.path.realpath(folder))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} has other files, expected a kept teacher or an empty folder")
    with hidden_sibling(folder, folder=True) as fresh:
        arrays = {
            name: np.lib.format.open_memmap(fresh / f"{name}.npy", "w+", dtype, shape)
            for name, (shape, dtype) in _shapes(teacher, top_k).items()
        }
        for window in range(len(teacher.rows)):
            seen = teacher.see(window)
            assert seen.hidden is not None
            parts: dict[str, Any] = {_block(index): x for index, x in seen.states.items()}
            if top_k is None:
                parts["hidden"] = seen.hidden
            else:
                top = most_probable(teacher.model, seen.hidden, top_k, seed=window)
                parts |= {f"top_{part}": array for part, array in top._asdict().items()}
            for name, part in parts.items():
                arrays[name][window] = part
            if progress is not None:
                progress(window + 1, len(teacher.rows))
        for array in arrays.values():
            array.flush()
        (fresh / _FINGERPRINT).write_text(json.dumps(fingerprint))
        for path in fresh.iterdir():
            sync(path)
        replace_folder(fresh, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    try:
        array = np.lib.format.open_memmap(path, "r")
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        expected = f"{np.dtype(dtype)} of shape {shape}"
        raise FormatError(f"{path} has {array.dtype} of shape {array.shape}, expected {expected}")
    return np.asarray(array)
