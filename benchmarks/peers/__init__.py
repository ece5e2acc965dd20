"""Other people's code to compare with, used if it is found; README.md explains how to get it."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

VARIABLE = "LOWBITQ_PEERS"  # folders, separated as in PYTHONPATH
LOOPS = Path(__file__).with_name("loops.c")


def find(pattern: str) -> Path | None:
    """Return the first match of a pattern in the folders of LOWBITQ_PEERS, then of Python."""
    folders = os.environ.get(VARIABLE, "").split(os.pathsep)
    for folder in [folder for folder in [*folders, *sys.path] if folder]:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    return None


def compiled(sources: Sequence[Path], *flags: str) -> ctypes.CDLL:
    """Compile C files for this CPU into a library for this process, and load it."""
    library = _scratch() / f"{sources[0].stem}.so"
    compiler = os.environ.get("CC", "cc")
    options = ["-O3", "-march=native", "-fPIC", "-shared", *flags]
    subprocess.run([compiler, *options, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lowbitq-peers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
