"""Q4_0 by lowbitq and by ggml with an importance matrix: quality at the same bits.

    LOWBITQ_DATA=../shared/data python -m benchmarks.bench_gguf

SmolLM2-135M, calibrated on 32 windows of 2048 tokens of wikitext2-valid.txt, predicts the first 16
windows of wikitext2-test.txt. lowbitq rounds by GPTQ with drift correction and runs its packed
model; ggml (peers/README.md) weights squared errors by the mean square of each input, as
llama-quantize does with --imatrix, and its weights run in float32. Embedding and norms stay.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import lowbitq as lq
from benchmarks.harness import machine
from benchmarks.peers import ggml
from lowbitq.commands import demo_model
from lowbitq.texts import windows


def by_ggml(model: lq.Model, stats: lq.Statistics) -> lq.Model:
    """Return a model whose layers have the values of their Q4_0 blocks."""
    library, rounded = ggml.Ggml(), model.copy()
    for name, linear in list(model.linears()):
        importance = np.ascontiguousarray(stats.mean_square[name], np.float32)
        blocks = library.quantize("q4_0", np.ascontiguousarray(linear.weight), importance)
        rounded.replace_linear(name, linear.replace(weight=library.dequantize(blocks)))
    return rounded


def main() -> None:
    folder = Path(os.environ.get("LOWBITQ_DATA", "../shared/data"))
    model = lq.load(demo_model())
    tokens = windows(
        model.tokenizer, folder / "wikitext2-valid.txt", samples=32, window=2048, seed=0
    )
    options = {"rotation": "none", "embedding": None}
    ours = lq.compress(model, "int4g32symz8", text=tokens, progress=True, **options)
    theirs = by_ggml(model, lq.calibrate(model, tokens))
    print("{cpu}, {isa}, commit {commit}".format(**machine()))
    for name, tested in {"lowbitq": ours, "ggml, importance matrix": theirs}.items():
        found = lq.evaluate(tested, folder / "wikitext2-test.txt", model, windows=16)
        print(f"\n{name}\n{found}")


if __name__ == "__main__":
    main()
