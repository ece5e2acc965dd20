"""The typed signatures of _core.pyi are those of the module that was built."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbitq import _core

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in dir(_core) if not name.startswith("_")]
FUNCTIONS = [name for name in FUNCTIONS if not isinstance(getattr(_core, name), type)]


def test_stubtest_finds_no_difference():
    # The parent of the package that is tested, so that its stub is the one that is read.
    parent = Path(_core.__file__).parents[1]
    command = [sys.executable, "-m", "mypy.stubtest", "lowbitq._core"]
    found = subprocess.run(
        [*command, "--mypy-config-file", ROOT / "pyproject.toml"],
        cwd=parent,
        env={**os.environ, "MYPYPATH": str(parent)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_documents_its_signature(name):
    function = getattr(_core, name)
    inspect.signature(function)
    assert (function.__doc__ or "").strip(), "the docstring says nothing after the signature"
