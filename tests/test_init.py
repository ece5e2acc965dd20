"""The public names, and what an import says and costs."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowbitq as lq

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", lq.__all__)
def test_public_name_is_documented_with_an_example(name):
    value = getattr(lq, name)
    assert (value.__doc__ or "").strip()
    if inspect.isfunction(value):
        sections = ["Returns\n", "Examples\n"]
        if inspect.signature(value).return_annotation in (None, "None"):
            sections.remove("Returns\n")
        if inspect.signature(value).parameters:
            sections += ["Parameters\n", "Raises\n"]
        assert [s for s in sections if s not in value.__doc__] == []
        assert doctest.DocTestParser().get_examples(value.__doc__), "no runnable example"


def test_all_names_every_function_and_class():
    ours = [n for n, v in vars(lq).items() if getattr(v, "__module__", "").startswith("lowbitq")]
    assert {name for name in ours if not name.startswith("_")} == set(lq.__all__)


def test_dir_and_help_show_what_is_public():
    names = {name for name in dir(lq) if not name.startswith("__")}
    assert names == set(lq.__all__)
    words = set(re.findall(r"\w+", lq.__doc__))
    missing = set(lq.__all__) - words
    assert all(inspect.isclass(getattr(lq, name)) for name in missing), "functions without a place"


def test_version_is_the_package_version():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lq.__version__ == project["version"]


def test_missing_core_says_how_to_build_it():
    code = "import sys; sys.modules['lowbitq._core'] = None; import lowbitq"
    failed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the C module lowbitq._core cannot be loaded")
    assert "pip install -e ." in last


def test_import_loads_no_heavy_module_before_it_is_needed():
    code = "import sys, lowbitq; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    late = {"argparse", "gguf", "jinja2", "matplotlib", "safetensors", "tqdm", "yaml"}
    assert not late & set(loaded)


def test_configuration_shows_one_entry_per_line():
    shown = repr(lq.show_config()).splitlines()
    assert [line.split()[0] for line in shown if line[0] != " "] == list(lq.show_config())
    assert shown[0].split() == ["version", lq.__version__]
    assert max(map(len, shown)) <= 80


def test_configuration_names_every_kernel():
    shown = str(lq.show_config())
    assert [name for name in lq.show_config()["kernels"] if name not in shown] == []


@pytest.mark.parametrize("threads", [0, 257])
def test_impossible_number_of_threads_is_refused(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}"):
        lq.set_num_threads(threads)
