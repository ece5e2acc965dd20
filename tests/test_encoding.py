"""encode(): one layer by its plan."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq.copies import LayerInputs
from lowbitq.encoding import _as_weights, encode
from lowbitq.formats import Format
from lowbitq.gptq import feedback, gptq
from lowbitq.linears import Linear
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan
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
    follows = r"the layer: copy 'int4 hadamard' follows a residual copy in plan 'int4 \+ int4 res"
    with pytest.raises(ValueError, match=follows):
        encode(LINEAR, LayerInputs(H), LayerPlan.parse("int4 + int4 residual + int4 hadamard"))
    for bad, expected in (("int3 shared", "format int4"), ("int4 hadamard shared a32", "a4 or a8")):
        copies = LayerPlan.parse(f"int4 + {bad}")
        with pytest.raises(ValueError, match=f"copy is '{copies.copies[1]}'.* expected {expected}"):
            encode(LINEAR, LayerInputs(H), copies)
    message = "the layer: rank is 21, expected at most 20 for 20 x 96 weights"
    with pytest.raises(ValueError, match=message):
        encode(LINEAR, LayerInputs(H), LayerPlan.parse("int4g32 + rank21"))
    with pytest.raises(ValueError, match="needs the Hessian of the layer's inputs, found None"):
        encode(LINEAR, LayerInputs(), LayerPlan.parse("int4g32 + rank1"))


def test_a_layer_of_zeros_has_no_error():
    zeros = Linear(np.zeros((16, 96), np.float32))
    for how in (Rounding(), Rounding(method="rtn")):
        _, record = encode(zeros, LayerInputs(H), LayerPlan.parse("int4g32sym", how))
        assert record["relative_error"] == 0


def outputs_error(layer, linear=LINEAR):
    """tr(E H E^T) / tr(W H W^T) in float64, for the layer's raw inputs."""
    turn = np.eye(96) if linear.rotation is None else linear.rotation.matrix().astype(float)
    hessian, weight = turn.T @ H @ turn, linear.weight @ turn
    error = weight - layer.dequantize()
    return np.sum((error @ hessian) * error) / np.sum((weight @ hessian) * weight)


@pytest.mark.parametrize("linear", [LINEAR, Linear(LINEAR.weight)], ids=["rotated", "plain"])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_an_adapter_lowers_the_error_to_the_optimum(linear, rank):
    plain, before = encode(linear, LayerInputs(H), LayerPlan.parse("int2g32"))
    layer, record = encode(linear, LayerInputs(H), LayerPlan.parse(f"int2g32 + rank{rank}"))
    assert np.array_equal(layer.tensor.panels, plain.tensor.panels)
    assert [x.shape for x in layer.adapter] == [(20, rank), (96, rank)]
    assert record["rank"] == rank
    assert record["relative_error"] == pytest.approx(
        outputs_error(layer, linear), rel=1e-4, abs=1e-9
    )

    damped = H + record["damping"] * np.eye(96)
    error = linear.weight - layer.tensor.dequantize().astype(float)
    values = np.linalg.eigvalsh(error @ damped @ error.T)
    found = error - _as_weights(layer.adapter, linear)
    objective = np.sum((found @ damped) * found)
    # Rounding u, v to float16 moves u v^T S, S S^T = H, by 2^-11 (|u v^T S| + |u| |v| |S|).
    best, size = values[:-rank].sum(), np.linalg.norm(damped, 2) ** 0.5
    lengths = np.prod([np.linalg.norm(x, axis=0) for x in layer.adapter], axis=0)
    moved = 2.0**-11 * np.sum(np.sqrt(values[-rank:]) + size * lengths)
    assert best * (1 - 1e-6) <= objective <= (best**0.5 + 1.01 * moved) ** 2
    assert record["relative_error"] < before["relative_error"]


def test_an_adapter_acts_on_the_input_before_its_rotation():
    """Without the rounding of activations, the layer is the sum of its matrices."""
    layer, _ = encode(LINEAR, LayerInputs(H), LayerPlan.parse("int2g32 a32 + rank4"))
    x = RNG.standard_normal((5, 96), np.float32)
    U, V = layer.adapter
    weight = LINEAR.rotation.inverse(layer.tensor.dequantize()) + U @ V.T
    assert np.allclose(layer.forward(x), x @ weight.T + LINEAR.bias, atol=1e-4)


def test_an_adapter_is_stored_in_sixteen_bits():
    layer, _ = encode(LINEAR, LayerInputs(H), LayerPlan.parse("int2g32 + rank4"))
    assert all(x.dtype == np.float32 and (x == np.float16(x)).all() for x in layer.adapter)
    plain = layer.replace(adapter=None)
    more = 16 * 4 * (20 + 96) / (20 * 96)
    assert layer.bits_per_weight == pytest.approx(plain.bits_per_weight + more)


def test_the_digest_covers_the_adapter():
    plans = [LayerPlan.parse(f"int2g32{rank}") for rank in ("", " + rank2", " + rank3")]
    digests = {encode(LINEAR, LayerInputs(H), plan)[1]["sha256"] for plan in plans}
    assert len(digests) == 3


def test_without_calibration_it_is_the_svd_of_the_weights_error():
    plan = LayerPlan.parse("int3g32 + rank3", Rounding(method="rtn"))
    layer, record = encode(Linear(LINEAR.weight), LayerInputs(), plan)
    values = np.linalg.svd(LINEAR.weight - layer.tensor.dequantize(), compute_uv=False) ** 2
    size = np.square(LINEAR.weight, dtype=float).sum()
    assert record["relative_error"] == pytest.approx(values[3:].sum() / size, rel=1e-3)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_alternation_never_increases_the_error(method):
    errors = []
    for turns in range(5):
        how = Rounding(method=method, alternations=turns)
        layer, record = encode(LINEAR, LayerInputs(H), LayerPlan.parse("int2g32 + rank8", how))
        errors.append(record["relative_error"])
        if method == "gptq":
            assert record["relative_error"] == pytest.approx(outputs_error(layer), rel=1e-4)
    assert (np.diff(errors) <= 0).all()
    assert errors[1] < errors[0]


def test_alternation_without_an_adapter_changes_nothing():
    plans = [LayerPlan.parse("int2g32", Rounding(alternations=turns)) for turns in (0, 3)]
    one, two = (encode(LINEAR, LayerInputs(H), plan)[1] for plan in plans)
    assert one["sha256"] == two["sha256"]


def test_inputs_that_are_always_zero_take_nothing_of_the_adapter():
    hessian = H.copy()
    hessian[:8] = hessian[:, :8] = 0
    linear = Linear(LINEAR.weight)
    _, record = encode(linear, LayerInputs(hessian), LayerPlan.parse("int2g32 + rank20"))
    assert record["dead"] == 8
    assert record["relative_error"] < 1e-6
