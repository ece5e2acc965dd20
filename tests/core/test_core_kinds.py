"""csrc/codes/kinds.c: the table of codes, and properties that do not fit together."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq import _core

CODE = {"name": "int4", "symmetric": True, "scale_bits": 16, "unit": 1.0, "zero": 7.5}


def test_every_code_says_how_it_is_stored():
    for name, code in _core.codes().items():
        assert name.startswith(code["kind"])
        assert code["level_count"] <= 1 << code["bits"]
        assert code["table"] in ("none", "fixed", "learned")
        assert code["rows"] == 1 or code["rows"] % 16 == 0
        assert 16 % code["cols"] == 0
        levels = np.zeros(code["level_count"], np.float32) if code["table"] != "none" else None
        _core.code(levels, **{**CODE, "name": name})
    assert _core.codes()["int5"]["bits"] == 8
    assert _core.codes()["ternary"]["level_count"] == 3
    assert _core.codes()["int3"]["zero"] == 3.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "int9"}, "no code is called 'int9'"),
        ({"name": "int"}, "no code is called 'int'"),
        ({"scale_bits": 12}, "scale_bits is 12, expected 16, 8, 4 or 0"),
        ({"scale_bits": 8, "symmetric": False}, "offsets need scale_bits = 16, got 8"),
        ({"unit": float("nan")}, "unit is nan"),
        ({"name": "nf4"}, "levels has 0 values, expected 16"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _core.code(None, **{**CODE, **change})


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="levels has 16 values, expected 0"):
        _core.code(np.zeros(16, np.float32), **CODE)
    with pytest.raises(ValueError, match="levels has 8 values, expected 4"):
        _core.code(np.zeros(8, np.float32), **{**CODE, "name": "kmeans2"})
    with pytest.raises(ValueError, match="levels has nan, expected finite numbers"):
        _core.code(np.full(4, np.nan, np.float32), **{**CODE, "name": "kmeans2"})
