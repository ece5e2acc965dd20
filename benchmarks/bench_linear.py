"""Packed linear layers against OpenBLAS on the same shape, and against reading memory.

    python -m benchmarks.bench_linear
    OPENBLAS_CORETYPE=Haswell python -m benchmarks.bench_linear --isa avx2

Candidate and references take turns in one process, with everything in cache; the table shows the
least and the median time of a call: CPU time of the thread, or wall time with more threads. Weights
per second count rows * cols * tokens. `x BLAS` is the time of the float32 layer over ours.
`--stream` walks through so many copies of a 4096 x 4096 layer that none is in cache; there `x read`
is our GB/s over that of a float32 matrix-vector product, which does little but read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's own, which would only disturb

import numpy as np

from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.tensors import QuantizedTensor

SHAPES = ["576x576", "1536x576", "576x1536", "4096x4096"]  # SmolLM2-135M, 7B
TOKENS = [1, 64, 2048]
FORMATS = ["int1g64", "int2g64", "int2g64sym", "int3g64", "int4g64", "int8g64", "ternaryg64"]
STREAM_BYTES = 256 << 20  # several times the last-level cache
SMALLEST = 2e-4  # seconds that one timing takes at least


def random_layer(format: Format, rows: int, cols: int) -> QuantizedLinear:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, format.levels, (rows, cols), dtype=np.uint8)
    scale = np.full((rows, format.groups(cols)), 2.0**-6, np.float32)
    offset = None if format.symmetric else -scale
    return QuantizedLinear(QuantizedTensor.pack(format, codes, scale, offset))


def take_turns(calls, clock, repetitions):
    """Least and median seconds of each call, all called in turn, `repetitions` times each."""
    loops = {}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        loops[name] = 1 + int(SMALLEST / max(clock() - begin, 1e-9))
    times = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            begin = clock()
            for _ in range(loops[name]):
                call()
            times[name].append((clock() - begin) / loops[name])
    return {name: (min(t), statistics.median(t)) for name, t in times.items()}


def product(layer, x, y):
    handle = layer.handle
    return lambda: _core.linear_forward(handle, x, y)


def bench_cached(shape, tokens, formats, clock, repetitions):
    """One row per format, after one for the float32 layer."""
    rows, cols = (int(n) for n in shape.split("x"))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    y = np.empty((tokens, rows), np.float32)
    dense = Linear(rng.standard_normal((rows, cols), dtype=np.float32))
    layers = {str(f): random_layer(f, rows, cols) for f in formats}
    calls = {name: product(layer, x, y) for name, layer in {"float32": dense, **layers}.items()}
    times = take_turns(calls, clock, repetitions)
    for name, (least, median) in times.items():
        nbytes = layers[name].nbytes if name in layers else dense.nbytes
        yield {
            "shape": shape,
            "tokens": tokens,
            "format": name,
            "microseconds": least * 1e6,
            "median": median * 1e6,
            "gigaweights": rows * cols * tokens / least / 1e9,
            "gigabytes": nbytes / least / 1e9,
            "times_blas": times["float32"][0] / least,
        }


def bench_streamed(formats, clock, repetitions):
    """One token through layers that come from memory, 4096 x 4096 each."""
    size = 4096
    x, y = np.ones((1, size), np.float32), np.empty((1, size), np.float32)
    names = ["float32", *map(str, formats)]
    chains, sizes = {}, {}
    for name in names:
        if name == "float32":
            layers = [Linear(np.ones((size, size), np.float32)) for _ in range(4)]
        else:
            first = random_layer(Format.parse(name), size, size)
            copies = STREAM_BYTES // first.nbytes
            layers = [first]
            for _ in range(copies):
                panels = _core.aligned_empty(bytes=first.tensor.panels.nbytes)
                panels[:] = first.tensor.panels
                arrays, metadata = first.tensor.to_arrays()
                tensor = QuantizedTensor.from_arrays({**arrays, "panels": panels}, metadata)
                layers.append(QuantizedLinear(tensor))
        calls = [product(layer, x, y) for layer in layers]
        chains[name] = lambda calls=calls: [call() for call in calls]
        sizes[name] = sum(layer.nbytes for layer in layers)
    times = take_turns(chains, clock, repetitions)
    rate = {name: sizes[name] / least / 1e9 for name, (least, _) in times.items()}
    for name in names:
        yield {"format": name, "gigabytes": rate[name], "times_read": rate[name] / rate["float32"]}


def machine() -> dict[str, object]:
    config = _core.config()
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu,
        "isa": config["isa"],
        "blas": config["blas_core"],
        "threads": config["threads"],
        "load": round(os.getloadavg()[0], 1),
        "commit": commit or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512"], help="default: the best")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--stream", action="store_true", help="also layers that come from memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    _core.set_num_threads(threads=options.threads)
    if options.isa:
        _core.use_isa(isa=options.isa)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    formats = [Format.parse(text) for text in options.formats]
    header = machine()
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in header.items()))
        titles = ["shape", "tokens", "format", "us", "median", "Gw/s", "GB/s", "x BLAS"]
        print("{:>10} {:>6} {:>12} {:>10} {:>10} {:>7} {:>7} {:>7}".format(*titles))
    cached, streamed = [], []
    for shape in options.shapes:
        for tokens in options.tokens:
            for row in bench_cached(shape, tokens, formats, clock, options.repetitions):
                cached.append(row)
                if not options.json:
                    print(
                        "{shape:>10} {tokens:6} {format:>12} {microseconds:10.1f} {median:10.1f} "
                        "{gigaweights:7.1f} {gigabytes:7.1f} {times_blas:7.2f}".format(**row)
                    )
    if options.stream:
        streamed = list(bench_streamed(formats, clock, options.repetitions))
        if not options.json:
            print(f"\n{'streamed':>12} {'GB/s':>7} {'x read':>7}")
            for row in streamed:
                print("{format:>12} {gigabytes:7.1f} {times_read:7.2f}".format(**row))
    if options.json:
        print(json.dumps({**header, "cached": cached, "streamed": streamed}, indent=1))


if __name__ == "__main__":
    main()
