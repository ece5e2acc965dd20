"""AdamW against float64 and against torch; sums of squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lowbitq import _core

GOLDEN = Path(__file__).parents[1] / "golden" / "adamw.npz"
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "decay": 0.1}


def expected_step(param, gradient, first, second, *, lr, beta1, beta2, epsilon, decay, step):
    """The formula of adamw.h in float64, in place."""
    first[:] = beta1 * first + (1 - beta1) * gradient
    second[:] = beta2 * second + (1 - beta2) * gradient**2
    param *= 1 - lr * decay
    root = np.sqrt(second / (1 - beta2**step))
    param -= lr * first / (1 - beta1**step) / (root + epsilon)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, (1 << 14) + 1])
def test_a_hundred_steps_match_the_formula(count):
    rng = np.random.default_rng(count)
    memory = np.full((3, count + 2), np.nan, np.float32)
    arrays = memory[:, 1:-1].copy()
    arrays[0], arrays[1:] = rng.standard_normal(count), 0
    expected = arrays.astype(np.float64)
    size = 10.0 ** rng.uniform(-4, 2, count)
    for step in range(1, 101):
        gradient = (size * (0.5 + rng.standard_normal(count))).astype(np.float32)
        for row, values in zip(memory, arrays, strict=True):
            row[1:-1] = values
        param, first, second = (row[1:-1] for row in memory)
        _core.adamw(param, gradient, first, second, **OPTIONS, step=step)
        arrays = memory[:, 1:-1].copy()
        wide, *moments = expected
        expected_step(wide, gradient.astype(float), *moments, **OPTIONS, step=step)
    assert np.isnan(memory[:, [0, -1]]).all(), "wrote outside an array"
    assert (abs(arrays[0] - expected[0]) <= 1e-6 * abs(expected[0]).max()).all()
    assert (abs(arrays[2] - expected[2]) <= 200 * 2.0**-24 * expected[2]).all()


def test_steps_are_those_of_torch():
    golden = np.load(GOLDEN)
    for row, after in zip(golden["options"], golden["after"], strict=True):
        options = dict(zip(OPTIONS, map(float, row), strict=True))
        param = golden["start"].copy()
        first, second = np.zeros((2, len(param)), np.float32)
        for step, gradient in enumerate(golden["gradient"], 1):
            _core.adamw(param, gradient, first, second, **options, step=step)
            size = np.maximum(abs(after[step - 1]), 1)
            assert (abs(param - after[step - 1]) <= 1e-6 * size).all()


def test_without_gradients_parameters_only_decay():
    param, (gradient, first, second) = np.float32([1, -2]), np.zeros((3, 2), np.float32)
    _core.adamw(param, gradient, first, second, **OPTIONS, step=1)
    assert (param == np.float32(1 - 1e-3) * np.float32([1, -2])).all()


def test_one_thread_and_many_give_the_same_bits(threads):
    rng = np.random.default_rng(1)
    start, gradient = rng.standard_normal((2, 100_001), dtype=np.float32)
    found, sums = [], []
    for count in (1, 2, 5):
        _core.set_num_threads(threads=count)
        param, (first, second) = start.copy(), np.zeros((2, len(start)), np.float32)
        _core.adamw(param, gradient, first, second, **OPTIONS, step=3)
        found.append(param)
        sums.append(_core.square_sum(gradient))
    assert all((param == found[0]).all() for param in found)
    assert len(set(sums)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta1": 1.0}, "beta1 is 1 and beta2 is 0.99, expected 0 <= beta < 1"),
        ({"beta2": 1.0}, "beta2 is 1"),
        ({"epsilon": 0.0}, "epsilon is 0, expected a number above 0"),
        ({"epsilon": 1e-60}, "epsilon is 1e-60, expected a number above 0"),
        ({"lr": -1.0}, "lr"),
        ({"decay": float("nan")}, "decay"),
        ({"step": 0}, "step"),
    ],
)
def test_bad_options_are_refused(change, message):
    arrays = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        _core.adamw(*arrays, **{**OPTIONS, "step": 1, **change})


@pytest.mark.parametrize("count", [0, 1, 7, 9, 1 << 14, (1 << 20) + (1 << 14) + 3])
def test_square_sum_is_that_of_float64(count):
    x = np.random.default_rng(count).standard_normal(count, dtype=np.float32)
    expected = (x.astype(float) ** 2).sum()
    # Squares are exact in float64; every addition rounds the sum so far.
    assert abs(_core.square_sum(x) - expected) <= count * 2.0**-52 * expected
    assert _core.square_sum(np.full(3, 3e38, np.float32)) == pytest.approx(2.7e77)
