"""Public functions take what NumPy's users have."""

from __future__ import annotations

import array

import ml_dtypes
import numpy as np
import pytest

import lowbitq as lq
from lowbitq.arrays import float32, float64

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-512, 512, (16, 64)).astype(np.float32) / 256  # also exact in float16

KINDS = {
    "float64": WEIGHT.astype(np.float64),
    "float16": WEIGHT.astype(np.float16),
    "Fortran": np.asfortranarray(WEIGHT),
    "strided": np.repeat(np.repeat(WEIGHT, 2, 0), 3, 1)[::2, ::3],
    "reversed": WEIGHT[::-1, ::-1].copy()[::-1, ::-1],
    "big-endian": WEIGHT.astype(">f4"),
    "read-only": np.frombuffer(WEIGHT.tobytes(), np.float32).reshape(WEIGHT.shape),
    "lists": WEIGHT.tolist(),
    "rows": list(WEIGHT),
}


class Torch:
    """What torch's tensors do: no NumPy for bfloat16, none while they take part in gradients."""

    def __init__(self, values, brain=False, gradient=False):
        self.values, self.brain, self.gradient = values, brain, gradient

    def detach(self):
        return Torch(self.values, self.brain)

    def float(self):
        return Torch(self.values)

    def __array__(self, dtype=None, copy=None):
        if self.gradient:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad")
        if self.brain:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


class Exchanged:
    """An array of another library, by DLPack alone."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


KINDS["torch"] = Torch(WEIGHT, gradient=True)
KINDS["torch bfloat16"] = Torch(WEIGHT, brain=True, gradient=True)
KINDS["DLPack"] = Exchanged(WEIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_array_is_the_same_matrix(kind):
    found = float32(KINDS[kind])
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.array_equal(found, WEIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_public_functions_take_it(kind):
    other, x = KINDS[kind], RNG.standard_normal((200, 64))
    h = lq.hessian(x)
    assert lq.quantize(other, "int3g32") == lq.quantize(WEIGHT, "int3g32")
    assert lq.gptq(other, h, "int3g32") == lq.gptq(WEIGHT, h, "int3g32")
    assert lq.adaround(other, h, "int3g32", steps=3) == lq.adaround(WEIGHT, h, "int3g32", steps=3)
    assert np.array_equal(lq.kmeans(other, 4), lq.kmeans(WEIGHT, 4))
    assert np.array_equal(lq.hadamard(other), lq.hadamard(WEIGHT))
    assert np.array_equal(lq.hessian(other), lq.hessian(WEIGHT))
    assert np.array_equal(lq.importance(other, other), lq.importance(WEIGHT, WEIGHT))
    assert np.array_equal(lq.Rotation(64).apply(other), lq.Rotation(64).apply(WEIGHT))
    assert np.array_equal(lq.Linear(other).forward(other), lq.Linear(WEIGHT).forward(WEIGHT))
    quantized = lq.quantize(WEIGHT, "int4")
    assert np.array_equal(quantized @ float32(other).T, quantized @ WEIGHT.T)


def test_bfloat16_and_other_sources_of_numbers():
    brain = np.float32([[1, -2.5], [0.375, 256]])
    assert np.array_equal(float32(brain.astype(ml_dtypes.bfloat16)), brain)
    assert float32(array.array("d", [1, 2])).tolist() == [1, 2]
    assert float64([[1, 2]]).dtype == np.float64
    assert float32(3).shape == ()


def test_an_array_that_fits_is_not_copied():
    assert float32(WEIGHT) is WEIGHT or np.shares_memory(float32(WEIGHT), WEIGHT)
    before = WEIGHT.copy()
    lq.hadamard(WEIGHT)[:] = 0
    lq.Rotation(64).apply(WEIGHT)[:] = 0
    assert np.array_equal(WEIGHT, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["a"]], "weight has dtype <U1, expected real numbers"),
        ([[1, 2], [3]], "weight is a list, not numbers"),
        ([[1j]], "weight has dtype complex128"),
        ([[True]], "weight has dtype bool"),
        (None, "weight has dtype object"),
    ],
)
def test_what_is_no_array_of_numbers_is_named(values, message):
    with pytest.raises(TypeError, match=message):
        lq.quantize(values, "int4")


def test_a_number_that_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="weight has a number too large for float32"):
        lq.quantize(np.full((1, 32), 1e39), "int4")
    assert np.isinf(float32([np.inf])).all()
