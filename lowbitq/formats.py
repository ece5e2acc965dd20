"""Formats: how the numbers of a matrix are stored, as a value and as a short text."""

from __future__ import annotations

import re
from dataclasses import dataclass

PANEL_ROWS = 16  # rows are stored in panels of this many, the last one padded
ROW_STEP = 64  # columns per step where a whole row shares one scale

GRAMMAR = (
    "a code (int1 to int8, ternary, binary, nf4, log2 to log4, kmeans1 to kmeans4), then "
    "optionally g16, g32, g64, g128 (columns per scale; none: one scale per row) or tensor (one "
    "scale for the matrix), then optionally sym (no offset), then optionally s4 or s8 (integer "
    "scales of that many bits); for example int4g64, int2g16s4, ternary"
)

_TEXT = re.compile(
    r"(?P<code>int[1-8]|ternary|binary|nf4|log[2-4]|kmeans[1-4])"
    r"(?:g(?P<group>16|32|64|128)|(?P<tensor>tensor))?(?P<sym>sym)?(?:s(?P<scale>4|8))?"
)


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: the code of its numbers, and how often a scale occurs.

    Parameters
    ----------
    code : str
        ``"int4"``, ``"ternary"``, ``"binary"``, ``"nf4"``, ``"log3"``, ``"kmeans2"`` and the like.
    group : int or None, default=None
        Columns that share a scale: 16, 32, 64 or 128. None: all columns of a row do.
    per_tensor : bool, default=False
        One scale for the whole matrix; excludes `group`.
    symmetric : bool, default=True
        No offset: the levels lie around zero. Only ``int`` codes can be asymmetric.
    scale_bits : int, default=16
        16: a scale is a float16. 8 or 4: an integer times one float of the matrix. 0: there is only
        that float (`per_tensor`).

    Raises
    ------
    ValueError
        If the fields do not fit together.

    Examples
    --------
    >>> format = Format.parse("int4g64")
    >>> format.bits, format.levels, format.group, format.symmetric
    (4, 16, 64, False)
    >>> format.bits_per_weight(64, 576)
    4.5
    >>> str(Format("int2", group=16, scale_bits=4))
    'int2g16s4'
    """

    code: str
    group: int | None = None
    per_tensor: bool = False
    symmetric: bool = True
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if not (match := _TEXT.fullmatch(self.code)) or match["code"] != self.code:
            raise ValueError(f"unknown code {self.code!r}; expected {GRAMMAR}")
        if self.group not in (None, 16, 32, 64, 128):
            raise ValueError(f"group is {self.group}, expected 16, 32, 64, 128 or None")
        if self.per_tensor and self.group:
            raise ValueError("a format has one scale per tensor or per group, not both")
        if self.scale_bits not in ((0,) if self.per_tensor else (16, 8, 4)):
            expected = "0 with one scale per tensor" if self.per_tensor else "16, 8 or 4"
            raise ValueError(f"scale_bits is {self.scale_bits}, expected {expected}")
        if not self.symmetric and (not self.code.startswith("int") or self.scale_bits in (8, 4)):
            raise ValueError(f"{self.code} with {self.scale_bits}-bit scales stores no offset")
        if self.group == 16 and self.bits in (1, 3):
            raise ValueError(f"{self.code} needs groups of 32, 64 or 128 columns, found 16")

    @classmethod
    def parse(cls, text: Format | str) -> Format:
        """Read a format from its text; a Format is returned as it is.

        Parameters
        ----------
        text : str or Format
            A code, optionally a group, ``sym`` and an integer scale: ``"int3g64"``.

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
            raise ValueError(f"unknown format {text!r}; expected {GRAMMAR}")
        if match["tensor"] and match["scale"]:
            raise ValueError(f"format {text!r} has integer scales but only one scale")
        whole = match["tensor"] is not None
        return cls(
            code=match["code"],
            group=int(match["group"]) if match["group"] else None,
            per_tensor=whole,
            symmetric=bool(match["sym"] or match["scale"] or not match["code"].startswith("int")),
            scale_bits=0 if whole else int(match["scale"] or 16),
        )

    def __str__(self) -> str:
        group = "tensor" if self.per_tensor else f"g{self.group}" if self.group else ""
        scale = f"s{self.scale_bits}" if self.scale_bits in (8, 4) else ""
        implied = bool(scale) or self.kind != "int"
        return self.code + group + ("sym" if self.symmetric and not implied else "") + scale

    @property
    def kind(self) -> str:
        """The code without its number of bits: ``"int"``, ``"nf"``, ``"ternary"``."""
        return self.code.rstrip("12345678")

    @property
    def levels(self) -> int:
        """Number of values that a code can stand for."""
        return {"ternary": 3, "binary": 2}.get(self.code) or 1 << int(self.code[-1])

    @property
    def bits(self) -> int:
        """Stored bits of one code: 1, 2, 3, 4 or 8."""
        exact = (self.levels - 1).bit_length()
        return exact if exact <= 4 else 8

    @property
    def zero(self) -> float:
        """The code, fractions allowed, that stands for zero where there is no offset.

        The middle of a uniform grid; 0 for codes with a table of levels.
        """
        return (self.levels - 1) / 2 if self.kind in ("int", "ternary", "binary") else 0.0

    def groups(self, cols: int) -> int:
        """Number of scales in a row of `cols` columns; 1 if the matrix has only one."""
        return -(-cols // self.group) if self.group else 1

    def stored_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a (rows, cols) matrix: codes, scales, offsets, tables and all padding.

        Rows are padded to whole panels of 16 and columns to whole steps of ``group`` (64 where a
        row has one scale). A learned table of levels and the one float of a tensor count too.

        Examples
        --------
        >>> Format.parse("int4g64").stored_bytes(16, 64)
        576
        """
        if rows < 1 or cols < 1:
            raise ValueError(f"a matrix of shape ({rows}, {cols}) is empty")
        grouped = self.group is not None and self.group < cols
        step = self.group if self.group is not None and grouped else ROW_STEP
        steps = -(-cols // step)
        bits = steps * step * self.bits
        bits += (steps if grouped else 1) * (self.scale_bits + 16 * self._has_offsets)
        panels = -(-rows // PANEL_ROWS) * PANEL_ROWS * bits // 8
        shared = (self.scale_bits < 16) + (self.per_tensor and not self.symmetric)
        table = self.levels if self.kind == "kmeans" else 0
        return panels + 4 * (shared + table)

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

    @property
    def _has_offsets(self) -> bool:
        return not self.symmetric and not self.per_tensor
