"""Quality of SmolLM2-135M at 4 to 1 bits, calibrated and trained: the tables in docs/measured.md.

    LOWBITQ_DATA=../shared/data python -m benchmarks.bench_quality [--only trellis2] [--plot FILE]

Calibrates on 32 windows of 2048 tokens of wikitext2-valid.txt, trains on them where a row says so,
and predicts the first 16 windows of wikitext2-test.txt; "repeats" is the share of repeated phrases
of four tokens in greedy continuations of 20 prompts from there. The embedding, which is also the
head, stays in float32. Each row is a process of its own, so that its minutes of CPU and peak of
memory are its own. Rows already in the JSON file are not measured again; delete the file to start
over. The weights were published in 4 bits (Q4_1); all results are compared with their float32
values.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lowbitq as lq
from benchmarks.harness import RESULTS, machine
from lowbitq.commands import demo_model
from lowbitq.plots import new_axes
from lowbitq.texts import windows

CALIBRATION = {"samples": 32, "window": 2048, "seed": 0}
PREDICTION = {"window": 2048, "windows": 16}


# GPTQ as published, the reference for ours: all calibration tokens have equal weight, and so have
# all columns of a group in the scale search; damping is relative to the mean of the diagonal; there
# is no coordinate descent after the error feedback.
PUBLISHED = {
    "importance": False,
    "damping_by": "mean",
    "first_weight": 1.0,
    "order": "act",
    "sweeps": 0,
}


@dataclass(frozen=True)
class Row:
    """One way to quantize: `seeds` are the rotation's, `options` the plan's.

    If there are `bits`, each layer has one of FORMATS, as `lq.plan` chooses under this budget.
    `steps` of training follow; 0: none. Method "enhance": all of it is `lq.enhance`.
    """

    format: str
    method: str
    rotation: str
    seeds: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    bits: float | None = None

    def __str__(self) -> str:
        words = [f"{self.format} {self.method}"]
        if self.options == PUBLISHED:
            words[0] += " as published"
        words.append("not rotated" if self.rotation == "none" else self.rotation)
        if self.options.get("drift"):
            words.append("drift")
        if self.steps:
            words.append(f"{self.steps} steps")
        return ", ".join(words)


DRIFT = {"drift": True}
FORMATS = ("trellis1", "trellis1.5", "trellis2", "trellis3", "trellis4")
SEEDS = (0, 1, 2)

# The norms' gains are fused only if a rotation needs it. Results at 2 bits depend on the seed.
ROWS = [
    Row("int4g64", "rtn", "none"),
    Row("int4g64", "gptq", "none"),
    Row("int4g64", "gptq", "hadamard"),
    Row("int4g64", "gptq", "hadamard", SEEDS, DRIFT),
    Row("int4g64", "gptq", "hadamard", SEEDS, DRIFT, steps=120),
    Row("trellis4", "gptq", "hadamard", SEEDS, DRIFT),
    Row("int3g64", "rtn", "none"),
    Row("int3g64", "gptq", "none"),
    Row("int3g64", "gptq", "hadamard"),
    Row("int3g64", "gptq", "hadamard", SEEDS, DRIFT),
    Row("int3g64", "gptq", "hadamard", SEEDS, DRIFT, steps=240),
    Row("trellis3", "gptq", "hadamard", SEEDS, DRIFT),
    Row("int2g64", "rtn", "none"),
    Row("int2g64", "gptq", "none", options=PUBLISHED),
    Row("int2g64", "gptq", "none"),
    Row("int2g64", "gptq", "hadamard", SEEDS),
    Row("int2g64", "gptq", "hadamard", SEEDS, DRIFT),
    Row("int2g64", "gptq", "hadamard", SEEDS, DRIFT, steps=240),
    Row("int2g64 + rank16", "gptq", "hadamard", SEEDS, DRIFT, steps=240),
    Row("trellis2", "gptq", "hadamard", SEEDS),
    Row("trellis2", "gptq", "hadamard", SEEDS, DRIFT),
    Row("trellis2", "gptq", "hadamard", SEEDS, DRIFT, steps=240),
    Row("at most 2.1 bits", "gptq", "hadamard", SEEDS, DRIFT, bits=2.1),
    Row("at most 2.1 bits", "enhance", "hadamard", SEEDS, DRIFT, steps=240, bits=2.1),
    Row("at most 2.3 bits", "gptq", "hadamard", SEEDS, DRIFT, bits=2.3),
    Row("at most 2.3 bits", "enhance", "hadamard", SEEDS, DRIFT, steps=240, bits=2.3),
    Row("trellis1.5", "gptq", "hadamard", SEEDS, DRIFT),
    Row("trellis1", "gptq", "hadamard", SEEDS, DRIFT, steps=240),
]

# What others publish for this model or its base, at 2 to 4 bits: weights, bits, ln ratio, source.
# Texts and windows differ, so only losses may be compared, and only roughly.
PEERS = [
    ("IQ2_KT (ik_llama.cpp)", 2.14, math.log(5.103), "2 windows of 2048, imatrix"),
    ("Q2_K (llama.cpp)", 2.63, math.log(3.785), "2 windows of 2048, imatrix"),
    ("IQ3_XXS (llama.cpp)", 3.06, math.log(1.870), "2 windows of 2048, imatrix"),
    ("Q4_0 (llama.cpp)", 4.50, math.log(1.106), "2 windows of 2048, imatrix"),
    ("GLQ trellis", 2.00, 0.816, "published, base model, GPU"),
    ("TurboPress TCQ-64", 2.05, 1.309, "published, 16 windows of 256"),
    ("TurboPress TCQ-64", 3.05, 0.270, "published, 16 windows of 256"),
    ("TurboPress TCQ-64", 4.05, 0.080, "published, 16 windows of 256"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--plot", type=Path, help="draw the loss over the bits into this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure this row and nothing else
    options = parser.parse_args()
    every = {"float32": (None, 0)}
    every |= {f"{row}, seed {seed}": (row, seed) for row in ROWS for seed in row.seeds}
    if options.one:
        Bench(options.json).measure(options.one, *every[options.one])
        return
    chosen = [row for row in ROWS if options.only in str(row)]
    for name, (row, _) in every.items():
        if name not in known(options.json) and (row is None or row in chosen):
            again = [sys.executable, "-m", "benchmarks.bench_quality", "--json", options.json]
            subprocess.run([*again, "--one", name], check=True)
    measured = known(options.json)
    print("\n".join([*table(measured, chosen), "", *peers()]))
    if options.plot:
        plot(measured, chosen).figure.savefig(options.plot)


def known(path: Path) -> dict[str, Any]:
    """Return what has been measured."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


class Remembered:
    """A model that caches its hidden states, so that a reference reruns only its head."""

    def __init__(self, model: lq.Model) -> None:
        self.model = model
        self.states: dict[bytes, NDArray[np.float32]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        key = tokens.tobytes()
        if key not in self.states:
            self.states[key] = self.model.hidden(tokens)
        return self.states[key]


class Bench:
    """Measures one row and adds it to a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = Path(os.environ.get("LOWBITQ_DATA", "../shared/data"))
        self.calibration, self.held_out = (
            folder / f"wikitext2-{part}.txt" for part in ("valid", "test")
        )

    def measure(self, name: str, row: Row | None, seed: int) -> None:
        model = lq.load(demo_model())
        started, before = time.perf_counter(), time.process_time()
        tested = model if row is None else self.quantized(model, row, seed)
        cost = {
            "quantized_in_seconds": time.perf_counter() - started,
            "cpu_minutes": (time.process_time() - before) / 60,
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        print(f"{name}: {cost['quantized_in_seconds']:.0f} s, evaluating", file=sys.stderr)
        reference = Remembered(model)
        found = lq.evaluate(
            tested, self.held_out, None if row is None else reference, **PREDICTION
        ).to_dict()
        if row is not None:
            written = lq.continuations(tested, model, self.held_out)
            found["repeats"] = written.repetition.to_dict()
            found["reference_repeats"] = written.reference_repetition.to_dict()
            found["kl_of_own_text"] = written.kl.to_dict()
        about = {"machine": machine(), "calibration": CALIBRATION}
        measured = known(self.path)
        measured[name] = about | cost | found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(measured, indent=1) + "\n")

    def quantized(self, model: lq.Model, row: Row, seed: int) -> lq.QuantizedModel:
        tokens = windows(model.tokenizer, self.calibration, **CALIBRATION)
        if row.method == "enhance":
            assert row.bits is not None
            asked = {"bits": row.bits, "formats": FORMATS, "steps": row.steps, "embedding": None}
            found = lq.enhance(model, tokens, seed=seed, progress=True, **asked)
            print(found, file=sys.stderr)
            return found.model
        options = {"method": row.method, "rotation": row.rotation, "seed": seed, "embedding": None}
        options |= {"drift": False} | row.options
        if row.bits is None:
            small = lq.compress(model, row.format, text=tokens, progress=True, **options)
        else:
            few = np.ascontiguousarray(tokens[:16, :512])
            cut = {"samples": 16, "window": 512}
            plan = lq.plan(model, few, bits=row.bits, formats=FORMATS, **cut, **options)
            print(plan, file=sys.stderr)
            small = lq.compress(model, plan, text=tokens, progress=True)
        if not row.steps:
            return small
        learn = ["scale", "offset", "norm"] + ["adapter"] * ("rank" in row.format)
        return lq.distill(
            small, model, tokens.ravel(), learn=learn, steps=row.steps, seed=seed, progress=True
        )


def table(measured: dict[str, Any], rows: list[Row]) -> list[str]:
    """Return Markdown; for several seeds, the run with the median perplexity, and the spread."""
    base = measured["float32"]
    lines = [
        "{cpu}, {isa}, {threads} threads, commit {commit}".format(**base["machine"]),
        "",
        "| weights | bits/weight | MB | perplexity (95 %) | ln ratio | KL | agreement | repeats "
        "| CPU minutes | peak GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        _line("float32", base, ""),
    ]
    for row in rows:
        found = [
            measured[name] for seed in row.seeds if (name := f"{row}, seed {seed}") in measured
        ]
        if not found:
            continue
        values = [one["perplexity"]["value"] for one in found]
        middle = found[values.index(statistics.median_low(values))]
        ratios = [one["log_ratio"]["value"] for one in found]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        lines.append(_line(str(row), middle, spread))
    return lines


def _line(name: str, one: dict[str, Any], spread: str) -> str:
    low, high = (math.nan if end is None else end for end in one["perplexity"]["interval"])
    compared = [""] * 6
    if one["log_ratio"] is not None:
        seen = "kl_of_own_text" in one  # rows of earlier versions have neither
        compared = [
            f"{one['log_ratio']['value']:.3f}{spread}",
            f"{one['kl']['value']:.3f}",
            f"{one['agreement']['value']:.1%}",
            f"{one['repeats']['value']:.0%}" if seen else "",
            f"{one['cpu_minutes']:.0f}" if seen else "",
            f"{one['peak_bytes'] / 1e9:.1f}" if seen else "",
        ]
    cells = [
        name,
        f"{one['bits_per_weight']:.2f}",
        f"{one['size_bytes'] / 1e6:.0f}",
        f"{one['perplexity']['value']:.2f} ({low:.2f} to {high:.2f})",
        *compared,
    ]
    return f"| {' | '.join(cells)} |"


def peers() -> list[str]:
    """Return what others reach, as Markdown."""
    lines = ["| others | bits/weight | ln ratio | measured on |", "| --- | ---: | ---: | --- |"]
    return lines + [
        f"| {name} | {bits:.2f} | {loss:.3f} | {on} |" for name, bits, loss, on in PEERS
    ]


def series(row: Row) -> str:
    """Return what a row is an example of, for the figure."""
    if row.method == "enhance" or row.steps:
        return "trellis plans, trained (lq.enhance)" if row.bits else "trained"
    if row.method == "rtn":
        return "rounded to nearest"
    if row.options == PUBLISHED:
        return "GPTQ as published"
    trellis = row.bits is not None or row.format.startswith("trellis")
    return "trellises, drift corrected" if trellis else "GPTQ, groups of 64"


def plot(measured: dict[str, Any], rows: list[Row]) -> Any:
    """Draw the loss of each row's median seed over its bits, ours and others'."""
    axes = new_axes()
    lines: dict[str, dict[float, float]] = {}  # the least loss by bits
    for row in rows:
        found = [measured[n] for seed in row.seeds if (n := f"{row}, seed {seed}") in measured]
        if found:
            loss = statistics.median_low([one["log_ratio"]["value"] for one in found])
            line, bits = lines.setdefault(series(row), {}), found[0]["bits_per_weight"]
            line[bits] = min(loss, line.get(bits, loss))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=name)
    for name, bits, loss, _ in PEERS:
        axes.plot(bits, loss, "x", color="0.5")
        axes.annotate(name, (bits, loss), (4, 4), textcoords="offset points", color="0.4", size=8)
    axes.set(
        xlabel="bits per weight, everything counted",
        ylabel="ln(perplexity / float)",
        yscale="log",
        xlim=(1, 5),
        ylim=(0.02, 3),
        title="SmolLM2-135M: what each number of bits costs",
    )
    axes.legend(fontsize="small")
    return axes


if __name__ == "__main__":
    main()
