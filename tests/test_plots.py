"""Figures: what they show, where matplotlib is there to draw them."""

from __future__ import annotations

import sys

import pytest

from lowbitq import plots
from lowbitq.roofline import Point, Roofline

FOUND = Roofline(
    {"isa": "avx2", "threads": 1},
    20.0,
    80.0,
    200.0,
    (
        Point("int2g64", "memory", 6.4, 100.0, 15.6, 0.8),
        Point("int2g64", "cache", 6.4, 150.0, 23.4, 0.75),
        Point("int2g64", "tokens", 300.0, 180.0, 0.6, 0.9),
    ),
)


def test_roofline_shows_every_point():
    pytest.importorskip("matplotlib")
    axes = plots.roofline(FOUND)
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    for point in FOUND.points:
        assert ([point.intensity], [point.gigaops]) in drawn
    assert "int2g64" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.new_axes()
