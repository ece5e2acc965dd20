"""Sums over weights and inputs."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq import _core

# Rows of one vector, of less and of more; one piece of rows, several, and rows longer than a piece.
SHAPES = [(1, 1), (3, 7), (5, 8), (7, 9), (64, 576), (200, 577), (2, 40000)]
BINS = 1 << 15


def arrays(rows, cols):
    rng = np.random.default_rng([rows, cols])
    W, Q, G = rng.standard_normal((3, rows, cols), np.float32)
    return W, Q, rng.uniform(0, 3, cols).astype(np.float32), G


def bound(terms):
    """Each term is rounded at most five times, then added to fewer than as many others."""
    return (terms.size + 5) * 2.0**-53 * terms.sum()


def expected_sums(W, Q, h, G):
    W, Q = W.astype(np.float64), Q.astype(np.float64)
    terms = {"error": (W - Q) ** 2, "weight": W**2}
    if h is not None:
        terms |= {"weighted_error": h * terms["error"], "weighted_weight": h * terms["weight"]}
    if G is not None:
        square = G.astype(np.float64) ** 2
        terms |= {"gradient": square, "fisher": square * terms["error"]}
    return terms


@pytest.mark.parametrize("given", ["", "h", "G", "hG"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_weight_sums_match_oracle(rows, cols, given):
    W, Q, h, G = arrays(rows, cols)
    h, G = h if "h" in given else None, G if "G" in given else None
    found = _core.weight_sums(W, Q, h, G)
    terms = expected_sums(W, Q, h, G)
    for name, value in found.items():
        if name in terms:
            assert abs(value - terms[name].sum()) <= bound(terms[name]), name
            assert value == pytest.approx(terms[name].sum(), rel=1e-6)
        else:
            assert value == 0, name


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.5, 1e300])
@pytest.mark.parametrize(("tokens", "cols"), [(0, 5), *SHAPES])
def test_input_sums_match_oracle(tokens, cols, tau):
    x = np.random.default_rng([tokens, cols]).standard_normal((tokens, cols), np.float32)
    found = _core.input_sums(x, tau=tau)
    magnitude = abs(x.astype(np.float64))
    above = magnitude > tau
    assert found["above"] == above.sum()
    assert found["largest"] == magnitude.max(initial=0)
    for name, terms in {
        "magnitude": magnitude,
        "squares": magnitude**2,
        "squares_above": magnitude[above] ** 2,
    }.items():
        assert abs(found[name] - terms.sum()) <= bound(terms), name


def test_a_number_equal_to_tau_is_not_above():
    x = np.array([[2, -2, np.nextafter(np.float32(2), np.float32(3)), -3]], np.float32)
    assert _core.input_sums(x, tau=2.0)["above"] == 2


@pytest.mark.parametrize(("tokens", "cols"), [(0, 5), *SHAPES])
def test_magnitude_counts_match_oracle(tokens, cols):
    x = np.random.default_rng([tokens, cols]).standard_normal((tokens, cols), np.float32)
    counts = np.full(BINS, 7, np.int64)
    _core.magnitude_counts(x, counts)
    bins = abs(x).view(np.uint32).ravel() >> 16
    assert np.array_equal(counts - 7, np.bincount(bins, minlength=BINS))


def test_extreme_numbers_do_not_overflow():
    largest = np.finfo(np.float32).max
    W = np.full((3, 9), largest, np.float32)
    h = np.full(9, largest, np.float32)
    found = _core.weight_sums(W, -W, h, W)
    assert found["fisher"] == pytest.approx(27 * 4 * float(largest) ** 4, rel=1e-12)
    assert found["weighted_error"] == pytest.approx(27 * 4 * float(largest) ** 3, rel=1e-12)
    assert _core.input_sums(W, tau=1.0)["squares"] == pytest.approx(27 * float(largest) ** 2)
    least = np.full((1, 9), 1e-45, np.float32)
    assert _core.input_sums(least, tau=0.0)["magnitude"] == pytest.approx(9 * float(least[0, 0]))


def test_results_do_not_depend_on_threads(threads):
    W, Q, h, G = arrays(500, 577)
    results = []
    for count in (1, 2, 5):
        _core.set_num_threads(threads=count)
        counts = np.zeros(BINS, np.int64)
        _core.magnitude_counts(W, counts)
        results.append(
            (_core.weight_sums(W, Q, h, G), _core.input_sums(W, tau=2.0), counts.tolist())
        )
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (199, 576), (100, 575)])
def test_numbers_that_are_not_finite_are_named(bad, row, column):
    W, Q, h, G = arrays(200, 577)
    for index, name in {0: "weight", 1: "quantized", 3: "gradient"}.items():
        given = [W, Q, h, G]
        given[index] = given[index].copy()
        given[index][row, column] = bad
        said = f"^{name} has a NaN or an infinity at row {row}, column {column}$"
        with pytest.raises(ValueError, match=said):
            _core.weight_sums(*given)
    x = W.copy()
    x[row, column] = bad
    said = f"^x has a NaN or an infinity at token {row}, column {column}$"
    with pytest.raises(ValueError, match=said):
        _core.input_sums(x, tau=1.0)
    with pytest.raises(ValueError, match=said):
        _core.magnitude_counts(x, np.zeros(BINS, np.int64))


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf])
def test_bad_importance_is_named(bad):
    W, Q, h, _ = arrays(3, 7)
    h[5] = bad
    with pytest.raises(ValueError, match=r"importance\[5\] is .*, expected a finite number >= 0"):
        _core.weight_sums(W, Q, h, None)


def test_shapes_that_do_not_fit_are_refused():
    W, Q, h, G = arrays(3, 7)
    for wrong in ([W, Q[:2], h, G], [W, Q, h[:6], G], [W, Q, h, G[:, :6].copy()]):
        with pytest.raises(ValueError, match=r"axis \d .* expected"):
            _core.weight_sums(*wrong)
    with pytest.raises(ValueError, match="32768"):
        _core.magnitude_counts(W, np.zeros(BINS - 1, np.int64))
    with pytest.raises(ValueError, match="tau"):
        _core.input_sums(W, tau=-1.0)
