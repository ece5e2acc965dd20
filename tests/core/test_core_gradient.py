"""csrc/codes/gradient.c and compose: scales, offsets and levels as parameters, for every code."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core

CODES = _core.codes()
SIZES = [(1, 1), (15, 33), (16, 64), (33, 576), (70, 100), (130, 257)]
GROUPS = [None, 16, 32, 64, 128]
UNIT = 2.0**-24
MOST_LEVELS = 16


class Matrix:
    """A random packed matrix of a code, and its words, levels and parameters."""

    def __init__(self, name, rows, cols, group, *, symmetric=True, scale_bits=16):
        about, rng = CODES[name], np.random.default_rng([rows, cols])
        self.shape, self.zero = (rows, cols), about["zero"] + 0.25
        self.group = group or 2**40
        groups = -(-cols // group) if group else 1
        table = None
        if about["table"] != "none":
            table = np.sort(rng.standard_normal(about["level_count"])).astype(np.float32)
        self.table = table
        stored = {"name": name, "symmetric": symmetric, "scale_bits": scale_bits, "unit": 0.5}
        self.code = _core.code(table, **stored, zero=self.zero)
        plain = _core.code(table, **stored, zero=0.0)
        whole = [-(-n // about[axis]) * about[axis] for n, axis in ((rows, "rows"), (cols, "cols"))]
        codes = rng.integers(0, about["level_count"], whole, dtype=np.uint8)
        if about["word_cols"] == 2:
            codes[:, 1::2] = 0
        self.words = codes[:rows, :cols]
        layout = {"rows": rows, "cols": cols, "group": self.group}
        size = {"code": name, "scale_bits": scale_bits, "symmetric": symmetric}
        self.panels = _core.aligned_empty(bytes=_core.packed_bytes(**size, **layout))
        ones = np.ones((rows, groups), np.float32) if scale_bits else None
        self.has_offset = not symmetric and scale_bits == 16
        offset = np.zeros((rows, groups), np.float32) if self.has_offset else None
        _core.pack(self.code, codes, ones, offset, self.panels, **layout)
        self.level = np.empty((rows, cols), np.float32)  # what stands there with scale 1, offset 0
        _core.packed_dequantize(plain, self.panels, self.level, group=self.group)
        self.level /= 1 if scale_bits else np.float32(0.5)
        self.scale = rng.uniform(0.01, 1, (rows, groups)).astype(np.float32)
        self.offset = rng.standard_normal((rows, groups), dtype=np.float32)

    def per_column(self, values):
        return oracle.per_column(
            values.astype(float), min(self.group, self.shape[1]), self.shape[1]
        )

    def by_group(self, values):
        """Sums of values (rows, cols) over the columns of each group."""
        edges = np.arange(0, self.shape[1], min(self.group, self.shape[1]))
        return np.add.reduceat(values, edges, axis=1)

    def compose(self, offset):
        rows, cols = self.shape
        weight = np.full((rows + 2, cols), np.nan, np.float32)
        _core.compose(self.code, self.panels, self.scale, offset, weight[1:-1], group=self.group)
        assert np.isnan(weight[[0, -1]]).all(), "wrote outside weight"
        return weight[1:-1]

    def gradient(self, dweight, *, levels=False):
        """dscale, doffset and dlevels between guard rows."""
        rows, groups = self.scale.shape
        found = np.full((2, rows + 2, groups), np.nan, np.float32)
        table = np.full(MOST_LEVELS + 2, np.nan, np.float32)
        dlevels = table[1 : 1 + len(self.table)] if levels else None
        _core.code_gradient(
            *(self.code, self.panels, dweight, self.scale),
            *(found[0, 1:-1], found[1, 1:-1], dlevels),
            group=self.group,
        )
        assert np.isnan(found[:, [0, -1]]).all(), "wrote outside dscale or doffset"
        assert np.isnan(table[[0, -1]]).all(), "wrote outside dlevels"
        return found[0, 1:-1], found[1, 1:-1], dlevels


def matrices(name):
    """One of each shape and group that the code can have, and each way of storing scales."""
    about = CODES[name]
    for rows, cols in SIZES:
        for group in GROUPS:
            if group and group % about["multiple"]:
                continue
            yield Matrix(name, rows, cols, group)
        yield Matrix(name, rows, cols, None, scale_bits=0)
        if about["offsets"]:
            yield Matrix(name, rows, cols, 32, symmetric=False)


@pytest.mark.parametrize("name", CODES)
def test_composed_values_are_scale_times_level_plus_offset(isa, name):
    for m in matrices(name):
        for offset in (None, m.offset):
            known = np.float32(-m.zero) * m.scale if offset is None else offset
            expected = m.per_column(m.scale) * m.level + m.per_column(known)
            assert (abs(m.compose(offset) - expected) <= UNIT * abs(expected)).all()


@pytest.mark.parametrize("name", CODES)
def test_values_as_stored_are_composed_of_what_is_stored(name):
    m = Matrix(name, 70, 100, None, symmetric=not CODES[name]["offsets"])
    stored = np.full((2, 70, 1), np.nan, np.float32)
    layout = {"rows": 70, "cols": 100, "group": m.group}
    _core.unpack(m.code, m.panels, None, *stored, **layout)
    weight = np.empty(m.shape, np.float32)
    _core.packed_dequantize(m.code, m.panels, weight, group=m.group)
    m.scale = stored[0]
    assert (m.compose(stored[1]) == weight).all()


@pytest.mark.parametrize("name", CODES)
def test_gradients_match_the_formula(isa, name):
    for m in matrices(name):
        dweight = np.random.default_rng(5).standard_normal(m.shape, dtype=np.float32)
        wide = dweight.astype(float)
        dscale, doffset, dlevels = m.gradient(dweight, levels=m.table is not None)
        level = m.level.astype(float) - (0 if m.has_offset else m.zero)
        count = min(m.group, m.shape[1])
        for found, terms in ((dscale, wide * level), (doffset, wide)):
            size = m.by_group(abs(terms) + abs(wide) * m.zero + abs(wide * m.level))
            bound = UNIT * abs(m.by_group(terms)) + 4 * count * 2.0**-52 * size
            assert (abs(found - m.by_group(terms)) <= bound).all()
        if m.table is not None:
            terms = wide * m.per_column(m.scale)
            for word, found in enumerate(dlevels):
                expected = terms[m.words == word].sum()
                bound = UNIT * abs(expected) + terms.size * 2.0**-52 * abs(terms).sum()
                assert abs(found - expected) <= bound


@pytest.mark.parametrize("name", ["int2", "ternary", "kmeans3", "trellis1.5", "lattice2"])
@pytest.mark.parametrize("group", [None, 64])
def test_gradients_are_those_of_what_is_composed(name, group):
    """The values are linear in the parameters: differences are exact up to rounding."""
    m = Matrix(name, 33, 128, group)
    rng = np.random.default_rng(6)
    dweight = rng.standard_normal(m.shape, dtype=np.float32)
    dscale, _, _ = m.gradient(dweight)
    step = rng.standard_normal(m.scale.shape, dtype=np.float32)
    before = m.compose(None).astype(float)
    m.scale = m.scale + step
    moved = (dweight * (m.compose(None) - before)).sum()
    size = (abs(dweight) * (abs(m.compose(None)) + abs(before))).sum()
    assert abs((dscale * step).sum() - moved) <= 8 * UNIT * size


def test_outputs_may_be_none():
    m = Matrix("kmeans2", 17, 64, 32)
    dweight = np.ones(m.shape, np.float32)
    both = m.gradient(dweight, levels=True)
    for kept in range(3):
        outputs = [np.empty_like(one) if i == kept else None for i, one in enumerate(both)]
        _core.code_gradient(m.code, m.panels, dweight, m.scale, *outputs, group=32)
        assert (outputs[kept] == both[kept]).all()
    _core.code_gradient(m.code, m.panels, dweight, m.scale, None, None, None, group=32)


def test_one_thread_and_many_give_the_same_bits(threads):
    m = Matrix("nf4", 500, 257, 32)
    dweight = np.random.default_rng(7).standard_normal(m.shape, dtype=np.float32)
    found = []
    for count in (1, 2, 5):
        _core.set_num_threads(threads=count)
        found.append((m.compose(m.offset), *m.gradient(dweight, levels=True)))
    for other in found[1:]:
        assert all((a == b).all() for a, b in zip(found[0], other, strict=True))


def test_what_does_not_fit_is_refused():
    m = Matrix("int4", 20, 64, 32)
    dweight, levels = np.zeros(m.shape, np.float32), np.empty(16, np.float32)
    with pytest.raises(ValueError, match="dlevels is given, but kind int has no table of levels"):
        _core.code_gradient(m.code, m.panels, dweight, m.scale, None, None, levels, group=32)
    for bad, name in ((m.scale[:, :1].copy(), "scale"), (m.scale[:19].copy(), "scale|weight")):
        with pytest.raises(ValueError, match=name):
            _core.code_gradient(m.code, m.panels, dweight, bad, None, None, None, group=32)
        with pytest.raises(ValueError, match=name):
            _core.compose(m.code, m.panels, bad, None, dweight, group=32)
    m = Matrix("kmeans2", 20, 64, 32)
    with pytest.raises(ValueError, match="dlevels"):
        _core.code_gradient(m.code, m.panels, dweight, m.scale, None, None, levels, group=32)
