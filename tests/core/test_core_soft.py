"""csrc/codes/soft.c: weights between two levels, and the way back to what decides for one."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from latent_layers import SCALAR, Layer

from lowbitq import _core

SOFT = {"sampled": False, "temperature": 1.0, "noise": 0.0, "seed": 0, "stream": 0}
GUMBEL = SOFT | {"sampled": True, "temperature": 0.5, "noise": 1.0, "seed": 5, "stream": 7}


class SoftLayer(Layer):
    """The same random grids, with a pair of levels for each weight."""

    def __init__(self, name, rows=16, cols=64, group=32, **options):
        super().__init__(name, rows, cols, group, **options)
        rng = np.random.default_rng([rows, cols, 9])
        self.V = rng.uniform(-4, 4, self.shape).astype(np.float32)
        self.lower = rng.integers(0, self.count - 1, self.shape).astype(np.uint8)

    def bits(self, V, sampled, temperature, noise, seed, stream):
        """h, in float64."""
        if not sampled:
            return np.clip(1.2 / (1 + np.exp(-V)) - 0.1, 0, 1)
        drawn = oracle.random_bits(V.size, seed, stream) >> np.uint64(11)
        u = drawn.reshape(V.shape) * 2.0**-53 + 2.0**-54
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-(V + noise * np.log(u / (1 - u))) / temperature))

    def values(self, how, *, V=None, levels=None, **changes):
        levels = self.levels if levels is None else levels
        scale, offset, _ = self.wide(**changes)
        h = self.bits(self.V.astype(float) if V is None else V, **how)
        below, above = levels[self.lower], levels[self.lower + 1]
        return scale * (below + h * (above - below)) + offset

    def compose_soft(self, how):
        weight = np.full((self.shape[0] + 2, self.shape[1]), np.nan, np.float32)
        given = (self.code, self.V, self.lower, self.scale, self.offset)
        _core.soft_compose(*given, weight[1:-1], group=self.group, **how)
        assert np.isnan(weight[[0, -1]]).all(), "wrote outside weight"
        return weight[1:-1]

    def gradient_soft(self, dweight, how):
        dV = np.zeros(self.shape, np.float32)
        dscale, doffset = np.full((2, *self.scale.shape), np.nan, np.float32)
        dlevels = None if self.table is None else np.full_like(self.table, np.nan)
        given = (self.code, self.V, self.lower, self.scale, self.offset, dweight, dV)
        _core.soft_gradient(*given, dscale, doffset, dlevels, group=self.group, **how)
        return dV, dscale, doffset, dlevels


@pytest.mark.parametrize("how", [SOFT, GUMBEL], ids=["soft", "gumbel"])
@pytest.mark.parametrize("name", SCALAR)
def test_weights_lie_between_levels(isa, name, how):
    for rows, cols, group in ((1, 1, None), (15, 33, 32), (33, 129, None), (3, 576, 64)):
        m = SoftLayer(name, rows, cols, group)
        assert np.allclose(m.compose_soft(how), m.values(how), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", [SOFT, GUMBEL], ids=["soft", "gumbel"])
@pytest.mark.parametrize("name", SCALAR)
def test_gradients_are_central_differences(name, how):
    m = SoftLayer(name, 6, 70, 32)
    dweight = np.random.default_rng(3).standard_normal(m.shape, dtype=np.float32)
    dV, dscale, doffset, dlevels = m.gradient_soft(dweight, how)
    wide = m.V.astype(float)
    # Where the sigmoid is cut off, both sides of the edge are slopes.
    smooth = abs(abs(wide) - np.log(11)) > 1e-4
    ends = [m.values(how, V=wide + step) for step in (1e-5, -1e-5)]
    slope = dweight * (ends[0] - ends[1]) / 2e-5
    assert np.allclose(dV[smooth], slope[smooth], rtol=1e-4, atol=1e-6 * abs(slope).max())
    known = {
        "scale": (m.scale, dscale),
        "offset": (m.offset, doffset),
        "levels": (m.table, dlevels),
    }
    for key, (value, found) in known.items():
        if value is None:
            continue
        for at in list(np.ndindex(value.shape))[:20]:
            step = np.zeros(value.shape)
            step[at] = 1e-5
            ends = [m.values(how, **{key: value.astype(float) + s * step}) for s in (1, -1)]
            slope = (dweight * (ends[0] - ends[1])).sum() / 2e-5
            assert found[at] == pytest.approx(slope, rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize("name", ["int2", "int3", "ternary", "nf4"])
def test_temperature_zero_is_the_hard_quantizer(name):
    m = SoftLayer(name, 33, 129)
    words = np.full(m.shape, 255, np.uint8)
    _core.soft_words(m.V, m.lower, words)
    assert (words == m.lower + (m.V > 0)).all()
    scale, offset, _ = m.wide()
    expected = scale * m.levels[words] + offset
    cold = GUMBEL | {"noise": 0.0}
    errors = []
    for temperature in (1.0, 0.1, 0.01, 1e-5, 0.0):
        errors.append(abs(m.compose_soft(cold | {"temperature": temperature}) - expected).max())
    assert (np.diff(errors) <= 0).all()
    assert errors[-1] <= 2.0**-22 * abs(expected).max()
    dV = m.gradient_soft(np.ones(m.shape, np.float32), cold | {"temperature": 0.0})[0]
    assert not dV.any()


def test_samples_of_low_temperature_have_the_probability_of_the_sigmoid():
    """Gumbel-max: an upper level is drawn with probability sigmoid(V)."""
    m = SoftLayer("int2", 64, 4096, None)
    m.scale[:], m.offset[:], m.lower[:] = 1, 0, 1
    for V in (-1.5, 0.0, 2.0):
        m.V[:] = V
        drawn = m.compose_soft(GUMBEL | {"temperature": 0.0})
        assert set(np.unique(drawn)) == {1, 2}
        expected = 1 / (1 + np.exp(-V))
        assert drawn.mean() - 1 == pytest.approx(expected, abs=5 * 0.5 / 512)


def test_noise_depends_on_seed_and_stream_alone():
    m = SoftLayer("int2")
    one = m.compose_soft(GUMBEL)
    assert (one == m.compose_soft(GUMBEL)).all()
    for other in ({"seed": 6}, {"stream": 8}):
        assert (one != m.compose_soft(GUMBEL | other)).any()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", SCALAR)
def test_float_weights_start_between_their_neighbours(name, sampled):
    m = SoftLayer(name, 33, 129, 32)
    weight = (m.wide()[2] * m.x).astype(np.float32)
    words, lower = m.words().astype(np.uint8), np.full(m.shape, 255, np.uint8)
    V, final = np.full(m.shape, np.nan, np.float32), np.full_like(words, 255)
    given = (m.code, weight, words, m.scale, m.offset)
    _core.soft_bracket(*given, V, lower, group=m.group, sampled=sampled)
    _core.soft_words(V, lower, final)
    assert (final == words).all()
    scale, offset, _ = m.wide()
    v = (weight - offset) / scale
    within = (v > m.levels[0]) & (v < m.levels[-1])
    assert (m.levels[lower] <= v + 1e-5)[within].all()
    assert (m.levels[lower + 1] >= v - 1e-5)[within].all()
    m.V, m.lower = V, lower
    how = (GUMBEL | {"temperature": 1.0, "noise": 0.0}) if sampled else SOFT
    gap = m.levels[lower + 1] - m.levels[lower]
    place = (v - m.levels[lower]) / gap
    decided = within & (abs(place - 0.5) > 0.101)
    error = abs(m.compose_soft(how) - weight)
    assert (error <= 0.0101 * gap * scale + 1e-5)[decided].all()


def test_the_penalty_is_that_of_adaround():
    rng = np.random.default_rng(0)
    V = rng.uniform(-2, 2, (20, 30)).astype(np.float32)
    dV = rng.standard_normal(V.shape, dtype=np.float32)
    unit = np.sqrt(np.square(dV.astype(float)).mean())
    for beta in (2.0, 7.5, 20.0):

        def penalty(V, beta=beta):
            h = np.clip(1.2 / (1 + np.exp(-V)) - 0.1, 0, 1)
            return 3 * unit * (1 - abs(2 * h - 1) ** beta)

        found = dV.copy()
        _core.soft_penalty(V, found, strength=3.0, beta=beta)
        wide = V.astype(float)
        slope = (penalty(wide + 1e-6) - penalty(wide - 1e-6)) / 2e-6
        assert np.allclose(found - dV, slope, rtol=1e-4, atol=1e-5)


def test_one_thread_and_many_give_the_same_bits(threads):
    m = SoftLayer("nf4", 1100, 257, 32)
    dweight = np.random.default_rng(7).standard_normal(m.shape, dtype=np.float32)
    found = []
    for count in (1, 2, 5):
        _core.set_num_threads(threads=count)
        penalised = dweight.copy()
        _core.soft_penalty(m.V, penalised, strength=1.0, beta=3.0)
        found.append((m.compose_soft(GUMBEL), penalised, *m.gradient_soft(dweight, GUMBEL)))
    for other in found[1:]:
        assert all((a == b).all() for a, b in zip(found[0], other, strict=True))


def test_what_does_not_fit_is_refused():
    m = SoftLayer("int2")
    m.lower[1, 2] = 3
    with pytest.raises(ValueError, match=r"lower\[1, 2\] is 3, expected at most 2"):
        m.compose_soft(SOFT)
    with pytest.raises(ValueError, match=r"lower\[1, 2\] is 3, expected at most 2"):
        m.gradient_soft(m.x, SOFT)
