"""Figures: what they show, where matplotlib is there to draw them."""

from __future__ import annotations

import json
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


KNOWN = {
    "steps": [
        {"step": 1, "loss": 1.5, "norm": 3.0, "predictions": 1.0, "features": 0.5},
        {"step": 2, "loss": 0.9, "norm": 2.0, "predictions": 0.6, "features": 0.3},
    ],
    "validation": [(0, 1.25), (1, 0.75), (2, 0.8)],
}


def test_training_shows_every_loss():
    pytest.importorskip("matplotlib")
    axes = plots.training(json.loads(json.dumps(KNOWN)))
    lines = {line.get_label(): line for line in axes.get_lines()}
    drawn = {name: [list(x.get_xdata()), list(x.get_ydata())] for name, x in lines.items()}
    assert drawn == {
        "loss, training text": [[1, 2], [1.5, 0.9]],
        "predictions, training text": [[1, 2], [1.0, 0.6]],
        "features, training text": [[1, 2], [0.5, 0.3]],
        "divergence, held back": [[0, 1, 2], [1.25, 0.75, 0.8]],
        "0.75 at step 1": [[1], [0.75]],
    }


@pytest.mark.parametrize("known", [{}, {"steps": 3, "validation": []}, KNOWN | {"validation": []}])
def test_training_refuses_what_is_something_else(known):
    with pytest.raises(ValueError, match="known is not of a run of training"):
        plots.training(known)
