"""Packed linear layers against OpenBLAS on the same shape, and against reading memory.

    python -m benchmarks.bench_linear
    python -m benchmarks.bench_linear --isa avx2

Everything is in cache. Weights per second count rows * cols * tokens. `x BLAS` is the time of the
float32 layer over ours. `--stream` walks through enough copies of a 4096 x 4096 layer that none is
in cache; there `x read` is our GB/s over that of a float32 matrix-vector product, which does little
but read. If ggml is found (peers/README.md), one token is compared with its dot products of the
same shape, called row by row in a C loop. Our time includes quantizing the token, ggml's does not;
quantizing is also compared separately. The goals are for the shape that fits a second-level cache.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Run, options_parser
from benchmarks.peers import ggml
from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.linears import Linear
from lowbitq.roofline import copy_layer, random_layer

SHAPES = ["576x576", "1536x576", "576x1536", "4096x4096"]  # SmolLM2-135M, 7B
TOKENS = [1, 64, 2048]
FORMATS = ["int1g64", "int2g64", "int2g64sym", "int3g64", "int4g64", "int8g64", "ternaryg64"]
FORMATS += ["trellis1g64", "trellis1.5g64", "trellis2g64", "trellis2w10g64", "trellis3g64"]
FORMATS += ["trellis4g64", "lattice2g64"]
STREAM_BYTES = 256 << 20  # several times the last-level cache
PEER_SHAPES = ["512x2048", "4096x4096"]
BLAS_GOALS = {("576x576", 1, "int2g64"): 4.5, ("4096x4096", 64, "int2g64"): 3.0}
TRELLIS_GOALS = ("trellis2g64", "int2g64", 0.3)
READ_GOALS = {"int2g64": 0.9, "int3g64": 0.8, "int4g64": 0.9}
GGML_GOALS = {
    ("int1g64", "q1_0"): 4.5,
    ("int2g64", "q2_K"): 2.4,
    ("int2g64", "tq2_0"): 1.4,
    ("ternaryg64", "tq2_0"): 1.4,
    ("int3g64", "q3_K"): 2.0,
    ("int4g64", "q4_0"): 2.0,
    ("int4g64", "q4_K"): 2.0,
}
ACTIVATIONS_GOAL = 3.0


def product(layer, x, y):
    handle = layer.handle
    return lambda: _core.linear_forward(handle, x, y)


def bench_cached(run, shape, tokens, formats):
    """Print one row for the float32 layer, then one per format."""
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
        if goal := BLAS_GOALS.get((shape, tokens, name)):
            blas = f"float32, {shape}, {tokens} tokens"
            run.goal(name, blas, columns["x BLAS"], goal)
    ours, plain, goal = TRELLIS_GOALS
    if shape == SHAPES[0] and tokens == 1 and ours in times and plain in times:
        run.goal(ours, f"{plain}, {shape}, one token", times[plain].least / times[ours].least, goal)


def bench_streamed(run, formats):
    """Run one token through 4096 x 4096 layers that are read from memory."""
    size = 4096
    x, y = np.ones((1, size), np.float32), np.empty((1, size), np.float32)
    chains = {"float32": [Linear(np.ones((size, size), np.float32)) for _ in range(4)]}
    for format in formats:
        layers = [random_layer(format, size, size)]
        while sum(layer.nbytes for layer in layers) < STREAM_BYTES:
            layers.append(copy_layer(layers[0]))
        chains[str(format)] = layers
    calls = {name: [product(layer, x, y) for layer in layers] for name, layers in chains.items()}
    times = run.take_turns({name: lambda c=c: [call() for call in c] for name, c in calls.items()})
    sizes = {name: sum(layer.nbytes for layer in layers) for name, layers in chains.items()}
    rates = {name: sizes[name] / time.least / 1e9 for name, time in times.items()}
    for name, rate in rates.items():
        columns = {"format": name, "GB/s": rate, "x read": rate / rates["float32"]}
        run.row("streamed", columns)
        if goal := READ_GOALS.get(name):
            run.goal(name, "reading memory", columns["x read"], goal)


def bench_ggml(run, library, shape):
    """Run one token through each format and each ggml type."""
    rows, cols = (int(n) for n in shape.split("x"))
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((rows, cols), dtype=np.float32)
    x = rng.standard_normal((1, cols), dtype=np.float32)
    y = np.empty((1, rows), np.float32)
    bits, calls = {}, {}
    for name in dict.fromkeys(ours for ours, _ in GGML_GOALS):
        layer = random_layer(Format.parse(name), rows, cols)
        bits[name], calls[name] = layer.nbytes * 8 / weight.size, product(layer, x, y)
    for name in dict.fromkeys(theirs for _, theirs in GGML_GOALS):
        matrix = library.quantize(name, weight)
        bits[name] = matrix.blocks.nbytes * 8 / weight.size
        calls[name] = library.product(matrix, x[0], y[0])
    times = run.take_turns(calls)
    for name, time in times.items():
        columns = {
            "format": name,
            "bits": bits[name],
            "us": time.least * 1e6,
            "median": time.median * 1e6,
            "Gw/s": weight.size / time.least / 1e9,
        }
        run.row(f"one token, {shape}, against ggml {library.version}", columns)
    if shape == PEER_SHAPES[0]:
        for (ours, theirs), goal in GGML_GOALS.items():
            run.goal(ours, f"ggml {theirs}", times[theirs].least / times[ours].least, goal)


def bench_activations(run, library):
    """Measure rounding one token to int8 with a scale per 64: a layer's time without its panels."""
    cols = 4096
    x = np.random.default_rng(3).standard_normal((1, cols), dtype=np.float32)
    one, two = (random_layer(Format.parse("int2g64"), rows, cols) for rows in (16, 32))
    _, theirs = library.quantize_activations("q8_K", x[0])
    calls = {
        "one panel": product(one, x, np.empty((1, 16), np.float32)),
        "two panels": product(two, x, np.empty((1, 32), np.float32)),
        "no token": product(one, x[:0], np.empty((0, 16), np.float32)),
        "q8_K": theirs,
        "no q8_K": library.quantize_activations("q8_K", x[0, :0])[1],
    }
    us = {name: 1e6 * time.least for name, time in run.take_turns(calls).items()}
    ours = 2 * us["one panel"] - us["two panels"] - us["no token"]
    reference = us["q8_K"] - us["no q8_K"]
    run.row("activations", {"cols": cols, "us": ours, "q8_K us": reference})
    run.goal("int8 activations", "ggml q8_K", reference / ours, ACTIVATIONS_GOAL)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument(
        "--stream", action="store_true", help="also measure layers that are read from memory"
    )
    options = parser.parse_args()
    formats = [Format.parse(text) for text in options.formats]
    run = Run("linear", options)
    for shape in options.shapes:
        for tokens in options.tokens:
            bench_cached(run, shape, tokens, formats)
    if options.stream:
        bench_streamed(run, formats)
    if library := ggml.load():
        for shape in PEER_SHAPES:
            bench_ggml(run, library, shape)
        bench_activations(run, library)
    run.finish()


if __name__ == "__main__":
    main()
