"""Linear layers as Python sees them: shapes, biases, rotations, replacement."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from test_tensors import random_tensor

from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.rotations import Rotation


def test_dense_layer_is_a_product():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(19, 70)), rng.normal(size=(5, 70))
    weight, x = weight.astype(np.float32), x.astype(np.float32)
    bias = np.arange(19, dtype=np.float32)
    layer = Linear(weight, bias)
    expected, bound = oracle.float_linear(weight, x, bias)
    assert layer.shape == (19, 70)
    assert (abs(layer.forward(x) - expected) <= bound).all()
    assert layer.rotate_input(x) is x
    assert (layer.nbytes, layer.bits_per_weight) == (4 * 19 * 70, 32)


@pytest.mark.parametrize("text", ["int2g64", "ternaryg128", "int3g32s4", "binary", "int8"])
def test_int8_activations_cost_half_a_step_per_column(text):
    """Rounding moves an activation by half a step at most, so y by that times sum |w|."""
    tensor, _ = random_tensor(text, 40, 200)
    x = np.random.default_rng(1).normal(size=(6, 200)).astype(np.float32)
    step = tensor.format.group or 64
    exact, rounding = oracle.float_linear(tensor.dequantize(), x, None)
    _, scale = oracle.quantize_activations(x, step, 127)
    half_steps = oracle.per_column(scale, step, 200) * np.float32(0.5001)
    slack = half_steps @ abs(tensor.dequantize()).T
    layer = QuantizedLinear(tensor)
    assert layer.activation_bits == 8
    assert (abs(layer.forward(x) - exact) <= slack + 8 * rounding).all()
    plain = QuantizedLinear(tensor, activation_bits=None)
    assert (abs(plain.forward(x) - exact) <= rounding).all()


@pytest.mark.parametrize("text", ["nf4g64", "kmeans2", "log4g32"])
def test_rounded_levels_cost_half_a_step_per_column(text):
    """On top of what rounded activations cost: a 254th of the largest level, times sum |x|."""
    tensor, _ = random_tensor(text, 40, 200)
    x = np.random.default_rng(1).normal(size=(6, 200)).astype(np.float32)
    group = tensor.format.group or 200
    q, scale = oracle.quantize_activations(x, tensor.format.group or 64, 127)
    rounded = q * oracle.per_column(scale, tensor.format.group or 64, 200)
    exact, rounding = oracle.float_linear(tensor.dequantize(), rounded.astype(np.float32), None)
    half_steps = oracle.per_column(tensor.scale, group, 200) * abs(tensor.levels).max() / 254
    slack = abs(rounded) @ half_steps.T * 1.0001
    layer = QuantizedLinear(tensor)
    assert layer.activation_bits == 8
    assert (abs(layer.forward(x) - exact) <= slack + 8 * rounding).all()
    plain = QuantizedLinear(tensor, activation_bits=None)
    exact, rounding = oracle.float_linear(tensor.dequantize(), x, None)
    assert (abs(plain.forward(x) - exact) <= rounding).all()


def test_replace_makes_a_new_layer():
    tensor, _ = random_tensor("int4g64", 16, 64)
    x = np.ones((1, 64), np.float32)
    layer = QuantizedLinear(tensor)
    other = layer.replace(bias=np.ones(16, np.float32))
    assert layer.bias is None
    np.testing.assert_allclose(other.forward(x), layer.forward(x) + 1, rtol=1e-6)
    assert Linear(x).replace(weight=2 * x).forward(x) == 128


def test_parts_that_do_not_fit_are_refused():
    tensor, _ = random_tensor("int4g64", 16, 64)
    weight = np.zeros((3, 5), np.float32)
    with pytest.raises(ValueError, match="activation_bits is 5, expected 8, 4 or None"):
        QuantizedLinear(tensor, activation_bits=5)
    with pytest.raises(ValueError, match="axis 0 of bias has size 15, expected rows = 16"):
        QuantizedLinear(tensor, np.zeros(15, np.float32))
    with pytest.raises(ValueError, match="axis 0 of bias has size 4, expected rows = 3"):
        Linear(weight, np.zeros(4, np.float32))
    with pytest.raises(TypeError, match="weight has dtype float64, expected float32"):
        Linear(weight.astype(np.float64))
    with pytest.raises(ValueError, match="weight is not C-contiguous"):
        Linear(weight.T)
    with pytest.raises(ValueError, match="axis 1 of x has size 4, expected cols = 5"):
        Linear(weight).forward(np.zeros((1, 4), np.float32))
    with pytest.raises(TypeError, match="x has dtype float64"):
        Linear(weight).forward(np.zeros((1, 5)))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_rotation_is_applied_first(kind, tokens):
    tensor, _ = random_tensor("int4g64", 33, 192)
    rotation = Rotation(192, kind=kind, seed=3)
    x = np.random.default_rng(1).normal(size=(tokens, 192)).astype(np.float32)
    kept = x.copy()
    layer = QuantizedLinear(tensor, rotation=rotation)
    turned = layer.rotate_input(x)
    assert (turned == rotation.apply(x)).all()
    assert (layer.forward(x) == layer.replace(rotation=None).forward(turned)).all()
    dense = Linear(tensor.dequantize(), rotation=rotation)
    assert (dense.forward(x) == dense.replace(rotation=None).forward(turned)).all()
    assert (x == kept).all()


def test_a_rotation_of_another_order_is_refused():
    with pytest.raises(ValueError, match="rotation has order 64, but the layer has 5 columns"):
        Linear(np.zeros((3, 5), np.float32), rotation=Rotation(64))
