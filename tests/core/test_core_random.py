"""Counter-based random numbers against the formula in NumPy's uint64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core

SEEDS = [(0, 0), (1, 0), (0, 1), (12345, 678), (2**63 - 1, 2**63 - 1)]


def bits(count, seed, stream):
    out = np.empty(count, np.uint64)
    _core.random_bits(out, seed=seed, stream=stream)
    return out


def normal(count, seed, stream):
    out = np.full(count, np.nan)
    _core.random_normal(out, seed=seed, stream=stream)
    return out


def test_oracle_is_splitmix64():
    # The generator of Steele, Lea and Flood steps its state by the constant and mixes it: these
    # are its first outputs from seed 1234567, as the task "Pseudo-random numbers/Splitmix64" of
    # Rosetta Code lists them.
    golden = np.uint64(0x9E3779B97F4A7C15)  # the fractional part of the golden ratio
    state = np.uint64(1234567) + golden * np.arange(5, dtype=np.uint64)
    assert oracle.splitmix64(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize(("seed", "stream"), SEEDS)
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_bits_equal_the_formula(count, seed, stream):
    assert (bits(count, seed, stream) == oracle.random_bits(count, seed, stream)).all()


def test_prefix_does_not_depend_on_the_count():
    assert (bits(1000, 3, 4)[:10] == bits(10, 3, 4)).all()


def test_seeds_and_streams_do_not_collide():
    rows = [bits(256, seed, stream) for seed in range(16) for stream in range(16)]
    assert len(np.unique(rows)) == 16 * 16 * 256


def test_every_bit_is_fair_and_independent_of_its_neighbour():
    words = bits(1 << 16, 7, 0)
    spread = ((words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).astype(np.int8)
    # 64 sample means of 2^16 fair bits: five standard deviations of 0.5 / 256.
    assert abs(spread.mean(axis=0) - 0.5).max() < 5 * 0.5 / 256
    flips = (spread[1:] != spread[:-1]).mean(axis=0)
    assert abs(flips - 0.5).max() < 5 * 0.5 / 256


@pytest.mark.parametrize(("seed", "stream"), SEEDS)
def test_normal_is_box_and_muller(seed, stream):
    expected = oracle.random_normal(1000, seed, stream)
    # log, sqrt, cos and their product are within an ulp in both libraries: 8 eps of the radius,
    # which is at most sqrt(-2 ln 2^-53) < 8.6.
    bound = 8 * np.finfo(np.float64).eps * 8.6
    assert (abs(normal(1000, seed, stream) - expected) <= bound).all()


def test_normal_has_the_moments():
    x = normal(1 << 18, 11, 2)
    n = len(x)
    assert np.isfinite(x).all()
    # Five standard errors: of the mean 1/sqrt(n), of the variance sqrt(2/n), of the fourth
    # moment sqrt(96/n).
    assert abs(x.mean()) < 5 / np.sqrt(n)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        _core.random_bits(np.empty(1, np.uint64), seed=-1, stream=0)
