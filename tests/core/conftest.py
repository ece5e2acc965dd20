"""The C core without Python around it: csrc/core as a shared library for ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
STATUSES = ["OK", "BAD_VALUE", "BAD_SHAPE", "NO_MEMORY", "NOT_POSITIVE_DEFINITE", "BAD_FORMAT"]

# A pool of its own must not be handed to the OpenBLAS that _core uses, so this one has no BLAS.
NO_BLAS = (
    "void test_openblas_set_num_threads(int);void test_openblas_set_num_threads(int t){(void)t;}"
)


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> ctypes.CDLL:
    """Statuses, threads and memory, compiled with whatever sanitizers _core has."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("core")
    (folder / "no_blas.c").write_text(NO_BLAS)
    sanitize = os.environ.get("LOWBITQ_SANITIZE")
    subprocess.run(
        [
            *(compiler, "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-pthread"),
            *([f"-fsanitize={sanitize}", "-DLBQ_SANITIZE"] if sanitize else []),
            *("-DLBQ_BLAS_PREFIX=test_", f"-I{CSRC}", "-o", folder / "core.so"),
            *(CSRC / "core" / name for name in ["status.c", "threads.c", "memory.c"]),
            folder / "no_blas.c",
        ],
        check=True,
    )
    library = ctypes.CDLL(str(folder / "core.so"))
    library.lbq_message.restype = ctypes.c_char_p
    library.lbq_arena_take.restype = ctypes.c_void_p
    return library
