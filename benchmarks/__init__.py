"""Measurements; each file runs with python -m benchmarks.bench_SUBJECT."""

import subprocess
from pathlib import Path

import lowbitq as lq

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str | int]:
    """What a figure depends on besides the code, and the commit of the code."""
    config = lq.show_config()
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True
    )
    return {
        "cpu": names[0].split(":")[1].strip() if names else "unknown CPU",
        "isa": config["isa"],
        "threads": config["threads"],
        "commit": commit.stdout.strip() or "unknown",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
