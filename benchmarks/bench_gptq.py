"""Hessians and GPTQ, against what BLAS and LAPACK need for the same flops.

    python -m benchmarks.bench_gptq

The Hessian's baseline is one float32 syrk of the same shape (NumPy's x.T @ x). GPTQ's is one
float32 Cholesky factorisation and one product of m n^2 multiplications: what its arithmetic would
cost without rounding. Scales are fitted by min-max in one column and by least squares in the next.
"""

from __future__ import annotations

import os
import subprocess

THREADS = os.environ.setdefault("LOWBITQ_NUM_THREADS", "1")
os.environ["OPENBLAS_NUM_THREADS"] = THREADS  # NumPy's own

import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from lowbitq import _core, show_config  # noqa: E402

TOKENS = 8192
SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]  # SmolLM2-135M; one larger
GROUP = 64
REPETITIONS = 5
CODE: dict[str, Any] = {
    "count": 16,
    "symmetric": False,
    "zero": 0.0,
    "scale_bits": 16,
    "gamma": 0.0,
}
RANGE: dict[str, Any] = {
    "clip": 1.0,
    "percentile": 100.0,
    "candidates": 20,
    "shrink": 0.8,
    "norm": 2.0,
}


def best_of(*functions: Callable[[], object]) -> list[float]:
    """Fewest seconds of each function, called in turn: of the processor with one thread."""
    clock = time.process_time if THREADS == "1" else time.perf_counter
    seconds = [np.inf] * len(functions)
    for _ in range(REPETITIONS):
        for i, function in enumerate(functions):
            start = clock()
            function()
            seconds[i] = min(seconds[i], clock() - start)
    return seconds


def hessian_row(cols: int) -> str:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, cols), dtype=np.float32)
    weights = np.ones(TOKENS, np.float32)
    hessian = np.zeros((cols, cols))
    plain, weighted, syrk = best_of(
        lambda: _core.hessian_add(x, None, hessian),
        lambda: _core.hessian_add(x, weights, hessian),
        lambda: x.T @ x,
    )
    rates = [TOKENS * cols * (cols + 1) / seconds / 1e9 for seconds in (plain, weighted)]
    return f"{TOKENS:6} {cols:5} {rates[0]:8.1f} {rates[1]:8.1f} {plain / syrk:7.2f}"


def gptq_row(rows: int, cols: int) -> str:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * cols, cols), dtype=np.float32)
    dense = x.T @ x
    hessian = dense.astype(np.float64)
    weight = rng.standard_normal((rows, cols), dtype=np.float32)
    factor = np.empty_like(hessian)
    codes = np.empty(weight.shape, np.uint8)
    scale, offset = np.empty((2, rows, -(-cols // GROUP)), np.float32)

    def solve(method: str) -> None:
        _core.gptq(
            factor, None, weight, None, None, codes, scale, offset, group=GROUP, fixed=False,
            method=method, block=128, float64=False, **CODE, **RANGE,
        )  # fmt: skip

    factoring, *solving, cholesky, product = best_of(
        lambda: _core.gptq_factor(hessian, None, factor, damping=0.01, median=False),
        lambda: solve("minmax"),
        lambda: solve("mse"),
        lambda: np.linalg.cholesky(dense),
        # Half of the square: each column takes feedback from those before it only.
        lambda: weight @ dense[:, : cols // 2],
    )
    ratios = [(factoring + seconds) / (cholesky + product) for seconds in solving]
    return (
        f"{rows:6} {cols:5} {factoring:8.4f} {solving[0]:8.4f} {solving[1]:8.4f} "
        f"{ratios[0]:7.2f} {ratios[1]:7.2f}"
    )


def main() -> None:
    config = show_config()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    print(f"{config['isa']}, {config['blas_core']}, {THREADS} threads, {commit.stdout.strip()}")
    print("tokens  cols  GFLOP/s weighted  x syrk")
    for cols in sorted({cols for _, cols in SHAPES}):
        print(hessian_row(cols))
    print("  rows  cols factor s minmax s    mse s  x BLAS  x BLAS")
    for shape in SHAPES:
        print(gptq_row(*shape))


if __name__ == "__main__":
    main()
