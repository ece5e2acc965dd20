"""Folders for other programs, written atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lowbitq.checkpoints.safetensors import CONFIG, SINGLE
from lowbitq.checkpoints.writing import hidden_sibling, replace_folder, sync

# What such a folder may hold. Anything else is a user's, who would miss it.
_FILES = frozenset(
    [
        CONFIG,
        SINGLE,
        "chat_template.jinja",
        "generation_config.json",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
)


@contextlib.contextmanager
def new_folder_for_others(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden sibling of `path` to write into; at the end it becomes `path`.

    After an exception, nothing is left behind and `path` is unchanged.

    Parameters
    ----------
    path : str or path-like
        Missing, or an empty folder.
    overwrite : bool
        Whether `path` may also be a folder that holds only files that this package writes for other
        programs. It is replaced in one step.

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
    >>> with new_folder_for_others(path, overwrite=False) as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    >>> [file.name for file in path.iterdir()]
    ['config.json']
    """
    path = Path(os.path.realpath(path))
    check_free(path, overwrite=overwrite)
    with hidden_sibling(path, folder=True) as fresh:
        yield fresh
        for file in [*sorted(fresh.iterdir()), fresh]:
            sync(file)
        check_free(path, overwrite=overwrite)  # again, because writing takes a while
        replace_folder(fresh, path)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if `new_folder_for_others` at `path` would delete something."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file")
    present = sorted(file.name for file in path.iterdir())
    if not present:
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; overwrite=True or --force replaces it")
    if others := sorted(set(present) - _FILES):
        raise FileExistsError(f"{path} holds {others[0]}, which no export writes")
