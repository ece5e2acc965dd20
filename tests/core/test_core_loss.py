"""Losses of predictions, their gradients, and drawing, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq import _core

UNIT = 2.0**-24
NONE = {"forward": 0.0, "reverse": 0.0, "jensen_shannon": 0.0, "cross_entropy": 0.0}
PARTS = [
    {"forward": 1.0},
    {"reverse": 1.0},
    {"jensen_shannon": 1.0},
    {"cross_entropy": 1.0},
    {"forward": 0.5, "reverse": 2.0, "jensen_shannon": 0.25, "cross_entropy": 1.5},
]
SHAPES = [(1, 1), (3, 2), (2, 7), (4, 8), (3, 257), (2, 1000), (2, 49152)]


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected_loss(z, teacher, target, *, temperature=1.0, **weights):
    """The formula of loss.h in float64, (tokens)."""
    w = NONE | weights
    log_q, log_p = log_softmax(z / temperature), log_softmax(teacher / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    soft = w["forward"] * (p * (log_p - log_q)).sum(-1)
    soft += w["reverse"] * (q * (log_q - log_p)).sum(-1)
    middle = (p * (log_p - log_m)).sum(-1) / 2 + (q * (log_q - log_m)).sum(-1) / 2
    soft += w["jensen_shannon"] * middle
    nll = -log_softmax(z)[np.arange(len(z)), target]
    return temperature**2 * soft + w["cross_entropy"] * np.where(target < 0, 0, nll)


def expected_gradient(z, teacher, target, *, temperature=1.0, **weights):
    """Derivatives (tokens, vocab) of the formula, and a bound of the float32 errors.

    A logarithm of a ratio of probabilities carries the rounding of four logits of its size, a
    probability that error again and the four units of the exponential.
    """
    w = NONE | weights
    log_q, log_p = log_softmax(z / temperature), log_softmax(teacher / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(log_p, log_q) - np.log(2)

    def through_softmax(slope):
        return q * (slope - (q * slope).sum(-1, keepdims=True))

    soft = w["forward"] * (q - p)
    soft += w["reverse"] * through_softmax(log_q - log_p)
    soft += w["jensen_shannon"] * through_softmax((log_q - log_m) / 2)
    hard = np.exp(log_softmax(z)) - (np.arange(z.shape[-1]) == target[:, None])
    hard = w["cross_entropy"] * np.where(target[:, None] < 0, 0, hard)
    size = (16 + 4 * abs(log_q) + 4 * abs(log_p)) * UNIT
    slope = abs(log_q - log_p) + (q * abs(log_q - log_p)).sum(-1, keepdims=True)
    sharp = (w["reverse"] + w["jensen_shannon"]) * (1 + slope)
    rounding = temperature * size * ((w["forward"] + sharp) * q + w["forward"] * p)
    rounding += temperature * sharp * q * (q * size).sum(-1, keepdims=True)
    rounding += w["cross_entropy"] * (size + 4 * abs(log_softmax(z)) * UNIT)
    return temperature * soft + hard, rounding + 1e-30


def gradient_of(z, teacher, target, weight=None, *, temperature=1.0, **weights):
    """Gradient and loss of _core, between guard rows."""
    logits = np.full((len(z) + 2, z.shape[1]), np.nan, np.float32)
    loss = np.full(len(z) + 2, np.nan)
    logits[1:-1] = z
    options = NONE | weights | {"temperature": temperature}
    _core.loss_gradient(logits[1:-1], teacher, target, weight, loss[1:-1], **options)
    assert np.isnan(logits[[0, -1]]).all(), "wrote outside logits"
    assert np.isnan(loss[[0, -1]]).all(), "wrote outside loss"
    return logits[1:-1], loss[1:-1]


def random_logits(tokens, vocab, spread=3.0):
    rng = np.random.default_rng([tokens, vocab])
    teacher, noise = spread * rng.standard_normal((2, tokens, vocab))
    z, teacher = (teacher + noise / 3 + 5).astype(np.float32), teacher.astype(np.float32)
    return z, teacher, rng.integers(0, vocab, tokens, dtype=np.int32)


def wide(*arrays):
    return [x.astype(np.float64) if x.dtype == np.float32 else x for x in arrays]


@pytest.mark.parametrize(("tokens", "vocab"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("part", PARTS, ids="+".join)
def test_loss_and_gradient_match_the_formula(isa, tokens, vocab, temperature, part):
    z, teacher, target = random_logits(tokens, vocab)
    gradient, loss = gradient_of(z, teacher, target, temperature=temperature, **part)
    arrays = wide(z, teacher, target)
    expected = expected_loss(*arrays, temperature=temperature, **part)
    assert (abs(loss - expected) <= 1e-6 * (temperature**2 + abs(expected))).all()
    expected, bound = expected_gradient(*arrays, temperature=temperature, **part)
    assert (abs(gradient - expected) <= bound).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("part", PARTS, ids="+".join)
def test_gradient_is_that_of_central_differences(part, temperature):
    z, teacher, target = random_logits(4, 11, spread=1.0)
    gradient, _ = gradient_of(z, teacher, target, temperature=temperature, **part)
    wide_z, *rest = wide(z, teacher, target)
    step = 1e-5
    for v in range(11):
        ahead, behind = wide_z.copy(), wide_z.copy()
        ahead[:, v] += step
        behind[:, v] -= step
        difference = expected_loss(ahead, *rest, temperature=temperature, **part)
        difference -= expected_loss(behind, *rest, temperature=temperature, **part)
        size = abs(gradient).max(-1)
        assert (abs(gradient[:, v] - difference / (2 * step)) <= 1e-3 * size).all()


def test_weights_scale_gradients_and_not_losses(isa):
    z, teacher, target = random_logits(5, 300)
    weight = np.float32([0, 1, 2, -0.5, 0.25])
    plain, loss = gradient_of(z, teacher, target, **PARTS[-1])
    weighted, same = gradient_of(z, teacher, target, weight, **PARTS[-1])
    assert (same == loss).all()
    for factor, one, other in zip(weight, plain, weighted, strict=True):
        assert (other == factor * one).all()  # all of them are powers of two


def test_a_target_of_minus_one_counts_nothing(isa):
    z, teacher, target = random_logits(4, 50)
    target[[1, 3]] = -1
    gradient, loss = gradient_of(z, None, target, cross_entropy=1.0)
    assert (loss[[1, 3]] == 0).all()
    assert (gradient[[1, 3]] == 0).all()
    assert (loss[[0, 2]] > 0).all()
    both, _ = gradient_of(z, teacher, target, forward=1.0, cross_entropy=1.0)
    soft, _ = gradient_of(z, teacher, None, forward=1.0)
    assert (both[[1, 3]] == soft[[1, 3]]).all()
    assert (both[[0, 2]] != soft[[0, 2]]).any()


@pytest.mark.parametrize("part", PARTS[:3], ids="+".join)
def test_no_distance_from_itself(isa, part):
    z, _, _ = random_logits(3, 1000)
    gradient, loss = gradient_of(z, z, None, **part)
    assert (abs(loss) <= 1e-6).all()
    assert (abs(gradient) <= 1e-6).all()


@pytest.mark.parametrize("part", PARTS, ids="+".join)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_extreme_logits(isa, part, temperature):
    rng = np.random.default_rng(2)
    z, teacher = rng.choice(np.float32([-1e4, 0, 1e4]), (2, 20, 40))
    z[:5, 3], teacher[:5, 3] = 1e5, 1e5  # one that dominates, in both
    z[5:10, 3], teacher[5:10, 4] = 1e5, 1e5  # and one each
    target = rng.integers(0, 40, 20, dtype=np.int32)
    gradient, loss = gradient_of(z, teacher, target, temperature=temperature, **part)
    arrays = wide(z, teacher, target)
    expected = expected_loss(*arrays, temperature=temperature, **part)
    assert (abs(loss - expected) <= 1e-6 * (temperature**2 + abs(expected))).all()
    expected, bound = expected_gradient(*arrays, temperature=temperature, **part)
    assert (abs(gradient - expected) <= bound).all()


@pytest.mark.parametrize("part", PARTS, ids="+".join)
def test_one_thread_and_many_give_the_same_bits(threads, part):
    z, teacher, target = random_logits(9, 3000)
    found = []
    for count in (1, 2, 5):
        _core.set_num_threads(threads=count)
        found.append(gradient_of(z, teacher, target, **part))
    for gradient, loss in found[1:]:
        assert (gradient == found[0][0]).all()
        assert (loss == found[0][1]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", PARTS, ids="+".join)
def test_rows_that_are_not_finite_are_refused(isa, part, bad):
    z, teacher, target = random_logits(3, 20)
    target[:] = 7
    broken = z.copy()
    broken[1, 7] = bad
    with pytest.raises(ValueError, match="row 1 of logits"):
        gradient_of(broken, teacher, target, **part)
    if "cross_entropy" not in part:
        broken = teacher.copy()
        broken[2, 5] = bad
        with pytest.raises(ValueError, match="row 2 of logits or teacher has a NaN or infinity"):
            gradient_of(z, broken, target, **part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "a divergence has a weight, but teacher is None"),
        ({"target": None}, "cross_entropy is 1, but target is None"),
        ({"target": np.int32([0, 20])}, r"target\[1\] is 20, expected -1 to 19"),
        ({"target": np.int32([-2, 0])}, r"target\[0\] is -2, expected -1 to 19"),
        ({"weight": np.float32([1, np.nan])}, r"weight\[1\] is -?nan, expected a finite number"),
        ({"temperature": 0.0}, "temperature"),
        ({"reverse": -1.0}, "reverse"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    z, teacher, _ = random_logits(2, 20)
    arguments = {"teacher": teacher, "target": np.int32([0, 1]), "weight": None, **NONE}
    arguments |= {"forward": 1.0, "cross_entropy": 1.0, "temperature": 1.0, **change}
    arrays = [arguments.pop(name) for name in ("teacher", "target", "weight")]
    with pytest.raises(ValueError, match=message):
        _core.loss_gradient(z, *arrays, np.empty(2), **arguments)


def drawn(logits, uniform):
    target = np.full(len(logits) + 2, -7, np.int32)
    _core.draw(logits, uniform, target[1:-1])
    assert (target[[0, -1]] == -7).all(), "wrote outside target"
    return target[1:-1]


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 5000])
def test_drawing_inverts_the_cumulative_distribution(isa, vocab):
    rng = np.random.default_rng(vocab)
    logits = (3 * rng.standard_normal((200, vocab))).astype(np.float32)
    uniform = rng.random(200)
    uniform[:2] = 0, np.nextafter(1, 0)
    target = drawn(logits, uniform)
    cumulative = np.cumsum(np.exp(log_softmax(logits.astype(float))), axis=-1)
    rows = np.arange(200)
    at, before = cumulative[rows, target], np.where(target > 0, cumulative[rows, target - 1], 0)
    assert (before <= uniform + 1e-6).all()
    assert (at >= uniform - 1e-6).all()
    found = (cumulative <= uniform[:, None]).sum(-1)
    assert (found == target).mean() >= 0.99  # but where rounding moves an edge past a number


def test_drawn_tokens_are_as_frequent_as_they_are_probable(isa):
    logits = np.log(np.float32([0.5, 0.25, 0.125, 0.125])) + 7
    count = 1 << 14
    target = drawn(np.tile(logits, (count, 1)), np.random.default_rng(0).random(count))
    share = np.bincount(target, minlength=4) / count
    assert (abs(share - [0.5, 0.25, 0.125, 0.125]) <= 5 * np.sqrt(0.25 / count)).all()
    even = (np.arange(count) + 0.5) / count
    assert (np.bincount(drawn(np.tile(logits, (count, 1)), even)) == count * share_of(logits)).all()


def share_of(logits):
    return np.rint(8 * np.exp(log_softmax(logits.astype(float)))) / 8


def test_tokens_without_a_probability_are_not_drawn(isa):
    logits = np.full((3, 600), -np.inf, np.float32)
    logits[0, 5], logits[1, [300, 599]], logits[2, [0, 1]] = 1e4, [0, -1e3], [3, 3]
    for uniform in (0.0, 0.3, np.nextafter(1, 0)):
        assert drawn(logits, np.full(3, uniform)).tolist() == [5, 300, int(uniform > 0.5)]


def test_what_cannot_be_drawn_from_is_refused(isa):
    logits = np.zeros((3, 20), np.float32)
    for bad in (-1e-9, 1.0, np.nan):
        with pytest.raises(ValueError, match=r"uniform\[1\] is .*, expected 0 <= uniform < 1"):
            drawn(logits, np.array([0.5, bad, 0.5]))
    for bad in (np.nan, np.inf):
        logits[2, 11] = bad
        with pytest.raises(ValueError, match="row 2 of logits has a NaN or infinity"):
            drawn(logits, np.full(3, 0.5))
    with pytest.raises(ValueError, match="row 0 of logits"):
        drawn(np.full((1, 4), -np.inf, np.float32), np.zeros(1))
