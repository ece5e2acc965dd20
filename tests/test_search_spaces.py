"""Spaces: what each parameter changes, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from searched_models import TOKENS, two_copies

from lowbitq.search import GRID, Space

Q0 = "model.layers.0.self_attn.q_proj"


def layer(model, name=Q0):
    return dict(model.linears())[name]


def test_nothing_changes_without_values():
    _, small = two_copies()
    for values in ({}, {"* clip1": 1.0, "* scale2": 1.0, "* zero1": 0.0, "* weight2": 1.0}):
        space = Space(small, {"*": dict.fromkeys(["clip1", "scale2", "zero1", "weight2"], (0, 2))})
        assert np.array_equal(space.apply(values).logits(TOKENS[0]), small.logits(TOKENS[0]))


def test_each_parameter_changes_its_copy():
    _, small = two_copies()
    before = layer(small).copies
    names = ["clip1", "scale2", "zero2", "weight1"]
    space = Space(small, {"*.q_proj": dict.fromkeys(names, (0.1, 2.0))})
    values = {"clip1": 0.5, "scale2": 1.5, "zero2": 0.25, "weight1": 1.2}
    made = space.apply({f"*.q_proj {name}": value for name, value in values.items()})
    first, second = layer(made).copies
    scale = before[0].activation.scale
    assert first.activation.scale == pytest.approx(0.5 * scale)
    assert second.activation.scale == pytest.approx(1.5 * scale)
    assert (first.activation.zero, second.activation.zero) == (0, pytest.approx(0.25 * scale))
    assert np.array_equal(first.weight, before[0].weight * np.float32(1.2))
    assert second.weight is before[1].weight
    assert first.tensor is second.tensor is before[0].tensor
    others = [name for name, _ in small.linears() if not name.endswith("q_proj")]
    assert all(layer(made, name) is layer(small, name) for name in others)
    assert layer(small).copies == before
    assert space.layers == (Q0, Q0.replace("0", "1"))


def test_without_a_number_all_copies_change():
    _, small = two_copies(dynamic=True)
    made = Space(small, {Q0: {"clip": [0.7, 0.9]}}).apply({f"{Q0} clip": 0.7})
    assert [copy.activation.clip for copy in layer(made).copies] == [0.7, 0.7]


def test_weights_fuse_copies():
    """With weights 0 and 2, the mean of two copies is one of them."""
    _, small = two_copies()
    space = Space(small, {"*": {"weight1": (0, 2), "weight2": (0, 2), "clip2": (0.1, 1)}})
    one = space.apply({"* weight1": 0.0, "* weight2": 2.0})
    x = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    assert np.allclose(layer(one).forward(x), layer(small).forward(x), atol=1e-5)
    other = space.apply({"* weight1": 2.0, "* weight2": 0.0, "* clip2": 0.3})
    assert np.allclose(layer(other).forward(x), layer(small).forward(x), atol=1e-5)


def test_the_grid_of_the_chapter():
    values = GRID["*"].values()
    assert np.prod([len(one) for one in values]) == 225
    _, small = two_copies()
    start = {"*": {"scale1": 0.9, "clip1": 0.95, "scale2": 1.1, "clip2": 0.99}}
    assert len(Space(small, GRID).key_values(start)) == 4


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "space is empty"),
        ({"*.gate": {"clip": (0.5, 1)}}, r"'\*.gate' matches no quantized layers, such as 'model"),
        ({"*": {"clip3": (0.5, 1)}}, "matches no layers with a copy 3"),
        ({"*": {"offset": (0.5, 1)}}, "parameter is 'offset', expected clip, scale, zero, weight"),
        ({"*": {"clip0": (0.5, 1)}}, "parameter is 'clip0'"),
        ({"*": {"clip": (1, 0.5)}}, r"expected a range \(low, high\) or a list of different"),
        ({"*": {"clip": (0.5, float("nan"))}}, "expected a range"),
        ({"*": {"clip": []}}, "expected a range"),
        ({"*": {"clip": [1.0, 1.0]}}, "expected a range"),
        ({"*": {"clip": ["a"]}}, "expected a range"),
        ({"*": {"clip": 0.5}}, "expected a range"),
        ({"*": {"clip": (0.5, 1), "clip1": (0.5, 1)}}, "both change the clip of copy 1 of model"),
        (
            {"*": {"clip1": (0.5, 1)}, "*.q_proj": {"clip1": [1.0]}},
            r"'\* clip1' and '\*.q_proj clip1' both change",
        ),
    ],
)
def test_spaces_that_do_not_fit_are_refused(space, said):
    _, small = two_copies()
    with pytest.raises(ValueError, match=said):
        Space(small, space)


def test_activations_that_cannot_change_are_named():
    _, dynamic = two_copies(dynamic=True)
    for name in ("scale", "zero2"):
        with pytest.raises(ValueError, match="scales each token by itself"):
            Space(dynamic, {"*": {name: (0.5, 1)}})
    _, floats = two_copies(bits=None, dynamic=True)
    with pytest.raises(ValueError, match="does not round its inputs"):
        Space(floats, {"*": {"clip": (0.5, 1)}})
    with pytest.raises(ValueError, match=r"clip is 1\.5, expected"):
        Space(dynamic, {"*": {"clip": (0.5, 2)}}).apply({"* clip": 1.5})


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"*": {"clip2": 0.9}}, r"start has '\* clip2', expected some of \* clip1"),
        ({"*": {"clip1": 0.91}}, r"start has '\* clip1' = 0.91, expected one of \[0.9, 1.0\]"),
        ({"*.q_proj": {"weight1": 3}}, r"= 3, expected one of \(0, 2\)"),
    ],
)
def test_starts_outside_are_refused(point, said):
    _, small = two_copies()
    space = Space(small, {"*": {"clip1": [0.9, 1.0]}, "*.q_proj": {"weight1": (0, 2)}})
    with pytest.raises(ValueError, match=said):
        space.key_values(point)
