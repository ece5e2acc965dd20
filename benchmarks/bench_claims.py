"""The chapter's claims about copies of layers, each with a figure and a verdict.

    LOWBITQ_DATA=../shared/data python -m benchmarks.bench_claims [--only dual] [--windows 16]

SmolLM2-135M is quantized by each plan in ROWS, calibrated on 12 windows of 1024 tokens of
wikitext2-valid.txt without drift correction, and compared with its float model on the first windows
of wikitext2-test.txt. Each row is a process of its own; rows already in the JSON file are not
measured again. Losses are ln(perplexity / that of the float model); a ratio of two losses has a
95 % interval by bootstrap over windows. A claim is kept or refuted if the whole interval says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lowbitq as lq
from benchmarks.harness import RESULTS, machine
from lowbitq.commands import demo_model
from lowbitq.models.slots import SLOTS
from lowbitq.tables import as_text, columns_of
from lowbitq.texts import windows

CALIBRATION = {"samples": 12, "window": 1024, "seed": 0}
WINDOW = 2048

# What the two copies of each kind of layer may keep of the ranges of their inputs.
CLIPS = {f"*.{slot.name}": {"clip1": (0.5, 1.0), "clip2": (0.5, 1.0)} for slot in SLOTS}

# Plans of all layers, and options of the plan; "search": the space of 50 trials after it.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("int2g64", {}),
    "one, nearest": ("int2g64", {"method": "rtn"}),
    "dual": ("int2g64 + int2g64 hadamard", {}),
    "dual, same rotation": ("int2g64 + int2g64", {}),
    "dual, orthogonal": ("int2g64 + int2g64 orthogonal", {}),
    "dual, nearest": ("int2g64 + int2g64 hadamard", {"method": "rtn"}),
    "triple": ("int2g64 + int2g64 hadamard + int2g64 hadamard", {}),
    "residual": ("int2g64 + int2g64 residual", {}),
    "residual, turned": ("int2g64 + int2g64 hadamard residual", {}),
    "4-bit inputs": ("int4g64 a4", {}),
    "4-bit inputs, shared": ("int4g64 a4 + int4g64 a4 hadamard shared", {}),
    "4-bit inputs, searched": ("int4g64 a4 + int4g64 a4 hadamard shared", {"search": CLIPS}),
    "four bits": ("int4g64", {}),
    "four bits, nearest": ("int4g64", {"method": "rtn"}),
}


@dataclass(frozen=True)
class Claim:
    """That the loss of one row is within a range, relative to another row's."""

    where: str
    text: str
    row: str
    against: str
    low: float
    high: float


SHARED = "4-bit inputs, shared", "4-bit inputs"
CLAIMS = [
    Claim("5.1.5", "two rotations lose at least 15 % less than one", "dual", "one", 0, 0.85),
    Claim("5.1.5", "the same, rounded to nearest", "dual, nearest", "one, nearest", 0, 0.85),
    Claim("issue", "two rotations lose at most half", "dual", "one", 0, 0.5),
    Claim("5.1.3", "it is the other rotation", "dual", "dual, same rotation", 0, 0.85),
    Claim("5.1.5", "a third rotation gains less than 40 %", "triple", "dual", 0.6, 1),
    Claim("5.1.5", "Hadamard + orthogonal is better", "dual, orthogonal", "dual", 0, 1),
    Claim("5.1.3", "a residual beats an average", "residual", "dual", 0, 1),
    Claim("two-bit", "it is best turned", "residual, turned", "residual", 0, 1),
    Claim("issue", "a shared copy halves the loss by 4-bit inputs", *SHARED, 0, 0.5),
    Claim("5.3.5", "searched clips lose 10 % less", "4-bit inputs, searched", SHARED[0], 0, 0.9),
    Claim("5.4", "residual copies: 4-bit nearest", "residual, turned", "four bits, nearest", 0, 1),
    Claim("5.4", "residual copies: 4-bit GPTQ", "residual, turned", "four bits", 0, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--windows", type=int, default=16, help="of the test text")
    parser.add_argument("--json", type=Path, default=RESULTS / "claims.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure this row and nothing else
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.windows, options.json)
        return
    for name in ROWS:
        if options.only in name and name not in known(options.json):
            again = [sys.executable, "-m", "benchmarks.bench_claims", "--one", name]
            again += ["--windows", str(options.windows), "--json", str(options.json)]
            subprocess.run(again, check=True)
    print("\n".join(tables(known(options.json))))


def known(path: Path) -> dict[str, Any]:
    """Return what has been measured."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def measure(name: str, count: int, path: Path) -> None:
    """Quantize by one plan, evaluate, and add the row to the file."""
    folder = Path(os.environ.get("LOWBITQ_DATA", "../shared/data"))
    model, (plan, how) = lq.load(demo_model()), ROWS[name]
    tokens = windows(model.tokenizer, folder / "wikitext2-valid.txt", **CALIBRATION)
    options = {"embedding": None, "drift": False} | how
    space = options.pop("search", None)
    small = lq.compress(model, plan, text=tokens, **options)
    if space:
        small = lq.search(model, small, tokens, space, trials=50, window=WINDOW // 2).model
    found = lq.evaluate(small, folder / "wikitext2-test.txt", model, window=WINDOW, windows=count)
    assert found.log_ratio is not None
    assert found.kl is not None
    row = {
        "plan": plan,
        "method": how.get("method", "gptq"),
        "bits": found.bits_per_weight,
        "ln ratio": float(found.log_ratio),
        "KL": float(found.kl),
        "tokens/s": found.tokens_per_second,
        "per window": found.log_ratio.per_window.tolist(),
    }
    measured = known(path)
    measured[name] = row | {"machine": machine(), "calibration": CALIBRATION}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(name, {key: row[key] for key in ("bits", "ln ratio", "KL")}, file=sys.stderr)


def tables(measured: dict[str, Any]) -> list[str]:
    """Return the rows, and the claims that can be judged by them."""
    hidden = ["per window", "machine", "calibration"]
    rows = [{"row": name} | measured[name] for name in ROWS if name in measured]
    judged = [
        judge(claim, measured)
        for claim in CLAIMS
        if claim.row in measured and claim.against in measured
    ]
    result = [as_text(columns_of(rows, without=hidden), rows)]
    return result + (["", as_text(columns_of(judged), judged)] if judged else [])


def judge(claim: Claim, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the ratio of two losses with its interval, and the verdict."""
    ours, theirs = (np.array(measured[row]["per window"]) for row in (claim.row, claim.against))
    low, high = _interval(lambda at: float(ours[at].mean() / theirs[at].mean()), len(ours))
    if claim.low <= low and high <= claim.high:
        verdict = "kept"
    elif high < claim.low or low > claim.high:
        verdict = "refuted"
    else:
        verdict = "open"
    return {
        "claim": claim.text,
        "from": claim.where,
        "ratio of losses": float(ours.mean() / theirs.mean()),
        "95 %": f"{low:.3f} to {high:.3f}",
        "claimed": f"{claim.low:g} to {claim.high:g}",
        "verdict": verdict,
    }


def _interval(of: Callable[[NDArray[np.intp]], float], count: int) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    draws = [of(rng.integers(0, count, count)) for _ in range(2000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
