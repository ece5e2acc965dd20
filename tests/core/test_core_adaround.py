"""csrc/gptq/adaround.c: rounding up or down to fit the outputs."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest

from lowbitq import _core
from lowbitq.formats import Format
from lowbitq.quantizers import adaround, quantize
from lowbitq.tensors import code_of


def rounded(weight, hessian, scale, offset, group=None, **options):
    """Codes of 2 bits between guards, and the softness."""
    options = {"steps": 300, "rate": 0.1, "strength": 10.0} | options
    codes = np.full((len(weight) + 2, weight.shape[1]), 255, np.uint8)
    group = group or weight.shape[1]
    upper = np.where(np.tri(len(hessian), k=-1), np.nan, hessian)  # must not be read
    softness = _core.adaround(
        code_of(Format("int2")), upper, weight, scale, offset, codes[1:-1], group=group, **options
    )
    assert (codes[[0, -1]] == 255).all(), "wrote outside codes"
    return codes[1:-1], softness


def test_small_problems_reach_the_optimum():
    rng = np.random.default_rng(0)
    scale, offset = np.array([[0.7]], np.float32), np.array([[-1.05]], np.float32)
    reached = []
    for seed in range(200):
        cols = 4 + seed % 9
        hessian = oracle.gram(cols, seed)
        weight = rng.standard_normal((1, cols), np.float32)
        codes, softness = rounded(weight, hessian, scale, offset)
        lower = np.clip(np.floor((weight - offset) / scale), 0, 2)
        every = lower + np.array(list(itertools.product([0, 1], repeat=cols)))
        best = oracle.output_loss(weight, every * scale + offset, hessian).min()
        found = oracle.output_loss(weight, codes * scale + offset, hessian)[0]
        assert ((codes == lower) | (codes == lower + 1)).all()
        assert found >= best * (1 - 1e-6)
        assert softness <= 1e-3
        reached.append(found <= best * (1 + 1e-6))
    assert np.mean(reached) >= 0.9


@pytest.mark.parametrize(
    ("text", "options"), [("int2g32", {}), ("int3sym", {}), ("nf4g16", {}), ("int3tensor", {})]
)
def test_no_row_is_worse_than_rounding_to_nearest(text, options):
    weight = np.random.default_rng(1).standard_normal((9, 70), np.float32)
    hessian = oracle.gram(70, 1)
    diagonal = np.diag(hessian).astype(np.float32)
    nearest = quantize(weight, text, importance=diagonal)
    for steps in (0, 60):
        tensor = adaround(weight, hessian, text, steps=steps, **options)
        before, after = (
            oracle.output_loss(weight, t.dequantize(), hessian) for t in (nearest, tensor)
        )
        assert (tensor.scale == nearest.scale).all()
        assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() <= 0.7 * before.sum()


def test_without_correlations_it_is_rounding_to_nearest():
    weight = np.random.default_rng(2).standard_normal((6, 40), np.float32)
    hessian = np.diag(np.random.default_rng(3).uniform(0.5, 2, 40))
    tensor = adaround(weight, hessian, "int3sym", steps=50)
    nearest = quantize(weight, "int3sym", importance=np.diag(hessian).astype(np.float32))
    assert (tensor.codes == nearest.codes).all()


def test_relaxation_beats_flips_alone():
    weight = np.random.default_rng(4).standard_normal((16, 128), np.float32)
    hessian = oracle.gram(128, 4)
    sums = [
        oracle.output_loss(
            weight, adaround(weight, hessian, "int3g64", steps=s).dequantize(), hessian
        ).sum()
        for s in (0, 300)
    ]
    assert sums[1] <= 0.97 * sums[0]


def test_scale_of_the_hessian_does_not_matter():
    weight = np.random.default_rng(5).standard_normal((4, 32), np.float32)
    hessian = oracle.gram(32, 5)
    codes = [adaround(weight, hessian * f, "int2sym", steps=40).codes for f in (1.0, 2.0**40)]
    assert (codes[0] == codes[1]).all()


def test_bad_input_is_named():
    weight, hessian = np.ones((2, 4), np.float32), np.eye(4)
    with pytest.raises(TypeError, match="hessian has dtype complex128, expected real numbers"):
        adaround(weight, hessian.astype(complex), "int4")
    with pytest.raises(ValueError, match=r"hessian has shape \(3, 3\)"):
        adaround(weight, np.eye(3), "int4")
    with pytest.raises(ValueError, match=r"-1\.0 on its diagonal"):
        adaround(weight, -hessian, "int4")
    with pytest.raises(ValueError, match="hessian has inf on its diagonal"):
        adaround(weight, np.diag([1, np.inf, 1, 1]), "int4")
    hessian[0, 1] = np.nan
    with pytest.raises(ValueError, match="the Hessian has a NaN"):
        adaround(weight, hessian, "int4")
    scale = np.ones((2, 1), np.float32)
    weight[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"weight\[1, 2\] is nan"):
        rounded(np.where(np.arange(8).reshape(2, 4) == 6, np.nan, weight), np.eye(4), scale, -scale)
