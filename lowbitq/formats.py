"""Formats: how the numbers of a matrix are stored, as a value and as a short text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowbitq import _core
from lowbitq.suggestions import did_you_mean

_CODES = _core.codes()
_GROUPS = (16, 32, 64, 128)


def _spans() -> str:
    """The codes for a message: "int1 to int8, ternary"."""
    kinds: dict[str, list[str]] = {}
    for name, code in _CODES.items():
        kinds.setdefault(code["kind"], []).append(name)
    return ", ".join(" to ".join(dict.fromkeys([min(k), max(k)])) for k in kinds.values())


def _common() -> Iterator[str]:
    """Texts of formats without integer scales and zeros, to suggest."""
    for code, properties in _CODES.items():
        groups = [f"g{group}" for group in _GROUPS if group % properties["multiple"] == 0]
        for place in ["", *groups, "tensor"]:
            yield code + place
            if properties["offsets"]:
                yield code + place + "sym"


GRAMMAR = (
    f"a code ({_spans()}), then "
    "optionally g16, g32, g64, g128 (columns per scale; none: one scale per row) or tensor (one "
    "scale for the matrix), then optionally sym (no offset), then optionally s4 or s8 (integer "
    "scales of that many bits), then optionally, for an int code without offset, z and the code "
    "that stands for zero (none: the middle); for example int4g64, int2g16s4, int4g32symz8, ternary"
)

_TEXT = re.compile(
    rf"(?P<code>{'|'.join(map(re.escape, _CODES))})"
    r"(?:g(?P<group>16|32|64|128)|(?P<tensor>tensor))?(?P<sym>sym)?(?:s(?P<scale>4|8))?"
    r"(?:z(?P<zero>[0-9]+(?:\.[0-9]+)?))?"
)


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: the code of its numbers, and which of them share a scale.

    Parameters
    ----------
    code : str
        ``"int4"``, ``"ternary"``, ``"binary"``, ``"nf4"``, ``"log3"``, ``"kmeans2"`` and the like.
    group : int or None, default=None
        Columns that share a scale: 16, 32, 64 or 128. None: all columns of a row do.
    per_tensor : bool, default=False
        One scale for the whole matrix; excludes `group`.
    symmetric : bool, default=True
        No offset: the levels lie around zero. Only codes of kind ``int`` can be asymmetric.
    scale_bits : int, default=16
        16: a scale is a float16. 8 or 4: an integer times one float of the matrix. 0: there is only
        that float (`per_tensor`).
    zero : float or None, default=None
        The code that stands for zero, 0 to ``level_count - 1``; fractions are allowed and rounded
        to float32. Only symmetric formats of kind ``int`` let it be chosen. A whole number, such as
        the ``2**(bits-1)`` of Q4_0 in GGUF, represents zero exactly. None: the middle of the codes,
        so that half of them are negative. Given as a number, the middle is stored as None.
        `zero_level` is the code in effect.

    Raises
    ------
    ValueError
        If the fields do not fit together.

    Examples
    --------
    >>> format = Format.parse("int4g64")
    >>> format.bits, format.level_count, format.group, format.symmetric
    (4, 16, 64, False)
    >>> format.bits_per_weight(64, 576)
    4.5
    >>> str(Format("int2", group=16, scale_bits=4))
    'int2g16s4'
    >>> str(Format("int4", group=32, zero=8)), Format("int4", zero=7.5).zero
    ('int4g32symz8', None)
    """

    code: str
    group: int | None = None
    per_tensor: bool = False
    symmetric: bool = True
    scale_bits: int = 16
    zero: float | None = None

    def __post_init__(self) -> None:
        if self.code not in _CODES:
            raise ValueError(f"unknown code {self.code!r}; expected {GRAMMAR}")
        if self.group not in (None, *_GROUPS):
            raise ValueError(f"group is {self.group}, expected 16, 32, 64, 128 or None")
        if self.per_tensor and self.group:
            raise ValueError("a format has one scale per tensor or per group, not both")
        if self.scale_bits not in ((0,) if self.per_tensor else (16, 8, 4)):
            expected = "0 with one scale per tensor" if self.per_tensor else "16, 8 or 4"
            raise ValueError(f"scale_bits is {self.scale_bits}, expected {expected}")
        if not self.symmetric and (not self._properties["offsets"] or self.scale_bits in (8, 4)):
            raise ValueError(f"{self.code} with {self.scale_bits}-bit scales stores no offset")
        if self.group and self.group % self._properties["multiple"]:
            wanted = f"multiples of {self._properties['multiple']} columns"
            raise ValueError(f"{self.code} needs groups of {wanted}, found {self.group}")
        if self.zero is not None:
            object.__setattr__(self, "zero", self._chosen(self.zero))

    def _chosen(self, zero: float) -> float | None:
        """Check a zero and normalise it, so that equal formats have equal fields."""
        if not self.zero_is_free:
            expected = "let it be chosen: only int codes without offset do"
            raise ValueError(f"zero is {zero}, but {self._text_without_zero} does not {expected}")
        if not 0 <= zero <= self.level_count - 1:
            expected = f"0 to {self.level_count - 1} with {self.code}"
            raise ValueError(f"zero is {zero}, expected {expected}")
        zero = float(np.float32(zero)) + 0.0  # not -0.0
        return None if zero == self._properties["zero"] else zero

    @classmethod
    def parse(cls, text: Format | str) -> Format:
        """Read a format from its text; a Format is returned as it is.

        Parameters
        ----------
        text : str or Format
            A code, optionally a group, ``sym``, an integer scale and a zero: ``"int3g64"``.

        Returns
        -------
        Format

        Raises
        ------
        ValueError
            If `text` is not a format; the message shows the grammar.

        Examples
        --------
        >>> Format.parse("ternaryg32").bits
        2
        """
        if isinstance(text, Format):
            return text
        match = _TEXT.fullmatch(text)
        if not match:
            meant = did_you_mean(text, _common())
            raise ValueError(f"unknown format {text!r}{meant}; expected {GRAMMAR}")
        if match["tensor"] and match["scale"]:
            raise ValueError(f"format {text!r} has integer scales but only one scale")
        whole = match["tensor"] is not None
        return cls(
            code=match["code"],
            group=int(match["group"]) if match["group"] else None,
            per_tensor=whole,
            symmetric=bool(match["sym"] or match["scale"] or not _CODES[match["code"]]["offsets"]),
            scale_bits=0 if whole else int(match["scale"] or 16),
            zero=float(match["zero"]) if match["zero"] else None,
        )

    def __str__(self) -> str:
        if self.zero is None:
            return self._text_without_zero
        # The shortest decimal that rounds to this float32.
        digits = np.format_float_positional(np.float32(self.zero), trim="-")
        return f"{self._text_without_zero}z{digits}"

    @property
    def _text_without_zero(self) -> str:
        """The text of this format with the middle as its zero."""
        group = "tensor" if self.per_tensor else f"g{self.group}" if self.group else ""
        scale = f"s{self.scale_bits}" if self.scale_bits in (8, 4) else ""
        implied = bool(scale) or not self._properties["offsets"]
        return self.code + group + ("sym" if self.symmetric and not implied else "") + scale

    @property
    def _properties(self) -> dict[str, Any]:
        return _CODES[self.code]

    @property
    def kind(self) -> str:
        """The code without its rate: ``"int"``, ``"nf"``, ``"ternary"``."""
        return str(self._properties["kind"])

    @property
    def level_count(self) -> int:
        """Number of values that a word of the code can take."""
        return int(self._properties["level_count"])

    @property
    def bits(self) -> int:
        """Stored bits of one word: 1, 2, 3, 4 or 8."""
        return int(self._properties["bits"])

    @property
    def rate(self) -> float:
        """Stored bits of words per column; half a word's bits where two columns share one."""
        return self.bits / int(self._properties["word_cols"])

    @property
    def zero_level(self) -> float:
        """The level, fractions allowed, that stands for zero where there is no offset.

        `zero` if it was chosen. Otherwise the middle of a uniform grid; 0 for codes with a table of
        levels.
        """
        return float(self._properties["zero"]) if self.zero is None else self.zero

    @property
    def zero_is_free(self) -> bool:
        """Whether `zero` may be chosen."""
        return self.symmetric and bool(self._properties["offsets"])

    @property
    def stores_zero(self) -> bool:
        """Whether each matrix stores its own zero, fitted together with its only scale."""
        return self.per_tensor and not self.symmetric

    def with_zero(self, zero: float) -> Format:
        """Return the format with this zero.

        Raises
        ------
        ValueError
            If the format does not let it be chosen or has another one already.

        Examples
        --------
        >>> str(Format.parse("int4g32sym").with_zero(8))
        'int4g32symz8'
        """
        changed = replace(self, zero=zero)
        if self.zero is not None and changed != self:
            raise ValueError(f"zero is {zero}, but format {self} has another")
        return changed

    @property
    def has_levels(self) -> bool:
        """Whether a table says what words stand for."""
        return bool(self._properties["table"] != "none")

    @property
    def learns_levels(self) -> bool:
        """Whether that table is learned from the weights."""
        return bool(self._properties["table"] == "learned")

    @property
    def ordered(self) -> bool:
        """Whether consecutive words are consecutive levels, so that ranges and neighbours exist."""
        return bool(self._properties["ordered"])

    @property
    def has_offsets(self) -> bool:
        """Whether each group stores an offset."""
        return not self.symmetric and not self.per_tensor

    @property
    def run(self) -> int:
        """Columns whose words are chosen together."""
        return int(self._properties["cols"])

    @property
    def strip(self) -> int:
        """Rows whose words are chosen together."""
        return int(self._properties["rows"])

    def code_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the codes of a (rows, cols) matrix: padded to blocks chosen together."""
        return -(-rows // self.strip) * self.strip, -(-cols // self.run) * self.run

    def groups(self, cols: int) -> int:
        """Number of scales in a row of `cols` columns; 1 if the matrix has only one."""
        return -(-cols // self.group) if self.group else 1

    def stored_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a (rows, cols) matrix: codes, scales, offsets, tables and all padding.

        Rows are padded to whole panels of 16, or blocks of more rows, and columns to whole steps of
        ``group`` (64 where a row has one scale). A learned table of levels and the one float of a
        tensor count too.

        Examples
        --------
        >>> Format.parse("int4g64").stored_bytes(16, 64)
        576
        """
        if rows < 1 or cols < 1:
            raise ValueError(f"a matrix of shape ({rows}, {cols}) is empty")
        shared = (self.scale_bits < 16) + self.stores_zero
        table = self.level_count if self.learns_levels else 0
        return self.panel_bytes(rows, cols) + 4 * (shared + table)

    def panel_bytes(self, rows: int, cols: int) -> int:
        """Bytes of codes, scales and offsets alone, padding included."""
        return _core.packed_bytes(
            code=self.code,
            rows=rows,
            cols=cols,
            group=self.group or max(cols, 1),
            scale_bits=self.scale_bits,
            symmetric=self.symmetric,
        )

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Stored bits, everything counted, divided by ``rows * cols``.

        Examples
        --------
        >>> Format.parse("int3g64").bits_per_weight(1536, 576)
        3.5
        >>> Format.parse("int4g16s4").bits_per_weight(16, 1024)
        4.251953125
        """
        return 8 * self.stored_bytes(rows, cols) / (rows * cols)
