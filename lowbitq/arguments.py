"""Kinds of arguments of the command line, and the options that several commands share.

The only importer of argparse: other modules get parsers of the class `Parser`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lowbitq as lq
from lowbitq.optimizers import RATES
from lowbitq.suggestions import did_you_mean


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except uninformative ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", {}):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults, and that suggests what an unknown word may have meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = did_you_mean(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{meant}") from None


class Noted(argparse.Action):
    """Stores a value and notes in `given` that the user gave it, for options that exclude it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = [*namespace.given, option_string]


class NotedPair(Noted):
    """The same, of an option that may be given several times: a dict of all pairs."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, value = values
        both = getattr(namespace, self.dest) | {name: value}
        super().__call__(parser, namespace, both, option_string)


def model_argument(parser: Parser) -> None:
    model = "GGUF file, Hugging Face folder, or saved lowbitq model"
    parser.add_argument("model", metavar="MODEL", help=model)


def bits_option(parser: Parser) -> None:
    bits = "run only the first copies of a progressive model, with at most this many bits in all"
    parser.add_argument("--bits", type=float, help=f"{bits} (default: all)")


def text_option(parser: Parser, use: str) -> None:
    default = "(default: WikiText-2 in the folder LOWBITQ_DATA, else Python's help texts)"
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"UTF-8 text {use} {default}")


def report_option(parser: Parser) -> None:
    page = "also write a page of HTML: layers, figures (matplotlib), evaluation, options"
    parser.add_argument("--report", type=Path, metavar="FILE", help=page)


def windows_options(parser: Parser) -> None:
    parser.add_argument("--window", type=positive, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=positive, help="number of windows (default: all)")


def calibration_options(parser: Parser, *, samples: int, window: int) -> None:
    parser.add_argument("--samples", type=positive, default=samples, help="calibration windows")
    parser.add_argument("--window", type=positive, default=window, help="tokens per window")
    seed = "seed for samples and rotations"
    parser.add_argument("--seed", type=int, default=0, action=Noted, help=seed)


def work_dir_options(parser: Parser, default: str) -> None:
    place = f"(default: {default}, removed at the end)"
    parser.add_argument("--work-dir", type=Path, help=f"where finished blocks are kept {place}")
    parser.add_argument("--restart", action="store_true", help="discard the blocks kept there")


def utf8(text: str) -> str:
    """Read as UTF-8 any text that the locale, such as C, could not decode."""
    if not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"not text: {error}") from error


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def override(text: str) -> tuple[str, str]:
    pattern, equals, plan = text.partition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=FORMAT")
    return pattern, layer(plan)


def pace(text: str) -> tuple[str, float]:
    pattern, equals, factor = text.partition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=FACTOR")
    return pattern, float(factor)


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def one_format(text: str) -> lq.Format:
    try:
        return lq.Format.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def formats(text: str) -> list[lq.Format]:
    return [one_format(name) for name in text.split(",")]


def batch(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """What reads numbers that are separated by commas; none from an empty text."""

    def numbers(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(one) for one in text.split(",") if text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return numbers


def kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := set(kinds) - set(RATES):
        expected = f"expected some of {', '.join(RATES)}"
        raise argparse.ArgumentTypeError(f"unknown kinds {', '.join(sorted(unknown))}; {expected}")
    return kinds


def layer(text: str) -> str:
    try:
        return str(lq.LayerPlan.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def layers(text: str) -> list[str]:
    return [layer(one.strip()) for one in text.split(",")]


def embedding(text: str) -> lq.Format | None:
    return None if text == "none" else one_format(text)


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .svg or .pdf")
    return path
