"""Layers as sums of copies: what encode() makes of their plans."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model
from student_models import TEXT as TOKENS

from lowbitq import compress, load
from lowbitq.copies import LayerInputs
from lowbitq.encoding import encode
from lowbitq.linears import Linear
from lowbitq.plan_options import Rounding
from lowbitq.plans import LayerPlan
from lowbitq.rotations import Rotation

COLS = 192
RNG = np.random.default_rng(0)
# Inputs whose variances fall over two decades, in directions that no axis has.
Q = np.linalg.qr(RNG.standard_normal((COLS, COLS)))[0]
X = RNG.standard_normal((600, COLS)) * 10 ** -np.linspace(0, 1, COLS) @ Q
H = X.T @ X
LINEAR = Linear(
    RNG.standard_normal((64, COLS), np.float32), RNG.standard_normal(64, np.float32), Rotation(COLS)
)


def made(text, linear=LINEAR, **rounding):
    """The layer of a plan; H is of its raw inputs."""
    turn = np.eye(COLS) if linear.rotation is None else linear.rotation.matrix().astype(float)
    plan = LayerPlan.parse(text, Rounding(**rounding))
    return encode(linear, LayerInputs(turn @ H @ turn.T), plan)


def inner(a, b):
    return np.sum((a.astype(float) @ H) * b)


def weights_of(linear=LINEAR):
    """As raw inputs see them."""
    return linear.to_float().replace(bias=None, rotation=None).weight if linear.rotation is None \
        else linear.rotation.inverse(linear.weight)  # fmt: skip


def relative(matrix, linear=LINEAR):
    weight = weights_of(linear)
    return inner(weight - matrix, weight - matrix) / inner(weight, weight)


@pytest.mark.parametrize("text", [
    "int2g64 + int2g64 hadamard",
    "int2g64 hadamard + int2g64 orthogonal + int2g64",
    "int2g64 + int2g64 residual",
    "int3g64 hadamard + int2g64 orthogonal residual",
    "trellis1w10 + trellis1w10 hadamard residual + lattice2 residual",
    "int2g64 + int2g64 hadamard + int2g64 residual + rank4",
    "int2g64 + int2g64 shared",
    "int2g64 + int2g64 hadamard shared",
    "int2g64 + int2g64 a4 orthogonal shared",
])  # fmt: skip
@pytest.mark.parametrize("linear", [LINEAR, Linear(LINEAR.weight)], ids=["rotated", "plain"])
def test_the_record_tells_the_error_of_the_sum(text, linear):
    layer, record = made(text, linear)
    assert len(layer.copies) == text.count("int") + text.count("trellis") + text.count("lattice")
    assert record["relative_error"] == pytest.approx(relative(layer.dequantize(), linear), rel=1e-3)
    if "rank" not in text:
        assert record["errors"][-1] == record["relative_error"]
        if "residual" in text:
            assert (np.diff(record["errors"]) < 0).all()


def test_float_inputs_see_the_sum():
    layer, _ = made("int2g64 a32 + int2g64 hadamard a32 + int2g64 residual a32")
    x = RNG.standard_normal((5, COLS), np.float32)
    expected = x.astype(float) @ layer.dequantize().T.astype(float) + LINEAR.bias
    assert np.allclose(layer.forward(x), expected, atol=1e-4)


def test_fusion_weights_are_the_least_squares_of_each_row():
    layer, record = made("int2g64 + int3g64 hadamard")
    parts = [copy.replace(weight=None).dequantize() if hasattr(copy, "replace")
             else copy.dequantize() / copy.weight[:, None] for copy in layer.copies]  # fmt: skip
    root = np.linalg.cholesky(H)
    weight = weights_of()
    for row in range(0, 64, 9):
        A = np.stack([part[row].astype(float) @ root for part in parts], 1)
        best = np.linalg.lstsq(A, weight[row].astype(float) @ root, rcond=None)[0]
        found = [copy.weight[row] for copy in layer.copies]
        assert found == pytest.approx(best, abs=2e-3)
        assert (np.float16(found) == found).all()
    equal = sum(parts) / 2
    assert record["relative_error"] < relative(equal)


def test_copies_in_other_rotations_halve_the_error():
    """Their errors are nearly independent; a copy in the same rotation has the same one."""
    one = made("int2g64")[1]["relative_error"]
    same, other = (made(f"int2g64 + int2g64{turn}")[1] for turn in ("", " hadamard"))
    assert same["correlation"] == pytest.approx(1)
    assert abs(other["correlation"]) < 0.2
    assert other["relative_error"] < 0.6 * one
    assert 0.9 * one < same["relative_error"] <= one


def test_shared_copies_average_the_errors_of_rounding_inputs():
    """Not those of the weights, which are one matrix; each copy rounds in another rotation."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((200, COLS), np.float32)
    errors = []
    for copies in (1, 2, 4):
        layer, _ = made(" + ".join(["int4g64 a4"] + (copies - 1) * ["int4g64 a4 hadamard shared"]))
        exact = x.astype(float) @ layer.dequantize().T.astype(float) + LINEAR.bias
        errors.append(np.square(layer.forward(x) - exact).mean())
        assert layer.nbytes == made("int4g64")[0].nbytes + (copies > 1) * copies * 64 * 2
        assert all(copy.tensor is layer.copies[0].tensor for copy in layer.copies)
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.15)
    assert errors[2] == pytest.approx(errors[0] / 4, rel=0.15)


def test_a_residual_is_best_in_another_rotation():
    """Error feedback leaves columns of unequal size, which a rotation evens out."""
    plain, turned = (
        made(f"trellis2w10 + trellis2w10{turn} residual")[1] for turn in ("", " hadamard")
    )
    assert turned["relative_error"] < plain["relative_error"]
    assert turned["correlation"] > 0.85
    assert abs(turned["output_correlation"]) < 0.3


# What the best quantizer of a Gaussian leaves of its variance: J. Max, 1960, table I.
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454}


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_errors_of_gaussian_weights_are_those_of_theory(bits):
    """The mean of n copies leaves (D / n) / (1 - D + D / n), a residual in another rotation D^2."""
    D = LLOYD_MAX[bits]
    linear = Linear(np.random.default_rng(0).standard_normal((512, 512), np.float32))

    def error(*turns):
        copies = [f"kmeans{bits}tensor{turn}" for turn in turns]
        plan = LayerPlan.parse(" + ".join(copies), Rounding(method="rtn"))
        return encode(linear, LayerInputs(), plan)[1]["relative_error"]

    for n in (1, 2, 3, 4):
        expected = D / n / (1 - D + D / n)
        assert error("", *[" hadamard"] * (n - 1)) == pytest.approx(expected, rel=0.02)
    assert error("", " hadamard residual") == pytest.approx(D * D, rel=0.02)


@pytest.mark.parametrize(("copies", "one", "most"), [
    ("trellis1w10 + trellis1w10 residual", "trellis2w10", 1.1),
    ("trellis2w10 + trellis1w10 residual", "trellis3", 1.2),
    ("int2g64 + int2g64 residual", "int4g64", 2.5),
])  # fmt: skip
def test_a_trellis_is_successively_refinable(copies, one, most):
    """On Gaussian weights, without feedback, and unlike a scalar code."""
    linear = Linear(RNG.standard_normal((256, 256), np.float32))
    errors = [
        encode(linear, LayerInputs(), LayerPlan.parse(text, Rounding(method="rtn")))[1]
        for text in (copies, one)
    ]
    ratio = errors[0]["relative_error"] / errors[1]["relative_error"]
    assert ratio < most
    assert ("int" in copies) == (ratio > 1.3)


def test_rotations_come_from_the_seed():
    plan = LayerPlan.parse("int2g64 + int2g64 hadamard")
    layers = [encode(LINEAR, LayerInputs(H), plan, seed)[0] for seed in (0, 0, 1)]
    codes = [layer.copies[1].tensor.codes for layer in layers]
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


@pytest.mark.parametrize("drift", [False, True])
def test_models_of_copies_are_saved_and_resumed(tmp_path, drift):
    model, text = (
        random_model(layers=2),
        "int2g32 + int2g32 hadamard + int2g32 orthogonal a4 shared + trellis1w10 residual + rank2",
    )

    def run():
        return compress(model, text, text=TOKENS, work_dir=tmp_path / "work", drift=drift)

    small = run()
    again = run()  # from the blocks
    small.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    expected = small.hidden(TOKENS[0])
    for other in (again, loaded):
        assert np.array_equal(other.hidden(TOKENS[0]), expected)
        assert other.bits_per_weight == small.bits_per_weight
    blocks = [name for name in small.records if "layers" in name]
    assert [again.records[name] for name in blocks] == [small.records[name] for name in blocks]
    rank = 16 * 2 * sum(sum(linear.shape) for _, linear in small.linears())
    weights = sum(np.prod(linear.shape) for _, linear in small.linears())
    assert small.bits_per_weight > 2 * 3 + 1 + rank / weights
    shared = dict(loaded.linears())["model.layers.0.self_attn.q_proj"].copies[2].activation
    assert shared.bits == 4
    assert shared.rotation is not None


PROGRESSIVE = "int2g32 + int2g32 hadamard residual + trellis1w10 orthogonal residual"


@pytest.fixture(scope="module")
def progressive():
    return compress(random_model(layers=2), PROGRESSIVE, text=TOKENS, drift=False)


@pytest.mark.parametrize(("bits", "count"), [(2, 1), (3.9, 1), (4, 2), (5, 3), (9, 3)])
def test_a_progressive_model_is_read_at_several_widths(tmp_path, progressive, bits, count):
    progressive.save(tmp_path / "all")
    found = load(tmp_path / "all", bits=bits)
    assert {len(linear.copies) for _, linear in found.linears()} == {count}
    found.save(tmp_path / "some")
    again = load(tmp_path / "some")
    expected = progressive.with_copies(count).hidden(TOKENS[0])
    assert np.array_equal(found.hidden(TOKENS[0]), expected)
    assert np.array_equal(again.hidden(TOKENS[0]), expected)
    assert again.bits_per_weight == found.bits_per_weight
    assert {str(layer) for layer in again.plan.layers.values()} == {
        " + ".join(PROGRESSIVE.split(" + ")[:count])
    }


def test_its_first_width_is_the_model_of_that_plan(progressive):
    """In the first block, whose inputs do not depend on the copies."""
    first = compress(random_model(layers=2), "int2g32", text=TOKENS, drift=False)
    narrow = progressive.with_copies(1)
    for name, record in first.records.items():
        if name.startswith("model.layers.0."):
            one, other = dict(first.linears())[name], dict(narrow.linears())[name]
            assert np.array_equal(one.tensor.panels, other.tensor.panels)
            assert narrow.records[name]["relative_error"] == pytest.approx(
                record["relative_error"], rel=1e-3
            )
            assert narrow.records[name]["format"] == "int2g32"


def test_copies_of_some_layers(progressive):
    name = "model.layers.1.mlp.up_proj"
    some = progressive.with_copies({name: 2})
    counts = {key: len(linear.copies) for key, linear in some.linears()}
    assert counts.pop(name) == 2
    assert set(counts.values()) == {3}
    shared = dict(some.linears())[name].copies[0].tensor
    assert shared is dict(progressive.linears())[name].copies[0].tensor
    assert len(dict(progressive.linears())[name].copies) == 3


def test_widths_that_do_not_exist_are_refused(tmp_path, progressive):
    with pytest.raises(ValueError, match=r"count of model.layers.0.* is 0, expected at least 1"):
        progressive.with_copies(0)
    with pytest.raises(KeyError, match="unknown"):
        progressive.with_copies({"unknown": 1})
    averaged = compress(random_model(layers=1), "int2g32 + int2g32 hadamard", text=TOKENS)
    with pytest.raises(ValueError, match="its 2 copies are averaged, and 1 of them are another"):
        averaged.with_copies(1)
    assert averaged.with_copies(2).hidden(TOKENS[0]).shape == (len(TOKENS[0]), 64)
    more = compress(
        random_model(layers=1), "int2g32 + int2g32 hadamard + int2g32 residual", text=TOKENS
    )
    assert {len(linear.copies) for _, linear in more.with_copies(2).linears()} == {2}
    with pytest.raises(ValueError, match="its 3 copies are averaged, and 1 of them"):
        more.with_copies(1)
    progressive.save(tmp_path / "all")
    with pytest.raises(ValueError, match=r"bits is 1, but model.layers.0.* has at least 2.0"):
        load(tmp_path / "all", bits=1)
