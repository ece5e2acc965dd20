"""Jinja's immutable sandbox, with bounds on the time and memory that a template takes.

Jinja gives a template access to its variables only, but lets it count to a billion or double a
string forty times. Here each operator, call, filter, loop iteration and output is charged to a
budget, by one rule: no value, including everything it contains, exceeds the budget. Work
proportional to its operands is therefore bounded; the cost of anything faster-growing is estimated
first.
"""

# ruff: noqa: N802 (Jinja finds a visitor by the name of the node)

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2.visitor import NodeTransformer

# Far above what conversations need: a million steps, or 33 million characters.
_SIZE = 1 << 25  # characters, and _ITEM for each item of a list
_ITEM = 64
_STEP = 32
_SECONDS = 1.5  # of CPU time, so a busy machine refuses no more than an idle one
_SOURCE = 1 << 16  # characters of a template, parsed in half a second; published ones have 20,000
_BITS = 1 << 20  # of an integer

# Functions whose result is as large as a number among their arguments.
_WIDE = {"center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice", "round"}
# Functions that may take time quadratic in their text, and the maximum length of that text.
_SLOW = {"urlize", "striptags", "wordwrap", "pprint", "encode", "decode", "strftime_now"}
_SLOW_SIZE = 1 << 14
# Widths given by values: ``%*d`` and ``{:{width}}``.
_DYNAMIC_WIDTH = re.compile(r"%[-+ #0\d.]*\*|\{[^}]*\{")


class Exhausted(jinja2.TemplateError):
    """A template takes too much time or memory."""

    def __init__(self, what: str) -> None:
        super().__init__(f"takes too much {what}")


class _Budget:
    def __init__(self) -> None:
        self.left = _SIZE
        self.latest, self.end = time.monotonic() + _SECONDS, time.thread_time() + _SECONDS

    def spend(self, size: int = 0) -> None:
        """Charge for one step that makes or reads `size`."""
        self.left -= _STEP + size
        if self.left < 0:
            raise Exhausted("time or memory")
        # The CPU clock is slow to read.
        if time.monotonic() > self.latest and time.thread_time() > self.end:
            raise Exhausted("time")


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def budget() -> Iterator[None]:
    """Compile and render within a new budget."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def compile_template(
    source: str,
    *,
    extensions: Iterable[type[jinja2.ext.Extension]],
    filters: Mapping[str, Callable[..., Any]],
    functions: Mapping[str, Callable[..., Any]],
) -> jinja2.Template:
    """Compile a template; call this and render within the same `budget`.

    Raises
    ------
    TemplateError
        If the template is malformed or too long.
    """
    if len(source) > _SOURCE:
        raise Exhausted(f"space: {len(source)} characters, expected at most {_SOURCE}")
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[*extensions], finalize=_spent
    )
    environment.filters |= {"join": _join, **filters}
    environment.filters = {name: _bounded(name, f) for name, f in environment.filters.items()}
    environment.tests = {name: _reading(test) for name, test in environment.tests.items()}
    environment.filters |= {f.__name__: f for f in (_counted, _spent, _read, _concatenated)}
    environment.globals.update({name: _bounded(name, f) for name, f in functions.items()})
    environment.globals["namespace"] = _Namespace
    del environment.globals["lipsum"]  # made for web pages, and slow
    return environment.from_string(source)


def concatenated(pieces: Iterable[str]) -> str:
    """Join pieces; charge for each as it arrives."""
    paid = []
    for piece in pieces:
        _budget.get().spend(len(piece))
        paid.append(piece)
    return "".join(paid)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        _Instrument().visit(tree)
        tree.set_environment(self)
        return tree

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what a template, macro or block writes."""
        return concatenated(pieces)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        _forecast(operator, [left, right])
        return _spent(super().call_binop(context, operator, left, right))

    def call(
        self, __context: jinja2.runtime.Context, __obj: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(__obj, jinja2.runtime.LoopContext):
            args = tuple(_counted(arg) for arg in args)
        else:
            method = getattr(__obj, "__wrapped__", __obj)  # of str.format, which Jinja wraps
            name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
            if name == "join":
                args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            values = [owner] if isinstance(owner, (str, bytes, int)) else []
            _forecast(name, [*values, *args, *kwargs.values()])
        return _spent(super().call(__context, __obj, *args, **kwargs))


class _Instrument(NodeTransformer):
    """Insert into a template's tree the calls that Jinja's sandbox does not make itself."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "_read")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "_read")
        return node

    def visit_List(self, node: jinja2.nodes.Expr) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_spent")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_spent") if isinstance(node.arg, jinja2.nodes.Slice) else node


class _Namespace(jinja2.utils.Namespace):
    """Its repr leaves out the attributes, which may contain each other."""

    def __repr__(self) -> str:
        return "<Namespace>"


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: Any = None
) -> str:
    """Jinja's filter, charging for each item before it is written."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    pieces = []
    for item in value:
        _budget.get().spend(_size(item) + _size(d))
        pieces.append(str(item))
    return str(d).join(pieces)


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    spend = _budget.get().spend
    for item in items:
        spend(_length(item))
        yield item


def _concatenated(items: list[Any]) -> str:
    _budget.get().spend(sum(map(_size, items)))
    return "".join(map(str, items))


def _read(value: Any) -> Any:
    """Charge for scanning a value."""
    _budget.get().spend(_size(value) // 8)
    return value


def _spent(value: Any) -> Any:
    """Charge for a value that a template made."""
    if isinstance(value, Iterator) and not isinstance(value, jinja2.runtime.LoopContext):
        return _counted(value)
    _budget.get().spend(min(_size(value), _ITEM * _length(value)))
    return value


def _length(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length() // 8
    try:
        return len(value)
    except TypeError:
        return 0


def _size(value: Any) -> int:
    """Return the size of a value and its contents, each counted as often as it would be written."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 8
        elif isinstance(item, (list, tuple, set, frozenset, range, Mapping)):
            total += _ITEM * len(item)
            if total <= _SIZE and not isinstance(item, range):
                waiting += item
                waiting += item.values() if isinstance(item, Mapping) else ()
        if total > _SIZE:
            raise Exhausted("memory")
    return total


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter or function: estimate its cost before the call, charge for its result after."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _forecast(name, [*args[first:], *kwargs.values()])
        return _spent(function(*args, **kwargs))

    return bounded


def _reading(test: Any) -> Callable[..., Any]:
    """Wrap a test, such as ``in``: charge for its operands."""

    @functools.wraps(test)
    def reading(*args: Any) -> Any:
        for arg in args:
            _read(arg)
        return test(*args)

    return reading


def _forecast(name: str, values: list[Any]) -> None:
    """Raise Exhausted if a function's result would be much larger than its arguments."""
    _budget.get().spend()
    if not values:
        return
    value, *rest = values
    size = sum(map(_size, rest))
    numbers = [abs(item) for item in rest if isinstance(item, int)]
    made = 0
    if name in ("*", "**"):
        made = _multiplied(name, value, rest[0])
    elif name in ("%", "format", "format_map"):
        made = _formatted(value, size) if isinstance(value, str) else 0
    elif name == "replace" and len(rest) > 1:
        old, new = str(rest[0]), str(rest[1])  # keywords may swap them
        text = str(value)
        made = max(text.count(old) * len(new), text.count(new) * len(old))
    elif name == "join" and isinstance(value, str):
        made = sum(map(_length, rest)) * len(value)
    elif name == "sum" and not all(isinstance(item, (int, float, str)) for item in rest):
        raise Exhausted("time: sum of lists")
    elif name in ("indent", "expandtabs", "translate", "wordwrap"):
        made = _size(value) * max([size, *numbers, 1])
    elif name == "tojson":
        made = _size(value) // _ITEM * max([size, *numbers, 1])
    elif name in _WIDE:
        made = _ITEM * max(numbers, default=0)
    if name in _SLOW and _size(value) + size > _SLOW_SIZE:
        raise Exhausted(f"time: {name} of a long text")
    if made > _SIZE:
        raise Exhausted("memory")


def _multiplied(name: str, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        return (sum(bits) if name == "*" else bits[0] * abs(right)) * (_SIZE // _BITS)
    number, other = (left, right) if isinstance(left, int) else (right, left)
    repeated = isinstance(number, int) and isinstance(other, (str, bytes, list, tuple))
    return number * max(_size(other), 1) if repeated else 0


def _formatted(form: str, size: int) -> int:
    if _DYNAMIC_WIDTH.search(form):
        raise Exhausted("memory: width of a format")
    widths = sum(int(digits) for digits in re.findall(r"\d{1,19}", form))
    return len(form) + (form.count("%") + form.count("{")) * size + widths
