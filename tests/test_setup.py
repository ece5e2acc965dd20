"""Building from source where something is missing: one line that says what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_no_compiler(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks
    built = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    found = subprocess.run(
        [sys.executable, ROOT / "setup.py", "-q", "build_ext", *built],
        env=os.environ | {"CC": "absent-cc"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    line = found.stderr.strip().splitlines()[-1]
    assert line.startswith("error: lowbitq is written in C, and there is no C compiler 'absent-cc'")
    assert "apt install gcc" in line
    assert not list(tmp_path.rglob("*.o"))


def test_what_is_published_is_listed():
    """Every package of the source is one of the wheel."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    folders = [path.parent for path in (ROOT / "lowbitq").rglob("__init__.py")]
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
