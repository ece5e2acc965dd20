"""Turns and samples; no time is asserted but that more work takes longer."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lowbitq.timing import take_turns


def test_calls_take_turns():
    order = []
    found = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert list(found) == ["a", "b"]
    assert order[:4] == ["a", "a", "b", "b"]  # to warm up, and to find out how long it takes
    assert sorted(set(order)) == ["a", "b"]
    switches = sum(one != other for one, other in pairwise(order))
    assert switches == 2 * 20 + 1


def test_least_is_not_more_than_median():
    (found,) = take_turns({"call": lambda: sum(range(100))}, repetitions=5).values()
    assert 0 < found.least <= found.median


def test_no_repetition_is_refused():
    with pytest.raises(ValueError, match="repetitions is 0"):
        take_turns({"call": lambda: None}, repetitions=0)
