"""The packed layout: the bytes that packed.h promises, and unpacking them."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from packed_parts import code_of, description, layout, pack, packed_bytes, random_parts

from lowbitq import _core

SIZES = [(1, 1), (15, 33), (16, 64), (17, 128), (33, 576), (48, 100), (5, 15)]


def unpack(spec, panels):
    shape = spec["rows"], -(-spec["cols"] // spec["group"])
    codes = np.full((spec["rows"], spec["cols"]), 0xA5, np.uint8)
    scale, offset = np.full((2, *shape), np.nan, np.float32)
    _core.unpack(code_of(spec), panels, codes, scale, offset, **layout(spec))
    return codes, scale, offset


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16, 32, 64, 128])
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_unpacking_inverts_packing(rows, cols, bits, group):
    if group == 16 and bits in (1, 3):
        pytest.skip("1- and 3-bit codes come in whole 32 columns")
    kinds = [(16, False, 1.0), (16, True, 1.0), (8, False, 0.03), (4, False, 0.03)]
    for scale_bits, has_offset, unit in kinds:
        spec = description(rows, cols, bits, group, scale_bits, has_offset, unit, zero=1.5)
        codes, scale, offset = random_parts(spec)
        found = unpack(spec, pack(spec, codes, scale, offset))
        assert (found[0] == codes).all()
        assert (found[1] == scale).all()
        assert (found[2] == (offset if has_offset else np.float32(-1.5) * scale)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bytes_are_those_of_the_table(bits):
    spec = description(20, 100, bits, 64, has_offset=True)
    codes, scale, offset = random_parts(spec)
    padded = np.zeros((32, 128), np.uint8)
    padded[:20, :100] = codes
    expected = b""
    for panel in range(2):
        for step in range(2):
            rows = slice(16 * panel, 16 * panel + 16)
            expected += oracle.packed_codes(padded[rows, 64 * step : 64 * step + 64], bits)
            for array in (scale, offset):
                halves = np.zeros(16, np.float16)
                halves[: len(array[rows])] = array[rows, step]
                expected += halves.tobytes()
    assert pack(spec, codes, scale, offset).tobytes() == expected


def test_four_bit_scales_share_bytes_at_the_end_of_a_row():
    spec = description(16, 40, 4, scale_bits=4, unit=0.5)
    codes = np.zeros((16, 40), np.uint8)
    scale = np.arange(16, dtype=np.float32)[:, None] * np.float32(0.5)
    panels = pack(spec, codes, scale, None)
    assert len(panels) == 16 * 64 // 2 + 8
    assert panels[-8:].tolist() == [16 * (2 * i + 1) + 2 * i for i in range(8)]


def test_one_scale_for_the_matrix_takes_no_room():
    spec = description(16, 64, 2, scale_bits=0, unit=0.25, zero=1.0)
    codes, _, _ = random_parts({**spec, "scale_bits": 16})
    panels = pack(spec, codes, None, None)
    assert len(panels) == 16 * 64 // 4
    weight = np.empty((16, 64), np.float32)
    _core.packed_dequantize(code_of(spec), panels, weight, group=64)
    assert (weight == (codes.astype(np.float32) - 1) / 4).all()


def test_threads_do_not_matter(threads):
    spec = description(1000, 1000, 3, 64, has_offset=True)
    parts = random_parts(spec)
    panels = pack(spec, *parts)
    _core.set_num_threads(threads=2)
    assert (pack(spec, *parts) == panels).all()
    assert all((a == b).all() for a, b in zip(unpack(spec, panels), parts, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 48}, "group is 48, expected 16, 32, 64, 128 or at least the 100 columns"),
        ({"scale_bits": 12}, "scale_bits is 12"),
        ({"scale_bits": 0}, "groups of 64 columns need stored scales"),
        ({"bits": 3, "group": 16}, "codes of 3 bits need groups of a multiple of 32 columns"),
        ({"rows": 0}, "rows is 0, expected 1 to"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        packed_bytes({**description(20, 100, 4, 64), **change})


def test_what_cannot_be_stored_exactly_is_refused():
    spec = description(20, 100, 2, 64, has_offset=True)
    codes, scale, offset = random_parts(spec)
    for name, position, value, message in [
        ("codes", (3, 70), 4, "code of row 3, column 70 is 4, expected at most 3"),
        ("scale", (17, 1), 0.1, "scale of row 17, group 1 is 0.1.*, which is not a float16"),
        ("scale", (0, 0), np.nan, "scale of row 0, group 0 is .*nan"),
        ("offset", (2, 1), 1e6, "offset of row 2, group 1 is 1000000"),
        ("offset", (2, 1), np.inf, "offset of row 2, group 1 is inf"),
    ]:
        parts = {"codes": codes.copy(), "scale": scale.copy(), "offset": offset.copy()}
        parts[name][position] = value
        with pytest.raises(ValueError, match=message):
            pack(spec, **parts)
    spec = description(20, 100, 2, 64, scale_bits=8, unit=0.5)
    with pytest.raises(ValueError, match=r"not 0 to 255 times unit = 0\.5"):
        pack(spec, codes, np.full_like(scale, 0.25), None)


def test_arrays_of_other_sizes_are_refused():
    spec = description(20, 100, 2, 64)
    codes, scale, offset = random_parts(spec)
    panels, code = pack(spec, codes, scale, offset), code_of(spec)
    with pytest.raises(ValueError, match="panels has 1151 bytes, expected 1152"):
        _core.unpack(code, panels[:-1], codes, None, None, **layout(spec))
    with pytest.raises(ValueError, match="axis 1 of codes has size 99, expected cols = 100"):
        _core.unpack(code, panels, np.ascontiguousarray(codes[:, 1:]), None, None, **layout(spec))
    with pytest.raises(ValueError, match="axis 1 of scale has size 1, expected groups = 2"):
        _core.unpack(code, panels, None, np.ones((20, 1), np.float32), None, **layout(spec))
    with pytest.raises(ValueError, match="scale is None, but scale_bits is 16"):
        _core.pack(code, codes, None, None, panels, **layout(spec))
