"""Uniform grids on arrays: conventions, ranges, granularity."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbitq.grids import MovingRange, UniformGrid, entropy_clip, fit_grid

SEED = st.integers(0, 2**32)
EXAMPLE = np.array([[1.2, 2.4, 3.6], [11.2, 12.4, 13.6]])


def slide(zero_mode):
    """The worked example of the third seed: range 1.2 to 13.6 on the codes -128 to 127."""
    options = {"signed": True, "include_zero": False, "convention": "add"}
    return UniformGrid.of_range(1.2, 13.6, 8, zero_mode=zero_mode, **options)


def test_worked_example():
    grid = slide("floor")
    assert abs(grid.scale - 0.048627) <= 5e-7
    assert grid.zero == 152, "the printed -152 has the wrong sign"
    assert grid.encode(EXAMPLE).tolist() == [[-127, -103, -78], [78, 103, 127]]
    printed = [[1.22, 2.38, 3.60], [11.18, 12.40, 13.58]]
    assert abs(grid(EXAMPLE) - printed).max() <= 0.015
    assert abs(((grid(EXAMPLE) - EXAMPLE) ** 2).sum() - 0.00188) <= 5e-6
    assert abs(grid(EXAMPLE) - EXAMPLE).max() > grid.scale / 2, "13.6 lies outside"


def test_rounded_zero_keeps_both_ends_within_half_a_step():
    grid = slide("round")
    assert grid.zero == 153
    assert grid.encode(EXAMPLE).tolist()[0] == [-128, -104, -79], "not what the slide shows"
    assert abs(grid(EXAMPLE) - EXAMPLE).max() <= grid.scale / 2
    assert abs(slide("float").zero - 152.68) <= 0.005


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("restricted", [False, True])
def test_symmetric_range_is_the_formula(bits, restricted):
    """Q(x) = s clamp(round(x / s), qmin, qmax), ties to even, extremes and denormals."""
    if bits == 1 and restricted:
        with pytest.raises(ValueError, match="bits is 1"):
            UniformGrid.of_range(-1, 1, bits, symmetric=True, restricted=True)
        return
    rng = np.random.default_rng(bits)
    x = rng.standard_normal(100_000) * np.exp(rng.uniform(-3, 3, 100_000))
    x[:8] = [0, -0.0, 1e300, -1e300, 5e-324, -5e-324, 0.5, 1.5]
    half = 2 ** (bits - 1)
    options = {"symmetric": True, "restricted": restricted}
    grid = UniformGrid.of_range(-1, max(half - 1, 1), bits, **options)
    assert (grid.scale, grid.zero, grid.low) == (1, 0, -half + restricted)
    expected = np.clip(np.rint(x), -half + restricted, half - 1)
    assert (grid.encode(x) == expected).all()
    assert (grid(x) == expected).all()
    assert grid(0.0) == 0


@given(
    st.floats(-50, 50), st.floats(0, 50), st.integers(1, 8), st.booleans(), st.integers(0, 2**32)
)
@settings(max_examples=200, deadline=None)
def test_both_conventions_give_the_same_values(low, width, bits, signed, seed):
    grid = UniformGrid.of_range(low, low + width, bits, signed=signed)
    other = grid.to_convention("add")
    assert other.zero == -grid.zero
    x = np.random.default_rng(seed).uniform(low - 1, low + width + 1, 50)
    x[:2] = grid.scale * np.array([0.5, 1.5])
    assert (grid.encode(x) == other.encode(x)).all()
    assert (grid(x) == other(x)).all()
    assert grid.value_of(0) == -grid.scale * grid.zero
    assert other.value_of(0) == other.scale * other.zero
    assert (other.to_convention("subtract").zero == grid.zero).all()
    assert grid(0.0) == 0, "a whole zero represents zero exactly"


@given(SEED, st.integers(1, 8), st.sampled_from(["float", "round"]))
@settings(max_examples=100, deadline=None)
def test_errors_inside_the_range_are_half_a_step_at_most(seed, bits, zero_mode):
    x = np.random.default_rng(seed).standard_normal(64)
    grid = fit_grid(x, bits, zero_mode=zero_mode)
    # Rounding the zero point moves the range by up to half a step, which adds to the error there.
    inside = (x >= grid.value_of(grid.low)) & (x <= grid.value_of(grid.high))
    assert abs(grid(x) - x)[inside].max(initial=0) <= grid.scale / 2 * (1 + 1e-6)
    assert abs(grid(x) - x).max() <= grid.scale * (1 if zero_mode == "round" else 0.5) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("search", [False, True])
def test_grid_of_gptqs_code_bit_for_bit(bits, group, search):
    for seed in range(4 if search else 20):
        x = np.random.default_rng([seed, bits]).standard_normal((16, 256)).astype(np.float32)
        x[3] = 0
        x[4] = abs(x[4])
        rows = x.reshape(-1, group or 256)
        scale, zero = oracle.gptq_grid(rows, bits, search)
        options = {"granularity": "group" if group else "channel", "group": group}
        grid = fit_grid(x, bits, range="mse" if search else "minmax", **options)
        assert grid.scale.dtype == np.float32
        assert (grid.scale.reshape(len(rows), -1) == scale[:, None]).all()
        assert (grid.zero.reshape(len(rows), -1) == zero[:, None]).all()
        expected = oracle.gptq_values(rows, scale, zero, 2**bits - 1)
        assert (grid(x).reshape(rows.shape) == expected).all()


def test_two_bit_normal_weights_by_group():
    """Distortions of quality.md section 15: min-max, and the best range per group."""
    rng = np.random.default_rng(0)
    for group, minmax in [(32, 0.165), (64, 0.209), (128, 0.252), (1024, 0.386)]:
        x = rng.standard_normal((2**19 // group, group))
        error = ((fit_grid(x, 2, granularity="channel")(x) - x) ** 2).mean()
        assert abs(error / minmax - 1) <= 0.02
    x = x.reshape(-1, 128)
    error = ((fit_grid(x, 2, granularity="channel", range="mse")(x) - x) ** 2).mean()
    assert error <= 0.14


@pytest.mark.parametrize("percentile", [50, 90, 99.5, 100])
def test_percentile_is_numpys(percentile):
    x = np.random.default_rng(0).standard_normal(1000) + 0.5
    grid = fit_grid(x, 4, range="percentile", percentile=percentile, zero_mode="float")
    low, high = np.percentile(x, [100 - percentile, percentile])
    low, high = min(low, 0), max(high, 0)
    assert abs(grid.value_of(0) - low) <= 1e-12
    assert abs(grid.value_of(15) - high) <= 1e-12


def test_clip_ratio_is_a_part_of_the_range():
    x = np.random.default_rng(0).standard_normal(1000)
    assert fit_grid(x, 4, clip_ratio=1.0).scale == fit_grid(x, 4).scale
    assert abs(fit_grid(x, 4, clip_ratio=0.9).scale / fit_grid(x, 4).scale - 0.9) <= 1e-12


def test_divergence_clips_tails_only():
    rng = np.random.default_rng(0)
    assert entropy_clip(rng.uniform(-1, 1, 100_000), 128) >= 0.95
    heavy = rng.standard_t(2, 100_000)
    assert entropy_clip(heavy, 128) <= 0.2
    assert entropy_clip(np.zeros(5), 4) == 1
    grid, plain = (fit_grid(heavy, 8, symmetric=True, range=r) for r in ("kl", "minmax"))
    assert grid.scale <= 0.2 * plain.scale
    assert np.median(abs(grid(heavy) - heavy)) < np.median(abs(plain(heavy) - heavy))


def test_granularity():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 100)) * np.array([1, 100] * 4)[:, None]
    tensor, rows, cols = (
        fit_grid(x, 4, granularity=g, axis=a)
        for g, a in [("tensor", "out"), ("channel", "out"), ("channel", "in")]
    )
    assert [g.scale.shape for g in (tensor, rows, cols)] == [(), (8, 1), (1, 100)]
    assert tensor.scale == fit_grid(x.reshape(1, -1), 4, granularity="group", group=800).scale[0, 0]
    assert (fit_grid(x.T, 4, granularity="channel", axis="in").scale == rows.scale.T).all()
    power = (x**2).mean(1)
    gain = ((tensor(x) - x) ** 2).mean(1) / ((rows(x) - x) ** 2).mean(1)
    small = power < np.median(power)
    assert (10 * np.log10(gain[small]) >= 15).all(), "rows of small range gain 15 dB"
    assert len(np.unique(rows(x))) > len(np.unique(tensor(x)))


def test_last_group_may_be_short():
    x = np.random.default_rng(0).standard_normal((3, 100))
    grid = fit_grid(x, 3, granularity="group", group=64)
    for part in (x[:, :64], x[:, 64:]):
        alone = fit_grid(part, 3, granularity="channel")
        at = 0 if part.shape[1] == 64 else 64
        assert (grid.scale[:, at : at + 1] == alone.scale).all()
    for range in ("percentile", "mse", "kl"):
        scale = fit_grid(x, 3, granularity="group", group=64, range=range).scale
        assert scale.shape == x.shape
        assert np.isfinite(scale).all()


def test_skewed_data_needs_an_offset():
    """At 4 bits an asymmetric grid halves the error on exponential data and not on normal data."""
    rng = np.random.default_rng(0)
    for x, most in [(rng.exponential(size=50_000), 0.5), (rng.standard_normal(50_000), 1.05)]:
        error = [
            ((fit_grid(x, 4, symmetric=s, range="mse", norm=2.0)(x) - x) ** 2).mean()
            for s in (False, True)
        ]
        assert error[0] <= most * error[1]


def test_moving_range_is_the_closed_form():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((5, 7)) for _ in range(30)]
    moving = MovingRange(rate=0.1)
    for batch in batches:
        moving.update(batch)
    weights = 0.1 * 0.9 ** np.arange(30)[::-1]
    weights[0] = 0.9**29
    assert abs(moving.minimum - weights @ [b.min() for b in batches]) <= 1e-12
    assert abs(moving.maximum - weights @ [b.max() for b in batches]) <= 1e-12


def test_moving_range_follows_and_freezes():
    moving = MovingRange(rate=0.05)
    moving.update([-1.0, 1.0])
    for _ in range(60):
        moving.update([-10.0, 10.0])
    assert moving.maximum >= 9.5, "a tenfold range is reached within 3 / rate steps"
    moving.frozen = True
    moving.update([-1000.0, 1000.0])
    assert moving.maximum <= 10
    last = MovingRange(rate=1)
    last.update([0.0, 5.0])
    last.update([2.0, 3.0])
    assert (last.minimum, last.maximum) == (2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UniformGrid(0.0, 0, 0, 3), "scale has 0"),
        (lambda: UniformGrid(1.0, 0, 4, 3), "low is 4"),
        (lambda: UniformGrid(1.0, 0, 0, 3, "times"), "convention is 'times'"),
        (lambda: UniformGrid(1.0, 0, 0, 3).encode([1, np.nan]), "x has a NaN"),
        (lambda: UniformGrid.of_range(0, 1, 17), "bits is 17"),
        (lambda: UniformGrid.of_range(2, 1, 4), "minimum exceeds"),
        (lambda: UniformGrid.of_range(0, 1, 4, zero_mode="ceil"), "zero_mode is 'ceil'"),
        (lambda: fit_grid([], 4), "is empty"),
        (lambda: fit_grid([1, np.inf], 4), "NaN or an infinity"),
        (lambda: fit_grid([1, 2], 4, granularity="channel"), "x has 1 axes"),
        (lambda: fit_grid(EXAMPLE, 4, granularity="row"), "granularity is 'row'"),
        (lambda: fit_grid(EXAMPLE, 4, granularity="group"), "group is None"),
        (lambda: fit_grid(EXAMPLE, 4, axis="0", granularity="channel"), "axis is '0'"),
        (lambda: fit_grid(EXAMPLE, 4, range="best"), "range is 'best'"),
        (lambda: fit_grid(EXAMPLE, 4, range="percentile", percentile=9), "percentile is 9"),
        (lambda: MovingRange(0), "rate is 0"),
        (lambda: MovingRange(1).update([]), "x is empty"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
