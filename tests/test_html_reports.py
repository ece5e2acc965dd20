"""A report is one page: everything in it, nothing from elsewhere, written whole or not at all."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest

import lowbitq as lq
from lowbitq.html_reports import write_report
from lowbitq.models.slots import SLOTS

TEXT = "It was a bright cold day in April, and the clocks were striking. " * 8


class Page(HTMLParser):
    """Names of the elements, text, and every address that a browser would load."""

    VOID = ("meta", "br", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.loaded, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID and tag != "html":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID and tag != "html":
            self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def small(tiny_folder):
    return lq.compress(lq.load(tiny_folder), "int3g32", rotation="none", method="rtn")


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("#") for address in page.loaded)
    assert not re.search(r"url\((?!#)|@import", text)
    return page


def test_quantized_model_with_figures(small, tmp_path):
    pytest.importorskip("matplotlib")
    found = lq.evaluate(small, TEXT, window=64)
    path = tmp_path / "new" / "out.html"
    write_report(path, small, found, title="small", about={"format": "int3g32", "seed": 0})
    page = read(path)
    assert page.elements.count("svg") == 2
    words = "\n".join(page.words)
    for name, _ in small.matrices():
        assert name in page.words
    for word in ("int3g32", "seed", f"{small.bits_per_weight:.3f} of the linear layers"):
        assert word in words
    assert f"{float(found.perplexity):.4g}" in words
    assert {slot.hf for slot in SLOTS} <= set(page.words), "the figures' legends"


def test_without_matplotlib_tables_have_bars(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(tmp_path / "out.html", small)
    page = read(tmp_path / "out.html")
    assert "svg" not in page.elements
    assert "linear-gradient" in (tmp_path / "out.html").read_text()


def test_float_model(tiny_folder, tmp_path):
    model = lq.load(tiny_folder)
    write_report(tmp_path / "out.html", model, lq.evaluate(model, TEXT, window=64))
    page = read(tmp_path / "out.html")
    assert "Evaluation" in page.words
    assert "Layers" not in page.words


def test_what_is_shown_is_escaped(small, tmp_path):
    odd = "<script>alert(1)</script>"
    write_report(tmp_path / "out.html", small, title=odd, about={odd: odd})
    page = read(tmp_path / "out.html")
    assert "script" not in page.elements
    assert page.words.count(odd) == 4


def test_a_report_is_replaced_whole_or_not_at_all(small, tmp_path, monkeypatch):
    path = tmp_path / "out.html"
    path.write_text("before")

    def fail(self):
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(lq.QuantizedModel, "report", fail)
        with pytest.raises(RuntimeError):
            write_report(path, small)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    write_report(path, small)
    assert path.read_text().startswith("<!doctype html>")
