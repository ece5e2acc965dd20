"""Quality of SmolLM2-135M at 4, 3 and 2 bits: the table in the README.

    LOWBITQ_DATA=../shared/data python -m benchmarks.bench_quality

Calibrates on 32 windows of 2048 tokens of wikitext2-valid.txt and predicts the first 16 windows of
wikitext2-test.txt. The embedding, which is also the head, stays in float32. Rows already in the
JSON file are not measured again; delete the file to start over. The weights were published in 4
bits (Q4_1); all results are compared with their float32 values.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
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
    """One way to quantize: `seeds` are the rotation's, `options` the plan's."""

    format: str
    method: str
    rotation: str
    seeds: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rotation = "not rotated" if self.rotation == "none" else self.rotation
        published = " as published" if self.options == PUBLISHED else ""
        return f"{self.format} {self.method}{published}, {rotation}"


# The norms' gains are fused only if a rotation needs it. Results at 2 bits depend on the seed.
ROWS = [
    Row("int4g64", "rtn", "none"),
    Row("int4g64", "gptq", "none"),
    Row("int4g64", "gptq", "hadamard"),
    Row("int3g64", "rtn", "none"),
    Row("int3g64", "gptq", "none"),
    Row("int3g64", "gptq", "hadamard"),
    Row("int2g64", "rtn", "none"),
    Row("int2g64", "gptq", "none", options=PUBLISHED),
    Row("int2g64", "gptq", "none"),
    Row("int2g64", "gptq", "hadamard", seeds=(0, 1, 2)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    chosen = [row for row in ROWS if options.only in str(row)]

    measured = json.loads(options.json.read_text()) if options.json.exists() else {}
    bench = Bench(measured, options.json)
    bench.row("float32", None, 0)
    for row in chosen:
        for seed in row.seeds:
            bench.row(f"{row}, seed {seed}", row, seed)
    print("\n".join(table(measured, chosen)))


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
    """Measures rows into a dict and a JSON file; loads and calibrates on first use."""

    def __init__(self, measured: dict[str, Any], path: Path) -> None:
        self.measured, self.path = measured, path
        folder = Path(os.environ.get("LOWBITQ_DATA", "../shared/data"))
        self.calibration, self.held_out = (
            folder / f"wikitext2-{part}.txt" for part in ("valid", "test")
        )
        self.model: lq.Model | None = None
        self.reference: Any = None
        self.tokens: NDArray[np.int32] | None = None

    def row(self, name: str, row: Row | None, seed: int) -> None:
        if name in self.measured:
            return
        if self.model is None:
            self.model = lq.load(demo_model())
            self.reference = Remembered(self.model)
        started = time.perf_counter()
        tested = self.model if row is None else self.quantized(self.model, row, seed)
        seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.0f} s, evaluating", file=sys.stderr)
        reference = None if row is None else self.reference
        found = lq.evaluate(tested, self.held_out, reference, **PREDICTION)
        self.measured[name] = {
            "machine": machine(),
            "calibration": CALIBRATION,
            "quantized_in_seconds": seconds,
            **found.to_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.measured, indent=1) + "\n")

    def quantized(self, model: lq.Model, row: Row, seed: int) -> lq.QuantizedModel:
        if self.tokens is None:
            self.tokens = windows(model.tokenizer, self.calibration, **CALIBRATION)
        return lq.compress(
            model,
            row.format,
            text=self.tokens,
            method=row.method,
            rotation=row.rotation,
            seed=seed,
            embedding=None,
            progress=True,
            **row.options,
        )


def table(measured: dict[str, Any], rows: list[Row]) -> list[str]:
    """Return Markdown; for several seeds, the run with the median perplexity, and the spread."""
    base = measured["float32"]
    lines = [
        "{cpu}, {isa}, {threads} threads, commit {commit}".format(**base["machine"]),
        "",
        "| weights | bits/weight | MB | perplexity (95 %) | ln ratio | KL | agreement | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
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
    compared = ["", "", "", ""]
    if one["log_ratio"] is not None:
        compared = [
            f"{one['log_ratio']['value']:.3f}{spread}",
            f"{one['kl']['value']:.3f}",
            f"{one['agreement']['value']:.1%}",
            f"{one['quantized_in_seconds']:.0f}",
        ]
    cells = [
        name,
        f"{one['bits_per_weight']:.2f}",
        f"{one['size_bytes'] / 1e6:.0f}",
        f"{one['perplexity']['value']:.2f} ({low:.2f} to {high:.2f})",
        *compared,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
