"""Rounding a matrix to a format: quality, ranges, what groups share, error measures."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq.formats import Format
from lowbitq.quantizers import (
    adaround,
    dequantize,
    fit_shared,
    max_error,
    mse,
    quantize,
    relative_error,
    snr_db,
)

FORMATS = [
    *(f"int{bits}g64{sign}" for bits in range(1, 9) for sign in ("", "sym")),
    *("int4", "int2sym", "int3tensor", "int8tensorsym", "int4g16s4", "int2g32s8", "int4s8"),
    *("int4g64symz8", "int3g32symz4", "int4tensorsymz8", "int4g32s8z8", "int2symz2"),
    *("binaryg32", "binarytensor", "ternaryg128", "ternary", "ternaryg64s4"),
    *("nf4g64", "nf4g16s8", "nf4tensor", "log2g32", "log3g64", "log4"),
    *("kmeans1g32", "kmeans2g64", "kmeans3g128", "kmeans4", "kmeans2g16s4", "kmeans3tensor"),
]


def normal(rows, cols, seed=0):
    return np.random.default_rng([seed, rows, cols]).standard_normal((rows, cols), np.float32)


def distortion(weight, format, **options):
    return relative_error(weight, quantize(weight, format, **options).dequantize())


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 100), (48, 256)])
def test_every_format(text, shape):
    weight = normal(*shape)
    tensor = quantize(weight, text)
    assert tensor.shape == shape
    assert str(tensor.format) == text
    assert tensor.nbytes == Format.parse(text).stored_bytes(*shape)
    values = dequantize(tensor)
    group = tensor.format.group or shape[1]
    expected = oracle.decode(tensor.codes, tensor.scale, tensor.offset, group, tensor.levels)
    # One rounding of a product and a sum to float32.
    assert abs(values - expected).max() <= 2**-23 * (abs(expected).max() + abs(tensor.offset).max())
    assert tensor.codes.max() < tensor.format.level_count
    assert (tensor.scale > 0).all()
    zero_error = 1.0 + 1e-6
    assert relative_error(weight, values) <= zero_error, "worse than zeros"
    if shape == (48, 256) and "tensor" not in text:
        # Twice the distortion of the best uniform grid for a normal variable; log grids waste more.
        best = {1: 0.3634, 2: 0.1189, 3: 0.0374, 4: 0.0115, 8: 0.0115}[tensor.format.bits]
        assert relative_error(weight, values) <= best * (3 if "log" in text else 2)


@pytest.mark.parametrize("text", ["int4g64", "int2g32sym", "ternaryg64", "kmeans2g64", "nf4"])
def test_quantizing_twice_changes_little(text):
    """The values of a quantized matrix lie on a grid, most of which the search finds again."""
    weight = normal(64, 128)
    once = quantize(weight, text).dequantize()
    twice = quantize(once, text).dequantize()
    assert mse(once, twice) <= 0.05 * mse(weight, once)


@pytest.mark.parametrize("text", ["int3g64", "int4sym", "int8g128", "int2tensor", "int5g64sym"])
def test_minmax_errs_by_half_a_step_at_most(text):
    weight = normal(33, 200)
    tensor = quantize(weight, text, range="minmax")
    step = np.repeat(tensor.scale, tensor.format.group or 200, axis=1)[:, :200]
    bound = step / 2 * (1 + 1e-6) + 2**-23 * abs(weight).max()
    assert (abs(tensor.dequantize() - weight) <= bound).all()


def test_symmetric_ranges_may_hold_an_exact_zero():
    weight = normal(16, 64)
    weight[:, ::4] = 0
    tensor = quantize(weight, "int4g64sym", zero=8)
    assert (tensor.dequantize()[:, ::4] == 0).all()
    assert tensor.zero == 8
    assert str(tensor.format) == "int4g64symz8"
    same = quantize(weight, "int4g64symz8")
    assert np.array_equal(same.panels, tensor.panels)
    assert np.array_equal(quantize(weight, "int4g64symz8", zero=8).panels, tensor.panels)
    with pytest.raises(ValueError, match=r"zero is 7.5, but format int4g64symz8 has another"):
        quantize(weight, "int4g64symz8", zero=7.5)
    adapted = adaround(weight, np.eye(64), "int4g64sym", zero=8, steps=0)
    assert adapted.format == tensor.format


@pytest.mark.parametrize(
    ("text", "zero", "high"),
    [
        ("int4g32symz8", 8, 15),
        ("int3symz3", 3, 7),
        ("int8g64symz128", 128, 255),
        ("int4tensorsymz8", 8, 15),
        ("int4g32symz2.25", 2.25, 15),
    ],
)
def test_a_chosen_zero_matches_float64(text, zero, high):
    """Range "minmax": neither end is clipped, and codes are rounded to nearest."""
    weight = normal(17, 128)
    weight[:, ::8] = 0
    tensor = quantize(weight, text, range="minmax")
    group = tensor.format.group or 128
    blocks = weight.astype(np.float64).reshape(17, -1, group)
    reach = np.maximum(-blocks.min(2) / zero, blocks.max(2) / (high - zero))
    if tensor.format.per_tensor:
        reach[:] = reach.max()
    # A scale is rounded up to a float16, so that nothing is clipped, and to float32 a few times.
    excess = tensor.scale / reach - 1
    assert (excess >= -(2**-20)).all()
    assert (excess <= 2**-10 + 2**-20).all()
    scale = np.repeat(tensor.scale.astype(np.float64), group, axis=1)[:, :128]
    steps = weight / scale + zero
    expected = np.clip(np.rint(steps), 0, high)
    # Float32 places a weight within three roundings of numbers up to `high`.
    sure = abs(abs(steps - np.floor(steps)) - 0.5) > 3 * high * 2**-23
    assert sure.mean() > 0.99
    assert (tensor.codes == expected)[sure].all()
    assert (abs(tensor.codes - steps)[~sure] <= 0.5001).all()
    values = scale * (tensor.codes - float(zero))
    assert (abs(tensor.dequantize() - values) <= 2**-24 * 1.01 * abs(values)).all()
    if zero == int(zero):
        assert not tensor.dequantize()[:, ::8].any(), "zero is a level"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("binary", 0.3634),
        ("ternary", 0.1902),
        ("int2sym", 0.1189),
        ("int3sym", 0.0374),
        ("int4sym", 0.0115),
        ("kmeans1", 0.3634),
        ("kmeans2", 0.1175),
        ("kmeans3", 0.0345),
        ("kmeans4", 0.0095),
    ],
)
def test_normal_rows_reach_the_published_distortion(text, expected):
    """quality.md section 15; four printed digits, and rows of 8192 vary by about a percent."""
    found = distortion(normal(16, 8192), text)
    assert abs(found / expected - 1) <= 0.015


def test_decibels_of_lloyd_max():
    weight = oracle.normal_quantiles(1 << 14)[None].astype(np.float32)
    for text, expected in [("kmeans1", 4.40), ("ternary", 7.21), ("kmeans2", 9.30)]:
        assert abs(snr_db(weight, quantize(weight, text).dequantize()) - expected) <= 0.02
    for text, expected in [("kmeans3", 14.62), ("kmeans4", 20.22)]:
        assert abs(snr_db(weight, quantize(weight, text).dequantize()) - expected) <= 0.03


def test_six_decibels_per_bit_of_uniform_data():
    weight = np.random.default_rng(0).uniform(-1, 1, (16, 4096)).astype(np.float32)
    found = [snr_db(weight, quantize(weight, f"int{bits}sym").dequantize()) for bits in range(1, 8)]
    assert abs(np.diff(found) - 6.02).max() <= 0.05


def test_two_bit_groups_beat_a_common_clip_ratio():
    weight = normal(1024, 128)
    assert distortion(weight, "int2g128") <= 0.111
    assert distortion(weight, "int2g128sym") <= 0.118
    assert distortion(weight, "int2g128", range="minmax") >= 0.23


def test_ternary_weight_networks_threshold_is_close_to_the_best():
    """F. Li, B. Liu, 2016: threshold 0.7 E|w| gives 0.1916; the search finds the best, 0.1902."""
    weight = normal(1, 1 << 16).astype(float)
    beyond = abs(weight) > 0.7 * abs(weight).mean()
    scale = abs(weight[beyond]).mean()
    assert abs(mse(weight, np.sign(weight) * beyond * scale) - 0.1916) <= 0.002
    assert distortion(weight.astype(np.float32), "ternary") <= 0.1905 * mse(weight, 0 * weight)


def test_ternary_is_the_best_of_all_thresholds():
    weight = normal(200, 32)
    sizes = -np.sort(-abs(weight.astype(float)), axis=1)
    explained = (np.cumsum(sizes, axis=1) ** 2 / np.arange(1, 33)).max(1)
    best = (sizes**2).sum(1) - explained
    values = quantize(weight, "ternaryg32").dequantize()
    found = ((values - weight.astype(float)) ** 2).sum(1)
    assert (found >= best * (1 - 1e-6)).all()
    assert found.sum() <= 1.005 * best.sum()


def test_binary_scale_is_the_mean_magnitude():
    weight = normal(16, 64)
    tensor = quantize(weight, "binaryg64")
    mean = abs(weight.astype(float)).mean(1, keepdims=True)
    assert (np.sign(tensor.dequantize()) == np.sign(weight)).all()
    assert abs(abs(tensor.dequantize()) / mean - 1).max() <= 2**-11, "float16 scales"


def test_integer_scales_of_eight_bits_cost_two_percent_at_most():
    weight = normal(64, 1024) * np.exp(normal(64, 1, seed=1))
    for bits in (2, 4):
        errors = [distortion(weight, f"int{bits}g16{kind}") for kind in ("sym", "s8", "s4")]
        assert errors[1] <= 1.02 * errors[0]
        assert errors[2] <= 2 * errors[0]
    tensor = quantize(weight, "int4g16s4")
    whole = tensor.scale / np.float32(tensor.unit)
    assert abs(whole - np.rint(whole)).max() <= 1e-5
    assert tensor.bits_per_weight == 4.25 + 32 / weight.size


def test_learned_levels_beat_uniform_ones_on_heavy_tails():
    weight = np.random.default_rng(0).standard_t(3, (64, 1024)).astype(np.float32)
    assert distortion(weight, "kmeans3") <= 0.75 * distortion(weight, "int3sym")
    assert distortion(weight, "kmeans4g128") <= 0.9 * distortion(weight, "int4g128sym")


def test_tables_have_their_shapes():
    assert quantize(normal(4, 64), "kmeans3").levels.shape == (8,)
    assert quantize(normal(4, 64), "nf4").levels[7] == 0
    assert quantize(normal(4, 64), "int3").levels is None
    levels = quantize(np.zeros((4, 64), np.float32), "kmeans2").levels
    assert np.isfinite(levels).all()


def test_nf4_and_log_beside_uniform():
    """Log levels crowd around zero: worse on normal data; NF4 is made for it."""
    weight = normal(64, 512)
    uniform, nf4, log = (distortion(weight, f"{code}g64") for code in ("int4", "nf4", "log4"))
    assert nf4 <= 0.0115
    assert uniform < nf4 < log
    values = quantize(weight, "log4tensor")
    ratio = abs(values.dequantize()[values.dequantize() != 0]) / np.float32(values.unit)
    assert abs(np.log2(ratio) - np.rint(np.log2(ratio))).max() <= 1e-6


def test_importance_moves_the_error_to_where_it_matters_less():
    weight = normal(64, 256)
    importance = np.exp(2 * normal(1, 256, seed=3)[0])
    for text in ("int2g64", "int3g64sym", "kmeans2g64", "int4g16s4", "int3tensor", "nf4"):
        loss = [
            (
                mse(weight, quantize(weight, text, importance=i).dequantize(), axis=0) * importance
            ).sum()
            for i in (None, importance)
        ]
        assert loss[1] < loss[0], text


def test_ranges():
    weight = np.random.default_rng(0).standard_t(2, (16, 4096)).astype(np.float32)
    loss = {r: distortion(weight, "int4", range=r) for r in ("mse", "minmax", "percentile", "kl")}
    assert min(loss, key=loss.get) == "mse"
    tail = quantize(weight, "int4", range="percentile", percentile=99.0)
    low = np.percentile(weight, 1.0, axis=1)
    assert abs(tail.offset[:, 0] / low - 1).max() <= 2**-10
    full = quantize(weight, "int4sym", range="minmax")
    half = quantize(weight, "int4sym", range="minmax", clip_ratio=0.5)
    assert abs(half.scale / full.scale - 0.5).max() <= 2**-10
    kl = quantize(weight, "int8sym", range="kl")
    assert (kl.scale < 0.9 * quantize(weight, "int8sym", range="minmax").scale).all()
    with pytest.raises(ValueError, match="'kl', which needs two magnitudes, but format ternary"):
        quantize(weight, "ternary", range="kl")
    norm = quantize(weight, "int3", norm=3.0)
    power = [(abs(t.dequantize() - weight) ** 3).mean() for t in (norm, quantize(weight, "int3"))]
    assert power[0] < power[1]


def test_shared_parameters():
    weight = normal(32, 128)
    assert fit_shared(weight, "int4g64").levels is None
    assert fit_shared(weight, "int4g64").unit == 1
    assert quantize(weight, "int4g16s4").unit == fit_shared(weight, "int4g16s4").unit
    tensor = quantize(weight, "int4tensor")
    shared = fit_shared(weight, "int4tensor")
    assert (tensor.unit, tensor.zero) == (shared.unit, shared.zero)


def test_per_tensor_is_one_long_group():
    weight = normal(8, 64)
    whole = quantize(weight.reshape(1, 512), "int4")
    tensor = quantize(weight, "int4tensor")
    assert tensor.scale.shape == (8, 1)
    assert (tensor.scale == tensor.unit).all()
    # One is stored in float16, the other in float32.
    assert abs(tensor.unit / whole.scale[0, 0] - 1) <= 2**-10
    assert mse(weight, tensor.dequantize()) <= mse(weight, whole.dequantize().reshape(8, 64)) * 1.01


@pytest.mark.parametrize(
    "text",
    ["int1g64", "int2g64", "int2", "int2sym", "ternary", "int3g64", "int4g32sym", "int8", "nf4g64"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_is_rounded_alike_alone_and_among_others(text, weighted):
    """Sixteen rows are searched side by side, as many as there are."""
    rng = np.random.default_rng(5)
    weight = rng.standard_t(3, (333, 64)).astype(np.float32)
    weight[3] = 0
    weight[5] *= 1e-4
    importance = np.exp(2 * rng.standard_normal(64, np.float32)) if weighted else None
    for norm in (2.0, 2.4):
        options = {"importance": importance, "norm": norm}
        whole = quantize(weight, text, **options).dequantize()
        for rows in (1, 5):
            parts = [
                quantize(weight[r : r + rows], text, **options).dequantize()
                for r in range(0, len(weight), rows)
            ]
            assert (np.vstack(parts) == whole).all()


def test_error_measures():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 7))
    assert mse(x, y) == ((x - y) ** 2).mean()
    assert mse(x, y, axis=1).shape == (5,)
    assert max_error(x, y) == abs(x - y).max()
    assert abs(snr_db(x, y) + 10 * np.log10(relative_error(x, y))) <= 1e-12
    assert snr_db(x, x) == np.inf
    assert relative_error(x, x) == 0
    with pytest.raises(ValueError, match=r"approximation has shape \(5,\)"):
        mse(x, y[:, 0])


def test_wrong_types_are_named():
    weight = normal(4, 64)
    with pytest.raises(TypeError, match="weight has dtype complex64, expected real numbers"):
        quantize(weight.astype(np.complex64), "int4")
    with pytest.raises(TypeError, match="weight has dtype object"):
        quantize([[None]], "int4")
    with pytest.raises(TypeError, match="importance has dtype bool"):
        quantize(weight, "int4", importance=np.ones(64, bool))
    with pytest.raises(TypeError, match="tensor is a ndarray"):
        dequantize(weight)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", ["int4g64", "int4tensor", "kmeans2", "int4g16s4"])
def test_weights_that_are_not_finite_are_named(text, bad):
    weight = normal(4, 64)
    weight[2, 33] = bad
    with pytest.raises(ValueError, match=r"weight\[2, 33\]"):
        quantize(weight, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range": "best"}, "range is 'best', expected one of mse, minmax"),
        ({"importance": np.ones(3, np.float32)}, r"importance has shape \(3,\), expected \(64,\)"),
        ({"importance": -np.ones(64, np.float32)}, r"importance\[0\] is -1"),
        ({"range": "percentile", "percentile": 20.0}, "percentile is 20"),
        ({"clip_ratio": 2.0}, "clip is 2"),
        ({"norm": 0.0}, "norm is 0"),
        ({"zero": 3.0}, "zero is 3.0, but int4g64 does not let it be chosen"),
        ({"format": "int4g63"}, "unknown format 'int4g63'"),
        ({"weight": np.zeros((0, 4), np.float32)}, r"weight has shape \(0, 4\)"),
        ({"weight": np.zeros(4, np.float32)}, r"weight has shape \(4,\)"),
        ({"weight": np.full((1, 64), 1e6, np.float32)}, r"weight\[0, 0\] is 1e\+06"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        quantize(**({"weight": normal(4, 64), "format": "int4g64"} | options))


SMALL = ["int1g64", "int2g64", "int4g64sym", "int8", "binary", "ternary", "nf4", "log4g64"]
SMALL += ["kmeans2g64", "kmeans4", "int4g32s8", "ternaryg64s4", "kmeans2g16s4"]
SMALL += ["int3tensorsym", "int3tensor", "nf4tensor", "kmeans3tensor"]


@pytest.mark.parametrize("text", SMALL)
def test_zeros_stay_zeros_and_small_weights_do_not_grow(text):
    for range in ("mse", "minmax", "percentile"):
        tensor = quantize(np.zeros((17, 100), np.float32), text, range=range)
        assert not tensor.dequantize().any()
        assert np.isfinite(tensor.scale).all()
    weight = normal(20, 192).astype(np.float64)
    for exponent in (-3, -7, -8, -9, -12, -30, -38, -42, -45):
        small = (weight * 10.0**exponent).astype(np.float32)
        if small.any():
            assert distortion(small, text) <= 1 + 1e-6


@pytest.mark.parametrize("text", SMALL)
def test_a_group_of_zeros_among_others(text):
    weight = normal(5, 128)
    weight[:, 64:] = 0
    weight[3] = 0
    for tensor in (quantize(weight, text), adaround(weight, oracle.gram(128, 0), text, steps=0)):
        values = tensor.dequantize()
        if "tensor" not in text:
            assert not values[3].any()
        if tensor.format.group:
            assert not values[:, 64:].any()
        assert relative_error(weight, values) <= 1


def test_zero_groups_have_no_say_in_learned_levels():
    weight = normal(32, 256) * np.float32(1e-3)
    padded = np.hstack([weight, np.zeros_like(weight)])
    levels = [quantize(w, "kmeans2g64").levels for w in (weight, np.ascontiguousarray(padded))]
    assert np.array_equal(*levels)


def test_one_group_that_dominates_integer_scales():
    """The others are too small for the common unit: none of them is worse than zeros."""
    for text in ("int4g32s8", "int2g32s8", "ternaryg64s4", "kmeans2g16s4", "nf4g16s8"):
        for share in (30, 1e3, 1e5):
            weight = normal(16, 256)
            weight[2, :64] *= np.float32(share)
            values = quantize(weight, text).dequantize().astype(float)
            group = Format.parse(text).group
            errors = ((values - weight) ** 2).reshape(16, -1, group).sum(2)
            sizes = (weight.astype(float) ** 2).reshape(16, -1, group).sum(2)
            assert (errors <= sizes * (1 + 1e-6)).all()


@pytest.mark.parametrize("text", ["int3g64", "kmeans2g64", "int4g16s4", "int3tensor", "nf4"])
def test_importance_of_nothing_but_zeros_is_none(text):
    weight = normal(16, 128)
    tensors = [quantize(weight, text, importance=i) for i in (None, np.zeros(128, np.float32))]
    assert (tensors[0].panels == tensors[1].panels).all()


@pytest.mark.parametrize("text", ["int4g64", "int4tensor", "kmeans2", "int4g16s4"])
def test_unfit_numbers_are_named_in_their_places(text):
    weight, importance = normal(40, 64), np.ones(64, np.float32)
    for bad in (np.nan, np.inf, -1.0):
        importance[33] = bad
        with pytest.raises(ValueError, match=r"importance\[33\] is "):
            quantize(weight, text, importance=importance)
    weight[20, 33] = 1e32
    with pytest.raises(ValueError, match=r"weight\[20, 33\] is 1e\+32, expected at most"):
        quantize(weight, text)
