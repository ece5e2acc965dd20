"""enhance(): the whole chain, its report, and what happens when a stage fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq import enhancement
from lowbitq.divergences import Reference

TEXT = random_tokens(10 * 64, seed=5).reshape(10, 64)
FORMATS = ("int2g32", "int3g32", "int4g32")
HOW = {"formats": FORMATS, "window": 64, "steps": 4}


@pytest.fixture(scope="module")
def model():
    return random_model(layers=2)


@pytest.fixture(scope="module")
def found(model):
    return lq.enhance(model, TEXT, bits=4.1, trials=3, **HOW)


def test_each_stage_is_reported(model, found):
    assert [one.name for one in found.stages] == ["plan", "compress", "search", "train"]
    assert found.model.bits_per_weight <= 4.1
    assert len({str(layer) for layer in found.model.plan.layers.values()}) > 1
    assert found.model.plan.drift
    kl = [one.kl for one in found.stages]
    assert np.isnan(kl[0])
    assert kl[1] >= kl[2] >= kl[3]
    held = [Reference(model, row).divergence(found.model.hidden(row)[:-1]) for row in TEXT[-2:]]
    assert kl[3] == pytest.approx(np.mean(held), rel=1e-6)
    assert "predicted KL" in found.stages[0].note
    assert all(one.name in str(found) for one in found.stages)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["stages"][0]["kl"] is None


def test_it_goes_on_where_it_was(tmp_path, model, found, monkeypatch):
    again = lq.enhance(model, TEXT, bits=4.1, trials=3, work_dir=tmp_path, **HOW)
    expected = found.model.hidden(TEXT[0])
    assert np.array_equal(again.model.hidden(TEXT[0]), expected)
    monkeypatch.setattr(enhancement, "prices", None)  # would fail, and be noted
    third = lq.enhance(model, TEXT, bits=4.1, trials=3, work_dir=tmp_path, **HOW)
    assert np.array_equal(third.model.hidden(TEXT[0]), expected)
    assert [one.note for one in third.stages] == [one.note for one in again.stages]


def failing(*args, **kwargs):
    raise lq.NumericalError("not positive definite")


def test_a_failed_stage_is_skipped_with_its_reason(model, monkeypatch):
    monkeypatch.setattr(enhancement, "prices", failing)
    monkeypatch.setattr(enhancement, "search", failing)
    monkeypatch.setattr(enhancement, "distill", failing)
    found = lq.enhance(model, TEXT, bits=4.1, trials=3, **HOW)
    notes = {one.name: one.note for one in found.stages}
    assert notes["plan"] == "skipped, all layers int3g32: not positive definite"
    assert notes["search"] == notes["train"] == "skipped: not positive definite"
    assert {str(layer) for layer in found.model.plan.layers.values()} == {"int3g32"}


def test_a_worse_model_is_dropped(model, monkeypatch):
    worse = lq.compress(model, "int2g32", method="rtn")
    monkeypatch.setattr(enhancement, "distill", lambda *args, **kwargs: worse)
    found = lq.enhance(model, TEXT, bits=4.1, **HOW)
    assert found.model is not worse
    assert found.stages[-1].note.startswith("dropped: its KL is ")
    assert found.stages[-1].kl == found.stages[-2].kl


def test_refusals(model):
    with pytest.raises(ValueError, match=r"bits is 2, but the smallest candidates take 3"):
        lq.enhance(model, TEXT, bits=2, **HOW)
    with pytest.raises(ValueError, match="there are 3 windows of text, expected at least 4"):
        lq.enhance(model, TEXT[:3], bits=4.1, **HOW)
    with pytest.raises(ValueError, match="held is 0, expected at least 1"):
        lq.enhance(model, TEXT, bits=4.1, held=0, **HOW)
