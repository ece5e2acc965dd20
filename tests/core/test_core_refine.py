"""csrc/gptq/refine.c: coordinate descent on codes."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.gptq import feedback, gptq
from lowbitq.quantizers import quantize


def refined(weight, hessian, tensor, damping=0.0, sweeps=50):
    """New codes, their values, and the number of moves; codes between guards."""
    group = tensor.format.group or weight.shape[1]
    scale, offset = tensor.scale, tensor.offset
    codes = np.full((len(weight) + 2, weight.shape[1]), 255, np.uint8)
    codes[1:-1] = tensor.codes
    upper = np.where(np.tri(len(hessian), k=-1), np.nan, hessian)  # must not be read
    options = {"group": group, "damping": damping, "sweeps": sweeps}
    moves = _core.refine(tensor.handle, upper, weight, scale, offset, codes[1:-1], **options)
    assert (codes[[0, -1]] == 255).all(), "wrote outside codes"
    return codes[1:-1], values_of(codes[1:-1], tensor), moves


def values_of(codes, tensor):
    group = tensor.format.group or codes.shape[1]
    wide = [np.repeat(a, group, 1)[:, : codes.shape[1]] for a in (tensor.scale, tensor.offset)]
    levels = np.arange(256.0) if tensor.levels is None else tensor.levels.astype(float)
    return wide[0].astype(float) * levels[codes] + wide[1]


@pytest.mark.parametrize("text", ["int2g32", "int3sym", "nf4g16", "ternary", "int4tensor", "int8"])
def test_ends_where_no_single_move_helps(text):
    weight = np.random.default_rng(0).standard_normal((7, 90), np.float32)
    hessian = oracle.gram(90, 0)
    tensor = quantize(weight, text)
    codes, values, moves = refined(weight, hessian, tensor)
    before = oracle.output_loss(weight, values_of(tensor.codes, tensor), hessian)
    after = oracle.output_loss(weight, values, hessian)
    assert moves > 0
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < 0.8 * before.sum()
    assert codes.max() < tensor.format.level_count
    for way in (-1, 1):
        moved = np.clip(codes.astype(int) + way, 0, tensor.format.level_count - 1).astype(np.uint8)
        turn = values - values_of(moved, tensor)
        product = (weight - values) @ hessian
        change = turn * (2 * product + turn * np.diag(hessian))
        # The descent ignores gains below 1e-9 of what a free weight would gain.
        assert (change >= -2e-9 * product**2 / np.diag(hessian) - 1e-12).all()


def descend(weight, hessian, tensor, sweeps):
    """Codes by the definition, in float64."""
    codes = tensor.codes.astype(int)
    levels = np.arange(256.0) if tensor.levels is None else tensor.levels.astype(float)
    group = tensor.format.group or weight.shape[1]
    for row, code in enumerate(codes):
        product = (weight[row] - values_of(codes, tensor)[row]) @ hessian
        for _ in range(sweeps):
            for k, curvature in enumerate(np.diag(hessian)):
                near = [c for c in (code[k] - 1, code[k] + 1) if 0 <= c < tensor.format.level_count]
                turns = tensor.scale[row, k // group].astype(float) * (
                    levels[code[k]] - levels[near]
                )
                changes = turns * (2 * product[k] + turns * curvature)
                best = np.argmin(changes)
                if changes[best] < -1e-9 * product[k] ** 2 / curvature:
                    code[k] = near[best]
                    product += turns[best] * hessian[k]
    return codes


@pytest.mark.parametrize("text", ["int2g64", "nf4g32", "int3sym"])
@pytest.mark.parametrize("unit", [1.0, 1e100, 1e-100])
def test_codes_are_those_of_float64(isa, text, unit):
    """Several blocks of columns and tiles of rows, in units beyond float32's range."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((13, 300), np.float32)
    hessian = oracle.gram(300, 4) + np.outer(*2 * [rng.uniform(0.5, 1, 300)])
    tensor = quantize(weight, text)
    codes, _, moves = refined(weight, unit * hessian, tensor, sweeps=2)
    assert moves > 0
    assert (codes == descend(weight, hessian, tensor, sweeps=2)).all()


def test_close_calls_are_those_of_float64(isa):
    """Weights halfway between two levels, up to rounding to float32."""
    rng = np.random.default_rng(5)
    tensor = quantize(rng.standard_normal((13, 300), np.float32), "nf4g64")
    ways = np.where(tensor.codes < 8, 1, -1).astype(np.int8)
    halfway = values_of(tensor.codes, tensor) / 2 + values_of(tensor.codes + ways, tensor) / 2
    hessian = np.diag(rng.uniform(0.5, 1, 300))
    codes, _, moves = refined(halfway.astype(np.float32), hessian, tensor, sweeps=2)
    assert 0.2 * codes.size < moves < 0.8 * codes.size
    assert (codes == descend(halfway.astype(np.float32), hessian, tensor, sweeps=2)).all()


def test_damping_adds_to_the_diagonal():
    weight = np.random.default_rng(1).standard_normal((5, 40), np.float32)
    hessian = oracle.gram(40, 1)
    tensor = quantize(weight, "int3g32")
    damped = refined(weight, hessian, tensor, damping=0.5)[0]
    assert (damped == refined(weight, hessian + 0.5 * np.eye(40), tensor)[0]).all()
    assert (refined(weight, hessian, tensor, damping=1e9)[0] == tensor.codes).all()


def test_no_sweeps_and_no_correlations_leave_the_codes():
    weight = np.random.default_rng(2).standard_normal((5, 40), np.float32)
    tensor = quantize(weight, "int3g32")
    assert refined(weight, oracle.gram(40, 2), tensor, sweeps=0)[2] == 0
    assert refined(weight, np.diag(np.arange(40.0)), tensor)[2] == 0


@pytest.mark.parametrize("text", ["int2g64sym", "int3g64", "kmeans2g32"])
def test_sweeps_improve_on_error_feedback(text):
    weight = np.random.default_rng(3).standard_normal((16, 128), np.float32)
    inputs = feedback(oracle.gram(128, 3), group=Format.parse(text).group)
    errors = [gptq(weight, inputs, text, sweeps=sweeps)[1] for sweeps in (0, 3)]
    assert errors[1] <= 0.97 * errors[0]


def test_bad_input_is_named():
    weight, hessian = np.ones((2, 4), np.float32), np.eye(4)
    tensor = quantize(weight, "int2sym")
    codes, scale, offset = tensor.codes, tensor.scale, tensor.offset
    options = {"group": 4, "damping": 0.0, "sweeps": 1}
    codes[1, 3] = 4
    with pytest.raises(ValueError, match=r"weight\[1, 3\] is 1 with code 4"):
        _core.refine(tensor.handle, hessian, weight, scale, offset, codes, **options)
    bad = np.full((4, 4), np.inf)
    with pytest.raises(ValueError, match="Hessian has a NaN"):
        _core.refine(tensor.handle, bad, weight, scale, offset, tensor.codes, **options)
