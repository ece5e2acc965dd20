"""The roofline: figures that fit together, of whatever machine this is."""

from __future__ import annotations

import json

import pytest

from lowbitq import roofline


@pytest.fixture(scope="module")
def found():
    return roofline.measure(["int2g64", "int8g64"], repetitions=1, stream_bytes=1 << 20)


def test_every_format_has_every_kind(found):
    assert [(point.format, point.kind) for point in found.points] == [
        (format, kind) for format in ("int2g64", "int8g64") for kind in roofline.KINDS
    ]


def test_rates_are_consistent(found):
    for point in found.points:
        bandwidth = found.memory_gigabytes if point.kind == "memory" else found.cache_gigabytes
        roof = min(found.peak_gigaops, point.intensity * bandwidth)
        assert point.gigaops == pytest.approx(point.intensity * point.gigabytes)
        assert point.of_roof == pytest.approx(point.gigaops / roof)
        assert point.of_roof > 0  # on a busy machine, more than 1 if the roof was measured low


def test_fewer_bits_have_more_operations_per_byte(found):
    intensity = {(point.format, point.kind): point.intensity for point in found.points}
    for kind in ("memory", "cache"):
        assert intensity["int2g64", kind] > 3 * intensity["int8g64", kind]


def test_bits_are_counted_with_scales_and_offsets(found):
    # 8 + 2 * 16 / 64 bits and a little of x and y: two operations per 8.5 / 8 bytes.
    point = found.points[3]
    assert 0.98 * 2 / (8.5 / 8) < point.intensity < 2 / (8.5 / 8)


def test_table_has_a_line_per_format(found):
    assert [line.split()[0] for line in str(found).splitlines()[-2:]] == ["int2g64", "int8g64"]


def test_result_is_json(found):
    assert json.loads(json.dumps(found.to_dict()))["points"][0]["format"] == "int2g64"


def test_progress_counts_formats():
    calls = []
    small = {"repetitions": 1, "stream_bytes": 1}
    roofline.measure(["int1g64", "int2g64"], **small, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="int9g64"):
        roofline.measure(["int9g64"])
