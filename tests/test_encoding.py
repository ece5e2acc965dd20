"""encode(): one layer by its plan."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq.encoding import LayerInputs, encode
from lowbitq.formats import Format
from lowbitq.gptq import feedback, gptq
from lowbitq.linears import Linear
from lowbitq.plans import LayerPlan, Rounding
from lowbitq.quantizers import quantize
from lowbitq.rotations import Rotation

RNG = np.random.default_rng(0)
X = RNG.standard_normal((300, 96)) @ RNG.standard_normal((96, 96))
H = X.T @ X
LINEAR = Linear(
    RNG.standard_normal((20, 96), np.float32), RNG.standard_normal(20, np.float32), Rotation(96)
)


def test_rounding_to_nearest_is_quantize():
    how = Rounding(method="rtn", range="minmax")
    layer, record = encode(LINEAR, LayerInputs(), LayerPlan.parse("int3g32", how))
    expected = quantize(LINEAR.weight, "int3g32", range="minmax")
    assert np.array_equal(layer.tensor.panels, expected.panels)
    error = ((expected.dequantize() - LINEAR.weight) ** 2).sum() / (LINEAR.weight**2).sum()
    assert record["relative_error"] == pytest.approx(error, rel=1e-4)
    assert not {"damping", "retries", "dead"} & set(record)


def test_feedback_is_gptq():
    how = Rounding(order="act", damping=0.05, sweeps=1, norm=2.4)
    layer, record = encode(LINEAR, LayerInputs(H), LayerPlan.parse("int2g32 a4", how))
    known = feedback(H, group=32, order="act", damping=0.05)
    expected, error = gptq(LINEAR.weight, known, "int2g32", sweeps=1, norm=2.4)
    assert np.array_equal(layer.tensor.panels, expected.panels)
    assert record["relative_error"] == error
    assert (record["damping"], record["retries"], record["dead"]) == (known.damping, 0, 0)
    assert layer.activation_bits == 4


def test_bias_and_rotation_are_kept():
    layer, _ = encode(LINEAR, LayerInputs(H), LayerPlan.parse("int4g32"))
    assert layer.bias is LINEAR.bias
    assert layer.rotation is LINEAR.rotation


def test_layers_of_one_input_share_a_factor():
    """Unless their groups, or how it is factored, differ."""
    inputs, rtn = LayerInputs(H), Rounding()
    one = inputs.feedback(Format.parse("int4g32"), rtn)
    assert inputs.feedback(Format.parse("int2g32"), Rounding(sweeps=1)) is one
    assert inputs.feedback(Format.parse("int4"), rtn) is not one
    assert inputs.feedback(Format.parse("int4g32"), Rounding(damping=0.1)) is not one


def test_refusals():
    with pytest.raises(ValueError, match="needs the Hessian of the layer's inputs, found None"):
        encode(LINEAR, LayerInputs(), LayerPlan.parse("int4g32"))
    with pytest.raises(ValueError, match="plan is 'int4 \\+ int4 residual', expected one copy"):
        encode(LINEAR, LayerInputs(H), LayerPlan.parse("int4 + int4 residual"))


def test_a_layer_of_zeros_has_no_error():
    zeros = Linear(np.zeros((16, 96), np.float32))
    for how in (Rounding(), Rounding(method="rtn")):
        _, record = encode(zeros, LayerInputs(H), LayerPlan.parse("int4g32sym", how))
        assert record["relative_error"] == 0
