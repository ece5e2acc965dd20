"""Rank correlations, against their definitions and SciPy's results."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from lowbitq.ranks import kendall, ranks, spearman


def with_ties(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 8, 30).astype(float), rng.integers(0, 8, 30) / 7


@pytest.mark.parametrize("seed", range(5))
def test_ranks_count_the_smaller_and_half_of_the_equal(seed):
    values, _ = with_ties(seed)
    smaller = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    assert ranks(values).tolist() == (smaller + (equal + 1) / 2).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_the_correlation_of_ranks(seed):
    x, y = with_ties(seed)
    assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_kendall_counts_pairs(seed):
    x, y = with_ties(seed)
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(30), 2)]
    both = sum(a * b for a, b in signs)
    different = [sum(bool(pair[side]) for pair in signs) for side in (0, 1)]
    assert kendall(x, y) == pytest.approx(both / np.sqrt(np.prod(different)), abs=1e-12)


def test_values_of_scipy():
    """From the examples in its documentation of spearmanr and kendalltau."""
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert kendall([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173)


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_only_the_order_matters(correlation):
    x, y = with_ties(0)
    assert correlation(x, y) == correlation(np.exp(x), y**3) == correlation(y, x)
    assert correlation(x, x) == pytest.approx(1)
    assert correlation(x, -x) == pytest.approx(-1)
    assert np.isnan(correlation(x, np.ones(30)))
    assert np.isnan(correlation([1], [2]))


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_refusals(correlation):
    with pytest.raises(ValueError, match="x has 2 values and y 3"):
        correlation([1, 2], [1, 2, 3])
    for bad in ([1, np.nan], [1, np.inf], [[1, 2]]):
        with pytest.raises(ValueError, match="not one row of finite numbers"):
            correlation(bad, [1, 2])
