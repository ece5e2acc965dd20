"""Code shared by the benchmarks: options, the machine, taking turns, tables and results files.

    run = Run("subject", options_parser(__doc__).parse_args())
    times = run.take_turns({"ours": ours, "BLAS": blas})
    run.row("a table", {"us": times["ours"].least * 1e6, "x BLAS": ...})
    run.finish()

Candidate and reference take turns in one process. One thread is timed by processor time, more by
wall time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lowbitq as lq
from lowbitq import _core
from lowbitq.timing import Timing, take_turns

RESULTS = Path(__file__).parent / "results"
FALL_ASLEEP = 0.02  # seconds; OpenMP's threads spin about ten milliseconds after their work
REPETITIONS = 20
WIDTH = 10  # of a column


def options_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks; `description` is the file's docstring."""
    # No abbreviations, because benchmarks/__init__.py reads some options too.
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512"], help="default: the best")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="samples of each call")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", action="store_true", help=f"also save to {RESULTS.name}/")
    return parser


def machine() -> dict[str, Any]:
    """Return what figures depend on besides the code, the code's commit, and the date."""
    config = lq.show_config()
    return {
        "cpu": config["cpu"],
        "isa": config["isa"],
        "blas": config["blas_core"],
        "threads": config["threads"],
        "load": round(os.getloadavg()[0], 1),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """Return the commit of the code; newly saved results do not make it dirty."""
    git = ["git", "-C", str(RESULTS.parent)]
    name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "..", f":!{RESULTS.name}"])
    return (name.stdout.strip() or "unknown") + ("-dirty" if changed.returncode == 1 else "")


class Run:
    """One run of a benchmark: its options, its machine and the tables that it fills.

    Parameters
    ----------
    subject : str
        The SUBJECT in bench_SUBJECT; names the section of the results file.
    options : argparse.Namespace
        From `options_parser`; its threads and instruction set are applied.
    """

    def __init__(self, subject: str, options: argparse.Namespace) -> None:
        self.subject, self.options = subject, options
        lq.set_num_threads(options.threads)
        if options.isa:
            _core.use_isa(isa=options.isa)
        self.machine = machine()
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.goals: list[dict[str, Any]] = []
        if not options.json:
            print(lq.show_config())
            now = {name: self.machine[name] for name in ("load", "commit", "date")}
            print(", ".join(f"{name} {value}" for name, value in now.items()))

    def take_turns(
        self, calls: Mapping[str, Callable[[], object]], repetitions: int | None = None
    ) -> dict[str, Timing]:
        """Time all `calls` as lowbitq.timing does, with the options' repetitions."""
        rest = FALL_ASLEEP if self.options.threads > 1 else 0.0
        repetitions = repetitions or self.options.repetitions
        return take_turns(calls, repetitions=repetitions, rest=rest)

    def row(self, table: str, columns: Mapping[str, Any]) -> None:
        """Add a row to a table and print it; all rows of a table have the same columns."""
        rows = self.tables.setdefault(table, [])
        rows.append(dict(columns))
        if self.options.json:
            return
        widths = [max(WIDTH, len(title)) for title in columns]
        if len(rows) == 1:
            print(f"\n{table}")
            print(" ".join(f"{t:>{w}}" for t, w in zip(columns, widths, strict=True)))
        cells = zip(columns.values(), widths, strict=True)
        print(" ".join(f"{_cell(value):>{width}}" for value, width in cells), flush=True)

    def goal(self, ours: str, reference: str, ratio: float, goal: float) -> None:
        """Add to the last table how much better than the reference we are and want to be."""
        met = "yes" if ratio >= goal else "no"
        self.goals.append(
            {"ratio": ratio, "goal": goal, "met": met, "what": f"{ours} against {reference}"}
        )

    def finish(self) -> None:
        """Print the goals; print and save the JSON object if requested."""
        for columns in self.goals:
            self.row("goals", columns)
        result = {**self.machine, "kernels": dict(lq.show_config()["kernels"]), **self.tables}
        if self.options.json:
            print(json.dumps(result, indent=1))
        if self.options.save:
            self._save(result)

    def _save(self, result: dict[str, Any]) -> None:
        """Save to the file of this machine and day, replacing any section of the same name."""
        cpu = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@", " ", self.machine["cpu"])
        cpu = "-".join(re.findall(r"[a-z0-9.]+", cpu.lower()))
        path = RESULTS / f"{self.machine['date']}-{cpu}.json"
        sections = json.loads(path.read_text()) if path.exists() else {}
        threads = self.machine["threads"]
        name = f"{self.subject}, {self.machine['isa']}, {threads} thread{'s'[: threads > 1]}"
        sections[name] = result
        path.write_text(json.dumps(dict(sorted(sections.items())), indent=1) + "\n")


def _cell(value: object) -> str:
    """Format a value; numbers get three or more significant digits."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value) or value == 0:
        return "-" if math.isnan(value) else str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
