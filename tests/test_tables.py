"""What a notebook shows of results."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq.tables import as_html, as_text, columns_of

ROWS = [{"layer": "up", "bits": 2.5}, {"layer": "down<", "bits": 5.0, "rank": 8}, {"layer": "x"}]


class Balanced(HTMLParser):
    """Counts cells, and fails at an end without a start."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.texts = [], 0, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.cells += tag in ("td", "th")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_text_is_aligned():
    columns = columns_of(ROWS)
    assert columns == ["layer", "bits", "rank"]
    lines = as_text(columns, ROWS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["x", "-", "-"]
    assert columns_of(ROWS, without=["bits"]) == ["layer", "rank"]


def test_html_is_escaped_and_has_bars():
    page = as_html(columns_of(ROWS), ROWS, caption="a & b", bars=["bits"])
    found = Balanced(page)
    assert found.cells == 12
    assert "down<" in found.texts
    assert "a & b" in found.texts
    assert re.findall(r"3\) (\d+%)", page) == ["50%", "100%"]


def test_long_tables_are_cut():
    page = as_html(["a"], [{"a": i} for i in range(100)], most=7)
    assert Balanced(page).cells == 1 + 7 + 1
    assert "and 93 more" in page


def test_results_show_themselves():
    model, text = random_model(layers=8), random_tokens(64 * 4).reshape(4, 64)
    small = lq.compress(model, "int4g32", method="rtn")
    for shown in (
        small.plan,
        small.report(),
        lq.evaluate(small, text.ravel(), model, window=64, windows=2),
        lq.calibrate(model, text),
        model,
        small,
        dict(small.linears())["model.layers.0.mlp.up_proj"].tensor,
    ):
        page = shown._repr_html_()
        assert Balanced(page).cells > 4
        assert len(page) < 20_000
    assert len(repr(small.plan)) < 200
    assert "56 x 'int4g32'" in repr(small.plan)
    assert "drift=False" in repr(small.plan)
    pytest.importorskip("pandas")
    frame = small.report().to_frame()
    assert len(frame) == 57
    assert "relative_error" in frame
    assert list(small.plan.to_frame()["plan"]) == ["int4g32"] * 56
    found = lq.evaluate(small, text.ravel(), model, window=64).to_frame()
    assert found["bits_per_weight"][0] == small.bits_per_weight
    assert len(lq.calibrate(model, text).to_frame()) == 56
