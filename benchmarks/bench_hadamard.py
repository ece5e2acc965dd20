"""Rotations: the fast transform against a plain pass over memory, and against a 2-bit layer.

    python -m benchmarks.bench_hadamard [--json]

One thread, its CPU time, candidate and reference in turn, 30 times; each figure is the minimum
with the median behind it. The reference of the first two tables multiplies the same buffer by a
number, in place: each value read, scaled and written once, while the transform scales it, gives it
a random sign and adds log2 n times. A ratio of 1 would be a transform at the cost of touching the
data. The reference of the third table is one token through a square layer of 2-bit weights; both
sides are one call from Python, the cost of an empty call taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

import lowbitq as lq
from benchmarks import machine
from lowbitq import _core
from lowbitq.linears import QuantizedLinear
from lowbitq.rotations import Rotation
from lowbitq.tensors import QuantizedTensor

LENGTHS = [2**k for k in range(6, 15)]
SIZES = [576, 896, 960, 1536, 2560, 3584, 4864, 8960, 11008, 13696, 13824, 18944]
LARGEST_LAYER = 4864  # beyond it the layer takes longer to make than to measure
CACHED_BYTES = 2**18  # well inside a second-level cache
STREAMED_BYTES = 2**27  # well outside a last-level one
REPETITIONS = 30


@dataclass(frozen=True)
class Timing:
    """Microseconds per row: of the candidate, of the reference, and their ratio."""

    table: str
    n: int
    orders: tuple[int, ...]
    us: float
    us_median: float
    reference_us: float
    ratio: float


def seconds(run: Callable[[], object], times: int) -> float:
    """CPU time of this thread per run."""
    start = time.thread_time_ns()
    for _ in range(times):
        run()
    return (time.thread_time_ns() - start) * 1e-9 / times


def in_turn(runs: list[Callable[[], object]], *, repetitions: int = REPETITIONS) -> np.ndarray:
    """Seconds (repetitions, runs), each sample at least about 50 us long."""
    for run in runs:
        run()
    times = [max(1, round(5e-5 / (seconds(run, 1) + 1e-9))) for run in runs]
    return np.array(
        [[seconds(r, t) for r, t in zip(runs, times, strict=True)] for _ in range(repetitions)]
    )


def transform(table: str, n: int, size_bytes: int, repetitions: int = REPETITIONS) -> Timing:
    """Rows of n numbers in a buffer of that size, against scaling the buffer."""
    rotation = Rotation(n)
    x = _core.aligned_empty(bytes=size_bytes).view(np.float32).reshape(-1, n)
    x[:] = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    one, nothing = np.float32(1), x[:0]
    taken = in_turn(
        [
            lambda: _core.rotate(rotation.handle, x),
            lambda: np.multiply(x, one, out=x),
            lambda: _core.rotate(rotation.handle, nothing),
            lambda: np.multiply(nothing, one, out=nothing),
        ],
        repetitions=repetitions,
    )
    ours, scale = (taken[:, :2] - taken[:, 2:].min(0)).T * 1e6 / len(x)
    return Timing(table, n, (), ours.min(), median(ours), scale.min(), scale.min() / ours.min())


def rotation_of_token(n: int) -> Timing:
    """One row, against the layer that reads it."""
    rotation = Rotation(n)
    x = np.random.default_rng(0).standard_normal((1, n), dtype=np.float32)
    runs = [lambda: _core.rotate(rotation.handle, x), lambda: _core.rotate(rotation.handle, x[:0])]
    if n <= LARGEST_LAYER:
        codes = np.random.default_rng(0).integers(0, 4, (n, n), dtype=np.uint8)
        scale = np.ones((n, -(-n // 64)), np.float32)
        layer = QuantizedLinear(QuantizedTensor.pack("int2g64sym", codes, scale=scale))
        token, y = np.ones((1, n), np.float32), np.empty((1, n), np.float32)
        runs.append(lambda: _core.linear_forward(layer.handle, token, y))
    taken = in_turn(runs) * 1e6
    empty = taken[:, 1].min()
    ours = taken[:, 0] - empty
    gemv = taken[:, 2].min() - empty if len(runs) == 3 else float("nan")
    return Timing(
        "token", n, rotation.orders, ours.min(), median(ours), gemv, float(ours.min() / gemv)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    lq.set_num_threads(1)
    about = {**machine(), "load": round(os.getloadavg()[0], 1)}

    timings = [transform("cached", n, CACHED_BYTES) for n in LENGTHS]
    timings += [transform("streamed", n, STREAMED_BYTES, 20) for n in (1024, 4096, 16384)]
    timings += [rotation_of_token(n) for n in SIZES]
    if arguments.json:
        json.dump({**about, "timings": [asdict(t) for t in timings]}, sys.stdout, indent=1)
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    titles = {
        "cached": "rows in cache                    scale     ratio",
        "streamed": "rows from memory                 scale     ratio",
        "token": "one token                         gemv     share  orders",
    }
    for table, title in titles.items():
        print(f"\n{'n':>6} {'us':>9} {'median':>9}  {title}")
        for t in (t for t in timings if t.table == table):
            orders = " ".join(map(str, t.orders))
            print(
                f"{t.n:6} {t.us:9.3f} {t.us_median:9.3f} {'':17} {t.reference_us:19.3f} "
                f"{t.ratio:9.3f}  {orders}"
            )


if __name__ == "__main__":
    main()
