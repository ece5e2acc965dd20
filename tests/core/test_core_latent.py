"""csrc/codes/latent.c: weights rounded at each step, and the way back through the rounding."""

from __future__ import annotations

import numpy as np
import pytest
from latent_layers import CODES, SCALAR, Layer

from lowbitq import _core

OTHERS = [name for name, about in CODES.items() if not about["ordered"]]
SIZES = [(1, 1), (15, 33), (16, 64), (33, 129), (3, 576)]
GROUPS = [None, 16, 32, 128]
U = 2.0**-24


def layers(name):
    for rows, cols in SIZES:
        for group in GROUPS:
            if not group or group % CODES[name]["multiple"] == 0:
                yield Layer(name, rows, cols, group)
    if CODES[name]["offsets"]:
        yield Layer(name, 33, 129, 32, offsets=False)


@pytest.mark.parametrize("name", SCALAR)
def test_weights_are_the_nearest_levels(isa, name):
    for m in layers(name):
        words = np.full(m.shape, 255, np.uint8)
        given = (m.code, m.x, m.scale, m.offset, m.unit)
        _core.latent_words(*given, words, group=m.group)
        assert (words == m.words()).all()
        scale, offset, _ = m.wide()
        size = abs(scale * m.levels[words]) + abs(offset)
        assert (abs(m.compose() - m.surrogate()) <= 4 * U * size).all()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_weight_stays_float(share):
    m = Layer("int3", 5, 70)
    expected = (1 - share) * m.wide()[2] * m.x + share * m.surrogate()
    assert np.allclose(m.compose(share), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("name", SCALAR)
def test_gradients_are_central_differences_of_the_surrogate(name, share, clipped):
    m = Layer(name, 6, 70, 32)
    rng = np.random.default_rng(3)
    dweight = rng.standard_normal(m.shape, dtype=np.float32)
    how = {"share": share, "clipped": clipped}

    def slopes(parameter, value):
        found = np.zeros(value.shape)
        for at in np.ndindex(value.shape):
            step = np.zeros(value.shape)
            step[at] = 1e-5
            ends = [m.surrogate(**{parameter: value + sign * step}, **how) for sign in (1, -1)]
            found[at] = (dweight * (ends[0] - ends[1])).sum() / 2e-5
        return found

    dlatent, dscale, doffset, dlevels = m.gradient(dweight, **how)
    expected = {"scale": slopes("scale", m.scale.astype(float))}
    found = {"scale": dscale}
    if m.offset is not None:
        expected["offset"], found["offset"] = slopes("offset", m.offset.astype(float)), doffset
    if m.table is not None:
        expected["levels"], found["levels"] = slopes("levels", m.levels), dlevels
    wide = m.x.astype(float)
    ends = [m.surrogate(x=wide + step, **how) for step in (1e-5, -1e-5)]
    expected["x"], found["x"] = dweight * (ends[0] - ends[1]) / 2e-5, dlatent
    for key, slope in expected.items():
        assert np.allclose(found[key], slope, rtol=1e-4, atol=1e-4 * abs(slope).max()), key


def test_scales_learn_by_the_formula_of_lsq():
    """LSQ, equation 3: round(w / s) - w / s inside, the bounds outside."""
    m = Layer("int3", 4, 64, None, offsets=False)
    m.scale[:], m.unit[:] = 0.5, 1.0
    v = m.x / 0.5 + m.zero
    terms = np.where(v < -0.5, 0 - m.zero, np.where(v > 7.5, 7 - m.zero, np.rint(v) - v))
    dweight = np.random.default_rng(0).standard_normal(m.shape, dtype=np.float32)
    expected = (dweight * terms).sum(1, keepdims=True)
    assert np.allclose(m.gradient(dweight)[1], expected, rtol=1e-5, atol=1e-5)


def test_two_levels_learn_by_the_formula_of_ttq():
    """TTQ, equation 7: sums of the gradients over the positive and over the negative weights."""
    m = Layer("kmeans2", 8, 96, None)
    m.table[:] = -1.25, 0, 0, 0.75
    m.levels = m.table.astype(float)
    m.scale[:] = 1
    dweight = np.random.default_rng(0).standard_normal(m.shape, dtype=np.float32)
    weight = m.compose()
    assert set(np.unique(weight)) == {-1.25, 0, 0.75}
    dlevels = m.gradient(dweight)[3]
    assert dlevels[0] == pytest.approx(dweight[weight < 0].sum(dtype=float), rel=1e-6)
    assert dlevels[3] == pytest.approx(dweight[weight > 0].sum(dtype=float), rel=1e-6)


def test_gradients_are_added():
    m = Layer("int2")
    dweight = np.ones(m.shape, np.float32)
    dlatent = np.full(m.shape, 3, np.float32)
    given = (m.code, m.x, m.scale, m.offset, m.unit, dweight, dlatent, None, None, None)
    _core.latent_gradient(*given, group=m.group, share=1.0, clipped=True)
    assert np.allclose(dlatent, 3 + m.gradient(dweight)[0])


@pytest.mark.parametrize("name", SCALAR)
def test_training_starts_at_the_words_given(isa, name):
    m = Layer(name, 33, 129, 32)
    rng = np.random.default_rng(0)
    words = np.where(
        rng.random(m.shape) < 0.5, m.words(), rng.integers(0, m.count, m.shape)
    ).astype(np.uint8)
    weight = (m.wide()[2] * m.x).astype(np.float32)
    latent, back = np.full_like(m.x, np.nan), np.full_like(words, 255)
    grids = m.scale, m.offset, m.unit
    _core.latent_start(m.code, weight, words, *grids, latent, group=m.group)
    _core.latent_words(m.code, latent, *grids, back, group=m.group)
    assert (back == words).all()
    v = (weight - m.wide()[1]) / m.wide()[0]
    level = m.levels[words]
    least = np.diff(m.levels, append=2 * m.levels[-1] - m.levels[-2]).min()
    near = abs(v - level) < 0.39 * least
    moved = abs(m.wide()[2] * latent - weight) / m.wide()[0]
    assert near.any()
    assert (moved[near] <= 1e-4 * np.ptp(m.levels)).all()


def test_groups_of_zeros_stay_zero():
    m = Layer("int2", 4, 64, 32)
    m.scale[1], m.offset[1], m.unit[1] = 0, 0, 0
    assert not m.compose()[1].any()
    dlatent, dscale, *_ = m.gradient(np.ones(m.shape, np.float32))
    assert not dlatent[1].any()
    assert np.isfinite(dscale).all()


def test_one_thread_and_many_give_the_same_bits(threads):
    m = Layer("nf4", 1100, 257, 32)
    dweight = np.random.default_rng(7).standard_normal(m.shape, dtype=np.float32)
    found = []
    for count in (1, 2, 5):
        _core.set_num_threads(threads=count)
        found.append((m.compose(), *m.gradient(dweight)))
    for other in found[1:]:
        assert all((a == b).all() for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_words_that_are_no_levels_are_refused(name):
    about = CODES[name]
    code = _core.code(None, name=name, symmetric=True, scale_bits=16, unit=1.0, zero=about["zero"])
    x, grid = np.zeros((64, 64), np.float32), np.ones((64, 2), np.float32)
    with pytest.raises(ValueError, match=f"words of kind {about['kind']} are no levels"):
        _core.latent_compose(code, x, grid, None, grid, np.empty_like(x), group=32, share=1.0)


def test_what_does_not_fit_is_refused():
    m = Layer("int2")
    words, out = np.full(m.shape, 4, np.uint8), np.empty(m.shape, np.float32)
    with pytest.raises(ValueError, match=r"words\[0, 0\] is 4, expected at most 3"):
        _core.latent_start(m.code, m.x, words, m.scale, m.offset, m.unit, out, group=32)
    short, table = m.scale[:, :1].copy(), np.empty(4, np.float32)
    with pytest.raises(ValueError, match="scale"):
        _core.latent_compose(m.code, m.x, short, None, short, out, group=32, share=1.0)
    given = (m.code, m.x, m.scale, m.offset, m.unit, m.x, out, None, None)
    with pytest.raises(ValueError, match="dlevels is given, but kind int has no table of levels"):
        _core.latent_gradient(*given, table, group=32, share=1.0, clipped=True)
