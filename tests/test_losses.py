"""Losses of distillation: texts, values by hand, gradients by central differences, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbitq import NumericalError
from lowbitq.losses import (
    Loss,
    attention_loss,
    diversity_loss,
    feature_loss,
    l2_to_start,
    orthogonality_loss,
    relation_loss,
)

PARTS = {"kl": "forward", "reverse": "reverse", "js": "jensen_shannon", "ce": "cross_entropy"}
WEIGHT = st.floats(0, 1e6)


def differences(function, x, step=1e-6):
    """The gradient of function at x, by central differences of each number."""
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[at] += step
        behind[at] -= step
        gradient[at] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


def assert_is_gradient(function, x):
    value, gradient = function(x)
    expected = differences(lambda z: function(z)[0], x)
    assert isinstance(value, float)
    assert np.allclose(gradient, expected, rtol=1e-6, atol=1e-7 * (abs(expected).max() + value))
    narrow = function(x.astype(np.float32))
    assert narrow[1].dtype == np.float32
    assert narrow[0] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert np.allclose(narrow[1], gradient, rtol=1e-4, atol=1e-5 * abs(gradient).max())


def pair(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((2, *shape))


# --- Loss


@pytest.mark.parametrize(
    ("text", "loss", "back"),
    [
        ("kl", Loss(), "kl"),
        ("reverse", Loss(0, reverse=1), "reverse"),
        ("js", Loss(0, jensen_shannon=1), "js"),
        ("ce", Loss(0, cross_entropy=1), "ce"),
        ("kl + 0.5 reverse", Loss(1, 0.5), "kl + 0.5 reverse"),
        (
            "  .1ce+0.9 kl,temperature  2 ",
            Loss(0.9, 0, 0, 0.1, 2),
            "0.9 kl + 0.1 ce, temperature 2",
        ),
        ("1e-3 js", Loss(0, 0, 1e-3), "0.001 js"),
    ],
)
def test_text_is_a_loss_and_back(text, loss, back):
    assert Loss.parse(text) == loss
    assert Loss.parse(loss) is loss
    assert str(loss) == back


@given(WEIGHT, WEIGHT, WEIGHT, WEIGHT, st.floats(1e-3, 1e3))
def test_every_loss_survives_its_text(forward, reverse, jensen_shannon, cross_entropy, temperature):
    weights = (forward, reverse, jensen_shannon, cross_entropy)
    if any(weights):
        loss = Loss(*weights, temperature)
        assert Loss.parse(str(loss)) == loss


@pytest.mark.parametrize(
    "text",
    ["", "mse", "kl reverse", "kl +", "kl + kl", "-1 kl", "kl, temperature", "nan kl", "kl * 2"],
)
def test_text_that_is_no_loss_is_refused(text):
    with pytest.raises(ValueError, match=r"unknown loss '.*'; expected a sum of kl"):
        Loss.parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward": -1.0}, "forward is -1.0, expected 0 to 1e"),
        ({"reverse": float("nan")}, "reverse is nan"),
        ({"jensen_shannon": float("inf")}, "jensen_shannon is inf"),
        ({"cross_entropy": 1e7}, "cross_entropy is 10000000.0"),
        ({"temperature": 0.0}, "temperature is 0.0, expected 0.001 to 1000"),
        ({"forward": 0.0}, "all weights of the loss are 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Loss(**change)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_of_a_loss(part, temperature):
    loss = Loss.parse(f"{part}, temperature {temperature}")
    logits, teacher = pair(3, 5).astype(np.float32)
    targets, weights = np.int32([4, -1, 0]), np.float32([0.5, 1, 2])
    value, gradient = loss.evaluate(logits, teacher, targets, weights=weights)
    step = 2.0**-7  # a power of two, which float32 logits take without rounding much

    def total(z):
        z = z.astype(np.float32)
        return (weights * loss.evaluate(z, teacher, targets)[0]).sum()

    expected = differences(total, logits, step)
    assert (abs(gradient - expected) <= 1e-3 * abs(gradient).max()).all()
    assert loss.needs_targets == (part == "ce")
    assert loss.needs_teacher == (part != "ce")
    assert value.shape == (3,)


def test_values_of_a_loss_by_hand():
    logits, teacher = np.log(np.float32([[[1, 3]], [[1, 1]]]))
    p, q, m = np.array([[0.5, 0.5], [0.25, 0.75], [0.375, 0.625]])
    parts = {
        "kl": (p * np.log(p / q)).sum(),
        "reverse": (q * np.log(q / p)).sum(),
        "js": (p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2,
        "ce": -np.log(0.75),
    }
    for name, expected in parts.items():
        value, _ = Loss.parse(f"2 {name}").evaluate(logits, teacher, np.int32([1]))
        assert value == pytest.approx(2 * expected, abs=1e-6)


def test_logits_are_overwritten_only_if_asked():
    logits, teacher = pair(3, 5).astype(np.float32)
    before = logits.copy()
    _, gradient = Loss().evaluate(logits, teacher)
    assert (logits == before).all()
    _, same = Loss().evaluate(logits, teacher, overwrite=True)
    assert same is logits
    assert (logits == gradient).all()


def test_arrays_that_a_loss_lacks_are_named():
    logits, teacher = pair(3, 5).astype(np.float32)
    with pytest.raises(ValueError, match="teacher is None"):
        Loss().evaluate(logits)
    with pytest.raises(ValueError, match="target is None"):
        Loss.parse("ce").evaluate(logits)
    with pytest.raises(ValueError, match="teacher"):
        Loss().evaluate(logits, teacher[:2])
    with pytest.raises(TypeError, match="logits"):
        Loss().evaluate(logits.astype(float), teacher)


# --- inside two networks


@pytest.mark.parametrize("normalize", [None, "mean", "token"])
def test_feature_loss(normalize):
    x, teacher = pair(4, 6)
    assert_is_gradient(lambda z: feature_loss(z, teacher, normalize=normalize), x)
    size = {None: 1, "mean": (teacher**2).mean(), "token": (teacher**2).mean(1, keepdims=True)}
    expected = ((x - teacher) ** 2 / size[normalize]).mean()
    assert feature_loss(x, teacher, normalize=normalize)[0] == pytest.approx(expected)
    assert feature_loss(teacher, teacher)[0] == 0
    assert feature_loss(np.array([1.0, 3]), np.array([1.0, 1]))[0] == 2


def test_feature_loss_refuses_what_cannot_normalize():
    x, teacher = pair(4, 6)
    teacher[2] = 0
    feature_loss(x, teacher, normalize="mean")
    for bad, how in ((teacher, "token"), (0 * x, "mean")):
        with pytest.raises(ValueError, match="all zeros and cannot normalize"):
            feature_loss(x, bad, normalize=how)
    with pytest.raises(ValueError, match="normalize is 'rows', expected 'mean', 'token' or None"):
        feature_loss(x, teacher, normalize="rows")


def test_relation_loss():
    x, teacher = pair(5, 3)
    teacher = np.concatenate([teacher, teacher[:, ::-1] ** 2], axis=1)  # of another width
    assert_is_gradient(lambda z: relation_loss(z, teacher), x)
    rotation = np.linalg.qr(pair(3, 3)[0])[0]
    assert relation_loss(2.5 * x @ rotation, x)[0] == pytest.approx(0, abs=1e-25)
    assert 0 < relation_loss(x, teacher)[0] <= 2
    for arguments in ((0 * x, x), (x, 0 * x), (x, x[:3]), (x[0], x)):
        with pytest.raises(ValueError, match=r"hidden|teacher"):
            relation_loss(*arguments)


def test_attention_loss():
    x, teacher = pair(2, 4, 6)
    assert_is_gradient(lambda z: attention_loss(z, teacher), x)
    assert attention_loss(x + 3, x)[0] == pytest.approx(0, abs=1e-12)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (teacher, x))
    assert attention_loss(x, teacher)[0] == pytest.approx((p * np.log(p / q)).sum(-1).mean())


def test_hidden_keys_do_not_count():
    x, teacher = pair(3, 4)
    wide = [np.full((3, 6), -np.inf) for _ in range(2)]
    for to, values in zip(wide, (x, teacher), strict=True):
        to[:, [0, 2, 3, 5]] = values
    value, gradient = attention_loss(*wide)
    expected, inner = attention_loss(x, teacher)
    assert value == pytest.approx(expected)
    assert np.allclose(gradient[:, [0, 2, 3, 5]], inner)
    assert (gradient[:, [1, 4]] == 0).all()
    with pytest.raises(ValueError, match="hide different keys"):
        attention_loss(wide[0], np.zeros((3, 6)))
    with pytest.raises(ValueError, match="all keys of a query are hidden"):
        attention_loss(np.full((1, 2), -np.inf), np.full((1, 2), -np.inf))


def test_diversity_loss():
    x = np.random.default_rng(1).standard_normal((3, 4, 5))
    assert_is_gradient(diversity_loss, x)
    value, gradient = diversity_loss(list(x))
    assert value == pytest.approx(-np.log(np.linalg.det(np.corrcoef(x.reshape(3, -1)))))
    assert np.allclose(gradient, diversity_loss(x)[1])
    scaled = x * np.array([1, -2, 3]).reshape(3, 1, 1) + 5
    assert diversity_loss(scaled)[0] == pytest.approx(value)
    assert diversity_loss(x[:1])[0] == pytest.approx(0)
    assert diversity_loss(np.array([[1.0, -1, 0, 0], [0, 0, 1, -1]]))[0] == pytest.approx(0)
    with pytest.raises(NumericalError, match="linearly dependent"):
        diversity_loss(np.stack([x[0], x[0]]))
    with pytest.raises(ValueError, match="outputs of copy 1 are all equal"):
        diversity_loss(np.stack([x[0], np.ones((4, 5))]))


def test_orthogonality_loss():
    x, y = pair(4, 5)
    assert_is_gradient(lambda z: orthogonality_loss(z, y)[:2], x)
    assert_is_gradient(lambda z: orthogonality_loss(x, z)[::2], y)
    value, by_x, by_y = orthogonality_loss(np.eye(4)[:, :2], np.eye(4)[:, 2:])
    assert value == 0
    assert not by_x.any()
    assert not by_y.any()
    with pytest.raises(ValueError, match="expected"):
        orthogonality_loss(x, y[:3])


def test_l2_to_start():
    x, start = pair(7)
    assert_is_gradient(lambda z: l2_to_start(z, start), x)
    assert l2_to_start(np.array([3.0]), np.array([1.0]))[0] == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "function", [feature_loss, relation_loss, attention_loss, orthogonality_loss, l2_to_start]
)
def test_what_is_not_finite_or_no_float_is_refused(function, bad):
    for place in range(2):
        arrays = list(pair(3, 4))
        arrays[place][1, 1] = bad
        with pytest.raises(ValueError, match="has a NaN or infinity"):
            function(*arrays)
        arrays[place] = np.zeros((3, 4), np.int64)
        with pytest.raises(TypeError, match="is not an ndarray of float32 or float64"):
            function(*arrays)
        arrays[place] = np.zeros((3, 0))
        with pytest.raises(ValueError, match=r"has shape \(3, 0\)"):
            function(*arrays[:: 1 - 2 * place])


@pytest.mark.parametrize("function", [feature_loss, attention_loss, l2_to_start])
def test_shapes_that_differ_are_refused(function):
    with pytest.raises(ValueError, match=r"has shape \(3, 4\), expected \(3, 5\)"):
        function(np.zeros((3, 5)), np.zeros((3, 4)))
