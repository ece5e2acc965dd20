"""Fake quantization of inputs against the packed product, and its gradients against float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from lowbitq import _core
from lowbitq.linears import Activation, Copy, QuantizedLinear
from lowbitq.quantizers import quantize
from lowbitq.rotations import Rotation

ROWS, COLS, STEP = 24, 80, 32  # the last step has half its columns
NAN = float("nan")

# Clip, scale and zero.
WAYS = {
    "plain": (1, 0, 0),
    "clipped": (0.6, 0, 0),
    "given": (1, 0.04, 0),
    "given, centred": (1, 0.3, 0.5),
    "zero": (0.8, 0, -0.3),
    "zero by token": (0.9, 0, NAN),
    "given, zero by token": (1, 0.05, NAN),
}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@pytest.mark.parametrize("rotation", [None, Rotation(COLS, seed=2), Rotation(COLS, "orthogonal")])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_product_is_that_of_packed_weights(isa, way, bits, rotation, tokens):
    clip, scale, zero = WAYS[way]
    tensor = quantize(normal(ROWS, COLS), f"int3g{STEP}")
    how = Activation(bits, clip, scale or None, "token" if np.isnan(zero) else zero)
    fusion, x = normal(ROWS, seed=1), normal(tokens, COLS, seed=3)
    packed = Copy(tensor, rotation, activation=how, weight=fusion)
    expected = QuantizedLinear((packed,)).forward(x)
    values = np.float32(WAYS[way])
    turn = None if rotation is None else rotation.handle
    copy = _core.copy_rounding(tensor.dequantize(), turn, None, fusion, packed.handle, values)
    y = np.empty((tokens, ROWS), np.float32)
    _core.linear_forward(_core.linear((copy,), None, None, None), x, y)
    size = abs(fusion) * (abs(x).max() * COLS * abs(tensor.dequantize()).max())
    assert (abs(y - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize("rotation", [None, Rotation(COLS, seed=2)])
@pytest.mark.parametrize("basis", [Rotation(COLS, seed=3), Rotation(COLS, "orthogonal")])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_inputs_are_rounded_in_a_basis_of_their_own(isa, way, bits, basis, rotation):
    """The product takes T^T round(T R x) in 8 bits."""
    clip, scale, zero = WAYS[way]
    tensor, x = quantize(normal(ROWS, COLS), f"int3g{STEP}"), normal(9, COLS, seed=3)
    how = Activation(bits, clip, scale or None, "token" if np.isnan(zero) else zero, basis)
    found = QuantizedLinear((Copy(tensor, rotation, activation=how),)).forward(x)
    turned = basis.apply(x if rotation is None else rotation.apply(x))
    rounded = np.empty_like(x)
    _core.round_inputs(turned, np.float32(WAYS[way]), rounded, bits=bits, step=STEP)
    expected = QuantizedLinear((Copy(tensor),)).forward(basis.inverse(rounded))
    assert (found == expected).all()


def test_copies_round_together_what_they_round_alike():
    """By value: the rotations and their handles are two objects."""
    tensors = [quantize(normal(ROWS, COLS, seed=i), f"int3g{STEP}") for i in range(2)]

    def inputs(*bases):
        layers = tuple(
            QuantizedLinear((Copy(tensor, activation=Activation(4, rotation=basis)),)).handle
            for tensor, basis in zip(tensors, bases, strict=True)
        )
        return _core.linears_inputs(layers)

    assert inputs(Rotation(COLS, seed=3), Rotation(COLS, seed=3)) == 1
    assert inputs(Rotation(COLS, seed=3), Rotation(COLS, seed=4)) == 2
    assert inputs(None, Rotation(COLS, seed=4)) == 2


def backward(x, g, values, bits, basis=None):
    """dx, and gradients of the values, of y = act(x)."""
    weight = np.eye(COLS, dtype=np.float32)
    how = Activation(bits, rotation=basis)
    packed = Copy(quantize(weight, f"int4g{STEP}"), activation=how)
    copy = _core.copy_rounding(weight, None, None, None, packed.handle, values)
    layer = _core.linear((copy,), None, None, None)
    dx, dvalues = np.full_like(x, np.nan), np.zeros(3, np.float32)
    sink = _core.linear_gradient(
        (_core.copy_gradient(None, None, dvalues, None),), None, None, None
    )
    _core.linear_backward(layer, x, g, sink, dx)
    return dx, dvalues


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_gradients(isa, way, bits):
    x, g = normal(37, COLS), normal(37, COLS, seed=1)
    values, how = np.float32(WAYS[way]), {"bits": bits, "step": STEP}
    dx, dvalues = backward(x, g, values, bits)
    held = oracle.fake_quantize(x.astype(float), *values.tolist(), **how)[1]

    def value(x, values):
        return (oracle.fake_quantize(x, *values, **how, rounding=held)[0] * g).sum()

    rng, size = np.random.default_rng(0), float(np.linalg.norm(dx))
    for direction in (dx.astype(float), rng.standard_normal(x.shape)):
        unit = direction / np.linalg.norm(direction)
        low, high = (value(x + h * unit, values.tolist()) for h in (-1e-6, 1e-6))
        found = (dx * unit).sum(dtype=float)
        assert found == pytest.approx((high - low) / 2e-6, abs=1e-3 * size)
    size = float(np.linalg.norm(g) * abs(x).max())
    for i, number in enumerate(values.astype(float)):
        by_token = np.isnan(number) or (i == 1 and number == 0)
        if by_token or (i == 0 and values[1] > 0):
            assert dvalues[i] == 0, "there is no such number"
            continue
        near = [values.astype(float) for _ in range(2)]
        for change, h in zip(near, (-1e-6, 1e-6), strict=True):
            change[i] += h
        expected = (value(x.astype(float), near[1]) - value(x.astype(float), near[0])) / 2e-6
        assert dvalues[i] == pytest.approx(expected, rel=1e-3, abs=1e-5 * size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_in_a_basis(isa, way, bits):
    """Of T^T act(T x): those of act, rotated."""
    basis, values = Rotation(COLS, seed=3), np.float32(WAYS[way])
    x, g = normal(37, COLS), normal(37, COLS, seed=1)
    dx, dvalues = backward(x, g, values, bits, basis)
    turned, expected = backward(basis.apply(x), basis.apply(g), values, bits)
    assert np.allclose(dx, basis.inverse(turned), atol=1e-5)
    assert np.allclose(dvalues, expected, rtol=1e-4, atol=1e-4)


def test_silent_steps_and_many_threads():
    x, g, values = normal(100, COLS), normal(100, COLS, seed=1), np.float32([0.7, 0, 0])
    x[::3, :STEP] = 0
    before, results = _core.config()["threads"], []
    try:
        for threads in (1, 2, 3):
            _core.set_num_threads(threads=threads)
            results.append(backward(x, g, values, 8))
    finally:
        _core.set_num_threads(threads=before)
    for dx, dvalues in results:
        assert np.isfinite(dx).all()
        assert (dx[::3, :STEP] == g[::3, :STEP]).all()
        assert (dx == results[0][0]).all()
        assert (dvalues == results[0][1]).all()


def test_refusals():
    weight, values = normal(4, 6), np.float32([1, 0, 0])
    tensor = quantize(weight, "int4g64")

    wrong = Activation(8, rotation=Rotation(8))
    with pytest.raises(ValueError, match="rounding rotation has order 8, but the layer has 6 col"):
        Copy(tensor, activation=wrong)
    with pytest.raises(ValueError, match="rotation need 8 or 4 bits"):
        Activation(None, rotation=Rotation(6))

    def copy(values=values, bits=8):
        packed = Copy(tensor, activation=Activation(bits))
        return _core.copy_rounding(weight, None, None, None, packed.handle, values)

    with pytest.raises(ValueError, match="inputs are rounded to 0 bits, expected 8 or 4"):
        copy(bits=None)
    with pytest.raises(ValueError, match=r"clip is 1\.5, expected a number above 0, at most 1"):
        copy(values=np.float32([1.5, 0, 0]))
    with pytest.raises(ValueError, match="scale is -1, expected 0 or a finite number"):
        copy(values=np.float32([1, -1, 0]))
    with pytest.raises(ValueError, match="values"):
        copy(values=np.float32([1, 0]))
    with pytest.raises(ValueError, match="rounding"):
        _core.copy_gradient(None, None, np.zeros(2, np.float32), None)
    plain = _core.linear((_core.copy_dense(weight, None, None, None),), None, None, None)
    sink = _core.linear_gradient((_core.copy_gradient(None, None, values, None),), None, None, None)
    with pytest.raises(ValueError, match="how copy 0 rounds its inputs, but it does not"):
        _core.linear_backward(plain, normal(2, 6), normal(2, 4), sink, normal(2, 6))
