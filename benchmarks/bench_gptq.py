"""Hessians, GPTQ and coordinate descent, against BLAS and LAPACK with the same flops.

    python -m benchmarks.bench_gptq

The Hessian's baseline is one float32 syrk of the same shape (NumPy's x.T @ x). GPTQ's baseline is
its arithmetic without rounding: one float32 Cholesky factorisation, by LAPACK's spotrf
(np.linalg.cholesky takes several times as long), and one product of m n^2 operations. We run
`lowbitq.gptq` to 2 bits in groups of 64, with columns ordered by groups; table columns give scales
fitted by min-max and by least squares. Coordinate descent (two sweeps over the codes) and the error
measure multiply the errors of all weights by the Hessian; their baseline is that product in
float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy_openblas32
from numpy.typing import NDArray

from benchmarks.harness import Run, options_parser
from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.gptq import feedback, gptq
from lowbitq.quantizers import fit_shared, search_options

TOKENS = 8192
SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096)]  # SmolLM2-135M; larger
FORMAT = Format.parse("int2g64")
GOALS = {(4096, 4096): 1.5}  # times the time of BLAS and LAPACK


def hessian_row(run: Run, cols: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, cols), dtype=np.float32)
    weights = np.ones(TOKENS, np.float32)
    hessian = np.zeros((cols, cols))
    times = run.take_turns(
        {
            "plain": lambda: _core.hessian_add(x, None, hessian),
            "weighted": lambda: _core.hessian_add(x, weights, hessian),
            "syrk": lambda: x.T @ x,
        }
    )
    flops = TOKENS * cols * (cols + 1)
    columns = {
        "tokens": TOKENS,
        "cols": cols,
        "GFLOP/s": flops / times["plain"].least / 1e9,
        "weighted": flops / times["weighted"].least / 1e9,
        "x syrk": times["plain"].least / times["syrk"].least,
        "median": times["plain"].median / times["syrk"].median,
    }
    run.row("Hessian", columns)


def spotrf(matrix: NDArray[np.float32]) -> Callable[[], None]:
    """Return a call that factors a copy of a symmetric matrix with lowbitq's OpenBLAS."""
    files = sorted(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so*"))
    function = ctypes.CDLL(str(files[0])).scipy_spotrf_
    work = np.empty_like(matrix)
    order, info = ctypes.c_int(len(matrix)), ctypes.c_int()
    size = ctypes.byref(order)
    place = work.ctypes.data_as(ctypes.c_void_p)

    def call() -> None:
        np.copyto(work, matrix)
        function(b"U", size, place, size, ctypes.byref(info), ctypes.c_size_t(1))
        assert info.value == 0

    return call


def gptq_row(run: Run, rows: int, cols: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * cols, cols), dtype=np.float32)
    x *= np.exp(0.3 * rng.standard_normal(cols, np.float32))
    dense = x.T @ x
    hessian = dense.astype(np.float64)
    order = feedback(hessian, group=FORMAT.group).order
    importance = np.diagonal(dense).copy()
    weight = rng.standard_normal((rows, cols), dtype=np.float32)
    factor = np.empty(hessian.shape, np.float32)
    codes = np.empty(weight.shape, np.uint8)
    scale, offset = np.empty((2, rows, FORMAT.groups(cols)), np.float32)

    def solve(method: str) -> None:
        shared = fit_shared(weight, FORMAT, range=method)
        _core.gptq(
            shared.code(FORMAT), factor, order, None, weight, importance, codes, scale, offset,
            group=FORMAT.group, fixed=False, block=128, **search_options(range=method),
        )  # fmt: skip

    times = run.take_turns(
        {
            "factor": lambda: _core.gptq_factor(hessian, order, factor, damping=0.01, median=True),
            "minmax": lambda: solve("minmax"),
            "mse": lambda: solve("mse"),
            "cholesky": spotrf(dense),
            # Half of the square: each column takes feedback only from the columns before it.
            "product": lambda: weight @ dense[:, : cols // 2],
        }
    )
    least = {name: timing.least for name, timing in times.items()}
    median = {name: timing.median for name, timing in times.items()}
    columns = {
        "rows": rows,
        "cols": cols,
        "factor s": least["factor"],
        "minmax s": least["minmax"],
        "mse s": least["mse"],
        "minmax x": _over_blas(least, "minmax"),
        "minmax median": _over_blas(median, "minmax"),
        "mse x": _over_blas(least, "mse"),
        "mse median": _over_blas(median, "mse"),
    }
    run.row("GPTQ, x: over the time of BLAS and LAPACK", columns)
    if goal := GOALS.get((rows, cols)):
        for method in ("minmax", "mse"):
            solved = f"GPTQ by {method}, {rows}x{cols}"
            run.goal(f"{goal} times BLAS", solved, goal / columns[f"{method} x"], 1.0)


def descent_row(run: Run, rows: int, cols: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * cols, cols), dtype=np.float32)
    x[:, 1:] += x[:, :-1].copy()
    dense = x.T @ x
    hessian = dense.astype(np.float64)
    weight = rng.standard_normal((rows, cols), dtype=np.float32)
    inputs = feedback(hessian, group=FORMAT.group)
    tensor, _ = gptq(weight, inputs, FORMAT, sweeps=0)
    scale, offset, codes = tensor.scale, tensor.offset, np.empty(weight.shape, np.uint8)

    def descend() -> None:
        np.copyto(codes, tensor.codes)
        _core.refine(
            tensor.handle, hessian, weight, scale, offset, codes,
            group=FORMAT.group, damping=inputs.damping, sweeps=2,
        )  # fmt: skip

    times = run.take_turns(
        {
            "descent": descend,
            "error": lambda: _core.hessian_error(hessian, weight),
            "product": lambda: weight @ dense,
        },
        repetitions=max(1, run.options.repetitions // 4),
    )
    product = times.pop("product")
    columns: dict[str, float] = {"rows": rows, "cols": cols}
    for name, timing in times.items():
        columns[f"{name} s"] = timing.least
        columns[f"{name} x"] = timing.least / product.least
        columns[f"{name} median"] = timing.median / product.median
    run.row("Coordinate descent and errors, x: over one product", columns)


def _over_blas(seconds: dict[str, float], method: str) -> float:
    return (seconds["factor"] + seconds[method]) / (seconds["cholesky"] + seconds["product"])


def main() -> None:
    run = Run("gptq", options_parser(__doc__).parse_args())
    for cols in sorted({cols for _, cols in SHAPES}):
        hessian_row(run, cols)
    for shape in SHAPES:
        gptq_row(run, *shape)
    for shape in SHAPES:
        descent_row(run, *shape)
    run.finish()


if __name__ == "__main__":
    main()
