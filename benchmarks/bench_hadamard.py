"""Rotations: the fast transform against a plain pass over memory, and against a 2-bit layer.

    python -m benchmarks.bench_hadamard

The reference of the first two tables multiplies the same buffer by a number in place: it reads,
scales and writes each value once. The transform scales it, gives it a random sign and adds log2 n
times. At a ratio of 1, the transform costs no more than touching the data. If FFHT is found
(peers/README.md), `x FFHT` is its time over ours; it neither scales nor changes signs. The
reference of the third table is one token through a square layer of 2-bit weights. Both sides are
one call from Python, less the cost of an empty call.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Run, options_parser
from benchmarks.peers import ffht
from lowbitq import _core
from lowbitq.linears import QuantizedLinear
from lowbitq.rotations import Rotation
from lowbitq.tensors import QuantizedTensor

LENGTHS = [2**k for k in range(6, 15)]
STREAMED_LENGTHS = [1024, 4096, 16384]
SIZES = [576, 896, 960, 1536, 2560, 3584, 4864, 8960, 11008, 13696, 13824, 18944]
LARGEST_LAYER = 4864  # larger layers take longer to make than to measure
CACHED_BYTES = 2**18  # well inside a second-level cache
STREAMED_BYTES = 2**27  # well beyond a last-level cache
FFHT_GOALS = {n: 1.45 if n == 1024 else 1.3 for n in LENGTHS}
SCALE_GOAL = 0.5  # from memory
TOKEN_GOALS = {576: 0.12, 1536: 0.12, 4864: 0.12}  # of the layer


def transform(
    run: Run, table: str, n: int, size_bytes: int, library: ffht.Ffht | None
) -> dict[str, float]:
    """Compare transforms of rows of n numbers in a buffer with scaling the buffer and with FFHT."""
    rotation = Rotation(n)
    x = _core.aligned_empty(bytes=size_bytes).view(np.float32).reshape(-1, n)
    x[:] = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    one, nothing = np.float32(1), x[:0]
    zeros = _core.aligned_empty(bytes=size_bytes).view(np.float32).reshape(-1, n)
    zeros[:] = 0  # FFHT would overflow: it multiplies the length of a row by sqrt(n)
    calls = {
        "rotate": lambda: _core.rotate(rotation.handle, x),
        "scale": lambda: np.multiply(x, one, out=x),
        "rotate nothing": lambda: _core.rotate(rotation.handle, nothing),
        "scale nothing": lambda: np.multiply(nothing, one, out=nothing),
    }
    if library:
        calls |= {"FFHT": library.rows(zeros), "FFHT nothing": library.rows(zeros[:0])}
    times = {name: 1e6 / len(x) * np.array(t) for name, t in run.take_turns(calls).items()}
    least, median = times["rotate"] - times["rotate nothing"][0]
    columns = {"n": n, "us": least, "median": median}
    for name in ["scale", "FFHT"][: 1 + bool(library)]:
        reference = times[name][0] - times[f"{name} nothing"][0]
        columns |= {f"{name} us": reference, f"x {name}": reference / least}
    run.row(table, columns)
    return columns


def rotation_of_token(run: Run, n: int) -> None:
    """Compare the transform of one row with the layer that reads it."""
    rotation = Rotation(n)
    x = np.random.default_rng(0).standard_normal((1, n), dtype=np.float32)
    calls = {
        "rotate": lambda: _core.rotate(rotation.handle, x),
        "nothing": lambda: _core.rotate(rotation.handle, x[:0]),
    }
    if n <= LARGEST_LAYER:
        codes = np.random.default_rng(0).integers(0, 4, (n, n), dtype=np.uint8)
        scale = np.ones((n, -(-n // 64)), np.float32)
        layer = QuantizedLinear.of(QuantizedTensor.pack("int2g64sym", codes, scale=scale))
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
    if goal := TOKEN_GOALS.get(n):
        run.goal(f"{goal:.0%} of a 2-bit layer", f"rotating {n}", goal * gemv / least, 1.0)


def main() -> None:
    run = Run("hadamard", options_parser(__doc__).parse_args())
    library = ffht.load()
    for n in LENGTHS:
        found = transform(run, "rows in cache", n, CACHED_BYTES, library)
        if library:
            run.goal(f"rows of {n}", "FFHT", found["x FFHT"], FFHT_GOALS[n])
    for n in STREAMED_LENGTHS:
        found = transform(run, "rows from memory", n, STREAMED_BYTES, library)
        run.goal(f"rows of {n} from memory", "scaling them", found["x scale"], SCALE_GOAL)
    for n in SIZES:
        rotation_of_token(run, n)
    run.finish()


if __name__ == "__main__":
    main()
