"""Packed linear layers against OpenBLAS on the same shape, and against reading memory.

    python -m benchmarks.bench_linear
    python -m benchmarks.bench_linear --isa avx2

Everything is in cache. Weights per second count rows * cols * tokens. `x BLAS` is the time of the
float32 layer over ours. `--stream` walks through so many copies of a 4096 x 4096 layer that none is
in cache; there `x read` is our GB/s over that of a float32 matrix-vector product, which does little
but read.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Run, options_parser
from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.tensors import QuantizedTensor

SHAPES = ["576x576", "1536x576", "576x1536", "4096x4096"]  # SmolLM2-135M, 7B
TOKENS = [1, 64, 2048]
FORMATS = ["int1g64", "int2g64", "int2g64sym", "int3g64", "int4g64", "int8g64", "ternaryg64"]
STREAM_BYTES = 256 << 20  # several times the last-level cache


def random_layer(format: Format, rows: int, cols: int) -> QuantizedLinear:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, format.levels, (rows, cols), dtype=np.uint8)
    scale = np.full((rows, format.groups(cols)), 2.0**-6, np.float32)
    offset = None if format.symmetric else -scale
    return QuantizedLinear(QuantizedTensor.pack(format, codes, scale, offset))


def product(layer, x, y):
    handle = layer.handle
    return lambda: _core.linear_forward(handle, x, y)


def bench_cached(run, shape, tokens, formats):
    """One row per format, after one for the float32 layer."""
    rows, cols = (int(n) for n in shape.split("x"))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    y = np.empty((tokens, rows), np.float32)
    layers = {"float32": Linear(rng.standard_normal((rows, cols), dtype=np.float32))}
    layers |= {str(f): random_layer(f, rows, cols) for f in formats}
    times = run.take_turns({name: product(layer, x, y) for name, layer in layers.items()})
    for name, time in times.items():
        columns = {
            "shape": shape,
            "tokens": tokens,
            "format": name,
            "us": time.least * 1e6,
            "median": time.median * 1e6,
            "Gw/s": rows * cols * tokens / time.least / 1e9,
            "GB/s": layers[name].nbytes / time.least / 1e9,
            "x BLAS": times["float32"].least / time.least,
        }
        run.row("in cache", columns)


def bench_streamed(run, formats):
    """One token through layers that come from memory, 4096 x 4096 each."""
    size = 4096
    x, y = np.ones((1, size), np.float32), np.empty((1, size), np.float32)
    chains = {"float32": [Linear(np.ones((size, size), np.float32)) for _ in range(4)]}
    for format in formats:
        layers = [random_layer(format, size, size)]
        while sum(layer.nbytes for layer in layers) < STREAM_BYTES:
            layers.append(QuantizedLinear(copy(layers[0].tensor)))
        chains[str(format)] = layers
    calls = {name: [product(layer, x, y) for layer in layers] for name, layers in chains.items()}
    times = run.take_turns({name: lambda c=c: [call() for call in c] for name, c in calls.items()})
    sizes = {name: sum(layer.nbytes for layer in layers) for name, layers in chains.items()}
    rates = {name: sizes[name] / time.least / 1e9 for name, time in times.items()}
    for name, rate in rates.items():
        columns = {"format": name, "GB/s": rate, "x read": rate / rates["float32"]}
        run.row("streamed", columns)


def copy(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same tensor with panels of its own."""
    panels = _core.aligned_empty(bytes=tensor.panels.nbytes)
    panels[:] = tensor.panels
    arrays, metadata = tensor.to_arrays()
    return QuantizedTensor.from_arrays({**arrays, "panels": panels}, metadata)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--stream", action="store_true", help="also layers that come from memory")
    options = parser.parse_args()
    formats = [Format.parse(text) for text in options.formats]
    run = Run("linear", options)
    for shape in options.shapes:
        for tokens in options.tokens:
            bench_cached(run, shape, tokens, formats)
    if options.stream:
        bench_streamed(run, formats)
    run.finish()


if __name__ == "__main__":
    main()
