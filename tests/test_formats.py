"""Formats: their text, their fields, and what they say a matrix takes."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert format.zero is None
    assert format.zero_level in (0, (format.level_count - 1) / 2)


def test_implied_sym_may_be_spelled_out():
    assert Format.parse("ternaryg64sym") == Format.parse("ternaryg64")
    assert Format.parse("int4g16syms4") == Format.parse("int4g16s4")


@given(st.data(), st.integers(1, 8), st.sampled_from(["", "g32", "g64", "tensor"]))
def test_a_chosen_zero_round_trips(data, bits, place):
    plain = Format.parse(f"int{bits}{place}sym")
    zero = data.draw(st.floats(0, 2**bits - 1, width=32))
    format = plain.with_zero(zero)
    assert Format.parse(str(format)) == format
    assert hash(Format.parse(str(format))) == hash(format)
    assert format.zero_level == zero
    assert (format == plain) == (zero == plain.zero_level) == (format.zero is None)
    assert format.stored_bytes(48, 256) == plain.stored_bytes(48, 256)


def test_a_chosen_zero_in_text():
    for text, zero in [
        ("int4g32symz8", 8),
        ("int4symz0", 0),
        ("int2tensorsymz3", 3),
        ("int4g16s4z8", 8),
        ("int3symz2.25", 2.25),
    ]:
        format = Format.parse(text)
        assert (format.zero, format.zero_level, str(format)) == (zero, zero, text)
        assert format.zero_is_free
    assert str(Format.parse("int4g32symz8.0")) == "int4g32symz8"
    assert Format.parse("int4g32symz7.5") == Format.parse("int4g32sym")
    assert Format("int4", zero=-0.0) == Format.parse("int4symz0")
    assert str(Format("int4", zero=np.nextafter(np.float32(0), 1))) != "int4symz0"
    assert str(Format("int4", zero=7.3)) == "int4symz7.3"
    assert Format("int4", zero=7.3).zero == np.float32(7.3), "as C computes with it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4g32z8", "zero is 8.0, but int4g32 does not let it be chosen: only int codes"),
        ("int4tensorz8", "but int4tensor does not let it be chosen"),
        ("nf4g64z8", "but nf4g64 does not let it be chosen"),
        ("ternaryz1", "but ternary does not let it be chosen"),
        ("int4symz16", "zero is 16.0, expected 0 to 15 with int4"),
        ("int4symz15.1", "zero is 15.1, expected 0 to 15 with int4"),
        ("int4symz", "unknown format"),
        ("int4symz-1", "unknown format"),
        ("int4symz1e1", "unknown format"),
        ("int4symz8.", "unknown format"),
        ("int4symz\u0668", "unknown format"),
        ("int4z8sym", "unknown format"),
    ],
)
def test_a_zero_that_cannot_be_chosen(text, message):
    with pytest.raises(ValueError, match=message):
        Format.parse(text)


@pytest.mark.parametrize("zero", [np.nan, np.inf, -1, 16, 10**400])
def test_a_zero_is_a_code(zero):
    with pytest.raises(ValueError, match=r"zero is .*, expected 0 to 15 with int4"):
        Format("int4", zero=zero)


def test_a_chosen_zero_is_kept_or_refused_in_other_formats():
    """It is no property of the code, so a change of code does not change it silently."""
    format = Format.parse("int4g32symz8")
    assert str(replace(format, group=64)) == "int4g64symz8"
    assert replace(Format.parse("int4sym"), code="int3").zero_level == 3.5
    with pytest.raises(ValueError, match=r"zero is 8.0, expected 0 to 7 with int3"):
        replace(format, code="int3")
    with pytest.raises(ValueError, match=r"zero is 8.0, but int4g32 does not let it be chosen"):
        replace(format, symmetric=False)
    with pytest.raises(ValueError, match="zero is 7, but format int4g32symz8 has another"):
        format.with_zero(7)


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


def suggested(text):
    with pytest.raises(ValueError, match=f"unknown format '{text}'") as error:
        Format.parse(text)
    found = re.search(r"did you mean '(.*?)'", str(error.value))
    return found and found[1]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("int4g46", "int4g64"),
        ("INT4G64", "int4g64"),
        ("int4-g64", "int4g64"),
        ("ternery", "ternary"),
        ("nf3", "nf4"),
        ("Q4_0", None),
    ],
)
def test_an_unknown_text_is_told_the_most_similar_format(text, meant):
    assert suggested(text) == meant


@pytest.mark.parametrize("text", ["int1g16x", "int1g17", "binaryg15", "log3tensorsym!", "nf4simm"])
def test_what_is_suggested_is_a_format(text):
    assert Format.parse(suggested(text))
