"""Layers whose words are chosen at each step, and a slow float64 version of what they compute."""

from __future__ import annotations

import numpy as np
import oracle

from lowbitq import _core

CODES = _core.codes()
SCALAR = [name for name, about in CODES.items() if about["ordered"]]


class Layer:
    """Random latent weights of a code, their grids, and a slow float64 version of everything."""

    def __init__(self, name, rows=16, cols=64, group=32, *, offsets=None, seed=0):
        about, rng = CODES[name], np.random.default_rng([rows, cols, seed])
        self.offsets = about["offsets"] if offsets is None else offsets
        self.count, self.zero = about["level_count"], 0.0 if about["table"] != "none" else 0.75
        self.table = None
        if about["table"] != "none":
            self.table = np.sort(rng.standard_normal(self.count)).astype(np.float32)
        self.levels = np.arange(self.count) if self.table is None else self.table.astype(float)
        self.code = _core.code(
            self.table,
            name=name,
            symmetric=not self.offsets,
            scale_bits=16,
            unit=1.0,
            zero=self.zero,
        )
        self.group, groups = group or 2**40, -(-cols // group) if group else 1
        self.shape = rows, cols
        grids = rng.uniform(0.2, 1, (3, rows, groups)).astype(np.float32)
        self.scale, self.unit, offset = grids[0], grids[1], grids[2] - np.float32(0.5)
        self.offset = offset if self.offsets else None
        # Positions in and around the range, away from where rounding is undecided.
        low, high = self.levels[0], self.levels[-1]
        v = rng.uniform(low - (high - low), high + (high - low), (rows, cols))
        edges = np.append((self.levels[1:] + self.levels[:-1]) / 2, self.range)
        v[abs(v[..., None] - edges).min(-1) < 1e-3 * (high - low) / self.count] = self.levels[0]
        scale, offset, unit = self.wide()
        self.x = ((v * scale + offset) / unit).astype(np.float32)

    @property
    def range(self):
        """Half a step beyond the outer levels."""
        low, high = self.levels[:2], self.levels[-2:]
        return np.array([1.5 * low[0] - 0.5 * low[1], 1.5 * high[1] - 0.5 * high[0]])

    def wide(self, **changes):
        """scale, offset and unit of each weight, in float64."""
        known = {"scale": self.scale, "offset": self.offset, "unit": self.unit} | changes
        scale = known["scale"].astype(float)
        offset = -self.zero * scale if known["offset"] is None else known["offset"].astype(float)
        cols, group = self.shape[1], min(self.group, self.shape[1])
        grids = scale, offset, known["unit"].astype(float)
        return [oracle.per_column(x, group, cols) for x in grids]

    def words(self):
        scale, offset, unit = self.wide()
        v = (unit * self.x - offset) / scale
        return abs(v[..., None] - self.levels).argmin(-1)

    def surrogate(self, *, x=None, levels=None, share=1.0, clipped=True, **changes):
        """The function whose true gradient is that of the straight-through estimator.

        Rounding adds a constant, then comes clipping; ``x`` of weights that are not clipped on the
        way back moves the result itself.
        """
        scale, offset, unit = self.wide()
        v0, words = (unit * self.x - offset) / scale, self.words()
        low, high = self.range
        inside = (v0 >= low) & (v0 <= high)
        jump = self.levels[words] - v0
        scale, offset, unit = self.wide(**changes)
        latent = self.x.astype(float) if x is None else x
        moved = (self.levels if levels is None else levels)[words] - self.levels[words]
        q = np.where(inside, (unit * latent - offset) / scale + jump, self.levels[words]) + moved
        w = scale * q + offset
        if not clipped:
            w = w + np.where(inside, 0, unit * (latent - self.x))
        return (1 - share) * unit * latent + share * w

    def compose(self, share=1.0):
        weight = np.full((self.shape[0] + 2, self.shape[1]), np.nan, np.float32)
        given = (self.code, self.x, self.scale, self.offset, self.unit)
        _core.latent_compose(*given, weight[1:-1], group=self.group, share=share)
        assert np.isnan(weight[[0, -1]]).all(), "wrote outside weight"
        return weight[1:-1]

    def gradient(self, dweight, share=1.0, *, clipped=True):
        """dlatent, dscale, doffset and dlevels."""
        dlatent = np.zeros(self.shape, np.float32)
        grids = np.full((2, self.scale.shape[0] + 2, self.scale.shape[1]), np.nan, np.float32)
        dlevels = None if self.table is None else np.full_like(self.table, np.nan)
        given = (self.code, self.x, self.scale, self.offset, self.unit, dweight, dlatent)
        found = (grids[0, 1:-1], grids[1, 1:-1], dlevels)
        _core.latent_gradient(*given, *found, group=self.group, share=share, clipped=clipped)
        assert np.isnan(grids[:, [0, -1]]).all(), "wrote outside dscale or doffset"
        return dlatent, *found
