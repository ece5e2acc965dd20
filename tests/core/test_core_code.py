"""csrc/codes: encoding, ranges, and the search for the smallest error."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from rounding import NAMES, NF4, code_of, normal, quantize

from lowbitq import _core


def distortion(weight, **options):
    return ((quantize(weight, **options)[3] - weight) ** 2).mean()


@pytest.mark.parametrize("count", [2, 3, 4, 16, 256])
@pytest.mark.parametrize(
    ("rows", "cols", "group"), [(1, 1, 1), (3, 65, 64), (5, 96, 32), (2, 300, 300)]
)
def test_codes_are_the_nearest_ties_to_even(rows, cols, group, count):
    rng = np.random.default_rng([rows, cols, count])
    groups = -(-cols // group)
    # Multiples of a quarter step: exact quotients, so that half of them are ties.
    scale = np.exp2(rng.integers(-3, 3, (rows, groups))).astype(np.float32)
    offset = (rng.integers(-8, 8, (rows, groups)) * scale).astype(np.float32)
    steps = rng.integers(-8, 4 * count + 8, (rows, cols)) / 4
    wide = [np.repeat(a, group, 1)[:, :cols] for a in (scale, offset)]
    weight = (steps * wide[0] + wide[1]).astype(np.float32)
    codes = quantize(weight, count=count, group=group, scale=scale, offset=offset)[0]
    assert (codes == np.clip(np.rint(steps), 0, count - 1)).all()


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_a_table_of_equal_steps_is_the_uniform_code(count):
    weight = normal(64, 256)
    levels = np.arange(count, dtype=np.float32)
    for zero in (0.0, 1.0, (count - 1) / 2):
        a = quantize(weight, count=count, zero=zero, group=64)
        b = quantize(weight, levels=levels, zero=zero, group=64)
        assert all((x == y).all() for x, y in zip(a, b, strict=True))


def test_table_codes_are_the_nearest_level():
    weight = normal(20, 64)
    codes, scale, _, _ = quantize(weight, levels=NF4, group=32)
    distance = abs(weight[..., None] - np.repeat(scale, 32, 1)[..., None] * NF4.astype(float))
    assert (np.take_along_axis(distance, codes[..., None], 2)[..., 0] == distance.min(2)).all()


def test_decoded_values_are_fixed_points():
    weight = normal(16, 128)
    for options in ({"count": 8}, {"count": 8, "symmetric": False}, {"levels": NF4}):
        codes, scale, offset, values = quantize(weight, group=64, **options)
        again = quantize(
            values.astype(np.float32), group=64, scale=scale, offset=offset, **options
        )[0]
        assert (again == codes).all()


@pytest.mark.parametrize("scale_bits", [16, 0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [2, 4, 16, 256])
def test_minmax_errs_by_half_a_step_at_most(count, symmetric, scale_bits):
    rng = np.random.default_rng(count)
    weight = (rng.standard_t(3, (200, 60)) + 5 * rng.standard_normal((200, 1))).astype(np.float32)
    _, scale, _, values = quantize(
        weight, count=count, symmetric=symmetric, method="minmax", scale_bits=scale_bits
    )
    assert (abs(values - weight) <= scale * 0.5 * (1 + 1e-6)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_scales_are_float16(symmetric):
    for method in ("minmax", "mse"):
        _, scale, offset, _ = quantize(
            normal(40, 64) + 1, count=8, group=32, symmetric=symmetric, method=method
        )
        assert (scale == scale.astype(np.float16)).all()
        if symmetric:
            assert (offset == -3.5 * scale).all()
        else:
            assert (offset == offset.astype(np.float16)).all()


def test_integer_scales_are_multiples_of_unit():
    weight = normal(8, 64) * np.linspace(0.1, 2, 8, dtype=np.float32)[:, None]
    for scale_bits in (4, 8):
        _, scale, _, _ = quantize(weight, count=16, group=16, scale_bits=scale_bits, unit=0.03)
        whole = scale / np.float32(0.03)
        assert abs(whole - np.rint(whole)).max() <= 1e-5
        assert whole.min() >= 1 - 1e-6
        assert whole.max() <= 2**scale_bits - 1 + 1e-4


def test_a_lone_offset_is_minus_zero_times_scale():
    weight = normal(1, 500) + 3
    _, scale, offset, _ = quantize(weight, count=16, symmetric=False, scale_bits=0)
    zero = np.float32(-offset[0, 0] / scale[0, 0])
    candidates = [np.nextafter(zero, np.float32(to)) for to in (-np.inf, zero, np.inf)]
    assert offset[0, 0] in [-z * scale[0, 0] for z in candidates]


# Best distortion of a uniform grid on a normal variable (J. Max, 1960), of the grids that hold an
# exact zero (quality.md section 15, recomputed by integration in appendix C), and of ternary.
@pytest.mark.parametrize(
    ("count", "zero", "expected"),
    [
        (2, 0.5, 0.3634),
        (3, 1, 0.1902),
        (4, 1.5, 0.1189),
        (8, 3.5, 0.0374),
        (16, 7.5, 0.0115),
        (4, 2, 0.1494),
        (8, 4, 0.0406),
        (16, 8, 0.0119),
    ],
)
def test_best_symmetric_grid_of_a_normal_variable(count, zero, expected):
    weight = oracle.normal_quantiles(1 << 15)[None].astype(np.float32)
    # The tail beyond the last quantile, and four printed digits.
    assert abs(distortion(weight, count=count, zero=zero) - expected) <= 2e-4


def test_least_error_by_group_beats_the_best_clip_ratio():
    """2 bits, groups of 128: the best common clip ratio gives 0.139, fitted grids 0.11."""
    weight = normal(4096, 128)
    assert distortion(weight, count=4, symmetric=False) <= 0.111
    assert distortion(weight, count=4) <= 0.118


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_search_comes_close_to_the_best_grid_there_is(count, symmetric):
    """Against all grids of a fine mesh, for skewed groups with outliers."""
    if count == 3 and not symmetric:
        pytest.skip("ternary stores no offsets")
    rng = np.random.default_rng(count)
    weight = rng.standard_t(3, (30, 32)) + 0.3 * rng.exponential(size=(30, 32))
    weight = weight.astype(np.float32)
    values = quantize(weight, count=count, symmetric=symmetric, scale_bits=0)[3]
    found = ((values - weight) ** 2).sum(1)
    best = oracle.best_grid_error(weight, count, symmetric)
    assert (found <= 1.3 * best).all()
    assert found.sum() <= 1.01 * best.sum()


def candidates_error(w, count, symmetric, h, steps=10, shrink=0.9):
    """Smallest squared error of the candidate ranges, each grid refitted to its codes."""
    best = np.inf
    for factor in 1 - shrink * np.arange(steps) / steps:
        low, high = factor * min(w.min(), 0), factor * max(w.max(), 0)
        zero = (count - 1) / 2
        scale = max(abs(low), abs(high)) / zero if symmetric else (high - low) / (count - 1)
        offset = -zero * scale if symmetric else low
        codes = np.clip(np.rint((w - offset) / scale), 0, count - 1)
        basis = np.stack([codes - zero] if symmetric else [codes, np.ones(w.size)], 1)
        root = np.sqrt(h)
        grid = np.linalg.lstsq(basis * root[:, None], w * root, rcond=None)[0]
        if grid[0] > 0:
            best = min(best, (h * (basis @ grid - w) ** 2).sum())
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4, 16, 256])
@pytest.mark.parametrize(
    "shape", [(1, 15), (1, 16), (1, 1000), (1, 32783), (1, 32784), (19, 33), (3, 600)]
)
def test_the_search_in_float32_misses_no_candidate(isa, shape, count, symmetric):
    """Against the candidates in float64: float32 sums are off by some 1e-6 of the error."""
    if count == 3 and not symmetric:
        pytest.skip("ternary stores no offsets")
    weight = normal(*shape, seed=count)
    rng = np.random.default_rng([count, *shape])
    for importance in (None, np.exp(2 * rng.standard_normal(shape[1])).astype(np.float32)):
        values = quantize(
            weight, count=count, symmetric=symmetric, scale_bits=0, importance=importance
        )[3]
        h = np.ones(shape[1]) if importance is None else importance.astype(float)
        found = (h * (values - weight) ** 2).sum(1)
        best = [candidates_error(w, count, symmetric, h) for w in weight.astype(float)]
        # A grid that fits all weights is exact up to the rounding of its scale to float32.
        exact = count * 2.0**-23 * abs(weight).max()
        assert (found <= np.array(best) * (1 + 1e-5) + h.sum() * exact**2).all()


@pytest.mark.parametrize("levels", [None, NF4])
def test_every_instruction_set_finds_the_same(isa, levels):
    weight, importance = normal(21, 300), abs(normal(1, 300, seed=2)[0])
    for given in (None, importance):
        _core.use_isa(isa=isa)
        found = quantize(weight, levels=levels, count=8, importance=given, group=64)
        _core.use_isa(isa="portable")  # the fixture restores the previous one
        expected = quantize(weight, levels=levels, count=8, importance=given, group=64)
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", [{"count": 4}, {"count": 16, "symmetric": False}])
def test_least_error_is_never_worse_than_minmax(options):
    rng = np.random.default_rng(1)
    for weight in (rng.standard_t(2, (300, 64)), rng.integers(-3, 4, (300, 64)) * 0.25):
        weight = weight.astype(np.float32)
        for norm in (2.0, 2.4):
            error = [
                (abs(quantize(weight, method=m, norm=norm, **options)[3] - weight) ** norm).sum(1)
                for m in ("mse", "minmax")
            ]
            assert (error[0] <= error[1] * (1 + 1e-9) + 1e-12).all()


def quantize_packed(weight, levels=None, importance=None, count=None, group=None, **options):
    """Panels by _core.quantize_packed, between guards; and the result of quantize and pack."""
    search = {"method": "mse", "clip": 1.0, "percentile": 99.0}
    search |= {name: options.pop(name) for name in search if name in options}
    search |= {"candidates": 10, "shrink": 0.9, "norm": 2.0}
    stored = {"scale_bits": 16, "symmetric": True, "unit": 1.0, "zero": 0.0} | options
    fixed, code = stored["scale_bits"] == 0, code_of(count, levels, **stored)
    rows, cols = weight.shape
    size = {"rows": rows, "cols": cols, "group": group}
    bytes = _core.packed_bytes(
        code=NAMES[count], scale_bits=stored["scale_bits"], symmetric=stored["symmetric"], **size
    )
    panels = np.full(bytes + 128, 0xA5, np.uint8)
    _core.quantize_packed(code, weight, importance, panels[64:-64], group=group, **search)
    assert (panels[:64] == 0xA5).all(), "wrote before panels"
    assert (panels[-64:] == 0xA5).all(), "wrote behind panels"

    codes = np.empty((rows, cols), np.uint8)
    scale = np.full((rows, -(-cols // group)), stored["unit"], np.float32)
    offset = -np.float32(stored["zero"]) * scale
    _core.quantize(
        code, weight, importance, codes, scale, offset, group=group, fixed=fixed, **search
    )
    expected = np.empty(bytes, np.uint8)
    offset = None if stored["symmetric"] else offset
    _core.pack(code, codes, None if fixed else scale, offset, expected, **size)
    return panels[64:-64], expected


def spread(rows, cols):
    """Rows of many sizes: halves that are normal, subnormal and saturate, zeros of both signs."""
    weight = normal(rows, cols) * 10.0 ** np.linspace(-12, 4, rows)[:, None]
    weight[rows // 2] = -2.5
    weight[rows // 3, ::2] = 0
    weight[rows // 4] = np.where(np.arange(cols) % 2, 0.0, -0.0)
    return np.clip(weight, -32752, 32752).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (15, 33), (16, 64), (17, 130), (33, 576), (48, 100)])
def test_packed_codes_are_those_of_rounding_first(isa, shape, bits):
    weight = spread(*shape)
    for group in (shape[1], 32, 64, 128):
        for has_offset in (False, True):
            for method in ("minmax", "percentile", "mse"):
                for clip in (1.0, 0.7):
                    found, expected = quantize_packed(
                        weight,
                        count=1 << bits,
                        group=group,
                        symmetric=not has_offset,
                        zero=0.0 if has_offset else (2**bits - 1) / 2,
                        method=method,
                        clip=clip,
                    )
                    assert (found == expected).all(), (group, has_offset, method, clip)


@pytest.mark.parametrize("scale_bits", [16, 8, 4, 0])
def test_packed_codes_of_every_kind(isa, scale_bits):
    weight = normal(21, 100)
    importance = abs(normal(1, 100, seed=2)[0])
    for levels, count in ((None, 3), (None, 16), (NF4, 16)):
        group = 100 if scale_bits == 0 else 16
        found, expected = quantize_packed(
            weight,
            levels,
            importance,
            count=count,
            group=group,
            scale_bits=scale_bits,
            unit=0.05,
            zero=0.0 if levels is not None else (count - 1) / 2,
        )
        assert (found == expected).all()


def test_ranges_and_scales_are_the_same_everywhere(isa):
    """The whole range of float32, subnormal halves, and the last ones before 65504."""
    rng = np.random.default_rng(3)
    size = np.exp2(rng.uniform(-149, 14.9, (320, 1)))
    weight = (rng.uniform(-1, 1, (320, 37)) * size).astype(np.float32)
    weight[::7] += np.float32(0.1)
    for symmetric in (False, True):
        for clip in (1.0, 0.3):
            options = {"count": 4, "symmetric": symmetric, "method": "minmax", "clip": clip}
            _core.use_isa(isa=isa)
            found = quantize(weight, group=16, **options)
            _core.use_isa(isa="portable")  # the fixture restores the previous one
            expected = quantize(weight, group=16, **options)
            for a, b in zip(found, expected, strict=True):
                assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5, -1e5])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_unfit_weights_are_named_on_the_way(isa, bad, method):
    options = {"count": 4, "group": 32, "symmetric": False, "method": method}
    for row, column in ((0, 0), (3, 17), (20, 63), (16, 70)):
        weight = normal(21, 71)
        weight[row, column] = bad
        with pytest.raises(ValueError, match=rf"weight\[{row}, {column}\]"):
            quantize_packed(weight, **options)


def test_importance_weighs_the_errors():
    weight = normal(200, 64)
    importance = np.exp(2 * normal(1, 64, seed=5)[0])
    plain = quantize(weight, count=4)[3]
    fitted = quantize(weight, count=4, importance=importance)[3]
    loss = [((v - weight) ** 2 @ importance).sum() for v in (plain, fitted)]
    assert loss[1] < 0.9 * loss[0]
    ones = quantize(weight, count=4, importance=np.full(64, 3, np.float32))[3]
    assert (ones == plain).all()
    nothing = quantize(weight, count=4, importance=np.zeros(64, np.float32))[3]
    assert (nothing == plain).all(), "a group without importance is fitted as if it had some"


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("cols", [1, 2, 33, 1000])
def test_percentile_is_numpys(cols, percent):
    for weight in (normal(20, cols), np.round(normal(20, cols), 1)):
        _, scale, offset, _ = quantize(
            weight,
            count=256,
            symmetric=False,
            method="percentile",
            percentile=percent,
            scale_bits=0,
        )
        low, high = np.percentile(weight.astype(float), [100 - percent, percent], axis=1)
        lone = low == high  # a float32 offset is a multiple of the scale: the grid starts from 0
        low, high = np.where(lone & (low > 0), 0, low), np.where(lone & (high < 0), 0, high)
        assert np.allclose(offset[:, 0], low, rtol=1e-6, atol=1e-6)
        assert np.allclose(offset[:, 0] + 255 * scale[:, 0], high, rtol=1e-6, atol=1e-6)


def test_clip_ratio_scales_the_range():
    weight = normal(10, 64)
    full, half = (
        quantize(weight, count=16, method="minmax", clip=c, scale_bits=0)[1] for c in (1.0, 0.5)
    )
    assert np.allclose(half, full / 2, rtol=1e-6)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-9, 3e4])
def test_constant_groups(value, method):
    weight = np.full((2, 40), value, np.float32)
    for options in ({"count": 4, "symmetric": False}, {"count": 4}, {"count": 3}, {"levels": NF4}):
        codes, scale, offset, values = quantize(weight, group=32, method=method, **options)
        if value == 0 and options == {"count": 4}:  # which has no level of 0
            assert (scale == 0).all()
            assert (codes == 0).all()
        elif value == 0:
            assert (scale == 2.0**-24).all()
        else:
            assert ((scale > 0) | (value == 1e-9)).all()
        assert np.isfinite(offset).all()
        # float16 scale and offset are each off by 2^-11, and nothing is below 2^-24.
        assert abs(values - weight).max() <= 2**-9 * abs(value) + 2**-24 * 1.5


def test_far_offsets_lose_no_digits():
    weight = (1000 + normal(5, 64) * 1e-2).astype(np.float32)
    values = quantize(weight, count=256, symmetric=False, scale_bits=0)[3]
    assert abs(values - weight).max() <= np.ptp(weight, 1).max() / 255


def test_one_thread_and_many_agree():
    weight = normal(50, 320)
    before = _core.config()["threads"]
    results = []
    for threads in (1, 3):
        _core.set_num_threads(threads=threads)
        results.append(quantize(weight, count=4, symmetric=False, group=64))
    _core.set_num_threads(threads=before)
    assert all((a == b).all() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("count", [2, 3, 16, 256])
def test_grids_of_halves_are_the_finest_that_cover(isa, count, clip):
    """Up to two float32 roundings each, of a difference and a quotient."""
    weight, top, slack = spread(320, 24), count - 1, 2.0**-22
    low = np.float32(clip) * weight.reshape(960, 8).min(1)
    high = np.float32(clip) * weight.reshape(960, 8).max(1)
    for symmetric in [True] if count == 3 else [False, True]:
        options = {"count": count, "symmetric": symmetric, "method": "minmax", "clip": clip}
        found = quantize(weight, group=8, **options)[1:3]
        scale, offset = (a.reshape(-1).astype(np.float16) for a in found)
        finer = np.nextafter(scale, np.float16(0))
        reach = 2 * np.maximum(high, -low) if symmetric else high - offset.astype(float)
        zeros = scale == 0
        if symmetric:  # the smallest scale would have covered them, but zeros are closer
            groups = weight.reshape(960, 8).astype(float)[zeros]
            nearest = (np.clip(np.rint(groups * 2**24 + top / 2), 0, top) - top / 2) * 2.0**-24
            assert (reach[zeros] <= top * 2.0**-24).all()
            errors = ((nearest - groups) ** 2).sum(1), (groups**2).sum(1)
            assert (errors[0] >= 0.9 * errors[1]).all()
        assert (zeros | (scale.astype(float) * top >= reach * (1 - slack))).all()
        assert ((finer.astype(float) * top < reach * (1 + slack)) | (scale <= 2.0**-24)).all()
        if not symmetric:
            assert (offset <= low).all()
            assert (np.nextafter(offset, np.float16(np.inf)) > low).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5])
def test_unfit_weights_are_named(bad):
    weight = normal(5, 40)
    weight[3, 17] = bad
    with pytest.raises(ValueError, match=r"weight\[3, 17\]"):
        quantize(weight, count=4)


def test_unfit_arguments_are_named():
    weight = normal(2, 8)
    with pytest.raises(ValueError, match=r"importance\[2\] is -1"):
        quantize(weight, count=4, importance=np.array([1, 1, -1, 1, 1, 1, 1, 1], np.float32))
    with pytest.raises(ValueError, match="ascending"):
        quantize(weight, levels=np.array([0, 2, 1, 3], np.float32))
    with pytest.raises(ValueError, match="method is 'best'"):
        quantize(weight, count=4, method="best")
    with pytest.raises(ValueError, match="scale_bits is 5"):
        quantize(weight, count=4, scale_bits=5)
