"""Files and folders that are written atomically and synced to disk.

Each is written as a hidden sibling ``.NAME.HEX.new`` and renamed at the end. Its writer holds a
lock on it, so the next writer can recognise and remove the remains of a killed one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield an open file that becomes `path` at the end; links are followed.

    After an exception, `path` is unchanged.

    Parameters
    ----------
    path : str or path-like
        An existing file is replaced in one step.

    Yields
    ------
    file
        Empty, open for writing in binary.

    Raises
    ------
    OSError
        If it cannot be written; the message names `path`.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with new_file(path) as file:
    ...     _ = file.write(b"whole")
    >>> path.read_text()
    'whole'
    """
    path = Path(os.path.realpath(path))
    with hidden_sibling(path, folder=False) as fresh, open(fresh, "r+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(fresh, path)
        sync(path.parent)


@contextlib.contextmanager
def hidden_sibling(path: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a new, locked file or folder beside `path`; parents are created.

    At the end it is removed, unless it has been renamed.

    Raises
    ------
    OSError
        If something cannot be written; the message names `path`.
    """
    try:
        make_folder(path.parent)
        _remove_litter(path)
        fresh, lock = _locked(path, folder=folder)
        try:
            yield fresh
        finally:
            remove(fresh)
            os.close(lock)
    except OSError as error:
        hidden = str(path.with_name(f".{path.name}."))
        # An error without a number is not from the system and has its own message.
        if error.errno is None or not str(error.filename or hidden).startswith(hidden):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and sync them to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(fresh: Path, path: Path) -> None:
    """Rename a folder from `hidden_sibling` to `path`; an existing folder is replaced in one step.

    If the file system cannot exchange two names, the old folder is named ``.NAME.HEX.old`` for an
    instant.
    """
    try:
        fresh.rename(path)  # works if `path` is missing or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(fresh, path):
            _step_aside(fresh, path)
    sync(path.parent)
    for old in _siblings(path, "old"):
        if not old.with_suffix(".new").exists():  # else its writer may want it back
            remove(old)


def _step_aside(fresh: Path, path: Path) -> None:
    old = fresh.with_suffix(".old")
    try:
        path.rename(old)
        fresh.rename(path)
    except BaseException:
        if not path.exists():
            old.rename(path)
        raise


def _locked(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Create a file or folder ``.NAME.HEX.new``; return it and the descriptor of its lock."""
    while True:
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        if folder:
            fresh.mkdir()
        else:
            fresh.touch(exist_ok=False)
        # Until it is locked, another writer may remove it as litter.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(fresh, os.O_RDONLY)
            with contextlib.suppress(OSError):  # without locks, nobody removes anything
                fcntl.flock(lock, fcntl.LOCK_EX)
            if fresh.exists():
                return fresh, lock
            os.close(lock)


def _siblings(path: Path, ending: str) -> list[Path]:
    """Return the existing paths ``.NAME.HEX.ENDING``."""
    name = re.compile(re.escape(f".{path.name}.") + rf"[0-9a-f]{{8}}\.{ending}")
    try:
        return [path.with_name(entry) for entry in os.listdir(path.parent) if name.fullmatch(entry)]
    except OSError:  # a folder may be writable but not readable
        return []


def _remove_litter(path: Path) -> None:
    """Remove the remains of killed writers of `path`."""
    for sibling in _siblings(path, "new"):
        with contextlib.suppress(OSError):
            _remove_unlocked(sibling)


def _remove_unlocked(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path)
    finally:
        os.close(lock)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents; do nothing if it does not exist."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0)
