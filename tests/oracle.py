"""Slow float64 versions of the C functions, written from the formulas and not from the C."""

from __future__ import annotations

import numpy as np


def splitmix64(state):
    """The finaliser of SplitMix64 of each uint64."""
    z = np.asarray(state, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(count, seed, stream):
    """The first `count` uint64 of a (seed, stream)."""
    with np.errstate(over="ignore"):
        key = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.uint64(stream))
        return splitmix64(key ^ np.arange(count, dtype=np.uint64))


def random_normal(count, seed, stream):
    """Box and Muller on pairs of uniform numbers with 53 bits."""
    u, v = (random_bits(2 * count, seed, stream) >> np.uint64(11)).reshape(count, 2).T * 2.0**-53
    return np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * np.pi * v)
