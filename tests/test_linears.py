"""Linear layers as Python sees them: shapes, biases, rotations, replacement."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import oracle
import pytest
from test_tensors import random_tensor

from lowbitq.checkpoints.packed import narrowest
from lowbitq.grids import UniformGrid, fit_grid
from lowbitq.linears import Activation, Copy, Linear, QuantizedLinear
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
    layer = QuantizedLinear.of(tensor)
    assert layer.activation_bits == 8
    assert (abs(layer.forward(x) - exact) <= slack + 8 * rounding).all()
    plain = QuantizedLinear.of(tensor, activation_bits=None)
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
    layer = QuantizedLinear.of(tensor)
    assert layer.activation_bits == 8
    assert (abs(layer.forward(x) - exact) <= slack + 8 * rounding).all()
    plain = QuantizedLinear.of(tensor, activation_bits=None)
    exact, rounding = oracle.float_linear(tensor.dequantize(), x, None)
    assert (abs(plain.forward(x) - exact) <= rounding).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        {"symmetric": True, "convention": "add", "range": "mse"},
        {},
        {"signed": True},
        {"convention": "add"},
        {"signed": True, "convention": "add", "zero_mode": "floor"},
        {"include_zero": False, "zero_mode": "float"},
        {"include_zero": False, "zero_mode": "float", "convention": "add", "range": "percentile"},
        {"range": "kl"},
    ],
)
def test_an_activation_rounds_to_a_fitted_grid(bits, dtype, options):
    """The product of the weights with what the grid makes of x, in float64."""
    rng = np.random.default_rng(5)
    tensor, (codes, *factors, _) = random_tensor("int4g64", 40, 200)
    scale, offset = (oracle.per_column(factor, 64, 200).astype(np.float64) for factor in factors)
    calibration = (3 * rng.standard_normal((50, 200)) + 7).astype(dtype)
    grid = fit_grid(calibration, bits, restricted=True, **options)
    how = Activation.of_grid(grid)
    assert (how.bits, how.scale) == (bits, grid.scale)
    # Codes from below the lowest to above the highest. x is at most 0.49 steps away from their
    # values, so there are no ties.
    near = rng.integers(grid.low - 9, grid.high + 10, (6, 200))
    wide = UniformGrid(np.float64(grid.scale), np.float64(grid.zero), -999, 999, grid.convention)
    x = wide.value_of(near) + wide.scale * rng.uniform(-0.49, 0.49, near.shape)
    x = x.astype(np.float32)
    assert (grid.encode(x) == np.clip(near, grid.low, grid.high)).all()

    rounded = wide.value_of(grid.encode(x))
    y = QuantizedLinear((Copy(tensor, activation=how),)).forward(x)
    expected = rounded @ (scale * codes + offset).T
    # As oracle.quantized_linear has it for four steps, and the zero: itself, its sum, their product
    # and its addition are rounded, and so are scale and step once more.
    size = (abs(rounded - how.zero) + abs(how.zero)) @ (scale * codes + abs(offset)).T
    assert (abs(y - expected) <= (2 * 4 + 8 + 6) * oracle.U * 1.01 * size).all()


def test_a_grid_that_an_activation_cannot_hold_is_refused():
    x = np.random.default_rng(0).standard_normal((8, 64))
    for bits, restricted, count in [(8, False, 256), (4, False, 16), (5, True, 31), (2, True, 3)]:
        with pytest.raises(ValueError, match=f"grid has {count} codes, expected 255 or 15; fit"):
            Activation.of_grid(fit_grid(x, bits, restricted=restricted))
    several = fit_grid(x, 8, granularity="channel", restricted=True)
    with pytest.raises(ValueError, match=r"grid has a scale of shape \(8, 1\) and zero of shape"):
        Activation.of_grid(several)
    with pytest.raises(ValueError, match=r"scale is .*e-308, expected 2\*\*-100"):
        Activation.of_grid(fit_grid(np.zeros(3) + 1e-320, 8, restricted=True))
    with pytest.raises(ValueError, match="zero is inf"):
        Activation.of_grid(UniformGrid(1.0, -np.inf, 1, 255))


def test_replace_makes_a_new_layer():
    tensor, _ = random_tensor("int4g64", 16, 64)
    x = np.ones((1, 64), np.float32)
    layer = QuantizedLinear.of(tensor)
    other = layer.replace(bias=np.ones(16, np.float32))
    assert layer.bias is None
    np.testing.assert_allclose(other.forward(x), layer.forward(x) + 1, rtol=1e-6)
    assert Linear(x).replace(weight=2 * x).forward(x) == 128


def test_parts_that_do_not_fit_are_refused():
    tensor, _ = random_tensor("int4g64", 16, 64)
    weight = np.zeros((3, 5), np.float32)
    with pytest.raises(ValueError, match="activation_bits is 5, expected 8, 4 or None"):
        QuantizedLinear.of(tensor, activation_bits=5)
    for how, message in (
        ({"clip": 0.0}, "clip is 0.0, expected 0.001 to 1"),
        ({"clip": float("nan")}, "clip is nan"),
        ({"scale": -1.0}, r"scale is -1.0, expected 2\*\*-100 to 2\*\*120 or None"),
        ({"scale": 0.0}, "scale is 0.0, expected"),
        ({"scale": 1e-46}, "scale is 1e-46, expected"),  # a float32 of 0, as if it were None
        ({"scale": 1e37}, r"scale is 1e\+37, expected"),  # times 127, an infinity
        ({"scale": float("nan")}, "scale is nan, expected"),
        ({"zero": "row"}, "zero is 'row', expected a number or 'token'"),
        ({"zero": float("inf")}, "zero is inf"),
        ({"bits": None, "clip": 0.5}, "clip, scale, zero and rotation need 8 or 4 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            Activation(**how)
    with pytest.raises(ValueError, match="axis 0 of bias has size 15, expected rows = 16"):
        QuantizedLinear.of(tensor, np.zeros(15, np.float32))
    with pytest.raises(ValueError, match="axis 0 of bias has size 4, expected rows = 3"):
        Linear(weight, np.zeros(4, np.float32))
    with pytest.raises(TypeError, match="weight has dtype complex128, expected real numbers"):
        Linear(weight.astype(complex))
    with pytest.raises(ValueError, match="axis 1 of x has size 4, expected cols = 5"):
        Linear(weight).forward(np.zeros((1, 4), np.float32))
    with pytest.raises(TypeError, match="x has dtype bool"):
        Linear(weight).forward(np.zeros((1, 5), bool))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_rotation_is_applied_first(kind, tokens):
    tensor, _ = random_tensor("int4g64", 33, 192)
    rotation = Rotation(192, kind=kind, seed=3)
    x = np.random.default_rng(1).normal(size=(tokens, 192)).astype(np.float32)
    kept = x.copy()
    layer = QuantizedLinear.of(tensor, rotation=rotation)
    turned = layer.rotate_input(x)
    assert (turned == rotation.apply(x)).all()
    assert (layer.forward(x) == QuantizedLinear.of(tensor).forward(turned)).all()
    dense = Linear(tensor.dequantize(), rotation=rotation)
    assert (dense.forward(x) == dense.replace(rotation=None).forward(turned)).all()
    assert (x == kept).all()


def test_a_rotation_of_another_order_is_refused():
    with pytest.raises(ValueError, match="rotation has order 64, but the layer has 5 columns"):
        Linear(np.zeros((3, 5), np.float32), rotation=Rotation(64))


# --- copies ---------------------------------------------------------------------------------------


def layer_of_copies():
    """Two copies of their own, one with the tensor of the first, and an adapter."""
    rng = np.random.default_rng(3)
    one, two = (random_tensor(text, 33, 192)[0] for text in ("int2g64", "int3g64"))
    copies = [
        Copy(one, Rotation(192, seed=1), activation=Activation(4, clip=0.9)),
        Copy(two, output_rotation=Rotation(33, seed=2), weight=rng.normal(size=33).astype("f4")),
        Copy(one, activation=Activation(zero="token")),
    ]
    adapter = tuple(rng.normal(size=(n, 3)).astype(np.float32) for n in (33, 192))
    return QuantizedLinear(copies, rng.normal(size=33).astype(np.float32), adapter)


def test_a_layer_is_the_sum_of_its_copies():
    layer = layer_of_copies()
    x = np.random.default_rng(1).normal(size=(5, 192)).astype(np.float32)
    alone = [QuantizedLinear((copy,)).forward(x).astype(np.float64) for copy in layer.copies]
    expected = sum(alone) + x @ layer.adapter[1] @ layer.adapter[0].T + layer.bias
    np.testing.assert_allclose(
        layer.forward(x), expected, rtol=1e-5, atol=1e-5 * abs(expected).max()
    )


def test_dequantized_copies_compute_the_same_without_rounding():
    layer = layer_of_copies()
    exact = layer.replace(copies=[replace(c, activation=Activation(None)) for c in layer.copies])
    x = np.random.default_rng(1).normal(size=(5, 192)).astype(np.float32)
    expected = x.astype(np.float64) @ layer.dequantize().T + layer.bias
    size = abs(expected).max()
    np.testing.assert_allclose(exact.forward(x), expected, atol=1e-5 * size)
    np.testing.assert_allclose(layer.to_float().forward(x), expected, atol=1e-5 * size)
    one = QuantizedLinear.of(layer.copies[0].tensor, layer.bias, Rotation(192, seed=1))
    assert np.array_equal(one.to_float().weight, one.tensor.dequantize())
    assert one.to_float().rotation is one.rotation


def test_everything_stored_is_counted_once():
    layer = layer_of_copies()
    one, two, _ = layer.copies
    expected = one.tensor.nbytes + two.tensor.nbytes + 4 * 33 + 4 * 3 * (33 + 192)
    assert layer.nbytes == expected
    assert layer.bits_per_weight == 8 * expected / (33 * 192)


@pytest.mark.parametrize(("value", "size"), [(0.5, 2), (2.0**100, 2), (1 + 2.0**-20, 4)])
def test_an_adapter_counts_as_many_bits_as_a_file_takes(value, size):
    tensor = layer_of_copies().copies[0].tensor
    adapter = tuple(np.full((n, 3), value, np.float32) for n in (33, 192))
    layer = QuantizedLinear((Copy(tensor),), None, adapter)
    assert layer.nbytes == tensor.nbytes + size * 3 * (33 + 192)
    assert size == narrowest(adapter[0]).dtype.itemsize


def test_what_only_one_copy_has():
    layer = layer_of_copies()
    for name in ("tensor", "rotation", "activation_bits"):
        with pytest.raises(ValueError, match="the layer has 3 copies, expected 1"):
            getattr(layer, name)


def test_layers_of_copies_pickle():
    layer = layer_of_copies()
    again = pickle.loads(pickle.dumps(layer))
    x = np.random.default_rng(1).normal(size=(5, 192)).astype(np.float32)
    assert np.array_equal(again.forward(x), layer.forward(x))
    assert again.nbytes == layer.nbytes
