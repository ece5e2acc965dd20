"""csrc/codes/lattice.c: points of E8, and the nearest one."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from random_model import random_model, random_tokens

from lowbitq.compression import compress
from lowbitq.formats import Format
from lowbitq.gptq import feedback, gptq
from lowbitq.linears import QuantizedLinear
from lowbitq.models import load
from lowbitq.quantizers import quantize
from lowbitq.tensors import QuantizedTensor

SIZES = [(1, 1), (15, 33), (16, 64), (50, 200)]


def normal(rows, cols, seed=0):
    return np.random.default_rng([seed, rows, cols]).standard_normal((rows, cols), np.float32)


def test_distortion_of_a_normal_variable():
    weight = oracle.normal_quantiles(64 * 1600)
    weight = np.random.default_rng(0).permutation(weight).reshape(512, 200).astype(np.float32)
    for text in ("lattice2", "lattice2tensor"):
        assert ((quantize(weight, text).dequantize() - weight) ** 2).mean() <= 0.093


def test_points_are_the_nearest_of_all():
    words = np.arange(1 << 16)[:, None] >> 2 * np.arange(8) & 3
    points = oracle.lattice_levels(words.astype(np.uint8)) - 5.5
    assert len(np.unique(points, axis=0)) == 1 << 16
    assert ((points - points[:, :1]) % 1 == 0).all()
    assert (abs(points) % 1 == 0.5).all()
    weight = normal(40, 8) * np.linspace(0.5, 3, 40, dtype=np.float32)[:, None]
    tensor = quantize(weight, "lattice2tensor")
    values = np.float64(tensor.unit) * points
    best = [((values - w) ** 2).sum(1).min() for w in weight.astype(float)]
    found = ((tensor.dequantize() - weight.astype(float)) ** 2).sum(1)
    assert np.allclose(found, best, rtol=1e-5)


@pytest.mark.parametrize("text", ["lattice2", "lattice2g64", "lattice2g16s8", "lattice2tensor"])
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_values_are_those_of_the_formula(isa, rows, cols, text):
    tensor = quantize(normal(rows, cols), text)
    assert tensor.codes.shape == (rows, -(-cols // 8) * 8)
    levels = oracle.lattice_levels(tensor.codes)[:, :cols]
    exact = oracle.decode(levels, tensor.scale, tensor.offset, tensor.format.group or cols)
    values = tensor.dequantize()
    assert (values == exact.astype(np.float32)).all()
    again = QuantizedTensor.from_arrays(*tensor.to_arrays())
    assert (again.dequantize() == values).all()


@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize("text", ["lattice2g64", "lattice2"])
@pytest.mark.parametrize(("rows", "cols"), [*SIZES, (50, 1500)])
def test_products_are_within_rounding(isa, rows, cols, text, activation_bits):
    tensor = QuantizedTensor.pack(
        text,
        np.random.default_rng(rows).integers(0, 4, (rows, -(-cols // 8) * 8), np.uint8),
        np.full((rows, Format.parse(text).groups(cols)), 2.0**-7, np.float32),
        shape=(rows, cols),
    )
    layer = QuantizedLinear.of(tensor, activation_bits=activation_bits)
    levels = oracle.lattice_levels(tensor.codes)[:, :cols]
    for tokens in (1, 3, 9):
        x = normal(tokens, cols)
        parts = levels, tensor.scale, tensor.offset, tensor.format.group or cols
        y, bound = oracle.quantized_linear(*parts, x, None, (1 << activation_bits - 1) - 1)
        assert (abs(layer.forward(x) - y) <= bound).all()
        y, bound = oracle.float_linear(tensor.dequantize(), x, None)
        assert (abs(tensor @ x.T - y.T) <= bound.T).all()


@pytest.mark.parametrize("order", ["none", "act", "group"])
@pytest.mark.parametrize("cols", [96, 91])
def test_error_feedback_beats_rounding(order, cols):
    weight, hessian = normal(40, cols), oracle.gram(cols, 1)
    inputs = feedback(hessian, group=32, run=8, order=order)
    tensor, error = gptq(weight, inputs, "lattice2g32", sweeps=2)
    nearest = quantize(weight, "lattice2g32")
    losses = [oracle.output_loss(weight, t.dequantize(), hessian).sum() for t in (nearest, tensor)]
    assert losses[1] < 0.8 * losses[0]
    assert error == pytest.approx(losses[1] / oracle.output_loss(weight, 0, hessian).sum())


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_without_correlations_feedback_is_rounding(arithmetic):
    weight = normal(20, 40)
    inputs = feedback(np.eye(40), run=8, arithmetic=arithmetic)
    tensor, _ = gptq(weight, inputs, "lattice2")
    assert (tensor.panels == quantize(weight, "lattice2").panels).all()


def test_an_order_that_scatters_words_is_refused():
    inputs = feedback(oracle.gram(40, 1), order="act")
    with pytest.raises(ValueError, match="scatters the 8 columns of a word"):
        gptq(normal(4, 40), inputs, "lattice2")


def test_compressed_models_are_saved_and_loaded(isa, tmp_path):
    text, tokens = random_tokens(512).reshape(8, 64), random_tokens(64, seed=1)
    model = compress(random_model(layers=1), "lattice2g32", text=text)
    logits = model.logits(tokens)
    model.save(tmp_path / "model")
    assert (load(tmp_path / "model").logits(tokens) == logits).all()
    errors = [record["relative_error"] for record in model.records.values()]
    assert 0 < max(errors) < 0.2
