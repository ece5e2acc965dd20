"""What each function of _core accepts, read from the argument tables in csrc/python."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "csrc" / "python"
ENTRY = re.compile(r"LBQ_(INOUT|IN|OUT|HANDLES|HANDLE|INT|FLOAT|BOOL|TEXT)(_OR_NONE|_OVER)?\(")
LIMITS = {"INT32_MAX": 2**31 - 1, "PY_SSIZE_T_MAX": 2**63 - 1, "FLT_MAX": 3.4028234e38}


@dataclass(frozen=True)
class Argument:
    """One row of a table: `what` is a dtype and `shape` its axes, or `what` names a handle."""

    name: str
    kind: str
    what: str = ""
    shape: str = ""
    or_none: bool = False
    over: str = ""
    low: float = 0
    high: float = 0


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _call(text: str, begin: int) -> str:
    """The arguments of the call whose bracket opens right before `begin`."""
    depth, end = 1, begin
    while depth:
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    return text[begin : end - 1]


def _argument(kind: str, suffix: str, fields: list[str], strings: dict[str, str]) -> Argument:
    name = fields[0].strip('"')
    if kind in ("IN", "OUT", "INOUT"):
        dtype = fields[2].removeprefix("NPY_").removeprefix("LBQ_").lower()
        over = fields[4].strip('"') if suffix == "_OVER" else ""
        return Argument(name, kind, dtype, fields[3].strip('"'), suffix == "_OR_NONE", over)
    if kind.startswith("HANDLE"):
        what = strings.get(fields[2], fields[2]).strip('"')
        return Argument(name, kind, what.removeprefix("lowbitq."), or_none=suffix == "_OR_NONE")
    if kind in ("INT", "FLOAT"):
        low, high = (float(eval(field, {}, LIMITS)) for field in fields[2:])
        return Argument(name, kind, low=low, high=high)
    return Argument(name, kind)


def _macros(source: str) -> dict[str, str]:
    """Macros that stand for rows of a table."""
    joined = source.replace("\\\n", " ")
    return dict(re.findall(r"#define (\w+)(?:\(to\))? +(LBQ_[^\n]*)", joined))


def _expand(text: str, macros: dict[str, str]) -> str:
    """Replace macros that stand for rows, whose parameter does not matter here."""
    while found := re.search(r"\b(" + "|".join(macros) + r")\b(\()?", text):
        rest = found.end() + (len(_call(text, found.end())) + 1 if found[2] else 0)
        text = text[: found.start()] + macros[found[1]] + text[rest:]
    return text


def read_tables() -> dict[str, list[Argument]]:
    """Map each bound function to its arguments, in order."""
    shared = _macros((FOLDER / "code_args.h").read_text())
    tables = {}
    for path in sorted(FOLDER.glob("bind_*.c")):
        source = path.read_text()
        macros = shared | _macros(source)
        strings = dict(re.findall(r'#define (\w+) ("[^"]*")', source))
        bodies = dict(
            re.findall(r"^(?:LBQ_BINDING\()?(\w+)\)?(?:\(.*?\))?\n\{(.*?)^\}", source, re.M | re.S)
        )
        for name in re.findall(r"^LBQ_BINDING\((\w+)\)", source, re.M):
            body = bodies[name]
            if (other := re.search(r"return (\w+)\(module, args, kwargs", body)) is not None:
                body = bodies[other[1]]
            spec = re.search(r"const lbq_arg spec\[\] = \{(.*?)\};", body, re.S)
            text = _expand(spec[1] if spec else "", macros)
            tables[name] = [
                _argument(row[1], row[2] or "", _split(_call(text, row.end())), strings)
                for row in ENTRY.finditer(text)
            ]
    return tables
