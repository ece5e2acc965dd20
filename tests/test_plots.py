"""Figures: what they show, where matplotlib is there to draw them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq import plots
from lowbitq.models.slots import SLOTS
from lowbitq.roofline import Point, Roofline
from lowbitq.rotations import Rotation

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
    axes = FOUND.plot()
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


def drawn(axes):
    """The lines of some axes, by label."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_layers_are_drawn_over_the_blocks():
    pytest.importorskip("matplotlib")
    values = {"model.layers.0.mlp.up_proj": 2.0, "model.layers.1.mlp.up_proj": 3.0, "lm_head": 9.0}
    assert drawn(plots.by_layer(values, "error")) == {"mlp.up_proj": [2.0, 3.0]}


def test_a_report_draws_its_columns():
    pytest.importorskip("matplotlib")
    report = lq.compress(random_model(layers=2), "int3g32", method="rtn").report()
    for column in ("relative_error", "bits_per_weight"):
        lines = drawn(report.plot(column))
        assert set(lines) == {slot.hf for slot in SLOTS}
        rows = {row["layer"]: row[column] for row in report.layers}
        found = lines["mlp.down_proj"]
        assert found == [rows[f"model.layers.{i}.mlp.down_proj"] for i in range(2)]
    with pytest.raises(ValueError, match="of is 'format', expected a column of numbers of layer"):
        report.plot("format")


def test_an_evaluation_draws_the_divergence_of_tokens():
    pytest.importorskip("matplotlib")
    model = random_model()
    small = lq.compress(model, "int3g32", method="rtn")
    tokens = random_tokens(200)
    found = lq.evaluate(small, tokens, model, window=50)
    assert list(drawn(found.plot()).values()) == [list(found.kl.percentiles.values())]
    with pytest.raises(ValueError, match="there is no divergence to draw"):
        lq.evaluate(small, tokens, window=50).plot()


def test_a_rotation_shows_what_becomes_of_outliers():
    pytest.importorskip("matplotlib")
    x = np.random.default_rng(0).standard_normal((100, 64))
    x[:, 3] *= 100
    axes = Rotation(64).plot(x)
    before, after = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"{abs(x).max():.3g}" in before
    assert float(after.split()[-1]) < abs(x).max() / 4
    counts = [sum(patch.get_path().vertices[1::2, 1]) for patch in axes.patches]
    assert all(count > 0 for count in counts)
    with pytest.raises(ValueError, match="'before' has no magnitudes"):
        Rotation(64).plot(np.zeros((1, 64)))
