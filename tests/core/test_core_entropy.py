"""csrc/codes/entropy.c: the range that loses the least information."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core


def entropy_range(counts, levels):
    kept = np.full(1, -1)
    _core.entropy_range(np.asarray(counts, float), kept, levels=levels)
    return kept[0]


@pytest.mark.parametrize("levels", [1, 2, 8, 32])
@pytest.mark.parametrize("seed", range(13))
def test_kept_bins_lose_least(seed, levels):
    rng = np.random.default_rng([seed, levels])
    draw = [rng.standard_normal, lambda n: rng.standard_t(3, n), rng.exponential][seed % 3]
    counts = np.histogram(abs(draw(2000 if seed % 2 else 100)), bins=128)[0]
    losses = oracle.entropy_losses(counts, levels)
    assert losses.min() >= -1e-12
    # Both sum 128 terms below 10 in size; 1e-12 covers their rounding.
    assert losses[entropy_range(counts, levels) - levels] <= losses.min() + 1e-12


def test_what_levels_can_represent_is_kept_whole():
    counts = np.repeat([5, 3, 2, 1], 16)
    assert oracle.entropy_losses(counts, 4)[-1] == 0
    assert entropy_range(counts, 4) == 64


def test_bad_histograms_are_named():
    with pytest.raises(ValueError, match="empty"):
        entropy_range(np.zeros(8), 2)
    with pytest.raises(ValueError, match=r"counts\[1\] is nan"):
        entropy_range([1, np.nan], 2)
    with pytest.raises(ValueError, match="levels is 9"):
        entropy_range(np.ones(8), 9)
