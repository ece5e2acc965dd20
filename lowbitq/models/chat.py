"""Chat templates: the Jinja programs that models ship, rendered as `transformers` renders them.

A template is code from a stranger. It runs in a sandbox that bounds its time and memory, with the
environment that templates are written for: trimmed blocks, ``break`` and ``continue``, a
``generation`` block, and the functions ``raise_exception``, ``strftime_now`` and a ``tojson`` that
does not escape HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from lowbitq._core import FormatError
from lowbitq.models.sandbox import budget, compile_template, concatenated


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; it yields its contents."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    return concatenated(encoder.iterencode(value))  # indentation grows with depth


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return compile_template(
        template,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        filters={"tojson": _tojson},
        functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
    )


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation in the format that a model was trained on.

    Parameters
    ----------
    template : str
        A Jinja template.
    messages : sequence of mappings
        Each with ``"role"`` and ``"content"``, and any other key that the template reads.
    add_generation_prompt : bool, default=True
        End with the words that open the assistant's turn.
    variables : mapping, default=None
        Other variables of the template, such as ``bos_token`` or ``tools``.

    Returns
    -------
    str

    Raises
    ------
    TypeError
        If `messages` is not a sequence of mappings.
    ValueError
        If the template refuses the conversation (such as two user turns in a row), fails, or takes
        too much time or memory.
    FormatError
        If the template itself is malformed; the message names the line.

    Examples
    --------
    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render_chat(template, [{"role": "user", "content": "Hello"}])
    '<user>Hello'
    """
    if isinstance(messages, (str, Mapping)) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            'messages: expected a list of mappings like {"role": "user", "content": "Hi"}'
        )
    try:
        with budget():
            return _compile(template).render(
                {"tools": None, "documents": None}
                | dict(variables or {})
                | {"messages": messages, "add_generation_prompt": add_generation_prompt}
            )
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"chat template: line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {error.message}") from error
    except Exception as error:  # any that the template causes, MemoryError included
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from error
