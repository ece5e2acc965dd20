"""Every notebook runs from top to bottom, and was run before it was committed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_notebook_runs(path, kind, tmp_path, request):
    """With the demo model, which takes a minute, and without."""
    model = request.getfixturevalue("smollm2") if kind == "demo" else tmp_path / "absent.gguf"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOWBITQ_DEMO_MODEL": str(model)}
    program = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    if "matplotlib" in program:
        pytest.importorskip("matplotlib")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_run_in_order(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"]
        assert "def " not in "".join(cell["source"]), "a function that the package should have"
