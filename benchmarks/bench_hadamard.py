"""Rotations: the fast transform against a plain pass over memory, and against a 2-bit layer.

    python -m benchmarks.bench_hadamard

The reference of the first two tables multiplies the same buffer by a number, in place: each value
read, scaled and written once, while the transform scales it, gives it a random sign and adds log2 n
times. A ratio of 1 would be a transform at the cost of touching the data. The reference of the
third table is one token through a square layer of 2-bit weights; both sides are one call from
Python, the cost of an empty call taken off.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Run, options_parser
from lowbitq import _core
from lowbitq.linears import QuantizedLinear
from lowbitq.rotations import Rotation
from lowbitq.tensors import QuantizedTensor

LENGTHS = [2**k for k in range(6, 15)]
STREAMED_LENGTHS = [1024, 4096, 16384]
SIZES = [576, 896, 960, 1536, 2560, 3584, 4864, 8960, 11008, 13696, 13824, 18944]
LARGEST_LAYER = 4864  # beyond it the layer takes longer to make than to measure
CACHED_BYTES = 2**18  # well inside a second-level cache
STREAMED_BYTES = 2**27  # well outside a last-level one


def transform(run: Run, table: str, n: int, size_bytes: int) -> None:
    """Rows of n numbers in a buffer of that size, against scaling the buffer."""
    rotation = Rotation(n)
    x = _core.aligned_empty(bytes=size_bytes).view(np.float32).reshape(-1, n)
    x[:] = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    one, nothing = np.float32(1), x[:0]
    times = run.take_turns(
        {
            "rotate": lambda: _core.rotate(rotation.handle, x),
            "scale": lambda: np.multiply(x, one, out=x),
            "rotate nothing": lambda: _core.rotate(rotation.handle, nothing),
            "scale nothing": lambda: np.multiply(nothing, one, out=nothing),
        }
    )
    ours, scale, no_rotation, no_scale = (1e6 / len(x) * np.array(t) for t in times.values())
    (least, median), reference = ours - no_rotation[0], scale[0] - no_scale[0]
    columns = {
        "n": n,
        "us": least,
        "median": median,
        "scale us": reference,
        "x scale": reference / least,
    }
    run.row(table, columns)


def rotation_of_token(run: Run, n: int) -> None:
    """One row, against the layer that reads it."""
    rotation = Rotation(n)
    x = np.random.default_rng(0).standard_normal((1, n), dtype=np.float32)
    calls = {
        "rotate": lambda: _core.rotate(rotation.handle, x),
        "nothing": lambda: _core.rotate(rotation.handle, x[:0]),
    }
    if n <= LARGEST_LAYER:
        codes = np.random.default_rng(0).integers(0, 4, (n, n), dtype=np.uint8)
        scale = np.ones((n, -(-n // 64)), np.float32)
        layer = QuantizedLinear(QuantizedTensor.pack("int2g64sym", codes, scale=scale))
        token, y = np.ones((1, n), np.float32), np.empty((1, n), np.float32)
        calls["layer"] = lambda: _core.linear_forward(layer.handle, token, y)
    times = {name: 1e6 * np.array(time) for name, time in run.take_turns(calls).items()}
    least, median = times["rotate"] - times["nothing"][0]
    gemv = times["layer"][0] - times["nothing"][0] if "layer" in times else float("nan")
    columns = {
        "n": n,
        "us": least,
        "median": median,
        "gemv us": gemv,
        "of gemv": least / gemv,
        "orders": " ".join(map(str, rotation.orders)),
    }
    run.row("one token", columns)


def main() -> None:
    run = Run("hadamard", options_parser(__doc__).parse_args())
    for n in LENGTHS:
        transform(run, "rows in cache", n, CACHED_BYTES)
    for n in STREAMED_LENGTHS:
        transform(run, "rows from memory", n, STREAMED_BYTES)
    for n in SIZES:
        rotation_of_token(run, n)
    run.finish()


if __name__ == "__main__":
    main()
