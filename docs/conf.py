"""How the site is built; without a network: python -m sphinx -W --keep-going docs build/docs"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO

from sphinx.application import Sphinx

import lowbitq as lq
from lowbitq import cli

project = "lowbitq"
project_copyright = "the authors of lowbitq"
version = release = lq.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 3
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
# Words of types such as "ndarray of shape (rows, cols)" are also attributes of several classes.
suppress_warnings = ["ref.python"]


def _api() -> str:
    """All public names, under the headings of the package's own map."""
    rest = set(lq.__all__)
    lines = []
    for heading, names in _map():
        lines += [heading, "-" * len(heading), ""]
        for name in names:
            lines += _entry(name)
        rest.difference_update(names)
    lines += ["Further names", "-------------", ""]
    for name in sorted(rest):
        lines += _entry(name)
    return "\n".join(lines)


def _map() -> Iterator[tuple[str, list[str]]]:
    """The headings of the package's docstring, and the public names after each."""
    assert lq.__doc__ is not None
    text = re.sub(r"\n {8,}", " ", lq.__doc__)
    for heading, names in re.findall(r"^(\w+(?: \w+)*) {2,}(.+)$", text, flags=re.MULTILINE):
        yield heading, [name for name in re.findall(r"\w+", names) if name in lq.__all__]


def _entry(name: str) -> list[str]:
    if inspect.isclass(getattr(lq, name)):
        return [f".. autoclass:: lowbitq.{name}", "   :members:", ""]
    return [f".. autofunction:: lowbitq.{name}", ""]


def _commands() -> str:
    """The help of every command, as the command line prints it."""
    os.environ["COLUMNS"] = "88"
    lines = []
    for words in ([], *([name] for name in cli._commands())):
        printed = StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            cli.main([*words, "--help"])
        lines += [
            f"## {' '.join(['lowbitq', *words])}",
            "",
            "```text",
            printed.getvalue(),
            "```",
            "",
        ]
    return "\n".join(lines)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "api":
        source[0] += _api()
    elif page == "command-line":
        source[0] += _commands()


def _keep_initials(
    app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]
) -> None:
    """Keep an author's initial at the start of a line from being read as a number of a list."""
    lines[:] = [re.sub(r"^(\s*[A-Z])\. ", r"\1\\. ", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("source-read", _fill)
    app.connect("autodoc-process-docstring", _keep_initials)
