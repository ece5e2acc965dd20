"""Quantizers: rounding, scale search, k-means and activations, against memory reads and ggml.

    python -m benchmarks.bench_quantize

Rounding by a group's range and packing are measured on a matrix too large for any cache. GB/s
counts the float32 weights read; `x read` is this rate over that of a float32 matrix-vector product
with the same matrix, which does little but read. The search for least-squares scales is
compute-bound; `error` is the sum of squared errors of normal weights over their sum of squares. If
ggml is found (peers/README.md), its quantizers take turns with both. The words of trellises and
lattices are searched together, by Viterbi's algorithm and among the points of E8. Tables of levels
are learned from sorted values, so sorting is their reference. Activations are rounded inside a
layer: a layer of two panels gives the time of one panel, which is subtracted. Their reference is
reading the same float32 numbers from the second-level cache. Both sides are one call from Python.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Run, options_parser
from benchmarks.peers import ggml
from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.linears import Linear
from lowbitq.quantizers import mse, relative_error, search_options
from lowbitq.roofline import random_layer
from lowbitq.tensors import QuantizedTensor

SHAPE = (4096, 4096)
SEARCHED_ROWS = 256  # the search takes about a hundred times as long as rounding
ROUNDED = ["int1g64", "int2g64", "int2g64sym", "int2g128", "ternaryg64", "int3g64", "int4g64"]
ROUNDED += ["int8g64", "int2"]
SEARCHED = ["int2g64", "int2g64sym", "ternaryg64", "int3g64", "int4g64", "int4g32sym", "nf4g64"]
LEVELS = [4, 16]
VALUES = 1 << 20
ACTIVATIONS = 1 << 15  # 128 KiB: fits a second-level cache, but no first-level one
ROUNDING_GOALS = {("int2g64", "read"): 0.8, ("int2g64", "tq2_0"): 15.0}
SEARCH_GOALS = {"int2g64": 0.2}  # Gw/s
TRELLIS_ROWS = 64  # Viterbi's algorithm takes some hundred times as long as a search for scales
TRELLISES = ["trellis1", "trellis1.5", "trellis2", "trellis2w10", "trellis3", "trellis4"]
TRELLISES += ["lattice2"]
TRELLIS_GOALS = {"trellis2g64": {"avx512": 0.75, "avx2": 0.35}}  # Mw/s and thread
GGML_ROUNDED = ["tq2_0", "q8_0"]
GGML_SEARCHED = ["q2_K", "q3_K", "q4_0", "q4_K"]
ACTIVATIONS_GOAL = 0.3


def normal(rows, cols):
    """Return normal weights that start at a cache line."""
    weight = _core.aligned_empty(bytes=4 * rows * cols).view(np.float32).reshape(rows, cols)
    weight[:] = np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32)
    return weight


def quantizer(text, weight, range):
    """Return a call that rounds `weight` into the panels of a tensor, and the tensor."""
    format, (rows, cols) = Format.parse(text), weight.shape
    levels = None
    if format.has_levels:
        levels = np.empty(format.level_count, np.float32)
        _core.fixed_levels(levels, kind=format.kind)
    panels = _core.aligned_empty(bytes=format.panel_bytes(rows, cols))
    tensor = QuantizedTensor(format, rows, cols, panels, levels)
    code, options = tensor.handle, search_options(range=range)
    group = format.group or cols
    return lambda: _core.quantize_packed(code, weight, None, panels, group=group, **options), tensor


def bench_rounding(run, library):
    weight = normal(*SHAPE)
    layer, x = Linear(weight), np.ones((1, SHAPE[1]), np.float32)
    y = np.empty((1, SHAPE[0]), np.float32)
    calls = {"read": lambda: _core.linear_forward(layer.handle, x, y)}
    calls |= {text: quantizer(text, weight, "minmax")[0] for text in ROUNDED}
    for name in GGML_ROUNDED if library else []:
        calls[name] = library.quantize_into(library.empty(name, *SHAPE), weight)
    times = run.take_turns(calls)
    for name, time in times.items():
        columns = {
            "format": name,
            "ms": time.least * 1e3,
            "median": time.median * 1e3,
            "Gw/s": weight.size / time.least / 1e9,
            "GB/s": weight.nbytes / time.least / 1e9,
            "x read": times["read"].least / time.least,
        }
        run.row("rounding by the range, from memory", columns)
    for (ours, reference), goal in ROUNDING_GOALS.items():
        if reference in times:
            ratio = times[reference].least / times[ours].least
            run.goal(f"rounding to {ours}", reference, ratio, goal)


def bench_search(run, library):
    weight = normal(SEARCHED_ROWS, SHAPE[1])
    calls, bits, values = {}, {}, {}
    for text in SEARCHED:
        calls[text], tensor = quantizer(text, weight, "mse")
        bits[text], values[text] = tensor.bits_per_weight, tensor.dequantize
    for name in GGML_SEARCHED if library else []:
        matrix = library.empty(name, *weight.shape)
        calls[name] = library.quantize_into(matrix, weight)
        bits[name] = matrix.blocks.nbytes * 8 / weight.size
        values[name] = lambda matrix=matrix: library.dequantize(matrix)
    times = run.take_turns(calls)
    for name, time in times.items():
        columns = {
            "format": name,
            "bits": bits[name],
            "error": relative_error(weight, values[name]()),
            "ms": time.least * 1e3,
            "median": time.median * 1e3,
            "Gw/s": weight.size / time.least / 1e9,
        }
        run.row("search for the least squared error", columns)
        if goal := SEARCH_GOALS.get(name):
            run.goal(f"search for {name}", "1 Gw/s", columns["Gw/s"], goal)


def bench_trellises(run):
    weight = normal(TRELLIS_ROWS * run.options.threads, SHAPE[1])
    calls, tensors = {}, {}
    for code in TRELLISES:
        text = f"{code}g64"
        calls[text], tensors[text] = quantizer(text, weight, "mse")
    times = run.take_turns(calls, repetitions=max(1, run.options.repetitions // 4))
    for name, time in times.items():
        rate = weight.size / time.least / 1e6
        columns = {
            "format": name,
            "bits": tensors[name].bits_per_weight,
            "error": relative_error(weight, tensors[name].dequantize()),
            "ms": time.least * 1e3,
            "median": time.median * 1e3,
            "Mw/s": rate,
        }
        run.row("words that depend on each other", columns)
        if goal := TRELLIS_GOALS.get(name, {}).get(run.machine["isa"]):
            run.goal(f"words of {name}", "1 Mw/s and thread", rate / run.options.threads, goal)


def bench_levels(run):
    values = np.random.default_rng(1).standard_normal(VALUES)
    levels = {count: np.empty(count) for count in LEVELS}
    calls = {n: lambda n=n: _core.kmeans(values, None, levels[n]) for n in LEVELS}
    calls["sort"] = lambda: np.sort(values)
    times = run.take_turns(calls, repetitions=max(1, run.options.repetitions // 4))
    for count, table in levels.items():
        nearest = table[abs(values[::64, None] - table).argmin(1)]
        columns = {
            "levels": count,
            "error": mse(values[::64], nearest),
            "ms": times[count].least * 1e3,
            "median": times[count].median * 1e3,
            "Mvalues/s": VALUES / times[count].least / 1e6,
            "x sort": times["sort"].least / times[count].least,
        }
        run.row("k-means of a million values", columns)


def bench_activations(run):
    x = np.random.default_rng(2).standard_normal((1, ACTIVATIONS), dtype=np.float32)
    outputs = {rows: np.empty((1, rows), np.float32) for rows in (16, 32)}
    one, two = (random_layer(Format.parse("int2g64"), rows, ACTIVATIONS) for rows in outputs)
    dense = Linear(x.reshape(8, -1))
    token, sums = np.ones((1, dense.shape[1]), np.float32), np.empty((1, 8), np.float32)
    calls = {
        "one panel": lambda: _core.linear_forward(one.handle, x, outputs[16]),
        "two panels": lambda: _core.linear_forward(two.handle, x, outputs[32]),
        "read": lambda: _core.linear_forward(dense.handle, token, sums),
        "no token": lambda: _core.linear_forward(one.handle, x[:0], outputs[16][:0]),
    }
    us = {name: 1e6 * time.least for name, time in run.take_turns(calls).items()}
    ours = 2 * us["one panel"] - us["two panels"] - us["no token"]
    reading = us["read"] - us["no token"]
    columns = {
        "numbers": x.size,
        "us": ours,
        "GB/s": x.nbytes / ours / 1e3,
        "read us": reading,
        "x read": reading / ours,
    }
    run.row("activations to int8, with sums", columns)
    run.goal("int8 activations", "reading them from cache", reading / ours, ACTIVATIONS_GOAL)


def main() -> None:
    run = Run("quantize", options_parser(__doc__).parse_args())
    library = ggml.load()
    bench_rounding(run, library)
    bench_search(run, library)
    bench_trellises(run)
    bench_levels(run)
    bench_activations(run)
    run.finish()


if __name__ == "__main__":
    main()
