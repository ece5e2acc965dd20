"""The C core without Python around it: csrc/core as a shared library for ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FILES = ["status", "interrupt", "threads", "memory", "blas"]

# Replaces OpenBLAS: cblas_sgemv holds a buffer and, with two threads, calls the callback;
# cblas_sgemm takes alpha seconds.
FAKE_BLAS = """
#include <stdatomic.h>
#include <unistd.h>
#include "core/blas.h"
static lbq_blas_threads callback;
static int threads = 2, held;
int fake_most_held;
atomic_int fake_running, fake_most_running;
void fake_openblas_set_num_threads(int count) { threads = count; }
void fake_openblas_set_threads_callback_function(lbq_blas_threads function) { callback = function; }
void fake_cblas_sgemv(int order, int trans, int m, int n, float alpha, const float *a, int lda,
                      const float *x, int incx, float beta, float *y, int incy)
{
    if (++held > fake_most_held)
        fake_most_held = held;
    if (threads > 1)
        callback(1, 0, threads, 0, 0, 0);
    held--;
}
void fake_cblas_sgemm(int order, int transa, int transb, int m, int n, int k, float alpha,
                      const float *a, int lda, const float *b, int ldb, float beta, float *c,
                      int ldc)
{
    const int now = ++fake_running;
    if (now > fake_most_running)
        fake_most_running = now;
    usleep((unsigned)(alpha * 1e6f));
    fake_running--;
}
void fake_cblas_dgemm(int order, int transa, int transb, int m, int n, int k, double alpha,
                      const double *a, int lda, const double *b, int ldb, double beta, double *c,
                      int ldc)
{
}
"""


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> ctypes.CDLL:
    """FILES, compiled with the same sanitizers as _core."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("core")
    (folder / "fake_blas.c").write_text(FAKE_BLAS)
    sanitize = os.environ.get("LOWBITQ_SANITIZE")
    subprocess.run(
        [
            *(compiler, "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-pthread"),
            *([f"-fsanitize={sanitize}", "-DLBQ_SANITIZE"] if sanitize else []),
            *("-DLBQ_BLAS_PREFIX=fake_", f"-I{CSRC}", "-o", folder / "core.so"),
            *(CSRC / "core" / f"{name}.c" for name in FILES),
            folder / "fake_blas.c",
        ],
        check=True,
    )
    library = ctypes.CDLL(str(folder / "core.so"))
    library.lbq_message.restype = ctypes.c_char_p
    library.lbq_arena_take.restype = ctypes.c_void_p
    return library
