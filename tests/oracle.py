"""Slow float64 versions of the C functions, written from the formulas and not from the C."""

from __future__ import annotations

from statistics import NormalDist

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


def decode(codes, scale, offset, group, levels=None):
    """scale * level[code] + offset in float64."""
    cols = codes.shape[1]
    wide = [np.repeat(a.astype(float), group, axis=1)[:, :cols] for a in (scale, offset)]
    return wide[0] * (codes if levels is None else levels.astype(float)[codes]) + wide[1]


def normal_quantiles(count):
    """`count` numbers that stand for equal shares of a normal variable, each its share's mean."""
    edges = np.array([NormalDist().inv_cdf(i / count) for i in range(1, count)])
    density = np.concatenate([[0], np.exp(-(edges**2) / 2), [0]]) / np.sqrt(2 * np.pi)
    return -np.diff(density) * count


def best_grid_error(weight, count, symmetric):
    """Least squared error of each row over a mesh of uniform grids, each refitted once."""
    best = np.full(len(weight), np.inf)
    w = weight.astype(float)
    width = np.ptp(w, axis=1, keepdims=True)
    largest = 2 * abs(w).max(1, keepdims=True)
    for size in np.geomspace(0.02, 1.2, 120):
        scale = size * (largest if symmetric else width) / (count - 1)
        for place in [0.5] if symmetric else np.linspace(0, 1, 40):
            middle = 0 if symmetric else w.min(1, keepdims=True) + place * width
            code = np.clip(np.rint((w - middle) / scale + (count - 1) / 2), 0, count - 1)
            v = code - (count - 1) / 2
            centre = 0 if symmetric else w.mean(1, keepdims=True)
            v = v if symmetric else v - v.mean(1, keepdims=True)
            spread = np.maximum((v * v).sum(1), 1e-300)
            error = ((w - centre) ** 2).sum(1) - np.maximum((v * w).sum(1), 0) ** 2 / spread
            best = np.minimum(best, error)
    return best


def kmeans_error(values, count, weights=None):
    """Least weighted squared error of `count` clusters, by trying every last interval."""
    order = np.argsort(values)
    x, w = values[order], (np.ones(len(values)) if weights is None else weights[order])

    def cost(begin, end):
        part, share = x[begin:end], w[begin:end]
        return (share * (part - np.average(part, weights=share)) ** 2).sum() if end > begin else 0

    best = [cost(0, end) for end in range(len(x) + 1)]
    for _ in range(count - 1):
        best = [min(best[b] + cost(b, end) for b in range(end + 1)) for end in range(len(x) + 1)]
    return best[-1]
