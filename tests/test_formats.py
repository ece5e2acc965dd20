"""Formats: their text, their fields, and what they say a matrix takes."""

from __future__ import annotations

import itertools

import pytest

from lowbitq.formats import Format

CODES = [
    *(f"int{bits}" for bits in range(1, 9)),
    *("ternary", "binary", "nf4"),
    *(f"log{bits}" for bits in range(2, 5)),
    *(f"kmeans{bits}" for bits in range(1, 5)),
]
PLACES = ["", "g16", "g32", "g64", "g128", "tensor"]


def texts():
    for code, place, sign, scale in itertools.product(CODES, PLACES, ["", "sym"], ["", "s4", "s8"]):
        implied = scale or not code.startswith("int")
        small = place == "g16" and code in ("int1", "int3", "binary", "kmeans1", "kmeans3", "log3")
        if not (implied and sign) and not (place == "tensor" and scale) and not small:
            yield code + place + sign + scale


@pytest.mark.parametrize("text", list(texts()))
def test_text_round_trip(text):
    format = Format.parse(text)
    assert str(format) == text
    assert Format.parse(format) is format
    assert Format.parse(str(format)) == format
    assert format.level_count <= 1 << format.bits
    assert format.zero in (0, (format.level_count - 1) / 2)


def test_implied_sym_may_be_spelled_out():
    assert Format.parse("ternaryg64sym") == Format.parse("ternaryg64")
    assert Format.parse("int4g16syms4") == Format.parse("int4g16s4")


@pytest.mark.parametrize(
    "text",
    ["", "int", "int0", "int9", "INT4", "int4g", "int4g48", "int4s5", "int4 g64", "nf3"],
)
def test_unknown_text_shows_the_grammar(text):
    with pytest.raises(ValueError, match=r"unknown format .*int1 to int8.*g16, g32") as error:
        Format.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["int3g16", "int4tensors4", "binaryg16", "log3g16"])
def test_parts_that_do_not_fit_together(text):
    with pytest.raises(ValueError, match="g"):
        Format.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"code": "int4g64"},
        {"code": "int4", "group": 48},
        {"code": "int4", "group": 64, "per_tensor": True, "scale_bits": 0},
        {"code": "int4", "scale_bits": 0},
        {"code": "int4", "per_tensor": True},
        {"code": "nf4", "symmetric": False},
        {"code": "int4", "symmetric": False, "scale_bits": 4},
    ],
)
def test_fields_that_do_not_fit_together(fields):
    with pytest.raises(ValueError, match=r"code|group|scale|offset"):
        Format(**fields)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_whole_panels_and_groups_cost_bits_plus_scales(bits, group):
    rows, cols = 48, 4 * 128
    for suffix, overhead in [("", 32), ("sym", 16), ("s8", 8), ("s4", 4)]:
        shared = 32 / (rows * cols) if suffix in ("s8", "s4") else 0
        expected = bits + overhead / group + shared
        assert Format.parse(f"int{bits}g{group}{suffix}").bits_per_weight(rows, cols) == expected


def test_two_level_scales_take_a_quarter_bit():
    """4-bit values with a 4-bit scale per 16 (per-vector quantization): 4 + 4/16."""
    rows, cols = 4096, 4096
    stored = Format.parse("int4g16s4").bits_per_weight(rows, cols)
    assert stored == 4.25 + 32 / (rows * cols)


def test_tables_padding_and_row_scales_count():
    assert Format.parse("kmeans2g64").stored_bytes(16, 64) == 256 + 32 + 4 * 4
    assert Format.parse("nf4").stored_bytes(16, 64) == 512 + 32, "its table is not stored"
    assert Format.parse("int4g64sym").stored_bytes(1, 1) == 512 + 32
    assert Format.parse("int4").stored_bytes(17, 65) == 32 * (2 * 32 + 2 + 2)
    assert Format.parse("int4tensor").stored_bytes(16, 64) == 512 + 8
    assert Format.parse("int5g128").bits == 8
    assert Format.parse("int3g128").stored_bytes(16, 576) == 5 * 128 * 6 + 16 * 5 * 4


def test_empty_matrix_is_refused():
    with pytest.raises(ValueError, match=r"\(0, 64\) is empty"):
        Format.parse("int4").stored_bytes(0, 64)
